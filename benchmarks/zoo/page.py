"""docs/architectures.md, from rows: a line of at most 80 columns for each architecture, and a legend of reasons."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from importlib.metadata import version

from benchmarks.zoo.rows import Cell, Row, unproven, wrong
from fp8pipe.oracle import vllm

_HEAD = """# Architectures

<!-- Written by `python -m benchmarks.zoo`; edits are lost. -->

Does fp8pipe quantize this architecture, and is the result right? Every decoder
of transformers {transformers} is built from its own config class with every
size made small, given random weights, and put through the shipped recipes. The
results are held against what shares no knowledge with fp8pipe: transformers'
own loader, its logits, plain hooks on the whole model, and the loader of
vLLM {vllm}.

{summary}

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
- **vLLM**: `ok`: every tensor lands whole in a parameter of vLLM's own model;
  `src`: but for tensors of the source that vLLM does not take either; a number:
  vLLM does not build the model here.
- **MTP**: the class leaves out a predicting layer, so one was added; `kept`: it
  stays in 16 bits, and every name below it is left out of quantization.

Numbers in brackets are reasons, below the table.

"""


def page(rows: Sequence[Row]) -> str:
    """The page."""
    built = [row for row in rows if not row.not_built]
    legend: dict[str, int] = {}
    lines = [_line(["type", "FP8", "check", "share", "weight", "logits", "block", "static", "vLLM", "MTP"])]
    lines.append("| --- |" + " ---: |" * 9)
    lines += [_line([row.name, *_cells(row, legend)]) for row in built]
    reasons = "".join(_wrapped(f"- [{number}] {reason}") for reason, number in legend.items())
    missing = "".join(_wrapped(f"- `{row.name}`: {row.not_built}") for row in rows if row.not_built)
    head = _HEAD.format(
        transformers=version("transformers"),
        vllm=(vllm.version() or "").partition("+")[0],
        summary=textwrap.fill(_summary(built), 80, break_long_words=False, break_on_hyphens=False),
    )
    parts = [head + "\n".join(lines), f"## Reasons\n\n{reasons}", f"## Not built\n\n{missing}"]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _summary(rows: Sequence[Row]) -> str:
    """How many are right, refused, unproven and wrong, under any of the recipes."""
    wrongs = [row.name for row in rows if any(map(wrong, row.cells.values()))]
    unprovens = [row.name for row in rows if row.name not in wrongs and any(map(unproven, row.cells.values()))]
    rest = [row for row in rows if row.name not in {*wrongs, *unprovens}]
    refused = [row.name for row in rest if all(cell.exit_code for cell in row.cells.values())]
    partly = [row.name for row in rest if row.name not in refused and any(c.exit_code for c in row.cells.values())]
    said = (
        f"Of {len(rows)} architectures, {len(rest) - len(refused) - len(partly)} are right under every recipe, "
        f"{len(partly)} are right under some and refused with a reason under others, and {len(refused)} are refused "
        "with a reason under all."
    )
    return said + _list(" Unproven", unprovens) + _list(" Wrong", wrongs)


def _list(title: str, names: Sequence[str]) -> str:
    return f"{title} ({len(names)}): {', '.join(names)}." if names else f"{title}: none."


def _cells(row: Row, legend: dict[str, int]) -> list[str]:
    def note(reason: str) -> str:
        return f"[{legend.setdefault(reason, len(legend) + 1)}]"

    plain, block, static = (row.cells.get(name) for name in ("fp8-dynamic", "fp8-block", "fp8-static-kv"))
    if plain is None or plain.exit_code:
        refused = "" if plain is None else f"{plain.exit_code} {note(_short(plain.message))}"
        return [refused or "?", *["-"] * 4, *(_other(cell, note) for cell in (block, static)), "-", "-"]
    share = f"{100 * plain.share:.0f}"
    weight = note(plain.faults[0]) if plain.faults else f"{max(plain.weight_error, plain.kept_error):.3f}"
    weight = note(f"not comparable: {plain.incomparable[0]}") if plain.incomparable and not plain.faults else weight
    errors = f"{len(plain.errors)} {note(_short(plain.errors[0]))}" if plain.errors else "0"
    shown = "-" if plain.logits_error is None else f"{plain.logits_error:.2f}"
    lands = {"ok": "ok", "as source": "src", "": "?"}.get(plain.vllm) or note(_short(plain.vllm))
    kept = plain.predictor if plain.predictor in ("", "kept") else note(plain.predictor)
    others = (_other(block, note), _other(static, note))
    return ["ok", errors, share, weight, shown, *others, lands, kept or "-"]


def _other(cell: Cell | None, note: Callable[[str], str]) -> str:
    if cell is None:
        return "?"
    if cell.exit_code:
        return f"{cell.exit_code} {note(_short(cell.message))}"
    if cell.errors:
        return f"{len(cell.errors)} {note(_short(cell.errors[0]))}"
    if wrong(cell):
        return note(_short(wrong(cell)))
    return f"{100 * max(cell.input_error, cell.kv_error):.1f}" if cell.inputs or cell.kv else "ok"


def _short(text: str) -> str:
    """One line of at most 240 characters."""
    words = " ".join(text.split())
    return textwrap.shorten(words, 240, placeholder=" ...")


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _wrapped(text: str) -> str:
    return textwrap.fill(text, 80, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False) + "\n"
