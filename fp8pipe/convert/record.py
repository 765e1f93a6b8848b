"""The record of a conversion, DIR/fp8pipe/conversion.json: where the checkpoint comes from and what was changed."""

from __future__ import annotations

from typing import Any, Literal

from fp8pipe.records import Record

Method = Literal["compressed-tensors", "fp8"]
METHODS: tuple[Method, ...] = ("compressed-tensors", "fp8")
"""Both spellings, named after their quant_method."""


class Change(Record):
    """One kind of change."""

    what: str
    """Before and after, `weight_scale [1] -> weight_scale []`."""
    tensors: int
    """Number of tensors of the source; 0 for a change of config.json."""


class Conversion(Record):
    """A checkpoint made from another one: the same FP8 bytes under other names. It has no evidence of its own."""

    fingerprint: str
    """Of the result: a digest of its source, its spelling and the version of the conversion."""
    model_id: str
    """`Snapshot.model_id` of the source."""
    source_commit: str
    """`Snapshot.commit` of the source."""
    source_fingerprint: str | None
    """Fingerprint of the source, if fp8pipe made it."""
    source_method: Method
    method: Method
    changes: tuple[Change, ...]
    """Empty if the source already is what was asked for; then nothing was written."""
    notes: tuple[str, ...]
    """What readers do differently with the result."""
    source_config: dict[str, Any]
    """quantization_config of the source."""
    version: str
    """Version of fp8pipe."""
