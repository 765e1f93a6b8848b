"""Puts every decoder that transformers knows, made tiny, through fp8pipe, and holds the results against others' words.

    python -m benchmarks.zoo [--types NAME,...] [--fraction N] [--recipes NAME,...] [--work DIR] [--resume] [--vllm]
                             [--page FILE]

`--fraction 10`: every tenth architecture. Rows are kept in the work folder as they come (rows.jsonl), so that a run in
parts makes one page; the last row of a type counts. Exit status 1 if a row is wrong: neither right, nor refused with a
reason. `--page` writes the page from all rows that are kept.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from benchmarks.zoo.rows import Cell, Row
    from fp8pipe.config import Recipe
    from fp8pipe.oracle.vllm import Answer, Mismatch

ROOT = Path(__file__).parents[2]
RECIPES = "fp8-dynamic,fp8-block,fp8-static-kv"
AT_ONCE = 12
"""Architectures whose checkpoints lie on the disk together, and go to vLLM in one process."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--types", help="only these, comma-separated")
    parser.add_argument("--fraction", type=int, default=1, help="every n-th only")
    parser.add_argument("--recipes", default=RECIPES, help="comma-separated")
    parser.add_argument("--work", type=Path, default=ROOT / "work" / "zoo")
    parser.add_argument("--page", type=Path, help="write the page there")
    parser.add_argument("--resume", action="store_true", help="leave out architectures whose rows are kept")
    parser.add_argument("--vllm", action="store_true", help="ask vLLM's loader about the checkpoints that were made")
    options = parser.parse_args()

    from benchmarks.zoo import models

    names = options.types.split(",") if options.types else models.all_names()[:: options.fraction]
    options.work.mkdir(parents=True, exist_ok=True)
    if options.resume:
        names = sorted(set(names) - {row.name for row in read(options.work / "rows.jsonl")})
    rows = []
    for start in range(0, len(names), AT_ONCE):
        made = make(names[start : start + AT_ONCE], options.recipes.split(","), options.work)
        if options.vllm:
            ask_vllm(made)
        with (options.work / "rows.jsonl").open("a") as kept:
            kept.writelines(json.dumps(dataclasses.asdict(row)) + "\n" for row in made)
        shutil.rmtree(options.work / "models", ignore_errors=True)
        rows += made
    if options.page:
        from benchmarks.zoo.page import page

        options.page.write_text(page(read(options.work / "rows.jsonl")))
    sys.exit(1 if list(_faults(rows)) else 0)


def make(names: Iterable[str], recipe_names: Iterable[str], work: Path) -> list[Row]:
    """A row for each name. Sources and checkpoints stay in `work`."""
    import compressed_tensors.quantization  # noqa: F401  validate then asks its parser in this process
    import transformers

    from benchmarks.zoo.models import write_rows
    from benchmarks.zoo.rows import make_row

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    recipes = [_recipe(name, write_rows(work / "rows.txt")) for name in recipe_names]
    rows = []
    for name in names:
        row = make_row(name, recipes, work / "models", _report)
        if row.not_built:
            _report(f"{name}: not built: {row.not_built}")
        rows.append(row)
    return rows


def _recipe(name: str, data: Path) -> Recipe:
    """A shipped recipe, calibrated on rows made here; no expert is shown tokens that the router does not give it."""
    from benchmarks.zoo.models import CALIBRATION_ROWS
    from fp8pipe.config import CalibrationSpec, load_recipe

    spec = CalibrationSpec(
        dataset=str(data), split="train", num_samples=CALIBRATION_ROWS, max_seq_len=32, min_expert_tokens=0
    )
    return load_recipe(name).model_copy(update={"calibration": spec})


def ask_vllm(rows: Iterable[Row]) -> None:
    """Fill in what vLLM's loader says of every checkpoint, and of the source where it takes a checkpoint not whole."""
    cells = {Path(cell.folder): cell for row in rows for cell in row.cells.values() if not cell.exit_code}
    answers = _answers(list(cells))
    sources = _answers(list({folder.with_name("source") for folder in cells if _unlike(answers[folder])}))
    for folder, cell in cells.items():
        answer, source = answers[folder], sources.get(folder.with_name("source"))
        limit = _limit(answer) or (source is not None and _limit(source)) or ""
        known = {_place(found) for found in source.mismatches} if source is not None else set()
        own = [found for found in answer.mismatches if _place(found) not in known]
        cell.vllm_builds = not limit
        cell.vllm = limit or (own[0].sentence() if own else "as source" if known else "ok")
        if own and not limit:
            _refuse(cell, folder)


def _place(found: Mismatch) -> tuple[str, str, str]:
    return found.kind, found.tensor, found.parameter


def _refuse(cell: Cell, folder: Path) -> None:
    """What `fp8pipe quantize` says of a checkpoint that vLLM does not read: it asks vLLM before it reads a weight."""
    from fp8pipe import stages
    from fp8pipe.config import load_recipe
    from fp8pipe.errors import Fp8PipeError

    try:
        stages.plan(stages.pin(str(folder.with_name("source"))), load_recipe(folder.name))
    except Fp8PipeError as error:
        cell.exit_code, cell.message = error.exit_code, str(error)


def _answers(folders: list[Path]) -> dict[Path, Answer]:
    """By folder; a model that ends vLLM's process is asked about alone."""
    from fp8pipe.errors import EngineFailed
    from fp8pipe.oracle.vllm import Answer, ask_vllm

    if not folders:
        return {}
    try:
        return ask_vllm(folders)
    except EngineFailed as error:
        if len(folders) == 1:
            return {folders[0]: Answer((), (), (), refusal=str(error))}
        half = len(folders) // 2
        return _answers(folders[:half]) | _answers(folders[half:])


def _unlike(answer: Answer) -> bool:
    return bool(answer.mismatches or _limit(answer))


def _limit(answer: Answer) -> str:
    return answer.refusal or answer.limit or (answer.lacks and f"vLLM lacks {answer.lacks}")


def read(path: Path) -> list[Row]:
    """The last row of each type, in alphabetical order."""
    from benchmarks.zoo.rows import Cell, Row

    found = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        fields = json.loads(line)
        fields["cells"] = {name: Cell(**cell) for name, cell in fields["cells"].items()}
        found[fields["name"]] = Row(**fields)
    return [found[name] for name in sorted(found)]


def _faults(rows: Iterable[Row]) -> Iterable[str]:
    from benchmarks.zoo.rows import wrong

    for row in rows:
        for recipe, cell in row.cells.items():
            if reason := wrong(cell):
                _report(f"WRONG {row.name} {recipe}: {reason}")
                yield row.name


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
