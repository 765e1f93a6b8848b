"""Puts every decoder that transformers knows, made tiny, through fp8pipe, and holds the results against others' words.

    python -m benchmarks.zoo [--types NAME,...] [--fraction N] [--recipes NAME,...] [--work DIR] [--page FILE]

`--fraction 10`: every tenth architecture. Results are kept in the work folder as they come (rows.jsonl).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="only these, comma-separated")
    parser.add_argument("--fraction", type=int, default=1, help="every n-th only")
    parser.add_argument("--recipes", default="fp8-dynamic,fp8-block", help="comma-separated")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "zoo")
    options = parser.parse_args()

    import transformers

    from benchmarks.zoo import models
    from benchmarks.zoo.rows import make_row
    from fp8pipe.config import load_recipe

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    names = options.types.split(",") if options.types else models.all_names()[:: options.fraction]
    recipes = [load_recipe(name) for name in options.recipes.split(",")]
    options.work.mkdir(parents=True, exist_ok=True)
    with (options.work / "rows.jsonl").open("a") as rows:
        for name in names:
            row = make_row(name, recipes, options.work / "models", _report)
            rows.write(json.dumps(dataclasses.asdict(row)) + "\n")
            rows.flush()
            if row.not_built:
                _report(f"{name}: not built: {row.not_built}")
    if not options.types:
        shutil.rmtree(options.work / "models", ignore_errors=True)


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
