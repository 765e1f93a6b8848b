"""What a conversion will write, decided from headers and config.json alone: every tensor with its place, every refusal
before the first byte."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import fp8pipe
from fp8pipe.convert.draft import Draft, Tensor, changes, unchanged
from fp8pipe.convert.legacy import mend
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

CONVERSION_VERSION = 1
"""Raised whenever the same input would give other bytes."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor of the result and the tensor whose bytes it gets."""

    info: TensorInfo
    source: TensorInfo


@dataclass(frozen=True, slots=True)
class Origin:
    """Records of a checkpoint that fp8pipe made: the result's, so that it can be validated, measured and gated anew."""

    checkpoint: Checkpoint
    plan: Plan


@dataclass(frozen=True)
class ConversionPlan:
    """Everything that will be written."""

    snapshot: Snapshot
    outputs: tuple[Placed, ...]
    """In the order of their shards and bytes."""
    config: bytes
    """Content of config.json."""
    conversion: Conversion
    origin: Origin | None
    """None for a checkpoint that fp8pipe did not make."""

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
    """Decide everything for `snapshot`; `to` None keeps the spelling and mends legacy names alone.

    Raises InputError for a model that is no FP8 checkpoint, that is not what its config says, or that the other
    spelling cannot say."""
    content = source.read_file(snapshot, "config.json")
    config = _parsed(snapshot, content)
    quantization = quantization_config(config)
    method = _method(snapshot, quantization)
    assert quantization is not None
    origin = _origin(snapshot, headers)
    draft = mend(Draft(method=method, tensors=unchanged(headers.tensors.values()), quantization=quantization))
    if to is not None and to != method:
        scheme = _scheme(snapshot, draft.quantization)
        draft = respell(draft, scheme, to, origin.plan.settings if origin else None)
    outputs = _placed(headers, draft.tensors)
    conversion = _conversion(snapshot, method, quantization, draft, origin)
    return ConversionPlan(
        snapshot=snapshot,
        outputs=outputs,
        config=content if draft.quantization == quantization else _with(config, draft.quantization),
        conversion=conversion,
        origin=origin and _respelled_origin(origin, draft, outputs, conversion.fingerprint),
    )


def _parsed(snapshot: Snapshot, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except ValueError as error:
        raise InputError(f"{snapshot.model_id}: config.json is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{snapshot.model_id}: config.json is not a JSON object")
    return config


def _method(snapshot: Snapshot, quantization: dict[str, Any] | None) -> Method:
    if quantization is None:
        raise InputError(
            f"{snapshot.model_id}: config.json has no quantization_config; only FP8 checkpoints are converted"
        )
    found = method_of(quantization)
    for method in METHODS:
        if found == method:
            return method
    raise InputError(f"{snapshot.model_id}: quant_method {found!r}; only {' and '.join(METHODS)} are converted")


def _scheme(snapshot: Snapshot, quantization: dict[str, Any]) -> Scheme:
    """What quantization_config means; InputError with the validator's findings when vLLM serves no such thing."""
    scheme = read_scheme(quantization)
    if scheme is None:
        findings = validate(snapshot.path, depth="headers").errors
        reasons = [f"expected {f.expected}, found {f.found}" for f in findings if f.file == "config.json"]
        raise InputError(f"{snapshot.model_id}: not an FP8 scheme that vLLM serves: {'; '.join(reasons)}")
    return scheme


def _with(config: dict[str, Any], quantization: dict[str, Any]) -> bytes:
    """config.json with one quantization_config, and nothing else changed."""
    kept = {key: value for key, value in config.items() if key not in {"quantization_config", "compression_config"}}
    text = kept.get("text_config")
    if isinstance(text, dict) and "quantization_config" in text:
        kept["text_config"] = {key: value for key, value in text.items() if key != "quantization_config"}
    return json.dumps(kept | {"quantization_config": quantization}, indent=2, ensure_ascii=False).encode() + b"\n"


def _conversion(
    snapshot: Snapshot, method: Method, quantization: dict[str, Any], draft: Draft, origin: Origin | None
) -> Conversion:
    source_fingerprint = origin.checkpoint.fingerprint if origin else None
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


def _placed(headers: Headers, tensors: Iterable[Tensor]) -> tuple[Placed, ...]:
    """Give every tensor its bytes. Shards keep their names and tensors; a lone one is called as loaders expect."""
    tensors = tuple(tensors)
    twice = [name for name, count in Counter(tensor.name for tensor in tensors).items() if count > 1]
    if twice:
        raise InputError(f"{twice[0]}: two tensors of the source would get this name; remove the stale one")
    by_shard: dict[str, list[Tensor]] = {shard.name: [] for shard in headers.shards}
    for tensor in tensors:
        by_shard[tensor.source.shard].append(tensor)
    return tuple(
        placed
        for shard, members in by_shard.items()
        if members
        for placed in _placed_in(SINGLE_NAME if len(headers.shards) == 1 else shard, members)
    )


def _placed_in(file: str, members: list[Tensor]) -> Iterable[Placed]:
    sources = {tensor.name: tensor.source for tensor in members}
    infos = lay_out(file, [(tensor.name, tensor.dtype, tensor.shape) for tensor in members])
    return (Placed(info, sources[info.name]) for info in infos)


# ---------------------------------------------------------------------------------------------- our own checkpoints


def _origin(snapshot: Snapshot, headers: Headers) -> Origin | None:
    """The records of a finished checkpoint of ours, if the files are still what its plan says."""
    if not snapshot.is_local:
        return None
    records = snapshot.path / RECORD_DIR
    checkpoint = Checkpoint.load_if_present(records / "checkpoint.json")
    plan = Plan.load_if_present(records / "plan.json")
    if checkpoint is None or plan is None or {output.info for output in plan.outputs} != {*headers.tensors.values()}:
        return None
    return Origin(checkpoint, plan)


def _respelled_origin(origin: Origin, draft: Draft, outputs: tuple[Placed, ...], fingerprint: str) -> Origin:
    """The records as they are of the result. Its fingerprint is its own: no measurement or verdict of the source's
    speaks of it."""
    before = {output.name: output for output in origin.plan.outputs}
    settings = origin.plan.settings.model_copy(update={"checkpoint_format": draft.method})
    sizes = {placed.info.shard: placed.info.end for placed in outputs}
    plan = origin.plan.model_copy(
        update={
            "settings": settings,
            "outputs": tuple(_moved(before[placed.source.name], placed.info) for placed in outputs),
            "quantization_config": draft.quantization,
            "output_bytes": sum(sizes.values()),
        }
    )
    checkpoint = origin.checkpoint.model_copy(
        update={
            "fingerprint": fingerprint,
            "recipe_digest": settings.digest(),
            "output_bytes": plan.output_bytes,
        }
    )
    return Origin(checkpoint, plan)


def _moved(output: OutputTensor, info: TensorInfo) -> OutputTensor:
    """The planned tensor under its new name and place."""
    fields = ("name", "dtype", "shape", "shard", "begin", "end")
    return output.model_copy(update={field: getattr(info, field) for field in fields})
