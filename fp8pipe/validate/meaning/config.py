"""Reads quantization_config, in the dialects of three methods, into a Scheme; None if it is broken or not understood.

Values are looked up in tuples, not in sets: what should be a string may be a list, which has no hash.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

from fp8pipe.model.fp8_source import as_block
from fp8pipe.model.names import UE8M0
from fp8pipe.model.untrusted import clip
from fp8pipe.validate.meaning.formats import FP8, MXFP4, MXFP8, NVFP4, Format, Spec, Strategy, by_powers
from fp8pipe.validate.meaning.scheme import Group, Scheme

CONFIG = "config.json"
HF_QUANT_CONFIG = "hf_quant_config.json"
"""ModelOpt's own file, for which config.json may have no quantization_config."""

_TENSOR, _CHANNEL, _BLOCK, _GROUP = "tensor", "channel", "block", "group"


def quantization_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The one that vLLM reads: at the top, else in text_config, else compression_config."""
    places = (config.get("quantization_config"), text_config(config).get("quantization_config"))
    found = [place for place in (*places, config.get("compression_config")) if place is not None]
    return found[0] if found and isinstance(found[0], dict) else None


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """That of a multimodal model, else empty."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def method_of(quant: dict[str, Any]) -> str:
    """quant_method as vLLM normalises it."""
    name = str(quant.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")
    return "modelopt" if name in ("modelopt_fp4", "modelopt_mxfp8") else name


def read_scheme(quant: dict[str, Any] | None) -> Scheme | None:
    """What quantization_config means, None when it is absent, broken or not understood."""
    if quant is None:
        return None
    readers = {"fp8": _read_fp8, "compressed-tensors": _read_compressed, "modelopt": _read_modelopt}
    return readers.get(method_of(quant), lambda _: None)(quant)


def is_names(value: Any) -> TypeGuard[list[str]]:
    """A list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# ---------------------------------------------------------------------------------------------- quant_method fp8


def ignored_layers(quant: dict[str, Any]) -> tuple[str, ...] | None:
    """The list that quant_method fp8 reads; None when it is no list of names."""
    ignored = quant.get("ignored_layers") or quant.get("modules_to_not_convert") or []
    return tuple(ignored) if is_names(ignored) else None


def _read_fp8(quant: dict[str, Any]) -> Scheme | None:
    size, ignored, inputs = quant.get("weight_block_size"), ignored_layers(quant), quant.get("activation_scheme")
    block = as_block(size)
    if inputs not in ("static", "dynamic") or ignored is None or not (size is None or block):
        return None
    if block is None:
        return Scheme("fp8", (Group(("Linear",), Spec(FP8, _TENSOR, None, inputs)),), ignored, None)
    if inputs == "static":
        return None
    spec = Spec(FP8, _BLOCK, block, inputs, scale="weight_scale_inv")
    return Scheme("fp8", (Group(("Linear",), by_powers(spec) if _is_by_powers(quant) else spec),), ignored, None)


def _is_by_powers(quant: dict[str, Any]) -> bool:
    """Whether block scales are declared as powers of two. vLLM reads this key under any quant_method."""
    return quant.get("scale_fmt") == UE8M0


# ---------------------------------------------------------------------------------------------- compressed-tensors


def _read_compressed(quant: dict[str, Any]) -> Scheme | None:
    groups, ignore, kv = quant.get("config_groups"), quant.get("ignore", []), quant.get("kv_cache_scheme")
    if not isinstance(groups, dict) or not is_names(ignore) or not isinstance(kv, dict | None):
        return None
    read = [_read_group(group) for group in groups.values() if not is_attention_group(group)]
    known = tuple(group for group in read if group is not None)
    if _is_by_powers(quant):
        known = tuple(Group(group.targets, by_powers(group.spec)) for group in known)
    if not read or len(known) < len(read):
        return None
    kv_strategy = None if kv is None else kv.get("strategy") or _TENSOR
    if kv_strategy not in (None, "tensor", "attn_head"):
        return None
    return Scheme("compressed-tensors", known, tuple(ignore), kv_strategy)


def is_attention_group(group: Any) -> bool:
    """A group that quantizes attention alone; vLLM skips it, its scales are the KV cache's."""
    targets = group.get("targets") if isinstance(group, dict) else None
    return is_names(targets) and len(targets) == 1 and targets[0].endswith("Attention")


def _read_group(group: Any) -> Group | None:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not is_names(targets) or any(unsupported(group)):
        return None
    return Group(tuple(targets), _spec(group["weights"], group.get("input_activations")))


def _spec(weights: dict[str, Any], inputs: dict[str, Any] | None) -> Spec:
    format = format_of(weights)
    minmax = weights.get("observer") in (None, "minmax", "memoryless_minmax", "static_minmax")
    mode = None if inputs is None else "dynamic" if inputs.get("dynamic") else "static"
    if format is FP8:
        strategy: Strategy = weights.get("strategy") or _TENSOR
        rows_columns = weights["block_structure"] if strategy == _BLOCK else None
        block = None if rows_columns is None else (rows_columns[0], rows_columns[1])
        return Spec(FP8, strategy, block, mode, minmax=minmax)
    if format is NVFP4:
        return Spec(
            *(NVFP4, _GROUP, (1, 16)),
            inputs=None if inputs is None else "static",  # local scales are dynamic, the global one is stored
            weight="weight_packed",
            global_scale="weight_global_scale",
            global_divides=True,
            input_scale="input_global_scale",
            minmax=minmax,
        )
    assert format is not None
    weight = "weight_packed" if format is MXFP4 else "weight"
    return Spec(format, _GROUP, (1, 32), mode, weight=weight, minmax=minmax)


def format_of(weights: dict[str, Any]) -> Format | None:
    """Which format the `weights` of a config group describe; None if none that is known here."""
    kind = (weights.get("type", "int"), weights.get("num_bits", 8))
    shape = (weights.get("strategy") or _TENSOR, weights.get("group_size"))
    if kind == ("float", 8) and shape[0] in (_TENSOR, _CHANNEL, _BLOCK) and shape[1] is None:
        return FP8
    if kind == ("float", 8) and shape == (_GROUP, 32) and weights.get("scale_dtype") in ("torch.uint8", "uint8"):
        return MXFP8
    if kind == ("float", 4) and shape == (_GROUP, 32):
        return MXFP4
    return NVFP4 if kind == ("float", 4) and shape == ("tensor_group", 16) else None


def unsupported(group: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(expected, found) for everything in a config group that vLLM's schemes do not serve."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        yield "weights (and input_activations) as mappings", f"{clip(repr(weights))}"
        return
    format = format_of(weights)
    if format is None:
        yield "weights of FP8 (tensor, channel, block), NVFP4, MXFP4 or MXFP8", _in_words(weights)
    if weights.get("symmetric", True) is not True:
        yield "symmetric weights", "symmetric: false"
    if weights.get("dynamic", False) is not False:
        yield "static weights", f"dynamic: {clip(weights['dynamic'])}"
    if weights.get("strategy") == _BLOCK and not as_block(weights.get("block_structure")):
        yield "block_structure [rows, columns]", clip(repr(weights.get("block_structure")))
    if inputs is not None and format is not None:
        yield from {
            "FP8": _unsupported_fp8_inputs,
            "NVFP4": _unsupported_nvfp4_inputs,
            "MXFP4": _unsupported_mx_inputs,
            "MXFP8": _unsupported_mx_inputs,
        }[format.name](inputs, weights.get("strategy"))


def _in_words(args: dict[str, Any]) -> str:
    shown = (args.get("type", "int"), args.get("num_bits", 8), args.get("strategy") or _TENSOR, args.get("group_size"))
    return clip("{} {} bits, strategy {}, group_size {}".format(*shown))


def _unsupported_fp8_inputs(inputs: dict[str, Any], weight_strategy: Any) -> Iterator[tuple[str, str]]:
    if (inputs.get("type", "int"), inputs.get("num_bits", 8)) != ("float", 8):
        yield "input activations of type float with num_bits 8", _in_words(inputs)
    if inputs.get("dynamic", False):
        return
    if inputs.get("symmetric", True) is not True:
        yield "symmetric static inputs", "symmetric: false"
    if (inputs.get("strategy") or _TENSOR) != _TENSOR:
        yield "static inputs per tensor", clip(inputs.get("strategy"))
    if weight_strategy == _BLOCK:
        yield "dynamic inputs with block weights", "static inputs"


def _unsupported_nvfp4_inputs(inputs: dict[str, Any], _: Any) -> Iterator[tuple[str, str]]:
    if format_of(inputs) is not NVFP4:
        yield "NVFP4 inputs beside NVFP4 weights, or none", _in_words(inputs)


def _unsupported_mx_inputs(inputs: dict[str, Any], _: Any) -> Iterator[tuple[str, str]]:
    if not inputs.get("dynamic", False):
        yield "dynamic inputs", "static inputs"
    if inputs.get("type", "int") != "float":
        yield "float inputs", _in_words(inputs)


# ---------------------------------------------------------------------------------------------- modelopt

_MODELOPT: dict[str, Spec] = {
    "FP8": Spec(FP8, _TENSOR, None, "static"),
    "FP8_PER_CHANNEL_PER_TOKEN": Spec(FP8, _CHANNEL, None, "dynamic", scale_form="flat"),
    "FP8_PB_WO": Spec(FP8, _BLOCK, (128, 128), "dynamic", scale_form="blocks"),
    "NVFP4": Spec(NVFP4, _GROUP, (1, 16), "static", global_scale="weight_scale_2"),
    "W4A16_NVFP4": Spec(NVFP4, _GROUP, (1, 16), None, global_scale="weight_scale_2", spare=("input_scale",)),
    "MXFP8": Spec(MXFP8, _GROUP, (1, 32), "dynamic"),
}
MODELOPT_ALGORITHMS = tuple(_MODELOPT)


def modelopt_settings(quant: dict[str, Any]) -> dict[str, Any]:
    """quant_algo and its companions: at the top, or under `quantization` in hf_quant_config.json."""
    inner = quant.get("quantization")
    return inner if isinstance(inner, dict) else quant


def modelopt_algorithm(quant: dict[str, Any]) -> str:
    """quant_algo as vLLM normalises it."""
    return str(modelopt_settings(quant).get("quant_algo") or "").upper()


def modelopt_excluded(quant: dict[str, Any]) -> tuple[str, ...] | None:
    """Modules that stay; None when it is no list of names."""
    settings = modelopt_settings(quant)
    excluded = settings.get("exclude_modules", []) if settings is not quant else settings.get("ignore", [])
    return tuple(excluded) if is_names(excluded) else None


def _read_modelopt(quant: dict[str, Any]) -> Scheme | None:
    spec, excluded = _MODELOPT.get(modelopt_algorithm(quant)), modelopt_excluded(quant)
    settings = modelopt_settings(quant)
    group_size = settings.get("group_size")
    if spec is None or excluded is None or (spec.format is NVFP4 and group_size not in (None, 16)):
        return None
    groups = settings.get("config_groups")
    if modelopt_algorithm(quant) == "NVFP4" and isinstance(groups, dict) and groups:
        weight_only = all(isinstance(g, dict) and g.get("input_activations") is None for g in groups.values())
        spec = _MODELOPT["W4A16_NVFP4"] if weight_only else spec
    scheme = settings.get("kv_cache_scheme")
    has_kv = settings.get("kv_cache_quant_algo") == "FP8" or (
        isinstance(scheme, dict) and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
    )
    return Scheme("modelopt", (Group(("Linear",), spec),), excluded, "tensor" if has_kv else None)
