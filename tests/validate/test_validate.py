"""The validator: silent on correct checkpoints, one voice for each corruption, calm before garbage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support import reference_checkpoints as reference
from support.findings import ids
from support.malformed import (
    ALL,
    BASES,
    CASES,
    O_PROJ,
    Q_PROJ,
    Base,
    Case,
    Model,
    alter,
    drop,
    edit_config,
    edit_quantization,
    edit_tensors,
    shards_of,
)

from fp8pipe.errors import InputError
from fp8pipe.hub.source import resolve
from fp8pipe.oracle import compressed_tensors as parser
from fp8pipe.records import ValidationReport
from fp8pipe.validate import all_checks, validate
from fp8pipe.validate.measuring.measure import TILE_BYTES

pytestmark = pytest.mark.usefixtures("architecture_cache")

OWN_WARNINGS: dict[Base, set[str]] = {"fp8": {"C9"}, "modelopt": {"C9"}, "modelopt-nvfp4": {"C9"}}
"""Warnings that are true of the correct checkpoint."""


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("base", BASES)
def test_correct_checkpoint_has_no_finding_at_any_depth(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], model: Model, base: Base
) -> None:
    folder = checkpoint(model, base)
    for report in (
        validate(folder, depth="headers"),
        validate(folder),
        validate(folder, source=resolve(str(shelf / model))),
    ):
        assert ids(report) == OWN_WARNINGS.get(base, set()), [f.sentence() for f in report.findings]
        assert report.sound


@pytest.mark.parametrize(
    ("case", "model"),
    [(case, model) for case in CASES for model in case.models],
    ids=lambda value: f"{value.number}-{value.name}" if isinstance(value, Case) else value,
)
def test_corruption_brings_its_own_findings_and_no_others(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], tmp_path: Path, case: Case, model: Model
) -> None:
    folder = reference.copy(checkpoint(model, case.base), tmp_path / "checkpoint")
    (tmp_path / "source").write_text(str(shelf / model))
    case.spoil(folder)
    report = validate(folder, source=resolve((tmp_path / "source").read_text()))
    found = ids(report) - OWN_WARNINGS.get(case.base, set())
    assert found == case.findings, "\n".join(f.sentence() for f in report.findings)
    assert all(finding.remedy and finding.consequence for finding in report.findings)


def test_a_quantization_config_beside_config_json_is_one_too_many_only_where_there_are_two(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    folder = reference.copy(checkpoint("dense", "modelopt"), tmp_path / "fp8")
    config = json.loads((folder / "config.json").read_text())
    beside = folder / "hf_quant_config.json"
    beside.write_text(json.dumps(config["quantization_config"]))
    assert ids(validate(folder)) == OWN_WARNINGS["modelopt"] | {"F7"}
    for rest in (config | {"quantization_config": None}, {k: v for k, v in config.items() if "quant" not in k}):
        (folder / "config.json").write_text(json.dumps(rest))
        report = validate(folder)
        assert ids(report) == OWN_WARNINGS["modelopt"], [finding.sentence() for finding in report.findings]
        assert "V2" in report.checks  # the scheme is understood


@pytest.mark.parametrize(
    ("experts", "others", "severity"),
    [(range(4), 0.01, {"error"}), ((1,), 0.01, {"warning"}), ((1, 2), 2.0, set())],
    ids=["all", "the largest", "not the largest"],
)
def test_experts_that_vllm_serves_with_an_input_scale_of_one_are_a_finding(
    checkpoint: Callable[[Model, Base], Path],
    tmp_path: Path,
    experts: Sequence[int],
    others: float,
    severity: set[str],
) -> None:
    """vLLM takes the largest of a layer's experts for all of them."""
    folder = reference.copy(checkpoint("moe", "static"), tmp_path / "fp8")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in tensors:
            if ".experts." in name and name.endswith("down_proj.input_scale"):
                tensors[name] = torch.full_like(tensors[name], 1.0 if int(name.split(".")[-3]) in experts else others)

    edit_tensors(folder, change)
    report = validate(folder)
    assert {finding.check for finding in report.findings} <= {"V4"}, [f.sentence() for f in report.findings]
    assert {finding.severity for finding in report.findings} == severity
    assert all("down_proj" in finding.expected for finding in report.findings)


# ---------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("base", ["static", "channel", "block"])
def test_weights_larger_than_a_tile_are_judged_to_their_last_code(tmp_path: Path, base: Base) -> None:
    source = reference.llama(tmp_path / "source", intermediate=20_000)
    folder = reference.quantize(source, tmp_path / "fp8", **BASES[base])
    assert (folder / "model-00002-of-00002.safetensors").stat().st_size > 2 * TILE_BYTES
    assert not ids(validate(folder, source=resolve(str(source))))
    down_proj = "model.layers.1.mlp.down_proj.weight"

    def flip(codes: torch.Tensor) -> torch.Tensor:
        codes.view(torch.uint8)[63, -1] ^= 0x80
        return codes

    alter(folder, down_proj, flip)
    (finding,) = validate(folder, source=resolve(str(source))).findings
    assert (finding.check, finding.tensor) == ("D1", down_proj)
    assert "the first at [63, 19999]" in finding.found


# ---------------------------------------------------------------------------------------------- contract


def test_depth_follows_what_is_at_hand(shelf: Path, checkpoint: Callable[[Model, Base], Path]) -> None:
    folder = checkpoint("dense", "channel")
    headers, values = validate(folder, depth="headers"), validate(folder)
    fidelity = validate(folder, source=resolve(str(shelf / "dense")))
    assert (headers.depth, values.depth, fidelity.depth) == ("headers", "values", "fidelity")
    assert headers.bytes_read == 0 < values.bytes_read < fidelity.bytes_read
    unrecorded = {check.id for check in all_checks()} - OF_OUR_ENGINE - OF_TRANSFORMERS
    assert set(headers.checks) < set(values.checks) < set(fidelity.checks) == unrecorded
    assert (values.known_from, fidelity.known_from) == ("names", "architecture")


def test_headers_need_no_torch_and_miss_no_check(checkpoint: Callable[[Model, Base], Path]) -> None:
    folder = checkpoint("dense", "channel")
    code = (
        "import sys, pathlib, json; from fp8pipe.validate import validate; "
        "report = validate(pathlib.Path(sys.argv[1]), depth='headers'); "
        "print(json.dumps([report.checks, 'torch' in sys.modules]))"
    )
    answer = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True, check=True)
    checks, torch_is_loaded = json.loads(answer.stdout)
    here = validate(folder)
    of_headers = {check.id for check in all_checks() if check.depth == "headers"}
    assert not torch_is_loaded
    assert set(checks) == of_headers & set(here.checks)


def test_every_check_has_a_corruption_that_makes_it_speak() -> None:
    silent = {check.id for check in all_checks()} - set().union(*(case.findings for case in CASES))
    assert silent == SPOKEN_FOR_ELSEWHERE


OF_OUR_ENGINE = {"C10", "P8", "P9", "V11", "D7", "R1"}
"""Checks that need the engine's records, or vLLM."""
OF_TRANSFORMERS = {"L1", "L2"}
"""Checks that need transformers' loader."""
SPOKEN_FOR_ELSEWHERE = {"K10", "V7", "D5", "D8", "P7", "R2"} | OF_OUR_ENGINE | OF_TRANSFORMERS
"""Checks whose corruption is not one of the table's, with a test of their own here."""


def test_scale_smaller_than_any_of_the_engine_is_no_excuse(shelf: Path, tmp_path: Path) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="tensor", static=False)
    name = next(name for name in reference.read(folder)[0] if name.endswith("down_proj.weight_scale"))
    edit_tensors(folder, lambda tensors: tensors.update({name: torch.full_like(tensors[name], 1e-20)}))
    assert "V3" in ids(validate(folder))


def test_per_tensor_fp8_method_does_not_load_in_transformers(checkpoint: Callable[[Model, Base], Path]) -> None:
    assert ids(validate(checkpoint("dense", "fp8"))) == {"C9"}


@pytest.mark.parametrize(
    ("count", "check", "found"),
    [
        (5000, "K6", "layer 2 has no tensor"),
        (10**9, "C1", "num_hidden_layers"),
    ],
)
def test_layers_that_config_json_counts_and_nobody_has_are_missed_without_a_source(
    shelf: Path, tmp_path: Path, count: int, check: str, found: str
) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    edit_config(folder, lambda config: config.update(num_hidden_layers=count))
    (finding,) = validate(folder, depth="headers").findings
    assert finding.check == check and found in finding.found


def test_mostly_ignored_model_is_a_warning(shelf: Path, tmp_path: Path) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = reference.tensors_of(shelf / "dense")

    def keep_mlp(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors.update({name: source[name]}) if name in source else tensors.pop(name)

    edit_tensors(folder, keep_mlp)
    edit_quantization(folder, lambda quant: quant["ignore"].append("re:.*\\.mlp\\..*"))
    report = validate(folder, source=resolve(str(shelf / "dense")))
    assert (ids(report), report.sound) == ({"K10"}, True)


def test_scale_far_beyond_the_need_loses_small_weights_and_range(shelf: Path, tmp_path: Path) -> None:
    """The codes are right for the scale, the scale is 16384 times too large."""
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = reference.tensors_of(shelf / "dense")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{O_PROJ}.weight_scale"] * 16384
        tensors[f"{O_PROJ}.weight_scale"] = scale
        tensors[f"{O_PROJ}.weight"] = (source[f"{O_PROJ}.weight"].float() / scale).to(torch.float8_e4m3fn)

    edit_tensors(folder, widen)
    report = validate(folder, source=resolve(str(shelf / "dense")))
    assert ids(report) == {"V6", "V7", "D3", "D5", "D6"}, [f.sentence() for f in report.findings]


@pytest.mark.parametrize(("factor", "severity"), [(2, "warning"), (100, "error")])
def test_unequal_scales_in_a_fused_group_are_requantized_by_vllm(
    shelf: Path, tmp_path: Path, factor: float, severity: str
) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8")
    alter(folder, f"{Q_PROJ}.weight_scale", lambda scale: scale * factor)
    (finding,) = (f for f in validate(folder).findings if f.check == "V9")
    assert finding.severity == severity


def test_remote_code_that_differs_is_an_error(shelf: Path, tmp_path: Path) -> None:
    source = reference.copy(shelf / "dense", tmp_path / "source")
    (source / "modeling_custom.py").write_text("x = 1\n")
    folder = reference.quantize(source, tmp_path / "fp8")
    (folder / "modeling_custom.py").write_text("x = 2\n")
    assert ids(validate(folder, source=resolve(str(source)))) == {"P4"}


def test_source_in_the_layout_of_the_hub_cache_is_no_link_out_of_the_folder(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in checkpoint("dense", "channel").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert not ids(validate(snapshot))
    outside = tmp_path / "elsewhere.safetensors"
    shard = shards_of(snapshot)[0]
    outside.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(outside)
    assert "F9" in ids(validate(snapshot))


def test_llm_compressor_s_bf16_scales_and_division_pass_with_a_warning_that_says_so(
    shelf: Path, tmp_path: Path
) -> None:
    """Scale and division in the weight's own dtype: what llm-compressor writes."""
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = reference.tensors_of(shelf / "dense")

    def in_bf16(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            weight = source[name.removesuffix("_scale")]
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors[name] = scale
            tensors[name.removesuffix("_scale")] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    edit_tensors(folder, in_bf16)
    report = validate(folder, source=resolve(str(shelf / "dense")))
    assert (ids(report), report.sound) == ({"D2"}, True), [f.sentence() for f in report.findings]


@pytest.mark.parametrize("base", ["static", "channel", "block"])
def test_weights_that_all_lie_at_the_top_are_not_taken_for_clipped(tmp_path: Path, base: Base) -> None:
    """Ternary weights: absmax / scale may come out a last bit above 448, for every weight of a row."""
    source = reference.llama(tmp_path / "source")

    def ternary(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if "_proj.weight" in name]:
            tensors[name] = (tensors[name].sign() * tensors[name].float().abs().mean(1, keepdim=True)).bfloat16()

    edit_tensors(source, ternary)
    folder = reference.quantize(source, tmp_path / "fp8", **BASES[base])
    report = validate(folder, source=resolve(str(source)))
    assert "V6" not in ids(report) and report.sound, [f.sentence() for f in report.findings]


def test_report_survives_its_file(checkpoint: Callable[[Model, Base], Path], tmp_path: Path) -> None:
    report = validate(checkpoint("dense", "fp8"))
    assert ValidationReport.load(report.save(tmp_path / "validation.json")) == report


def test_fidelity_without_a_source_is_a_wrong_request(checkpoint: Callable[[Model, Base], Path]) -> None:
    with pytest.raises(InputError, match="--source"):
        validate(checkpoint("dense", "channel"), depth="fidelity")


def test_parser_of_compressed_tensors_says_the_same_from_a_child_and_from_its_record(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its imports would be more than half of the validator's memory."""
    sound = json.loads((checkpoint("dense", "channel") / "config.json").read_text())["quantization_config"]
    broken = sound | {"config_groups": {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "colour": 1}}}}
    here = [parser.ask_here(quant) for quant in (sound, broken)]
    assert not here[0] and "colour: Extra inputs are not permitted" in here[1][0][0]
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    monkeypatch.delitem(sys.modules, "compressed_tensors.quantization")
    assert [parser.problems(quant) for quant in (sound, broken)] == here
    monkeypatch.setattr(parser, "supervise", None)
    assert [parser.problems(quant) for quant in (sound, broken)] == here
    assert "compressed_tensors.quantization" not in sys.modules


@pytest.mark.vllm
def test_oracles_are_asked_when_wanted(checkpoint: Callable[[Model, Base], Path], tmp_path: Path) -> None:
    """One scale of a fused projection is missing, which vLLM does not notice: all else lands where it should."""
    folder = reference.copy(checkpoint("dense", "static"), tmp_path / "checkpoint")
    drop(folder, f"{Q_PROJ}.weight_scale")
    report = validate(folder, depth="headers", oracles=True)
    assert report.known_from == "architecture"
    found = [finding for finding in report.findings if finding.check == "R1"]
    assert len(found) == 1 and found[0].tensor is not None and "layers.0.self_attn.qkv_proj" in found[0].tensor


def test_documented_checks_are_those_that_run() -> None:
    from benchmarks.malformed import PAGE, checks

    assert checks() in PAGE.read_text(), "run python -m benchmarks.malformed"


# ---------------------------------------------------------------------------------------------- a source that is FP8


def test_copy_of_an_fp8_source_is_compared_byte_for_byte(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    source = checkpoint("dense", "fp8-block")
    folder = reference.copy(source, tmp_path / "fp8")
    assert not ids(validate(folder, source=resolve(str(source))))
    alter(folder, f"{O_PROJ}.weight", lambda codes: codes.view(torch.uint8).flip(0).view(torch.float8_e4m3fn))
    (finding,) = validate(folder, source=resolve(str(source)), depth="fidelity").errors
    assert (finding.check, finding.tensor) == ("D4", f"{O_PROJ}.weight")


def test_source_whose_values_are_not_known_is_reported(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    source = reference.copy(shelf / "dense", tmp_path / "source")
    alter(source, f"{O_PROJ}.weight", lambda weight: weight.to(torch.float8_e4m3fn))
    (finding,) = validate(checkpoint("dense", "channel"), source=resolve(str(source))).findings
    assert (finding.check, finding.severity, finding.tensor) == ("D8", "warning", f"{O_PROJ}.weight")
