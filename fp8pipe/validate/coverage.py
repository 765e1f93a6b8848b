"""Is everything there, and nothing else: names against config, architecture and source (checks K1 to K10).

In: a Subject, headers only. Out: faults that name the module. vLLM checks none of this for a quantized model: a scale
or an expert that is missing stays at its initial value, and the model answers in fluent nonsense.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fp8pipe.validate.config import Scheme, Spec
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.layout import Layout, expert_of, layer_of

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

FLOATS = {"BF16", "F16", "F32", "F64"}
ALIASES = {
    "weight_scale": ("weight_scale_inv",),
    "weight_scale_inv": ("weight_scale",),
    "input_scale": ("act_scale", "activation_scale"),
}
"""Other spellings of a companion, of older tools or the other method."""
COMPANIONS = {"weight_scale", "weight_scale_inv", "input_scale", "act_scale", "activation_scale"}
UNWANTED = {"weight_zero_point", "input_zero_point", "weight_g_idx", "g_idx", "weight_shape", "weight_packed"}
KV_LEAVES = {"k_scale", "v_scale", "q_scale", "kv_scale", "prob_scale"}
_KV_PLACE = re.compile(r"\.(self_attn|attn|attention|self_attention|mixer)(\.attn|\.[qkv]_proj|\.qkv_proj)?$")


def companions_of(spec: Spec) -> tuple[str, ...]:
    """Leaf names that must stand beside a weight of this scheme."""
    return (spec.scale, "input_scale") if spec.inputs == "static" else (spec.scale,)


def _split(name: str) -> tuple[str, str]:
    module, _, leaf = name.rpartition(".")
    return module, leaf


def _parts(subject: Subject) -> Layout:
    assert subject.layout is not None
    return subject.layout


# ---------------------------------------------------------------------------------------------- nothing is missing


@check(
    "K1",
    "Every tensor of the source (without one: of the architecture) is there.",
    consequence="vLLM leaves the weight uninitialised, without a word",
    remedy="quantize again from the complete source",
)
def nothing_is_missing(subject: Subject) -> Iterator[Fault]:
    if subject.layout is None:
        return
    for name in sorted(_required(subject)):
        if not subject.shelf.has(name) and not _is_expert_hole(subject, name):
            yield Fault("the tensor", "missing", tensor=name)


def _required(subject: Subject) -> Iterable[str]:
    layout = _parts(subject)
    if subject.source is not None:
        dropped = {"lm_head.weight"} if layout.tied else set()
        return (name for name in subject.source.tensors if name not in dropped and not _is_scale(name))
    if layout.expected is not None:
        return (name for name in layout.expected if not (layout.tied and name == "lm_head.weight"))
    return () if any(n.endswith("embed_tokens.weight") for n in layout.names) or subject.shelf.blind else _embedding()


def _embedding() -> Iterable[str]:
    """Known of every decoder, whatever else is not."""
    return ("model.embed_tokens.weight",)


def _is_scale(name: str) -> bool:
    return _split(name)[1] in COMPANIONS | KV_LEAVES


def _is_expert_hole(subject: Subject, name: str) -> bool:
    """Missing tensors of experts are K6's."""
    return expert_of(_split(name)[0]) is not None and _parts(subject).num_experts is not None


@check(
    "K2",
    "Every Linear is quantized with all its companions, or ignored.",
    needs=("scheme",),
    consequence="vLLM takes -3.4e38 for the missing scale, or in a fused layer the maximum of the others; "
    "the layer's output is garbage, without a word",
    remedy="quantize the module again, or name it in the ignore list and keep its weight",
)
def quantized_modules_are_complete(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    for module in sorted(subject.quantized):
        spec = subject.scheme.spec_of(module)
        weight = subject.shelf.tensors.get(f"{module}.weight")
        if spec is None or weight is None or (weight.dtype in FLOATS and not _has_any_companion(subject, module)):
            continue  # a missing weight is K1's, an unquantized one K5's
        for leaf in companions_of(spec):
            if not _present_or_misnamed(subject, module, leaf) and not _is_expert_scale(subject, module):
                yield Fault("the scale", "missing", file=weight.shard, tensor=f"{module}.{leaf}")
    yield from _unprotected(subject)


def _has_any_companion(subject: Subject, module: str) -> bool:
    return any(f"{module}.{leaf}" in subject.shelf.tensors for leaf in COMPANIONS)


def _present_or_misnamed(subject: Subject, module: str, leaf: str) -> bool:
    return any(subject.shelf.has(f"{module}.{name}") for name in (leaf, *ALIASES.get(leaf, ())))


def _is_expert_scale(subject: Subject, module: str) -> bool:
    return expert_of(module) is not None and _parts(subject).num_experts is not None


def _unprotected(subject: Subject) -> Iterator[Fault]:
    """Routers, and lm_head for transformers: full-precision modules that readers quantize unless told not to."""
    assert subject.scheme is not None
    layout = _parts(subject)
    for module in sorted(layout.routers):
        if subject.scheme.spec_of(module) is not None:
            yield Fault(
                "a router in the ignore list",
                "not matched by any entry",
                tensor=module,
                consequence="vLLM builds some routers as FP8 layers: it reads this one as FP8 with scale -3.4e38",
                remedy="add re:.*mlp\\.gate$ (quant_method fp8: each full name) to ignore",
            )
    head = subject.shelf.tensors.get("lm_head.weight")
    if head is not None and head.dtype in FLOATS and _transformers_quantizes_head(subject.scheme):
        yield Fault(
            "lm_head in the ignore list",
            "not matched by any entry",
            tensor="lm_head",
            severity="warning",
            consequence="none in vLLM; transformers takes lm_head for quantized and misses its scale",
            remedy="add lm_head to ignore",
        )


def _transformers_quantizes_head(scheme: Scheme) -> bool:
    is_caught = scheme.spec_of("lm_head") is not None and not scheme.names_head("lm_head")
    return scheme.method == "compressed-tensors" and is_caught


# ---------------------------------------------------------------------------------------------- nothing is left over


@check(
    "K3",
    "Every scale belongs to a quantized weight and has the name and kind that the scheme asks for.",
    needs=("scheme",),
    consequence="vLLM stops: there is no module or parameter of that name",
    remedy="remove the tensor, or rename it in the shard and in the index",
)
def scales_have_their_weight(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    for name, entry in subject.shelf.tensors.items():
        module, leaf = _split(name)
        if leaf not in COMPANIONS | UNWANTED or not _parts_of_model(subject, name):
            continue
        if module == "lm_head" and _parts(subject).tied:
            continue  # K9's
        spec = subject.scheme.spec_of(module) if module in _parts(subject).is_quantizable else None
        expected = companions_of(spec) if spec else ()
        if leaf in expected or (spec is None and _is_quantized_on_disk(subject, module)):
            continue  # the second is K4's or K5's: FP8 where there should be none
        yield Fault(_instead_of(leaf, expected), leaf, file=entry.shard, tensor=name)


def _parts_of_model(subject: Subject, name: str) -> bool:
    """An unquantized model may have parameters of such names itself; then they are in the source."""
    return subject.source is None or name not in subject.source.tensors


def _instead_of(leaf: str, expected: tuple[str, ...]) -> str:
    renamed = [name for name in expected if leaf in ALIASES.get(name, ())]
    if renamed:
        return f"the name {renamed[0]}"
    return f"only {', '.join(expected)} beside the weight" if expected else "no scale beside an unquantized weight"


def _is_quantized_on_disk(subject: Subject, module: str) -> bool:
    weight = subject.shelf.tensors.get(f"{module}.weight")
    return weight is not None and weight.dtype not in FLOATS


@check(
    "K4",
    "Nothing is quantized that is no Linear or expert: embeddings, routers, norms, convolutions, lm_head unless named.",
    needs=("scheme",),
    consequence="vLLM has no FP8 form of it: it stops, or casts the codes and drops the scale",
    remedy="keep the tensor in the source's dtype",
)
def only_linears_are_quantized(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    layout = _parts(subject)
    for name, entry in subject.shelf.tensors.items():
        module, leaf = _split(name)
        if leaf != "weight" or module in layout.is_quantizable or not entry.dtype.startswith("F8_E"):
            continue
        if _same_in_source(subject, name) or (module.endswith("lm_head") and subject.scheme.names_head(module)):
            continue
        if _is_surplus_expert(subject, name):
            continue
        yield Fault("the source's dtype", entry.dtype, file=entry.shard, tensor=name)
    for group in subject.scheme.groups:
        caught = [m for m in layout.modules if re.search(r"(^|\.)embed_tokens$", m) and _names(subject, m)]
        if caught and group is subject.scheme.groups[0]:
            yield Fault("targets that match Linears alone", f"a target matches {caught[0]}", file="config.json")


def _is_surplus_expert(subject: Subject, name: str) -> bool:
    """An expert beyond the last; K6 speaks of it."""
    place, count = expert_of(_split(name)[0]), _parts(subject).num_experts
    return place is not None and count is not None and place[1] >= count


def _names(subject: Subject, module: str) -> bool:
    assert subject.scheme is not None
    return subject.scheme.names_head(module) and not subject.scheme.ignores(module)


def _same_in_source(subject: Subject, name: str) -> bool:
    theirs = subject.source.tensors.get(name) if subject.source else None
    ours = subject.shelf.tensors[name]
    return theirs is not None and theirs.dtype == ours.dtype


@check(
    "K5",
    "Targeted modules hold FP8 codes, ignored ones do not.",
    needs=("scheme",),
    consequence="vLLM casts one dtype into the other without a word (fused layers) or with a log line, or stops at "
    "the scale it has no place for",
    remedy="make the ignore list say what the weights are",
)
def dtypes_follow_the_config(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    for module in _parts(subject).quantizable:
        entry = subject.shelf.tensors.get(f"{module}.weight")
        if entry is None:
            continue
        if module in subject.quantized and entry.dtype in FLOATS:
            yield Fault("F8_E4M3, as config.json says", entry.dtype, entry.shard, entry.name)
        elif (
            module not in subject.quantized
            and entry.dtype.startswith("F8_E")
            and not _same_in_source(subject, entry.name)
        ):
            yield Fault("the source's dtype in an ignored module", entry.dtype, entry.shard, entry.name)


# ---------------------------------------------------------------------------------------------- counted things


@check(
    "K6",
    "Layers are numbered without gaps, and every expert of every layer is there with all its projections and scales.",
    needs=("scheme",),
    consequence="vLLM leaves a missing expert uninitialised and takes 1.0 for a missing scale, without a word",
    remedy="quantize again from the complete source",
)
def layers_and_experts_are_complete(subject: Subject) -> Iterator[Fault]:
    yield from _layer_gaps(subject)
    yield from _expert_gaps(subject)


def _layer_gaps(subject: Subject) -> Iterator[Fault]:
    layout = _parts(subject)
    if layout.num_layers is None or subject.shelf.blind or subject.shelf.lost:
        return
    found = {layer for name in subject.shelf.tensors if (layer := layer_of(name)) is not None}
    source = subject.source.tensors if subject.source else {}
    known = {layer for name in source if (layer := layer_of(name)) is not None}
    if missing := sorted(set(range(layout.num_layers)) - found - (known and set(range(layout.num_layers)))):
        yield Fault(f"layers 0 to {layout.num_layers - 1}", f"layer {missing[0]} has no tensor")
    extra = sorted(found - set(range(layout.num_layers)) - known)
    for layer in extra if not known else ():
        yield Fault(
            f"layers 0 to {layout.num_layers - 1}",
            f"layer {layer}",
            severity="warning" if extra[0] == layout.num_layers else None,
        )


def _expert_gaps(subject: Subject) -> Iterator[Fault]:
    layout = _parts(subject)
    if layout.num_experts is None:
        return
    blocks: dict[str, set[str]] = defaultdict(set)
    for name in layout.names | subject.shelf.tensors.keys():
        if place := expert_of(_split(name)[0]):
            blocks[place[0]].add(place[2])
    for experts, projections in sorted(blocks.items()):
        for index in range(layout.num_experts):
            for projection in sorted(projections):
                yield from _missing_of_expert(subject, f"{experts}.{index}.{projection}")
        yield from _surplus_experts(subject, experts, layout.num_experts)


def _missing_of_expert(subject: Subject, module: str) -> Iterator[Fault]:
    assert subject.scheme is not None
    spec = subject.scheme.spec_of(module)
    weight = subject.shelf.tensors.get(f"{module}.weight")
    if not subject.shelf.has(f"{module}.weight"):
        yield Fault("the expert's weight", "missing", tensor=f"{module}.weight")
    elif spec and weight and (weight.dtype not in FLOATS or _has_any_companion(subject, module)):
        for leaf in companions_of(spec):
            if not _present_or_misnamed(subject, module, leaf):
                yield Fault("the expert's scale", "missing", file=weight.shard, tensor=f"{module}.{leaf}")


def _surplus_experts(subject: Subject, experts: str, count: int) -> Iterator[Fault]:
    found = {
        place[1] for name in subject.shelf.tensors if (place := expert_of(_split(name)[0])) and place[0] == experts
    }
    for index in sorted(i for i in found if i >= count):
        yield Fault(f"experts 0 to {count - 1}", f"expert {index}", tensor=experts)


@check(
    "K7",
    "Every attention layer has its KV scales if the scheme says so, and none otherwise.",
    needs=("scheme",),
    consequence="vLLM uses 1.0 for a missing KV scale and ignores one that is not announced, without a word",
    remedy="calibrate the KV cache again, or set kv_cache_scheme",
)
def kv_scales_are_complete(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    present = _kv_scales(subject)
    if subject.scheme.kv is not None:
        yield from _missing_kv(subject, present)
    yield from _misplaced_kv(subject, present)


def _kv_scales(subject: Subject) -> dict[str, str]:
    """KV scale tensors by name, with the attention module they belong to as vLLM maps them."""
    found = {}
    for name in subject.shelf.tensors:
        module, leaf = _split(name)
        if leaf in KV_LEAVES and _parts_of_model(subject, name):
            found[name] = re.sub(r"\.(attn|[qkv]_proj|qkv_proj)$", "", module) if _KV_PLACE.search(module) else module
    return found


def _missing_kv(subject: Subject, present: dict[str, str]) -> Iterator[Fault]:
    have = {(module, _split(name)[1]) for name, module in present.items()}
    for module in _parts(subject).attention:
        for leaf in ("k_scale", "v_scale"):
            if (
                (module, leaf) not in have
                and not subject.shelf.has(f"{module}.{leaf}")
                and (module, "kv_scale") not in have
            ):
                yield Fault("the KV scale", "missing", tensor=f"{module}.{leaf}")


def _misplaced_kv(subject: Subject, present: dict[str, str]) -> Iterator[Fault]:
    assert subject.scheme is not None
    attention = set(_parts(subject).attention)
    for name, module in present.items():
        file = subject.shelf.tensors[name].shard
        if module not in attention:
            yield Fault("a KV scale of an attention layer", "no such layer", file, name, consequence="vLLM stops")
        elif _split(name)[1] == "kv_scale":
            yield _legacy_kv(subject, file, name)
    silent = subject.scheme.kv is None and any(module in attention for module in present.values())
    if silent:
        first = next(iter(sorted(present)))
        yield _unannounced_kv(subject, subject.shelf.tensors[first].shard, f"{len(present)} KV scales, first {first}")


def _legacy_kv(subject: Subject, file: str, name: str) -> Fault:
    """One scale for both, of early AutoFP8: fine in quant_method fp8, half lost in compressed-tensors."""
    assert subject.scheme is not None
    is_fp8 = subject.scheme.method == "fp8"
    return Fault(
        "k_scale and v_scale",
        "the deprecated kv_scale",
        file,
        name,
        severity="warning" if is_fp8 else "error",
        consequence="vLLM uses it for both, with a warning" if is_fp8 else "vLLM keeps 1.0 for v, without a word",
        remedy="write it as k_scale and v_scale",
    )


def _unannounced_kv(subject: Subject, file: str, found: str) -> Fault:
    """The fp8 method has no key to announce them: they need --kv-cache-dtype fp8."""
    assert subject.scheme is not None
    if subject.scheme.method == "fp8":
        return Fault(
            "a config that announces the KV scales",
            found,
            file,
            severity="warning",
            consequence="vLLM uses them only with --kv-cache-dtype fp8, and 1.0 otherwise",
            remedy="serve with --kv-cache-dtype fp8, or write compressed-tensors with kv_cache_scheme",
        )
    return Fault("kv_cache_scheme in config.json", found, file, severity="warning")


# ---------------------------------------------------------------------------------------------- names nobody knows


@check(
    "K8",
    "No tensor that the source does not have, except scales.",
    needs=("config", "source"),
    consequence="vLLM stops: there is no module or parameter of that name",
    remedy="remove the tensor",
)
def no_unknown_tensors(subject: Subject) -> Iterator[Fault]:
    assert subject.source is not None
    for name, entry in subject.shelf.tensors.items():
        leaf = _split(name)[1]
        if name in subject.source.tensors or leaf in COMPANIONS | KV_LEAVES | UNWANTED:
            continue
        if name.removesuffix(".weight") in _parts(subject).is_quantizable or _is_surplus_expert(subject, name):
            continue  # split from a fused tensor, or K6's
        if leaf == "inv_freq":
            yield Fault("a tensor of the source", "a buffer", entry.shard, name, "warning", "vLLM skips it")
        else:
            yield Fault("a tensor of the source", "unknown to it", entry.shard, name)


@check(
    "K9",
    "Tied models store no lm_head, untied ones store it.",
    needs=("config",),
    consequence="vLLM leaves the missing lm_head uninitialised, without a word; a scale of a tied one stops it",
    remedy="store lm_head.weight when tie_word_embeddings is false, and only then",
)
def head_follows_tying(subject: Subject) -> Iterator[Fault]:
    layout = subject.layout
    if layout is None or layout.tied is None or subject.shelf.blind:
        return
    tensors = subject.shelf.tensors
    scale = next((tensors[n] for n in ("lm_head.weight_scale", "lm_head.weight_scale_inv") if n in tensors), None)
    source_has_head = subject.source is not None and "lm_head.weight" in subject.source.tensors
    if layout.tied and scale is not None:
        yield Fault("no scale of a tied lm_head", scale.dtype, scale.shard, scale.name)
    if layout.tied and "lm_head.weight" in tensors and not source_has_head:
        file = tensors["lm_head.weight"].shard
        yield Fault("no lm_head in a tied model", "one", file, "lm_head.weight", "warning", "vLLM unties the model")
    if not layout.tied and not subject.shelf.has("lm_head.weight") and _head_expected(subject) and not source_has_head:
        yield Fault("lm_head.weight in an untied model", "missing", tensor="lm_head.weight")


def _head_expected(subject: Subject) -> bool:
    layout = _parts(subject)
    architectures = (subject.config or {}).get("architectures")
    generates = isinstance(architectures, list) and any("ForCausalLM" in str(name) for name in architectures)
    return generates if layout.expected is None else "lm_head.weight" in layout.expected


@check(
    "K10",
    "At least nine tenths of the Linears' parameters are quantized.",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM serves it, with less of the memory and speed that FP8 promises",
    remedy="shorten the ignore list, if this was not meant",
)
def most_is_quantized(subject: Subject) -> Iterator[Fault]:
    shapes = subject.shelf.tensors
    sizes = {m: math.prod(shapes[f"{m}.weight"].shape) for m in _parts(subject).quantizable if f"{m}.weight" in shapes}
    total, done = sum(sizes.values()), sum(size for module, size in sizes.items() if module in subject.quantized)
    if total and done < 0.9 * total:
        yield Fault("at least 90 % of Linear parameters quantized", f"{100 * done / total:.1f} %")
