"""Keys as openssl makes them."""

from __future__ import annotations

import subprocess
from pathlib import Path


def openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def key_pair(folder: Path, curve: str = "prime256v1") -> tuple[Path, Path]:
    """A private and a public EC key."""
    folder.mkdir()
    private, public = folder / "key.pem", folder / "key.pub"
    openssl("ecparam", "-name", curve, "-genkey", "-noout", "-out", private)
    openssl("ec", "-in", private, "-pubout", "-out", public)
    return private, public
