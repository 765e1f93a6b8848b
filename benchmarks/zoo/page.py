"""docs/architectures.md, from rows: a line of at most 80 columns for each architecture, and a legend of reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version

from benchmarks.zoo.rows import Cell, Row, wrong
from fp8pipe.oracle import vllm

_HEAD = """# Architectures

<!-- Written by `python -m benchmarks.zoo`; edits are lost. -->

Does fp8pipe quantize this architecture, and is the result right? Every decoder
of transformers {transformers} is built from its own config class with every
size made small, given random weights, and put through the shipped recipes. The
results are held against what shares no knowledge with fp8pipe: transformers'
own loader, its logits, plain hooks on the whole model, and the loader of
vLLM {vllm}.

{right} of {built} architectures are right under `fp8-dynamic` or refused with a
reason{wrong}.

- **FP8**: `fp8-dynamic`: `ok`, or the exit code and the reason of a refusal.
- **check**: what `validate` finds, with the source: number of errors.
- **share**: of the decoder's Linear and expert parameters, percent in FP8.
- **weight**: the worst relative error of a parameter as transformers' loader
  maps it, dequantized. E4M3 costs 0.026. Parameters kept in 16 bits are equal.
- **logits**: relative error of transformers' logits with those weights; `-`:
  the model does not take text alone.
- **block**: the same checks under `fp8-block`.
- **static**: `fp8-static-kv`: largest relative difference, in percent, between
  a static scale (Linears, experts, keys and values) and plain hooks.
- **vLLM**: every tensor lands whole in a parameter of vLLM's own model.

Numbers in brackets are reasons, below the table.

"""


def page(rows: Sequence[Row]) -> str:
    """The page."""
    built = [row for row in rows if not row.not_built]
    legend: dict[str, int] = {}
    lines = [_line(["type", "FP8", "check", "share", "weight", "logits", "block", "static", "vLLM"])]
    lines.append("| --- |" + " ---: |" * 8)
    lines += [_line([row.name, *_cells(row, legend)]) for row in built]
    reasons = "".join(_wrapped(f"- [{number}] {reason}") for reason, number in legend.items())
    missing = "".join(_wrapped(f"- `{row.name}`: {row.not_built}") for row in rows if row.not_built)
    bad = [row.name for row in built if any(wrong(cell) for cell in row.cells.values())]
    head = _HEAD.format(
        transformers=version("transformers"),
        vllm=(vllm.version() or "").partition("+")[0],
        right=len(built) - len(bad),
        built=len(built),
        wrong=f"; not {', '.join(bad)}" if bad else "",
    )
    parts = [head + "\n".join(lines), f"## Reasons\n\n{reasons}", f"## Not built\n\n{missing}"]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _cells(row: Row, legend: dict[str, int]) -> list[str]:
    def note(reason: str) -> str:
        return f"[{legend.setdefault(reason, len(legend) + 1)}]"

    plain, block, static = (row.cells.get(name) for name in ("fp8-dynamic", "fp8-block", "fp8-static-kv"))
    if plain is None or plain.exit_code:
        refused = "" if plain is None else f"{plain.exit_code} {note(_short(plain.message))}"
        return [refused or "?", *["-"] * 5, *(_other(cell, note) for cell in (block, static)), "-"][:8]
    share = f"{100 * plain.share:.0f}"
    weight = note(plain.faults[0]) if plain.faults else f"{max(plain.weight_error, plain.kept_error):.3f}"
    weight = note(f"not comparable: {plain.incomparable[0]}") if plain.incomparable and not plain.faults else weight
    errors = f"{len(plain.errors)} {note(_short(plain.errors[0]))}" if plain.errors else "0"
    shown = "-" if plain.logits_error is None else f"{plain.logits_error:.2f}"
    lands = plain.vllm if plain.vllm in ("ok", "") else note(_short(plain.vllm))
    return ["ok", errors, share, weight, shown, _other(block, note), _other(static, note), lands or "?"]


def _other(cell: Cell | None, note: Callable[[str], str]) -> str:
    if cell is None:
        return "?"
    if cell.exit_code:
        return f"{cell.exit_code} {note(_short(cell.message))}"
    if cell.errors:
        return f"{len(cell.errors)} {note(_short(cell.errors[0]))}"
    if cell.inputs or cell.kv:
        return f"{100 * max(cell.input_error, cell.kv_error):.1f}"
    return note(wrong(cell)) if wrong(cell) else "ok"


def _short(text: str) -> str:
    """One line without the folder of this run."""
    words = " ".join(text.split())
    return textwrap.shorten(words, 240, placeholder=" ...")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) + "\n"
