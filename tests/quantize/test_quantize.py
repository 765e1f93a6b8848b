"""The engine: bytes equal a naive reference on every scheme, a kill costs nothing, and what is wrong is said once."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.numerics import reference_amax, reference_codes
from support.tiny_models import architecture_of, calibration_for, make_model, plan_of, recipe
from torch import Tensor

from fp8pipe import quantize as quantize_module
from fp8pipe import stages
from fp8pipe.config import Recipe
from fp8pipe.errors import EnvironmentFault, InputError, NonFiniteWeight, NoSuitableDevice, SourceChanged
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import TensorRole
from fp8pipe.progress import ProgressEvent
from fp8pipe.quantize import fingerprint, identity, quantize
from fp8pipe.quantize.engine import run as run_module
from fp8pipe.quantize.engine import views
from fp8pipe.quantize.engine import weights as engine
from fp8pipe.quantize.numerics import SHRINKS
from fp8pipe.quantize.plan import Plan, make_plan
from fp8pipe.records import Checkpoint
from fp8pipe.records.calibration import KVRange

Models = Callable[..., Path]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def bytes_of(folder: Path) -> dict[str, str]:
    """Content of every file of a folder; of its records only what is identity."""
    names = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    found = {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in names}
    record = json.loads((folder / "fp8pipe" / "checkpoint.json").read_text())
    found["fp8pipe/checkpoint.json"] = json.dumps(record | {"seconds": 0})
    return found


def make(source: Path, wanted: Recipe, out: Path, **options: Any) -> tuple[Plan, Checkpoint]:
    plan = plan_of(source, wanted)
    calibration = calibration_for(plan) if wanted.needs_calibration else None
    return plan, quantize(resolve(str(source)), plan, out, calibration=calibration, **options)


def reference_scale(weights: list[Tensor], scheme: Any) -> list[Tensor]:
    """Scales of a group of weights by the textbook: joint amax per tensor, own per row or block; mse by trying all."""
    strategy = scheme.strategy
    block = tuple(scheme.block_shape)
    amaxes = [reference_amax(weight, strategy, block) for weight in weights]
    if strategy == "tensor":
        amaxes = [torch.stack(amaxes).max()] * len(weights)
    if scheme.observer == "minmax":
        return [amax.clamp(min=1e-12) / 448 for amax in amaxes]
    best = None
    for shrink in SHRINKS:
        scales = [(amax * torch.tensor(shrink)).clamp(min=1e-12) / 448 for amax in amaxes]
        errors = []
        for weight, scale in zip(weights, scales, strict=True):
            full = scale
            if strategy == "block":
                full = scale.repeat_interleave(block[0], 0)[: len(weight)]
                full = full.repeat_interleave(block[1], 1)[:, : weight.shape[1]]
            codes = (weight.float() / full).clamp(-448, 448).to(torch.float8_e4m3fn)
            square = (codes.float() * full - weight.float()).double().square()
            if strategy == "tensor":
                errors.append(square.sum())
            elif strategy == "channel":
                errors.append(square.sum(1, keepdim=True))
            else:
                bands = [torch.stack([p.sum() for p in band.split(block[1], 1)]) for band in square.split(block[0], 0)]
                errors.append(torch.stack(bands))
        if strategy == "tensor":
            errors = [torch.stack(errors).sum()] * len(weights)
        if best is None:
            best = [scales, errors]
        else:
            for i, error in enumerate(errors):
                better = error < best[1][i]
                best[0][i] = torch.where(better, scales[i], best[0][i])
                best[1][i] = torch.where(better, error, best[1][i])
    assert best is not None
    return best[0]


def assert_equals_reference(source: dict[str, Tensor], made: dict[str, Tensor], plan: Plan) -> None:
    scheme = plan.settings.weights
    block = tuple(scheme.block_shape) if scheme.strategy == "block" else None
    groups: dict[str, list[Any]] = {}
    for output in plan.outputs:
        if output.role == "copy":
            assert torch.equal(made[output.name].view(torch.uint8), source[output.source].view(torch.uint8)), (
                output.name
            )
        if output.role == "weight":
            together = scheme.strategy == "tensor" and scheme.share_scales and output.group
            groups.setdefault(output.group if together else output.name, []).append(output)
    scale_of = {output.module: output.name for output in plan.outputs if output.role == "weight_scale"}
    for members in groups.values():
        weights = [weight_behind(source[output.source], output.slice) for output in members]
        for output, weight, scale in zip(members, weights, reference_scale(weights, scheme), strict=True):
            found = made[scale_of[output.module]]
            assert found.dtype == torch.float32
            assert torch.equal(found.flatten(), scale.flatten()), output.name
            codes = reference_codes(weight, scale, block)
            assert torch.equal(made[output.name].view(torch.uint8), codes.view(torch.uint8)), output.name


def weight_behind(tensor: Tensor, part: Any) -> Tensor:
    """The Linear weight [out, in] that a slice means, by plain indexing."""
    if part is None:
        return tensor
    matrix = tensor[part.expert].T if part.transposed else tensor[part.expert]
    rows = matrix[part.start :: part.step]
    return rows if part.step > 1 else rows[: len(matrix) // 2] if len(matrix) == 2 * matrix.shape[1] else rows


DYNAMIC = {"mode": "dynamic", "strategy": "token"}
SCHEMES: dict[str, dict[str, Any]] = {
    "channel": {},
    "tensor": {"weights": {"strategy": "tensor"}},
    "tensor, own scales": {"weights": {"strategy": "tensor", "share_scales": False}},
    "block": {"weights": {"strategy": "block"}, "activations": {"mode": "dynamic", "strategy": "group"}},
    "channel mse": {"weights": {"strategy": "channel", "observer": "mse"}},
    "tensor mse": {"weights": {"strategy": "tensor", "observer": "mse"}},
    "block mse": {"weights": {"strategy": "block", "observer": "mse"}},
    "fp8 block": {"weights": {"strategy": "block"}, "checkpoint_format": "fp8"},
    "fp8 tensor": {"weights": {"strategy": "tensor"}, "checkpoint_format": "fp8"},
    "weight only": {"activations": None},
}


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(scheme, "bfloat16") for scheme in SCHEMES]
    + [(scheme, dtype) for scheme in ("channel", "tensor", "block mse") for dtype in ("float16", "float32")],
)
def test_bytes_equal_the_reference(model_folder: Models, tmp_path: Path, scheme: str, dtype: str) -> None:
    source = model_folder("llama", dtype=dtype, head_dim=64, intermediate_size=384, hidden_size=200)
    plan, _ = make(source, recipe(**SCHEMES[scheme]), tmp_path / "out")
    assert any(output.role == "weight" for output in plan.outputs)
    assert_equals_reference(tensors_of(source), tensors_of(tmp_path / "out"), plan)


@pytest.mark.parametrize("scheme", ["channel", "tensor mse", "block mse"])
@pytest.mark.parametrize("stripe", [1, 5000, 1 << 30])
def test_threads_and_stripes_change_no_byte(
    model_folder: Models, tmp_path: Path, scheme: str, stripe: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = model_folder("llama", head_dim=64, intermediate_size=384, hidden_size=200)
    make(source, recipe(**SCHEMES[scheme]), tmp_path / "one", threads=1)
    monkeypatch.setattr(views, "STRIPE_BYTES", stripe)
    monkeypatch.setattr(engine, "STRIPE_BYTES", stripe)
    make(source, recipe(**SCHEMES[scheme]), tmp_path / "many", threads=3)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "many")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_two_and_three_threads_write_the_same_bytes(model_folder: Models, tmp_path: Path, scheme: str) -> None:
    source = model_folder("llama", head_dim=64, intermediate_size=384, hidden_size=200)
    for threads in (1, 2, 3):
        make(source, recipe(**SCHEMES[scheme]), tmp_path / str(threads), threads=threads)
    assert bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2") == bytes_of(tmp_path / "3")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU here")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gpu_writes_the_bytes_of_the_cpu(model_folder: Models, tmp_path: Path, scheme: str, dtype: str) -> None:
    source = model_folder("llama", dtype=dtype, head_dim=64, intermediate_size=384, hidden_size=200)
    for device in ("cpu", "cuda"):
        make(source, recipe(**SCHEMES[scheme]), tmp_path / device, device=device)
    assert bytes_of(tmp_path / "cpu") == bytes_of(tmp_path / "cuda")


@pytest.mark.parametrize(
    ("asked", "used"), [("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), (None, "cpu")]
)
def test_a_gpu_that_a_command_names_is_the_one_that_quantizes(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str | None, used: str
) -> None:
    devices: list[str] = []

    def record(*arguments: Any, device: str, **options: Any) -> Checkpoint:
        devices.append(device)
        return quantize(*arguments, **options)

    monkeypatch.setattr(quantize_module, "quantize", record)
    source = model_folder("llama")
    options = {} if asked is None else {"device": asked}
    plan = plan_of(source, recipe())
    stages.quantize(resolve(str(source)), plan, tmp_path / "out", calibration=None, **options)
    assert devices == [used]


@pytest.mark.parametrize("device", ["xyz", "cuda:", "cuda:x", "mps", ""])
def test_a_device_that_is_none_is_refused(model_folder: Models, tmp_path: Path, device: str) -> None:
    with pytest.raises(InputError, match="expected auto, cpu, cuda"):
        make(model_folder("llama"), recipe(), tmp_path / "out", device=device)
    assert not (tmp_path / "out").exists()


def test_a_gpu_that_is_not_there_is_no_suitable_device(model_folder: Models, tmp_path: Path) -> None:
    with pytest.raises(NoSuitableDevice, match=r"cuda:99: torch finds \d+ GPUs"):
        make(model_folder("llama"), recipe(), tmp_path / "out", device="cuda:99")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["block", "channel mse", "block mse"])
@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_experts_equal_the_reference_under_every_scheme(
    model_folder: Models, tmp_path: Path, name: str, scheme: str
) -> None:
    source = model_folder(name, hidden_size=256, moe_intermediate_size=128, intermediate_size=128)
    plan, _ = make(source, recipe(**SCHEMES[scheme]), tmp_path / "out")
    assert any(".experts." in output.name and output.role == "weight" for output in plan.outputs)
    assert_equals_reference(tensors_of(source), tensors_of(tmp_path / "out"), plan)


@pytest.mark.parametrize(
    "name",
    [
        "llama-tied",
        "qwen2",
        "qwen3-moe",
        "mixtral",
        "gemma3-text",
        "phi3",
        "opt",
        "deepseek-v2",
        "gpt-oss",
        "granitemoe",
    ],
)
def test_every_architecture_equals_the_reference(model_folder: Models, tmp_path: Path, name: str) -> None:
    plan, _ = make(model_folder(name), recipe(), tmp_path / "out")
    assert_equals_reference(tensors_of(model_folder(name)), tensors_of(tmp_path / "out"), plan)


@pytest.mark.vllm
def test_vllm_has_a_place_for_every_tensor_of_experts_that_lie_beside_their_module(
    model_folder: Models, tmp_path: Path
) -> None:
    from fp8pipe.oracle.vllm import ask_vllm

    source = model_folder("granitemoe", hidden_size=256, intermediate_size=128)
    made = {name: tmp_path / name for name in ("fp8-dynamic", "autofp8-dynamic", "fp8-block", "fp8-static")}
    for name, folder in made.items():
        make(source, recipe(name), folder)
    answers = ask_vllm(list(made.values()))
    assert len(answers) == 4
    assert [(answer.refusal, answer.mismatches) for answer in answers.values()] == [("", ())] * 4


# ---------------------------------------------------------------------------------------------- experts in one tensor


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_experts_in_one_tensor_are_split_row_for_row(
    tmp_path: Path, transposed: bool, interleaved: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import ExitStack

    from fp8pipe.model.headers import TensorInfo, parse_header
    from fp8pipe.model.shards import SourceFiles
    from fp8pipe.quantize.plan import Slice

    monkeypatch.setattr(views, "STRIPE_BYTES", 70)
    monkeypatch.setattr(views, "TRANSPOSED_STRIPE_BYTES", 70)
    experts, width, hidden = 3, 10, 12
    gate, up = (torch.randn(experts, width, hidden).bfloat16() for _ in range(2))
    fused = torch.stack([gate, up], 2).flatten(1, 2) if interleaved else torch.cat([gate, up], 1)
    on_disk = fused.transpose(1, 2).contiguous() if transposed else fused
    save_file({"pad": torch.zeros(5), "w": on_disk}, tmp_path / "x.safetensors")
    content = (tmp_path / "x.safetensors").read_bytes()
    info = next(i for i in parse_header("x.safetensors", len(content), content).tensors if i.name == "w")
    assert isinstance(info, TensorInfo)
    with ExitStack() as stack:
        files = SourceFiles(tmp_path, stack)
        files.open("x.safetensors")
        for index, expected in enumerate((gate, up)):
            for expert in range(experts):
                start, step = (index, 2) if interleaved else (index * width, 1)
                part = Slice(expert=expert, start=start, step=step, transposed=transposed)
                view = views.WeightView(info, part, width, hidden)
                bench = views.Workbench()
                found = torch.cat([view.read(files, *rows, bench).clone() for rows in view.stripes(1)])
                assert len(view.stripes(1)) > 1
                assert torch.equal(found, expected[expert])
                row, column = 7, 5
                assert on_disk[view.index_of(row, column)] == expected[expert][row, column]


# ---------------------------------------------------------------------------------------------- calibrated scales


def test_calibrated_scales_are_amax_over_448_shared_in_fused_groups(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan = plan_of(source, recipe("fp8-static-kv", kv_cache={"strategy": "head"}))
    calibration = calibration_for(plan)
    quantize(resolve(str(source)), plan, tmp_path, calibration=calibration)
    made = tensors_of(tmp_path)
    layer = "model.layers.1"
    joint = max(calibration.inputs[f"{layer}.self_attn.{leaf}_proj"] for leaf in "qkv")
    for leaf in "qkv":
        scale = made[f"{layer}.self_attn.{leaf}_proj.input_scale"]
        assert torch.equal(scale, (torch.tensor([joint]) / 448))
    own = calibration.inputs[f"{layer}.mlp.down_proj"]
    assert torch.equal(made[f"{layer}.mlp.down_proj.input_scale"], torch.tensor([own]) / 448)
    assert torch.equal(made[f"{layer}.self_attn.k_scale"], torch.tensor([2.0, 3.0]).view(2, 1, 1) / 448)
    assert torch.equal(made[f"{layer}.self_attn.v_scale"], torch.tensor([3.0, 4.0]).view(2, 1, 1) / 448)
    assert (tmp_path / "fp8pipe" / "calibration.json").exists()


def spoil_input(value: float | None) -> Callable[[Plan], Any]:
    def spoil(plan: Plan) -> Any:
        ranges = calibration_for(plan)
        inputs = dict(ranges.inputs)
        name = "model.layers.0.mlp.up_proj"
        del inputs[name]
        return ranges.model_copy(update={"inputs": inputs | ({} if value is None else {name: value})})

    return spoil


def spoil_kv(k_amax: tuple[float, ...]) -> Callable[[Plan], Any]:
    def spoil(plan: Plan) -> Any:
        ranges = calibration_for(plan)
        kv = ranges.kv | {"model.layers.0.self_attn": KVRange(k_amax=k_amax, v_amax=(1.0,))}
        return ranges.model_copy(update={"kv": kv})

    return spoil


@pytest.mark.parametrize(
    "spoil",
    [
        lambda plan: None,
        spoil_input(None),
        spoil_input(math.nan),
        spoil_input(math.inf),
        spoil_input(-1.0),
        spoil_kv(()),
        spoil_kv((math.nan,)),
        spoil_kv((1.0, 2.0)),
        lambda plan: calibration_for(plan, source_commit="another"),
    ],
)
def test_a_missing_or_unusable_range_is_an_error_and_nothing_is_written(
    model_folder: Models, tmp_path: Path, spoil: Callable[[Plan], Any]
) -> None:
    plan = plan_of(model_folder("llama"), recipe("fp8-static-kv"))
    with pytest.raises(InputError, match="calibrat"):
        quantize(resolve(str(model_folder("llama"))), plan, tmp_path / "out", calibration=spoil(plan))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------------------------------------- the folder


def test_the_folder_holds_what_a_loader_needs_and_nothing_else(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    companions = {
        "tokenizer.json": b'{"version":  "1.0"}\r\n',
        "chat_template.jinja": b"{{ x }}",
        "LICENSE": b"free",
        "spiece.model": bytes(range(256)),
    }
    left_behind = ("README.md", "modeling_x.py", "pytorch_model.bin", "params.json", ".secret", "training_args.bin")
    for name, content in companions.items():
        (source / name).write_bytes(content)
    for name in left_behind:
        (source / name).write_bytes(b"{}")
    _, checkpoint = make(source, recipe(), tmp_path / "out")
    out = tmp_path / "out"
    for name, content in companions.items():
        assert (out / name).read_bytes() == content
    assert not any((out / name).exists() for name in left_behind)
    assert {path.name for path in (out / "fp8pipe").iterdir()} == {"plan.json", "checkpoint.json"}
    assert not list(out.glob(".*"))
    assert checkpoint.output_bytes == sum(path.stat().st_size for path in out.glob("*.safetensors"))


def test_config_json_gains_quantization_config_and_changes_nothing_else(model_folder: Models, tmp_path: Path) -> None:
    plan, _ = make(model_folder("llama"), recipe(), tmp_path)
    before = json.loads((model_folder("llama") / "config.json").read_text())
    after = json.loads((tmp_path / "config.json").read_text())
    assert after.pop("quantization_config") == plan.quantization_config
    assert list(after.items()) == list(before.items())


def test_all_zero_units_are_recorded(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3] = 0
    tensors["model.layers.1.self_attn.o_proj.weight"][:] = 0
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    _, checkpoint = make(source, recipe(), tmp_path / "out")
    assert checkpoint.zero_units == (
        "model.layers.0.mlp.down_proj.weight[3]",
        "model.layers.1.self_attn.o_proj.weight",
    )


def test_a_finished_folder_is_returned_untouched(model_folder: Models, tmp_path: Path) -> None:
    plan, first = make(model_folder("llama"), recipe(), tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert quantize(resolve(str(model_folder("llama"))), plan, tmp_path) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == times


def test_a_folder_with_another_model_is_not_overwritten(model_folder: Models, tmp_path: Path) -> None:
    make(model_folder("llama"), recipe(), tmp_path)
    before = bytes_of(tmp_path)
    with pytest.raises(InputError, match="another model or recipe"):
        make(model_folder("llama"), recipe("fp8-block"), tmp_path)
    assert bytes_of(tmp_path) == before
    with pytest.raises(InputError, match="same folder"):
        make(model_folder("llama"), recipe(), model_folder("llama"))


def test_unfinished_work_of_another_recipe_is_replaced(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    with pytest.raises(RuntimeError, match="stop"):
        make(source, recipe("fp8-block"), out, progress=Stop())
    make(source, recipe(), out)
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


ALL = 1000


@pytest.mark.parametrize("goes_on_as", ["fp8-dynamic", "fp8-block"])
@pytest.mark.parametrize("removed", [0, 1, 3, ALL])
def test_killed_while_unfinished_work_of_another_recipe_is_replaced_either_can_go_on(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed: int, goes_on_as: str
) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    snapshot, some = resolve(str(source)), sorted(source.glob("*.safetensors"))[:-1]
    with pytest.raises(EnvironmentFault, match="did not arrive"):
        quantize(snapshot, plan_of(source, recipe("fp8-block")), out, arriving=some)
    assert list(out.glob("*.safetensors")) and journalled(out)
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="killed"):
        kill_after_removing(patch, removed)
        make(source, recipe(), out)
    make(source, recipe(goes_on_as), out)
    make(source, recipe(goes_on_as), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def kill_after_removing(patch: pytest.MonkeyPatch, count: int) -> None:
    """Raise in place of the removal after the next `count`, or before the new journal if that is ALL."""
    unlink, left = Path.unlink, count

    def remove(path: Path, missing_ok: bool = False) -> None:
        nonlocal left
        if path.exists() and path.name.endswith((".safetensors", ".partial", ".json")):
            left -= 1
            if left < 0:
                raise RuntimeError("killed")
        unlink(path, missing_ok=missing_ok)

    def stop(*_: Any, **__: Any) -> None:
        raise RuntimeError("killed")

    patch.setattr(Path, "unlink", remove)
    if count == ALL:
        patch.setattr(run_module, "open_journal", stop)


def test_unfinished_work_of_another_model_leaves_none_of_its_files(model_folder: Models, tmp_path: Path) -> None:
    theirs, ours, out = tmp_path / "theirs", tmp_path / "ours", tmp_path / "out"
    shutil.copytree(model_folder("llama"), theirs)
    shutil.copytree(model_folder("llama", shard_size="1GB"), ours)
    (theirs / "merges.txt").write_text("theirs")
    plan = plan_of(theirs, recipe("fp8-static"))

    def stop(*_: Any) -> None:
        raise RuntimeError("stop")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError, match="stop"):
        patch.setattr(run_module, "write_config", stop)
        quantize(resolve(str(theirs)), plan, out, calibration=calibration_for(plan))
    assert (out / "merges.txt").exists() and (out / "model.safetensors.index.json").exists()
    (out / "own notes.txt").write_text("of the user")
    make(ours, recipe(), out)
    make(ours, recipe(), tmp_path / "clean")
    assert bytes_of(out).keys() - bytes_of(tmp_path / "clean").keys() == {"own notes.txt"}


def test_names_in_a_journal_that_lead_out_of_the_folder_remove_nothing(model_folder: Models, tmp_path: Path) -> None:
    (tmp_path / "out" / "fp8pipe").mkdir(parents=True)
    (tmp_path / "precious").write_text("of the user")
    names = ["../precious", str(tmp_path / "precious"), 3]
    journal = tmp_path / "out" / "fp8pipe" / "quantize.journal"
    journal.write_text(json.dumps({"identity": "x", "files": names}) + "\n")
    make(model_folder("llama"), recipe(), tmp_path / "out")
    assert (tmp_path / "precious").exists()


def test_another_plan_of_the_same_recipe_and_commit_does_not_go_on_with_the_work_of_the_first(
    model_folder: Models, tmp_path: Path
) -> None:
    """As after an upgrade of transformers between a kill and the next run."""
    source, out = model_folder("llama"), tmp_path / "out"
    snapshot, some = resolve(str(source)), sorted(source.glob("*.safetensors"))[:-1]
    first, architecture = plan_of(source, recipe()), architecture_of(source)
    with pytest.raises(EnvironmentFault, match="did not arrive"):
        quantize(snapshot, first, out, arriving=some)
    flipped = next(name for name in sorted(journalled(out)) if name.endswith("down_proj.weight"))
    roles = architecture.tensors | {flipped: TensorRole(kind="parameter", reason="flipped")}
    changed = architecture.model_copy(update={"tensors": roles})
    second = make_plan(snapshot, read_headers(snapshot), recipe(), changed)
    assert first.work_digest() != second.work_digest()
    made = quantize(snapshot, second, out)
    clean = quantize(snapshot, second, tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")
    assert made.fingerprint == clean.fingerprint == fingerprint(snapshot, recipe(), None)


def test_words_of_a_plan_are_no_part_of_its_work(model_folder: Models) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    tensors = tuple(tensor.model_copy(update={"reason": "said otherwise"}) for tensor in plan.tensors)
    assert plan.model_copy(update={"tensors": tensors, "notes": ("x",)}).work_digest() == plan.work_digest()


class Stop:
    """A listener that fails: the way a run ends that nobody planned."""

    def __call__(self, event: ProgressEvent) -> None:
        raise RuntimeError("stop")


def test_fingerprints_follow_what_decides_the_bytes(model_folder: Models) -> None:
    snapshot = resolve(str(model_folder("llama")))
    base = fingerprint(snapshot, recipe(), None)
    renamed = recipe().model_copy(update={"name": "other", "description": "x"})
    assert fingerprint(snapshot, renamed, None) == base
    assert fingerprint(snapshot.model_copy(update={"root": "/elsewhere"}), recipe(), None) == base
    changed = [
        fingerprint(snapshot.model_copy(update={"commit": "x"}), recipe(), None),
        fingerprint(snapshot, recipe("fp8-block"), None),
        fingerprint(snapshot, recipe(), "calibration"),
    ]
    assert len({base, *changed}) == 4


def test_the_engine_version_is_part_of_the_fingerprint(model_folder: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = resolve(str(model_folder("llama")))
    before = fingerprint(snapshot, recipe(), None)
    monkeypatch.setattr(identity, "ENGINE_VERSION", 10**6)
    assert fingerprint(snapshot, recipe(), None) != before


# ---------------------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("scheme", ["channel", "tensor", "block"])
def test_a_nonfinite_weight_is_named_with_its_index_and_leaves_no_model(
    model_folder: Models, tmp_path: Path, bad: float, scheme: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama", shard_size="1GB", head_dim=64, intermediate_size=384), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][301, 17] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeight, match=rf"layers\.1\.mlp\.up_proj\.weight\[301, 17\] is {bad}"):
        make(source, recipe(**SCHEMES[scheme]), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


KEPT = {
    "model.embed_tokens.weight": (95, 63),
    "lm_head.weight": (0, 1),
    "model.norm.weight": (7,),
    "model.layers.1.mlp.down_proj.weight": (3, 100),
}


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("stripe", [1000, 4 << 20])
@pytest.mark.parametrize("name", KEPT)
def test_a_nonfinite_kept_weight_is_named_with_its_index_and_leaves_no_model(
    model_folder: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, stripe: int, bad: float
) -> None:
    monkeypatch.setattr(engine, "STRIPE_BYTES", stripe)
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)
    tensors = load_file(source / "model.safetensors")
    tensors[name][KEPT[name]] = bad
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{name}{list(KEPT[name])} is {bad}")):
        make(source, recipe(ignore=["re:.*layers.1.mlp"]), tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_kept_experts_must_be_finite_and_buffers_need_not(model_folder: Models, tmp_path: Path) -> None:
    source, name = tmp_path / "source", "model.layers.1.mlp.experts.gate_up_proj"
    shutil.copytree(model_folder("gpt-oss", shard_size="1GB"), source)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.self_attn.masked_bias"] = torch.full((4,), -math.inf)
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    make(source, recipe(), tmp_path / "masked")
    assert bool(tensors_of(tmp_path / "masked")["model.layers.0.self_attn.masked_bias"].isneginf().all())
    tensors[name][2, 5, 7] = math.inf
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{name}[2, 5, 7] is inf")):
        make(source, recipe(), tmp_path / "out")


def test_a_source_that_changes_while_it_is_read_stops_the_run(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    plan = plan_of(source, recipe())
    snapshot = resolve(str(source))

    def arriving() -> Any:
        yield from sorted(source.glob("*.safetensors"))[:-1]
        for path in source.glob("*.safetensors"):
            os.utime(path, ns=(1, 1))
        yield sorted(source.glob("*.safetensors"))[-1]

    with pytest.raises(SourceChanged):
        quantize(snapshot, plan, tmp_path / "out", arriving=arriving())
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("change", ["weights", "header", "config", "removed"])
def test_a_source_that_changed_since_it_was_pinned_is_refused_and_nothing_is_written(
    model_folder: Models, tmp_path: Path, change: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    plan, snapshot = plan_of(source, recipe()), resolve(str(source))
    shard = source / plan.tensors[0].shard
    content, stat = bytearray(shard.read_bytes()), shard.stat()
    if change == "weights":
        content[-2:] = bytes(2)
        shard.write_bytes(content)
    elif change == "header":  # of the same length and time
        shard.write_bytes(content.replace(b"BF16", b"F16 ").replace(b'F16 "', b'F16" '))
        os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    elif change == "config":
        (source / "config.json").write_text((source / "config.json").read_text() + " ")
    else:
        shard.unlink()
    with pytest.raises(SourceChanged, match="has changed since"):
        quantize(snapshot, plan, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("scheme", ["channel", "tensor", "block mse"])
@pytest.mark.parametrize("fault", ["cut off", "unreadable"])
def test_a_source_that_cannot_be_read_names_tensor_and_byte_and_the_next_run_goes_on(
    model_folder: Models, tmp_path: Path, fault: str, scheme: str
) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model_folder("llama"), source)
    plan, snapshot = plan_of(source, recipe(**SCHEMES[scheme])), resolve(str(source))
    *others, last = sorted(source.glob("*.safetensors"))
    names = "|".join(map(re.escape, load_file(last)))  # threads read them: any can be the first to fail
    aside = tmp_path / "aside"

    def arriving() -> Any:
        yield from others
        last.rename(aside)
        if fault == "cut off":
            last.write_bytes(aside.read_bytes()[: aside.stat().st_size // 2])
        else:
            last.mkdir()  # reading a directory fails as a broken disk does: with an errno
        yield last

    expected, where = (SourceChanged, "ends at") if fault == "cut off" else (EnvironmentFault, "cannot read")
    with pytest.raises(expected, match=rf"^({names}): .*{where}.*byte \d+") as caught:
        quantize(snapshot, plan, out, arriving=arriving())
    assert last.name in str(caught.value)
    assert not (out / "config.json").exists()
    finished = journalled(out)
    assert finished
    shutil.rmtree(last) if last.is_dir() else last.unlink()
    aside.rename(last)
    quantize(snapshot, plan, out)
    make(source, recipe(**SCHEMES[scheme]), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


CRAMPED = """
import resource, subprocess, sys
from contextlib import suppress
from pathlib import Path
from fp8pipe.errors import Fp8PipeError
from fp8pipe.quantize.plan import Plan
from fp8pipe.quantize import quantize
from fp8pipe.records import Snapshot

folder, fault, room = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
out, source = folder / "out", folder / "source"
snapshot, plan = Snapshot.load(folder / "snapshot.json"), Plan.load(folder / "plan.json")

def limit():
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))

def arriving():
    *others, last = sorted(source.glob("*.safetensors"))
    yield from others
    if fault == "limit between":
        limit()
    if fault == "full":
        with suppress(OSError), open(out / "filler", "wb", buffering=0) as file:
            while file.write(bytes(1024)):
                pass
    yield last

if fault == "full":
    out.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "none", out], check=True)
if fault == "limit":
    limit()
try:
    quantize(snapshot, plan, out, threads=2, arriving=arriving())
except Fp8PipeError as error:
    print(f"{type(error).__name__} {error.exit_code} {error}")
assert not (out / "config.json").exists()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
(out / "filler").unlink(missing_ok=True)
quantize(snapshot, plan, out)
if fault == "full":
    subprocess.run(["cp", "-r", out, folder / "kept"], check=True)
"""


@pytest.mark.parametrize(
    ("fault", "error", "names"),
    [
        ("limit", "EnvironmentFault 4", r"out/\S+: cannot write: File too large"),
        (
            "limit between",
            "EnvironmentFault 4",
            r"out/model-\d+-of-\d+\.safetensors: (model|lm_head)\.\S+: cannot write",
        ),
        ("full", "DiskTooSmall 4", r"out/\S+: the disk is full; free some space and run again"),
    ],
)
def test_a_disk_that_takes_no_more_is_one_clear_error_and_the_next_run_goes_on(
    model_folder: Models, tmp_path: Path, fault: str, error: str, names: str
) -> None:
    source = tmp_path / "source"
    shutil.copytree(model_folder("llama"), source)
    (source / "tokenizer.json").write_bytes(bytes(200_000))
    plan = plan_of(source, recipe())
    plan.save(tmp_path / "plan.json")
    resolve(str(source)).save(tmp_path / "snapshot.json")
    room = plan.output_bytes + 600_000 if fault == "full" else 4096
    command = [sys.executable, "-c", CRAMPED, str(tmp_path), fault, str(room)]
    if fault == "full":
        command = ["unshare", "--user", "--map-root-user", "--mount", *command]
        if subprocess.run([*command[:4], "true"], capture_output=True).returncode:
            pytest.skip("a small disk needs a user namespace to be mounted in")
    child = subprocess.run(command, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout.startswith(error) and re.search(names, child.stdout), child.stdout
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(tmp_path / ("kept" if fault == "full" else "out")) == bytes_of(tmp_path / "clean")


def test_a_plan_of_another_state_of_the_source_is_refused(model_folder: Models, tmp_path: Path) -> None:
    plan = plan_of(model_folder("llama"), recipe())
    with pytest.raises(InputError, match="plan again"):
        quantize(resolve(str(model_folder("llama-tied"))), plan, tmp_path / "out")


def test_a_shard_that_never_arrives_is_an_error(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan = plan_of(source, recipe())
    some = sorted(source.glob("*.safetensors"))[:1]
    with pytest.raises(EnvironmentFault, match="did not arrive"):
        quantize(resolve(str(source)), plan, tmp_path / "out", arriving=some)


def test_shards_may_arrive_in_any_order(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan = plan_of(source, recipe("autofp8-dynamic"))
    arriving = sorted(source.glob("*"), reverse=True)
    quantize(resolve(str(source)), plan, tmp_path / "late", arriving=arriving)
    quantize(resolve(str(source)), plan, tmp_path / "all")
    assert bytes_of(tmp_path / "late") == bytes_of(tmp_path / "all")


def test_a_second_writer_is_turned_away(model_folder: Models, tmp_path: Path) -> None:
    source = model_folder("llama")
    plan = plan_of(source, recipe())
    snapshot = resolve(str(source))
    refused: list[str] = []

    def listen(event: ProgressEvent) -> None:
        with pytest.raises(InputError, match="another run") as caught:
            quantize(snapshot, plan, tmp_path)
        refused.append(str(caught.value))

    quantize(snapshot, plan, tmp_path, progress=listen)
    assert refused


def test_progress_ends_with_all_bytes_and_tensors(model_folder: Models, tmp_path: Path) -> None:
    events: list[ProgressEvent] = []
    plan, _ = make(model_folder("llama"), recipe(), tmp_path, progress=events.append)
    last = events[-1]
    assert (last.stage, last.unit) == ("quantize", "B")
    assert last.done == last.total == sum(tensor.end - tensor.begin for tensor in plan.tensors)
    assert last.note == f"{len(plan.tensors)}/{len(plan.tensors)} tensors"


# ---------------------------------------------------------------------------------------------- kill -9

WRITER = """
import os, sys, traceback
from pathlib import Path
from fp8pipe.quantize.plan import Plan
from fp8pipe.quantize import quantize
from fp8pipe.records import Snapshot
from fp8pipe.records.calibration import Calibration
import fp8pipe.quantize.engine.run

def write():
    folder = Path(sys.argv[1])
    snapshot, plan = Snapshot.load(folder / "snapshot.json"), Plan.load(folder / "plan.json")
    calibration = Calibration.load_if_present(folder / "calibration.json")
    quantize(snapshot, plan, folder / "out", calibration=calibration, threads=2)

while sys.stdin.readline():
    child = os.fork()  # a process of its own for every run, without the seconds that the imports take
    if child == 0:
        try:
            write()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    print(child, flush=True)
    sys.stdin.readline()
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Writers:
    """Runs of the engine over one folder, each in a process of its own."""

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, "-c", WRITER, str(folder)]
        self._parent = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, kill_after_s: float | None = None) -> int:
        """Exit code of one run, killed after so many seconds or not at all."""
        child = self._ask()
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.kill(child, signal.SIGKILL)  # its parent has not waited for it yet: the id is still its own
        return self._ask()

    def _ask(self) -> int:
        assert self._parent.stdin is not None and self._parent.stdout is not None
        self._parent.stdin.write("\n")
        self._parent.stdin.flush()
        return int(self._parent.stdout.readline())

    def close(self) -> None:
        self._parent.communicate()


def kill_at_random(tmp_path: Path, source: Path, wanted: Recipe, kills: int, seed: int) -> None:
    """Run the writer, kill it at random moments, let the last run finish; compare with an undisturbed run."""
    plan, undisturbed = make(source, wanted, tmp_path / "undisturbed")
    duration = max(undisturbed.seconds, 0.05)
    resolve(str(source)).save(tmp_path / "snapshot.json")
    plan.save(tmp_path / "plan.json")
    if wanted.needs_calibration:
        calibration_for(plan).save(tmp_path / "calibration.json")
    dice = random.Random(seed)
    done: set[str] = set()
    out, writers = tmp_path / "out", Writers(tmp_path)
    for _ in range(kills):
        code = writers.run(kill_after_s=dice.uniform(0, duration))
        assert code in {0, -signal.SIGKILL}
        before, done = done, journalled(out)
        if code == 0 or (out / "fp8pipe" / "checkpoint.json").exists():
            shutil.rmtree(out)  # it was faster than the kill: start over
            done = set()
            continue
        assert before <= done
        assert not (out / "config.json").exists() or len(done) == len(plan.tensors)
    assert writers.run() == 0
    writers.close()
    assert bytes_of(out) == bytes_of(tmp_path / "undisturbed")


def journalled(out: Path) -> set[str]:
    """Output tensors that the journal calls finished; none of them twice."""
    path = out / "fp8pipe" / "quantize.journal"
    if not path.exists():
        return set()
    lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[1:-1]]
    names = [line["weight"] for line in lines if "weight" in line]
    assert len(names) == len(set(names))
    return set(names)


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Large enough that a kill falls inside the work."""
    return make_model(
        tmp_path_factory.mktemp("big"), hidden_size=512, intermediate_size=2048, num_hidden_layers=6, shard_size="8MB"
    )


@pytest.mark.parametrize("scheme", ["channel", "tensor mse"])
def test_killed_at_random_moments_the_folder_ends_byte_equal(many_shards: Path, tmp_path: Path, scheme: str) -> None:
    kill_at_random(tmp_path, many_shards, recipe(**SCHEMES[scheme]), kills=3, seed=1)


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["channel", "tensor", "block", "channel mse", "tensor mse", "block mse", "static"])
def test_killed_thirty_times_the_folder_ends_byte_equal(many_shards: Path, tmp_path: Path, scheme: str) -> None:
    wanted = recipe("fp8-static-kv") if scheme == "static" else recipe(**SCHEMES[scheme])
    kill_at_random(tmp_path, many_shards, wanted, kills=30, seed=2)


def test_a_rerun_reads_no_finished_tensor_again(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    plan = plan_of(source, recipe())
    snapshot = resolve(str(source))
    some = sorted(source.glob("*.safetensors"))[:-1]
    with pytest.raises(EnvironmentFault):
        quantize(snapshot, plan, out, arriving=some)
    finished = journalled(out)
    assert finished
    # Spoil what is finished: were it read again, this would be a NonFiniteWeight.
    read_again = [tensor for tensor in plan.tensors if tensor.name in finished and tensor.action == "quantize"]
    for tensor in read_again:
        path = source / tensor.shard
        stat = path.stat()
        with path.open("r+b") as file:
            file.seek(tensor.begin)
            original = file.read(2)
            file.seek(tensor.begin)
            file.write(b"\xc0\x7f")
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        tensor.__dict__["_original"] = (original, stat)
    try:
        quantize(snapshot, plan, out)
    finally:
        for tensor in read_again:
            original, stat = tensor.__dict__.pop("_original")
            with (source / tensor.shard).open("r+b") as file:
                file.seek(tensor.begin)
                file.write(original)
            os.utime(source / tensor.shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_what_a_kill_leaves_of_small_files_is_swept(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    plan = plan_of(source, recipe())
    with pytest.raises(EnvironmentFault):
        quantize(resolve(str(source)), plan, out, arriving=())
    for name in (".config.json.abc", ".generation_config.json.abc", "fp8pipe/.quantize.journal.abc"):
        (out / name).write_bytes(b"half")
    quantize(resolve(str(source)), plan, out)
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


def test_a_journal_of_another_boot_counts_only_renamed_shards(model_folder: Models, tmp_path: Path) -> None:
    source, out = model_folder("llama"), tmp_path / "out"
    plan = plan_of(source, recipe())
    some = sorted(source.glob("*.safetensors"))[:-1]
    with pytest.raises(EnvironmentFault):
        quantize(resolve(str(source)), plan, out, arriving=some)
    journal = out / "fp8pipe" / "quantize.journal"
    head, *lines = journal.read_text().splitlines()
    journal.write_text("\n".join([json.dumps(json.loads(head) | {"boot": "another"}), *lines, '{"weight": "torn']))
    for partial in out.glob(".*.partial"):  # what the machine lost
        size = partial.stat().st_size
        partial.write_bytes(bytes(size))
    quantize(resolve(str(source)), plan, out)
    make(source, recipe(), tmp_path / "clean")
    assert bytes_of(out) == bytes_of(tmp_path / "clean")


# ---------------------------------------------------------------------------------------------- sources that are FP8


def test_an_fp8_source_is_dequantized_and_quantized_anew(model_folder: Models, tmp_path: Path) -> None:
    source = tmp_path / "fp8"
    shutil.copytree(model_folder("llama", shard_size="1GB", hidden_size=200), source)
    tensors = load_file(source / "model.safetensors")
    exact: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = reference_amax(tensors[name], "block") / 448
        codes = reference_codes(tensors[name], scale, (128, 128))
        full = scale.repeat_interleave(128, 0)[: len(codes)].repeat_interleave(128, 1)[:, : codes.shape[1]]
        exact[name] = codes.float() * full
        tensors |= {name: codes, f"{name}_scale_inv": scale}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (source / "config.json").write_text(json.dumps(config))
    make(source, recipe(fp8_source="requantize", ignore=["re:.*down_proj"]), tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    for name, weight in exact.items():
        if "down_proj" in name:
            assert torch.equal(made[name], weight.bfloat16())
            continue
        scale = reference_amax(weight, "channel") / 448
        assert torch.equal(made[f"{name}_scale"], scale)
        assert torch.equal(made[name].view(torch.uint8), reference_codes(weight, scale).view(torch.uint8))


def test_a_kept_weight_of_an_fp8_source_that_is_not_finite_is_named(model_folder: Models, tmp_path: Path) -> None:
    source, name = tmp_path / "fp8", "model.layers.0.mlp.down_proj.weight"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)
    tensors = load_file(source / "model.safetensors")
    codes = torch.zeros(tensors[name].shape).to(torch.float8_e4m3fn)
    codes.view(torch.uint8)[11, 13] = 0x7F
    tensors |= {name: codes, f"{name}_scale": torch.ones(())}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(NonFiniteWeight, match=re.escape(f"{name}[11, 13] is nan")):
        make(source, recipe(fp8_source="requantize", ignore=["re:.*down_proj"]), tmp_path / "out")


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_source_in_autofp8s_layout_is_requantized_too(
    model_folder: Models, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    source = tmp_path / "fp8"
    shutil.copytree(model_folder("llama", shard_size="1GB"), source)
    tensors = load_file(source / "model.safetensors")
    exact: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = reference_amax(tensors[name], "tensor") / 448
        codes = reference_codes(tensors[name], scale)
        exact[name] = codes.float() * scale
        module = name.removesuffix(".weight")
        tensors |= {name: codes, f"{name}_scale": scale.reshape(shape), f"{module}.input_scale": torch.ones(shape)}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "activation_scheme": "static"}
    (source / "config.json").write_text(json.dumps(config))
    make(source, recipe(fp8_source="requantize"), tmp_path / "out")
    made = tensors_of(tmp_path / "out")
    assert not any(name.endswith("input_scale") for name in made)
    for name, weight in exact.items():
        scale = reference_amax(weight, "channel") / 448
        assert torch.equal(made[f"{name}_scale"], scale)
        assert torch.equal(made[name].view(torch.uint8), reference_codes(weight, scale).view(torch.uint8))


# ---------------------------------------------------------------------------------------------- loaders


@pytest.mark.parametrize("scheme", ["channel", "tensor static", "block"])
def test_transformers_loads_the_checkpoint_within_half_a_step(
    model_folder: Models, tmp_path: Path, scheme: str
) -> None:
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    source = model_folder("llama", head_dim=64, intermediate_size=384, hidden_size=256)
    wanted = recipe("fp8-static") if scheme == "tensor static" else recipe(**SCHEMES[scheme])
    plan, _ = make(source, wanted, tmp_path)
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).state_dict()
    loaded, info = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        output_loading_info=True,
        quantization_config=CompressedTensorsConfig(run_compressed=False),
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    scales = tensors_of(tmp_path)
    found = loaded.state_dict()
    for tensor in plan.tensors:
        weight, wanted_weight = found[tensor.name].float(), original[tensor.name]
        if tensor.action == "keep":
            assert torch.equal(weight, wanted_weight)
            continue
        scale = scales[f"{tensor.name}_scale"]
        if scheme == "block":
            scale = scale.repeat_interleave(128, 0)[: len(weight)].repeat_interleave(128, 1)[:, : weight.shape[1]]
        exponent = torch.floor(torch.log2((wanted_weight / scale).abs().clamp(min=2**-6)))
        half_step = torch.exp2(exponent) / 16 * scale
        assert bool(((weight - wanted_weight).abs() <= half_step * 1.01 + wanted_weight.abs() / 250).all())
