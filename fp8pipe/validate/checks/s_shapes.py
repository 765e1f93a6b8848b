"""S1 to S7: types and shapes. Does every tensor have the form that vLLM's parameter has?

vLLM casts any dtype into any other and cuts off what is too long in fused layers, so most of this is invisible there.
"""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.config import text_config
from fp8pipe.validate.meaning.names import FLOAT_SCALES, holds_codes, is_scale, split_name
from fp8pipe.validate.subject import Subject


@check(
    "S1",
    "Quantized weights have the dtype of their format: F8_E4M3, or U8 with two FP4 codes to a byte.",
    needs=("scheme",),
    yields_to=("K5",),
    consequence="vLLM silently casts the bytes' values into FP8",
    remedy="quantize again",
)
def codes_have_their_dtype(subject: Subject) -> Iterator[Fault]:
    for _, entry, spec in subject.quantized_weights():
        if entry.dtype != spec.format.codes.dtype:
            yield Fault(spec.format.codes.dtype, entry.dtype, entry.shard, entry.name)


@check(
    "S2",
    "Every tensor has the shape of the source; quantized weights are matrices.",
    consequence="vLLM stops when it is too small, and silently cuts off what is too long in fused layers",
    remedy="quantize again",
)
def shapes_equal_source(subject: Subject) -> Iterator[Fault]:
    for module, entry, spec in subject.quantized_weights():
        if len(entry.shape) != 2 or 0 in entry.shape:
            yield Fault("a matrix [out, in]", f"shape {list(entry.shape)}", entry.shard, entry.name)
        elif (shape := subject.source_shape(module)) is not None:
            is_packed = entry.dtype == spec.format.codes.dtype
            yield from _other_shape(entry, spec.stored(shape) if is_packed else shape)
    for name, twin in _kept_in_source(subject):
        entry = subject.files.tensors.get(name)
        if entry is not None and subject.spec_of_weight(entry) is None:
            yield from _other_shape(entry, twin.shape)


def _kept_in_source(subject: Subject) -> Iterator[tuple[str, TensorInfo]]:
    """The source's tensors, but not the scales of a source that is quantized itself: new ones replace them."""
    for name, twin in subject.source.tensors.items() if subject.source_or_none else ():
        if not (subject.is_source_quantized and is_scale(name)):
            yield name, twin


def _other_shape(entry: TensorInfo, shape: tuple[int, ...]) -> Iterator[Fault]:
    if entry.shape != shape:
        yield Fault(f"shape {list(shape)}", f"{list(entry.shape)}", entry.shard, entry.name)


@check(
    "S3",
    "Scales have the shape that their strategy asks for, and FP8 ones are floats.",
    needs=("scheme",),
    consequence="vLLM stops with a bare AssertionError, or reads bytes as numbers",
    remedy="write the scale again: [1] per tensor, [out, 1] per channel, [out/rows, in/columns] per block",
)
def scales_fit_their_strategy(subject: Subject) -> Iterator[Fault]:
    for module, weight, spec in subject.quantized_weights():
        for leaf in spec.companions if len(weight.shape) == 2 else ():
            if (scale := subject.files.tensors.get(f"{module}.{leaf}")) is None:
                continue
            shapes = spec.scale_shapes(spec.unpacked(weight.shape)) if leaf == spec.scale else ((1,), ())
            is_float = leaf != spec.scale or spec.format.scale_dtypes == FLOAT_SCALES
            yield from _scale_form(scale, shapes, FLOAT_SCALES if is_float else (scale.dtype,))
    for name, module in subject.kv_scales.items():
        if module in subject.layout.attention and split_name(name)[1] in ("k_scale", "v_scale", "kv_scale"):
            scale = subject.files.tensors[name]
            yield from _scale_form(scale, _kv_shapes(subject, module, scale), FLOAT_SCALES)


def _scale_form(scale: TensorInfo, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]) -> Iterator[Fault]:
    if scale.dtype not in dtypes:
        yield Fault(" or ".join(dtypes), scale.dtype, scale.shard, scale.name)
    if scale.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        yield Fault(f"shape {expected}", str(list(scale.shape)), scale.shard, scale.name)


def _kv_shapes(subject: Subject, attention: str, scale: TensorInfo) -> tuple[tuple[int, ...], ...]:
    if subject.scheme.kv != "attn_head":
        return (1,), ()
    heads = _kv_heads(subject, attention)
    return ((heads, 1, 1), (heads,)) if heads is not None else (scale.shape,)


def _kv_heads(subject: Subject, attention: str) -> int | None:
    """Heads whose keys and values a layer caches; None if neither record nor config says."""
    text = text_config(subject.config) or subject.config
    known = (subject.layout.kv_heads.get(attention), text.get("num_key_value_heads"), text.get("num_attention_heads"))
    return next((heads for heads in known if type(heads) is int and heads > 0), None)


@check(
    "S4",
    "Tensors that are not quantized keep the source's dtype.",
    needs=("source",),
    consequence="vLLM casts them to the model's dtype",
    remedy="copy the tensor from the source",
)
def kept_tensors_keep_their_dtype(subject: Subject) -> Iterator[Fault]:
    weights = {f"{module}.weight" for module in subject.specs if module not in subject.layout.may_stay}
    for name, theirs in _kept_in_source(subject):
        ours = subject.files.tensors.get(name)
        if ours is None or name in weights or ours.dtype == theirs.dtype or holds_codes(ours):
            continue
        if ours.dtype in FLOAT_SCALES and subject.source_scale(name) is not None:
            continue  # an FP8 weight of the source, kept as its values without the scale
        yield Fault(theirs.dtype, ours.dtype, ours.shard, name)


@check(
    "S5",
    "Block scales: every member of a fused group but the last is a whole number of blocks high.",
    needs=("scheme",),
    yields_to=("K5",),
    consequence="quant_method fp8: one projection's scales silently overwrite another's; compressed-tensors: "
    "vLLM stops",
    remedy="ignore the group, or use per-channel scales",
)
def fused_blocks_are_aligned(subject: Subject) -> Iterator[Fault]:
    for group in subject.layout.fused:
        spec = subject.specs.get(group[0])
        if spec is None or spec.block is None:
            continue
        for module in group[:-1]:
            entry = subject.weight(module)
            if entry is not None and len(entry.shape) == 2 and entry.shape[0] % spec.block[0]:
                found = f"{entry.shape[0]} rows"
                yield Fault(f"a multiple of {spec.block[0]} rows", found, entry.shard, entry.name)


@check(
    "S6",
    "Group scales: the columns are whole groups.",
    needs=("scheme",),
    yields_to=("K5",),
    consequence="vLLM stops: the input size is no multiple of the group",
    remedy="ignore the module, or use per-channel FP8",
)
def columns_are_whole_groups(subject: Subject) -> Iterator[Fault]:
    for _, entry, spec in subject.quantized_weights():
        if spec.strategy == "group" and spec.block is not None and len(entry.shape) == 2:
            columns = spec.unpacked(entry.shape)[1]
            if columns % spec.block[1]:
                yield Fault(f"a multiple of {spec.block[1]} columns", f"{columns}", entry.shard, entry.name)


@check(
    "S7",
    "Scales of MX formats are U8 exponents, those of NVFP4 are F8_E4M3.",
    needs=("scheme",),
    consequence="vLLM silently casts them: F8_E8M0 exponents all become zero, U8 is read as its byte's number",
    remedy="write the same bytes under the dtype that the format asks for",
)
def group_scales_have_their_dtype(subject: Subject) -> Iterator[Fault]:
    for module, _, spec in subject.quantized_weights():
        scale = subject.files.tensors.get(f"{module}.{spec.scale}")
        if spec.strategy == "group" and scale is not None and scale.dtype not in spec.format.scale_dtypes:
            yield Fault(" or ".join(spec.format.scale_dtypes), scale.dtype, scale.shard, scale.name)
