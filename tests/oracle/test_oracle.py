"""The vLLM oracle: its loader is followed to the last element, a disagreement is reported tensor by tensor."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.quantizing import make
from support.tiny_models import make_model, recipe
from torch import Tensor

from benchmarks.giants import DEEPSEEK_V3, deepseek_tensors, deepseek_v3
from fp8pipe.errors import EngineFailed
from fp8pipe.hub.source import resolve
from fp8pipe.model.headers import Headers, TensorInfo, read_folder_headers
from fp8pipe.oracle.landing import Follower, Piece, Region, covered, first_gap, overlapping, region_of
from fp8pipe.oracle.transformers import inspect
from fp8pipe.oracle.vllm import Answer, Mismatch, Verdict, ask_vllm, parity
from fp8pipe.oracle.vllm_probe import MAX_REFUSALS, run_loader
from fp8pipe.validate import validate
from fp8pipe.validate.asking import Asked
from fp8pipe.validate.checks.r_runtime import vllm_reads_every_tensor
from fp8pipe.validate.meaning.layout import layout_from_names
from fp8pipe.validate.subject import Subject

# ---------------------------------------------------------------------------------------------- following copies


def on_meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_shards_of_a_fused_parameter_are_seen_where_they_land():
    fused = on_meta(6, 4)
    follower = Follower({"qkv": fused})
    with follower:
        fused.narrow(0, 0, 4).copy_(follower.stand_in("q", (4, 4), torch.float32))
        fused.data[4:6] = follower.stand_in("k", (2, 4), torch.float32)
    landed = [(write.region.box, {origin.tensor for origin in write.origins}) for write in follower.writes]
    assert landed == [(((0, 4), (0, 4)), {"q"}), (((4, 6), (0, 4)), {"k"})]


def test_what_is_made_of_a_tensor_keeps_its_origin():
    place = on_meta(4, 6)
    follower = Follower({"w": place})
    with follower:
        experts = follower.stand_in("experts", (2, 6, 4), torch.bfloat16)
        place.copy_(torch.cat([experts[1][:3], experts[1][3:]]).t().contiguous().to(torch.float32))
    (write,) = follower.writes
    assert write.origins == {
        Piece("experts", Region(((1, 2), (0, 3), (0, 4)), 12)),
        Piece("experts", Region(((1, 2), (3, 6), (0, 4)), 12)),
    }


def test_a_value_taken_out_as_a_number_keeps_its_origin():
    scales = on_meta(3)
    follower = Follower({"scales": scales})
    with follower:
        scales[1].fill_(follower.stand_in("a", (), torch.float32).item())
        scales[2] = follower.stand_in("b", (), torch.float32).item()
    assert [(write.region.box, {o.tensor for o in write.origins}) for write in follower.writes] == [
        (((1, 2),), {"a"}),
        (((2, 3),), {"b"}),
    ]


def test_a_constant_has_no_origin_and_new_storage_has_its_own():
    padded, replaced = on_meta(4, 2), torch.nn.Parameter(on_meta(2, 2))
    follower = Follower({"padded": padded, "replaced": replaced})
    with follower:
        padded[3:].fill_(0)
        replaced.data = follower.stand_in("w", (2, 2), torch.float32) * 2
    follower.settle({"padded": padded, "replaced": replaced})
    assert [(write.place, {o.tensor for o in write.origins}) for write in follower.writes] == [
        ("padded", set()),
        ("replaced", {"w"}),
    ]


def test_a_place_with_memory_is_followed_as_well():
    place = torch.zeros(4)
    follower = Follower({"norm": place})
    with follower:
        place[:2].copy_(follower.stand_in("w", (2,), torch.bfloat16))
    assert [(write.region.box, {o.tensor for o in write.origins}) for write in follower.writes] == [(((0, 2),), {"w"})]


def test_views_are_boxes_also_when_reshaped():
    whole = on_meta(2, 12)
    assert region_of(whole.view(2, 4, 3)[1], (2, 12)).box == ((1, 2), (0, 12))
    assert region_of(whole.view(24)[3:9], (2, 12)).box == ((0, 1), (3, 9))
    assert region_of(whole.view(24)[9:15], (2, 12)) == Region(None, 6)  # the end of one row and the start of the next
    assert region_of(whole[:, ::2], (2, 12)) == Region(None, 12)
    assert region_of(whole.t()[2:5], (2, 12)).box == ((0, 2), (2, 5))
    assert region_of(on_meta(), ()).box == ()


def test_coverage_counts_elements_once_and_names_the_gap():
    upper, lower, middle = (Region((rows, (0, 4)), 4 * (rows[1] - rows[0])) for rows in ((0, 2), (3, 6), (1, 4)))
    assert covered((6, 4), [upper, upper, lower]) == 20
    assert first_gap((6, 4), [upper, lower]) == "[2:3, 0:4]"
    assert (overlapping((6, 4), [upper, upper, lower]), overlapping((6, 4), [upper, middle])) == (0, 4)
    assert (covered((), []), covered((), [Region((), 1)])) == (0, 1)


class Picky(torch.nn.Module):
    """A model whose loader stops at some tensors and puts the others where they belong."""

    def __init__(self) -> None:
        super().__init__()
        self.rows = torch.nn.Parameter(on_meta(6))
        self.asked: list[str] = []

    def load_weights(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        for name, tensor in weights:
            self.asked.append(name)
            if name in ("1", "4"):
                raise KeyError(name)
            self.rows.data[int(name)].copy_(tensor)


def test_a_loader_that_stops_goes_on_behind_the_tensor_that_it_refused():
    """A model of 90 000 tensors may have twenty faults: reading all of them again for each would take minutes."""
    model = Picky()
    follower = Follower(dict(model.named_parameters()))
    refused = run_loader(model, follower, {str(row): ("F32", []) for row in range(6)}, MAX_REFUSALS)
    assert list(refused) == ["1", "4"] and model.asked == [str(row) for row in range(6)]
    assert [write.region.box for write in follower.writes] == [((row, row + 1),) for row in (0, 2, 3, 5)]


def test_without_vllm_the_oracle_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def missing(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    with pytest.raises(EngineFailed, match=r"vLLM is not installed.*install the cpu or gpu extra"):
        parity(tmp_path)


# ---------------------------------------------------------------------------------------------- checkpoints in vLLM

Tensors = dict[str, Tensor]

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.1.self_attn.o_proj"  # noqa: E741  # the field's name


def drop_shard_scale(tensors: Tensors) -> None:
    del tensors[f"{Q}.weight_scale"]


def rename(tensors: Tensors) -> None:
    tensors[f"{O}.act_scale"] = tensors.pop(f"{O}.weight_scale")


def widen_to_bf16(tensors: Tensors) -> None:
    tensors[f"{Q}.weight"] = tensors[f"{Q}.weight"].to(torch.bfloat16)


def shrink_norm_to_fp8(tensors: Tensors) -> None:
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)


def grow(tensors: Tensors) -> None:
    codes = tensors[f"{Q}.weight"].view(torch.uint8)
    tensors[f"{Q}.weight"] = torch.cat([codes, codes]).view(torch.float8_e4m3fn)


def flatten_scale(tensors: Tensors) -> None:
    tensors[f"{O}.weight_scale"] = tensors[f"{O}.weight_scale"].flatten()


def drop_expert_scale(tensors: Tensors) -> None:
    del tensors["model.layers.1.block_sparse_moe.experts.3.w2.weight_scale"]


def drop_value_scale(tensors: Tensors) -> None:
    del tensors["model.layers.1.self_attn.v_scale"]


BROKEN: dict[str, tuple[str, Callable[[Tensors], None], set[tuple[str, str, str]]]] = {
    "one shard's scale is missing": (
        *("llama", drop_shard_scale),
        {("unfilled", "", "model.layers.0.self_attn.qkv_proj.weight_scale")},
    ),
    "a scale has a legacy name": (
        *("llama", rename),
        {("refused", f"{O}.act_scale", ""), ("unfilled", "", f"{O}.weight_scale")},
    ),
    "a shard is not FP8": (
        *("llama", widen_to_bf16),
        {("dtype", f"{Q}.weight", "model.layers.0.self_attn.qkv_proj.weight")},
    ),
    "a norm is FP8": (
        *("llama", shrink_norm_to_fp8),
        {("dtype", "model.norm.weight", "model.norm.weight")},
    ),
    "a shard is too tall": (
        *("llama", grow),
        {("truncated", f"{Q}.weight", "model.layers.0.self_attn.qkv_proj.weight")},
    ),
    "a scale has one dimension": (
        *("llama", flatten_scale),
        {("refused", f"{O}.weight_scale", ""), ("unfilled", "", f"{O}.weight_scale")},
    ),
    "one expert's scale is missing": (
        *("mixtral", drop_expert_scale),
        {("unfilled", "", "model.layers.1.block_sparse_moe.experts.routed_experts.w2_weight_scale")},
    ),
    "one layer's value scale is missing": (
        *("kv", drop_value_scale),
        {("unfilled", "", "model.layers.1.self_attn.attn.v_scale")},
    ),
}

SOUND: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("llama-tied", {}, "fp8-dynamic"),
    "block": ("llama", {"hidden_size": 256, "intermediate_size": 384, "num_attention_heads": 2}, "fp8-block"),
    "mixtral": ("mixtral", {}, "autofp8-dynamic"),
    "phi3": ("phi3", {}, "autofp8-dynamic"),
    "deepseek-v2": ("deepseek-v2", {}, "fp8-dynamic"),
    "opt": ("opt", {}, "autofp8-dynamic"),
    "attn, with KV scales": ("gptj", {}, "fp8-static-kv"),
    "values read while building": ("bloom", {}, "fp8-dynamic"),  # the slopes of ALiBi
    "tower": ("glm4v", {}, "fp8-dynamic"),
    "tower, exact names": ("glm4v", {}, "autofp8-dynamic"),
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Answer]:
    """vLLM's view of every checkpoint of this file, by name, from one child process."""
    root = tmp_path_factory.mktemp("oracle")
    folders = {name: quantized(root / name, *made) for name, made in SOUND.items()}
    folders["deepseek-v3"] = deepseek_v3(root / "deepseek-v3", predictor=False)
    folders["kv"] = with_kv_scales(folders["llama"], root / "kv")
    for name, (origin, damage, _) in BROKEN.items():
        folders[name] = rewritten(folders[origin], root / name.replace(" ", "-"), damage)
    folders["named"] = rewritten(folders["tower"], root / "named", lambda tensors: None)
    config = json.loads((folders["named"] / "config.json").read_text())["quantization_config"]
    change_config(
        folders["named"], quantization_config=config | {"ignore": ["lm_head", *names_in_tower(folders["tower"])]}
    )
    folders["unknown"] = rewritten(folders["llama"], root / "unknown", lambda tensors: None)
    change_config(folders["unknown"], architectures=["NoSuchForCausalLM"])
    found = ask_vllm(list(folders.values()))
    return {name: found[folder] for name, folder in folders.items()}


def quantized(folder: Path, model: str, sizes: dict[str, Any], recipe_name: str) -> Path:
    source = make_model(folder.with_name(f"{folder.name}-source"), model, **sizes)
    make(source, recipe(recipe_name), folder)
    return folder


def rewritten(folder: Path, copy: Path, change: Callable[[Tensors], None]) -> Path:
    """A copy in one file, with its tensors changed."""
    copy.mkdir()
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(path)
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    (copy / "config.json").write_bytes((folder / "config.json").read_bytes())
    return copy


def with_kv_scales(folder: Path, copy: Path) -> Path:
    def add(tensors: Tensors) -> None:
        for layer in range(2):
            for name in ("k_scale", "v_scale"):
                tensors[f"model.layers.{layer}.self_attn.{name}"] = torch.tensor([0.01])

    rewritten(folder, copy, add)
    config = json.loads((copy / "config.json").read_text())["quantization_config"]
    scheme = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": "tensor"}
    change_config(copy, quantization_config=config | {"kv_cache_scheme": scheme})
    return copy


def names_in_tower(folder: Path) -> list[str]:
    """Names on disk of the Linears of the vision tower."""
    return [name.removesuffix(".weight") for name in read_folder_headers(folder).tensors if ".visual." in name]


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.vllm
@pytest.mark.parametrize("name", [*SOUND, "kv", "deepseek-v3"])
def test_every_tensor_of_a_sound_checkpoint_has_its_place(answers: dict[str, Answer], name: str):
    answer = answers[name]
    assert (answer.refusal, answer.mismatches) == ("", ())
    parameters = {parameter.name for parameter in answer.parameters}
    assert all(places and set(places) <= parameters for _, places in answer.landings)
    assert "F8_E4M3" in {parameter.dtype for parameter in answer.parameters}


def test_giant_as_it_is_published_has_no_finding_and_transformers_knows_its_linears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """DeepSeek-V3, 671B: 92 000 tensors without data, built on the meta device; no ignore list names its routers."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    folder = deepseek_v3(tmp_path / "deepseek-v3")
    tensors = {name: TensorInfo(name, *one, "x", 0, 0) for name, one in deepseek_tensors(DEEPSEEK_V3).items()}
    architecture = inspect(resolve(str(folder)), headers=Headers((), tensors))
    linears = {name for name, role in architecture.tensors.items() if role.kind in ("linear", "expert")}
    assert linears == {name for name in tensors if "_proj" in name and ".layers.61." not in name}
    for known in (architecture, None):
        report = validate(folder, depth="headers", architecture=known)
        assert (report.findings, report.tensors) == ((), 91_991)
        assert report.known_from == ("architecture" if known else "names")


@pytest.mark.vllm
def test_fused_projections_and_experts_are_mapped_to_names_on_disk(answers: dict[str, Answer]):
    places = dict(answers["llama"].landings)
    fused = {name for name, landed in places.items() if landed == ("model.layers.0.self_attn.qkv_proj.weight",)}
    assert fused == {f"model.layers.0.self_attn.{leaf}_proj.weight" for leaf in "qkv"}
    experts = dict(answers["mixtral"].landings)
    routed = "model.layers.0.block_sparse_moe.experts.routed_experts"
    for leaf, place in (("w1", "w13_weight"), ("w3", "w13_weight"), ("w2", "w2_weight")):
        assert experts[f"model.layers.0.block_sparse_moe.experts.3.{leaf}.weight"] == (f"{routed}.{place}",)


@pytest.mark.vllm
def test_parameters_carry_dtype_shape_and_method(answers: dict[str, Answer]):
    found = {parameter.name: parameter for parameter in answers["llama"].parameters}
    fused = found["model.layers.0.self_attn.qkv_proj.weight"]
    assert (fused.dtype, fused.shape, fused.method) == ("F8_E4M3", (128, 64), "CompressedTensorsW8A8Fp8")
    scale = found["model.layers.0.self_attn.qkv_proj.weight_scale"]
    assert (scale.dtype, scale.shape) == ("F32", (128, 1))
    assert found["model.norm.weight"].dtype == "BF16"


@pytest.mark.vllm
@pytest.mark.parametrize("name", BROKEN)
def test_a_checkpoint_that_disagrees_is_told_tensor_by_tensor(answers: dict[str, Answer], name: str):
    found = {(mismatch.kind, mismatch.tensor, mismatch.parameter) for mismatch in answers[name].mismatches}
    assert found == BROKEN[name][2]


@pytest.mark.vllm
def test_an_architecture_that_vllm_does_not_know_is_refused_in_its_words(answers: dict[str, Answer]):
    assert "NoSuchForCausalLM" in answers["unknown"].refusal
    assert answers["unknown"].parameters == ()


@pytest.mark.vllm
def test_an_ignore_list_with_names_on_disk_misses_what_vllm_fuses_in_a_tower(answers: dict[str, Answer]):
    found = {(mismatch.tensor, mismatch.asked) for mismatch in answers["named"].mismatches if mismatch.kind == "dtype"}
    assert {
        (f"model.visual.blocks.0.mlp.{leaf}_proj.weight", "visual.blocks.0.mlp.gate_up_proj") for leaf in ("gate", "up")
    } <= found
    assert all(asked.startswith("visual.") for _, asked in found)


@pytest.mark.parametrize(
    ("method", "entry"), [("compressed-tensors", r"re:visual\.0\.gate_up_proj$"), ("fp8", "visual.0.gate_up_proj")]
)
def test_a_finding_on_an_ignore_list_says_which_entry_is_missing(method: str, entry: str):
    mismatch = Mismatch("dtype", "visual.0.up_proj.weight", "x", "F8_E4M3", "BF16", "visual.0.gate_up_proj")
    layout = layout_from_names({}, {})
    files: Any = SimpleNamespace(tensors={})
    asked = Asked(version="0", verdict=Verdict((mismatch,)))
    subject = Subject(files, {}, None, {"quant_method": method}, "config.json", None, layout, vllm=asked)
    (fault,) = vllm_reads_every_tensor.run(subject)
    assert f"add {entry}" in (fault.remedy or "")
