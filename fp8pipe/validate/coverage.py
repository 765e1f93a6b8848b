"""Is everything there, and nothing else: names against config, architecture and source (checks K1 to K10, but K7).

In: a Subject, headers only. Out: faults that name the module. vLLM checks none of this for a quantized model: a scale
or an expert that is missing stays at its initial value, and the model answers in fluent nonsense.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.layout import (
    KV_SCALES,
    SCALES,
    UNWANTED,
    WEIGHTS,
    Layout,
    expert_of,
    is_beside_decoder,
    layer_of,
    place_in_decoder,
    split_name,
    unquantized_names,
)
from fp8pipe.validate.scheme import Scheme, quantization_config

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

FLOATS = {"BF16", "F16", "F32", "F64"}
SOURCE_SCALES = ("weight_scale_inv", "weight_scale")
"""Leaf names of an FP8 source's scales."""
ALIASES = {
    "weight_scale": ("weight_scale_inv",),
    "weight_scale_inv": ("weight_scale",),
    "input_scale": ("act_scale", "activation_scale", "input_global_scale"),
    "input_global_scale": ("input_scale",),
    "weight_global_scale": ("weight_scale_2",),
    "weight_scale_2": ("weight_global_scale",),
}
"""Other spellings of a companion, of older tools or the other method."""
KEEP_THEIR_ROUTERS = frozenset((
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "glm4_moe", "granitemoe", "kimi_k2",
    "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_next",
))  # fmt: skip
"""Model types whose router is never quantized, by vLLM 0.32 or by transformers' fp8 method, whatever config.json says;
DeepSeek-V3 is published without an ignore list."""
_EMBEDDING = re.compile(
    r"(^|\.)(embed|embed_tokens|embed_in|embeddings?|tok_embeddings|word_embeddings|wte|shared)\.weight$"
)
"""The embedding of tokens, by the names that released models give it."""
_NO_PARAMETER = re.compile(r"scale|zero|inv_freq")
"""Leaf names of what not every layer of a kind has: scales, which unknown formats spell otherwise, and buffers."""
_LEFT_BY_MODELOPT = re.compile("vision_tower|vision_model|vit_large_projector")
"""Towers that vLLM never quantizes under this method, whatever is excluded."""
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
MIN_SIBLINGS = 2
"""Layers of one kind that say what another of that kind lacks."""
MAX_LAYERS = 512
"""Of more, which no model has, none is held against the others: the time would grow with their square."""


def _parts(subject: Subject) -> Layout:
    assert subject.layout is not None
    return subject.layout


# ---------------------------------------------------------------------------------------------- nothing is missing


@check(
    "K1",
    "Every tensor of the source is there; without one, of the architecture record, and what all other decoder layers "
    "of a kind have.",
    consequence="vLLM leaves the weight uninitialised, without a word",
    remedy="quantize again from the complete source",
)
def nothing_is_missing(subject: Subject) -> Iterator[Fault]:
    if subject.layout is None:
        return
    missing = {name for name in _required(subject) if not _is_stored(subject, name)}
    for name in sorted(missing):
        if not subject.is_counted_expert(split_name(name)[0]):
            yield Fault("the tensor", "missing", tensor=name)
    for name in sorted(_lacking_beside_siblings(subject) - missing):
        yield Fault("the tensor, as in the other layers of this kind", "missing", tensor=name)


def _required(subject: Subject) -> Iterable[str]:
    layout = _parts(subject)
    dropped = {"lm_head.weight"} if layout.tied else set()
    split = {piece.tensor for piece in layout.pieces.values()}
    if subject.source is not None:
        whole = (name for name in subject.source.tensors if name not in split or name in subject.shelf.tensors)
        return (name for name in whole if name not in dropped and not is_scale(name))
    if subject.shelf.blind:
        return ()
    if layout.from_record:
        return layout.required - split - dropped
    if any(_EMBEDDING.search(name) for name in layout.names):
        return ()
    return ("model.embed_tokens.weight",)  # known of every decoder, whatever else is not


def _lacking_beside_siblings(subject: Subject) -> set[str]:
    """Tensors that a decoder layer lacks and all others of its kind have; nothing where the source tells.

    A layer's kind is what it holds: hybrid models mix several. One that is unlike all others, and would be like at
    least two of them with a few tensors more, lacks those. The first and the last layer may do without a norm that
    stands beside them, as in ModernBERT; models that were pruned block by block are not judged.
    """
    pruned = (subject.config or {}).get("block_configs") is not None
    if subject.source is not None or subject.shelf.blind or subject.shelf.lost or pruned:
        return set()
    layers = _held_by_layer(subject)
    if len(layers) > MAX_LAYERS:
        return set()
    kinds = Counter((stack, frozenset(held)) for (stack, _), held in layers.items())
    common = [(stack, kind) for (stack, kind), count in kinds.items() if count >= MIN_SIBLINGS]
    last = dict(sorted(layers))
    found = set[str]()
    for (stack, layer), held in layers.items():
        if kinds[stack, frozenset(held)] > 1:
            continue
        fuller = [kind for other, kind in common if other == stack and held < kind]
        lacking = min((kind - held for kind in fuller), key=len, default=frozenset[str]())
        if layer in (0, last[stack]):
            parts = {name.partition(".")[0] for name in held}
            lacking = {name for name in lacking if name.partition(".")[0] in parts}
        found |= {f"{stack}{layer}.{name}" for name in lacking}
    return found


def _held_by_layer(subject: Subject) -> dict[tuple[str, int], set[str]]:
    """(name up to the number, number) of each decoder layer -> names within it, those of all experts as one."""
    behind = _parts(subject).num_layers
    layers: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in unquantized_names(subject.shelf.tensors):
        place = place_in_decoder(name)
        if place is not None and not _NO_PARAMETER.search(split_name(name)[1]):
            stack = name.removesuffix(f"{place[0]}.{place[1]}")
            layers[stack, place[0]].add(_EXPERT_NUMBER.sub(".experts.*.", f".{place[1]}")[1:])
    return {at: held for at, held in layers.items() if behind is None or at[1] < behind}


def is_scale(name: str) -> bool:
    """Whether a tensor is by its name a scale of something else."""
    return split_name(name)[1] in (*SCALES, *KV_SCALES)


def _is_stored(subject: Subject, name: str) -> bool:
    """Under its own name, or under the one that its scheme gives a quantized weight."""
    module, leaf = split_name(name)
    spec = subject.specs.get(module)
    return subject.shelf.has(name) or (leaf == "weight" and spec is not None and subject.weight(module) is not None)


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
    for module, spec in sorted(subject.specs.items()):
        weight = subject.weight(module)
        if weight is None or subject.is_counted_expert(module) or _is_unquantized(subject, module):
            continue  # a missing weight is K1's, an unquantized one K5's, an expert's are K6's
        for leaf in spec.companions:
            if not _present_or_misnamed(subject, module, leaf):
                yield Fault("the scale", "missing", file=weight.shard, tensor=f"{module}.{leaf}")
    yield from _unprotected(subject)


def _is_unquantized(subject: Subject, module: str) -> bool:
    """Floats without any scale: the source's weight."""
    weight = subject.weight(module)
    if weight is None or weight.dtype not in FLOATS:
        return False
    return not any(f"{module}.{leaf}" in subject.shelf.tensors for leaf in SCALES)


def _present_or_misnamed(subject: Subject, module: str, leaf: str) -> bool:
    names = (leaf, *(name for name in ALIASES.get(leaf, ()) if name not in subject.specs[module].companions))
    return any(subject.shelf.has(f"{module}.{name}") for name in names)


def _unprotected(subject: Subject) -> Iterator[Fault]:
    """Routers, and lm_head for transformers: full-precision modules that readers quantize unless told not to."""
    assert subject.scheme is not None
    layout = _parts(subject)
    model_type = (subject.config or {}).get("model_type")
    are_safe = subject.scheme.method == "fp8" and model_type in KEEP_THEIR_ROUTERS
    for module in () if are_safe else sorted(layout.routers):
        if subject.scheme.spec_of(module) is not None:
            yield Fault(
                "a router in the ignore list",
                "not matched by any entry",
                tensor=module,
                consequence="vLLM builds some routers as FP8 layers: it reads this one as FP8 with scale -3.4e38",
                remedy="add re:.*mlp\\.gate$ (quant_method fp8: each full name) to ignore",
            )
    head = subject.shelf.tensors.get("lm_head.weight")
    if head is None or head.dtype not in FLOATS:
        return
    if subject.scheme.method == "modelopt" and subject.scheme.quantizes_head("lm_head"):
        yield Fault(
            "lm_head in the ignore list",
            "not matched by any entry",
            tensor="lm_head",
            consequence="vLLM builds lm_head as an FP8 layer: it reads this one as FP8 without a scale",
        )
    if _transformers_quantizes_head(subject.scheme):
        yield Fault(
            "lm_head in the ignore list",
            "not matched by any entry",
            tensor="lm_head",
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
        module, leaf = split_name(name)
        if leaf not in (*SCALES, *UNWANTED) or is_of_source(subject, name):
            continue
        if module.endswith("lm_head") and (_parts(subject).tied or subject.scheme.quantizes_head(module)):
            continue  # K9's, or right
        spec = subject.specs.get(module)
        expected = (*spec.companions, *spec.spare) if spec else ()
        if leaf in expected or (spec is None and _is_quantized_on_disk(subject, module)):
            continue  # the second is K4's or K5's: FP8 where there should be none
        yield Fault(_instead_of(leaf, expected), leaf, file=entry.shard, tensor=name)


def is_of_source(subject: Subject, name: str) -> bool:
    """An unquantized model may have parameters of such names itself; then they are in the source."""
    return subject.source is not None and name in subject.source.tensors and not is_source_quantized(subject)


def is_source_quantized(subject: Subject) -> bool:
    """The source has a quantization_config of its own: its scales are not the model's."""
    return subject.source_config is not None and quantization_config(subject.source_config) is not None


def source_scale(subject: Subject, name: str) -> TensorInfo | None:
    """The scales of an FP8 weight of the source, with which its values are known; None for all other tensors."""
    theirs = subject.source.tensors if subject.source else {}
    module, leaf = split_name(name)
    if leaf != "weight" or name not in theirs or theirs[name].dtype != "F8_E4M3" or len(theirs[name].shape) != 2:
        return None
    return next((found for one in SOURCE_SCALES if (found := theirs.get(f"{module}.{one}"))), None)


def _instead_of(leaf: str, expected: tuple[str, ...]) -> str:
    renamed = [name for name in expected if leaf in ALIASES.get(name, ())]
    if renamed:
        return f"the name {renamed[0]}"
    return f"only {', '.join(expected)} beside the weight" if expected else "no scale beside an unquantized weight"


def _is_quantized_on_disk(subject: Subject, module: str) -> bool:
    weight = subject.weight(module)
    return weight is not None and weight.dtype not in FLOATS


@check(
    "K4",
    "Nothing is quantized that is no weight of a Linear or expert: embeddings, routers, norms, convolutions, biases, "
    "lm_head unless named.",
    needs=("scheme",),
    consequence="vLLM has no FP8 form of it: it stops, or casts the codes and drops the scale",
    remedy="keep the tensor in the source's dtype",
)
def only_linears_are_quantized(subject: Subject) -> Iterator[Fault]:
    assert subject.scheme is not None
    layout = _parts(subject)
    for name, entry in subject.shelf.tensors.items():
        module, leaf = split_name(name)
        if not holds_codes(entry) or (leaf in WEIGHTS and module in layout.is_quantizable):
            continue  # the second is K5's
        if _same_in_source(subject, name) or (_is_head(subject, module) and subject.scheme.quantizes_head(module)):
            continue
        if _is_surplus_expert(subject, name) or _is_scaled_block(subject, entry):
            continue
        yield Fault("the source's dtype", entry.dtype, file=entry.shard, tensor=name)
    embedded = (module for module in layout.modules if re.search(r"(^|\.)embed_tokens$", module))
    if caught := [m for m in embedded if subject.scheme.names_head(m) and not subject.scheme.ignores(m)]:
        file = subject.quantization_file
        yield Fault("targets that match Linears alone", f"a target matches {caught[0]}", file=file)


def holds_codes(entry: TensorInfo) -> bool:
    """FP8 or packed FP4 in what is no scale; the exponents' dtype only in place of a weight."""
    leaf = split_name(entry.name)[1]
    is_scale_of_block = leaf.endswith(("_scale", "_scale_inv", "_scale_2"))  # experts.gate_up_proj_scale_inv
    if is_scale_of_block or leaf in (*SCALES, *KV_SCALES, *UNWANTED):
        return False
    is_code = entry.dtype.startswith("F8_E") and (leaf in WEIGHTS or entry.dtype != "F8_E8M0")
    return is_code or leaf == "weight_packed"


def _is_head(subject: Subject, module: str) -> bool:
    return module.endswith("lm_head") or f"{module}.weight" in _parts(subject).heads


def _is_scaled_block(subject: Subject, entry: TensorInfo) -> bool:
    """All experts of a layer in one tensor with its scales beside it: a form that vLLM loads too."""
    scales = (f"{entry.name}_{leaf}" for leaf in ("scale", "scale_inv"))
    return len(entry.shape) == 3 and any(name in subject.shelf.tensors for name in scales)


def _is_surplus_expert(subject: Subject, name: str) -> bool:
    """An expert beyond the last; K6 speaks of it."""
    place, count = expert_of(split_name(name)[0]), _parts(subject).num_experts
    return place is not None and count is not None and place[1] >= count


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
    left: list[TensorInfo] = []
    for module in _parts(subject).quantizable:
        entry, spec = subject.weight(module), subject.specs.get(module)
        if entry is None:
            continue
        if spec is not None and entry.dtype in FLOATS and module in _parts(subject).optional:
            if layer_of(f"{module}.") is not None:  # vLLM keeps what joins these layers unquantized in some formats
                left.append(entry)
        elif spec is not None and entry.dtype in FLOATS and module in _parts(subject).towers:
            yield from _unquantized_tower(subject, module, entry)
        elif spec is not None and entry.dtype in FLOATS:
            expected = f"{spec.format.codes.dtype}, as {subject.quantization_file} says"
            yield Fault(expected, entry.dtype, entry.shard, entry.name)
        elif spec is not None and not entry.name.endswith(f".{spec.weight}"):
            yield Fault(f"the name {spec.weight}", split_name(entry.name)[1], entry.shard, entry.name)
        elif spec is None and holds_codes(entry) and not _same_in_source(subject, entry.name):
            yield Fault("the source's dtype in an ignored module", entry.dtype, entry.shard, entry.name)
    if left:
        yield Fault(
            "layers that predict a second token in the ignore list, or quantized",
            f"{len(left)} weights of {left[0].dtype}, and no entry that matches them",
            left[0].shard,
            left[0].name,
            severity="warning",
            consequence="none as long as vLLM does not speculate; with these layers as its draft it reads them as FP8 "
            "without a scale, and no draft is accepted",
            remedy="name these layers in ignore",
        )


def _unquantized_tower(subject: Subject, module: str, entry: TensorInfo) -> Iterator[Fault]:
    """A Linear of a tower that the config says is quantized and is not."""
    assert subject.scheme is not None
    is_left_by_vllm = subject.scheme.method == "modelopt" and _LEFT_BY_MODELOPT.search(module)
    if is_left_by_vllm or _is_ignored_otherwise(subject.scheme, module):
        return
    yield Fault(
        "a tower in the ignore list, or quantized",
        f"{entry.dtype}, and no entry that matches it",
        entry.shard,
        entry.name,
        severity="error" if subject.scheme.method == "compressed-tensors" else "warning",
        consequence="vLLM builds it as an FP8 layer where its class hands the tower the config (Qwen-VL, SigLIP, "
        "Pixtral): it reads this weight as FP8 with scale -3.4e38, without a word",
        remedy="name the tower's Linears in ignore (re:.*visual.*, re:.*vision_tower.*, re:.*projector.*)",
    )


def _is_ignored_otherwise(scheme: Scheme, module: str) -> bool:
    """Ignored under another name of the same module: those on disk, of transformers and of vLLM differ in towers."""
    plain = module.removeprefix("model.")
    spelled = {name.replace(".vision_model.", ".") for name in (plain, f"model.{plain}")} | {plain, f"model.{plain}"}
    if any(scheme.ignores(name) for name in spelled):
        return True
    return any(_kin(entry) == _kin(module) for entry in scheme.ignore if is_beside_decoder(entry))


def _kin(module: str) -> tuple[str, ...]:
    """First number in a name, and its last two parts."""
    numbers = re.findall(r"\.(\d+)\.", module)
    return (*numbers[:1], *module.split(".")[-2:])


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
    found = _decoder_layers(subject.shelf.tensors)
    known = _decoder_layers(subject.source.tensors if subject.source else ())
    if missing := sorted(set(range(layout.num_layers)) - found - (known and set(range(layout.num_layers)))):
        yield Fault(f"layers 0 to {layout.num_layers - 1}", f"layer {missing[0]} has no tensor")
    extra = sorted(found - set(range(layout.num_layers + layout.num_predictors)) - known)
    for layer in extra if not known else ():
        yield Fault(
            f"layers 0 to {layout.num_layers - 1}",
            f"layer {layer}",
            severity="warning" if extra[0] == layout.num_layers else None,
        )


def _decoder_layers(names: Iterable[str]) -> set[int]:
    return {place[0] for name in names if (place := place_in_decoder(name)) is not None}


def _expert_gaps(subject: Subject) -> Iterator[Fault]:
    layout = _parts(subject)
    if layout.num_experts is None:
        return
    blocks: dict[str, set[str]] = defaultdict(set)
    for name in layout.names | layout.required | subject.shelf.tensors.keys():
        if place := expert_of(split_name(name)[0]):
            blocks[place[0]].add(place[2])
    surplus = _surplus_experts(subject, layout.num_experts)
    for experts, projections in sorted(blocks.items()):
        for index in range(layout.num_experts):
            for projection in sorted(projections):
                yield from _missing_of_expert(subject, f"{experts}.{index}.{projection}")
        for index in sorted(surplus[experts]):
            yield Fault(f"experts 0 to {layout.num_experts - 1}", f"expert {index}", tensor=experts)


def _missing_of_expert(subject: Subject, module: str) -> Iterator[Fault]:
    spec, weight = subject.specs.get(module), subject.weight(module)
    if weight is None and not subject.shelf.has(f"{module}.weight"):
        yield Fault("the expert's weight", "missing", tensor=f"{module}.weight")
    elif spec and weight and not _is_unquantized(subject, module):
        for leaf in spec.companions:
            if not _present_or_misnamed(subject, module, leaf):
                yield Fault("the expert's scale", "missing", file=weight.shard, tensor=f"{module}.{leaf}")


def _surplus_experts(subject: Subject, count: int) -> dict[str, set[int]]:
    """Indices from `count` on, by block of experts."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in subject.shelf.tensors:
        if (place := expert_of(split_name(name)[0])) and place[1] >= count:
            found[place[0]].add(place[1])
    return found


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
        module, leaf = split_name(name)
        if name in subject.source.tensors or leaf in (*SCALES, *KV_SCALES, *UNWANTED):
            continue
        is_weight = leaf in WEIGHTS and module in _parts(subject).is_quantizable
        if is_weight or _is_surplus_expert(subject, name):
            continue  # split from a fused tensor, packed, or K6's
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
    stored = any(subject.shelf.has(name) for name in layout.heads)
    is_required = source_has_head or not layout.required.isdisjoint(layout.heads)  # then K1 speaks of it
    if not layout.tied and not stored and _head_expected(subject) and not is_required:
        yield Fault("lm_head.weight in an untied model", "missing", tensor="lm_head.weight")


def _head_expected(subject: Subject) -> bool:
    architectures = (subject.config or {}).get("architectures")
    return isinstance(architectures, list) and any("ForCausalLM" in str(name) for name in architectures)


@check(
    "K10",
    "At least nine tenths of the Linears' parameters are quantized.",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM serves it, with less of the memory and speed that FP8 promises",
    remedy="shorten the ignore list, if this was not meant",
)
def most_is_quantized(subject: Subject) -> Iterator[Fault]:
    layout = _parts(subject)
    counted = layout.is_quantizable - layout.optional - layout.towers
    weights = {m: entry for m in sorted(counted) if (entry := subject.weight(m)) is not None}
    packing = {module: spec.format.codes.per_byte for module, spec in subject.specs.items()}
    sizes = {module: math.prod(entry.shape) * packing.get(module, 1) for module, entry in weights.items()}
    total, done = sum(sizes.values()), sum(size for module, size in sizes.items() if module in subject.specs)
    if total and done < 0.9 * total:
        yield Fault("at least 90 % of Linear parameters quantized", f"{100 * done / total:.1f} %")
