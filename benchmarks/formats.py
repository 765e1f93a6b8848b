"""Writes the tables of docs/formats.md, from the code that writes and converts checkpoints.

    python -m benchmarks.formats [--check]

--check changes nothing; exit status 1 if the page is out of date.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.page import table
from fp8pipe.config import Recipe
from fp8pipe.convert.draft import Draft, unchanged
from fp8pipe.convert.record import METHODS
from fp8pipe.convert.respell import respell
from fp8pipe.errors import InputError
from fp8pipe.model.headers import ITEM_BYTES, TensorInfo
from fp8pipe.model.names import FP8
from fp8pipe.quantize import formats
from fp8pipe.validate.meaning.config import read_scheme

PAGE = Path(__file__).parent.parent / "docs" / "formats.md"

SHAPE, HEADS = (11008, 4096), 8
"""Shape of the weight [out, in] in the tables, and the number of KV heads."""

DENSE, EXPERT = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.experts.0.up_proj"
ATTENTION = "model.layers.0.self_attn"

STATIC = {"mode": "static", "strategy": "tensor"}
SCHEMES: dict[str, dict[str, Any]] = {
    "per tensor, static": {"weights": {"strategy": "tensor"}, "activations": STATIC},
    "per tensor, static, FP8 KV cache": {"weights": {"strategy": "tensor"}, "activations": STATIC, "kv_cache": {}},
    "per tensor, static, KV scales per head": {
        "weights": {"strategy": "tensor"},
        "activations": STATIC,
        "kv_cache": {"strategy": "head"},
    },
    "per tensor, dynamic": {
        "weights": {"strategy": "tensor"},
        "activations": {"mode": "dynamic", "strategy": "tensor"},
    },
    "per output channel, dynamic": {"weights": {"strategy": "channel"}},
    "blocks of 128x128, dynamic": {
        "weights": {"strategy": "block"},
        "activations": {"mode": "dynamic", "strategy": "group"},
    },
    "per tensor, weights only": {"weights": {"strategy": "tensor"}, "activations": None},
}


def recipe_of(scheme: str, method: str) -> Recipe | None:
    """The recipe of a row in a spelling; None if the spelling cannot express it."""
    try:
        return Recipe.model_validate({"name": "row", "checkpoint_format": method, **SCHEMES[scheme]})
    except ValueError:
        return None


def tensors(recipe: Recipe, module: str) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of one weight of a checkpoint and of its scales."""
    spelling = formats.format_of(recipe)
    yield f"{module}.weight", FP8, SHAPE
    scale = spelling.weight_scale_name(recipe.weights.strategy)
    yield f"{module}.{scale}", "F32", formats.weight_scale_shape(recipe, SHAPE)
    if recipe.activations is not None and recipe.activations.mode == "static":
        yield f"{module}.input_scale", "F32", spelling.scalar_shape()
    if recipe.kv_cache is not None:
        for leaf in ("k_scale", "v_scale"):
            yield f"{ATTENTION}.{leaf}", "F32", spelling.kv_scale_shape(recipe.kv_cache.strategy, HEADS)


def spellings() -> str:
    """Table of the scales of each scheme in both spellings."""
    rows = []
    for scheme in SCHEMES:
        cells = []
        for method in METHODS:
            recipe = recipe_of(scheme, method)
            found = list(tensors(recipe, DENSE))[1:] if recipe else []
            cells.append(", ".join(f"`{name.rpartition('.')[2]}` {list(shape)}" for name, _, shape in found) or "-")
        rows.append([scheme, *cells])
    return table(["scheme", *(f"`{method}`" for method in METHODS)], rows)


def conversions() -> str:
    """Table of which conversions are possible, and why the others are not."""
    rows = []
    for scheme in SCHEMES:
        for method, to in (METHODS, METHODS[::-1]):
            if recipe_of(scheme, method):
                rows.append(
                    [scheme, f"`{method}`", f"`{to}`", *(outcome(scheme, method, to, m) for m in (DENSE, EXPERT))]
                )
    return table(["scheme", "from", "to", "Linears", "experts"], rows)


def outcome(scheme: str, method: str, to: Any, module: str) -> str:
    """`yes`, the reason why not, or `-` if vLLM cannot serve such a checkpoint."""
    recipe = recipe_of(scheme, method)
    assert recipe is not None, scheme
    if module == EXPERT and formats.format_of(recipe).refuse_experts(recipe):
        return "-"
    infos = [
        TensorInfo(name, dtype, shape, "model.safetensors", 0, math.prod(shape) * ITEM_BYTES[dtype])
        for name, dtype, shape in tensors(recipe, module)
    ]
    config = formats.format_of(recipe).quantization_config(
        recipe, formats.kept_of(["lm_head"], (), ()), with_kv=recipe.kv_cache is not None
    )
    meaning = read_scheme(config)
    assert meaning is not None, scheme
    draft = Draft(method=recipe.checkpoint_format, tensors=unchanged(infos), quantization=config)
    try:
        respell(draft, meaning, to, None)
    except InputError as error:
        reason, _, _advice = str(error).partition("; keep ")
        return f"no: {reason}"
    return "yes"


TABLES = {"spellings": spellings, "conversions": conversions}


def filled(text: str) -> str:
    """`text` with each table written between its two marks."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text = re.sub(pattern, lambda match, make=make: f"{match[1]}{make()}{match[2]}", text, flags=re.DOTALL)
    return text


if __name__ == "__main__":
    made = filled(PAGE.read_text())
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if PAGE.read_text() == made else f"{PAGE.name} is out of date; run python -m benchmarks.formats")
    PAGE.write_text(made)
