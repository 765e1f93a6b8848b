"""K1 to K5, K8 to K10: coverage. Is everything there that config, architecture and source ask for, and nothing else?

vLLM checks none of this for a quantized model: a scale or an expert that is missing stays at its initial value, and the
model answers in fluent nonsense.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from fp8pipe.model.headers import TensorInfo
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.layout import unquantized_names
from fp8pipe.validate.meaning.names import (
    FLOATS,
    SCALES,
    UNWANTED,
    WEIGHTS,
    holds_codes,
    is_companion,
    is_scale,
    place_in_decoder,
    split_name,
)
from fp8pipe.validate.subject import Subject

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
"""Model types whose router is never quantized, by vLLM 0.32 or by transformers' fp8 method, with any config.json;
DeepSeek-V3 is published without an ignore list."""
_EMBEDDING = re.compile(
    r"(^|\.)(embed|embed_tokens|embed_in|embeddings?|tok_embeddings|word_embeddings|wte|shared)\.weight$"
)
"""The embedding of tokens, by the names that released models give it."""
_NO_PARAMETER = re.compile(r"scale|zero|inv_freq")
"""Leaf names of what a layer may lack: scales, which unknown formats spell otherwise, and buffers."""
_EXPERT_NUMBER = re.compile(r"\.experts\.\d+\.")
MIN_SIBLINGS = 2
"""So many layers of one kind show what another one lacks."""
MAX_LAYERS = 512
"""Comparing layers takes quadratic time, so it is skipped above this number. No real model has so many."""


# ---------------------------------------------------------------------------------------------- nothing is missing


@check(
    "K1",
    "Every tensor of the source is there; without a source, every tensor of the architecture record, and what all "
    "other decoder layers of a kind have.",
    yields_to=("K6",),
    consequence="vLLM silently leaves the weight uninitialised",
    remedy="quantize again from the complete source",
)
def nothing_is_missing(subject: Subject) -> Iterator[Fault]:
    if not subject.supplies("config") and subject.source_config is None:
        return  # nothing is known of the model
    missing = {name for name in _required(subject) if not _is_stored(subject, name)}
    for name in sorted(missing):
        yield Fault("the tensor", "missing", tensor=name)
    for name in sorted(_lacking_beside_siblings(subject) - missing):
        yield Fault("the tensor, as in the other layers of this kind", "missing", tensor=name)


def _required(subject: Subject) -> Iterable[str]:
    layout = subject.layout
    dropped = {"lm_head.weight"} if layout.tied else set()
    split = {piece.tensor for piece in layout.pieces.values()}
    if subject.source_or_none is not None:
        whole = (name for name in subject.source.tensors if name not in split or name in subject.files.tensors)
        return (name for name in whole if name not in dropped and not is_scale(name))
    if subject.files.blind:
        return ()
    if layout.from_record:
        return layout.required - split - dropped
    if any(_EMBEDDING.search(name) for name in layout.names):
        return ()
    return ("model.embed_tokens.weight",)  # the one tensor that every decoder is known to have


def _is_stored(subject: Subject, name: str) -> bool:
    """Whether the tensor is there: under its own name, or under the one that its scheme gives a quantized weight."""
    module, leaf = split_name(name)
    spec = subject.specs.get(module)
    return subject.files.may_have(name) or (
        leaf == "weight" and spec is not None and subject.weight(module) is not None
    )


def _lacking_beside_siblings(subject: Subject) -> set[str]:
    """Tensors that a decoder layer lacks and all others of its kind have; empty if there is a source to compare with.

    A layer's kind is what it holds: hybrid models mix several. If a layer's set of tensors occurs once, and is part of
    a set that at least MIN_SIBLINGS other layers share, the layer lacks the difference. The first and the last layer
    may do without a norm that stands beside them, as in ModernBERT; models that were pruned block by block are not
    judged."""
    is_pruned = subject.config.get("block_configs") is not None
    if subject.source_or_none is not None or subject.files.blind or subject.files.lost or is_pruned:
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
    behind = subject.layout.num_layers
    layers: dict[tuple[str, int], set[str]] = defaultdict(set)
    for name in unquantized_names(subject.files.tensors):
        place = place_in_decoder(name)
        if place is not None and not _NO_PARAMETER.search(split_name(name)[1]):
            stack = name.removesuffix(f"{place[0]}.{place[1]}")
            layers[stack, place[0]].add(_EXPERT_NUMBER.sub(".experts.*.", f".{place[1]}")[1:])
    return {at: held for at, held in layers.items() if behind is None or at[1] < behind}


@check(
    "K2",
    "Every Linear is quantized with all its companions, or ignored.",
    needs=("scheme",),
    yields_to=("K5", "K6"),
    consequence="vLLM silently takes -3.4e38 for the missing scale, or in a fused layer the maximum of the others; "
    "the layer's output is garbage",
    remedy="quantize the module again, or name it in the ignore list and keep its weight",
)
def quantized_modules_are_complete(subject: Subject) -> Iterator[Fault]:
    for module in sorted(subject.specs):
        yield from missing_companions(subject, module, "the scale")
    yield from _unprotected_routers(subject)
    yield from _unprotected_head(subject)


def missing_companions(subject: Subject, module: str, expected: str) -> Iterator[Fault]:
    """Scales that a quantized weight lacks under any name."""
    if (weight := subject.weight(module)) is None:
        return
    companions = subject.specs[module].companions
    for leaf in companions:
        names = (leaf, *(name for name in ALIASES.get(leaf, ()) if name not in companions))
        if not any(subject.files.may_have(f"{module}.{name}") for name in names):
            yield Fault(expected, "missing", file=weight.shard, tensor=f"{module}.{leaf}")


def _unprotected_routers(subject: Subject) -> Iterator[Fault]:
    """Full-precision routers that vLLM builds as quantized, because no ignore entry names them."""
    are_safe = subject.scheme.method == "fp8" and subject.config.get("model_type") in KEEP_THEIR_ROUTERS
    for module in () if are_safe else sorted(subject.layout.routers):
        if subject.scheme.spec_of(module) is not None:
            yield Fault(
                "a router in the ignore list",
                "not matched by any entry",
                tensor=module,
                consequence="vLLM builds some routers as FP8 layers: it reads this one as FP8 with scale -3.4e38",
                remedy="add re:.*mlp\\.gate$ (quant_method fp8: each full name) to ignore",
            )


def _unprotected_head(subject: Subject) -> Iterator[Fault]:
    """A full-precision lm_head that a reader takes for quantized, because no ignore entry names it."""
    scheme, head = subject.scheme, subject.files.tensors.get("lm_head.weight")
    if head is None or head.dtype not in FLOATS:
        return
    expected, found = "lm_head in the ignore list", "not matched by any entry"
    if scheme.method == "modelopt" and scheme.quantizes_head("lm_head"):
        consequence = "vLLM builds lm_head as an FP8 layer: it reads this one as FP8 without a scale"
        yield Fault(expected, found, tensor="lm_head", consequence=consequence)
    is_caught = scheme.spec_of("lm_head") is not None and not scheme.names_head("lm_head")
    if scheme.method == "compressed-tensors" and is_caught:
        consequence = "none in vLLM; transformers takes lm_head for quantized and misses its scale"
        yield Fault(expected, found, tensor="lm_head", consequence=consequence, remedy="add lm_head to ignore")


# ---------------------------------------------------------------------------------------------- nothing is left over


@check(
    "K3",
    "Every scale belongs to a quantized weight and has the name and kind that the scheme asks for.",
    needs=("scheme",),
    yields_to=("K9",),
    consequence="vLLM stops: there is no module or parameter of that name",
    remedy="remove the tensor, or rename it in the shard and in the index",
)
def scales_have_their_weight(subject: Subject) -> Iterator[Fault]:
    for name, entry in subject.files.tensors.items():
        module, leaf = split_name(name)
        if leaf not in (*SCALES, *UNWANTED) or subject.is_of_source(name):
            continue
        spec, weight = subject.specs.get(module), subject.weight(module)
        expected = (*spec.companions, *spec.spare) if spec else ()
        is_quantized_on_disk = spec is None and weight is not None and weight.dtype not in FLOATS
        is_of_head = module.endswith("lm_head") and subject.scheme.quantizes_head(module)
        if leaf not in expected and not is_quantized_on_disk and not is_of_head:
            yield Fault(_instead_of(leaf, expected), leaf, file=entry.shard, tensor=name)


def _instead_of(leaf: str, expected: tuple[str, ...]) -> str:
    renamed = [name for name in expected if leaf in ALIASES.get(name, ())]
    if renamed:
        return f"the name {renamed[0]}"
    return f"only {', '.join(expected)} beside the weight" if expected else "no scale beside an unquantized weight"


@check(
    "K4",
    "Only weights of Linears and experts are quantized: no embedding, router, norm, convolution or bias, and lm_head "
    "only if it is named.",
    needs=("scheme",),
    yields_to=("K6",),
    consequence="vLLM has no FP8 form of it: it stops, or casts the codes and drops the scale",
    remedy="keep the tensor in the source's dtype",
)
def only_linears_are_quantized(subject: Subject) -> Iterator[Fault]:
    layout, scheme = subject.layout, subject.scheme
    for name, entry in subject.files.tensors.items():
        module, leaf = split_name(name)
        is_linear = leaf in WEIGHTS and module in layout.is_quantizable
        is_head = module.endswith("lm_head") or f"{module}.weight" in layout.heads
        if not holds_codes(entry) or is_linear or subject.has_source_dtype(entry) or _is_scaled_block(subject, entry):
            continue
        if not (is_head and scheme.quantizes_head(module)):
            yield Fault("the source's dtype", entry.dtype, file=entry.shard, tensor=name)
    embedded = (module for module in layout.modules if re.search(r"(^|\.)embed_tokens$", module))
    if caught := [module for module in embedded if scheme.names_head(module) and not scheme.ignores(module)]:
        file = subject.quantization_file
        yield Fault("targets that match Linears alone", f"a target matches {caught[0]}", file=file)


def _is_scaled_block(subject: Subject, entry: TensorInfo) -> bool:
    """All experts of a layer in one tensor with its scales beside it: a form that vLLM loads too."""
    scales = (f"{entry.name}_{leaf}" for leaf in ("scale", "scale_inv"))
    return len(entry.shape) == 3 and any(name in subject.files.tensors for name in scales)


@check(
    "K5",
    "Targeted modules hold FP8 codes, ignored ones do not.",
    needs=("scheme",),
    consequence="vLLM casts one dtype into the other, silently (fused layers) or with a log line, or stops at the "
    "scale it has no place for",
    remedy="make the ignore list say what the weights are",
)
def dtypes_follow_the_config(subject: Subject) -> Iterator[Fault]:
    layout = subject.layout
    left: list[TensorInfo] = []
    for module in layout.quantizable:
        entry, spec = subject.weight(module), subject.specs.get(module)
        if entry is None:
            continue
        if spec is not None and entry.dtype in FLOATS:
            if module in layout.optional:
                left.append(entry)
            else:
                yield _unquantized(subject, module, entry)
        elif spec is not None and not entry.name.endswith(f".{spec.weight}"):
            yield Fault(f"the name {spec.weight}", split_name(entry.name)[1], entry.shard, entry.name)
        elif spec is None and holds_codes(entry) and not subject.has_source_dtype(entry):
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
            claims=tuple(name for entry in left for name in (entry.name, *_claims(subject, split_name(entry.name)[0]))),
        )


def _unquantized(subject: Subject, module: str, entry: TensorInfo) -> Fault:
    """A Linear that the config says is quantized and is not."""
    claims = _claims(subject, module)
    if module not in subject.layout.towers:
        expected = f"{subject.specs[module].format.codes.dtype}, as {subject.quantization_file} says"
        return Fault(expected, entry.dtype, entry.shard, entry.name, claims=claims)
    return Fault(
        "a tower in the ignore list, or quantized",
        f"{entry.dtype}, and no entry that matches it",
        entry.shard,
        entry.name,
        severity="error" if subject.scheme.method == "compressed-tensors" else "warning",
        consequence="vLLM builds it as an FP8 layer where its class hands the tower the config (Qwen-VL, SigLIP, "
        "Pixtral): it silently reads this weight as FP8 with scale -3.4e38",
        remedy="name the tower's Linears in ignore (re:.*visual.*, re:.*vision_tower.*, re:.*projector.*)",
        claims=claims,
    )


def _claims(subject: Subject, module: str) -> tuple[str, ...]:
    """The module, if it has no scales at all: its dtype is the fault, and the missing scales are none."""
    return (module,) if subject.is_plain(module) else ()


# ---------------------------------------------------------------------------------------------- names nobody knows


@check(
    "K8",
    "No tensor that the source does not have, except scales.",
    needs=("config", "tensors"),
    yields_to=("K6",),
    consequence="vLLM stops: there is no module or parameter of that name",
    remedy="remove the tensor",
)
def no_unknown_tensors(subject: Subject) -> Iterator[Fault]:
    known = subject.source_tensors or {}
    for name, entry in subject.files.tensors.items():
        module, leaf = split_name(name)
        is_weight = leaf in WEIGHTS and module in subject.layout.is_quantizable  # packed, or split from a larger tensor
        if name in known or is_companion(name) or is_weight:
            continue
        if leaf == "inv_freq":
            yield Fault("a tensor of the source", "a buffer", entry.shard, name, "warning", "vLLM skips it")
        else:
            yield Fault("a tensor of the source", "unknown to it", entry.shard, name)


@check(
    "K9",
    "Tied models store no lm_head, untied ones store it.",
    needs=("config",),
    yields_to=("K1",),
    consequence="vLLM silently leaves the missing lm_head uninitialised; a scale of a tied one stops it",
    remedy="store lm_head.weight when tie_word_embeddings is false, and only then",
)
def head_follows_tying(subject: Subject) -> Iterator[Fault]:
    layout, tensors = subject.layout, subject.files.tensors
    if layout.tied is None or subject.files.blind:
        return
    if not layout.tied:
        stored = any(subject.files.may_have(name) for name in layout.heads) or _has_another_head(subject)
        if not stored and _has_a_head(subject):
            yield Fault("lm_head.weight in an untied model", "missing", tensor=layout.heads[0])
        return
    scale = next((tensors[n] for n in ("lm_head.weight_scale", "lm_head.weight_scale_inv") if n in tensors), None)
    if scale is not None:
        expected = "no scale of a tied lm_head"
        yield Fault(expected, scale.dtype, scale.shard, scale.name, claims=("lm_head",))
    source_has_head = subject.source_or_none is not None and "lm_head.weight" in subject.source.tensors
    if "lm_head.weight" in tensors and not source_has_head:
        file = tensors["lm_head.weight"].shard
        yield Fault("no lm_head in a tied model", "one", file, "lm_head.weight", "warning", "vLLM unties the model")


def _has_another_head(subject: Subject) -> bool:
    """Whether a matrix outside the layers has the embedding's shape: a head whose name no record tells."""
    if subject.layout.from_record:
        return False
    outside = {name: info.shape for name, info in subject.files.tensors.items() if place_in_decoder(name) is None}
    embeddings = {name for name in outside if _EMBEDDING.search(name)}
    shapes = {outside[name] for name in embeddings}
    return any(shape in shapes for name, shape in outside.items() if name not in embeddings)


def _has_a_head(subject: Subject) -> bool:
    architectures = subject.config.get("architectures")
    return isinstance(architectures, list) and any("ForCausalLM" in str(name) for name in architectures)


@check(
    "K10",
    "At least nine tenths of the Linears' parameters are quantized.",
    severity="warning",
    needs=("scheme",),
    consequence="vLLM serves it, with less of the memory and speed that FP8 promises",
    remedy="shorten the ignore list, unless this is intended",
)
def most_is_quantized(subject: Subject) -> Iterator[Fault]:
    total = done = 0
    for module in subject.layout.is_quantizable - subject.layout.may_stay:
        entry, spec = subject.weight(module), subject.specs.get(module)
        size = math.prod(entry.shape) * (spec.format.codes.per_byte if spec else 1) if entry is not None else 0
        total += size
        done += size if spec else 0
    if total and done < 0.9 * total:
        yield Fault("at least 90 % of Linear parameters quantized", f"{100 * done / total:.1f} %")
