"""Every shipped recipe on a real pretrained model: quantized, validated, loaded by transformers, scored in vLLM.

    python -m benchmarks.real_model [--folder DIR] [--only NAME ...] [--kept] [--page docs/real-model.md]

The model, 2,000 questions with four answers each, and the texts come from `make.py`. Each configuration is calibrated
on 200 texts and scored against the bf16 model, paired question by question. The observers are compared on the recipe
with static activations and an FP8 KV cache, by their distance from the bf16 model, which tells them apart where answers
do not. One evaluation takes some fifteen minutes on two cores; finished ones in DIR are not repeated, so that the
benchmark can be stopped and run again. `--kept` measures nothing and shows what DIR has.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import page
from benchmarks.real_model.make import QUESTIONS, make
from fp8pipe import stages
from fp8pipe.config import EvalSuite, Recipe, TaskSpec, load_recipe

if TYPE_CHECKING:
    from fp8pipe.records import EvalReport

RECIPES = ("fp8-dynamic", "fp8-static", "fp8-static-kv", "fp8-block", "autofp8-dynamic", "autofp8-static")
OBSERVED = "fp8-static-kv"
OBSERVERS = ("percentile", "mse")
CALIBRATION_TEXTS = 200

TASK = """
task: glosses
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "Definition: {{{{gloss}}}}\\nWord:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
num_fewshot: 0
metadata: {{version: 1.0}}
"""


def configurations(texts: Path) -> dict[str, Recipe]:
    """What is compared, by name: the shipped recipes, and one of them with other observers of inputs and KV cache."""
    data = {"dataset": str(texts.resolve()), "split": "train", "num_samples": CALIBRATION_TEXTS, "max_seq_len": 512}
    recipes = {name: load_recipe(name) for name in RECIPES}
    for observer in OBSERVERS:
        changed: dict[str, Any] = recipes[OBSERVED].model_dump() | {"name": f"{OBSERVED}-{observer}"}
        changed["activations"] |= {"observer": observer}
        changed["kv_cache"] |= {"observer": observer}
        recipes[f"{OBSERVED}, {observer}"] = Recipe.model_validate(changed)
    return {
        name: Recipe.model_validate(recipe.model_dump() | {"calibration": recipe.calibration.model_dump() | data})
        for name, recipe in recipes.items()
    }


def suite(folder: Path) -> EvalSuite:
    """The questions as a suite of one task. The model answers nonsense without BOS, which suites add by default."""
    tasks = folder / "tasks"
    tasks.mkdir(exist_ok=True)
    (tasks / "glosses.yaml").write_text(TASK.format(data=(folder / "glosses.jsonl").resolve()))
    return EvalSuite(
        name="glosses",
        tasks={"glosses": TaskSpec(documents=QUESTIONS)},
        task_dir=str(tasks),
        engine={"max_model_len": 256},
        sample_prompts=(),
    )


def measured(name: str, recipe: Recipe, folder: Path, baseline: EvalReport, *, kept: bool) -> list[str]:
    """One row of the table. kept: without what would have to be measured."""
    source, checkpoint = folder / "model", folder / name.replace(", ", "-")
    stages.quantize_model(str(source), recipe, checkpoint)
    report = stages.validate_model(str(checkpoint), source=str(source))
    findings = f"{len(report.errors)} errors" if report.errors else "sound"
    row = [name, findings, *_distance(source, folder / "texts.jsonl", checkpoint, kept=kept)]
    scores = folder / f"{checkpoint.name}-evaluation"
    if name not in RECIPES or (kept and not (scores / "report.json").exists()):
        return [*row, "-", "-", "-"]
    return [*row, *_scores(baseline, stages.evaluate_candidate(checkpoint, suite(folder), scores))]


def _distance(source: Path, texts: Path, checkpoint: Path, *, kept: bool) -> tuple[str, str]:
    found = checkpoint.with_name(f"{checkpoint.name}-distance.json")
    if json.loads((checkpoint / "config.json").read_text())["quantization_config"]["quant_method"] == "fp8":
        return "vLLM only", "-"
    if kept and not found.exists():
        return "-", "-"
    if not found.exists():
        command = [sys.executable, "-m", "benchmarks.real_model.distance", source, texts, checkpoint]
        answer = subprocess.run(command, check=True, capture_output=True, text=True)
        found.write_text(answer.stdout.splitlines()[-1])
    apart = json.loads(found.read_text())
    return f"{1e3 * apart['kl']:.1f} ± {1e3 * apart['error']:.1f}", f"{apart['same']:.1%}"


def _scores(baseline: EvalReport, candidate: EvalReport) -> tuple[str, str, str]:
    """Accuracy, drop in points with its 95 % interval, and questions lost and won."""
    import numpy as np

    from fp8pipe.gate.statistics import paired_test

    one, other = (np.asarray(_answers(report)) for report in (baseline, candidate))
    test = paired_test(one, other, (), 0.0)
    low, high = 100 * test.lower(0.025), 100 * test.upper(0.025)
    lost, won = int((one > other).sum()), int((one < other).sum())
    return f"{other.mean():.4f}", f"{100 * test.drop:+.2f} ({low:+.2f} to {high:+.2f})", f"{lost} / {won}"


def _answers(report: EvalReport) -> tuple[float, ...]:
    task = report.task("glosses")
    samples: Any = task.samples_of("acc", "none") if task is not None else None
    return samples.values


HEAD = ("recipe", "validate", "KL", "same", "accuracy", "drop, points", "lost / won")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/real-model-runs"))
    parser.add_argument("--only", nargs="+", metavar="NAME", help="configurations to measure; by default all")
    parser.add_argument("--kept", action="store_true", help="measure nothing, show what DIR has")
    parser.add_argument("--page", type=Path, help="guide whose section `Results` is replaced")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = make(options.folder.resolve())
    snapshot = stages.pin(str(folder / "model"))
    (baseline,) = stages.evaluate_baseline(snapshot, suite(folder), stages.Workspace(folder / "work"))
    accuracy = sum(_answers(baseline)) / QUESTIONS
    print(f"bf16: {accuracy:.4f}", flush=True)
    rows = []
    for name, recipe in configurations(folder / "texts.jsonl").items():
        if options.only is None or name in options.only:
            rows.append(measured(name, recipe, folder, baseline, kept=options.kept))
            print(*rows[-1], sep=" | ", flush=True)
    text = f"{page.prose(_intro(accuracy))}\n\n{page.table(HEAD, rows)}"
    print(text)
    if options.page is not None:
        page.put(options.page, "Results", text)


def _intro(accuracy: float) -> str:
    return (
        f"Gemma 3 270M, {QUESTIONS:,} questions from WordNet (which of four words has this definition), scored in vLLM "
        f"on a CPU ({page.machine()}). The bf16 model answers {accuracy:.4f} of them. Static ranges come from "
        f"{CALIBRATION_TEXTS} texts. KL is in 1e-3 nats per token, from the bf16 model, on other texts, as "
        "transformers serves the checkpoint; `same` is how often the best token is the same. Drops have 95 % "
        "intervals. The weights come from a 4-bit file, so they lie on few values: what activations and KV cache cost "
        "is real, what weights cost may be less than on other models. Made by `python -m benchmarks.real_model`."
    )


if __name__ == "__main__":
    main()
