"""Sensitivity: the figures equal those of whole tensors, the worst are found, and a recipe keeps them in BF16."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.calibration import MOE_NAMES, STATIC_KV, calibrated, make_model, planned, with_data
from torch import Tensor, nn
from typer.testing import CliRunner

from fp8pipe.calibrate.noise import TokenSample, spread, together
from fp8pipe.calibrate.ranges import observer_for
from fp8pipe.calibrate.sensitivity import worst_modules
from fp8pipe.cli import app
from fp8pipe.config import ActivationScheme, KeepRule, Recipe, WeightScheme, validated
from fp8pipe.errors import ConfigError, InputError
from fp8pipe.hub.headers import read_headers
from fp8pipe.quantize import fingerprint, quantize
from fp8pipe.quantize.plan import make_plan
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
    ids = [torch.tensor([tokens]) for tokens in found_tokens(tmp_path, recipe)]
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


def found_tokens(tmp_path: Path, recipe: Recipe) -> list[list[int]]:
    """The samples, as calibration's own tokenizer sees them."""
    from fp8pipe.calibrate.rows import load_rows
    from fp8pipe.calibrate.samples import choose_samples, tokenizer_of

    spec = with_data(recipe, tmp_path / "data.jsonl").calibration
    return [
        list(ids) for ids in choose_samples(spec, load_rows(spec, ""), tokenizer_of(tmp_path / "model"), None).token_ids
    ]


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_expert_has_figures_and_its_layer_too(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", name)
    found = calibrated(tmp_path, STATIC_KV.model_copy(update={"weights": WeightScheme(strategy="tensor")}))
    of_experts = [one for module, one in found.sensitivity.items() if ".experts." in module]
    assert len(of_experts) == 4 * 4 * 3
    assert all(one.weight_sqnr_db and 25 < one.weight_sqnr_db < 40 for one in of_experts)
    assert all(one.output_sqnr_db and 15 < one.output_sqnr_db < 40 for one in of_experts)
    assert list(found.layers) == [f"model.layers.{layer}" for layer in range(4)]
    for layer, whole in found.layers.items():
        mine = [one.output_sqnr_db for one in found.sensitivity.values() if one.layer == layer]
        assert min(mine) <= whole.output_sqnr_db <= max(mine)


def test_clipped_share_is_exact_for_a_percentile() -> None:
    observer = observer_for("percentile", 1, 90.0)
    values = torch.arange(1, 201).to(torch.bfloat16)  # bf16 holds these exactly
    observer.update(values)
    (limit,) = observer.ranges()
    assert observer.saturation() == pytest.approx(float((values.float() > limit).float().mean()))
    assert observer_for("minmax", 1).saturation() == 0


def test_signals_side_by_side_have_the_sqnr_of_the_whole() -> None:
    big, small = torch.full((100,), 10.0), torch.ones(50)
    noise = torch.tensor([0.1])
    parts = [(float(s.square().sum()), db(s, noise.expand_as(s))) for s in (big, small)]
    assert together(parts) == pytest.approx(db(torch.cat([big, small]), noise.expand(150)), abs=0.01)
    assert together([(1.0, None)]) is None


def test_tokens_are_drawn_from_everywhere_and_not_always_first() -> None:
    sample = TokenSample(total=64 * 100, wanted=128)
    for row in range(64):
        sample.add(torch.arange(100).reshape(1, 100, 1) + 1000 * row)
    places = [int(value) % 1000 for value in sample.tokens().flatten()]  # type: ignore[union-attr]  # it saw tokens
    assert len(places) == 128
    assert len(set(places)) > 60
    assert torch.equal(spread(50, 5, 3), spread(50, 5, 3))


# ---------------------------------------------------------------------------------------------- keep_bf16


def keeping(recipe: Recipe, share: Any) -> Recipe:
    return recipe.model_copy(update={"keep_bf16": KeepRule(worst=share)})


def test_share_is_read_as_percent_or_fraction() -> None:
    assert KeepRule.model_validate({"worst": "2%"}) == KeepRule.model_validate({"worst": 0.02})
    for wrong in ("0%", "51%", "two%", -1):
        with pytest.raises(ConfigError, match=r"worst"):
            validated(KeepRule, {"worst": wrong}, "recipe")


def test_the_most_sensitive_group_is_kept_whole_and_the_plan_says_why(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    with torch.no_grad():
        model.get_parameter("model.layers.2.self_attn.k_proj.weight")[0, 0] = (
            3e4  # spoils the scale that all three share
        )
    model.save_pretrained(tmp_path / "model", max_shard_size="100KB")
    recipe = keeping(STATIC_KV.model_copy(update={"weights": WeightScheme(strategy="tensor")}), "2%")
    found = calibrated(tmp_path, recipe)
    attention = {f"model.layers.2.self_attn.{leaf}_proj" for leaf in "qkv"}
    assert {name for name, _ in worst_modules(found, 2)} == attention - {"model.layers.2.self_attn.k_proj"}
    assert found.kept.keys() == {f"{name}.weight" for name in attention}

    snapshot, _, architecture = planned(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    settled = make_plan(snapshot, read_headers(snapshot), recipe, architecture, keep=found.kept)
    kept = {tensor.name: tensor.reason for tensor in settled.tensors if "keep_bf16" in tensor.reason}
    assert kept == found.kept
    assert all("worst 2 %" in reason and "dB" in reason for reason in kept.values())
    assert attention <= set(settled.quantization_config["ignore"])
    assert not attention & set(settled.calibrated_modules())
    made = quantize(snapshot, settled, tmp_path / "checkpoint", calibration=found)
    assert made.fingerprint == fingerprint(snapshot, recipe, found.digest())
    assert made.fingerprint != fingerprint(snapshot, recipe, found.model_copy(update={"kept": {}}).digest())


def test_a_plan_that_quantizes_what_calibration_keeps_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "llama")
    recipe = keeping(STATIC_KV, 0.1)
    found = calibrated(tmp_path, recipe)
    snapshot, unsettled, _ = planned(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    assert any("keep_bf16" in note for note in unsettled.notes)
    with pytest.raises(InputError, match="plan again"):
        quantize(snapshot, unsettled, tmp_path / "checkpoint", calibration=found)
    with pytest.raises(InputError, match="needs a calibration"):
        quantize(snapshot, unsettled, tmp_path / "checkpoint")


@pytest.mark.parametrize("name", MOE_NAMES)
def test_experts_of_a_layer_are_kept_together(name: str, tmp_path: Path) -> None:
    make_model(tmp_path / "model", name)
    recipe = keeping(STATIC_KV.model_copy(update={"weights": WeightScheme(strategy="tensor")}), "40%")
    found = calibrated(tmp_path, recipe)
    snapshot, _, architecture = planned(tmp_path / "model", with_data(recipe, tmp_path / "data.jsonl"))
    make_plan(snapshot, read_headers(snapshot), recipe, architecture, keep=found.kept)  # raises for a mixed layer


def test_data_free_recipe_that_keeps_the_worst_needs_calibration() -> None:
    plain = Recipe(name="r")
    assert not plain.needs_calibration
    assert keeping(plain, "2%").needs_calibration
    assert "keep_bf16" not in plain.identity()
    assert keeping(plain, "2%").identity()["keep_bf16"] == {"worst": 0.02}


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


def test_experts_and_caches_without_scales_are_told(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "deepseek_v2")
    recipe = STATIC_KV.model_copy(update={"weights": WeightScheme(strategy="tensor")})
    found = calibrated(tmp_path, recipe)
    least = min(found.expert_tokens.values(), key=lambda tokens: tokens.routed)
    notes = "\n".join(sensitivity_sheet(found).notes)
    assert f"8 experts: the router gave them {least.routed} to " in notes
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


def test_recipe_of_linears_is_measured_for_weight_only_too(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", "llama")
    assert isinstance(model, nn.Module)
    found = calibrated(tmp_path, keeping(Recipe(name="r", activations=None, calibration=STATIC_KV.calibration), 0.1))
    assert not found.inputs
    assert found.kept
    assert all(one.output_sqnr_db > 25 for one in found.sensitivity.values())
