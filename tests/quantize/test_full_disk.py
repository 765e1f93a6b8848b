"""A disk that takes no more bytes is one clear error, and the next run resumes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.quantizing import Models, bytes_of, make
from support.tiny_models import plan_of, recipe

from fp8pipe.hub.source import resolve

CRAMPED = """
import resource, subprocess, sys
from contextlib import suppress
from pathlib import Path
from fp8pipe.errors import Fp8PipeError
from fp8pipe.quantize.plan import Plan
from fp8pipe.quantize import quantize
from fp8pipe.records import Snapshot

folder, fault, room = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
out, source = folder / "out", folder / "source"
snapshot, plan = Snapshot.load(folder / "snapshot.json"), Plan.load(folder / "plan.json")

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

def arriving():
    *others, last = sorted(source.glob("*.safetensors"))
    yield from others
    if fault == "limit between":
        limit()
    if fault == "full":
        with suppress(OSError), open(out / "filler", "wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
    yield last

if fault == "full":
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", out], check=True)
if fault == "limit":
    limit()
try:
    quantize(snapshot, plan, out, threads=2, arriving=arriving())
except Fp8PipeError as error:
    print(f"{type(error).__name__} {error.exit_code} {error}")
assert not (out / "config.json").exists()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
(out / "filler").unlink(missing_ok=True)
quantize(snapshot, plan, out)
if fault == "full":
    subprocess.run(["cp", "-r", out, folder / "kept"], check=True)
"""


@pytest.mark.parametrize(
    ("fault", "error", "names"),
    [
        ("limit", "EnvironmentFault 4", r"out/\S+: cannot write: File too large"),
        (
            "limit between",
            "EnvironmentFault 4",
            r"out/model-\d+-of-\d+\.safetensors: (model|lm_head)\.\S+: cannot write",
        ),
        ("full", "DiskTooSmall 4", r"out/\S+: the disk is full; free some space and run again"),
    ],
)
def test_a_full_disk_is_one_clear_error_and_the_next_run_resumes(
    model_folder: Models, tmp_path: Path, fault: str, error: str, names: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    (source / "tokenizer.json").write_bytes(bytes(200_000))
    plan = plan_of(source, recipe())
    plan.save(tmp_path / "plan.json")
    resolve(str(source)).save(tmp_path / "snapshot.json")
    room = plan.output_bytes + 600_000 if fault == "full" else 4096
    command = [sys.executable, "-c", CRAMPED, str(tmp_path), fault, str(room)]
    if fault == "full":
        command = ["unshare", "--user", "--map-root-user", "--mount", *command]
        if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
            pytest.skip("a small disk needs a user namespace to be mounted in")
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(error) and re.search(names, child.stdout), child.stdout
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(tmp_path / ("kept" if fault == "full" else "out")) == bytes_of(tmp_path / "clean")
