"""Checkpoints of this engine: sound under every recipe, and known to the last bit from their records."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import reference_checkpoints as reference
from support.findings import ids
from support.malformed import add, alter, drop, edit_tensors, shards_of
from support.tiny_models import architecture_of, calibration_for, plan_of, recipe

from fp8pipe import stages
from fp8pipe.config import CalibrationSpec, Recipe
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve, with_hashes
from fp8pipe.model.architecture import Architecture
from fp8pipe.oracle import configs
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import Plan, make_plan
from fp8pipe.records import Checkpoint, FileHash, Manifest, ValidationReport
from fp8pipe.records.calibration import Calibration
from fp8pipe.validate import validate

Models = Callable[..., Path]

MSE = {"strategy": "channel", "observer": "mse"}
KINDS: list[tuple[str, str, dict[str, object], set[str]]] = [
    ("llama", "fp8-dynamic", {}, set()),
    ("llama", "fp8-dynamic", {"weights": MSE}, set()),
    ("llama", "fp8-static-kv", {}, set()),
    ("llama", "fp8-static", {"weights": {"strategy": "tensor", "observer": "mse"}}, set()),
    ("llama", "fp8-static-kv", {"kv_cache": {"strategy": "head"}}, set()),
    ("llama-tied", "autofp8-static", {}, {"C9"}),
    ("qwen2", "autofp8-dynamic", {}, {"C9"}),
    ("phi3", "fp8-dynamic", {}, set()),
    ("phi3", "fp8-static-kv", {}, set()),
    ("gpt-neox", "fp8-static-kv", {"kv_cache": {"strategy": "head"}}, set()),
    ("opt", "fp8-static-kv", {}, set()),
    ("gemma3-text", "fp8-static-kv", {}, set()),
    ("qwen3-moe", "fp8-dynamic", {}, set()),
    ("qwen3-moe", "fp8-static-kv", {}, set()),
    ("mixtral", "fp8-dynamic", {}, set()),
    ("deepseek-v2", "fp8-dynamic", {}, set()),
    ("deepseek-v4", "fp8-dynamic", {}, set()),  # ignore entries of transformers' names, no end of which is on disk
    ("longcat", "fp8-dynamic", {}, set()),  # experts that do nothing, two attention modules in each layer
    ("axk2", "fp8-dynamic", {}, set()),  # Linears inside norms
    ("olmo-hybrid", "fp8-static-kv", {}, set()),
    ("kimi-linear", "fp8-static", {}, set()),
]
"""Model, recipe, changes to it, and warnings that are true of the result."""


def make(source: Path, folder: Path, wanted: Recipe) -> tuple[Plan, Calibration | None]:
    plan = plan_of(source, wanted)
    calibration = calibration_for(plan) if wanted.needs_calibration else None
    quantize(resolve(str(source)), plan, folder, calibration=calibration)
    return plan, calibration


def judge(folder: Path, source: Path) -> ValidationReport:
    return validate(folder, source=resolve(str(source)), architecture=architecture_of(source))


@pytest.mark.parametrize(
    ("model", "name", "changes", "warnings"), KINDS, ids=[f"{m}-{n}-{i}" for i, (m, n, *_) in enumerate(KINDS)]
)
def test_checkpoint_of_the_engine_has_no_finding(
    model_folder: Models, tmp_path: Path, model: str, name: str, changes: dict[str, object], warnings: set[str]
) -> None:
    source = model_folder(model)
    make(source, tmp_path / "fp8", recipe(name, **changes))
    report = judge(tmp_path / "fp8", source)
    assert ids(report) - {"K10"} == warnings, [finding.sentence() for finding in report.findings]
    assert {"P7", "P8", "D7"} <= set(report.checks)
    assert ids(validate(tmp_path / "fp8")) - {"K10"} == warnings


@pytest.mark.parametrize("name", ["fp8-dynamic", "fp8-static-kv"])
def test_records_do_not_tell_where_a_local_dataset_lies(model_folder: Models, tmp_path: Path, name: str) -> None:
    data = CalibrationSpec(dataset=str(tmp_path / "data.jsonl"))
    make(model_folder("llama"), tmp_path / "fp8", recipe(name, calibration=data))
    assert "P6" not in ids(validate(tmp_path / "fp8"))


# ---------------------------------------------------------------------------------------------- exact


@pytest.fixture
def made(model_folder: Models, tmp_path: Path) -> tuple[Path, Path]:
    """Source and checkpoint, static with a KV cache."""
    make(model_folder("llama"), tmp_path / "fp8", recipe("fp8-static-kv"))
    return model_folder("llama"), tmp_path / "fp8"


def flip(folder: Path, name: str, index: int = 0, bit: int = 0) -> None:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.reshape(-1) if tensor.dim() == 0 else tensor
        tensor.view(torch.uint8).view(-1)[index] ^= 1 << bit
        return tensor

    alter(folder, name, change)


def test_code_that_rounding_allows_is_not_the_engine_s_code(made: tuple[Path, Path]) -> None:
    """The lowest bit of a code next to a tie: within every tolerance, and yet not what was written."""
    source, folder = made
    name = "model.layers.0.mlp.down_proj.weight"
    codes = {path: load_file(path) for path in shards_of(folder) if name in load_file(path)}
    (tensors,) = codes.values()
    weight = next(t[name] for path in sorted(source.glob("*.safetensors")) if name in (t := load_file(path))).float()
    scaled = weight / tensors[f"{name}_scale"]
    near = tensors[name].float()
    distance = (scaled - near).abs() / torch.exp2(torch.frexp(near.abs().clamp(min=2.0**-6)).exponent - 4.0)
    at = int(distance.argmax())  # nearly half a step
    up = 1 if bool((scaled.abs() > near.abs()).view(-1)[at]) else -1

    def move(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8).view(-1)[at] += up
        return tensor

    alter(folder, name, move)
    (finding,) = judge(folder, source).errors
    assert (finding.check, finding.tensor, finding.found) == ("D7", name, "1 other codes")


@pytest.mark.parametrize(
    ("leaf", "expected"),
    [
        ("mlp.down_proj.weight_scale", "D7"),
        ("mlp.down_proj.input_scale", "V11"),
        ("self_attn.k_scale", "V11"),
    ],
)
def test_lowest_bit_of_a_scale_is_known(made: tuple[Path, Path], leaf: str, expected: str) -> None:
    source, folder = made
    name = f"model.layers.1.{leaf}"
    flip(folder, name)
    report = judge(folder, source)
    assert expected in {finding.check for finding in report.errors}
    assert all(finding.tensor and leaf.split(".")[-2] in finding.tensor for finding in report.errors)


def test_tensor_unknown_to_the_source_is_an_error_whether_the_source_is_named_or_only_recorded(
    made: tuple[Path, Path],
) -> None:
    source, folder = made
    add(folder, "model.layers.0.extra.weight", torch.ones(2, 2, dtype=torch.bfloat16))
    named, recorded = (
        [(finding.severity, finding.tensor) for finding in report.findings if finding.check == "K8"]
        for report in (judge(folder, source), validate(folder, architecture=architecture_of(source)))
    )
    assert named == recorded == [("error", "model.layers.0.extra.weight")]


def test_calibration_that_was_altered_is_not_the_one_of_the_record(made: tuple[Path, Path]) -> None:
    source, folder = made
    path = folder / "fp8pipe" / "calibration.json"
    Calibration.load(path).scaled(1.5).save(path)
    assert {finding.check for finding in judge(folder, source).errors} == {"P7", "V11"}


def test_source_of_another_commit_is_reported(made: tuple[Path, Path]) -> None:
    source, folder = made
    path = folder / "fp8pipe" / "checkpoint.json"
    Checkpoint.load(path).model_copy(update={"source_commit": "a" * 40}).save(path)
    theirs = resolve(str(source)).model_copy(update={"commit": "b" * 40})
    report = validate(folder, source=theirs, architecture=architecture_of(source), depth="headers")
    assert [finding.check for finding in report.errors] == ["P7", "P7"]  # against the plan, against the source given


def test_file_longer_than_planned_is_an_error(made: tuple[Path, Path]) -> None:
    source, folder = made
    tensors = load_file(shards_of(folder)[0])
    save_file(tensors, shards_of(folder)[0], metadata={"format": "pt", "note": "x" * 100})
    assert {finding.check for finding in judge(folder, source).errors} == {"P8"}


def test_manifest_knows_every_file(made: tuple[Path, Path]) -> None:
    source, folder = made
    names = [path for path in sorted(folder.iterdir()) if path.is_file()]
    files = [
        FileHash(name=p.name, size=p.stat().st_size, sha256=hashlib.sha256(p.read_bytes()).hexdigest()) for p in names
    ]
    fingerprint = Checkpoint.load(folder / "fp8pipe" / "checkpoint.json").fingerprint
    manifest = Manifest(repo_id="acme/tiny", tag="v1", fingerprint=fingerprint, identity="", files=tuple(files))
    manifest.save(folder / "fp8pipe" / "manifest.json")
    assert not judge(folder, source).findings
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (finding,) = judge(folder, source).findings
    assert (finding.check, finding.file) == ("P9", "config.json")


def test_record_that_cannot_be_read_is_reported_and_the_rest_is_judged(made: tuple[Path, Path]) -> None:
    source, folder = made
    (folder / "fp8pipe" / "plan.json").write_text("{}")
    report = judge(folder, source)
    assert ([finding.check for finding in report.findings], report.sound) == (["P7"], True)
    assert "D7" not in report.checks and "D1" in report.checks


# ---------------------------------------------------------------------------------------------- edits, without a source


def _edit(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def _speakers(folder: Path) -> list[str]:
    return [finding.check for finding in validate(folder, depth="headers").errors]


@pytest.mark.usefixtures("architecture_cache")
def test_edit_of_config_json_is_known_by_the_record_of_the_source_s(made: tuple[Path, Path]) -> None:
    _, folder = made
    _edit(folder, lambda config: config.update(rms_norm_eps=0.5, attention_bias=False, transformers_version="4.0.0"))
    (finding,) = validate(folder, depth="headers").findings
    assert (finding.check, finding.severity, finding.found) == ("C7", "error", "0.5")


def test_nobody_is_asked_about_a_config_that_nobody_edited(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = made
    monkeypatch.setattr(configs, "compare", None)
    _edit(folder, lambda config: config.update(reversed(list(config.items()))))
    assert "C7" in validate(folder, depth="headers").checks and not judge(folder, source).findings


def test_library_that_could_not_be_asked_about_a_key_is_named_and_the_key_stays_an_error(
    made: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = made
    smell = configs.Difference(key="smell", expected="absent", found="'sweet'", readers=("vLLM",))
    silent = {"vLLM": "it could build neither model here: RuntimeError: not supported on CPU."}
    answer = configs.Comparison(readers=("transformers", "vLLM"), differences=(smell,), unheard=silent)
    monkeypatch.setattr(configs, "compare", lambda *_, **__: answer)
    _edit(folder, lambda config: config.update(smell="sweet"))
    found = [finding for finding in validate(folder, depth="headers").findings if finding.check == "C7"]
    assert [finding.severity for finding in found] == ["warning", "error"]
    assert "not supported on CPU" in found[0].found and "perhaps" in found[1].consequence


@pytest.mark.parametrize(
    "change",
    [
        lambda group: group["input_activations"].update(strategy="token", dynamic=True),
        lambda group: group.update(input_activations=None),
        lambda group: group["weights"].update(strategy="channel"),
        lambda group: group.update(targets=["re:.*mlp.*"]),
    ],
)
def test_scheme_that_contradicts_the_plan_is_an_error(
    made: tuple[Path, Path], change: Callable[[dict[str, Any]], None]
) -> None:
    _, folder = made
    _edit(folder, lambda config: change(config["quantization_config"]["config_groups"]["group_0"]))
    assert "C10" in _speakers(folder)


def test_other_spelling_of_the_planned_scheme_is_no_finding(made: tuple[Path, Path]) -> None:
    _, folder = made

    def spell(config: dict[str, Any]) -> None:
        quant = config["quantization_config"]
        quant["ignore"].reverse()
        del quant["sparsity_config"], quant["global_compression_ratio"]

    _edit(folder, spell)
    assert not _speakers(folder)


@pytest.mark.parametrize(
    ("name", "check"),
    [
        ("preprocessor_config.json", "P4"),
        ("modules.json", "P4"),
        ("sentence_bert_config.json", "P4"),
        ("processor_config.json", "P4"),
        ("chat_template.jinja", "P3"),
        ("generation_config.json", "P2"),
        ("tokenizer_config.json", "P1"),
    ],
)
def test_file_that_the_source_lacks_is_known_by_the_record_of_its_files(
    made: tuple[Path, Path], name: str, check: str
) -> None:
    source, folder = made
    theirs = with_hashes(resolve(str(source)))
    theirs = theirs.model_copy(update={"files": tuple(file for file in theirs.files if file.name != name)})
    theirs.model_copy(update={"root": None}).save(folder / "fp8pipe" / "source.json")
    (folder / name).unlink(missing_ok=True)
    assert not _speakers(folder)
    (folder / name).write_text("{}")
    assert _speakers(folder) == [check]


def test_edited_file_of_the_same_size_is_known_by_the_record_of_a_local_source(
    model_folder: Models, tmp_path: Path
) -> None:
    folder = tmp_path / "fp8"
    source = Path(shutil.copytree(model_folder("llama", shard_size="1GB"), tmp_path / "source"))
    (source / "tokenizer_config.json").write_text('{"add_bos_token": true }')
    stages.quantize_model(str(source), recipe(), folder)
    assert not validate(folder, depth="headers").findings
    (folder / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    assert _speakers(folder) == ["P1"]
    record = folder / "fp8pipe" / "source.json"
    resolve(str(source)).model_copy(update={"root": None}).save(record)  # as versions before this one wrote it
    found = {f.check: f for f in validate(folder, depth="headers").findings}
    assert found["P1"].severity == "warning" and "no hash of tokenizer_config.json" in found["P1"].found


# ---------------------------------------------------------------------------------------------- a source that is FP8


def fp8_twin(model: Path, folder: Path, *, block: bool) -> Path:
    """The model with FP8 projections of quant_method fp8: by blocks, or with one scale each."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        rows, columns = weight.shape
        if block:
            padded = torch.nn.functional.pad(weight.abs(), (0, -columns % 128, 0, -rows % 128))
            scale = padded.view(len(padded) // 128, 128, -1, 128).amax((1, 3)) / 448
            full = scale.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
        else:
            scale = full = weight.abs().amax() / 448
        tensors |= {name: (weight / full).to(torch.float8_e4m3fn), f"{name}_scale{'_inv' if block else ''}": scale}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    quantization: dict[str, object] = {"quant_method": "fp8", "activation_scheme": "dynamic" if block else "static"}
    config["quantization_config"] = quantization | ({"weight_block_size": [128, 128]} if block else {})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(params=[True, False], ids=["blocks", "per tensor"])
def requantized(request: pytest.FixtureRequest, model_folder: Models, tmp_path: Path) -> tuple[Path, Path]:
    """FP8 source and the checkpoint made of it, in which down_proj stays unquantized."""
    source = fp8_twin(
        model_folder("llama", shard_size="1GB", hidden_size=200), tmp_path / "source", block=request.param
    )
    make(source, tmp_path / "fp8", recipe(fp8_source="requantize", ignore=["re:.*down_proj"]))
    return source, tmp_path / "fp8"


def test_checkpoint_of_an_fp8_source_has_no_finding_and_is_compared(requantized: tuple[Path, Path]) -> None:
    source, folder = requantized
    report = judge(folder, source)
    assert ids(report) <= {"K10"}, [finding.sentence() for finding in report.findings]
    o_proj = "model.layers.1.self_attn.o_proj.weight"
    alter(folder, o_proj, lambda codes: codes.view(torch.uint8).flip(0).view(torch.float8_e4m3fn))
    assert {("D1", o_proj), ("D7", o_proj)} <= {(f.check, f.tensor) for f in judge(folder, source).errors}


def test_weight_that_an_fp8_source_s_scales_give_back_is_known_to_the_last_bit(requantized: tuple[Path, Path]) -> None:
    source, folder = requantized
    name = "model.layers.1.mlp.down_proj.weight"
    flip(folder, name, index=401)
    (finding,) = (finding for finding in judge(folder, source).errors if finding.check != "P8")  # the file is rewritten
    assert (finding.check, finding.tensor, "at 401 of" in finding.found) == ("D4", name, True)


# ---------------------------------------------------------------------------------------------- what a layer lacks


@pytest.fixture(scope="module")
def deep(model_folder: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """Sources of four layers and their checkpoints."""
    root = tmp_path_factory.mktemp("deep")
    made = {}
    for model in ("llama", "qwen3-moe"):
        source = model_folder(model, num_hidden_layers=4)
        make(source, root / model, recipe())
        made[model] = (source, root / model)
    return made


@pytest.mark.parametrize(
    ("model", "part", "missing"),
    [
        ("llama", "layers.3.self_attn.q_proj.", "model.layers.3.self_attn.q_proj.weight"),
        ("llama", "layers.0.mlp.up_proj.", "model.layers.0.mlp.up_proj.weight"),
        ("llama", "layers.2.input_layernorm.", "model.layers.2.input_layernorm.weight"),
        ("qwen3-moe", "layers.1.mlp.experts.*.up_proj.", "model.layers.1.mlp.experts.*.up_proj.weight"),
        ("qwen3-moe", "layers.1.mlp.gate.", "model.layers.1.mlp.gate.weight"),
    ],
)
def test_what_all_layers_but_one_have_is_missed_without_a_source(
    deep: dict[str, tuple[Path, Path]], tmp_path: Path, model: str, part: str, missing: str
) -> None:
    source, made = deep[model]
    folder = Path(shutil.copytree(made, tmp_path / "fp8"))
    drop(folder, *(name for name in reference.read(folder)[0] if fnmatchcase(name, f"*{part}*")))
    for depth in ("headers", "values"):
        found = {(finding.check, finding.tensor) for finding in validate(folder, depth=depth).errors}
        assert found - {("P8", None)} == {("K1", missing)}
    report = validate(folder, architecture=architecture_of(source), depth="headers")
    named = {finding.tensor for finding in report.errors if finding.check in ("K1", "K6")}
    wanted = [missing.replace("*", str(expert)) for expert in range(4 if "*" in missing else 1)]
    assert set(wanted) <= named


def test_norm_behind_the_layers_is_missed_with_a_record(deep: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    source, made = deep["llama"]
    folder = Path(shutil.copytree(made, tmp_path / "fp8"))
    drop(folder, "model.norm.weight")
    report = validate(folder, architecture=architecture_of(source), depth="headers")
    assert ("K1", "model.norm.weight") in {(finding.check, finding.tensor) for finding in report.errors}


def test_first_layer_may_do_without_a_norm_of_its_own(deep: dict[str, tuple[Path, Path]], tmp_path: Path) -> None:
    """As that of ModernBERT does."""
    folder = Path(shutil.copytree(deep["llama"][1], tmp_path / "fp8"))
    drop(folder, "model.layers.0.input_layernorm.weight")
    assert not [finding for finding in validate(folder, depth="headers").errors if finding.check == "K1"]


@pytest.mark.parametrize("fused", [False, True])
def test_record_without_its_source_knows_the_experts(model_folder: Models, tmp_path: Path, fused: bool) -> None:
    source = model_folder("qwen3-moe", shard_size="1GB")
    source = fuse_experts(source, tmp_path / "source", False, False) if fused else source
    architecture = with_layout(architecture_of(source), False, False) if fused else architecture_of(source)
    snapshot = resolve(str(source))
    quantize(snapshot, make_plan(snapshot, read_headers(snapshot), recipe(), architecture), tmp_path / "fp8")
    assert not validate(tmp_path / "fp8", architecture=architecture).findings
    names = reference.read(tmp_path / "fp8")[0]
    drop(tmp_path / "fp8", *(name for name in names if "layers.1" in name and "up_proj" in name))
    report = validate(tmp_path / "fp8", architecture=architecture, depth="headers")
    missing = {finding.tensor for finding in report.errors if finding.check == "K6"}
    assert missing == {f"model.layers.1.mlp.experts.{expert}.up_proj.weight" for expert in range(4)}


# ---------------------------------------------------------------------------------------------- experts in one tensor


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_experts_split_from_one_tensor_are_compared_with_their_part_of_it(
    model_folder: Models, tmp_path: Path, transposed: bool, interleaved: bool
) -> None:
    source = fuse_experts(model_folder("qwen3-moe", shard_size="1GB"), tmp_path / "source", transposed, interleaved)
    architecture = with_layout(architecture_of(source), transposed, interleaved)
    snapshot = resolve(str(source))
    plan = make_plan(snapshot, read_headers(snapshot), recipe(), architecture)
    quantize(snapshot, plan, tmp_path / "fp8")
    assert not validate(tmp_path / "fp8", source=snapshot, architecture=architecture).findings
    up, gate = (f"model.layers.1.mlp.experts.2.{name}_proj.weight" for name in ("up", "gate"))

    def swap(tensors: dict[str, torch.Tensor]) -> None:
        for leaf in ("", "_scale"):
            tensors[up + leaf], tensors[gate + leaf] = tensors[gate + leaf], tensors[up + leaf]

    edit_tensors(tmp_path / "fp8", swap)
    report = validate(tmp_path / "fp8", source=snapshot, architecture=architecture)
    assert {finding.tensor for finding in report.errors} == {up, gate}
    assert {"D1", "D7"} <= {finding.check for finding in report.errors}


def fuse_experts(model: Path, folder: Path, transposed: bool, interleaved: bool) -> Path:
    """The model with all experts of a layer in two tensors, gate and up side by side or alternating."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        holder = f"model.layers.{layer}.mlp.experts"
        found = {
            name: torch.stack([tensors.pop(f"{holder}.{expert}.{name}_proj.weight") for expert in range(4)])
            for name in ("gate", "up", "down")
        }
        both = [found["gate"], found["up"]]
        fused = {"gate_up_proj": torch.stack(both, 2).flatten(1, 2) if interleaved else torch.cat(both, 1)}
        for name, tensor in (fused | {"down_proj": found["down"]}).items():
            tensors[f"{holder}.{name}"] = (tensor.transpose(1, 2) if transposed else tensor).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_layout(architecture: Architecture, transposed: bool, interleaved: bool) -> Architecture:
    """The record for a model whose experts have this layout."""
    roles = dict(architecture.tensors)
    for name, role in architecture.tensors.items():
        if role.kind == "fused_experts" and role.layout is not None:
            is_both = len(role.layout.projections) == 2
            layout = {"transposed": transposed, "interleaved": interleaved and is_both}
            roles[name] = role.model_copy(update={"layout": role.layout.model_copy(update=layout)})
    return architecture.model_copy(update={"tensors": roles, "misfits": ()})
