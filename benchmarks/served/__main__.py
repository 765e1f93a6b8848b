"""Writes docs/served.md: every architecture under every shipped recipe, quantized, validated, served, compared.

    python -m benchmarks.served [--model NAME]... [--recipe NAME]... [--again] [--work DIR] [--output FILE]

Results of earlier runs are kept: a cell is made again only if its plan, a library or a kernel of the CPU platform has
changed, or with --again. The page has every row that is complete. Exit status 1 if a cell failed.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from benchmarks.served import models
from benchmarks.served.cells import ROOT, Cell, known_cell, make_cells, shipped_recipes
from benchmarks.served.table import table
from fp8pipe.config import Recipe


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", choices=list(models.MODELS), help="only this one (repeatable)")
    parser.add_argument("--recipe", action="append", help="only this one (repeatable)")
    parser.add_argument("--again", action="store_true", help="make cells again even if nothing has changed")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "served")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "served.md")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    recipes = shipped_recipes(options.work)
    cells = {
        (model, recipe.name): (recipe, known_cell(options.work, model, recipe))
        for model in models.MODELS
        for recipe in recipes
    }
    wanted = [
        (model, recipe)
        for (model, name), (recipe, known) in cells.items()
        if model in (options.model or models.MODELS)
        and name in (options.recipe or name)
        and (options.again or not known)
    ]
    made = {(cell.model, cell.recipe): cell for cell in make_cells(wanted, options.work, _report)}
    found = {place: made.get(place, known) for place, (_, known) in cells.items()}
    _finish([cell for cell in found.values() if cell is not None], recipes, options.output)


def _finish(cells: list[Cell], recipes: list[Recipe], output: Path) -> None:
    """Write the complete rows and name the other architectures."""
    made = Counter(cell.model for cell in cells)
    whole = [cell for cell in cells if made[cell.model] == len(recipes)]
    output.parent.mkdir(exist_ok=True)
    output.write_text(table(whole, [recipe.name for recipe in recipes]))
    print(f"{output}: {len(whole)} cells")
    if missing := [model for model in models.MODELS if made[model] < len(recipes)]:
        print(f"left out, because some of their cells were not made: {', '.join(missing)}")
    sys.exit(any(cell.verdict == "failed" for cell in cells))


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
