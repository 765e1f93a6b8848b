"""config.json: does it parse, does vLLM support what it says, do its lists mean what they seem to (checks C1 to C9).

In: a Subject. What the config means is read in `scheme.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fp8pipe.model.untrusted import clip
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.layout import expert_of, layer_of, split_name
from fp8pipe.validate.scheme import (
    FORMAT_NAMES,
    KNOWN_ELSEWHERE,
    METHODS,
    MIXED,
    MODELOPT_ALGORITHMS,
    Spec,
    format_of,
    fused_names,
    ignored_layers,
    is_attention_group,
    is_block,
    is_names,
    method_of,
    modelopt_algorithm,
    modelopt_excluded,
    modelopt_settings,
    text_config,
    unsupported,
)

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

CONFIG = "config.json"
SPELLINGS = (*METHODS, "modelopt_fp4", "modelopt_mxfp8", "compressed_tensors")
HF_QUANT_CONFIG = "hf_quant_config.json"
FORMATS = tuple(name for names in FORMAT_NAMES.values() for name in names)


def _quant(subject: Subject) -> dict[str, Any]:
    return subject.quantization or {}


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
        "text_config.quantization_config": text_config(config).get("quantization_config"),
        "compression_config": config.get("compression_config"),
    }
    given = [name for name, value in places.items() if value is not None]
    if not given and subject.quantization is not None:
        given, places = [HF_QUANT_CONFIG], {HF_QUANT_CONFIG: subject.quantization}
    if len(given) != 1:
        yield Fault("one quantization_config", " and ".join(given) or "none", file=CONFIG)
    elif not isinstance(places[given[0]], dict):
        yield Fault("quantization_config as a mapping", clip(repr(places[given[0]])), file=CONFIG)
    elif method_of(_quant(subject)) not in METHODS:
        yield _unknown_method(_quant(subject).get("quant_method"))
    elif (name := _quant(subject).get("quant_method")) not in SPELLINGS:
        told = "vLLM takes it for its lower case; transformers does not know it"
        yield Fault(" or ".join(SPELLINGS), clip(repr(name)), file=CONFIG, consequence=told)


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
def config_fits_vllm(subject: Subject) -> Iterator[Fault]:
    quant = _quant(subject)
    problems = {
        "fp8": _fp8_problems,
        "compressed-tensors": _compressed_problems,
        "modelopt": _modelopt_problems,
    }.get(method_of(quant))
    file = subject.quantization_file
    for expected, found in problems(quant) if problems is not None else ():
        yield Fault(expected, clip(found), file=file)
    for key in _unknown_keys(quant):
        told = "none: no reader looks at it, so a misspelt key has no effect"
        yield Fault("keys that readers know", clip(repr(key)), file=file, severity="warning", consequence=told)


def _fp8_problems(quant: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if quant.get("activation_scheme") not in ("static", "dynamic"):
        yield "activation_scheme static or dynamic", repr(quant.get("activation_scheme"))
    if ignored_layers(quant) is None:
        yield "ignored_layers as a list of names", repr(quant.get("ignored_layers"))
    block = quant.get("weight_block_size")
    if block is not None and not is_block(block):
        yield "weight_block_size [rows, columns]", repr(block)


def _modelopt_problems(quant: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if modelopt_excluded(quant) is None:
        yield "ignore (exclude_modules) as a list of names", repr(modelopt_settings(quant).get("exclude_modules"))
    if not modelopt_algorithm(quant):
        yield "a quant_algo", "none"


def _compressed_problems(quant: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    if not is_names(quant.get("ignore", [])):
        yield "ignore as a list of names (absent is fine, null is not)", repr(quant["ignore"])
    groups = quant.get("config_groups")
    if isinstance(groups, dict) and not groups:
        yield "at least one config group", "none"
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if not isinstance(group, dict):
            yield f"config group {clip(name)} as a mapping", repr(group)
        elif quant.get("format") == MIXED and group.get("format") not in FORMATS:
            yield f"a format of floats in config group {clip(name)}", repr(group.get("format"))
    if isinstance(quant.get("format"), str | None) and quant.get("format") in (None, "dense"):
        yield f"format {', '.join(FORMATS)}", repr(quant.get("format"))
    if isinstance(transforms := quant.get("transform_config"), dict) and transforms:
        yield (
            "an empty transform_config: vLLM runs transforms without checking that their tensors are there",
            transforms,
        )
    if isinstance(sparsity := quant.get("sparsity_config"), dict) and sparsity.get("targets"):
        yield "no sparsity targets", repr(sparsity["targets"])


KEYS = {
    "compressed-tensors": (
        "quant_method", "format", "quantization_status", "version", "global_compression_ratio", "config_groups",
        "ignore", "kv_cache_scheme", "sparsity_config", "transform_config", "run_compressed",
    ),
    "fp8": (
        "quant_method", "activation_scheme", "ignored_layers", "modules_to_not_convert", "weight_block_size", "fmt",
        "scale_fmt", "store_dtype", "kv_cache_scheme", "weight_per_tensor", "act_per_tensor", "dequantize",
    ),
}  # fmt: skip
"""Keys that some reader or writer knows."""


def _unknown_keys(quant: dict[str, Any]) -> list[str]:
    known = KEYS.get(method_of(quant))
    return [] if known is None else sorted(key for key in quant if key not in known)


@check(
    "C3",
    "compressed-tensors' own parser accepts quantization_config.",
    depth="values",  # that parser takes seconds
    needs=("config",),
    consequence="vLLM and transformers stop with a ValidationError",
    remedy="remove or correct the key",
)
def config_fits_compressed_tensors(subject: Subject) -> Iterator[Fault]:
    quant = _quant(subject)
    if method_of(quant) != "compressed-tensors":
        return
    from fp8pipe.oracle.compressed_tensors import problems

    known = {key: value for key, value in quant.items() if key not in {"sparsity_config", "transform_config"}}
    known["ignore"] = known["ignore"] if is_names(known.get("ignore")) else []  # C2 speaks of it
    for expected, found in problems(known | {"quant_method": "compressed-tensors"}):
        yield Fault(expected, found, file=CONFIG)


@check(
    "C4",
    "The scheme is one that vLLM serves and this validator knows.",
    needs=("config",),
    consequence="vLLM stops: no compressed-tensors compatible scheme was found",
    remedy="quantize to FP8 (tensor, channel, block), NVFP4, MXFP4 or MXFP8",
)
def scheme_is_supported(subject: Subject) -> Iterator[Fault]:
    quant, file = _quant(subject), subject.quantization_file
    problems = {"fp8": _unserved_fp8, "compressed-tensors": _unserved_compressed, "modelopt": _unserved_modelopt}
    serve = problems.get(method_of(quant))
    if serve is not None:
        yield from (Fault(expected, found, file=file) for expected, found in serve(quant))


def _unserved_fp8(quant: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if quant.get("weight_block_size") and quant.get("activation_scheme") == "static":
        yield "dynamic activations with weight_block_size", "static"


def _unserved_modelopt(quant: dict[str, Any]) -> Iterator[tuple[str, str]]:
    algorithm = modelopt_algorithm(quant)
    if algorithm and algorithm not in MODELOPT_ALGORITHMS:
        yield f"quant_algo {', '.join(MODELOPT_ALGORITHMS)}", clip(algorithm)
    if "NVFP4" in algorithm and modelopt_settings(quant).get("group_size") not in (None, 16):
        yield "group_size 16", clip(modelopt_settings(quant).get("group_size"))


def _unserved_compressed(quant: dict[str, Any]) -> Iterator[tuple[str, str]]:
    if (name := quant.get("format")) not in (*FORMATS, MIXED, None, "dense"):
        yield f"format {', '.join(FORMATS)} or {MIXED}", clip(repr(name))
    groups = quant.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and not is_attention_group(group) and is_names(group.get("targets")):
            yield from unsupported(group)
            yield from _other_format(group, quant.get("format"))
    if isinstance(kv := quant.get("kv_cache_scheme"), dict):
        yield from _unsupported_kv(kv)


def _other_format(group: dict[str, Any], default: Any) -> Iterator[tuple[str, str]]:
    """The name of a format that is not the one its own arguments describe."""
    weights = group.get("weights")
    known = format_of(weights) if isinstance(weights, dict) else None
    name = group.get("format") or default
    if known is not None and name in FORMATS and name not in FORMAT_NAMES[known.name]:
        yield f"format {' or '.join(FORMAT_NAMES[known.name])} for {known.name} weights", clip(repr(name))


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
    assert subject.scheme is not None
    file = subject.quantization_file
    if subject.scheme.method == "modelopt":
        return  # wildcards of names that the exporter knew; those that match nothing are usual
    for entry in subject.scheme.ignore:
        is_pattern = entry.startswith("re:")
        if is_pattern and subject.scheme.method == "fp8":
            yield Fault("a full module name: quant_method fp8 knows no patterns", clip(entry), file=file)
        elif reason := subject.scheme.patterns.refused.get(entry):
            yield Fault(
                "a regular expression", clip(f"{entry}: {reason}"), file=file, consequence="vLLM stops or hangs"
            )
    yield from _unmatched(subject)
    if subject.scheme.method == "compressed-tensors":
        yield from _caught_by_prefix(subject)


def _unmatched(subject: Subject) -> Iterator[Fault]:
    """Entries that match no module; lm_head always counts as matched."""
    assert subject.scheme is not None and subject.layout is not None
    modules, patterns = subject.layout.modules, subject.scheme.patterns
    matched = {entry for module in modules for entry in patterns.matching(module)} | patterns.refused.keys()
    known = {*modules, *(fused for module in modules for fused in fused_names(module))}  # vLLM looks for both
    kin = set() if subject.layout.from_record else {(layer_of(f"{m}."), split_name(m)[1]) for m in modules}
    for entry in subject.scheme.ignore:
        is_readable = not entry.startswith("re:") or subject.scheme.method != "fp8"
        if (layer_of(f"{entry}."), split_name(entry)[1]) in kin:
            continue  # transformers' name of a module of that layer, perhaps
        if is_readable and entry not in known and entry not in matched and not entry.endswith("lm_head"):
            found = clip(entry)
            yield Fault("an entry that matches a module", found, file=subject.quantization_file, severity="warning")


def _caught_by_prefix(subject: Subject) -> Iterator[Fault]:
    """`re:.*mlp.gate` also ignores mlp.gate_proj, since patterns are anchored at the start alone."""
    assert subject.scheme is not None and subject.layout is not None
    whole: set[str] = set()
    inside: dict[str, str] = {}
    for module in subject.layout.modules:
        for entry, end in subject.scheme.patterns.matching(module).items():
            if end == len(module):
                whole.add(entry)
            elif module in subject.layout.is_quantizable and module[end] != ".":
                inside[entry] = min(module, inside.get(entry, module))
    for entry in subject.scheme.ignore:
        if entry in whole and entry in inside:
            found, file = f"{clip(entry)} also catches {inside[entry]}", subject.quantization_file
            yield Fault("a pattern anchored at its end", found, file=file, severity="warning")


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
        specs = {member: subject.specs.get(member) for member in group}
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
        spec = subject.specs.get(module)
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
    given = [
        c[key] for c in (config, text_config(config)) for key in ("dtype", "torch_dtype") if c.get(key) is not None
    ]
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
    if subject.scheme.method == "modelopt":
        yield Fault("a layout that transformers reads", "quant_method modelopt", file=subject.quantization_file)
    elif subject.scheme.method == "fp8" and subject.scheme.groups[0].spec.strategy == "tensor":
        yield Fault("a layout that transformers reads", "quant_method fp8 with per-tensor scales", file=CONFIG)
