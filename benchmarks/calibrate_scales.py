"""Compares scales with the peer's, and ranges found through BF16 weights with those found through FP8 weights."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import peer
from benchmarks.page import table
from benchmarks.support import of_the_tests

if TYPE_CHECKING:
    from fp8pipe.config import Recipe
    from fp8pipe.records.calibration import Calibration

TOLERANCE = 2**-8
"""Scales whose relative difference is at most this count as equal: half a step of bf16."""


def compare(scratch: Path, fixtures: Path | None) -> str:
    """A table with the largest relative difference of any scale, for each architecture of tests/support/calibration.py.

    fixtures: folder for the peer's scales, which the tests compare with."""
    tests = of_the_tests("calibration")

    rows = []
    data = tests.write_dataset(scratch / "data.jsonl")
    for name in tests.ARCHITECTURES:
        tests.make_model(scratch / name, name)
        ours = scales_of(
            tests.run_calibration(scratch / name, tests.with_data(tests.PEER_RECIPE, data), scratch / f"{name}-ranges")
        )
        theirs, worst, note = _nearest(scratch / name, data, ours)
        both = sorted(ours.keys() & theirs.keys())
        rows.append([name, str(len(both)), f"{worst:.1e}", "; ".join(filter(None, (note, _missing(ours, theirs))))])
        print(*rows[-1], sep=", ", file=sys.stderr, flush=True)
        if fixtures is not None and both:
            fixtures.mkdir(parents=True, exist_ok=True)
            kept = {key: float(f"{theirs[key]:.7g}") for key in both}
            (fixtures / f"{name}.json").write_text(json.dumps(kept, indent=0) + "\n")
    return table(["architecture", "scales", "largest relative difference", "note"], rows)


def _nearest(model: Path, data: Path, ours: dict[str, float]) -> tuple[dict[str, float], float, str]:
    """The peer's scales by its traced pass; by its plain pass where the traced one fails or finds other scales."""
    traced = _peers_scales("scales", model, data)
    worst = math.inf if isinstance(traced, str) else _worst(ours, traced)
    if worst <= TOLERANCE and isinstance(traced, dict):
        return traced, worst, ""
    plain = _peers_scales("untraced", model, data)
    if isinstance(plain, str):
        return ({}, math.nan, f"the peer fails: {plain}") if isinstance(traced, str) else (traced, worst, "")
    note = traced if isinstance(traced, str) else f"differs by {worst:.1e}"
    return plain, _worst(ours, plain), f"peer's plain pass; its traced one: {note}"


def _worst(ours: dict[str, float], theirs: dict[str, float]) -> float:
    return max((abs(ours[key] / theirs[key] - 1) for key in ours.keys() & theirs.keys()), default=math.nan)


def scales_of(calibration: Calibration) -> dict[str, float]:
    """Name of a scale on disk -> amax / 448 of its range."""
    scales = {f"{name}.input_scale": amax / 448 for name, amax in calibration.inputs.items()}
    for name, ranges in calibration.kv.items():
        scales |= {f"{name}.k_scale": ranges.k_amax[0] / 448, f"{name}.v_scale": ranges.v_amax[0] / 448}
    return scales


def _peers_scales(how: str, model: Path, data: Path) -> dict[str, float] | str:
    """The peer's scales, or the last line of its error."""
    command = [peer.interpreter(), "-m", "benchmarks.calibrate_contender", how, model, data, f"{model}-{how}"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    if answer.returncode:
        return answer.stderr.strip().splitlines()[-1][:120]
    return {_on_disk(name): scale for name, scale in json.loads(answer.stdout.splitlines()[-1]).items()}


def _on_disk(name: str) -> str:
    """Mixtral's own name of an expert's projection, which the peer does not restore."""
    parent, projection, leaf = name.rsplit(".", 2)
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"} if ".block_sparse_moe.experts." in name else {}
    return f"{parent}.{names.get(projection, projection)}.{leaf}"


def _missing(ours: dict[str, float], theirs: dict[str, float]) -> str:
    only = {"only fp8pipe has": ours.keys() - theirs.keys(), "only the peer has": theirs.keys() - ours.keys()}
    return "; ".join(f"{who} {len(names)}, such as {min(names)}" for who, names in only.items() if names)


# ---------------------------------------------------------------------------------------------- through FP8 weights


def through_weights(model: Path, texts: Path, scratch: Path) -> str:
    """A table that compares ranges found through BF16 weights and through FP8 weights, by the FP8 model's distance from
    the BF16 model.

    texts: .jsonl with a text or messages in every row. The first half calibrates; the second measures the distance."""
    from fp8pipe.config import load_recipe

    rows = [line for line in texts.read_text().splitlines() if line.strip()]
    half = len(rows) // 2
    (scratch / "calibrate.jsonl").write_text("\n".join(rows[:half]))
    (scratch / "judge.jsonl").write_text("\n".join(rows[half:]))
    base = load_recipe("fp8-static")
    lines = []
    for observer in ("minmax", "mse"):
        for through in (False, True):
            spec = {"dataset": str(scratch / "calibrate.jsonl"), "num_samples": half, "quantized_weights": through}
            content = base.model_dump() | {"calibration": base.calibration.model_dump() | spec}
            content["activations"] |= {"observer": observer}
            recipe = type(base).model_validate(content)
            figures = _distance(model, recipe, scratch / "judge.jsonl", scratch / f"{observer}-{through}")
            lines.append([observer, "FP8" if through else "BF16", *figures])
    return table(["observer", "weights while calibrating", "KL to BF16, 1e-3 nats/token", "same top token"], lines)


def _distance(model: Path, recipe: Recipe, judge: Path, scratch: Path) -> tuple[str, str]:
    """Mean KL divergence of next-token distributions with its standard error, and how often the best token agrees."""
    import torch
    from transformers import AutoModelForCausalLM

    from fp8pipe import stages
    from fp8pipe.calibrate import calibrate
    from fp8pipe.calibrate.dataset import files_of, read_rows
    from fp8pipe.calibrate.samples import choose_samples
    from fp8pipe.calibrate.tokenization import tokenizer_of

    snapshot = stages.pin(str(model))
    ranges = calibrate(snapshot, stages.plan(snapshot, recipe), recipe, scratch)
    count = len(judge.read_text().splitlines())
    spec = recipe.calibration.model_copy(update={"dataset": str(judge), "num_samples": count})
    samples = choose_samples(spec, read_rows(files_of(spec, "")), tokenizer_of(model), None).token_ids
    plain: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rounded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    in_fp8(rounded, recipe, ranges)
    divergence, same = [], []
    with torch.inference_mode():
        for ids in samples:
            one, other = (m(torch.tensor([ids])).logits[0].log_softmax(-1) for m in (plain, rounded))
            divergence.append((one.exp() * (one - other)).sum(-1).mean() * 1e3)
            same.append((one.argmax(-1) == other.argmax(-1)).float().mean())
    found = torch.stack(divergence)
    return f"{found.mean():.4f} ± {found.std() / len(found) ** 0.5:.4f}", f"{torch.stack(same).mean():.4%}"


def in_fp8(model: Any, recipe: Recipe, ranges: Calibration) -> None:
    """Round the weights of `model` to FP8, and the inputs of its Linears whenever they run."""
    import torch

    from fp8pipe.calibrate.sensitivity.rounding import round_in_place, rounded_input, shared_amax

    fused = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    for name, amax in ranges.inputs.items():
        parent, _, leaf = name.rpartition(".")
        group = next((g for g in fused if leaf in g), (leaf,))
        members = [model.get_submodule(f"{parent}.{other}") for other in group]
        module = model.get_submodule(name)
        if not hasattr(module, "fp8_amax"):
            shared = shared_amax([member.weight for member in members], recipe.weights)
            for member in members:
                member.fp8_amax = shared
        with torch.no_grad():
            module.rounded = torch.clone(module.weight)
            round_in_place(module.rounded, recipe.weights, module.fp8_amax)

        def hook(_: Any, args: Any, amax: float = amax) -> Any:
            flat = rounded_input(args[0].flatten(0, -2), recipe.activations, amax, group=128)
            return (flat.reshape(args[0].shape),)

        module.register_forward_pre_hook(hook)
    with torch.no_grad():
        for name in ranges.inputs:
            module = model.get_submodule(name)
            module.weight.copy_(module.rounded)
