"""Where a converted folder comes from and what was changed. `DIR/fp8pipe/conversion.json`."""

from __future__ import annotations

from typing import Any, Literal

from fp8pipe.records import Record

Method = Literal["compressed-tensors", "fp8"]
METHODS: tuple[Method, ...] = ("compressed-tensors", "fp8")
"""The spellings, by their quant_method."""


class Change(Record):
    """One kind of change."""

    what: str
    """Before and after: `weight_scale [1] -> weight_scale []`."""
    tensors: int
    """How many tensors of the source; 0 for config.json."""


class Conversion(Record):
    """One spelling made from another: the same FP8 bytes under other names. No evidence of the source's is about it."""

    fingerprint: str
    """Of the result: what it was made from, into what, by which version of the conversion."""
    model_id: str
    """The checkpoint it was made from, as `Snapshot.model_id`."""
    source_commit: str
    """Its state, as `Snapshot.commit`."""
    source_fingerprint: str | None
    """Its fingerprint, if it was a checkpoint of fp8pipe."""
    source_method: Method
    method: Method
    changes: tuple[Change, ...]
    """Empty: the source is what was asked for, and nothing was written."""
    notes: tuple[str, ...]
    """What a reader will do otherwise than with the source."""
    source_config: dict[str, Any]
    """The quantization_config that was replaced."""
    version: str
    """Of fp8pipe."""
