"""Sensitivity: the figures equal those of whole weights and all tokens, and the worst Linears are shown."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import STATIC_KV, TENSOR_KV, calibrated, make_model, samples_of, with_data
from torch import Tensor
from typer.testing import CliRunner

from fp8pipe.calibrate.sensitivity import worst_modules
from fp8pipe.calibrate.sensitivity.figures import together
from fp8pipe.calibrate.sensitivity.sampling import TokenSample, spread
from fp8pipe.cli import app
from fp8pipe.config import ActivationScheme, WeightScheme
from fp8pipe.records.calibration import Calibration, Sensitivity
from fp8pipe.release.plots import write_sensitivity_plot
from fp8pipe.ui.sheets import sensitivity_sheet


def db(signal: Tensor, noise: Tensor) -> float:
    return 10 * math.log10(signal.double().square().sum() / noise.double().square().sum())


def e4m3(values: Tensor, amax: Tensor) -> Tensor:
    scale = amax / 448
    return (values / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def inputs_of(model: Any, names: list[str], samples: list[Tensor]) -> dict[str, Tensor]:
    """Every token that each Linear is given, [tokens, in]."""
    found: dict[str, list[Tensor]] = {name: [] for name in names}
    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, a, n=name: found[n].append(a[0].flatten(0, -2)))
        for name in names
    ]
    with torch.inference_mode():
        for ids in samples:
            model(ids)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in found.items()}


SCHEMES = {
    "static": (WeightScheme(strategy="tensor", share_scales=False), ActivationScheme(mode="static", strategy="tensor")),
    "dynamic": (WeightScheme(strategy="channel"), ActivationScheme(mode="dynamic", strategy="token")),
}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_figures_equal_those_of_whole_weights_and_all_tokens(scheme: str, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    weights, activations = SCHEMES[scheme]
    recipe = STATIC_KV.model_copy(update={"weights": weights, "activations": activations})
    found = calibrated(tmp_path, recipe)
    assert len(found.sensitivity) == 28
    samples = samples_of(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    ids = [torch.tensor([tokens]) for tokens in samples.token_ids]
    for name, inputs in inputs_of(model, list(found.sensitivity), ids).items():
        weight = model.get_submodule(name).weight.detach()
        amax = weight.abs().amax() if scheme == "static" else weight.abs().amax(1, keepdim=True)
        rounded = e4m3(weight, amax)
        given = e4m3(inputs, inputs.abs().amax() if scheme == "static" else inputs.abs().amax(1, keepdim=True))
        one, output = found.sensitivity[name], inputs @ weight.T
        assert one.weight_sqnr_db == pytest.approx(db(weight, rounded - weight), abs=0.01)
        assert one.output_sqnr_db == pytest.approx(db(output, given @ rounded.T - output), abs=0.5)
        assert one.input_amax == pytest.approx(inputs.abs().max().item())
        assert one.weight_kurtosis == pytest.approx(float((weight**4).mean() / (weight**2).mean() ** 2), rel=1e-3)
        assert one.weight_energy == pytest.approx(float(weight.square().sum()), rel=1e-4)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_expert_and_its_layer_have_figures(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", name)
    found = calibrated(tmp_path, TENSOR_KV)
    of_experts = [one for module, one in found.sensitivity.items() if ".experts." in module]
    assert len(of_experts) == 4 * 4 * 3
    assert all(one.weight_sqnr_db and 25 < one.weight_sqnr_db < 40 for one in of_experts)
    assert all(one.output_sqnr_db and 15 < one.output_sqnr_db < 40 for one in of_experts)
    assert list(found.layers) == [f"model.layers.{layer}" for layer in range(4)]
    for layer, whole in found.layers.items():
        mine = [one.output_sqnr_db for one in found.sensitivity.values() if one.layer == layer]
        assert min(mine) <= whole.output_sqnr_db <= max(mine)


def test_sqnr_of_signals_side_by_side_is_that_of_the_whole() -> None:
    big, small = torch.full((100,), 10.0), torch.ones(50)
    noise = torch.tensor([0.1])
    parts = [(float(s.square().sum()), db(s, noise.expand_as(s))) for s in (big, small)]
    assert together(parts) == pytest.approx(db(torch.cat([big, small]), noise.expand(150)), abs=0.01)
    assert together([(1.0, None)]) is None


def test_tokens_are_drawn_from_all_positions() -> None:
    sample = TokenSample(total=64 * 100, wanted=128)
    for row in range(64):
        sample.add(torch.arange(100).reshape(1, 100, 1) + 1000 * row)
    places = [int(value) % 1000 for value in sample.tokens().flatten()]  # type: ignore[union-attr]  # it saw tokens
    assert len(places) == 128
    assert len(set(places)) > 60
    assert torch.equal(spread(50, 5, 3), spread(50, 5, 3))


# ---------------------------------------------------------------------------------------------- shown


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Calibration]:
    """A folder with a calibration in its records."""
    root = tmp_path_factory.mktemp("shown")
    make_model(root / "model", "llama")
    found = calibrated(root, STATIC_KV)
    found.save(root / "checkpoint" / "fp8pipe" / "calibration.json")
    return root / "checkpoint", found


def test_the_ten_worst_are_listed_worst_first(shown: tuple[Path, Calibration]) -> None:
    _, found = shown
    rows = sensitivity_sheet(found).rows
    values = [float(row[1]) for row in rows]
    assert len(rows) == 10
    assert values == sorted(values)
    every = sorted(one.output_sqnr_db for one in found.sensitivity.values() if one.output_sqnr_db is not None)
    assert values == [round(value, 1) for value in every[:10]]


def test_experts_and_caches_without_scales_are_listed(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "deepseek_v2")
    found = calibrated(tmp_path, TENSOR_KV)
    least = min(found.expert_tokens.values(), key=lambda tokens: tokens.routed)
    notes = "\n".join(sensitivity_sheet(found).notes)
    assert "8 experts: the router gave" in notes and f" {least.routed} to " in notes
    topped = sum(tokens.added > 0 for tokens in found.expert_tokens.values())
    assert topped > 0
    assert f"{topped} experts had too few tokens" in notes
    assert "4 without KV scales: latent attention (MLA)" in notes


def test_command_shows_table_and_plots(shown: tuple[Path, Calibration]) -> None:
    folder, found = shown
    answer = CliRunner().invoke(app, ["sensitivity", str(folder)])
    assert answer.exit_code == 0, answer.output
    assert "model.layers.*" in answer.output
    for name, _ in worst_modules(found):
        assert name.removeprefix("model.layers.") in answer.output  # whole, in 80 columns
    plots = folder / "fp8pipe" / "plots"
    assert (plots / "sensitivity.png").read_bytes().startswith(b"\x89PNG")
    svg = (plots / "sensitivity.svg").read_bytes()
    assert b"<svg" in svg
    write_sensitivity_plot(found, plots)
    assert (plots / "sensitivity.svg").read_bytes() == svg
    as_json = CliRunner().invoke(app, ["sensitivity", str(folder), "--json"])
    parsed = json.loads(as_json.stdout)
    assert {name: Sensitivity.model_validate(one) for name, one in parsed["sensitivity"].items()} == found.sensitivity


def test_folder_without_calibration_is_refused(tmp_path: Path) -> None:
    answer = CliRunner().invoke(app, ["sensitivity", str(tmp_path)])
    assert answer.exit_code == 2
    assert "needed no calibration" in answer.output.replace("\n", " ")
