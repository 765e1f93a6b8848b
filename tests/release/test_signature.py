"""A signature holds for exactly its files and its key, is kept while it holds, and is one to model-signing itself."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.keys import key_pair, openssl

from fp8pipe.errors import InputError
from fp8pipe.model.identity import file_hashes, published_files
from fp8pipe.records import FileHash
from fp8pipe.release.signature import sign, why_broken


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "release"
    (made / "fp8pipe").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "fp8pipe/gate.json"):
        (made / name).write_text(f"content of {name}")
    return made


def hashes(folder: Path) -> tuple[FileHash, ...]:
    return file_hashes(folder, [name for name in published_files(folder) if name != "model.sig"])


def test_a_signature_holds_for_its_files_and_key(folder: Path, tmp_path: Path) -> None:
    for curve in ("prime256v1", "secp384r1"):
        private, public = key_pair(tmp_path / curve, curve)
        sign(folder, "acme/tiny", hashes(folder), private)
        assert why_broken(folder / "model.sig", hashes(folder), public) is None
        assert why_broken(folder / "model.sig", hashes(folder), None) is None


def test_the_command_of_model_signing_verifies_it(folder: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path / "keys")
    sign(folder, "acme/tiny", hashes(folder), private)
    command = [sys.executable, "-m", "model_signing", "verify", "key", str(folder)]
    command += ["--signature", str(folder / "model.sig"), "--public_key", str(public)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "config.json").write_text("{}")
    assert subprocess.run(command, check=False, capture_output=True).returncode != 0


def test_a_signature_of_the_same_content_by_the_same_key_is_kept(folder: Path, tmp_path: Path) -> None:
    (ours, _), (other, public) = (key_pair(tmp_path / name) for name in ("ours", "other"))
    path = folder / "model.sig"
    sign(folder, "acme/tiny", hashes(folder), ours)
    first = path.read_bytes()
    sign(folder, "acme/tiny", hashes(folder), ours)
    assert path.read_bytes() == first
    (folder / "config.json").write_text("{}")
    sign(folder, "acme/tiny", hashes(folder), ours)
    second = path.read_bytes()
    assert second != first
    sign(folder, "acme/tiny", hashes(folder), other)
    assert path.read_bytes() != second and why_broken(path, hashes(folder), public) is None


def test_another_key_other_content_and_another_file_break_it(folder: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path / "keys")
    _, other = key_pair(tmp_path / "other")
    sign(folder, "acme/tiny", hashes(folder), private)
    path, files = folder / "model.sig", hashes(folder)
    assert "Key mismatch" in str(why_broken(path, files, other))
    edited = (files[0].model_copy(update={"sha256": hashlib.sha256(b"x").hexdigest()}), *files[1:])
    added = (*files, FileHash(name="notes.md", size=1, sha256="0" * 64))
    for changed in (edited, added, files[1:]):
        for key in (public, None):
            assert "signs other content" in str(why_broken(path, changed, key))


def test_a_statement_that_was_edited_after_it_was_signed_is_broken(folder: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path / "keys")
    sign(folder, "acme/tiny", hashes(folder), private)
    first = json.loads((folder / "model.sig").read_bytes())
    (folder / "config.json").write_text("{}")
    sign(folder, "acme/tiny", hashes(folder), private)
    second = json.loads((folder / "model.sig").read_bytes())
    second["dsseEnvelope"]["signatures"] = first["dsseEnvelope"]["signatures"]
    (folder / "model.sig").write_text(json.dumps(second))
    assert "changed after it was signed" in str(why_broken(folder / "model.sig", hashes(folder), public))


@pytest.mark.parametrize(
    "content",
    [b"", b"\xff", b"[]", b"{}", b"null", b'{"dsseEnvelope": {"payload": 1}}', b'{"dsseEnvelope": {"payload": "!"}}'],
)
def test_a_signature_that_is_none_is_broken_and_no_error(folder: Path, tmp_path: Path, content: bytes) -> None:
    _, public = key_pair(tmp_path / "keys")
    (folder / "model.sig").write_bytes(content)
    for key in (public, None):
        assert "no sigstore bundle" in str(why_broken(folder / "model.sig", hashes(folder), key))


@pytest.mark.parametrize("part", ["verificationMaterial", "dsseEnvelope"])
def test_a_bundle_that_lacks_a_part_is_broken(folder: Path, tmp_path: Path, part: str) -> None:
    private, public = key_pair(tmp_path / "keys")
    sign(folder, "acme/tiny", hashes(folder), private)
    path = folder / "model.sig"
    whole = json.loads(path.read_bytes())
    for inner in (None, *whole[part]):
        bundle = json.loads(json.dumps(whole))
        del (bundle if inner is None else bundle[part])[part if inner is None else inner]
        path.write_text(json.dumps(bundle))
        assert why_broken(path, hashes(folder), public) is not None or inner == "tlogEntries"


def test_a_key_that_cannot_be_used_is_an_input_error(folder: Path, tmp_path: Path) -> None:
    private, public = key_pair(tmp_path / "keys")
    odd, _ = key_pair(tmp_path / "odd", "secp256k1")
    rsa = tmp_path / "rsa.pem"
    openssl("genrsa", "-out", rsa, "2048")
    (tmp_path / "none.pem").write_text("no key")
    for key in (odd, rsa, public, tmp_path / "none.pem", tmp_path / "gone.pem", tmp_path):
        with pytest.raises(InputError, match="expected an EC private key"):
            sign(folder, "acme/tiny", hashes(folder), key)
    assert not (folder / "model.sig").exists()
    sign(folder, "acme/tiny", hashes(folder), private)
    for key in (private, tmp_path / "none.pem", tmp_path / "gone.pem"):
        with pytest.raises(InputError, match="expected an EC public key"):
            why_broken(folder / "model.sig", hashes(folder), key)
