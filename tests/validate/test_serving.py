"""The serving rules: they answer before anything is measured, and vLLM's own classes agree at every number of GPUs."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from support import TESTS
from support import reference_checkpoints as reference

from fp8pipe import stages
from fp8pipe.config import Parallel, load_policy, load_recipe
from fp8pipe.errors import ConfigError, NoSuitableDevice
from fp8pipe.model.headers import TensorInfo
from fp8pipe.quantize.formats import kept_of
from fp8pipe.quantize.plan import Plan
from fp8pipe.records.serving import DEVICES, RANKS, Serving
from fp8pipe.ui.sheets import serving_sheet, terminal
from fp8pipe.validate.meaning.config import read_scheme
from fp8pipe.validate.serving import what_serves
from fp8pipe.validate.serving.facts import Experts, Facts, Matrix, Part, read_facts
from fp8pipe.validate.serving.kernels import CAPABILITY, linear_kernel
from fp8pipe.validate.serving.shards import objections, refined

BLOCK = 128

# ---------------------------------------------------------------------------------------------- checkpoints


def scheme(method: str, weights: str, inputs: str | None = "dynamic", kv: str | None = None) -> dict[str, Any]:
    """A quantization_config. Routers and heads are ignored by it."""
    if method == "fp8":
        block = {"weight_block_size": [BLOCK, BLOCK]} if weights == "block" else {}
        return {"quant_method": "fp8", "activation_scheme": inputs, "ignored_layers": ["lm_head"]} | block
    args: dict[str, Any] = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "strategy": weights}
    acts: dict[str, Any] = args | {
        "dynamic": inputs == "dynamic",
        "strategy": "token" if inputs == "dynamic" else "tensor",
    }
    if weights == "block":
        args, acts = args | {"block_structure": [BLOCK, BLOCK]}, acts | {"strategy": "group", "group_size": BLOCK}
    group = {"targets": ["Linear"], "weights": args, "input_activations": acts if inputs else None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group | {"format": "float-quantized"}},
        "ignore": ["lm_head", r"re:.*\.gate$"],
        "kv_cache_scheme": args | {"strategy": kv} if kv else None,
    }


def dense(*, hidden: int = 512, heads: int = 8, kv: int = 4, size: int = 64, width: int = 1024) -> dict[str, Any]:
    """config.json of a Llama."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "head_dim": size,
        "intermediate_size": width,
        "num_hidden_layers": 1,
        "vocab_size": 256,
        "max_position_embeddings": 256,
    }


def sparse(*, experts: int = 8, expert_width: int = 256, **sizes: int) -> dict[str, Any]:
    """config.json of a Qwen3 MoE."""
    return dense(**sizes) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": expert_width,
        "decoder_sparse_step": 1,
        "norm_topk_prob": True,
        "mlp_only_layers": [],
    }


def latent(*, hidden: int = 512, heads: int = 8, width: int = 1024, q_rank: int = 256) -> dict[str, Any]:
    """config.json of a DeepSeek-V3 with one dense layer."""
    return dense(hidden=hidden, heads=heads, kv=heads, width=width) | {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "q_lora_rank": q_rank,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 256,
        "first_k_dense_replace": 1,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
    }


def shapes_of(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Name and shape of the Linears of one layer."""
    hidden, heads, size = config["hidden_size"], config["num_attention_heads"], config["head_dim"]
    if "kv_lora_rank" in config:
        rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
        nope, v = config["qk_nope_head_dim"], config["v_head_dim"]
        yield "self_attn.q_a_proj", (config["q_lora_rank"], hidden)
        yield "self_attn.q_b_proj", (heads * (nope + rope), config["q_lora_rank"])
        yield "self_attn.kv_a_proj_with_mqa", (rank + rope, hidden)
        yield "self_attn.kv_b_proj", (heads * (nope + v), rank)
        yield "self_attn.o_proj", (hidden, heads * v)
    else:
        kv = config["num_key_value_heads"]
        yield "self_attn.q_proj", (heads * size, hidden)
        yield "self_attn.k_proj", (kv * size, hidden)
        yield "self_attn.v_proj", (kv * size, hidden)
        yield "self_attn.o_proj", (hidden, heads * size)
    if "num_experts" in config:
        width = config["moe_intermediate_size"]
        for expert in range(config["num_experts"]):
            yield f"mlp.experts.{expert}.gate_proj", (width, hidden)
            yield f"mlp.experts.{expert}.up_proj", (width, hidden)
            yield f"mlp.experts.{expert}.down_proj", (hidden, width)
    else:
        yield "mlp.gate_proj", (config["intermediate_size"], hidden)
        yield "mlp.up_proj", (config["intermediate_size"], hidden)
        yield "mlp.down_proj", (hidden, config["intermediate_size"])


def tensors_of(config: Mapping[str, Any], layers: int = 1) -> dict[str, TensorInfo]:
    names = ((f"model.layers.{i}.{name}.weight", shape) for i in range(layers) for name, shape in shapes_of(config))
    return {name: TensorInfo(name, "F8_E4M3", shape, "model.safetensors", 0, 0) for name, shape in names}


def serving(config: Mapping[str, Any], quantization: dict[str, Any]) -> Serving:
    found = what_serves(config, read_scheme(quantization), tensors_of(config))
    assert found is not None
    return found


def facts(config: Mapping[str, Any], quantization: dict[str, Any]) -> Facts:
    understood = read_scheme(quantization)
    assert understood is not None
    found = read_facts(config, understood, tensors_of(config))
    assert found is not None
    return found


# ---------------------------------------------------------------------------------------------- vLLM's classes

MODELS = {
    "llama, blocks that fit four GPUs": (dense(kv=8), scheme("compressed-tensors", "block")),
    "llama, KV heads that share a block": (dense(heads=8, kv=2, size=64), scheme("compressed-tensors", "block")),
    "llama, more GPUs than KV heads": (dense(heads=16, kv=2, size=128, width=2048), scheme("fp8", "block")),
    "llama, three KV heads": (dense(heads=12, kv=3, hidden=768), scheme("compressed-tensors", "channel")),
    "llama, an odd width": (dense(width=1028), scheme("compressed-tensors", "channel")),
    "llama, per tensor": (dense(kv=1), scheme("fp8", "tensor", "static")),
    "qwen3 moe, narrow experts": (sparse(kv=8, size=128, expert_width=256), scheme("compressed-tensors", "block")),
    "qwen3 moe, quant_method fp8": (sparse(kv=8, size=128, expert_width=320), scheme("fp8", "block")),
    "qwen3 moe, by channel": (sparse(expert_width=36), scheme("compressed-tensors", "channel")),
    "deepseek v3": (latent(), scheme("compressed-tensors", "block")),
    "deepseek v3, narrow": (latent(heads=4, width=512), scheme("fp8", "block")),
}
"""Whole models that vLLM builds on the meta device."""

LINEARS = [
    {"kind": kind, "method": method, "strategy": strategy, "rows": rows, "columns": columns, "size": size}
    for method, strategy in (("compressed-tensors", "block"), ("fp8", "block"), ("compressed-tensors", "channel"))
    for kind, rows, columns, size in (
        ("qkv", [1024, 1024, 1024], 256, 128),
        ("qkv", [1024, 256, 256], 256, 128),
        ("qkv", [512, 128, 128], 256, 64),
        ("qkv", [768, 192, 192], 256, 64),
        ("qkv", [1536, 384, 384], 128, 128),
        ("merged", [1024, 1024], 128, 1),
        ("merged", [512, 192], 128, 1),
        ("merged", [192, 512], 128, 1),
        ("merged", [320, 320], 128, 1),
        ("merged", [300, 300], 128, 1),
        ("column", [1024], 128, 1),
        ("column", [576], 128, 1),
        ("column", [100], 128, 1),
        ("row", [256], 1024, 1),
        ("row", [200], 512, 1),
        ("row", [256], 320, 1),
        ("row", [256], 100, 1),
        ("whole", [576], 192, 1),
    )
]
"""Single layers. Their weights and scales are loaded too, on every rank."""

EXPERTS = [
    {"method": method, "width": width, "hidden": hidden, "expert_parallel": parallel}
    for method in ("compressed-tensors", "fp8")
    for width in (128, 192, 256, 320, 512, 768, 1024, 1408, 1536, 100)
    for hidden in (2560, 2880)
    for parallel in (False, True)
]

KERNELS = [
    {"capability": CAPABILITY[device], "weights": w, "inputs": i, "shape": shape, "model_type": model, "dtype": dtype}
    for device in DEVICES
    for w, i, shape, model, dtype in (
        ("block", "dynamic", [256, 512], "llama", "bfloat16"),
        ("block", "dynamic", [64, 128], "llama", "bfloat16"),
        ("block", "dynamic", [96, 512], "llama", "bfloat16"),
        ("block", "dynamic", [576, 7168], "deepseek_v3", "bfloat16"),
        ("block", "dynamic", [256, 192], "llama", "bfloat16"),
        ("block", "dynamic", [256, 512], "qwen3_5_text", "bfloat16"),
        ("block", "dynamic", [256, 512], "llama", "float16"),
        ("channel", "dynamic", [256, 512], "llama", "bfloat16"),
        ("tensor", "static", [256, 512], "llama", "bfloat16"),
        ("channel", "static", [256, 512], "llama", "bfloat16"),
    )
]


TOWERS = ["siglip_vision_model", "clip_vision_model", "qwen2_5_vl", "intern_vit_6b"]

DRAFTS = {
    "deepseek": (
        latent() | {"num_nextn_predict_layers": 1},
        "deepseek_mtp",
        "DeepSeekMTP",
        ["model.layers.1.eh_proj", "model.layers.1.self_attn.o_proj"],
    ),
    "qwen": (
        sparse(kv=4)
        | {
            "architectures": ["Qwen3NextForCausalLM"],
            "model_type": "qwen3_next",
            "layer_types": ["full_attention"],
            "shared_expert_intermediate_size": 128,
        },
        "qwen3_next_mtp",
        "Qwen3NextMTP",
        ["mtp.fc", "mtp.layers.0.mlp.experts"],
    ),
}
"""Models with a predicting layer: config, vLLM's class for that layer, names of its modules that the plan keeps."""


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What vLLM's classes answer, from one child process."""
    root = tmp_path_factory.mktemp("world")
    folders = {}
    for name, (config, quantization) in MODELS.items():
        folder = folders[name] = root / name.replace(" ", "-").replace(",", "")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    request = {"folders": list(map(str, folders.values())), "linears": LINEARS, "experts": EXPERTS, "kernels": KERNELS}
    request["towers"] = TOWERS
    request["drafts"] = [case for name in DRAFTS for case in draft_cases(root, name)]
    (root / "request.json").write_text(json.dumps(request))
    command = [
        sys.executable,
        str(TESTS / "support/vllm_world.py"),
        str(root / "request.json"),
        str(root / "answer.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer = json.loads((root / "answer.json").read_text())
    return answer | {"models": {name: answer["folders"][str(folder)] for name, folder in folders.items()}}


def draft_cases(root: Path, name: str) -> Iterator[dict[str, str]]:
    """The model with and without the entries by which the plan ignores its predicting layers."""
    config, module, kind, names = DRAFTS[name]
    kept = kept_of(names, (), ["model.layers.0.mlp.down_proj"])
    for index, entries in enumerate(((), (*kept.modules, *kept.patterns))):
        folder = root / f"{module}-{index}"
        folder.mkdir()
        quantization = scheme("compressed-tensors", "channel")
        quantization["ignore"] += entries
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
        yield {"folder": str(folder), "module": module, "kind": kind}


pytest_vllm = pytest.mark.vllm


@pytest_vllm
@pytest.mark.parametrize("name", MODELS)
def test_vllm_builds_the_models_that_load_and_no_other(name: str, vllm: dict[str, Any]) -> None:
    answers = serving(*MODELS[name])
    for case, words in vllm["models"][name].items():
        ours = answers.of("vLLM", "hopper", int(case.rstrip("e")), expert_parallel=case.endswith("e"))
        # a fused matrix in blocks that do not fit is built under quant_method fp8, and wrong numbers are loaded
        builds = words == "" and not (MODELS[name][1]["quant_method"] == "fp8" and "rows per GPU" in ours.reason)
        assert (ours.verdict != "no") == builds, (case, words, ours.reason)


def test_inputs_that_are_no_whole_groups_are_said_before_the_first_token() -> None:
    answers = serving(dense(hidden=576, kv=8), scheme("compressed-tensors", "block"))
    assert "576 inputs are not whole groups of 128" in answers.of("vLLM", "hopper", 1).reason
    assert answers.of("vLLM", "ada", 1).word == "W8A16"
    assert serving(dense(kv=8), scheme("compressed-tensors", "block")).of("vLLM", "hopper", 1).verdict != "no"


@pytest_vllm
def test_vllm_quantizes_inputs_by_whole_groups(vllm: dict[str, Any]) -> None:
    assert vllm["groups"] == {"128": True, "192": False}


@pytest_vllm
@pytest.mark.parametrize("tower", TOWERS)
def test_encoders_are_cut_where_vllm_cuts_them(tower: str, vllm: dict[str, Any]) -> None:
    parts = {"text_config": dense(), "vision_config": {"model_type": tower, "num_attention_heads": 6}}
    answers = serving(dense() | parts, scheme("compressed-tensors", "channel"))
    builds = [answers.of("vLLM", "hopper", ranks).verdict != "no" for ranks in RANKS]
    assert vllm["towers"][tower][:3] == builds[:3], answers.of("vLLM", "hopper", 4).reason


@pytest_vllm
def test_every_rank_loads_its_part_where_the_rule_says_so(vllm: dict[str, Any]) -> None:
    for case, loaded in zip(LINEARS, vllm["linears"], strict=True):
        kinds = {"row": "columns", "whole": "whole"}
        size = case["size"]
        kv = [Part(rows, rows // size) for rows in case["rows"][1:]] if case["kind"] == "qkv" else []
        parts = [Part(rows) for rows in case["rows"]]
        parts = [Part(parts[0].rows, 0), *kv] if kv else parts
        matrix = Matrix("m", tuple(parts), case["columns"], kinds.get(case["kind"], "rows"), True)  # type: ignore[arg-type]
        heads = case["rows"][0] // size if kv else None
        known = _facts(case["method"], case["strategy"], heads=heads, matrices=(matrix,))
        assert [not list(objections(known, ranks)) for ranks in RANKS] == loaded, case


@pytest_vllm
def test_experts_pass_vllms_checks_where_the_rule_says_so(vllm: dict[str, Any]) -> None:
    for case, passed in zip(EXPERTS, vllm["experts"], strict=True):
        known = _facts(case["method"], "block", experts=(Experts("e", case["width"], case["hidden"], True),))
        ours = [not list(objections(known, ranks, expert_parallel=case["expert_parallel"])) for ranks in RANKS]
        assert ours == passed, case


@pytest_vllm
def test_kernels_are_those_that_vllm_chooses(vllm: dict[str, Any]) -> None:
    words = {"deepgemm": "DeepG", "cutlass": "CutlassFp8Block", "marlin": "Marlin"}
    devices = {capability: device for device, capability in CAPABILITY.items()}
    for case, name in zip(KERNELS, vllm["kernels"], strict=True):
        if case["weights"] != "block":
            assert "Cutlass" in name or "FlashInferFP8" in name, (case, name)  # W8A8 with the scales as they are
            continue
        known = _facts("fp8", "block", model_type=case["model_type"], half=case["dtype"] == "float16")
        kernel = linear_kernel(known, devices[case["capability"]], (case["shape"][0], case["shape"][1]))
        assert words[kernel].lower() in name.lower(), (case, name)


@pytest_vllm
def test_vllm_builds_predicting_layers_unquantized_by_the_entries_of_the_plan(vllm: dict[str, Any]) -> None:
    """What vLLM's issues on heads that do not load have in common: the draft model is built with the model's scheme."""
    without, ignored = vllm["drafts"][::2], vllm["drafts"][1::2]
    assert ignored == [[] for _ in DRAFTS]
    assert all(without), "without these entries vLLM wants FP8 weights"


def _facts(method: str, strategy: str, **changes: Any) -> Facts:
    understood = read_scheme(scheme(method, strategy))
    assert understood is not None
    known: dict[str, Any] = {"heads": None, "towers": (), "mla": False, "model_type": "llama", "half": False}
    spec = understood.groups[0].spec
    return Facts(**{"method": method, "spec": spec, "kv": None, "matrices": (), "experts": ()} | known | changes)


# ---------------------------------------------------------------------------------------------- known cases


def test_issue_54178_experts_320_wide_in_blocks() -> None:
    """Qwen3.8-Flash-Next-FP8: experts 320 wide do not load on eight GPUs, with 40 columns each."""
    config = sparse(hidden=2560, heads=16, kv=8, size=128, expert_width=320)
    found = serving(config, scheme("fp8", "block"))
    assert found.of("vLLM", "ada", 8).verdict == "no"
    assert "40 wide per GPU" in found.of("vLLM", "ada", 8).reason
    assert found.of("vLLM", "ada", 4).verdict == "no"
    assert found.of("vLLM", "ada", 2).verdict == "otherwise", "160 wide: vLLM 0.32 refines the scales to blocks of 32"
    assert found.of("vLLM", "ada", 8, expert_parallel=True).verdict == "otherwise", "whole experts fit"


def test_issue_52915_a_shared_expert_64_wide_on_eight_gpus() -> None:
    """Qwen3.6-35B-A3B-FP8: `input_size_per_partition = 64 is not divisible by block_k = 128`, for experts 512 wide."""
    config = dense(hidden=2048, heads=16, kv=8, size=256, width=512)
    for method in ("fp8", "compressed-tensors"):
        found = serving(config, scheme(method, "block"))
        eight = found.of("vLLM", "hopper", 8)
        assert eight.verdict == "no"
        assert "64" in eight.reason
        assert found.of("vLLM", "hopper", 4).verdict == "otherwise"


def test_issue_58157_deepgemm_quantizes_float_block_scales_again() -> None:
    """Float block scales are rounded to powers of two by DeepGEMM; scales that are powers of two are served as is."""
    for method in ("fp8", "compressed-tensors"):
        for device in ("hopper", "blackwell"):
            rounded = serving(dense(), scheme(method, "block")).of("vLLM", device, 1)
            assert (rounded.verdict, rounded.word) == ("otherwise", "requantized")
        exact = serving(dense(), scheme(method, "block") | {"scale_fmt": "ue8m0"})
        assert exact.of("vLLM", "hopper", 1).verdict == exact.of("vLLM", "blackwell", 1).verdict == "w8a8"


def test_blocks_on_ada_are_served_with_16_bit_inputs() -> None:
    for method in ("fp8", "compressed-tensors"):
        found = serving(dense(), scheme(method, "block"))
        assert found.of("vLLM", "ada", 1).word == "W8A16"
        counts = {answer.device: answer.counts for answer in found.on(("ada", "hopper", "cpu"))}
        assert counts == {"ada": False, "hopper": True}


def test_scales_per_head_need_flash_attention_3_or_4() -> None:
    found = serving(dense(), scheme("compressed-tensors", "tensor", "static", kv="attn_head"))
    assert [found.of("vLLM", device, 1).verdict for device in DEVICES] == ["no", "w8a8", "w8a8"]


def test_recipes_per_tensor_and_channel_are_w8a8_everywhere() -> None:
    for quantization in (scheme("compressed-tensors", "channel"), scheme("fp8", "tensor", "static")):
        found = serving(sparse(kv=8), quantization)
        assert {answer.verdict for answer in found.answers if answer.engine == "vLLM"} == {"w8a8"}


def test_transformers_reads_no_scales_per_tensor_of_quant_method_fp8() -> None:
    assert serving(dense(), scheme("fp8", "tensor")).of("transformers", "hopper", 1).verdict == "no"
    assert serving(dense(), scheme("fp8", "block")).of("transformers", "hopper", 1).verdict == "w8a8"
    assert serving(dense(), scheme("compressed-tensors", "channel")).of("transformers", "ada", 1).verdict == "otherwise"


def test_refined_scales_repeat_those_of_the_checkpoint() -> None:
    assert refined(Experts("e", 320, 2560, True), 2, (BLOCK, BLOCK)) == 32
    assert refined(Experts("e", 256, 2560, True), 2, (BLOCK, BLOCK)) is None, "whole blocks need none"


def test_the_largest_models_are_answered_quickly_by_their_distinct_matrices() -> None:
    config = sparse(hidden=7168, heads=128, kv=8, size=128, experts=4, expert_width=2048) | {"num_hidden_layers": 61}
    understood = read_scheme(scheme("fp8", "block"))
    assert understood is not None
    found = read_facts(config, understood, tensors_of(config, layers=61))
    assert found is not None
    assert (len(found.matrices), len(found.experts)) == (2, 1), "61 equal layers are one"


# ---------------------------------------------------------------------------------------------- where people see it


def planned(quantization: dict[str, Any]) -> Plan:
    """A plan of which only the answers are known."""
    return Plan.model_construct(recipe="some", serving=serving(dense(), quantization))


def test_a_release_is_refused_where_no_verdict_could_count() -> None:
    blocks = planned(scheme("compressed-tensors", "block"))
    policy = load_policy("gsm8k")
    everywhere = policy.model_copy(update={"device_classes": ("ada", "hopper")})
    [warning] = stages.require_counted(blocks, everywhere, "hopper", Parallel())
    assert "ada" in warning and "16-bit" in warning
    with pytest.raises(NoSuitableDevice, match="run it on hopper"):
        stages.require_counted(blocks, everywhere, "ada", Parallel())
    with pytest.raises(ConfigError, match="choose another recipe"):
        stages.require_counted(blocks, policy.model_copy(update={"device_classes": ("ada",)}), "cpu", Parallel())
    assert stages.require_counted(planned(scheme("fp8", "tensor", "static")), everywhere, "ada", Parallel()) == ()
    cut = Parallel(tensor=8)
    with pytest.raises(ConfigError, match=r"rows per GPU are not whole blocks"):
        stages.require_counted(planned(scheme("compressed-tensors", "block")), everywhere, "hopper", cut)


def test_expert_parallelism_is_asked_for_where_there_are_experts() -> None:
    channels = scheme("compressed-tensors", "channel")
    dense_ones, sparse_ones = serving(dense(), channels), serving(sparse(kv=8), channels)
    for ranks in (1, 2):
        [answer] = dense_ones.on(("hopper",), ranks, expert_parallel=True)
        assert (answer.ranks, answer.expert_parallel) == (ranks, False)
        [answer] = sparse_ones.on(("hopper",), ranks, expert_parallel=True)
        assert (answer.ranks, answer.expert_parallel) == (ranks, ranks > 1)
    assert list(dense_ones.on(("hopper",), 3)) == [], "nothing is known of such a size"


def test_the_table_fits_a_terminal_and_names_every_reason() -> None:
    config = sparse(kv=8, size=64, expert_width=320, experts=4)
    found = serving(config, scheme("compressed-tensors", "block"))
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal(serving_sheet(found)))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    reasons = {answer.reason for answer in found.answers if answer.reason}
    assert len(reasons) == len(found.table()[1])
    assert "expert parallel" in text and "expert" not in str(serving(dense(), scheme("fp8", "block")).table()[0])


def test_plan_and_validation_carry_the_answers(tmp_path: Path) -> None:
    source = reference.llama(tmp_path / "source")
    made = stages.plan(stages.pin(str(source)), load_recipe("fp8-dynamic"))
    assert made.serving is not None
    assert made.serving.of("vLLM", "ada", 1).verdict == "w8a8"
    checkpoint = reference.quantize(source, tmp_path / "checkpoint")
    report = stages.validate_model(str(checkpoint), depth="headers")
    assert report.serving is not None
    assert report.serving.of("vLLM", "ada", 1).verdict == "w8a8"
