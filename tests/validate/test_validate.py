"""The validator: silent on correct checkpoints, one voice for each corruption, calm before garbage."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    add,
    alter,
    drop,
    edit_config,
    edit_quantization,
    edit_tensors,
    quantize,
    shards_of,
)

from fp8pipe.errors import InputError
from fp8pipe.hub.source import resolve
from fp8pipe.model.headers import TensorInfo
from fp8pipe.oracle import compressed_tensors as parser
from fp8pipe.records import ValidationReport
from fp8pipe.validate import all_checks, validate
from fp8pipe.validate.meaning.layout import Layout, layout_from_names
from fp8pipe.validate.measuring.measure import TILE_BYTES

OWN_WARNINGS: dict[Base, set[str]] = {"fp8": {"C9"}, "modelopt": {"C9"}, "modelopt-nvfp4": {"C9"}}
"""Warnings that are true of the correct checkpoint."""


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three BF16 models."""
    root = tmp_path_factory.mktemp("models")
    reference.llama(root / "dense")
    reference.llama(root / "tied", tied=True)
    reference.moe(root / "moe")
    return root


@pytest.fixture(scope="session")
def checkpoint(shelf: Path) -> Callable[[Model, Base], Path]:
    """A correct FP8 checkpoint, made once and not to be altered."""

    def make(model: Model, base: Base) -> Path:
        folder = shelf / f"{model}-{base}"
        return folder if folder.exists() else quantize(shelf / model, folder, base)

    return make


@pytest.fixture(autouse=True)
def architecture_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architecture records are kept for the session: the child that makes them costs seconds."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.getbasetemp() / "architectures"))


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
    unrecorded = {check.id for check in all_checks()} - OF_OUR_ENGINE
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


OF_OUR_ENGINE = {"P8", "P9", "V11", "D7", "R1"}
"""Checks that need the engine's records, or vLLM."""
SPOKEN_FOR_ELSEWHERE = {"C9", "K10", "V7", "D5", "D8", "P4", "P7"} | OF_OUR_ENGINE
"""Checks whose corruption is not one of the table's, with a test of their own here."""


def test_per_tensor_fp8_method_is_said_not_to_load_in_transformers(checkpoint: Callable[[Model, Base], Path]) -> None:
    assert ids(validate(checkpoint("dense", "fp8"))) == {"C9"}


def test_mostly_ignored_model_is_a_warning(shelf: Path, tmp_path: Path) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = load_all(shelf / "dense")

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
    source = load_all(shelf / "dense")

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
    source = load_all(shelf / "dense")

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


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return reference.read(folder)[0]


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
    monkeypatch.setattr(parser.subprocess, "run", None)
    assert [parser.problems(quant) for quant in (sound, broken)] == here
    assert "compressed_tensors.quantization" not in sys.modules


# ---------------------------------------------------------------------------------------------- FP8 where none may be


def as_codes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.float8_e4m3fn)


@pytest.mark.parametrize("base", ["channel", "fp8", "modelopt"])
@pytest.mark.parametrize("leaf", [f"{Q_PROJ}.bias", "model.layers.0.mlp.gate.e_score_correction_bias"])
def test_fp8_in_what_is_no_weight_is_an_error_at_every_depth(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], tmp_path: Path, base: Base, leaf: str
) -> None:
    source = reference.copy(shelf / "moe", tmp_path / "source")
    add(source, leaf, torch.rand(64).bfloat16())
    folder = reference.copy(checkpoint("moe", base), tmp_path / "fp8")
    add(folder, leaf, as_codes(torch.rand(64)))
    for report in (validate(folder, depth="headers"), validate(folder), validate(folder, source=resolve(str(source)))):
        found = {(finding.check, finding.tensor) for finding in report.errors}
        assert found == {("K4", leaf)}, [f.sentence() for f in report.findings]


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_modelopt_without_exclusions_quantizes_the_head_and_no_embedding_or_norm(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path, name: str
) -> None:
    folder = reference.copy(checkpoint("dense", "modelopt"), tmp_path / "fp8")
    edit_quantization(folder, lambda quant: quant.pop("ignore"))
    alter(folder, "lm_head.weight", as_codes)
    add(folder, "lm_head.weight_scale", torch.tensor(0.01))
    alter(folder, name, as_codes)
    found = {(finding.check, finding.tensor) for finding in validate(folder, depth="headers").errors}
    assert found == {("K4", name)}


def test_target_that_names_whole_layers_makes_no_linear_of_their_norms(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    folder = reference.copy(checkpoint("dense", "channel"), tmp_path / "fp8")
    norm = "model.layers.1.input_layernorm.weight"
    alter(folder, norm, as_codes)
    edit_quantization(folder, lambda quant: quant["config_groups"]["group_0"].update(targets=["re:.*layers.*"]))
    found = {(finding.check, finding.tensor) for finding in validate(folder, depth="headers").errors}
    assert found == {("K4", norm)}


# ---------------------------------------------------------------------------------------------- names of other families


@pytest.mark.parametrize(
    "name",
    [
        "gpt_neox.embed_in.weight",
        "backbone.embeddings.weight",
        "transformer.word_embeddings.weight",
        "transformer.wte.weight",
        "model.decoder.embed_tokens.weight",
        "model.language_model.embed_tokens.weight",
    ],
)
def test_embedding_goes_by_several_names(checkpoint: Callable[[Model, Base], Path], tmp_path: Path, name: str) -> None:
    folder = reference.copy(checkpoint("dense", "channel"), tmp_path / "fp8")
    edit_tensors(folder, lambda tensors: tensors.update({name: tensors.pop("model.embed_tokens.weight")}))
    assert not ids(validate(folder, depth="headers"))
    drop(folder, name)
    assert [(f.check, f.tensor) for f in validate(folder, depth="headers").errors] == [
        ("K1", "model.embed_tokens.weight")
    ]


def layout_of(*modules: str, **config: int) -> Layout:
    """What the names of weights [64, 64] tell."""
    tensors = {f"{name}.weight": TensorInfo(f"{name}.weight", "BF16", (64, 64), "x", 0, 0) for name in modules}
    return layout_from_names(tensors, config)


@pytest.mark.parametrize(
    ("attention", "projection"),
    [
        ("model.layers.0.self_attn", "qkv_proj"),
        ("gpt_neox.layers.0.attention", "query_key_value"),
        ("transformer.h.0.self_attention", "query_key_value"),
        ("transformer.blocks.0.norm_attn_norm.attn", "Wqkv"),
        ("backbone.layers.0.mixer", "k_proj"),
    ],
)
def test_attention_is_known_by_its_projections(attention: str, projection: str) -> None:
    assert layout_of(f"{attention}.{projection}").attention == (attention,)
    assert not layout_of(f"vision_tower.encoder.{attention}.{projection}").attention


def test_projections_that_the_engine_joins_are_fused_here_too() -> None:
    from fp8pipe.model.names import FUSED

    for group in FUSED:
        modules = tuple(f"model.layers.0.linear_attn.{leaf}" for leaf in group)
        assert layout_of(*modules).fused == (modules,)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_number_of_experts_goes_by_several_names(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path, key: str
) -> None:
    folder = reference.copy(checkpoint("moe", "channel"), tmp_path / "fp8")
    edit_config(folder, lambda config: config.update({key: config.pop("num_experts")}))
    assert not ids(validate(folder, depth="headers"))
    drop(folder, *(name for name in load_all(folder) if ".experts.3." in name))
    assert ids(validate(folder, depth="headers")) == {"K6"}


# ---------------------------------------------------------------------------------------------- more than a decoder


@pytest.fixture
def multimodal(checkpoint: Callable[[Model, Base], Path], tmp_path: Path) -> Callable[[Base], Path]:
    """The dense checkpoint as the decoder of a model with a BF16 vision tower of three layers, its config nested."""

    def make(base: Base) -> Path:
        folder = reference.copy(checkpoint("dense", base), tmp_path / "multimodal")

        def nest(config: dict[str, Any]) -> None:
            outside = ("architectures", "model_type", "dtype", "quantization_config", "tie_word_embeddings")
            inner = {key: config.pop(key) for key in list(config) if key not in outside}
            config |= {"text_config": inner, "model_type": "gemma3", "vision_config": {"num_hidden_layers": 3}}
            config["architectures"] = ["Gemma3ForConditionalGeneration"]

        def join(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.startswith("model.")]:
                tensors[f"language_model.{name}"] = tensors.pop(name)
            for layer in range(3):
                for leaf in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1"):
                    tensors[f"{TOWER}.encoder.layers.{layer}.{leaf}.weight"] = torch.randn(64, 64).bfloat16()
                tensors[f"{TOWER}.encoder.layers.{layer}.layer_norm1.weight"] = torch.ones(64).bfloat16()
            tensors[f"{TOWER}.embeddings.position_embedding.weight"] = torch.randn(16, 64).bfloat16()
            tensors["multi_modal_projector.linear.weight"] = torch.randn(64, 64).bfloat16()

        edit_config(folder, nest)
        edit_tensors(folder, join)
        return folder

    return make


TOWER = "vision_tower.vision_model"


def test_tower_that_the_ignore_list_names_has_no_finding(multimodal: Callable[[Base], Path]) -> None:
    folder = multimodal("head")  # KV scales per head, whose number stands in text_config
    edit_quantization(folder, lambda quant: quant["ignore"].extend(["re:.*vision_tower.*", "re:.*projector.*"]))
    report = validate(folder)
    assert not report.findings, [f.sentence() for f in report.findings]


@pytest.mark.parametrize("layer", ["model.vision_tower.encoder.layers", f"model.{TOWER}.encoder.layers"])
def test_tower_that_is_ignored_under_transformers_names_has_no_finding(
    multimodal: Callable[[Base], Path], layer: str
) -> None:
    folder = multimodal("channel")
    leaves = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.fc1")
    names = [f"{layer}.{number}.{leaf}" for number in range(3) for leaf in leaves]
    names.append("model.multi_modal_projector.linear")
    edit_quantization(folder, lambda quant: quant["ignore"].extend(names))
    assert not validate(folder, depth="headers").errors


@pytest.mark.parametrize(("base", "is_error"), [("channel", True), ("fp8-block", False)])
def test_bf16_tower_that_the_config_takes_for_quantized_is_said(
    multimodal: Callable[[Base], Path], base: Base, is_error: bool
) -> None:
    report = validate(multimodal(base), depth="headers")
    assert ids(report) == {"K5"}
    assert (len(report.findings), len(report.errors)) == (13, 13 * is_error)
    assert all("ignore list" in finding.expected for finding in report.findings)


def test_quantized_tower_is_judged_like_the_decoder(multimodal: Callable[[Base], Path]) -> None:
    folder = multimodal("channel")

    def encode(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if n.startswith((TOWER, "multi_modal")) and tensors[n].dim() == 2]:
            if "embedding" not in name:
                scale = tensors[name].float().abs().amax(1, keepdim=True) / 448
                tensors[f"{name}_scale"] = scale
                tensors[name] = as_codes(tensors[name].float() / scale)

    edit_tensors(folder, encode)
    report = validate(folder)
    assert not report.findings, [f.sentence() for f in report.findings]
    drop(folder, f"{TOWER}.encoder.layers.1.mlp.fc1.weight_scale")
    assert [finding.check for finding in validate(folder, depth="headers").findings] == ["K2"]


def test_layer_of_a_tower_does_not_stand_in_for_one_of_the_decoder(multimodal: Callable[[Base], Path]) -> None:
    folder = multimodal("channel")
    edit_quantization(folder, lambda quant: quant["ignore"].extend(["re:.*vision_tower.*", "re:.*projector.*"]))
    drop(folder, *(name for name in load_all(folder) if ".model.layers.1." in name))
    (finding,) = validate(folder, depth="headers").errors
    assert (finding.check, finding.found) == ("K6", "layer 1 has no tensor")


@pytest.mark.parametrize("place", ["mtp.layers.0", "model.layers.2"])
@pytest.mark.parametrize("is_quantized", [False, True])
def test_layer_that_predicts_a_second_token_is_quantized_or_not(
    shelf: Path, tmp_path: Path, place: str, is_quantized: bool
) -> None:
    """Both are published: DeepSeek's in FP8, others in BF16; with a record, transformers knows neither."""
    source = reference.copy(shelf / "dense", tmp_path / "source")
    numbered = int(place.startswith("model"))

    def join(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.0.")]:
            tensors[name.replace("model.layers.0", place)] = tensors[name].clone()
        tensors[f"{place.removesuffix('.layers.0')}.eh_proj.weight"] = torch.randn(64, 128).bfloat16()

    edit_tensors(source, join)
    edit_config(source, lambda config: config.update(num_nextn_predict_layers=numbered))
    folder = reference.quantize(source, tmp_path / "fp8", strategy="channel", static=False)
    if not is_quantized:
        kept = {name: tensor for name, tensor in load_all(source).items() if name.startswith(place)}

        def keep(tensors: dict[str, torch.Tensor]) -> None:
            for name in [name for name in tensors if name.startswith(place)]:
                tensors.update({name: kept[name]}) if name in kept else tensors.pop(name)

        edit_tensors(folder, keep)
        report = validate(folder)
        assert (ids(report), len(report.findings), report.sound) == ({"K5"}, 1, True)
        edit_quantization(folder, lambda quant: quant["ignore"].append(f"re:.*{place}.*"))
    for report in (validate(folder), validate(folder, source=resolve(str(source)))):
        assert not report.findings, [f.sentence() for f in report.findings]
    alter(folder, f"{place}.mlp.down_proj.weight", lambda weight: weight.flip(0))
    expected = "D1" if is_quantized else "D4"
    assert expected in ids(validate(folder, source=resolve(str(source))))


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


def test_source_whose_values_are_not_known_is_said(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    source = reference.copy(shelf / "dense", tmp_path / "source")
    alter(source, f"{O_PROJ}.weight", as_codes)
    (finding,) = validate(checkpoint("dense", "channel"), source=resolve(str(source))).findings
    assert (finding.check, finding.severity, finding.tensor) == ("D8", "warning", f"{O_PROJ}.weight")


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
