"""Prove that another version of this repository makes the same checkpoints.

    python -m benchmarks.same_bytes OTHER_CHECKOUT [--model NAME]... [--recipe NAME]... [--work DIR]

OTHER_CHECKOUT is a folder with the other version. Tiny models of very different architectures (MODELS) are quantized
with every recipe that either version ships, calibrated ones on a few local rows, by the command line of each version.
The sha256 of every file that a loader reads must be the same, and so must the fingerprint in fp8pipe/checkpoint.json;
a model that one version refuses, the other must refuse too. Prints a table; exit status 1 unless all rows are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import table
from benchmarks.served import models

HERE = Path(__file__).parent.parent

MODELS = ("Llama, tied", "Phi-3", "Mixtral", "Granite MoE", "DeepSeek-V2")
"""Dense with tied embeddings; fused projections on disk; one tensor per expert; all experts in one 3-D tensor; latent
attention with shared experts."""

REFUSED = 2
"""Exit code for a model that a recipe cannot be applied to."""

COMMAND = "from fp8pipe.cli import main; main()"


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one version made of one model under one recipe."""

    exit_code: int
    files: Mapping[str, str]
    """File name -> sha256; the fingerprint under its own key. Empty for a refusal."""
    message: str
    """What it wrote to stderr."""


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, metavar="OTHER_CHECKOUT")
    parser.add_argument("--model", action="append", choices=MODELS, help="only this one (repeatable)")
    parser.add_argument("--recipe", action="append", help="only this one (repeatable)")
    parser.add_argument("--work", type=Path, default=None, help="folder for temporary models and checkpoints")
    options = parser.parse_args()
    checkouts = (HERE, options.other.resolve())
    recipes = [name for name in shipped_recipes(checkouts) if name in (options.recipe or [name])]
    with tempfile.TemporaryDirectory(dir=options.work, prefix="fp8pipe-same-bytes-") as scratch:
        rows = list(compared(checkouts, options.model or MODELS, recipes, Path(scratch)))
    print(table(["model", "recipe", "files", "result"], rows))
    sys.exit(not all(row[-1].startswith("same") for row in rows))


def shipped_recipes(checkouts: tuple[Path, Path]) -> list[str]:
    """Names of the recipes that at least one checkout ships."""
    return sorted({path.stem for root in checkouts for path in (root / "configs" / "recipes").glob("*.yaml")})


def compared(
    checkouts: tuple[Path, Path], model_names: tuple[str, ...] | list[str], recipes: list[str], work: Path
) -> Iterator[list[str]]:
    """A row of the table for each model and recipe."""
    data = models.write_calibration(work / "calibration.txt")
    for model in model_names:
        source = models.make(model, work / "model" / model.replace(" ", "-"))
        for recipe in recipes:
            ours, theirs = (
                quantized(root, source, recipe, data, work / f"checkout-{number}")
                for number, root in enumerate(checkouts)
            )
            verdict = judged(ours, theirs)
            print(f"{model}, {recipe}: {verdict}", file=sys.stderr, flush=True)
            yield [model, recipe, str(len(ours.files)), verdict]


def quantized(checkout: Path, source: Path, recipe: str, data: Path, work: Path) -> Outcome:
    """Run `fp8pipe quantize` of `checkout`, hash its checkpoint, and remove it."""
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        output = Path(scratch) / "checkpoint"
        arguments = ["quantize", source, "--recipe", checkout / "configs" / "recipes" / f"{recipe}.yaml"]
        arguments += ["--output", output, "--device", "cpu"]
        arguments += ["--dataset", data, "--num-samples", "16", "--max-seq-len", "32"]
        command = [sys.executable, "-c", COMMAND, *map(str, arguments)]
        own = {"PYTHONPATH": str(checkout), "FP8PIPE_CACHE": str(work / "cache"), "OMP_NUM_THREADS": "1"}
        answer = subprocess.run(command, env=os.environ | own, cwd=scratch, capture_output=True, text=True, check=False)
        files = dict(contents(output)) if answer.returncode == 0 else {}
        words = " ".join(answer.stderr.split())
    return Outcome(answer.returncode, files, words)


def contents(folder: Path) -> Iterator[tuple[str, str]]:
    """sha256 of every file of a checkpoint but its records, and the fingerprint that these give it."""
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    yield "fingerprint", json.loads((folder / "fp8pipe" / "checkpoint.json").read_text())["fingerprint"]


def judged(ours: Outcome, theirs: Outcome) -> str:
    """`same`, or what differs."""
    if ours.exit_code != theirs.exit_code:
        codes = f"exit code {ours.exit_code} here, {theirs.exit_code} there"
        return f"DIFFERENT: {codes}: {(ours.message or theirs.message)[-300:]}"
    if ours.exit_code not in (0, REFUSED):
        return f"FAILED with exit code {ours.exit_code}: {ours.message[-300:]}"
    if ours.exit_code:
        return f"same: both refuse with exit code {ours.exit_code}: {ours.message[-120:]}"
    names = sorted(ours.files.keys() | theirs.files.keys())
    different = [name for name in names if ours.files.get(name) != theirs.files.get(name)]
    return f"DIFFERENT: {', '.join(different)}" if different else "same"


if __name__ == "__main__":
    main()
