"""C1 to C10: config.json. Does it parse, does vLLM support what it says, do its lists mean what they seem to?"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fp8pipe.model.fp8_source import as_block
from fp8pipe.model.predictor import renumbered
from fp8pipe.model.untrusted import clip
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.config import (
    CONFIG,
    HF_QUANT_CONFIG,
    MODELOPT_ALGORITHMS,
    format_of,
    ignored_layers,
    is_attention_group,
    is_names,
    method_of,
    modelopt_algorithm,
    modelopt_excluded,
    modelopt_settings,
    text_config,
    unsupported,
)
from fp8pipe.validate.meaning.formats import FORMAT_NAMES, MIXED, Spec
from fp8pipe.validate.meaning.names import expert_of, layer_of, split_name
from fp8pipe.validate.meaning.scheme import METHODS, names_in_vllm
from fp8pipe.validate.subject import Subject

SPELLINGS = (*METHODS, "modelopt_fp4", "modelopt_mxfp8", "compressed_tensors")
KNOWN_ELSEWHERE = (
    "awq", "gptq", "bitsandbytes", "mxfp4", "mxfp8", "fp_quant", "fbgemm_fp8", "quark", "torchao",
)  # fmt: skip
"""Methods that vLLM loads and this validator does not know: reported, never passed."""
FORMATS = tuple(name for names in FORMAT_NAMES.values() for name in names)
KEYS = {
    "compressed-tensors": (
        "quant_method", "format", "quantization_status", "version", "global_compression_ratio", "config_groups",
        "ignore", "kv_cache_scheme", "sparsity_config", "transform_config", "run_compressed", "scale_fmt",
    ),
    "fp8": (
        "quant_method", "activation_scheme", "ignored_layers", "modules_to_not_convert", "weight_block_size", "fmt",
        "scale_fmt", "store_dtype", "kv_cache_scheme", "weight_per_tensor", "act_per_tensor", "dequantize",
    ),
}  # fmt: skip
"""Keys of quantization_config that some reader or writer knows."""
_LINEAGE = {"quantization_config", "compression_config", "_name_or_path", "transformers_version"}
"""Keys of config.json that may differ from the source's."""

Problem = tuple[str, str, Any]
"""Key of quantization_config, what is expected there, what is found."""


@check(
    "C1",
    "config.json parses and holds one quantization_config with a quant_method that is known.",
    consequence="vLLM stops; without quant_method it takes the model for unquantized and stops at the first scale",
    remedy="copy config.json from the source and add the quantization_config alone",
)
def config_is_one_quantization(subject: Subject) -> Iterator[Fault]:
    if subject.config_problem:
        yield Fault("a JSON object", subject.config_problem, file=CONFIG)
    if not subject.supplies("config"):
        return
    config = subject.config
    places = {
        "quantization_config": config.get("quantization_config"),
        "text_config.quantization_config": text_config(config).get("quantization_config"),
        "compression_config": config.get("compression_config"),
    }
    given = {name: value for name, value in places.items() if value is not None}
    if not given and subject.quantization:
        given = {HF_QUANT_CONFIG: subject.quantization}
    name = subject.quantization.get("quant_method")
    if len(given) != 1:
        yield Fault("one quantization_config", " and ".join(given) or "none", file=CONFIG)
    elif not isinstance(value := next(iter(given.values())), dict):
        yield Fault("quantization_config as a mapping", clip(repr(value)), file=CONFIG)
    elif method_of(subject.quantization) not in METHODS:
        yield _unknown_method(name)
    elif name not in SPELLINGS:
        consequence = "vLLM reads it in lower case; transformers does not know it"
        yield Fault(" or ".join(SPELLINGS), clip(repr(name)), file=CONFIG, consequence=consequence)


def _unknown_method(name: Any) -> Fault:
    expected, found = f"quant_method {' or '.join(METHODS)}", clip(repr(name))
    if name not in KNOWN_ELSEWHERE:
        return Fault(expected, found, file=CONFIG)
    return Fault(
        expected,
        found,
        file=CONFIG,
        consequence="vLLM knows this method; this validator does not, so nothing about the weights is proven",
        remedy="do not treat this report as proof",
    )


@check(
    "C2",
    "quantization_config has what vLLM's own reader demands.",
    needs=("config",),
    consequence="vLLM stops while it reads the config, with a bare KeyError, TypeError or NotImplementedError",
    remedy="correct the key",
)
def config_fits_vllm(subject: Subject) -> Iterator[Fault]:
    quant, file = subject.quantization, subject.quantization_file
    problems = {"fp8": _fp8_problems, "compressed-tensors": _compressed_problems, "modelopt": _modelopt_problems}
    find = problems.get(method_of(quant))
    for key, expected, found in find(quant) if find is not None else ():
        yield Fault(expected, clip(found), file=file, key=key)
    known = KEYS.get(method_of(quant))
    for key in sorted(key for key in quant if known is not None and key not in known):
        consequence = "none: no reader looks at it, so a misspelt key has no effect"
        yield Fault("keys that readers know", clip(repr(key)), file, severity="warning", consequence=consequence)


def _fp8_problems(quant: dict[str, Any]) -> Iterator[Problem]:
    if quant.get("activation_scheme") not in ("static", "dynamic"):
        yield "activation_scheme", "activation_scheme static or dynamic", repr(quant.get("activation_scheme"))
    if ignored_layers(quant) is None:
        yield "ignored_layers", "ignored_layers as a list of names", repr(quant.get("ignored_layers"))
    block = quant.get("weight_block_size")
    if block is not None and as_block(block) is None:
        yield "weight_block_size", "weight_block_size [rows, columns]", repr(block)


def _modelopt_problems(quant: dict[str, Any]) -> Iterator[Problem]:
    if modelopt_excluded(quant) is None:
        found = repr(modelopt_settings(quant).get("exclude_modules"))
        yield "ignore", "ignore (exclude_modules) as a list of names", found
    if not modelopt_algorithm(quant):
        yield "quant_algo", "a quant_algo", "none"


def _compressed_problems(quant: dict[str, Any]) -> Iterator[Problem]:
    if not is_names(quant.get("ignore", [])):
        yield "ignore", "ignore as a list of names (absent is fine, null is not)", repr(quant["ignore"])
    groups = quant.get("config_groups")
    if isinstance(groups, dict) and not groups:
        yield "config_groups", "at least one config group", "none"
    for name, group in groups.items() if isinstance(groups, dict) else ():
        key = f"config_groups.{name}"
        if not isinstance(group, dict):
            yield key, f"config group {clip(name)} as a mapping", repr(group)
        elif quant.get("format") == MIXED and group.get("format") not in FORMATS:
            yield f"{key}.format", f"a format of floats in config group {clip(name)}", repr(group.get("format"))
    if quant.get("format") in (None, "dense"):
        yield "format", f"format {', '.join(FORMATS)}", repr(quant.get("format"))
    if isinstance(transforms := quant.get("transform_config"), dict) and transforms:
        expected = "an empty transform_config: vLLM runs transforms without checking that their tensors are there"
        yield "transform_config", expected, transforms
    if isinstance(sparsity := quant.get("sparsity_config"), dict) and sparsity.get("targets"):
        yield "sparsity_config", "no sparsity targets", repr(sparsity["targets"])


@check(
    "C3",
    "compressed-tensors' own parser accepts quantization_config.",
    depth="values",  # that parser takes seconds
    needs=("config",),
    consequence="vLLM and transformers stop with a ValidationError",
    remedy="remove or correct the key",
)
def config_fits_compressed_tensors(subject: Subject) -> Iterator[Fault]:
    quant = subject.quantization
    if method_of(quant) != "compressed-tensors":
        return
    from fp8pipe.oracle.compressed_tensors import problems

    # C2 judges these three
    known = {key: value for key, value in quant.items() if key not in {"sparsity_config", "transform_config"}}
    known["ignore"] = known["ignore"] if is_names(known.get("ignore")) else []
    for expected, found in problems(known | {"quant_method": "compressed-tensors"}):
        yield Fault(expected, found, file=CONFIG)


@check(
    "C4",
    "The scheme is one that vLLM serves and this validator knows.",
    needs=("config",),
    yields_to=("C2",),
    consequence="vLLM stops: no compressed-tensors compatible scheme was found",
    remedy="quantize to FP8 (tensor, channel, block), NVFP4, MXFP4 or MXFP8",
)
def scheme_is_supported(subject: Subject) -> Iterator[Fault]:
    quant = subject.quantization
    problems = {"fp8": _unserved_fp8, "compressed-tensors": _unserved_compressed, "modelopt": _unserved_modelopt}
    find = problems.get(method_of(quant))
    for key, expected, found in find(quant) if find is not None else ():
        yield Fault(expected, found, file=subject.quantization_file, key=key)


def _unserved_fp8(quant: dict[str, Any]) -> Iterator[Problem]:
    if quant.get("weight_block_size") and quant.get("activation_scheme") == "static":
        yield "activation_scheme", "dynamic activations with weight_block_size", "static"


def _unserved_modelopt(quant: dict[str, Any]) -> Iterator[Problem]:
    algorithm = modelopt_algorithm(quant)
    if algorithm and algorithm not in MODELOPT_ALGORITHMS:
        yield "quant_algo", f"quant_algo {', '.join(MODELOPT_ALGORITHMS)}", clip(algorithm)
    group_size = modelopt_settings(quant).get("group_size")
    if "NVFP4" in algorithm and group_size not in (None, 16):
        yield "group_size", "group_size 16", clip(group_size)


def _unserved_compressed(quant: dict[str, Any]) -> Iterator[Problem]:
    if (name := quant.get("format")) not in (*FORMATS, MIXED):
        yield "format", f"format {', '.join(FORMATS)} or {MIXED}", clip(repr(name))
    groups = quant.get("config_groups")
    for key, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and not is_attention_group(group) and is_names(group.get("targets")):
            yield from ((f"config_groups.{key}", *problem) for problem in unsupported(group))
            yield from _other_format(f"config_groups.{key}.format", group, quant.get("format"))
    if isinstance(kv := quant.get("kv_cache_scheme"), dict):
        yield from (("kv_cache_scheme", *problem) for problem in _unsupported_kv(kv))


def _other_format(key: str, group: dict[str, Any], default: Any) -> Iterator[Problem]:
    """The name of a format that is not the one its own arguments describe."""
    weights = group.get("weights")
    known = format_of(weights) if isinstance(weights, dict) else None
    name = group.get("format") or default
    if known is not None and name in FORMATS and name not in FORMAT_NAMES[known.name]:
        yield key, f"format {' or '.join(FORMAT_NAMES[known.name])} for {known.name} weights", clip(repr(name))


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
    consequence="the entry has no effect in vLLM, which quantizes what was meant to stay",
    remedy="write full module names for quant_method fp8, end-anchored patterns (re:.*mlp\\.gate$) otherwise",
)
def ignore_entries_work(subject: Subject) -> Iterator[Fault]:
    scheme, file = subject.scheme, subject.quantization_file
    if scheme.method == "modelopt":
        return  # wildcards over names that the exporter knew; some usually match nothing
    for entry in scheme.ignore:
        if entry.startswith("re:") and scheme.method == "fp8":
            yield Fault("a full module name: quant_method fp8 knows no patterns", clip(entry), file=file)
        elif reason := scheme.patterns.refused.get(entry):
            found = f"{clip(entry)}: {reason}"
            yield Fault("a regular expression", found, file=file, consequence="vLLM stops or hangs")
    yield from _unmatched(subject)
    if scheme.method == "compressed-tensors":
        yield from _caught_by_prefix(subject)


def _unmatched(subject: Subject) -> Iterator[Fault]:
    """Entries that match no module; lm_head always counts as matched. Experts in one 3-D tensor count by its name, and
    as vLLM asks for them: by the name of the first of them."""
    experts = {name for name, t in subject.files.tensors.items() if len(t.shape) == 3 and not name.endswith(".weight")}
    experts |= {f"{name}.0" for name in subject.layout.other_names if name.endswith(".experts")}
    scheme, modules = subject.scheme, subject.layout.modules | experts
    modules |= {name.rpartition(".")[0] for name in experts}
    modules |= {renumbered(module, subject.layout.num_layers or 0) for module in modules}
    matched = {
        entry for module in modules for entry in scheme.patterns.matching(module)
    } | scheme.patterns.refused.keys()
    known = {*modules, *(fused for module in modules for fused in names_in_vllm(module))}  # vLLM looks for both
    known.update(_planned_entries(subject))
    kin = set() if subject.layout.from_record else {(layer_of(f"{m}."), split_name(m)[1]) for m in modules}
    for entry in scheme.ignore:
        is_readable = not entry.startswith("re:") or scheme.method != "fp8"
        if (layer_of(f"{entry}."), split_name(entry)[1]) in kin:
            continue  # transformers' name of a module of that layer, perhaps
        if is_readable and entry not in known and entry not in matched and not entry.endswith("lm_head"):
            found = clip(entry)
            yield Fault("an entry that matches a module", found, file=subject.quantization_file, severity="warning")


def _planned_entries(subject: Subject) -> Iterator[str]:
    """The ignore list that our own plan wrote. It names modules as transformers does too, which may be nowhere on
    disk."""
    written = subject.plan.quantization_config if subject.supplies("records") else {}
    for key in ("ignore", "ignored_layers"):
        if is_names(names := written.get(key)):
            yield from names


def _caught_by_prefix(subject: Subject) -> Iterator[Fault]:
    """`re:.*mlp.gate` also ignores mlp.gate_proj, since patterns are anchored at the start alone."""
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
    for group in subject.layout.fused:
        specs = {member: subject.specs.get(member) for member in group}
        if len(set(specs.values())) > 1:
            kept = [member for member, spec in specs.items() if spec is None]
            found = f"{', '.join(kept)} ignored" if kept else "different schemes"
            yield Fault(f"one scheme for {', '.join(group)}", found, file=CONFIG)
    yield from _mixed_experts(subject)


def _mixed_experts(subject: Subject) -> Iterator[Fault]:
    """Experts of a layer that differ from its expert 0, whose scheme vLLM takes for all."""
    first: dict[str, tuple[str, Spec | None]] = {}
    for module in subject.layout.quantizable:
        if (place := expert_of(module)) is None:
            continue
        spec = subject.specs.get(module)
        other, known = first.setdefault(place[0], (module, spec))
        if spec != known:
            yield Fault(
                f"one scheme for all of {place[0]}",
                f"{other} and {module} differ",
                file=CONFIG,
                consequence="vLLM silently loads all experts of the layer like expert 0",
            )


@check(
    "C7",
    "config.json describes the source's model: transformers and vLLM make the same of both.",
    needs=("config",),
    consequence="vLLM builds another model than the one that was quantized",
    remedy="copy config.json from the source and add the quantization_config alone",
)
def config_makes_the_source_s_model(subject: Subject) -> Iterator[Fault]:
    """Nobody is asked about configs that are alike as text, as those of this engine are."""
    theirs = subject.source_config
    if theirs is None or _texts(subject.config) == _texts(theirs):
        return
    from fp8pipe.oracle.configs import compare

    comparison = compare(subject.config, theirs, dtype=subject.source_dtype)
    if not comparison.readers:
        yield from _differing_texts(_texts(subject.config), _texts(theirs))
    for reader, reason in comparison.unheard.items():
        consequence = f"none known: {reader} did not say what it makes of the difference"
        remedy = "validate where it can, or copy config.json from the source and add the quantization_config alone"
        yield Fault(
            f"{reader}'s own reading of both configs",
            reason,
            file=CONFIG,
            severity="warning",
            consequence=consequence,
            remedy=remedy,
        )
    for difference in comparison.differences:
        expected, found = f"{difference.key} = {difference.expected}", difference.found
        if not difference.key:
            yield Fault(difference.expected, found, file=CONFIG)
        elif difference.readers:
            sure = [reader for reader in difference.readers if reader not in comparison.unheard]
            perhaps = "" if sure else "perhaps, since it could not be asked, "
            consequence = (
                f"{' and '.join(sure or difference.readers)}: {perhaps}another model than the one that was quantized"
            )
            yield Fault(clip(expected), found, file=CONFIG, consequence=consequence)
        else:
            consequence = f"none: {' and '.join(comparison.readers)} never asks for it"
            yield Fault(clip(expected), found, file=CONFIG, severity="warning", consequence=consequence)


def _differing_texts(ours: dict[str, Any], theirs: dict[str, Any]) -> Iterator[Fault]:
    """Every key that differs, for a model whose config no library here can read."""
    for key in sorted(ours.keys() | theirs.keys()):
        if ours.get(key, _ABSENT) != theirs.get(key, _ABSENT):
            expected, found = (repr(side[key]) if key in side else "absent" for side in (theirs, ours))
            yield Fault(f"{clip(key)} = {clip(expected)}", clip(found), file=CONFIG)


_ABSENT = object()


def _texts(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The config as one flat mapping, without the keys that may differ; `torch_dtype` is named `dtype`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if key in _LINEAGE:
            continue
        name = prefix + ("dtype" if key == "torch_dtype" else key)
        if isinstance(value, dict) and value and len(prefix) < 200:
            flat |= _texts(value, f"{name}.")
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
    places = (subject.config, text_config(subject.config))
    given = [place[key] for place in places for key in ("dtype", "torch_dtype") if place.get(key) is not None]
    expected = "bfloat16 or float16"
    if given and given[0] == "float32":
        yield Fault(expected, "float32", file=CONFIG, severity="warning", consequence="vLLM runs it in bfloat16")
    elif given and given[0] not in ("bfloat16", "float16"):
        yield Fault(expected, clip(repr(given[0])), file=CONFIG)


@check(
    "C9",
    "transformers can load the checkpoint too.",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM loads it; transformers 5 leaves the weights unscaled without an error",
    remedy="use checkpoint_format compressed-tensors, or the block form of quant_method fp8",
)
def transformers_can_load_it(subject: Subject) -> Iterator[Fault]:
    expected, scheme = "a layout that transformers reads", subject.scheme
    status = subject.quantization.get("quantization_status")
    if scheme.method == "compressed-tensors" and status != "compressed":
        yield Fault(
            "quantization_status compressed",
            clip(repr(status)) if status is not None else "none, which means initialized",
            file=CONFIG,
            key="quantization_status",
            severity="error",
            consequence="vLLM loads it; transformers takes the codes for weights, and computes nonsense or NaN",
            remedy="set quantization_status to compressed",
        )
    if scheme.method == "modelopt":
        yield Fault(expected, "quant_method modelopt", file=subject.quantization_file)
    elif scheme.method == "fp8" and scheme.groups[0].spec.strategy == "tensor":
        yield Fault(expected, "quant_method fp8 with per-tensor scales", file=CONFIG)


@check(
    "C10",
    "quantization_config is the one that the plan wrote.",
    needs=("config", "records"),
    yields_to=("C1", "C2", "C4", "C9"),
    consequence="vLLM computes otherwise than was planned, or stops; what plan and card say is not true",
    remedy="copy quantization_config from fp8pipe/plan.json, or quantize again",
)
def quantization_is_as_planned(subject: Subject) -> Iterator[Fault]:
    """Keys that are absent, null or empty mean the same. Those that no reader knows are C2's."""
    ours, planned = _stated(subject.quantization), _stated(subject.plan.quantization_config)
    known = KEYS.get(method_of(subject.quantization), ())
    for key in sorted(ours.keys() | planned.keys()):
        top = key.partition(".")[0]
        if ours.get(key) != planned.get(key) and (key in planned or top in known):
            expected, found = (clip(repr(side.get(key)), 100) for side in (planned, ours))
            yield Fault(f"{clip(key)} = {expected}", found, file=CONFIG, key=top)


def _stated(quant: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What a quantization_config says, by dotted key; the order of names in a list does not count."""
    flat: dict[str, Any] = {}
    for key, value in quant.items():
        if isinstance(value, dict) and len(prefix) < 200:
            flat |= _stated(value, f"{prefix}{key}.")
        elif value not in (None, [], ""):
            flat[f"{prefix}{key}"] = sorted(value) if is_names(value) else value
    return flat
