"""What the quantize stage made, and the content of what is published."""

from __future__ import annotations

from fp8pipe.records.base import Record


class Checkpoint(Record):
    """What the quantize stage made. `DIR/fp8pipe/checkpoint.json`."""

    fingerprint: str
    """Source commit + canonical recipe + engine version + calibration digest: two equal fingerprints, equal bytes."""
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
    """Scale units (`tensor` or `tensor[index]`) whose weights are all zero."""
    seconds: float
    """Plan to fsynced files, resumed work not counted. A figure for people, not identity."""

    @property
    def release_tag(self) -> str:
        """The tag of its release on the Hub."""
        return f"fp8pipe-{self.fingerprint[:12]}"


class FileHash(Record):
    """Content of one published file."""

    name: str
    size: int
    sha256: str


class Manifest(Record):
    """Content hashes of a finished folder, computed once. `DIR/fp8pipe/manifest.json`."""

    fingerprint: str
    identity: str
    """Digest of config and safetensors headers with sizes and times, as the folder was when it was hashed."""
    files: tuple[FileHash, ...]
