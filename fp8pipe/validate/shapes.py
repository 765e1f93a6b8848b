"""Types and shapes: does every tensor have the form that vLLM's parameter has (checks S1 to S5).

In: a Subject, headers only. vLLM casts any dtype into any other and cuts off what is too long in fused layers, so that
most of this is invisible there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fp8pipe.checkpoint import TensorInfo
from fp8pipe.validate.config import Spec
from fp8pipe.validate.coverage import FLOATS, companions_of
from fp8pipe.validate.findings import Fault, check

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

KV_SHAPES = "[1] per layer, or [num_key_value_heads, 1, 1] per head"


def _quantized_weights(subject: Subject) -> Iterator[tuple[str, TensorInfo, Spec]]:
    """Modules that are quantized by config and present."""
    assert subject.scheme is not None
    for module in sorted(subject.quantized):
        entry, spec = subject.shelf.tensors.get(f"{module}.weight"), subject.scheme.spec_of(module)
        if entry is not None and spec is not None:
            yield module, entry, spec


@check(
    "S1",
    "Quantized weights are F8_E4M3.",
    needs=("scheme",),
    consequence="vLLM casts the bytes' values into FP8 without a word",
    remedy="quantize again",
)
def codes_are_e4m3(subject: Subject) -> Iterator[Fault]:
    for _, entry, _ in _quantized_weights(subject):
        if entry.dtype != "F8_E4M3" and entry.dtype not in FLOATS:  # floats are K5's
            yield Fault("F8_E4M3", entry.dtype, entry.shard, entry.name)


@check(
    "S2",
    "Every tensor has the shape of the source (without one: of the architecture).",
    consequence="vLLM stops when it is too small, and cuts off what is too long in fused layers, without a word",
    remedy="quantize again",
)
def shapes_equal_source(subject: Subject) -> Iterator[Fault]:
    if subject.scheme is not None:
        for _, entry, _ in _quantized_weights(subject):
            if len(entry.shape) != 2 or 0 in entry.shape:
                yield Fault("a matrix [out, in]", f"shape {list(entry.shape)}", entry.shard, entry.name)
    for name, shape in _known_shapes(subject):
        entry = subject.shelf.tensors.get(name)
        if entry is not None and entry.shape != shape:
            yield Fault(f"shape {list(shape)}", f"{list(entry.shape)}", entry.shard, name)


def _known_shapes(subject: Subject) -> Iterator[tuple[str, tuple[int, ...]]]:
    if subject.source is not None:
        yield from ((name, entry.shape) for name, entry in subject.source.tensors.items())
    elif subject.layout is not None and subject.layout.expected is not None:
        yield from subject.layout.expected.items()


@check(
    "S3",
    "Scales have the dtype and shape that their strategy asks for.",
    needs=("scheme",),
    consequence="vLLM stops with a bare AssertionError, or reads bytes as numbers",
    remedy="write the scale again: [1] per tensor, [out, 1] per channel, [out/rows, in/columns] per block",
)
def scales_fit_their_strategy(subject: Subject) -> Iterator[Fault]:
    for module, weight, spec in _quantized_weights(subject):
        for leaf in companions_of(spec):
            if len(weight.shape) == 2 and (scale := subject.shelf.tensors.get(f"{module}.{leaf}")):
                yield from _scale_form(scale, ((1,), ()) if leaf == "input_scale" else spec.scale_shapes(weight.shape))
    yield from _kv_form(subject)


def _scale_form(scale: TensorInfo, shapes: tuple[tuple[int, ...], ...]) -> Iterator[Fault]:
    if scale.dtype not in {"F32", "BF16", "F16"}:
        yield Fault("F32, BF16 or F16", scale.dtype, scale.shard, scale.name)
    if scale.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        yield Fault(f"shape {expected}", str(list(scale.shape)), scale.shard, scale.name)


def _kv_form(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None and subject.layout is not None
    heads = (subject.config or {}).get("num_key_value_heads") or (subject.config or {}).get("num_attention_heads")
    per_head = ((heads, 1, 1), (heads,)) if subject.scheme.kv == "attn_head" and type(heads) is int else None
    for module in subject.layout.attention:
        for leaf in ("k_scale", "v_scale", "kv_scale"):
            if scale := subject.shelf.tensors.get(f"{module}.{leaf}"):
                yield from _scale_form(scale, per_head or ((1,), ()))


@check(
    "S4",
    "Tensors that are not quantized keep the source's dtype.",
    needs=("source",),
    consequence="vLLM casts them to the model's dtype",
    remedy="copy the tensor from the source",
)
def kept_tensors_keep_their_dtype(subject: Subject) -> Iterator[Fault]:
    assert subject.source is not None
    weights = {f"{module}.weight" for module in subject.quantized}
    for name, theirs in subject.source.tensors.items():
        ours = subject.shelf.tensors.get(name)
        if ours is None or name in weights or ours.dtype == theirs.dtype or ours.dtype.startswith("F8_E"):
            continue  # FP8 where there should be none is K4's or K5's
        yield Fault(theirs.dtype, ours.dtype, ours.shard, name)


@check(
    "S5",
    "Block scales: every member of a fused group but the last begins at a block's edge.",
    needs=("scheme",),
    consequence="quant_method fp8: one projection's scales overwrite another's, without a word; compressed-tensors: "
    "vLLM stops",
    remedy="ignore the group, or use per-channel scales",
)
def fused_blocks_are_aligned(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None and subject.layout is not None
    for group in subject.layout.fused:
        spec = subject.scheme.spec_of(group[0])
        if spec is None or spec.block is None:
            continue
        for module in group[:-1]:
            entry = subject.shelf.tensors.get(f"{module}.weight")
            if entry is not None and len(entry.shape) == 2 and entry.shape[0] % spec.block[0]:
                found = f"{entry.shape[0]} rows"
                yield Fault(f"a multiple of {spec.block[0]} rows", found, entry.shard, entry.name)
