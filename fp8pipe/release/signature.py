"""The signature of a release: `model.sig`, a sigstore bundle over the sha256 of every other published file.

It is made and read by OpenSSF's `model-signing`, so that library's own command verifies a downloaded release too. It
would read every file again; here it is given the hashes that are known already.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import InputError
from fp8pipe.files import write_atomically
from fp8pipe.model.identity import SIGNATURE
from fp8pipe.records import FileHash

if TYPE_CHECKING:
    from model_signing.hashing import Config

_SERIALIZATION = {
    "method": "files",
    "hash_type": "sha256",
    "allow_symlinks": False,
    "ignore_paths": [SIGNATURE, ".git", ".gitattributes", ".github", ".gitignore"],
}
"""What the library's own command does with a downloaded folder."""


def sign(folder: Path, name: str, files: Sequence[FileHash], key: Path) -> None:
    """Write DIR/model.sig: a signature of release `name`, which has these files, by the EC private key (PEM) at `key`.

    One that is there and still holds is kept, because no two are equal. Raises InputError for a key that cannot be
    used.
    """
    from model_signing.signing import Config

    path, public = folder / SIGNATURE, public_half(key)
    with NamedTemporaryFile(suffix=".pem") as half, NamedTemporaryFile() as made:
        half.write(public)
        half.flush()
        if not path.is_file() or why_broken(path, files, Path(half.name)) is not None:
            signer = Config().set_hashing_config(_known(name, files)).use_elliptic_key_signer(private_key=key)
            signer.sign(name, made.name)
            write_atomically(path, made.read())


def public_half(key: Path) -> bytes:
    """The public key (PEM) of the EC private key at `key`. Raises InputError for one that cannot sign a release."""
    from cryptography.hazmat.primitives import serialization
    from model_signing.signing import Config

    try:
        Config().use_elliptic_key_signer(private_key=key)
        private = serialization.load_pem_private_key(key.read_bytes(), None)
    except (AttributeError, OSError, TypeError, ValueError) as error:
        raise InputError(_unusable(key, "private", error)) from error
    form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    return private.public_key().public_bytes(*form)


def names(path: Path, files: Sequence[FileHash]) -> bool:
    """Whether the signature at `path` is one of exactly these files, whoever made it."""
    return why_broken(path, files, None) is None


def why_broken(path: Path, files: Sequence[FileHash], key: Path | None) -> str | None:
    """Why the signature at `path` is not one of exactly these files by the owner of the EC public key (PEM) at `key`;
    None if it is. Without a key, whether it names these files: anyone could have made it then.

    Raises InputError for a key that cannot be read.
    """
    try:
        named = _named(path)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return f"no sigstore bundle of a model: {type(error).__name__}: {error}"
    if different := sorted(named.items() ^ {file.name: file.sha256 for file in files}.items()):
        return f"it signs other content: {', '.join(dict(different[:4]))}"
    if key is None:
        return None

    from cryptography.exceptions import InvalidSignature
    from model_signing.verifying import Config

    try:
        verifier = Config().set_hashing_config(_known("", files)).use_elliptic_key_verifier(public_key=key)
    except (AttributeError, OSError, ValueError) as error:
        raise InputError(_unusable(key, "public", error)) from error
    try:
        verifier.verify(path.parent, path)
    except InvalidSignature:
        return "the content that it signs was changed after it was signed, or the key is another one"
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        return str(error).strip()
    return None


def _named(path: Path) -> dict[str, str]:
    """File name -> sha256, as the signature's statement has them; nothing is verified."""
    envelope = json.loads(path.read_bytes())["dsseEnvelope"]
    statement: dict[str, Any] = json.loads(base64.b64decode(envelope["payload"]))
    return {str(one["name"]): str(one["digest"]) for one in statement["predicate"]["resources"]}


def _known(name: str, files: Sequence[FileHash]) -> Config:
    """For the library: the hashes of the files, instead of a folder to hash."""
    from model_signing._hashing.hashing import Digest
    from model_signing.hashing import Config
    from model_signing.manifest import Manifest, SerializationType

    class Known(Config):
        def hash(self, model_path: object, *, files_to_hash: object = None) -> Manifest:
            kind = SerializationType.from_args(_SERIALIZATION)
            items = [kind.new_item(file.name, Digest("sha256", bytes.fromhex(file.sha256))) for file in files]
            return Manifest(name, items, kind)

    return Known()


def _unusable(key: Path, kind: str, error: Exception) -> str:
    return (
        f"{key}: expected an EC {kind} key on P-256, P-384 or P-521, as PEM without a password: {error}; make a pair "
        "with `openssl ecparam -name prime256v1 -genkey -noout -out key.pem` and `openssl ec -in key.pem -pubout`"
    )
