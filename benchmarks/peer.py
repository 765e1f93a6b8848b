"""The environment of llm-compressor, the peer: it needs other library versions than vLLM, so it cannot share ours.

It is built once in build/peer from the lock benchmarks/peer.txt, which `uv pip compile benchmarks/peer.in` updates."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
LOCK = HERE / "peer.txt"
FOLDER = HERE.parent / "build" / "peer"


def interpreter() -> Path:
    """Python of the peer's environment, which is built if it is missing or was built from another lock."""
    python, stamp = FOLDER / "bin" / "python", FOLDER / "lock.sha256"
    wanted = hashlib.sha256(LOCK.read_bytes()).hexdigest()
    if not stamp.exists() or stamp.read_text() != wanted:
        print(f"building the peer's environment in {FOLDER}", file=sys.stderr)
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "venv", "--quiet", "--clear", "--python", sys.executable, FOLDER], check=True)
        install = [uv, "pip", "install", "--quiet", "--no-deps", "--python", python, *_torch_source(), "-r", LOCK]
        subprocess.run(install, check=True)
        packages = FOLDER / "lib" / "python3.11" / "site-packages"
        subprocess.run([python, "-m", "compileall", "-q", "-j", "0", packages], stdout=subprocess.DEVNULL)  # as ours
        stamp.write_text(wanted)
    return python


def _torch_source() -> list[str]:
    """Where torch's CPU build comes from, as in scripts/setup: pip's find-links folder, else PyTorch's own index."""
    if links := os.environ.get("PIP_FIND_LINKS"):
        return ["--find-links", links]
    return ["--extra-index-url", "https://download.pytorch.org/whl/cpu", "--index-strategy", "unsafe-best-match"]
