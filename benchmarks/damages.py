"""The gate on damage of known size: the demo's checkpoint, spoilt in one place at a time, measured and judged.

    python -m benchmarks.damages [--work DIR] [--page docs/gate-damages.md]

Trains the demo's model, quantizes it, and measures the base model twice, the checkpoint, and every spoilt copy of it,
each in a vLLM engine of its own. The gate decides on the 2,000 questions of the suite `demo`. Other questions give the
true drop: 20,000 where the expected verdict depends on it, otherwise 2,000. The command writes the page and, beside it,
the counts that it is made from (JSON). What `--work` already holds is neither made nor measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from benchmarks import page
from fp8pipe import stages
from fp8pipe.config import EvalSuite, TaskSpec, load_policy, load_recipe, load_suite
from fp8pipe.evaluate import evaluate, request_for
from fp8pipe.records import EvalReport, GateDecision, Record, TaskDecision, Verdict
from fp8pipe.rehearsal.demo import model, task

PAGE = Path(__file__).parent.parent / "docs" / "gate-damages.md"
COUNTS = PAGE.with_suffix(".json")
"""The counts that the page is made from."""
TRUTH = "arrows_truth"
TRUTH_SAMPLES = 20_000
TRUTH_SEED = 4
"""Differs from the seeds of training, calibration and suite."""
TRUTH_LEVEL = 0.05
"""Probability outside the interval of the true drop, half of it on each side."""

# ---------------------------------------------------------------------------------------------- damages

Expected = Literal["accepted", "rejected", "vetoed", "truth"]
LINEAR = "model.layers.1.self_attn.o_proj"
"""The Linear that is spoilt. vLLM does not fuse it, so no other Linear shares its scale."""


@dataclass(frozen=True)
class Damage:
    """One way to spoil a checkpoint folder in place, and the verdict that it should get."""

    name: str
    expected: Expected
    spoil: Callable[[Path], None]


def leave(folder: Path) -> None:
    """Spoil nothing."""


def scale_times(factor: float, folder: Path) -> None:
    """Multiply one weight scale by a wrong factor."""
    _change(folder, lambda name, scale: scale * factor if name == f"{LINEAR}.weight_scale" else scale)


def shuffle_codes(folder: Path) -> None:
    """Permute the codes of one weight [out, in]."""
    import torch

    def shuffled(name: str, codes: torch.Tensor) -> torch.Tensor:
        if name != f"{LINEAR}.weight":
            return codes
        order = torch.randperm(codes.numel(), generator=torch.Generator().manual_seed(0))
        return codes.view(torch.uint8).flatten()[order].view(codes.shape).view(codes.dtype)

    _change(folder, shuffled)


def small_k_scales(folder: Path) -> None:
    """Divide every k_scale by 10, so that cached keys are clipped."""
    _change(folder, lambda name, scale: scale / 10 if name.endswith(".k_scale") else scale)


def begin_with_eos(folder: Path) -> None:
    """Make the tokenizer take </s> for its BOS token, and put it in front of every text.

    Both files must agree: for a BOS token, lm-eval rebuilds the rule in tokenizer.json from the token in the config.
    """
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    bos, eos = model.SPECIAL[model.BOS], model.SPECIAL[model.EOS]
    processor = json.dumps(content["post_processor"]).replace(json.dumps(bos), json.dumps(eos))
    content["post_processor"] = json.loads(processor.replace(f'"ids": [{model.BOS}]', f'"ids": [{model.EOS}]'))
    path.write_text(json.dumps(content))
    _edit_json(folder / "tokenizer_config.json", [], {"bos_token": eos})


def quantize_head(folder: Path) -> None:
    """Quantize lm_head to FP8 with one scale for the tensor, which vLLM reads if a group targets it by name."""
    import torch

    def quantized(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = tensors["lm_head.weight"].float()
        scale = head.abs().max() / torch.finfo(torch.float8_e4m3fn).max
        codes = (head / scale).to(torch.float8_e4m3fn)
        return tensors | {"lm_head.weight": codes, "lm_head.weight_scale": scale.reshape(1)}

    shard = _index(folder)["lm_head.weight"]
    _rewrite(folder / shard, quantized)
    _edit_json(folder / "model.safetensors.index.json", ["weight_map"], {"lm_head.weight_scale": shard})
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    group = settings["config_groups"]["group_0"]
    on_the_fly = group["input_activations"] | {"strategy": "token", "dynamic": True, "observer": None}
    head_group = group | {"targets": ["re:.*lm_head"], "input_activations": on_the_fly}
    _edit_json(folder / "config.json", ["quantization_config", "config_groups"], {"group_1": head_group})
    _edit_json(folder / "config.json", ["quantization_config"], {"ignore": []})


DAMAGES = (
    Damage("none", "truth", leave),
    Damage("one weight scale x1.5", "truth", partial(scale_times, 1.5)),
    Damage("one weight scale x4", "rejected", partial(scale_times, 4.0)),
    Damage("the codes of one Linear shuffled", "rejected", shuffle_codes),
    Damage("every k_scale 10 times too small", "rejected", small_k_scales),
    Damage("lm_head quantized, one scale per tensor", "truth", quantize_head),
    Damage("wrong BOS token in front of prompts", "vetoed", begin_with_eos),
)
ITSELF = "the base model, measured again"


def spoilt(sound: Path, damage: Damage, folder: Path) -> Path:
    """Copy a checkpoint and damage the copy. It keeps its records, like a checkpoint that is spoilt in transit."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(sound, unfinished)
    damage.spoil(unfinished)
    return unfinished.rename(folder)


def _index(folder: Path) -> dict[str, str]:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def _change(folder: Path, change: Callable[[str, Any], Any]) -> None:  # Any: torch.Tensor, imported late
    """Replace every tensor by `change(name, tensor)`."""
    for shard in set(_index(folder).values()):
        _rewrite(folder / shard, lambda tensors: {name: change(name, value) for name, value in tensors.items()})


def _rewrite(path: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    from safetensors.torch import load_file, save_file

    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def _edit_json(path: Path, keys: list[str], update: dict[str, Any]) -> None:
    content = json.loads(path.read_text())
    place = content
    for key in keys:
        place = place[key]
    place.update(update)
    path.write_text(json.dumps(content, indent=2))


# ---------------------------------------------------------------------------------------------- measuring


class Counts(Record):
    """How both sides answered the questions that give the true drop."""

    n: int
    lost: int
    won: int

    def interval(self) -> tuple[float, float]:
        """Two-sided interval of the drop, from the score test inverted on both sides."""
        from fp8pipe.gate.statistics import score_test

        test = score_test(self.lost, self.won, self.n, margin=0.0)
        return test.lower(TRUTH_LEVEL / 2), test.upper(TRUTH_LEVEL / 2)


class Case(Record):
    """What one damage did, and how the gate decided."""

    damage: str
    expected: Expected
    verdict: Verdict
    vetoed: tuple[str, ...]
    same_tokenizer: bool
    """Whether both sides loaded the same tokenizer."""
    task: TaskDecision
    truth: Counts


class Cases(Record):
    """All cases of one run."""

    vllm: str
    cases: tuple[Case, ...]


def prepare(work: Path) -> tuple[Path, Path, EvalSuite]:
    """Make the base model, its sound checkpoint, and a suite of both kinds of questions."""
    base, checkpoint = model.build_base(work / "base"), work / "checkpoint"
    recipe = load_recipe("demo-fp8-static-kv")
    assert recipe.calibration is not None
    if not _is_written(work / "calibration"):
        task.build_calibration_dataset(work / "calibration")
    rows = {"dataset": str(work / "calibration" / "train.jsonl")}
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=rows)})
    stages.quantize_model(str(base), recipe, checkpoint)
    return base, checkpoint, _suite(work / "tasks")


def _suite(folder: Path) -> EvalSuite:
    """The suite `demo` with its rows in local files, and a second task of the same kind with other rows."""
    import yaml

    suite = load_suite("demo")
    ((name, spec),) = suite.tasks.items()
    assert suite.task_dir is not None and spec.samples == task.EVALUATION_SAMPLES
    config = yaml.safe_load((Path(suite.task_dir) / f"{name}.yaml").read_text())
    if not _is_written(folder / TRUTH):
        task.build_evaluation_dataset(folder / name)
        task.build_evaluation_dataset(folder / TRUTH, seed=TRUTH_SEED, samples=TRUTH_SAMPLES)
    for each in (name, TRUTH):
        rows = {"data_files": {"test": str(folder / each / "test.jsonl")}}
        local = config | {"task": each, "dataset_path": "json", "dataset_kwargs": rows}
        (folder / f"{each}.yaml").write_text(yaml.safe_dump(local))
    return EvalSuite(
        name=suite.name,
        tasks={name: TaskSpec(samples=spec.scored), TRUTH: TaskSpec(samples=TRUTH_SAMPLES)},
        task_dir=str(folder),
        engine=suite.engine,
        sample_prompts=(),
    )


def _is_written(dataset: Path) -> bool:
    """Whether the dataset is complete: its card is written last."""
    return (dataset / "README.md").exists()


def measure(work: Path) -> Cases:
    """Measure every damage in an engine of its own, and judge it under the policy `demo`."""
    base, sound, suite = prepare(work)
    policy = load_policy("demo")
    snapshot = stages.pin(str(base))

    def measured(role: Literal["baseline", "candidate"], folder: str) -> EvalReport:
        request = request_for(base, suite, role=role, model_id=model.BASE_ID, fingerprint=snapshot.commit)
        return text_alone(evaluate(request, work / folder))

    baseline = measured("baseline", "baseline")
    again = measured("candidate", "again")
    itself = stages.gate(baseline, again, policy, suite=suite, checkpoint_folder=None)
    cases = [_case(ITSELF, "accepted", baseline, again, itself)]
    for number, damage in enumerate(DAMAGES):
        place = work / f"damage-{number}"
        folder = place if place.exists() else spoilt(sound, damage, place)
        limit = None if damage.expected == "truth" else task.EVALUATION_SAMPLES
        candidate = stages.evaluate_model(
            str(folder), suite, work / f"measured-{number}", kv_cache_dtype="fp8", online=None, limit=limit
        )
        candidate = text_alone(candidate)
        decision = stages.gate(baseline, candidate, policy, suite=suite, checkpoint_folder=folder)
        cases.append(_case(damage.name, damage.expected, baseline, candidate, decision))
        print(cases[-1], flush=True)
    return Cases(vllm=baseline.versions["vllm"], cases=tuple(cases))


def text_alone(report: EvalReport) -> EvalReport:
    """Without the module proof, which shows all damage to weights and scales before the first prompt."""
    return report.model_copy(update={"proof": None})


def _case(damage: str, expected: Expected, baseline: EvalReport, candidate: EvalReport, decision: GateDecision) -> Case:
    (gated,) = decision.tasks
    one, other = baseline.task(TRUTH), candidate.task(TRUTH)
    assert one is not None and other is not None and one.doc_ids[: len(other.doc_ids)] == other.doc_ids
    ours, theirs = (side.samples_of(gated.metric, gated.filter) for side in (one, other))
    assert ours is not None and theirs is not None
    pairs = list(zip(ours.values, theirs.values, strict=False))  # the candidate may have answered only the first ones
    return Case(
        damage=damage,
        expected=expected,
        verdict=decision.verdict,
        vetoed=decision.vetoed,
        same_tokenizer=candidate.tokenizer_hash == baseline.tokenizer_hash,
        task=gated,
        truth=Counts(n=len(pairs), lost=pairs.count((1.0, 0.0)), won=pairs.count((0.0, 1.0))),
    )


# ---------------------------------------------------------------------------------------------- judging


def right_verdicts(found: Case) -> tuple[Verdict, ...]:
    """The right verdicts: the expected one or, where the true drop decides, all that it does not contradict."""
    if found.expected != "truth":
        return ("accepted",) if found.expected == "accepted" else ("rejected",)
    low, high = found.truth.interval()
    if low > found.task.margin:
        return ("rejected", "inconclusive")
    if high < found.task.margin:
        return ("accepted", "inconclusive")
    return ("accepted", "inconclusive", "rejected")


def is_right(found: Case) -> bool:
    """Whether the verdict is right, and for the right reason: the numbers, or the rule about tokenizers."""
    rightly = "tokenizer" in found.vetoed if found.expected == "vetoed" else found.task.verdict == found.verdict
    return found.verdict in right_verdicts(found) and rightly


def page_text(found: Cases) -> str:
    """The whole page, as Markdown."""
    intro = page.prose(
        "Does the gate notice damage? The demo's checkpoint (recipe `demo-fp8-static-kv`) is spoilt in one place at a "
        f"time. Each copy is measured in an engine of its own (vLLM {found.vllm}) and judged under the policy `demo`: "
        f"{task.EVALUATION_SAMPLES:,} questions, margin {100 * found.cases[0].task.margin:g} points. The true drop is "
        f"counted once, on other questions, and has a {1 - TRUTH_LEVEL:.0%} interval. The spoilt scale and codes are "
        f"those of `{LINEAR}`. Written by `python -m benchmarks.damages`; do not edit."
    )
    expected = page.prose(
        "Where the expected verdict depends on the true drop, a drop clearly above the margin must not be accepted, "
        "and one clearly below it must not be rejected. The rule `modules` is left out here: it sees layers, not text."
    )
    head = ("damage", "true drop, points", "questions", "drop on the suite", "verdict", "expected", "right")
    rows = [_row(one) for one in found.cases]
    right = sum(map(is_right, found.cases))
    return (
        f"# The gate on known damage\n\n{intro}\n\n{expected}\n\n{page.table(head, rows)}\n"
        f"{right} of {len(rows)} verdicts are right.\n"
    )


def _row(one: Case) -> tuple[str, ...]:
    counts, seen = one.truth, one.task
    truth = _points((counts.lost - counts.won) / counts.n, *counts.interval())
    said = f"{one.verdict}, vetoed by {', '.join(one.vetoed)}" if one.vetoed else one.verdict
    asked = f"by the true drop: {' or '.join(right_verdicts(one))}" if one.expected == "truth" else one.expected
    shown = _points(seen.drop, seen.drop_lower, seen.drop_upper)
    return one.damage, truth, f"{counts.n:,}", shown, said, asked, "yes" if is_right(one) else "**no**"


def _points(drop: float, low: float, high: float) -> str:
    return f"{100 * drop:.2f} ({100 * low:.2f} to {100 * high:.2f})"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder to keep, and to resume in; default: a temporary one")
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="fp8pipe-bench-") as folder:
        found = measure(options.work.resolve() if options.work is not None else Path(folder))
    found.save(options.page.with_suffix(".json"))
    options.page.write_text(page_text(found))


if __name__ == "__main__":
    main()
