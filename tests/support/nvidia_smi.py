"""A fake nvidia-smi on PATH: the edge at which a machine with GPUs is known.

It answers the three questions that fp8pipe asks (`--query-gpu=...`, `-L`, `-q -x`) in the formats of drivers 470 to
590, and refuses an unknown field as the real one does.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from fp8pipe.machine import builds


@dataclass(frozen=True)
class Board:
    """One GPU as nvidia-smi shows it. Memory in MiB; `[N/A]` where it does not tell."""

    name: str
    compute_cap: str
    total: int | str
    free: int | str
    uuid: str = ""
    mig: str = "[N/A]"
    instances: tuple[tuple[str, int, int], ...] = ()
    """Profile, total and free MiB of each MIG instance."""


@dataclass(frozen=True)
class Machine:
    """A host. `fails`: exit status and text of a driver that does not work."""

    boards: tuple[Board, ...] = ()
    driver: str = "580.95.05"
    cuda: str = "13.0"
    fails: tuple[int, str] | None = None

    def install(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Put its nvidia-smi first on PATH, and remove CUDA_VISIBLE_DEVICES."""
        folder.mkdir(parents=True, exist_ok=True)
        script = folder / "nvidia-smi"
        boards = [asdict(board) | {"uuid": board.uuid or uuid_of(i)} for i, board in enumerate(self.boards)]
        known = {"boards": boards, "driver": self.driver, "cuda": self.cuda, "fails": self.fails}
        script.write_text(f"#!{sys.executable} -IS\nMACHINE = {json.dumps(known)!r}\n{_PROGRAM}")
        script.chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def become(
        self,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        torch: tuple[int, int] | None = (13, 0),
        vllm: str | None = "cuda",
    ) -> None:
        """Make this host such a machine, on which by default the GPU profile is installed."""
        self.install(folder, monkeypatch)
        monkeypatch.setattr(builds, "torch_cuda", lambda environment: torch)
        monkeypatch.setattr(builds, "vllm_device", lambda: vllm)
        monkeypatch.setattr(builds, "compiler", lambda: "/usr/local/cuda/bin/nvcc")
        monkeypatch.setattr(builds, "has_package", lambda name: False)


def uuid_of(index: int) -> str:
    return f"GPU-{index}b1c7a52-0f3e-4d8a-9d55-1e69664bb298"


def instance_uuid(board: int, instance: int) -> str:
    return f"MIG-{board}{instance}89d0f3-293f-58c9-8f8c-5ea666eedbde"


A100 = Board("NVIDIA A100-SXM4-80GB", "8.0", 81920, 81038, mig="Disabled")
L40S = Board("NVIDIA L40S", "8.9", 46068, 45596)
H100 = Board("NVIDIA H100 80GB HBM3", "9.0", 81559, 81007, mig="Disabled")
B200 = Board("NVIDIA B200", "10.0", 183359, 182642, mig="Disabled")
B300 = Board("NVIDIA B300 SXM6 AC", "10.3", 275040, 274100, mig="Disabled")
RTX_PRO_6000 = Board("NVIDIA RTX PRO 6000 Blackwell Server Edition", "12.0", 97887, 97250)
GB10 = Board("NVIDIA GB10", "12.1", "[N/A]", "[N/A]")
H100_MIG = replace(H100, mig="Enabled", instances=(("3g.40gb", 40448, 40435), ("3g.40gb", 40448, 40435)))

MACHINES = {
    "no GPU": Machine(),
    "A100": Machine((A100,)),
    "H100": Machine((H100,)),
    "H100, busy": Machine((replace(H100, free=9800),)),
    "8 x H100": Machine((H100,) * 8),
    "B200": Machine((B200,)),
    "B300": Machine((B300,)),
    "MIG": Machine((H100_MIG,)),
    "old driver": Machine((H100,), driver="550.54.15", cuda="12.4"),
    "broken driver": Machine(
        fails=(
            9,
            "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that the latest "
            "NVIDIA driver is installed and running.\n",
        )
    ),
}

_PROGRAM = r"""
import json, sys

machine = json.loads(MACHINE)
arguments = sys.argv[1:]
if machine["fails"]:
    print(machine["fails"][1])
    sys.exit(machine["fails"][0])
if not machine["boards"]:
    print("No devices were found")
    sys.exit(6)


def mig_uuid(i, k):
    return f"MIG-{i}{k}89d0f3-293f-58c9-8f8c-5ea666eedbde"


def listing():
    for i, board in enumerate(machine["boards"]):
        print(f"GPU {i}: {board['name']} (UUID: {board['uuid']})")
        for k, (profile, *_) in enumerate(board["instances"]):
            print(f"  MIG {profile:<11} Device {k:>2}: (UUID: {mig_uuid(i, k)})")


def table(fields, units):
    def shown(number):
        return f"{number} MiB" if units and isinstance(number, int) else str(number)

    for i, board in enumerate(machine["boards"]):
        row = {
            "index": str(i), "uuid": board["uuid"], "name": board["name"], "compute_cap": board["compute_cap"],
            "memory.total": shown(board["total"]), "memory.free": shown(board["free"]),
            "mig.mode.current": board["mig"], "driver_version": machine["driver"],
        }
        for field in fields:
            if field not in row:
                print(f'Field "{field}" is not a valid field to query.\n')
                sys.exit(2)
        print(", ".join(row[field] for field in fields))


def memory(total, free):
    mib = [f"{n} MiB" if isinstance(n, int) else "N/A" for n in (total, free)]
    return f"<fb_memory_usage><total>{mib[0]}</total><free>{mib[1]}</free></fb_memory_usage>"


def report():
    print('<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n<nvidia_smi_log>')
    print(f"<driver_version>{machine['driver']}</driver_version><cuda_version>{machine['cuda']}</cuda_version>")
    for i, board in enumerate(machine["boards"]):
        print(f"<gpu id=\"{i:08X}:01:00.0\"><product_name>{board['name']}</product_name><mig_devices>")
        print("".join(
            f"<mig_device><index>{k}</index>{memory(total, free)}</mig_device>"
            for k, (_, total, free) in enumerate(board["instances"])
        ) or "None")
        print(f"</mig_devices><uuid>{board['uuid']}</uuid>{memory(board['total'], board['free'])}</gpu>")
    print("</nvidia_smi_log>")


if arguments == ["-L"]:
    listing()
elif arguments == ["-q", "-x"]:
    report()
elif arguments and arguments[0].startswith("--query-gpu="):
    table(arguments[0].partition("=")[2].split(","), "nounits" not in arguments[1])
else:
    print(f"Invalid combination of input arguments: {arguments}")
    sys.exit(2)
"""
