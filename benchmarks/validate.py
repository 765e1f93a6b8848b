"""The validator against one sha256sum over the same bytes, and against quantizing.

    python -m benchmarks.validate [--layers 16] [--rounds 3] [--folder DIR]

The synthetic Llama of benchmarks.llama is quantized with each data-free recipe and validated: headers, values, and
fidelity to its source. sha256sum (one process, the checkpoint's files) and quantizing the same model alternate with
it, each in a process of its own. Times are of the call alone, with the records of architecture and config present;
rates are bytes of the checkpoint for values, of the source for fidelity and quantizing. Printed are medians, and ratios
within a round.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.contender import peak_mb
from benchmarks.llama import make_llama
from benchmarks.page import machine, prose, put, table

RECIPES = ("fp8-dynamic", "fp8-block", "autofp8-dynamic")


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the model and the checkpoints go")
    parser.add_argument("--page", type=Path, default=None, help="page to write the section into")
    parser.add_argument("--child", nargs=4, metavar=("WHAT", "RECIPE", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = make_llama(Path(scratch) / "source", options.layers)
        text = _measure(source, Path(scratch), options.rounds)
    if options.page:
        put(options.page, "Validate", text)
    print(text)


def _measure(source: Path, scratch: Path, rounds: int) -> str:
    """The section of the page."""
    source_bytes = _bytes_of(source)
    rows = []
    for recipe in RECIPES:
        output = scratch / recipe
        for what in ("quantize", "fidelity"):  # warm-up: page cache, compiled loops, records
            _run(what, recipe, source, output)
        runs: list[dict[str, dict[str, Any]]] = []
        for number in range(rounds):
            again = scratch / f"{recipe}-{number}"
            runs.append({what: _run(what, recipe, source, output) for what in ("headers", "values", "fidelity", "sha")})
            runs[-1]["quantize"] = _run("quantize", recipe, source, again)
            shutil.rmtree(again)
        rows.append(_row(recipe, runs, _bytes_of(output), source_bytes))
        print(*rows[-1], flush=True)
        shutil.rmtree(output)
    setting = f"{source_bytes / 1e9:.2f} GB of BF16 weights; {machine()}; medians of {rounds} rounds after a warm-up."
    return f"{prose(f'{setting} Made by `python -m benchmarks.validate`.')}\n\n{table(COLUMNS, rows)}"


COLUMNS = (
    *("recipe", "headers, s", "sha256sum, GB/s", "values, GB/s", "values / sha256sum"),
    *("quantize, GB/s", "fidelity, GB/s", "fidelity / quantize", "peak memory, MB", "of which imports"),
)


def _row(recipe: str, runs: list[dict[str, dict[str, Any]]], output_bytes: int, source_bytes: int) -> list[str]:
    def seconds(what: str) -> float:
        return statistics.median(run[what]["inside"] for run in runs)

    def ratio(floor: str, what: str) -> float:
        return statistics.median(run[floor]["inside"] / run[what]["inside"] for run in runs)

    return [
        recipe,
        f"{seconds('headers'):.3f}",
        f"{output_bytes / 1e9 / seconds('sha'):.2f}",
        f"{output_bytes / 1e9 / seconds('values'):.2f}",
        f"{ratio('sha', 'values'):.1f}",
        f"{source_bytes / 1e9 / seconds('quantize'):.2f}",
        f"{source_bytes / 1e9 / seconds('fidelity'):.2f}",
        f"{ratio('quantize', 'fidelity'):.2f}",
        f"{max(run['fidelity']['peak_mb'] for run in runs):.0f}",
        f"{max(run['fidelity']['imports_mb'] for run in runs):.0f}",
    ]


def _bytes_of(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _run(what: str, recipe: str, source: Path, output: Path) -> dict[str, Any]:
    """One child process."""
    command = [sys.executable, "-m", "benchmarks.validate", "--child", what, recipe, str(source), str(output)]
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(answer.stdout.splitlines()[-1])


def _child(what: str, recipe: str, source: str, output: str) -> None:
    inside = {"sha": _sha256sum, "quantize": _quantize}.get(what, _validate)
    seconds, imports_mb = inside(what, recipe, source, Path(output))
    print(json.dumps({"inside": seconds, "peak_mb": peak_mb(), "imports_mb": imports_mb}))


def _sha256sum(what: str, recipe: str, source: str, output: Path) -> tuple[float, float]:
    began = time.perf_counter()
    files = sorted(str(path) for path in output.glob("*.safetensors"))
    subprocess.run(["sha256sum", *files], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began, 0.0


def _quantize(what: str, recipe: str, source: str, output: Path) -> tuple[float, float]:
    """Plan to fsynced checkpoint: seconds without imports, and the peak after them."""
    import torch  # noqa: F401

    from fp8pipe import stages
    from fp8pipe.config import load_recipe
    from fp8pipe.quantize import quantize
    from fp8pipe.quantize.engine import run  # noqa: F401

    snapshot = stages.pin(source)
    imports_mb = peak_mb()
    began = time.perf_counter()
    plan = stages.plan(snapshot, load_recipe(recipe))
    quantize(snapshot, plan, output)
    return time.perf_counter() - began, imports_mb


def _validate(what: str, recipe: str, source: str, output: Path) -> tuple[float, float]:
    """Seconds without imports, and the peak after them; the report must be without an error."""
    import fp8pipe.validate.measuring.measure
    from fp8pipe import stages
    from fp8pipe.oracle.transformers import inspect
    from fp8pipe.validate import all_checks, validate

    all_checks()
    snapshot = stages.pin(source) if what == "fidelity" else None
    if snapshot is not None:
        import fp8pipe.validate.measuring.kernels  # noqa: F401

        inspect(snapshot)
    imports_mb = peak_mb()
    depth = "fidelity" if what == "fidelity" else "values" if what == "values" else "headers"
    began = time.perf_counter()
    report = validate(output, source=snapshot, depth=depth)
    seconds = time.perf_counter() - began
    assert report.sound, [finding.sentence() for finding in report.errors]
    return seconds, imports_mb


if __name__ == "__main__":
    main()
