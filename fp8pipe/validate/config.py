"""config.json: does it parse, what does its quantization_config mean, does vLLM support it (checks C1 to C9).

In: the parsed JSON. Out: a `Scheme` that answers, for any module, how its weight must be stored; and the C checks.
Values are looked up in tuples, not in sets: what should be a string may be a list, which has no hash.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

from fp8pipe.validate.findings import Fault, check, clip
from fp8pipe.validate.layout import expert_of

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

CONFIG = "config.json"
METHODS = ("compressed-tensors", "fp8")
KNOWN_ELSEWHERE = (
    "awq", "gptq", "bitsandbytes", "modelopt", "modelopt_fp4", "mxfp4", "mxfp8", "fp_quant", "fbgemm_fp8", "quark",
)  # fmt: skip
"""Methods that vLLM loads and this validator does not know yet; said, never passed."""
FLOAT_FORMATS = ("float-quantized", "naive-quantized", "mixed-precision")

_TENSOR, _CHANNEL, _BLOCK = "tensor", "channel", "block"


# ---------------------------------------------------------------------------------------------- the scheme


@dataclass(frozen=True, slots=True)
class Spec:
    """How one group of modules is stored."""

    strategy: Literal["tensor", "channel", "block"]
    block: tuple[int, int] | None
    """Rows and columns that share a scale, for the block strategy."""
    inputs: Literal["static", "dynamic"] | None
    """None: weight-only."""
    scale: str
    """Leaf name of the scale: weight_scale, or weight_scale_inv in the block form of quant_method fp8."""
    minmax: bool
    """The config names an observer that scales by the absolute maximum (or names none)."""

    def scale_shapes(self, weight: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Shapes that vLLM accepts for the scale of a weight [out, in]."""
        rows, columns = weight[0], weight[1]
        if self.strategy == _TENSOR:
            return ((1,), ())
        if self.strategy == _CHANNEL:
            return ((rows, 1),)
        assert self.block is not None
        return ((-(-rows // self.block[0]), -(-columns // self.block[1])),)


@dataclass(frozen=True)
class Group:
    """One config group: which modules, and how."""

    targets: tuple[str, ...]
    spec: Spec


@dataclass(frozen=True)
class Scheme:
    """A quantization_config that is understood."""

    method: Literal["compressed-tensors", "fp8"]
    groups: tuple[Group, ...]
    ignore: tuple[str, ...]
    kv: Literal["tensor", "attn_head"] | None

    def spec_of(self, module: str) -> Spec | None:
        """How the weight of a Linear (or expert) `module` is stored; None when it stays as it was."""
        if self.ignores(module):
            return None
        for group in self.groups:
            if any(target == "Linear" or _matches(target, module) for target in group.targets):
                return group.spec
        return None

    def ignores(self, module: str) -> bool:
        """Whether `module` is in the ignore list, as the method reads it: `re:` only in compressed-tensors."""
        if self.method == "fp8":
            place = expert_of(module)
            return module in self._exact_names or (place is not None and place[0] in self._experts)
        return module in self._exact_names or any(p.match(module) for p in self._patterns)

    def names_head(self, module: str) -> bool:
        """Whether a target other than a class names `module`: the only way that lm_head is quantized."""
        targets = (target for group in self.groups for target in group.targets)
        return any(target != "Linear" and _matches(target, module) for target in targets)

    @cached_property
    def _exact_names(self) -> frozenset[str]:
        return frozenset(self.ignore)

    @cached_property
    def _experts(self) -> frozenset[str]:
        """Experts that quant_method fp8 leaves unquantized: any name in them keeps the whole layer's."""
        found = (re.match(r"(.*\.experts)(\.|$)", name) for name in self.ignore)
        return frozenset(match[1] for match in found if match)

    @cached_property
    def _patterns(self) -> tuple[re.Pattern[str], ...]:
        return tuple(p for entry in self.ignore if entry.startswith("re:") if (p := _compiled(entry)))


def _compiled(entry: str) -> re.Pattern[str] | None:
    """The pattern of an `re:` entry, None when it does not compile (C5 says so)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return re.compile(entry.removeprefix("re:"))
        except (re.error, RecursionError, OverflowError):
            return None


def _matches(entry: str, module: str) -> bool:
    if not entry.startswith("re:"):
        return entry == module
    pattern = _compiled(entry)
    return pattern is not None and pattern.match(module) is not None


def quantization_config(config: dict[str, Any]) -> dict[str, Any] | None:
    """The one that vLLM reads: at the top, else in text_config, else compression_config."""
    places = [config.get("quantization_config"), _text(config).get("quantization_config")]
    found = [place for place in [*places, config.get("compression_config")] if place is not None]
    return found[0] if found and isinstance(found[0], dict) else None


def _text(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else {}


def method_of(quant: dict[str, Any]) -> str:
    """quant_method as vLLM normalises it."""
    return str(quant.get("quant_method", "")).lower().replace("compressed_tensors", "compressed-tensors")


def read_scheme(config: dict[str, Any]) -> Scheme | None:
    """What quantization_config means, None when it is absent, broken or not understood."""
    quant = quantization_config(config)
    if quant is None:
        return None
    return {"fp8": _read_fp8, "compressed-tensors": _read_compressed}.get(method_of(quant), lambda _: None)(quant)


def _read_fp8(quant: dict[str, Any]) -> Scheme | None:
    block, ignored = quant.get("weight_block_size"), _ignored_layers(quant)
    if quant.get("activation_scheme") not in ("static", "dynamic") or ignored is None or not _block_or_none(block):
        return None
    if block and quant["activation_scheme"] == "static":
        return None
    spec = Spec(
        strategy=_BLOCK if block else _TENSOR,
        block=(block[0], block[1]) if block else None,
        inputs=quant["activation_scheme"],
        scale="weight_scale_inv" if block else "weight_scale",
        minmax=True,
    )
    return Scheme("fp8", (Group(("Linear",), spec),), ignored, None)


def _ignored_layers(quant: dict[str, Any]) -> tuple[str, ...] | None:
    ignored = quant.get("ignored_layers") or quant.get("modules_to_not_convert") or []
    return tuple(ignored) if _is_names(ignored) else None


def _block_or_none(value: Any) -> bool:
    return value is None or (
        isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)
    )


def _is_names(value: Any) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _read_compressed(quant: dict[str, Any]) -> Scheme | None:
    groups, ignore, kv = quant.get("config_groups"), quant.get("ignore", []), quant.get("kv_cache_scheme")
    if not isinstance(groups, dict) or not _is_names(ignore) or not isinstance(kv, dict | None):
        return None
    read = [_read_group(group) for group in groups.values() if not _is_attention_group(group)]
    if not read or None in read:
        return None
    kv_strategy = None if kv is None else kv.get("strategy") or "tensor"
    if kv_strategy not in (None, "tensor", "attn_head"):
        return None
    return Scheme("compressed-tensors", tuple(g for g in read if g), tuple(ignore), kv_strategy)


def _is_attention_group(group: Any) -> bool:
    """A group that quantizes attention alone; vLLM skips it, its scales are the KV cache's."""
    targets = group.get("targets") if isinstance(group, dict) else None
    return _is_names(targets) and len(targets) == 1 and targets[0].endswith("Attention")


def _read_group(group: Any) -> Group | None:
    targets = group.get("targets") if isinstance(group, dict) else None
    if not _is_names(targets) or any(_unsupported(group)):
        return None
    weights, inputs = group["weights"], group.get("input_activations")
    strategy = weights.get("strategy") or _TENSOR
    block = weights.get("block_structure")
    spec = Spec(
        strategy=strategy,
        block=(block[0], block[1]) if strategy == _BLOCK else None,
        inputs=None if inputs is None else "dynamic" if inputs.get("dynamic") else "static",
        scale="weight_scale",
        minmax=weights.get("observer") in (None, "minmax", "memoryless_minmax"),
    )
    return Group(tuple(targets), spec)


def _unsupported(group: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(expected, found) for everything in a group that vLLM's FP8 schemes do not serve."""
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, dict) or not isinstance(inputs, dict | None):
        yield "weights (and input_activations) as mappings", f"{clip(repr(weights))}"
        return
    kind = (weights.get("type", "int"), weights.get("num_bits", 8))
    if kind != ("float", 8):
        yield "weights of type float with num_bits 8", f"{clip(kind[0])}, {clip(kind[1])}"
    if weights.get("symmetric", True) is not True:
        yield "symmetric weights", "symmetric: false"
    if weights.get("dynamic", False) is not False:
        yield "static weights", f"dynamic: {clip(weights['dynamic'])}"
    strategy = weights.get("strategy") or _TENSOR
    if strategy not in (_TENSOR, _CHANNEL, _BLOCK) or weights.get("group_size") is not None:
        yield (
            "weight strategy tensor, channel or block",
            f"{clip(strategy)}, group_size {clip(weights.get('group_size'))}",
        )
    if strategy == _BLOCK and (
        weights.get("block_structure") is None or not _block_or_none(weights["block_structure"])
    ):
        yield "block_structure [rows, columns]", clip(repr(weights.get("block_structure")))
    if inputs is not None:
        yield from _unsupported_inputs(inputs, strategy)


def _unsupported_inputs(inputs: dict[str, Any], weight_strategy: Any) -> Iterator[tuple[str, str]]:
    kind = (inputs.get("type", "int"), inputs.get("num_bits", 8))
    if kind != ("float", 8):
        yield "input activations of type float with num_bits 8", f"{clip(kind[0])}, {clip(kind[1])}"
    if inputs.get("dynamic", False):
        return
    if inputs.get("symmetric", True) is not True:
        yield "symmetric static inputs", "symmetric: false"
    if (inputs.get("strategy") or _TENSOR) != _TENSOR:
        yield "static inputs per tensor", clip(inputs.get("strategy"))
    if weight_strategy == _BLOCK:
        yield "dynamic inputs with block weights", "static inputs"


# ---------------------------------------------------------------------------------------------- checks


def _quant(subject: Subject) -> dict[str, Any]:
    assert subject.config is not None
    return quantization_config(subject.config) or {}


@check(
    "C1",
    "config.json parses and holds one quantization_config with a quant_method that is known.",
    consequence="vLLM stops; without quant_method it takes the model for unquantized and stops at the first scale",
    remedy="copy config.json from the source and add the quantization_config alone",
)
def config_is_one_quantization(subject: Subject) -> Iterator[Fault]:
    if subject.config is None or subject.config_problem:
        yield Fault("a JSON object", subject.config_problem or "not an object", file=CONFIG)
    if subject.config is None:
        return
    config = subject.config
    places = {
        "quantization_config": config.get("quantization_config"),
        "text_config.quantization_config": _text(config).get("quantization_config"),
        "compression_config": config.get("compression_config"),
    }
    given = [name for name, value in places.items() if value is not None]
    if len(given) != 1:
        yield Fault("one quantization_config", " and ".join(given) or "none", file=CONFIG)
    elif not isinstance(places[given[0]], dict):
        yield Fault("quantization_config as a mapping", clip(repr(places[given[0]])), file=CONFIG)
    elif method_of(_quant(subject)) not in METHODS:
        yield _unknown_method(_quant(subject).get("quant_method"))


def _unknown_method(name: Any) -> Fault:
    if name in KNOWN_ELSEWHERE:
        return Fault(
            f"quant_method {' or '.join(METHODS)}",
            clip(repr(name)),
            file=CONFIG,
            consequence="vLLM knows this method; this validator does not, so nothing about the weights is proven",
            remedy="do not take this report for a proof",
        )
    return Fault(f"quant_method {' or '.join(METHODS)}", clip(repr(name)), file=CONFIG)


@check(
    "C2",
    "quantization_config has what vLLM's own reader demands.",
    needs=("config",),
    consequence="vLLM stops while it reads the config, with a bare KeyError, TypeError or NotImplementedError",
    remedy="correct the key",
)
def config_fits_vllm(subject: Subject) -> Iterable[Fault]:
    quant = _quant(subject)
    problems = {"fp8": _fp8_problems, "compressed-tensors": _compressed_problems}.get(method_of(quant))
    if problems is None:
        return []
    return [Fault(expected, clip(found), file=CONFIG) for expected, found in problems(quant)]


def _fp8_problems(quant: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if quant.get("activation_scheme") not in ("static", "dynamic"):
        yield "activation_scheme static or dynamic", repr(quant.get("activation_scheme"))
    if _ignored_layers(quant) is None:
        yield "ignored_layers as a list of names", repr(quant.get("ignored_layers"))
    if not _block_or_none(quant.get("weight_block_size")):
        yield "weight_block_size [rows, columns]", repr(quant.get("weight_block_size"))


def _compressed_problems(quant: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if not _is_names(quant.get("ignore", [])):
        yield "ignore as a list of names (absent is fine, null is not)", repr(quant["ignore"])
    groups = quant.get("config_groups")
    if isinstance(groups, dict) and not groups:
        yield "at least one config group", "none"
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            yield f"config group {clip(name)} as a mapping", repr(group)
        elif quant.get("format") == "mixed-precision" and group.get("format") not in FLOAT_FORMATS[:2]:
            yield f"a float format in config group {clip(name)}", repr(group.get("format"))
    if isinstance(quant.get("format"), str | None) and quant.get("format") in (None, "dense"):
        yield "format float-quantized", repr(quant.get("format"))
    if isinstance(transforms := quant.get("transform_config"), dict) and transforms:
        yield (
            "an empty transform_config: vLLM runs transforms without checking that their tensors are there",
            transforms,
        )
    if isinstance(sparsity := quant.get("sparsity_config"), dict) and sparsity.get("targets"):
        yield "no sparsity targets", repr(sparsity["targets"])


@check(
    "C3",
    "compressed-tensors' own parser accepts quantization_config.",
    depth="values",  # importing that parser takes seconds
    needs=("config",),
    consequence="vLLM and transformers stop with a ValidationError",
    remedy="remove or correct the key",
)
def config_fits_compressed_tensors(subject: Subject) -> Iterator[Fault]:
    quant = _quant(subject)
    if method_of(quant) != "compressed-tensors":
        return
    from compressed_tensors.quantization import QuantizationConfig
    from pydantic import ValidationError

    known = {key: value for key, value in quant.items() if key not in {"sparsity_config", "transform_config"}}
    known["ignore"] = known["ignore"] if _is_names(known.get("ignore")) else []  # C2 speaks of it
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            QuantizationConfig.model_validate(known | {"quant_method": "compressed-tensors"})
    except ValidationError as error:
        for problem in error.errors():
            where = ".".join(map(str, problem["loc"]))
            yield Fault(f"{where}: {clip(problem['msg'])}", clip(repr(problem["input"])), file=CONFIG)
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        # its validators raise whatever they stumble on
        yield Fault("a config that compressed-tensors parses", clip(repr(error)), file=CONFIG)


@check(
    "C4",
    "The scheme is one that vLLM serves and this validator knows.",
    needs=("config",),
    consequence="vLLM stops: no compressed-tensors compatible scheme was found",
    remedy="quantize to FP8 per tensor, channel or block",
)
def scheme_is_supported(subject: Subject) -> Iterator[Fault]:
    quant = _quant(subject)
    if method_of(quant) == "fp8" and quant.get("weight_block_size") and quant.get("activation_scheme") == "static":
        yield Fault("dynamic activations with weight_block_size", "static", file=CONFIG)
    if method_of(quant) != "compressed-tensors":
        return
    if (name := quant.get("format")) not in (*FLOAT_FORMATS, None, "dense"):
        yield Fault(f"format {', '.join(FLOAT_FORMATS)}", clip(repr(name)), file=CONFIG)
    groups = quant.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and not _is_attention_group(group) and _is_names(group.get("targets")):
            yield from (Fault(expected, found, file=CONFIG) for expected, found in _unsupported(group))
    if isinstance(kv := quant.get("kv_cache_scheme"), dict):
        yield from (Fault(expected, found, file=CONFIG) for expected, found in _unsupported_kv(kv))


def _unsupported_kv(kv: dict[str, Any]) -> Iterator[tuple[str, str]]:
    kind = (kv.get("type", "int"), kv.get("num_bits", 8))
    if kind != ("float", 8):
        yield "a KV cache of type float with num_bits 8", f"{clip(kind[0])}, {clip(kind[1])}"
    if kv.get("symmetric", True) is not True:
        yield "a symmetric KV cache", "symmetric: false"
    if kv.get("dynamic", False) is not False:
        yield "a static KV cache scheme", f"dynamic: {clip(kv['dynamic'])}"
    if (kv.get("strategy") or "tensor") not in ("tensor", "attn_head"):
        yield "KV strategy tensor or attn_head", clip(kv.get("strategy"))


@check(
    "C5",
    "Every ignore entry compiles, is read as meant, and matches something.",
    needs=("scheme",),
    consequence="vLLM ignores nothing by it, and quantizes what was meant to stay",
    remedy="write full module names for quant_method fp8, end-anchored patterns (re:.*mlp\\.gate$) otherwise",
)
def ignore_entries_work(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None and subject.layout is not None
    modules = subject.layout.modules
    for entry in subject.scheme.ignore:
        pattern = _compiled(entry)
        if subject.scheme.method == "fp8" and entry.startswith("re:"):
            yield Fault("a full module name: quant_method fp8 knows no patterns", clip(entry), file=CONFIG)
        elif entry.startswith("re:") and pattern is None:
            yield Fault("a regular expression", clip(entry), file=CONFIG, consequence="vLLM stops on it")
        elif not entry.endswith("lm_head") and not any(_matches(entry, module) for module in modules):
            yield Fault("an entry that matches a module", clip(entry), file=CONFIG, severity="warning")
        elif pattern is not None and entry.startswith("re:"):
            yield from _caught_by_prefix(entry, pattern, subject)


def _caught_by_prefix(entry: str, pattern: re.Pattern[str], subject: Subject) -> Iterator[Fault]:
    """`re:.*mlp.gate` also ignores mlp.gate_proj, since patterns are anchored at the start alone."""
    assert subject.layout is not None
    linears = [name for name in subject.layout.quantizable if pattern.match(name) and not pattern.fullmatch(name)]
    stops_inside_a_word = [name for name in linears if (m := pattern.match(name)) and name[m.end()] not in "."]
    if stops_inside_a_word and any(pattern.fullmatch(name) for name in subject.layout.modules):
        found = f"{clip(entry)} also catches {stops_inside_a_word[0]}"
        yield Fault("a pattern anchored at its end", found, file=CONFIG, severity="warning")


@check(
    "C6",
    "Projections that vLLM fuses are ignored together or not at all.",
    needs=("scheme",),
    consequence="vLLM stops: all shards of a fused layer must have the same scheme",
    remedy="ignore all of the group, or none",
)
def fused_groups_are_uniform(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None and subject.layout is not None
    for group in subject.layout.fused:
        specs = {member: subject.scheme.spec_of(member) for member in group}
        if len(set(specs.values())) > 1:
            kept = [member for member, spec in specs.items() if spec is None]
            found = f"{', '.join(kept)} ignored" if kept else "different schemes"
            yield Fault(f"one scheme for {', '.join(group)}", found, file=CONFIG)
    yield from _mixed_experts(subject)


def _mixed_experts(subject: Subject) -> Iterator[Fault]:
    """vLLM reads the scheme of a layer's experts off expert 0 alone."""
    assert subject.scheme is not None and subject.layout is not None
    first: dict[str, tuple[str, Spec | None]] = {}
    for module in subject.layout.quantizable:
        if (place := expert_of(module)) is None:
            continue
        spec = subject.scheme.spec_of(module)
        other, known = first.setdefault(place[0], (module, spec))
        if spec != known:
            found = f"{other} and {module} differ"
            yield Fault(f"one scheme for all of {place[0]}", found, file=CONFIG, consequence=_EXPERTS_LIKE_FIRST)


_EXPERTS_LIKE_FIRST = "vLLM loads all experts of the layer like expert 0, without a word"


@check(
    "C7",
    "config.json equals the source's in everything but quantization_config.",
    needs=("config", "source"),
    consequence="vLLM builds another model than the one that was quantized",
    remedy="copy config.json from the source and add the quantization_config alone",
)
def config_equals_source(subject: Subject) -> Iterator[Fault]:
    assert subject.config is not None
    if subject.source_config is None:
        return
    ours, theirs = _comparable(subject.config), _comparable(subject.source_config)
    for key in sorted(ours.keys() | theirs.keys()):
        if key not in ours:
            yield Fault(f"{clip(key)} = {clip(repr(theirs[key]))}", "absent", file=CONFIG)
        elif key not in theirs:
            yield Fault(f"no {clip(key)}", clip(repr(ours[key])), file=CONFIG, severity="warning")
        elif ours[key] != theirs[key] or type(ours[key]) is not type(theirs[key]):
            yield Fault(f"{clip(key)} = {clip(repr(theirs[key]))}", clip(repr(ours[key])), file=CONFIG)


_LINEAGE = {"quantization_config", "compression_config", "_name_or_path", "transformers_version"}


def _comparable(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flat view without what may differ; dtype under its present name."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _LINEAGE:
            continue
        name = prefix + ("dtype" if key == "torch_dtype" else key)
        if isinstance(value, dict) and len(prefix) < 200:
            flat |= _comparable(value, f"{name}.")
        else:
            flat[name] = value
    return flat


@check(
    "C8",
    "The model's dtype is bfloat16 or float16.",
    needs=("config",),
    consequence="vLLM stops: the dtype is not supported for FP8",
    remedy="set dtype to bfloat16",
)
def dtype_is_half(subject: Subject) -> Iterator[Fault]:
    assert subject.config is not None
    config = subject.config
    given = [c[key] for c in (config, _text(config)) for key in ("dtype", "torch_dtype") if c.get(key) is not None]
    if not given or given[0] in ("bfloat16", "float16"):
        return
    if given[0] == "float32":
        yield Fault(
            "bfloat16 or float16", "float32", file=CONFIG, severity="warning", consequence="vLLM runs it in bfloat16"
        )
    else:
        yield Fault("bfloat16 or float16", clip(repr(given[0])), file=CONFIG)


@check(
    "C9",
    "transformers can load the checkpoint too.",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM loads it; transformers 5 leaves the weights unscaled without an error",
    remedy="use checkpoint_format compressed-tensors, or the block form of quant_method fp8",
)
def transformers_can_load_it(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    if subject.scheme.method == "fp8" and subject.scheme.groups[0].spec.strategy == _TENSOR:
        yield Fault("a layout that transformers reads", "quant_method fp8 with per-tensor scales", file=CONFIG)
