"""The identity of a folder: the digest of its files, read in pieces."""

from __future__ import annotations

import hashlib
from pathlib import Path

from support.processes import peak_memory_mb

from fp8pipe.model.identity import folder_identity


def test_identity_of_a_huge_config_is_taken_in_pieces(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1_000_000_000)
    code = "import sys\nfrom pathlib import Path\nfrom fp8pipe.model.identity import folder_identity\n"
    assert peak_memory_mb(f"{code}folder_identity(Path(sys.argv[1]))", str(tmp_path)) - peak_memory_mb(code) < 100


def test_identity_is_the_digest_of_names_lengths_and_contents(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(b"{}")
    (tmp_path / "merges.txt").write_bytes(b"x" * 3_000_000)
    stream = b"config.json\0" + b"2\0{}" + b"merges.txt\0" + b"3000000\0" + b"x" * 3_000_000
    assert folder_identity(tmp_path) == hashlib.sha256(stream).hexdigest()
