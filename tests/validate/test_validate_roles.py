"""The validator finds each tensor's role from names alone: Linear or not, expert, tower, second-token predictor."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import reference_checkpoints as reference
from support.findings import ids
from support.malformed import (
    Q_PROJ,
    Base,
    Model,
    add,
    alter,
    drop,
    edit_config,
    edit_quantization,
    edit_tensors,
)
from support.tiny_models import architecture_of, plan_of, recipe

from fp8pipe.hub.source import resolve
from fp8pipe.model.headers import TensorInfo
from fp8pipe.quantize import quantize
from fp8pipe.validate import validate
from fp8pipe.validate.meaning.layout import Layout, layout_from_names
from fp8pipe.validate.meaning.names import attention_of_kv_scale

pytestmark = pytest.mark.usefixtures("architecture_cache")


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
    """The layout that the names of weights [64, 64] give."""
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
    from fp8pipe.model.fused import FUSED, FUSED_BESIDE_CONVOLUTIONS

    for group in FUSED:
        modules = tuple(f"model.layers.0.linear_attn.{leaf}" for leaf in group)
        assert layout_of(*modules).fused == (modules,)
    for group in FUSED_BESIDE_CONVOLUTIONS.values():
        modules = tuple(f"model.layers.0.linear_attn.{leaf}" for leaf in group)
        assert layout_of(*modules, "model.layers.0.linear_attn.q_conv1d").fused == (modules,)


@pytest.mark.parametrize("key", ["num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"])
def test_number_of_experts_goes_by_several_names(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path, key: str
) -> None:
    folder = reference.copy(checkpoint("moe", "channel"), tmp_path / "fp8")
    edit_config(folder, lambda config: config.update({key: config.pop("num_experts")}))
    assert not ids(validate(folder, depth="headers"))
    drop(folder, *(name for name in reference.tensors_of(folder) if ".experts.3." in name))
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
def test_bf16_tower_that_the_config_takes_for_quantized_is_reported(
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
    drop(folder, *(name for name in reference.tensors_of(folder) if ".model.layers.1." in name))
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
        kept = {name: tensor for name, tensor in reference.tensors_of(source).items() if name.startswith(place)}

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


# ---------------------------------------------------------------------------------------------- kinds of experts


@pytest.mark.parametrize("lost", [(), (2,), (6,)], ids=["whole", "text", "images"])
def test_experts_of_two_kinds_in_one_row_are_counted_together(
    model_folder: Callable[..., Path], tmp_path: Path, lost: tuple[int, ...]
) -> None:
    """config.json counts four experts of each kind, and the files number all eight in one row."""
    source, folder = model_folder("ernie-vl-moe"), tmp_path / "fp8"
    quantize(resolve(str(source)), plan_of(source, recipe("fp8-dynamic")), folder)
    holder = "model.layers.1.mlp.experts"
    weights = [f"{holder}.{expert}.{name}_proj.{leaf}" for expert in lost for name in NAMES for leaf in LEAVES]
    if weights:
        drop(folder, *weights)
    lacking = {name for name in weights if name.endswith(".weight")}
    known = validate(folder, source=resolve(str(source)), architecture=architecture_of(source), depth="headers")
    for report in (validate(folder, depth="headers"), known):
        assert {finding.tensor for finding in report.findings if finding.check == "K6"} == lacking


NAMES, LEAVES = ("gate", "up", "down"), ("weight", "weight_scale")


def test_experts_that_neither_config_nor_source_counts_are_too_many(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    """Twice as many in every layer, which nothing says are of two kinds."""
    folder = reference.copy(checkpoint("moe", "channel"), tmp_path / "fp8")

    def double(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            head, _, tail = name.partition(".experts.")
            expert, _, leaf = tail.partition(".")
            tensors[f"{head}.experts.{int(expert) + 4}.{leaf}"] = tensors[name].clone()

    edit_tensors(folder, double)
    extra = [finding for finding in validate(folder, depth="headers").errors if finding.check == "K6"]
    assert {finding.found for finding in extra} == {f"expert {index}" for index in range(4, 8)}


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({"moe_num_experts": [4, 4], "moe_intermediate_size": [64, 32]}, 8),
        ({"moe_num_experts": 4, "moe_intermediate_size": [64, 32]}, 8),
        ({"moe_num_experts": 4, "moe_intermediate_size": 64}, 4),
        ({"num_experts": 4, "moe_intermediate_size": [64] * 2}, 4),
        ({"moe_num_experts": [4, "4"]}, None),
    ],
    ids=str,
)
def test_config_counts_experts_of_each_kind(config: dict[str, Any], count: int | None) -> None:
    assert layout_from_names({}, config).num_experts == count


@pytest.mark.parametrize(
    ("module", "attention"),
    [
        ("model.layers.0.self_attn", "model.layers.0.self_attn"),
        ("model.layers.0.self_attn.attn", "model.layers.0.self_attn"),
        ("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn"),
        ("transformer.blocks.0.norm_attn_norm.attn", "transformer.blocks.0.norm_attn_norm.attn"),
    ],
)
def test_a_kv_scale_belongs_to_the_attention_that_it_names(module: str, attention: str) -> None:
    assert attention_of_kv_scale(module) == attention
