"""Writes cells as docs/served.md. No cell is blank: passed with its error, vLLM's message, or what failed."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

from benchmarks.served.cells import LIMIT, Cell
from fp8pipe.evaluate.environment import library_versions

HEAD = """# Served by vLLM

<!-- Written by `python -m benchmarks.served`; edits are lost. -->

Does real vLLM, with its kernels, compute what the source does? docs/architectures.md has many more architectures and
asks loaders only. Each row here is a tiny random checkpoint of a real architecture, made with transformers, quantized
with every shipped recipe, validated against its source, and served by vLLM on a CPU with fp8pipe's plugin. Static
recipes were calibrated on random rows.

- **passed (e)**: the relative L2 error e of vLLM's centred prompt logits is at most {limit}, measured against the
  source in transformers in float32, and a copy in which the scales of one projection of the last layer are doubled
  fails the same check. With sparse experts, only tokens that go to the same experts as in the source are compared; the
  cell gives their number.
- **unquantized**: the error of the source itself, in bfloat16 with vLLM's kernels.
- **[1]**, any number in brackets: vLLM cannot serve the checkpoint on this platform, although it is sound and fits
  vLLM's model. vLLM's own message stands below the table.

{versions}.
"""

PARITY = """
## Names, dtypes and shapes in vLLM's own model

For every cell, vLLM's model was built on the meta device from config.json, and vLLM's own loader was watched while it
read the checkpoint. A cell gives tensors on disk / parameters of vLLM: each tensor is read completely into a parameter
of fitting dtype and shape, and each parameter is filled.
"""

DOUBLED = """
## With doubled scales

Errors of the copies with doubled scales; all must be above {limit}.
"""


def table(cells: Sequence[Cell], recipes: Sequence[str]) -> str:
    """The page. Models are in the order of `cells`, recipes in the given order; a missing cell says so."""
    messages = sorted({cell.message for cell in cells if cell.verdict == "unserved"})
    notes = {message: f"[{number}]" for number, message in enumerate(messages, 1)}
    grid = {(cell.model, cell.recipe): cell for cell in cells}
    models = list(dict.fromkeys(cell.model for cell in cells))

    def rows(show: Callable[[Cell], str], first: Callable[[list[Cell]], str] | None = None) -> str:
        heads = ["Architecture", *(["unquantized"] if first else []), *recipes]
        lines = [heads, ["---"] * len(heads)]
        for model in models:
            found = [grid.get((model, recipe)) for recipe in recipes]
            shown = ["(not made yet)" if cell is None else show(cell) for cell in found]
            lines.append([model, *([first([cell for cell in found if cell])] if first else []), *shown])
        return "".join(f"| {' | '.join(line)} |\n" for line in lines)

    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "lm_eval")
    where = f"{versions}, Python {platform.python_version()}, {platform.machine()} CPU"
    words = "".join(f"\n{number} `{message}`\n" for message, number in notes.items())
    return (
        HEAD.format(limit=LIMIT, versions=where)
        + f"\n{rows(lambda cell: _result(cell, notes), _source)}{words}"
        + f"{PARITY}\n{rows(_parity)}"
        + f"{DOUBLED.format(limit=LIMIT)}\n{rows(_doubled)}"
    )


def _result(cell: Cell, notes: dict[str, str]) -> str:
    if cell.verdict == "unserved":
        return notes[cell.message]
    if cell.verdict == "failed":
        return f"FAILED: {cell.message}".replace("|", "\\|")
    share = "" if cell.tokens == cell.of_tokens else f", {cell.tokens} of {cell.of_tokens} tokens"
    return f"passed ({cell.error:.2f}{share})"


def _source(cells: list[Cell]) -> str:
    errors = [cell.source_error for cell in cells if cell.source_error is not None]
    return f"{errors[0]:.3f}" if errors else "not served"


def _parity(cell: Cell) -> str:
    if not cell.parameters:
        return "not asked"
    return f"{cell.tensors}/{cell.parameters}"


def _doubled(cell: Cell) -> str:
    return "not served" if cell.doubled_error is None else f"{cell.doubled_error:.2f}"
