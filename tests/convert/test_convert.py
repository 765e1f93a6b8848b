"""Another spelling holds the same bytes, says the same scheme, refuses what it cannot say, and claims no evidence."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_checkpoints as reference
from support.tiny_models import calibration_for, plan_of, recipe
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.convert import Conversion, convert, plan_conversion
from fp8pipe.convert import write as write_module
from fp8pipe.errors import InputError, Refused, SourceChanged
from fp8pipe.gate.publishable import require_publishable
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.identity import folder_identity
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import Checkpoint
from fp8pipe.stages import convert as convert_model
from fp8pipe.validate import validate

Models = Callable[..., Path]
Tensors = dict[str, torch.Tensor]


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def weights_of(folder: Path) -> dict[str, str]:
    """Content of every safetensors file."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))}


def everything(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def to(method: str | None, source: Path, folder: Path) -> Conversion:
    done, written = convert_model(str(source), folder, to=method)  # type: ignore[arg-type]  # a plain string
    assert written == folder
    return done


def same(left: Tensors, right: Tensors) -> bool:
    return left.keys() == right.keys() and all(
        left[n].dtype == right[n].dtype
        and left[n].shape == right[n].shape
        and torch.equal(left[n].reshape(-1).view(torch.uint8), right[n].reshape(-1).view(torch.uint8))
        for n in left
    )


def edit(folder: Path, change: Callable[[Tensors, dict[str, Any]], None], shards: int = 1) -> Path:
    """Rewrite a reference checkpoint: `change` may alter its tensors and its quantization_config."""
    tensors, config = reference.read(folder)
    change(tensors, config["quantization_config"])
    for path in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        path.unlink()
    return reference.write(folder, tensors, config, shards, {})


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.llama(tmp_path_factory.mktemp("source") / "llama")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reference.moe(tmp_path_factory.mktemp("source") / "moe")


SCHEMES: dict[str, dict[str, Any]] = {
    "tensor static with KV": {"kv": "tensor"},
    "tensor static": {},
    "tensor dynamic": {"static": False},
    "block": {"strategy": "block", "static": False},
    "one file": {"shards": 1},
}


# ---------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", ["compressed-tensors", "fp8"])
def test_there_and_back_is_the_original_byte_for_byte(llama: Path, tmp_path: Path, scheme: str, first: Any) -> None:
    other = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[first]
    source = reference.quantize(llama, tmp_path / "source", method=first, **SCHEMES[scheme])
    before = everything(source)
    to(other, source, tmp_path / "there")
    to(first, tmp_path / "there", tmp_path / "back")
    there, back = tensors_of(tmp_path / "there"), tensors_of(tmp_path / "back")
    assert same(tensors_of(source), back) or first == "fp8"  # the reference writes [1] in both spellings
    for name, tensor in tensors_of(source).items():
        renamed = name.replace("weight_scale_inv", "weight_scale") if other != "fp8" else name
        renamed = f"{name}_inv" if other == "fp8" and scheme == "block" and name.endswith("weight_scale") else renamed
        assert torch.equal(there[renamed].float().reshape(-1), tensor.float().reshape(-1))
        assert torch.equal(back[name].float().reshape(-1), tensor.float().reshape(-1))
    assert everything(source) == before
    if first == "compressed-tensors":
        assert weights_of(tmp_path / "back") == weights_of(source)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("first", ["compressed-tensors", "fp8"])
def test_the_result_has_no_error_and_its_readers_parse_its_config(
    llama: Path, tmp_path: Path, scheme: str, first: Any
) -> None:
    from compressed_tensors.quantization import QuantizationConfig
    from transformers import FineGrainedFP8Config

    other = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[first]
    source = reference.quantize(llama, tmp_path / "source", method=first, **SCHEMES[scheme])
    to(other, source, tmp_path / "out")
    snapshot = resolve(str(llama))
    assert [finding.sentence() for finding in validate(tmp_path / "out", source=snapshot).errors] == []
    config = config_of(tmp_path / "out")
    if other == "fp8":
        parsed: Any = FineGrainedFP8Config.from_dict(dict(config))
        assert parsed.modules_to_not_convert == ["lm_head"]
    else:
        groups: Any = QuantizationConfig.model_validate(config).config_groups
        (group,) = groups.values()
        assert group.weights is not None and group.input_activations is not None
        assert group.targets == ["Linear"]
        assert bool(group.input_activations.dynamic) == (SCHEMES[scheme].get("static") is False)


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_scales_in_bf16_become_the_same_numbers_in_float32(llama: Path, tmp_path: Path, method: Any) -> None:
    other = {"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[method]
    source = reference.quantize(llama, tmp_path / "source", method=method, scale_dtype=torch.bfloat16)
    done = to(other, source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    scales = [name for name in ours if name.endswith("weight_scale")]
    assert len(scales) == 14
    for name in scales:
        assert ours[name].dtype == torch.float32 and theirs[name].dtype == torch.bfloat16
        assert ours[name].item() == theirs[name].float().item()
    assert any("weight_scale BF16 [1] -> weight_scale F32" in change.what for change in done.changes) or method == "fp8"


def test_float16_scales_widen_exactly(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", scale_dtype=torch.float16)
    to("fp8", source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    assert all(ours[n].item() == theirs[n].float().item() for n in ours if n.endswith("weight_scale"))


@pytest.mark.parametrize("model", ["llama", "qwen3-moe", "mixtral"])
@pytest.mark.parametrize("name", ["fp8-static-kv", "fp8-block", "fp8-static"])
def test_it_equals_what_quantize_writes_in_that_spelling(
    model_folder: Models, tmp_path: Path, model: str, name: str
) -> None:
    source = model_folder(model, head_dim=64, hidden_size=256, intermediate_size=384)
    changes = {"ignore": ["re:.*layers\\.0\\..*experts"]} if model == "qwen3-moe" and name != "fp8-block" else {}
    for method in ("compressed-tensors", "fp8"):
        wanted = recipe(name, checkpoint_format=method, **changes)
        plan = plan_of(source, wanted)
        quantize(resolve(str(source)), plan, tmp_path / method, calibration=calibrated(plan))
    for method, other in (("compressed-tensors", "fp8"), ("fp8", "compressed-tensors")):
        to(other, tmp_path / method, tmp_path / f"made {other}")
        assert weights_of(tmp_path / f"made {other}") == weights_of(tmp_path / other)
        for file in (path.name for path in (tmp_path / other).iterdir() if path.is_file()):
            assert (tmp_path / f"made {other}" / file).read_bytes() == (tmp_path / other / file).read_bytes()


def calibrated(plan: Plan) -> Any:
    return calibration_for(plan) if plan.settings.needs_calibration else None


def test_kept_modules_are_named_exactly_and_experts_by_layer(moe: Path, tmp_path: Path) -> None:
    source = reference.quantize(moe, tmp_path / "source")
    assert "re:.*mlp\\.gate$" in config_of(source)["ignore"]
    to("fp8", source, tmp_path / "fp8")
    routers = [f"model.layers.{layer}.mlp.gate" for layer in (0, 1)]
    # the reference quantizes attention alone in this model: experts are in PROJECTIONS too
    assert config_of(tmp_path / "fp8")["ignored_layers"] == ["lm_head", *routers]
    to("compressed-tensors", tmp_path / "fp8", tmp_path / "back")
    assert config_of(tmp_path / "back")["ignore"] == ["lm_head", *routers]
    assert same(tensors_of(source), tensors_of(tmp_path / "back"))


def test_unquantized_experts_are_ignored_under_each_readers_name(moe: Path, tmp_path: Path) -> None:
    original = tensors_of(moe)

    def keep_experts(tensors: Tensors, config: dict[str, Any]) -> None:
        for name in [name for name in tensors if ".experts." in name]:
            if name.endswith("_scale"):
                del tensors[name]
            else:
                tensors[name] = original[name]
        config["ignore"] = ["lm_head", "re:.*mlp\\..*"]

    source = edit(reference.quantize(moe, tmp_path / "source"), keep_experts)
    to("fp8", source, tmp_path / "fp8")
    holders = [f"model.layers.{layer}.mlp.experts" for layer in (0, 1)]
    assert config_of(tmp_path / "fp8")["ignored_layers"][-2:] == holders
    to("compressed-tensors", tmp_path / "fp8", tmp_path / "back")
    assert config_of(tmp_path / "back")["ignore"][-2:] == [f"re:.*layers\\.{n}\\.mlp\\.experts\\..*" for n in (0, 1)]
    for folder in ("fp8", "back"):
        assert validate(tmp_path / folder, source=resolve(str(moe))).errors == ()


# ---------------------------------------------------------------------------------------------- what the folder is


def test_companions_are_copied_byte_for_byte_and_the_card_is_not(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    (source / "README.md").write_text("# accepted by the gate")
    (source / "modeling_own.py").write_text("raise SystemExit")
    (source / "hf_quant_config.json").write_text("{}")
    to("fp8", source, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    gone = {"README.md", "hf_quant_config.json", "config.json", "model.safetensors.index.json"}
    for path in source.iterdir():
        if path.name not in gone and path.suffix != ".safetensors":
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert names & {"README.md", "hf_quant_config.json"} == set()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(tmp_path / "out").keys()
    ours, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", source))
    assert ours.pop("quantization_config") != theirs.pop("quantization_config") and ours == theirs


def test_the_config_of_a_composite_model_has_one_quantization_config(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    config["text_config"] = {"quantization_config": config.pop("quantization_config"), "hidden_size": 64}
    (source / "config.json").write_text(json.dumps(config))
    to("fp8", source, tmp_path / "out")
    made = json.loads((tmp_path / "out" / "config.json").read_text())
    assert made["text_config"] == {"hidden_size": 64} and made["quantization_config"]["quant_method"] == "fp8"


def test_the_lineage_says_from_what_into_what_and_by_which_version(llama: Path, tmp_path: Path) -> None:
    import fp8pipe

    source = reference.quantize(llama, tmp_path / "source")
    done = to("fp8", source, tmp_path / "out")
    assert Conversion.load(tmp_path / "out" / "fp8pipe" / "conversion.json") == done
    assert done.source_commit == resolve(str(source)).commit and done.model_id == "source"
    assert (done.source_method, done.method, done.version) == ("compressed-tensors", "fp8", fp8pipe.__version__)
    assert done.source_config == config_of(source) and done.source_fingerprint is None
    assert [file.name for file in (tmp_path / "out" / "fp8pipe").iterdir()] == ["conversion.json"]


@pytest.fixture(scope="module")
def gated(model_folder: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ours with every record that a release leaves."""
    folder = tmp_path_factory.mktemp("gated") / "checkpoint"
    source = model_folder("llama")
    plan = plan_of(source, recipe("fp8-static-kv"))
    snapshot = resolve(str(source))
    quantize(snapshot, plan, folder, calibration=calibration_for(plan))
    snapshot.model_copy(update={"root": None}).save(folder / "fp8pipe" / "source.json")
    for name in ("validation", "policy", "baseline", "candidate", "gate", "approval", "manifest", "release"):
        (folder / "fp8pipe" / f"{name}.json").write_text("{}")
    (folder / "fp8pipe" / "plots").mkdir()
    (folder / "fp8pipe" / "plots" / "drop.png").write_bytes(b"png")
    (folder / "README.md").write_text("# accepted")
    return folder


def test_no_evidence_of_the_source_comes_with_the_result(gated: Path, tmp_path: Path) -> None:
    done = to("fp8", gated, tmp_path / "out")
    records = tmp_path / "out" / "fp8pipe"
    own = {"source.json", "calibration.json", "plan.json", "checkpoint.json", "conversion.json"}
    assert {path.name for path in records.iterdir()} == own
    assert not (tmp_path / "out" / "README.md").exists()
    theirs, ours = (Checkpoint.load(folder / "fp8pipe" / "checkpoint.json") for folder in (gated, tmp_path / "out"))
    assert done.source_fingerprint == theirs.fingerprint != ours.fingerprint == done.fingerprint
    with pytest.raises(Refused, match=r"validation\.json"):
        require_publishable(tmp_path / "out")


def test_the_records_of_the_result_speak_of_the_result(gated: Path, tmp_path: Path) -> None:
    to("fp8", gated, tmp_path / "out")
    plan = Plan.load(tmp_path / "out" / "fp8pipe" / "plan.json")
    headers = read_headers(resolve(str(tmp_path / "out")))
    assert [output.info for output in plan.outputs] == list(headers.tensors.values())
    assert plan.settings.checkpoint_format == "fp8" and plan.quantization_config == config_of(tmp_path / "out")
    checkpoint = Checkpoint.load(tmp_path / "out" / "fp8pipe" / "checkpoint.json")
    assert checkpoint.output_bytes == headers.nbytes == plan.output_bytes
    assert checkpoint.recipe_digest == plan.settings.digest()


def test_a_verdict_copied_over_by_hand_is_of_another_checkpoint(gated: Path, tmp_path: Path) -> None:
    from support.sample_folders import accepted, measured, validation

    folder = tmp_path / "out"
    to("fp8", gated, folder)
    fingerprint = Checkpoint.load(gated / "fp8pipe" / "checkpoint.json").fingerprint
    validation(folder).save(folder / "fp8pipe" / "validation.json")
    measured(folder).save(folder / "fp8pipe" / "candidate.json")
    verdict = accepted(folder).model_copy(update={"candidate_fingerprint": fingerprint})
    verdict.save(folder / "fp8pipe" / "gate.json")
    with pytest.raises(Refused, match="the gate decided on checkpoint"):
        require_publishable(folder)


def test_a_checkpoint_of_ours_that_was_altered_is_anybodys(gated: Path, tmp_path: Path) -> None:
    altered = shutil.copytree(gated, tmp_path / "altered")
    shard = sorted(altered.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    save_file(tensors | {"extra.bias": torch.zeros(2)}, shard, {"format": "pt"})
    index = json.loads((altered / "model.safetensors.index.json").read_text())
    index["weight_map"]["extra.bias"] = shard.name
    (altered / "model.safetensors.index.json").write_text(json.dumps(index))
    done = to("fp8", altered, tmp_path / "out")
    assert done.source_fingerprint is None
    assert [path.name for path in (tmp_path / "out" / "fp8pipe").iterdir()] == ["conversion.json"]


# ---------------------------------------------------------------------------------------------- legacy names


def rename(tensors: Tensors, old: str, new: str) -> int:
    names = [name for name in tensors if name.endswith(old)]
    for name in names:
        tensors[name.removesuffix(old) + new] = tensors.pop(name)
    return len(names)


def old_autofp8(tensors: Tensors, config: dict[str, Any]) -> None:
    """AutoFP8 before June 2024: act_scale, one kv_scale a layer, scales without dimensions."""
    assert rename(tensors, ".input_scale", ".act_scale") == 14
    assert rename(tensors, ".k_scale", ".kv_scale") == 2
    for name in [name for name in tensors if name.endswith("_scale")]:
        tensors[name] = tensors[name].reshape(())
    for layer in (0, 1):
        del tensors[f"model.layers.{layer}.self_attn.v_scale"]


@pytest.mark.parametrize("shards", [1, 2])
def test_act_scale_and_kv_scale_become_what_vllm_reads(llama: Path, tmp_path: Path, shards: int) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8", kv="tensor")
    edit(source, old_autofp8, shards)
    done = to(None, source, tmp_path / "out")
    theirs, ours = tensors_of(source), tensors_of(tmp_path / "out")
    assert {(change.what, change.tensors) for change in done.changes} == {
        ("act_scale -> input_scale", 14),
        ("kv_scale -> k_scale, v_scale", 2),
    }
    assert not any(name.endswith(("act_scale", "kv_scale")) for name in ours)
    for name in (name for name in theirs if name.endswith(".act_scale")):
        assert torch.equal(ours[name.replace("act_scale", "input_scale")], theirs[name])
    for layer in (0, 1):
        at = f"model.layers.{layer}.self_attn"
        assert ours[f"{at}.k_scale"] == ours[f"{at}.v_scale"] == theirs[f"{at}.kv_scale"]
    assert (tmp_path / "out" / "config.json").read_bytes() == (source / "config.json").read_bytes()
    if shards > 1:
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert index["weight_map"].keys() == ours.keys()
    assert validate(tmp_path / "out", source=resolve(str(llama))).sound
    assert not validate(source).sound


def test_migrate_and_to_go_together(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8", kv="tensor")
    today = to("compressed-tensors", source, tmp_path / "today")
    edit(source, old_autofp8)
    to("compressed-tensors", source, tmp_path / "out")
    ours, expected = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "today")
    assert config_of(tmp_path / "out") == config_of(tmp_path / "today") and today.changes
    for name, tensor in expected.items():
        if not name.endswith("v_scale"):
            assert torch.equal(ours[name], tensor)
    assert validate(tmp_path / "out", source=resolve(str(llama))).sound


@pytest.mark.parametrize(
    ("spelled", "method"),
    [
        (".self_attn.{x}_proj.{x}_scale", "compressed-tensors"),
        (".self_attn.attn.{x}_scale", "compressed-tensors"),
        (".self_attn.qkv_proj.{x}_scale", "fp8"),
        (".self_attn.{x}_proj.output_scale", "fp8"),
    ],
)
def test_kv_scales_of_other_tools_get_their_canonical_place(
    llama: Path, tmp_path: Path, spelled: str, method: Any
) -> None:
    source = reference.quantize(llama, tmp_path / "source", method=method, kv="tensor")
    expected = tensors_of(source)

    def move(tensors: Tensors, _: dict[str, Any]) -> None:
        for x in "kv":
            assert rename(tensors, f".self_attn.{x}_scale", spelled.format(x=x)) == 2

    edit(source, move)
    to(None, source, tmp_path / "out")
    assert same(expected, tensors_of(tmp_path / "out"))


def test_per_tensor_scales_of_transformers_get_vllms_names(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8")
    expected = tensors_of(source)

    def as_transformers(tensors: Tensors, config: dict[str, Any]) -> None:
        rename(tensors, ".weight_scale", ".weight_scale_inv")
        rename(tensors, ".input_scale", ".activation_scale")
        config["weight_block_size"] = None
        config["modules_to_not_convert"] = config.pop("ignored_layers")

    edit(source, as_transformers)
    done = to(None, source, tmp_path / "out")
    assert {change.what for change in done.changes} == {
        "activation_scale -> input_scale",
        "weight_scale_inv -> weight_scale",
    }
    assert same(expected, tensors_of(tmp_path / "out"))
    assert validate(tmp_path / "out", source=resolve(str(llama))).sound


def test_block_scales_keep_their_name_in_fp8(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8", strategy="block", static=False)
    assert to(None, source, tmp_path / "out").changes == () and not (tmp_path / "out").exists()


def test_configs_written_by_hand_are_completed(moe: Path, tmp_path: Path) -> None:
    def by_hand(_: Tensors, config: dict[str, Any]) -> None:
        del config["activation_scheme"]
        config["ignored_layers"] = ["re:.*lm_head", "re:.*mlp\\.gate$"]

    source = edit(reference.quantize(moe, tmp_path / "source", method="fp8"), by_hand)
    done = to(None, source, tmp_path / "out")
    config = config_of(tmp_path / "out")
    assert config["activation_scheme"] == "static"
    assert config["ignored_layers"] == ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
    assert [change.tensors for change in done.changes] == [0, 0]
    assert same(tensors_of(source), tensors_of(tmp_path / "out"))
    assert validate(tmp_path / "out", source=resolve(str(moe))).sound


def test_a_stale_name_beside_the_current_one_is_not_guessed(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", method="fp8")
    at = "model.layers.0.mlp.up_proj"
    edit(source, lambda tensors, _: tensors.update({f"{at}.act_scale": torch.ones(1)}))
    with pytest.raises(InputError, match=rf"{at}\.input_scale: two tensors"):
        to(None, source, tmp_path / "out")


@pytest.mark.parametrize("wanted", [None, "compressed-tensors"])
def test_nothing_to_do_writes_nothing_and_says_so(llama: Path, tmp_path: Path, wanted: Any) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    assert to(wanted, source, tmp_path / "out").changes == ()
    assert not (tmp_path / "out").exists()
    options = ["--migrate"] if wanted is None else ["--to", wanted]
    result = CliRunner().invoke(app, ["convert", str(source), *options])
    assert result.exit_code == 0 and "nothing was written" in " ".join(result.output.split())
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


# ---------------------------------------------------------------------------------------------- refusals

Change = Callable[[Tensors, dict[str, Any]], None]
AT = "model.layers.1.mlp.up_proj"


def group(config: dict[str, Any]) -> dict[str, Any]:
    return config["config_groups"]["group_0"]


def two_groups(_: Tensors, config: dict[str, Any]) -> None:
    other = json.loads(json.dumps(group(config))) | {"targets": [f"re:{AT}"]}
    other["input_activations"] |= {"dynamic": True}
    config["config_groups"] = {"group_1": other, "group_0": group(config)}


def head_in_fp8(tensors: Tensors, config: dict[str, Any]) -> None:
    tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.float8_e4m3fn)
    tensors |= {"lm_head.weight_scale": torch.ones(1), "lm_head.input_scale": torch.ones(1)}
    config["ignore"] = []
    group(config)["targets"] = ["Linear", "re:.*lm_head"]


def drop(name: str) -> Change:
    return lambda tensors, _: tensors.__delitem__(name) or None


def put(name: str, value: torch.Tensor) -> Change:
    return lambda tensors, _: tensors.update({name: value})


def set_in_group(**values: Any) -> Change:
    return lambda _, config: group(config).update(values)


def static_per_token(_: Tensors, config: dict[str, Any]) -> None:
    group(config)["input_activations"] |= {"strategy": "token"}


REFUSED: dict[str, tuple[dict[str, Any], Change | None, str]] = {
    "channel weights": ({"strategy": "channel", "static": False}, None, "a scale per output channel"),
    "weight-only": ({"static": False}, set_in_group(input_activations=None), "only weights are FP8"),
    "KV per head": ({"kv": "attn_head"}, None, "KV cache has a scale per head"),
    "static per token": ({}, static_per_token, "expected static inputs per tensor, found token"),
    "several schemes": ({}, two_groups, "several schemes in one model"),
    "FP8 lm_head": ({}, head_in_fp8, "lm_head is FP8"),
    "FP8 outputs": ({}, set_in_group(output_activations={"num_bits": 8}), "output_activations has no counterpart"),
    "transforms": ({}, lambda _, c: c.update(transform_config={"R1": {}}), "transform_config has no counterpart"),
    "sparsity": ({}, lambda _, c: c.update(sparsity_config={"targets": ["Linear"]}), "sparsity_config has no"),
    "ignored yet FP8": ({}, lambda _, c: c.update(ignore=[AT]), f"{AT}.weight is FP8, but config.json"),
    "no scale": ({}, drop(f"{AT}.weight_scale"), f"{AT}.weight is FP8 and has no weight_scale"),
    "no input scale": ({}, drop(f"{AT}.input_scale"), f"{AT}.weight is FP8 and has no input_scale"),
    "input scale of a dynamic scheme": ({"static": False}, put(f"{AT}.input_scale", torch.ones(1)), "has no place"),
    "scale of another shape": ({}, put(f"{AT}.weight_scale", torch.ones(160, 1)), r"weight_scale \[160, 1\] has no"),
    "zero point": ({}, put(f"{AT}.weight_zero_point", torch.ones(1)), "weight_zero_point .* has no place"),
    "double scale": ({}, put(f"{AT}.weight_scale", torch.ones(1).double()), "a scale in F64"),
    "E5M2": ({}, put(f"{AT}.weight", torch.zeros(160, 64).to(torch.float8_e5m2)), "F8_E5M2"),
    "experts in one tensor": (
        {},
        put("model.layers.1.mlp.experts.down_proj", torch.zeros(2, 8, 8).to(torch.float8_e4m3fn)),
        r"experts\.down_proj: F8_E4M3",
    ),
    "lonely k_scale": ({}, put("model.layers.0.self_attn.k_scale", torch.ones(1)), "k_scale has no v_scale"),
    "another method": ({}, lambda _, c: c.update(quant_method="gptq"), "quant_method 'gptq'; only"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_fp8_cannot_say_is_refused_with_the_reason(llama: Path, tmp_path: Path, case: str) -> None:
    options, change, reason = REFUSED[case]
    source = reference.quantize(llama, tmp_path / "source", **options)
    if change is not None:
        edit(source, change)
    with pytest.raises(InputError, match=reason):
        to("fp8", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unquantized_model_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no quantization_config"):
        to("fp8", llama, tmp_path / "out")


@pytest.mark.parametrize("method", ["compressed-tensors", "fp8"])
def test_half_quantized_experts_are_refused(moe: Path, tmp_path: Path, method: Any) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj"

    def keep_one(tensors: Tensors, config: dict[str, Any]) -> None:
        for leaf in ("weight_scale", "input_scale"):
            del tensors[f"{name}.{leaf}"]
        tensors[f"{name}.weight"] = tensors[f"{name}.weight"].bfloat16()
        config["ignore" if method != "fp8" else "ignored_layers"].append(name)

    source = edit(reference.quantize(moe, tmp_path / "source", method=method), keep_one)
    with pytest.raises(InputError, match=r"some experts are FP8 .* others are not"):
        to({"compressed-tensors": "fp8", "fp8": "compressed-tensors"}[method], source, tmp_path / "out")


def test_experts_that_compressed_tensors_has_no_kernel_for_stay_fp8(moe: Path, tmp_path: Path) -> None:
    source = reference.quantize(moe, tmp_path / "source", method="fp8", static=False)
    with pytest.raises(InputError, match=r"vLLM serves experts with .* not tensor weights with dynamic activations"):
        to("compressed-tensors", source, tmp_path / "out")


def test_the_absorbed_mla_projection_with_a_static_scale_stays_fp8(llama: Path, tmp_path: Path) -> None:
    def as_mla(tensors: Tensors, _: dict[str, Any]) -> None:
        for leaf in ("weight", "weight_scale", "input_scale"):
            rename(tensors, f".k_proj.{leaf}", f".kv_b_proj.{leaf}")

    source = edit(reference.quantize(llama, tmp_path / "source", method="fp8"), as_mla)
    with pytest.raises(InputError, match="kv_b_proj has a static input scale"):
        to("compressed-tensors", source, tmp_path / "out")


def test_notes_say_what_readers_do_otherwise(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source", kv="tensor")
    notes = " ".join(to("fp8", source, tmp_path / "fp8").notes)
    assert "--kv-cache-dtype fp8" in notes and "for vLLM alone" in notes
    (note,) = to("compressed-tensors", tmp_path / "fp8", tmp_path / "back").notes
    assert "keep the KV cache in FP8 without being asked" in note

    def deepseek(_: Tensors, config: dict[str, Any]) -> None:
        config |= {"scale_fmt": "ue8m0", "fmt": "e4m3"}
        del config["ignored_layers"]

    block = reference.quantize(llama, tmp_path / "block", method="fp8", strategy="block", static=False)
    (note,) = to("compressed-tensors", edit(block, deepseek), tmp_path / "out").notes
    assert "ue8m0" in note and config_of(tmp_path / "out")["ignore"] == ["lm_head"]


# ---------------------------------------------------------------------------------------------- folders and kills


def test_the_output_must_be_a_new_folder_apart_from_the_source(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    before = everything(source)
    for folder in (source, source / "out", tmp_path):
        with pytest.raises(InputError, match="may not lie in one another"):
            to("fp8", source, folder)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"not empty \(it holds thesis\.txt\)"):
        to("fp8", source, tmp_path / "full")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(InputError, match="is no folder"):
        to("fp8", source, tmp_path / "file")
    assert everything(source) == before and (tmp_path / "full" / "thesis.txt").read_text() == "mine"


def test_a_finished_folder_is_returned_untouched_and_anothers_is_not_taken(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    other = reference.quantize(llama, tmp_path / "other", static=False)
    first = to("fp8", source, tmp_path / "out")
    identity = folder_identity(tmp_path / "out")
    assert to("fp8", source, tmp_path / "out") == first and folder_identity(tmp_path / "out") == identity
    with pytest.raises(InputError, match="not empty"):
        to("fp8", other, tmp_path / "out")


def test_tiles_change_no_byte_and_progress_ends_with_all_bytes(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    to("fp8", source, tmp_path / "whole")
    monkeypatch.setattr(write_module, "TILE", 1000)
    events: list[ProgressEvent] = []
    snapshot = resolve(str(source))
    plan = plan_conversion(snapshot, read_headers(snapshot), to="fp8")
    convert(plan, tmp_path / "tiles", progress=events.append)
    assert weights_of(tmp_path / "tiles") == weights_of(tmp_path / "whole")
    assert events[-1].done == events[-1].total == sum(t.nbytes for t in tensors_of(tmp_path / "whole").values())
    assert len(events) > events[-1].done / 1000


def test_a_source_that_changes_is_noticed_and_leaves_no_model(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    snapshot = resolve(str(source))
    plan = plan_conversion(snapshot, read_headers(snapshot), to="fp8")
    shard = sorted(source.glob("*.safetensors"))[0]

    def touch(event: ProgressEvent) -> None:
        shard.write_bytes(shard.read_bytes())

    with pytest.raises(SourceChanged):
        convert(plan, tmp_path / "out", progress=touch)
    assert not (tmp_path / "out" / "config.json").exists() and not list((tmp_path / "out").glob("*.safetensors"))


KILLED = """
import os, signal, sys
from pathlib import Path
from fp8pipe.hub.headers import read_headers
from fp8pipe.convert import convert, plan_conversion
from fp8pipe.errors import Fp8PipeError
from fp8pipe.hub.source import resolve

source, out = Path(sys.argv[1]), Path(sys.argv[2])
snapshot = resolve(str(source))
plan = plan_conversion(snapshot, read_headers(snapshot), to="fp8")

def killed_before_rename(number, folder):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            seen += event == "os.rename"
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        convert(plan, folder)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0

kills = 0
while killed_before_rename(kills + 1, out / f"one {kills}"):
    folder = out / f"one {kills}"
    complete = len(list(folder.glob("*.safetensors"))) == len(plan.shards())
    assert complete or not (folder / "config.json").exists(), "an unfinished folder looks like a model"
    killed_before_rename(1, folder)
    convert(plan, folder)
    kills += 1
folder = out / "many"
for number in (1, 2, 2, 3, 3, 1, 2, 4):
    killed_before_rename(number, folder)
convert(plan, folder)
print(kills)
"""


def test_killed_before_any_rename_and_run_again_the_folder_is_that_of_an_undisturbed_run(
    llama: Path, tmp_path: Path
) -> None:
    source = reference.quantize(llama, tmp_path / "source", shards=3, kv="tensor")
    to("fp8", source, tmp_path / "undisturbed")
    command = [sys.executable, "-c", KILLED, str(source), str(tmp_path / "out")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 1 + 3 + 5 + 1 + 1 + 1  # mark, shards, companions, index, config.json, lineage
    expected = everything(tmp_path / "undisturbed")
    folders = sorted((tmp_path / "out").iterdir())
    assert len(folders) == 14
    assert all(everything(folder) == expected for folder in folders)


def test_unfinished_work_of_another_conversion_is_not_taken_over(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "source")
    (tmp_path / "out" / "fp8pipe").mkdir(parents=True)
    (tmp_path / "out" / "fp8pipe" / "convert.journal").write_text("of something else")
    with pytest.raises(InputError, match="unfinished conversion of something else"):
        to("fp8", source, tmp_path / "out")


# ---------------------------------------------------------------------------------------------- command line


def test_the_command_names_its_folder_and_shows_what_changed(llama: Path, tmp_path: Path) -> None:
    source = reference.quantize(llama, tmp_path / "model")
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "fp8"])
    assert result.exit_code == 0, result.output
    assert "input_scale [1] -> input_scale []" in result.output and "14" in result.output
    assert config_of(tmp_path / "model-fp8")["quant_method"] == "fp8"
    result = CliRunner().invoke(app, ["convert", str(source), "--to", "fp8", "-o", str(tmp_path / "x"), "--json"])
    assert json.loads(result.stdout)["folder"] == str(tmp_path / "x")


@pytest.mark.parametrize("arguments", [["--output", "x"], ["--to", "nvfp4"]])
def test_a_command_without_a_meaning_exits_2(llama: Path, arguments: list[str]) -> None:
    assert CliRunner().invoke(app, ["convert", str(llama), *arguments]).exit_code == 2
