"""The NVIDIA GPUs of this host, and those that this process may use, as nvidia-smi and CUDA_VISIBLE_DEVICES say.

nvidia-smi comes with every driver, shows every GPU whatever the environment says, and needs no library. Memory that it
does not tell, `[N/A]` or `[Not Supported]` in its words, is None here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from xml.etree import ElementTree

from fp8pipe.errors import NoSuitableDevice

_FIELDS: tuple[str, ...] = ("index", "uuid", "compute_cap", "memory.total", "memory.free", "mig.mode.current", "name")
_TIMEOUT_S = 60.0
"""A driver that waits for a GPU which no longer answers never returns; a first start takes some seconds a GPU."""
_MIG_LINE = re.compile(r"\s+MIG (?P<profile>\S+)\s+Device\s+(?P<number>\d+): \(UUID: (?P<uuid>\S+)\)")
_GPU_LINE = re.compile(r"GPU \d+: .*\(UUID: (?P<uuid>\S+)\)")


@dataclass(frozen=True, slots=True)
class Gpu:
    """One device that CUDA can be given: a GPU, or an instance of a GPU that MIG divides."""

    index: int
    """nvidia-smi's number of the GPU; instances of one GPU share it."""
    uuid: str
    """`GPU-...`, or `MIG-...` of an instance: what CUDA_VISIBLE_DEVICES takes."""
    name: str
    capability: tuple[int, int]
    """CUDA compute capability; (0, 0) if nvidia-smi does not tell."""
    total_bytes: int | None
    free_bytes: int | None
    """What no process holds now."""

    @property
    def is_instance(self) -> bool:
        """Whether it is a MIG instance. A process can use one at a time, and none together with another device."""
        return self.uuid.startswith("MIG-")


def visible(environ: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """The GPUs that a process with this environment may use, in its order; () without a driver. Of a GPU that MIG
    divides, its instances.

    Raises NoSuitableDevice if nvidia-smi is there and fails.
    """
    return selected(installed(), environ.get("CUDA_VISIBLE_DEVICES"))


def of_device(device: str, count: int = 1) -> tuple[Gpu, ...]:
    """The GPUs of which a process on `device` takes `count`, in its own order: for cuda all that are of the first one's
    model, for cuda:<n> `count` from number n on.

    Raises NoSuitableDevice if there are not as many.
    """
    gpus, (_, pinned, number) = visible(), device.partition(":")
    first = int(number or 0)
    found = gpus[first : first + count] if pinned else tuple(gpu for gpu in gpus if gpu.name == gpus[0].name)
    if len(found) < count:
        where = f" from number {first} on" if pinned else " of one model"
        raise NoSuitableDevice(
            f"{device}: this takes {count} GPU{'s' * (count > 1)}{where}, and this process may use "
            f"{len(gpus if pinned else found)}; see nvidia-smi and CUDA_VISIBLE_DEVICES"
        )
    if count > 1 and found[0].is_instance:
        raise NoSuitableDevice(f"{device}: this takes {count} GPUs, and an engine can use one MIG instance at a time")
    return found


def selected(gpus: Sequence[Gpu], setting: str | None) -> tuple[Gpu, ...]:
    """Those of `gpus` that this value of CUDA_VISIBLE_DEVICES leaves; None: it is not set.

    It lists indices or beginnings of UUIDs; as CUDA does, the list ends at the first entry that names nothing, and an
    entry that comes twice leaves no device. An index means the first instance of a divided GPU.
    """
    if setting is None:
        return tuple(gpus)
    chosen: list[Gpu] = []
    for entry in setting.split(","):
        found = _named(gpus, entry.strip())
        if found is None:
            break
        chosen.append(found)
    return tuple(chosen) if len({gpu.uuid for gpu in chosen}) == len(chosen) else ()


def _named(gpus: Sequence[Gpu], entry: str) -> Gpu | None:
    if entry.isdecimal():
        return next((gpu for gpu in gpus if gpu.index == int(entry)), None)
    matches = [gpu for gpu in gpus if entry.startswith(("GPU-", "MIG-")) and gpu.uuid.startswith(entry)]
    return matches[0] if len(matches) == 1 else None


def installed() -> tuple[Gpu, ...]:
    """Every GPU of the host, whatever the environment says; instances in the place of a GPU that MIG divides."""
    if shutil.which("nvidia-smi") is None:
        return ()
    lines = _ask(f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits").splitlines()
    boards = [dict(zip(_FIELDS, line.split(", ", len(_FIELDS) - 1), strict=True)) for line in lines if line.strip()]
    if not any(board["mig.mode.current"] == "Enabled" for board in boards):
        return tuple(_gpu(board) for board in boards)
    instances = _instances()
    found: list[Gpu] = []
    for board in boards:
        gpu = _gpu(board)
        if board["mig.mode.current"] != "Enabled":
            found.append(gpu)
            continue
        for uuid, profile, total, free in instances.get(gpu.uuid, ()):
            name = f"{gpu.name} MIG {profile}"
            found.append(replace(gpu, uuid=uuid, name=name, total_bytes=total, free_bytes=free))
    return tuple(found)


def driver() -> tuple[str, tuple[int, int] | None]:
    """Version of the driver, and the newest CUDA that it runs; None if it does not tell.

    The CUDA is that of the libcuda which a process loads here, so a compatibility package counts.
    """
    report = ElementTree.fromstring(_ask("-q", "-x"))
    cuda = re.fullmatch(r"(\d+)\.(\d+)", report.findtext("cuda_version", "").strip())
    return report.findtext("driver_version", "").strip(), (int(cuda[1]), int(cuda[2])) if cuda else None


def _gpu(board: Mapping[str, str]) -> Gpu:
    capability = re.fullmatch(r"(\d+)\.(\d+)", board["compute_cap"])
    return Gpu(
        index=int(board["index"]),
        uuid=board["uuid"],
        name=board["name"],
        capability=(int(capability[1]), int(capability[2])) if capability else (0, 0),
        total_bytes=_mebibytes(board["memory.total"]),
        free_bytes=_mebibytes(board["memory.free"]),
    )


def _instances() -> dict[str, list[tuple[str, str, int | None, int | None]]]:
    """UUID of a GPU -> UUID, profile, total and free bytes of its MIG instances. Only `nvidia-smi -L` tells their
    UUIDs, only the report tells their memory; both number them."""
    report = ElementTree.fromstring(_ask("-q", "-x"))
    memory = {
        (gpu.findtext("uuid", "").strip(), mig.findtext("index", "").strip()): tuple(
            _mebibytes(mig.findtext(f"fb_memory_usage/{part}", "")) for part in ("total", "free")
        )
        for gpu in report.iter("gpu")
        for mig in gpu.iter("mig_device")
    }
    found: dict[str, list[tuple[str, str, int | None, int | None]]] = {}
    for gpu, line in _listed(_ask("-L")):
        total, free = memory.get((gpu, line["number"]), (None, None))
        found.setdefault(gpu, []).append((line["uuid"], line["profile"], total, free))
    return found


def _listed(text: str) -> Iterator[tuple[str, re.Match[str]]]:
    """Every line of a MIG instance, with the UUID of the GPU above it."""
    gpu = ""
    for line in text.splitlines():
        if board := _GPU_LINE.match(line):
            gpu = board["uuid"]
        elif instance := _MIG_LINE.match(line):
            yield gpu, instance


def _mebibytes(text: str) -> int | None:
    number = re.match(r"\d+", text.strip())
    return int(number[0]) * 2**20 if number else None


def _ask(*arguments: str) -> str:
    """What nvidia-smi prints; nothing if it finds no GPU. Raises NoSuitableDevice if it fails."""
    try:
        answer = subprocess.run(
            ["nvidia-smi", *arguments], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
        )
    except subprocess.TimeoutExpired as error:
        raise NoSuitableDevice(
            f"nvidia-smi has not answered for {_TIMEOUT_S:.0f} s, so a GPU hangs; reset it, or restart the host"
        ) from error
    if "No devices were found" in answer.stdout + answer.stderr:
        return ""
    if answer.returncode != 0:
        said = " ".join((answer.stdout + answer.stderr).split())
        raise NoSuitableDevice(
            f"nvidia-smi failed with status {answer.returncode}: {said[:300]}; mend the NVIDIA driver, or remove it "
            "from a host without GPUs"
        )
    return answer.stdout
