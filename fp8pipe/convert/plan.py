"""Decides from headers and config.json alone what a conversion writes: every tensor with its place, and every refusal
before the first byte is written."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import fp8pipe
from fp8pipe.convert.draft import Draft, DraftTensor, changes, unchanged
from fp8pipe.convert.legacy import migrate
from fp8pipe.convert.record import METHODS, Conversion, Method
from fp8pipe.convert.respell import respell
from fp8pipe.errors import InputError
from fp8pipe.files import digest_of
from fp8pipe.hub import source
from fp8pipe.model.headers import SINGLE_NAME, Headers, TensorInfo, lay_out
from fp8pipe.quantize.plan import OutputTensor, Plan
from fp8pipe.records import RECORD_DIR, Checkpoint, Snapshot
from fp8pipe.validate import validate
from fp8pipe.validate.meaning.config import method_of, quantization_config, read_scheme
from fp8pipe.validate.meaning.scheme import Scheme
from fp8pipe.validate.serving import why_unloadable

CONVERSION_VERSION = 2
"""Increase it when the same input gives different bytes."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of the result, and the tensor of the source whose bytes it gets."""

    info: TensorInfo
    source: TensorInfo


@dataclass(frozen=True, slots=True)
class OwnRecords:
    """Records of a checkpoint that fp8pipe made. The result has its own, so that it can be validated and released."""

    checkpoint: Checkpoint
    plan: Plan


@dataclass(frozen=True)
class ConversionPlan:
    """All that a conversion writes."""

    snapshot: Snapshot
    outputs: tuple[Placed, ...]
    """In the order of shards and bytes."""
    config: bytes
    """Content of config.json."""
    record: Conversion
    own_records: OwnRecords | None
    """Records of the result; None if fp8pipe did not make the source."""

    def shards(self) -> dict[str, tuple[Placed, ...]]:
        """File name -> its tensors, in the order of their bytes."""
        found: dict[str, list[Placed]] = {}
        for placed in self.outputs:
            found.setdefault(placed.info.shard, []).append(placed)
        return {name: tuple(placed) for name, placed in found.items()}

    def sizes(self) -> dict[str, int]:
        """File name -> its bytes."""
        return {name: placed[-1].info.end for name, placed in self.shards().items()}


def plan_conversion(snapshot: Snapshot, headers: Headers, *, to: Method | None) -> ConversionPlan:
    """The conversion of `snapshot` to the spelling `to`; None keeps the spelling and replaces only legacy names.

    Raises InputError for a model that is not an FP8 checkpoint, whose tensors contradict its config, that `to` cannot
    express, or that vLLM would not load."""
    content, config = source.read_file(snapshot, "config.json"), source.read_config(snapshot)
    quantization = quantization_config(config)
    method = _method(snapshot, quantization)
    assert quantization is not None
    theirs = _own_records(snapshot, headers)
    draft = migrate(Draft(method=method, tensors=unchanged(headers.tensors.values()), quantization=quantization))
    if to is not None and to != method:
        scheme = _scheme(snapshot, draft.quantization)
        draft = respell(draft, scheme, to, theirs.plan.settings if theirs else None)
    outputs = _placed(headers, draft.tensors)
    record = _record(snapshot, method, quantization, draft, theirs)
    if record.changes:
        _refuse_unloadable(snapshot, config, draft, outputs)
    return ConversionPlan(
        snapshot=snapshot,
        outputs=outputs,
        config=content if draft.quantization == quantization else _with(config, draft.quantization),
        record=record,
        own_records=theirs and _records_of_result(theirs, draft, outputs, record.fingerprint),
    )


def _method(snapshot: Snapshot, quantization: dict[str, Any] | None) -> Method:
    if quantization is None:
        raise InputError(
            f"{snapshot.model_id}: config.json has no quantization_config; only FP8 checkpoints can be converted"
        )
    found = method_of(quantization)
    for method in METHODS:
        if found == method:
            return method
    raise InputError(f"{snapshot.model_id}: quant_method {found!r}; only {' and '.join(METHODS)} can be converted")


def _scheme(snapshot: Snapshot, quantization: dict[str, Any]) -> Scheme:
    """What quantization_config means. Raises InputError with the validator's findings if vLLM cannot serve it."""
    scheme = read_scheme(quantization)
    if scheme is None:
        findings = validate(snapshot.path, depth="headers").errors
        reasons = [f"expected {f.expected}, found {f.found}" for f in findings if f.file == "config.json"]
        raise InputError(f"{snapshot.model_id}: not an FP8 scheme that vLLM serves: {'; '.join(reasons)}")
    return scheme


def _refuse_unloadable(snapshot: Snapshot, config: dict[str, Any], draft: Draft, outputs: Iterable[Placed]) -> None:
    """Raise InputError for a result that vLLM would refuse or misread, by the rules of what serves it."""
    tensors = {placed.info.name: placed.info for placed in outputs}
    if why := why_unloadable(config, read_scheme(draft.quantization), tensors):
        raise InputError(
            f"{snapshot.model_id}: vLLM does not load it as {draft.method}: {why}; quantize its source with "
            "recipe fp8-block, which keeps such weights unquantized"
        )


def _with(config: dict[str, Any], quantization: dict[str, Any]) -> bytes:
    """Content of config.json with `quantization` as its only quantization_config and no other change."""
    kept = {key: value for key, value in config.items() if key not in {"quantization_config", "compression_config"}}
    text = kept.get("text_config")
    if isinstance(text, dict) and "quantization_config" in text:
        kept["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return json.dumps(kept | {"quantization_config": quantization}, indent=2, ensure_ascii=False).encode() + b"\n"


def _record(
    snapshot: Snapshot, method: Method, quantization: dict[str, Any], draft: Draft, theirs: OwnRecords | None
) -> Conversion:
    source_fingerprint = theirs.checkpoint.fingerprint if theirs else None
    identity = {"of": source_fingerprint or snapshot.commit, "to": draft.method, "version": CONVERSION_VERSION}
    return Conversion(
        fingerprint=digest_of({"conversion": identity}),
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        source_fingerprint=source_fingerprint,
        source_method=method,
        method=draft.method,
        changes=changes(draft),
        notes=draft.notes,
        source_config=quantization,
        version=fp8pipe.__version__,
    )


# ---------------------------------------------------------------------------------------------- places


def _placed(headers: Headers, tensors: Iterable[DraftTensor]) -> tuple[Placed, ...]:
    """Give every tensor its bytes. Shards keep their names and tensors; a single shard gets the name loaders expect."""
    tensors = tuple(tensors)
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: two tensors of the source would get this name; remove the stale one")
    by_shard: dict[str, list[DraftTensor]] = {shard.name: [] for shard in headers.shards}
    for tensor in tensors:
        by_shard[tensor.source.shard].append(tensor)
    return tuple(
        placed
        for shard, members in by_shard.items()
        if members
        for placed in _placed_in(SINGLE_NAME if len(headers.shards) == 1 else shard, members)
    )


def _placed_in(file: str, members: list[DraftTensor]) -> Iterable[Placed]:
    sources = {tensor.name: tensor.source for tensor in members}
    infos = lay_out(file, [(tensor.name, tensor.dtype, tensor.shape) for tensor in members])
    return (Placed(info, sources[info.name]) for info in infos)


# ---------------------------------------------------------------------------------------------- our own checkpoints


def _own_records(snapshot: Snapshot, headers: Headers) -> OwnRecords | None:
    """The records of the source if fp8pipe made it and its files are still those of its plan."""
    if not snapshot.is_local:
        return None
    records = snapshot.path / RECORD_DIR
    checkpoint = Checkpoint.load_if_present(records / "checkpoint.json")
    plan = Plan.load_if_present(records / "plan.json")
    if checkpoint is None or plan is None or {output.info for output in plan.outputs} != {*headers.tensors.values()}:
        return None
    return OwnRecords(checkpoint, plan)


def _records_of_result(theirs: OwnRecords, draft: Draft, outputs: tuple[Placed, ...], fingerprint: str) -> OwnRecords:
    """The source's records, changed to those of the result. Its own fingerprint voids measurements of the source."""
    before = {output.name: output for output in theirs.plan.outputs}
    settings = theirs.plan.settings.model_copy(update={"checkpoint_format": draft.method})
    sizes = {placed.info.shard: placed.info.end for placed in outputs}
    plan = theirs.plan.model_copy(
        update={
            "settings": settings,
            "outputs": tuple(_moved(before[placed.source.name], placed.info) for placed in outputs),
            "quantization_config": draft.quantization,
            "output_bytes": sum(sizes.values()),
        }
    )
    checkpoint = theirs.checkpoint.model_copy(
        update={
            "fingerprint": fingerprint,
            "recipe_digest": settings.digest(),
            "output_bytes": plan.output_bytes,
        }
    )
    return OwnRecords(checkpoint, plan)


def _moved(output: OutputTensor, info: TensorInfo) -> OutputTensor:
    """The planned tensor with its new name and place."""
    fields = ("name", "dtype", "shape", "shard", "begin", "end")
    return output.model_copy(update={field: getattr(info, field) for field in fields})
