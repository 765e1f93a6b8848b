"""What the quantize stage made, and the hashes of its files."""

from __future__ import annotations

from fp8pipe.records.base import Record


class Checkpoint(Record):
    """What the quantize stage made. `DIR/fp8pipe/checkpoint.json`."""

    fingerprint: str
    """Digest of source commit, canonical recipe, engine version and calibration: equal fingerprints, equal bytes."""
    model_id: str
    source_commit: str
    recipe: str
    recipe_digest: str
    engine_version: int
    calibration_digest: str | None
    source_bytes: int
    """Bytes of the source's safetensors files."""
    output_bytes: int
    """Bytes of the checkpoint's safetensors files."""
    quantized_tensors: int
    kept_tensors: int
    zero_units: tuple[str, ...] = ()
    """Units that share a scale (`tensor` or `tensor[index]`) and have only zeros as weights."""
    faint_units: tuple[str, ...] = ()
    """Units whose weights are not zero and so small that all their codes are: they became zeros."""
    seconds: float
    """From plan to fsynced files, without work of earlier runs. For people; not part of any identity."""


class FileHash(Record):
    """The content hash of one file."""

    name: str
    size: int
    sha256: str


class Manifest(Record):
    """What a release consists of: every published file but itself and the signature. `DIR/fp8pipe/manifest.json`."""

    repo_id: str
    """The repository that the release was made for."""
    tag: str
    """The tag of the release."""
    fingerprint: str
    identity: str
    """Identity of the checkpoint: the digest of its files without records and card."""
    files: tuple[FileHash, ...]
