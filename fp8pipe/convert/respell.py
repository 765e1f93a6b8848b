"""Rewrites one spelling as the other without touching an FP8 byte. Pure: Draft in, Draft of the other method out.

What the other spelling cannot express is refused, with the reason and what to do instead. The weights themselves say
what is quantized: a module whose weight is E4M3 is, and any other matrix is kept and named in the ignore list.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from fp8pipe.config import Recipe, validated
from fp8pipe.convert.draft import Draft, DraftTensor, renamed
from fp8pipe.convert.record import Method
from fp8pipe.errors import InputError
from fp8pipe.model.names import ABSORBED_LEAF, FLOATS, FP8, UE8M0, experts_holder_from_name
from fp8pipe.quantize import formats
from fp8pipe.validate.meaning.formats import Spec
from fp8pipe.validate.meaning.scheme import Scheme

_NOT_LINEAR = re.compile(r"(^|\.)(lm_head|\w*embed\w*|wte|wpe)$")
"""Modules that quant_method fp8 cannot quantize."""

_BY_UNIT = {"tensor": "per tensor", "channel": "per output channel", "block": "per block", "group": "per group"}
_REQUANTIZE = "quantize the unquantized source with checkpoint_format: {to}"


def respell(draft: Draft, scheme: Scheme, to: Method, settings: Recipe | None) -> Draft:
    """`draft`, whose config means `scheme`, spelled as `to`. `settings`: the recipe that made it, if it is known.

    Raises InputError for a checkpoint that `to` cannot express, or whose tensors contradict its config."""
    _refuse_half_experts(draft)
    spec = _one_spec(draft, scheme)
    _refuse_inexpressible(draft, scheme, spec, to)
    recipe = _recipe(draft, scheme, spec, to, settings)
    _refuse_unserved_experts(draft, recipe)
    tensors = tuple(_respelled(tensor, draft, spec, recipe) for tensor in draft.tensors)
    _require_scales(draft, tensors, spec, recipe)
    with_kv = any(tensor.leaf == "k_scale" for tensor in tensors)
    config = formats.format_of(recipe).quantization_config(recipe, _kept(draft, scheme), with_kv=with_kv)
    if settings is None and to == "compressed-tensors":
        _forget_observers(config)
    config_changes = (*draft.config_changes, f"quantization_config {draft.method} -> {to}")
    notes = (*draft.notes, *_notes(draft, scheme, spec, to, with_kv))
    return replace(draft, method=to, tensors=tensors, quantization=config, config_changes=config_changes, notes=notes)


# ---------------------------------------------------------------------------------------------- refusals


def _one_spec(draft: Draft, scheme: Scheme) -> Spec:
    """The scheme that all quantized modules share. Raises InputError if there is none, or several."""
    for tensor in draft.tensors:
        if tensor.dtype.startswith("F8_") and (tensor.leaf != "weight" or tensor.dtype != FP8):
            what = f"{tensor.dtype} {list(tensor.shape)}"
            raise InputError(f"{tensor.name}: {what}; only {FP8} matrices named *.weight can be converted")
        if tensor.dtype.startswith("F8_") and len(tensor.shape) != 2:
            raise InputError(f"{tensor.name}: {list(tensor.shape)}, expected [out, in], one tensor per expert")
    if not draft.quantized:
        raise InputError(f"no weight is {FP8}, so there is nothing to convert; `fp8pipe quantize` makes FP8 weights")
    specs: dict[Spec, str] = {}
    for module in draft.quantized:
        spec = scheme.spec_of(module)
        if _NOT_LINEAR.search(module):
            raise InputError(
                f"{module} is FP8, which quant_method fp8 has for Linears and experts only; keep this spelling"
            )
        if spec is None:
            raise InputError(f"{module}.weight is FP8, but config.json does not quantize it; run `fp8pipe validate`")
        specs.setdefault(spec, module)
    if len(specs) > 1:
        found = ", ".join(f"{module} {_in_words(spec)}" for spec, module in specs.items())
        raise InputError(
            f"several schemes in one model ({found}), quant_method fp8 has one for all; keep this spelling"
        )
    spec = next(iter(specs))
    if spec.format.name != "FP8":
        raise InputError(f"weights are {spec.format.name}, which quant_method fp8 does not have; keep this spelling")
    return spec


def _in_words(spec: Spec) -> str:
    return f"weights {_BY_UNIT[spec.strategy]}, {spec.inputs or '16-bit'} activations"


def _refuse_inexpressible(draft: Draft, scheme: Scheme, spec: Spec, to: Method) -> None:
    """Raise InputError for what `to` cannot express."""
    extra = _extras(draft.quantization)
    if extra:
        raise InputError(f"{extra} has no counterpart in quant_method {to}; keep this spelling")
    if to == "compressed-tensors":
        _refuse_clipped_mla(draft, spec)
        return
    per_head = any(t.leaf in {"k_scale", "v_scale"} and not t.is_scalar for t in draft.tensors)
    reason = ""
    if spec.strategy == "channel":
        reason = "weights have a scale per output channel, quant_method fp8 one per tensor or block"
    elif spec.inputs is None:
        reason = "only weights are FP8, quant_method fp8 always quantizes activations too"
    elif per_head or scheme.kv == "attn_head":
        reason = "the KV cache has a scale per head, quant_method fp8 one per layer"
    if reason:
        raise InputError(f"{reason}; keep compressed-tensors, or {_REQUANTIZE.format(to=to)}")


def _refuse_clipped_mla(draft: Draft, spec: Spec) -> None:
    """Raise InputError for MLA's kv_b_proj with a static input scale.

    quant_method fp8 dequantizes the weight; under compressed-tensors the scale would clip."""
    found = [module for module in draft.quantized if module.endswith(f".{ABSORBED_LEAF}")]
    if found and spec.inputs == "static":
        raise InputError(f"{found[0]} has a static input scale, which would clip it in compressed-tensors; keep fp8")


def _extras(quantization: dict[str, Any]) -> str:
    """The first setting that changes what the model computes and has no counterpart; empty if there is none."""
    for key in ("transform_config", "store_dtype", "modules_to_convert"):
        if quantization.get(key):
            return key
    sparsity = quantization.get("sparsity_config")
    if isinstance(sparsity, dict) and sparsity.get("targets"):
        return "sparsity_config"
    groups = quantization.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if group.get("output_activations"):
            return "output_activations"
    return ""


def _refuse_half_experts(draft: Draft) -> None:
    """Raise InputError for a layer with experts of both precisions."""
    quantized = {experts_holder_from_name(module): module for module in draft.quantized}
    for holder in draft.kept_experts:
        if holder in quantized:
            raise InputError(
                f"{holder}: some experts are FP8 ({quantized[holder]}), others are not; vLLM loads all experts of a "
                "layer alike; quantize the unquantized source again"
            )


def _refuse_unserved_experts(draft: Draft, recipe: Recipe) -> None:
    """Raise InputError for experts that vLLM serves only in their present spelling."""
    refusal = formats.format_of(recipe).refuse_experts(recipe)
    if refusal and any(map(experts_holder_from_name, draft.quantized)):
        raise InputError(f"{refusal}; keep quant_method {draft.method}")


# ---------------------------------------------------------------------------------------------- tensors


def _recipe(draft: Draft, scheme: Scheme, spec: Spec, to: Method, settings: Recipe | None) -> Recipe:
    """A recipe that would have made this checkpoint, for the functions that write a spelling."""
    scales = "power_of_two" if spec.format.by_powers else "exact"
    if settings is not None:
        content: dict[str, Any] = settings.model_dump() | {"checkpoint_format": to}
        content["weights"] |= {"scales": scales}  # what config.json says, for that is what loaders read
        return validated(Recipe, content, "recipe of the checkpoint")
    strategy = {"tensor": "tensor", "block": "group", "channel": "token"}[spec.strategy]
    has_kv = scheme.kv is not None or any(t.leaf == "k_scale" for t in draft.tensors)
    content = {
        "name": "converted",
        "weights": {"strategy": spec.strategy, "scales": scales} | ({"block_shape": spec.block} if spec.block else {}),
        "activations": {"mode": spec.inputs, "strategy": "tensor" if spec.inputs == "static" else strategy},
        "kv_cache": {} if has_kv else None,
        "checkpoint_format": to,
    }
    return validated(Recipe, content, "scheme of the checkpoint")


def _respelled(tensor: DraftTensor, draft: Draft, spec: Spec, recipe: Recipe) -> DraftTensor:
    """The tensor as the recipe's format spells it."""
    spelling = formats.format_of(recipe)
    if tensor.leaf in {"k_scale", "v_scale"} and tensor.is_scalar:
        return _as_scale(tensor, tensor.leaf, spelling.kv_scale_shape("tensor", 1))
    weight = draft.quantized.get(tensor.module)
    if weight is None or tensor.leaf in {"weight", "bias"}:
        return tensor
    if tensor.leaf == spec.scale and tensor.shape in spec.scale_shapes(weight.shape):
        shape = spelling.scalar_shape() if spec.strategy == "tensor" else tensor.shape
        return _as_scale(tensor, spelling.weight_scale_name(spec.strategy), shape)
    if tensor.leaf == "input_scale" and spec.inputs == "static" and tensor.is_scalar:
        return _as_scale(tensor, "input_scale", spelling.scalar_shape())
    raise InputError(
        f"{tensor.name} {list(tensor.shape)} has no place beside a weight {list(weight.shape)} with "
        f"{_in_words(spec)}, the scheme in config.json; run `fp8pipe validate`"
    )


def _as_scale(tensor: DraftTensor, leaf: str, shape: tuple[int, ...]) -> DraftTensor:
    if tensor.dtype not in FLOATS:
        raise InputError(f"{tensor.name}: a scale in {tensor.dtype}, expected {', '.join(FLOATS)}")
    return renamed(tensor, leaf, shape=shape, dtype="F32")


def _require_scales(draft: Draft, tensors: tuple[DraftTensor, ...], spec: Spec, recipe: Recipe) -> None:
    """Raise InputError unless every quantized module has its scales, and every k_scale its v_scale."""
    names = {tensor.name for tensor in tensors}
    wanted = [formats.format_of(recipe).weight_scale_name(spec.strategy)]
    wanted += ["input_scale"] if spec.inputs == "static" else []
    for module in draft.quantized:
        for leaf in wanted:
            if f"{module}.{leaf}" not in names:
                raise InputError(f"{module}.weight is FP8 and has no {leaf}; run `fp8pipe validate`")
    for tensor in tensors:
        twin = {"k_scale": "v_scale", "v_scale": "k_scale"}.get(tensor.leaf)
        if twin and f"{tensor.module}.{twin}" not in names:
            raise InputError(
                f"{tensor.name} has no {twin} beside it, and readers disagree on what that means; "
                "run `fp8pipe validate`"
            )


# ---------------------------------------------------------------------------------------------- config


def _kept(draft: Draft, scheme: Scheme) -> formats.Kept:
    """Kept modules and holders of kept experts, as the weights have them.

    Plain entries of the config's own list come first, because it may also hold transformers' names."""
    holders = {*draft.kept_experts, *filter(None, map(experts_holder_from_name, draft.quantized))}

    def is_plain(entry: str) -> bool:
        return not entry.startswith("re:") and entry not in holders and experts_holder_from_name(entry) is None

    entries = dict.fromkeys(filter(is_plain, scheme.ignore))
    head = {} if "lm_head" in entries else {"lm_head": None}
    modules = head | entries | dict.fromkeys(draft.kept)
    unknown = formats.foreign_parents(entries, [*draft.kept, *draft.quantized])  # taken to hold quantized modules too
    return formats.kept_of(modules, draft.kept_experts, [*draft.quantized, *unknown])


def _forget_observers(config: dict[str, Any]) -> None:
    """Remove the observers, for nobody knows how a foreign checkpoint's scales were found."""
    (group,) = config["config_groups"].values()
    for args in (group["weights"], group["input_activations"], config["kv_cache_scheme"]):
        if args is not None:
            args["observer"] = None


def _notes(draft: Draft, scheme: Scheme, spec: Spec, to: Method, with_kv: bool) -> Iterator[str]:
    """What readers do differently with the result."""
    rules: tuple[tuple[bool, str], ...] = (
        (
            to == "fp8" and with_kv,
            "serve it with --kv-cache-dtype fp8, which this spelling cannot ask for; vLLM rounds its KV scales to bf16",
        ),
        (
            to == "compressed-tensors" and with_kv,
            "kv_cache_scheme makes vLLM keep the KV cache in FP8 without an option",
        ),
        (
            scheme.kv is not None and not with_kv,
            "config.json announces KV scales that do not exist: vLLM used 1.0, and now keeps the cache unquantized",
        ),
        (
            to == "fp8" and spec.strategy == "tensor",
            "for vLLM only: transformers 5 reads this spelling without its scales",
        ),
        (
            spec.strategy == "tensor" and spec.inputs == "dynamic",
            "dynamic activations: vLLM runs compressed-tensors per token, and fp8 per token where CUTLASS has a "
            "kernel, else per tensor",
        ),
        (
            to == "compressed-tensors" and draft.quantization.get("scale_fmt") == UE8M0,
            f"scale_fmt {UE8M0} is kept: vLLM reads it in this spelling too, other readers do not",
        ),
    )
    return (note for applies, note in rules if applies)
