"""What quantization_config means: for any module, how its weight must be stored.

In: the parsed config. Out: a `Scheme`; or None when the config is broken or unknown, and the C checks say why.

    FP8      F8_E4M3 [out, in], scales per tensor, channel or block              compressed-tensors, fp8, modelopt
    MXFP8    F8_E4M3 [out, in], U8 exponents [out, in/32]                        compressed-tensors, modelopt
    MXFP4    U8 [out, in/2], U8 exponents [out, in/32]                           compressed-tensors
    NVFP4    U8 [out, in/2], F8_E4M3 [out, in/16], one F32 for the whole weight  compressed-tensors, modelopt

Values are looked up in tuples, not in sets: what should be a string may be a list, which has no hash.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any, Literal, TypeGuard

from fp8pipe.model.untrusted import clip
from fp8pipe.validate.layout import expert_of
from fp8pipe.validate.patterns import Patterns

Method = Literal["compressed-tensors", "fp8", "modelopt"]
METHODS: tuple[Method, ...] = ("compressed-tensors", "fp8", "modelopt")
KNOWN_ELSEWHERE = (
    "awq", "gptq", "bitsandbytes", "mxfp4", "mxfp8", "fp_quant", "fbgemm_fp8", "quark", "torchao",
)  # fmt: skip
"""Methods that vLLM loads and this validator does not know; said, never passed."""

FUSED_NAMES = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""vLLM's names of layers that are several Linears on disk."""

Strategy = Literal["tensor", "channel", "block", "group"]
_TENSOR, _CHANNEL, _BLOCK, _GROUP = "tensor", "channel", "block", "group"


# ---------------------------------------------------------------------------------------------- formats


@dataclass(frozen=True, slots=True)
class Codes:
    """How a code stands for a number: sign, exponent, mantissa, without infinities."""

    dtype: str
    """Of the tensor that holds them."""
    per_byte: int
    maximum: float
    reach: float
    """The largest number that rounds to the maximum, half a step above it: beyond, a weight is clipped."""
    mantissa_bits: int
    min_exponent: int
    """Of normal numbers; below it the step stays the same."""


E4M3 = Codes("F8_E4M3", 1, 448.0, 464.0, 3, -6)
E2M1 = Codes("U8", 2, 6.0, 7.0, 1, 0)
"""Two to a byte, the even column in the low half."""


@dataclass(frozen=True, slots=True)
class Format:
    """A number format for weights, and what a faithful quantization to it looks like."""

    name: Literal["FP8", "MXFP8", "NVFP4", "MXFP4"]
    codes: Codes
    scale_dtypes: tuple[str, ...]
    rel_l2: tuple[float, float]
    """Error (L2) of a whole weight, relative: beyond the first a warning, beyond the second an error. Measured: FP8
    0.026, NVFP4 0.091."""
    min_cosine: float
    """Of a row. Were every weight off by a full half step (FP8: 1/16), it would be just above."""
    amax_ratio: tuple[float, float]
    """scale * maximum code / largest weight of the unit: 1 for absmax, down to one half for MSE observers; rounded
    scales (bf16, E4M3, powers of two) lie around it."""
    top: int
    """Least magnitude code that the largest weight of a unit gets under an absmax scale."""
    zeros: float
    """Share of weights that may round to zero and are not."""


FP8 = Format("FP8", E4M3, ("F32", "BF16", "F16"), (0.035, 0.06), 0.998, (0.5, 1.01), 0x7D, 0.02)
MXFP8 = Format("MXFP8", E4M3, ("U8",), (0.04, 0.07), 0.997, (0.5, 2.01), 0x76, 0.02)
FP8_BY_POWERS = replace(
    FP8, rel_l2=MXFP8.rel_l2, min_cosine=MXFP8.min_cosine, amax_ratio=MXFP8.amax_ratio, top=MXFP8.top
)
"""FP8 whose scales are powers of two, in floats: `scale_fmt` ue8m0 of quant_method fp8."""
NVFP4 = Format("NVFP4", E2M1, ("F8_E4M3",), (0.12, 0.2), 0.96, (0.5, 1.07), 7, 0.25)
MXFP4 = Format("MXFP4", E2M1, ("U8",), (0.16, 0.25), 0.95, (0.5, 2.01), 6, 0.25)

FORMAT_NAMES = {
    "FP8": ("float-quantized", "naive-quantized"),
    "NVFP4": ("nvfp4-pack-quantized",),
    "MXFP4": ("mxfp4-pack-quantized",),
    "MXFP8": ("mxfp8-quantized",),
}
"""`format` of compressed-tensors for each of them."""
MIXED = "mixed-precision"


@dataclass(frozen=True, slots=True)
class Spec:
    """How one group of modules is stored."""

    format: Format
    strategy: Strategy
    block: tuple[int, int] | None
    """Rows and columns that share a scale, for strategies block and group (one row)."""
    inputs: Literal["static", "dynamic"] | None
    """None: weight-only."""
    weight: str = "weight"
    """Leaf names of the tensors."""
    scale: str = "weight_scale"
    global_scale: str | None = None
    """One F32 beside the scales of NVFP4."""
    global_divides: bool = False
    """weight = code * scale / global_scale, not times it."""
    input_scale: str = "input_scale"
    spare: tuple[str, ...] = ()
    """Leaves that vLLM accepts beside them and drops."""
    scale_form: Literal["plain", "flat", "blocks"] = "plain"
    """How the scale's shape is written: [out, 1]; ModelOpt's [out]; ModelOpt's [out/rows, 1, in/columns, 1]."""
    minmax: bool = True
    """The config names an observer that scales by the absolute maximum (or names none)."""

    @property
    def companions(self) -> tuple[str, ...]:
        """Leaf names that must stand beside the weight."""
        names = (self.scale,) if self.global_scale is None else (self.scale, self.global_scale)
        return (*names, self.input_scale) if self.inputs == "static" else names

    @property
    def scalars(self) -> tuple[str, ...]:
        """Those of them with one value for the whole module."""
        return tuple(leaf for leaf in self.companions if leaf != self.scale)

    def stored(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape on disk of a weight [out, in]."""
        return (*shape[:-1], shape[-1] // self.format.codes.per_byte) if shape else shape

    def unpacked(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """[out, in] of a weight as it is stored; only for matrices."""
        return shape[0], shape[1] * self.format.codes.per_byte

    def units(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Grid of the weights [out, in] that share a scale."""
        if self.strategy == _TENSOR:
            return (1,)
        if self.strategy == _CHANNEL:
            return (shape[0], 1)
        assert self.block is not None
        return (-(-shape[0] // self.block[0]), -(-shape[1] // self.block[1]))

    def scale_shapes(self, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes that vLLM accepts for the scale of a weight [out, in], the usual one first."""
        units = self.units(shape)
        if self.strategy == _TENSOR:
            return ((1,), ())
        if self.scale_form == "flat":
            return ((shape[0],),)
        return ((units[0], 1, units[1], 1), units) if self.scale_form == "blocks" else (units,)


# ---------------------------------------------------------------------------------------------- schemes


@dataclass(frozen=True)
class Group:
    """One config group: which modules, and how."""

    targets: tuple[str, ...]
    spec: Spec


@dataclass(frozen=True)
class Scheme:
    """A quantization_config that is understood."""

    method: Method
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv: Literal["tensor", "attn_head"] | None

    def spec_of(self, module: str) -> Spec | None:
        """How the weight of a Linear (or expert) `module` is stored; None when it stays as it was.

        As in vLLM the first target that names the module counts, and a class only where none does."""
        if self.ignores(module):
            return None
        named = [target for target in (*self.target_patterns.matching(module), module) if target in self._targets]
        if named:
            return self._targets[min(named, key=self._order.__getitem__)]
        return self._targets.get("Linear")

    def ignores(self, module: str) -> bool:
        """Whether `module` is in the ignore list, as the method reads it."""
        if self.method == "modelopt":
            return module in self._exact or any(e in module or fnmatchcase(module, e) for e in self.ignore)
        if any(self._lists(name) for name in (module, *fused_names(module))):
            return True
        place = expert_of(module)
        return self.method == "fp8" and place is not None and place[0] in self._experts

    def _lists(self, name: str) -> bool:
        """Whether an ignore entry names exactly this module; to quant_method fp8 a pattern is a name like others."""
        return name in self._exact or (self.method == "compressed-tensors" and self.patterns.matches(name))

    def names_head(self, module: str) -> bool:
        """Whether a target other than a class names `module`: the only way that lm_head is quantized."""
        return module in self._targets or self.target_patterns.matches(module)

    def quantizes_head(self, module: str) -> bool:
        """Whether vLLM builds `module`, the output head, as a quantized layer."""
        named = self.method == "modelopt" or self.names_head(module)
        return named and not self.ignores(module)

    def match_all(self, modules: Iterable[str]) -> None:
        """Match every name once. Patterns that cost too much for these names are refused from then on, so that no check
        sees them matched and another refused."""
        for module in modules:
            self.patterns.matches(module)
            self.target_patterns.matches(module)

    @cached_property
    def patterns(self) -> Patterns:
        """Ignore entries that are patterns; quant_method fp8 knows none."""
        return Patterns(entry for entry in self.ignore if entry.startswith("re:"))

    @cached_property
    def target_patterns(self) -> Patterns:
        """Targets that are patterns."""
        return Patterns(target for target in self._targets if target.startswith("re:"))

    @cached_property
    def _targets(self) -> dict[str, Spec]:
        """As vLLM holds them: in the order of the config; what two groups target is the last one's."""
        return {target: group.spec for group in self.groups for target in group.targets}

    @cached_property
    def _order(self) -> dict[str, int]:
        return {target: place for place, target in enumerate(self._targets)}

    @cached_property
    def _experts(self) -> frozenset[str]:
        """Experts that quant_method fp8 leaves unquantized: any name in them keeps the whole layer's."""
        return frozenset(entry[: entry.rindex(".experts") + 8] for entry in self.ignore if ".experts" in entry)

    @cached_property
    def _exact(self) -> frozenset[str]:
        return frozenset(self.ignore)


def fused_names(module: str) -> Iterator[str]:
    """Names of the layer that vLLM fuses `module` into, which an ignore list may hold instead of the members'. Experts
    are no members: vLLM has one layer for all of them."""
    parent, _, leaf = module.rpartition(".")
    if expert_of(module) is None:
        yield from (f"{parent}.{fused}" for fused, members in FUSED_NAMES.items() if leaf in members)


# ---------------------------------------------------------------------------------------------- reading


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


def is_block(value: Any) -> bool:
    """Two whole numbers above zero."""
    return isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)


def is_names(value: Any) -> TypeGuard[list[str]]:
    """A list of strings."""
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


# ---------------------------------------------------------------------------------------------- quant_method fp8


def ignored_layers(quant: dict[str, Any]) -> tuple[str, ...] | None:
    """The list that quant_method fp8 reads; None when it is no list of names."""
    ignored = quant.get("ignored_layers") or quant.get("modules_to_not_convert") or []
    return tuple(ignored) if is_names(ignored) else None


def _read_fp8(quant: dict[str, Any]) -> Scheme | None:
    block, ignored, inputs = quant.get("weight_block_size"), ignored_layers(quant), quant.get("activation_scheme")
    if inputs not in ("static", "dynamic") or ignored is None or not (block is None or is_block(block)):
        return None
    if block is None:
        return Scheme("fp8", (Group(("Linear",), Spec(FP8, _TENSOR, None, inputs)),), ignored, None)
    if inputs == "static":
        return None
    format = FP8_BY_POWERS if quant.get("scale_fmt") == "ue8m0" else FP8
    spec = Spec(format, _BLOCK, (block[0], block[1]), inputs, scale="weight_scale_inv")
    return Scheme("fp8", (Group(("Linear",), spec),), ignored, None)


# ---------------------------------------------------------------------------------------------- compressed-tensors


def _read_compressed(quant: dict[str, Any]) -> Scheme | None:
    groups, ignore, kv = quant.get("config_groups"), quant.get("ignore", []), quant.get("kv_cache_scheme")
    if not isinstance(groups, dict) or not is_names(ignore) or not isinstance(kv, dict | None):
        return None
    read = [_read_group(group) for group in groups.values() if not is_attention_group(group)]
    known = tuple(group for group in read if group is not None)
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
    """Which format the `weights` of a config group describe; None when none that is known here."""
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
        yield "weights of FP8 (tensor, channel, block), NVFP4, MXFP4 or MXFP8", _told(weights)
    if weights.get("symmetric", True) is not True:
        yield "symmetric weights", "symmetric: false"
    if weights.get("dynamic", False) is not False:
        yield "static weights", f"dynamic: {clip(weights['dynamic'])}"
    if weights.get("strategy") == _BLOCK and not is_block(weights.get("block_structure")):
        yield "block_structure [rows, columns]", clip(repr(weights.get("block_structure")))
    if inputs is not None and format is not None:
        yield from {
            "FP8": _unsupported_fp8_inputs,
            "NVFP4": _unsupported_nvfp4_inputs,
            "MXFP4": _unsupported_mx_inputs,
            "MXFP8": _unsupported_mx_inputs,
        }[format.name](inputs, weights.get("strategy"))


def _told(args: dict[str, Any]) -> str:
    shown = (args.get("type", "int"), args.get("num_bits", 8), args.get("strategy") or _TENSOR, args.get("group_size"))
    return clip("{} {} bits, strategy {}, group_size {}".format(*shown))


def _unsupported_fp8_inputs(inputs: dict[str, Any], weight_strategy: Any) -> Iterator[tuple[str, str]]:
    if (inputs.get("type", "int"), inputs.get("num_bits", 8)) != ("float", 8):
        yield "input activations of type float with num_bits 8", _told(inputs)
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
        yield "NVFP4 inputs beside NVFP4 weights, or none", _told(inputs)


def _unsupported_mx_inputs(inputs: dict[str, Any], _: Any) -> Iterator[tuple[str, str]]:
    if not inputs.get("dynamic", False):
        yield "dynamic inputs", "static inputs"
    if inputs.get("type", "int") != "float":
        yield "float inputs", _told(inputs)


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
