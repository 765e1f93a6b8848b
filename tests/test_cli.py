"""The command line from outside: exit codes, one clear message, nothing published, nothing half-made."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from support.processes import FP8PIPE


def fp8pipe(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the console script; its environment is this test's plus `environment`."""
    command = [str(FP8PIPE), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def message(answer: subprocess.CompletedProcess[str]) -> str:
    """What was said, on one line, whatever the width of the terminal."""
    return " ".join(answer.stderr.split())


def assert_refused(answer: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    assert answer.returncode == code, answer.stderr + answer.stdout
    assert "Traceback" not in answer.stderr + answer.stdout
    for word in words:
        assert word in message(answer), f"{word!r} not in: {message(answer)}"


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with a config and one small tensor file: enough for everything that is refused before weights."""
    return write_model(tmp_path / "tiny", {"model.layers.0.self_attn.q_proj.weight": ("BF16", [64, 64])})


CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_hidden_layers": 1,
    "vocab_size": 128,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": True,
}


def llama_tensors(config: dict) -> dict[str, tuple[str, list[int]]]:
    """The tensors of a one-layer Llama with `config`."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = "model.layers.0"
    shapes = {
        "model.embed_tokens": [config["vocab_size"], hidden],
        f"{layer}.self_attn.q_proj": [hidden, hidden],
        f"{layer}.self_attn.k_proj": [kv, hidden],
        f"{layer}.self_attn.v_proj": [kv, hidden],
        f"{layer}.self_attn.o_proj": [hidden, hidden],
        f"{layer}.mlp.gate_proj": [inner, hidden],
        f"{layer}.mlp.up_proj": [inner, hidden],
        f"{layer}.mlp.down_proj": [hidden, inner],
        f"{layer}.input_layernorm": [hidden],
        f"{layer}.post_attention_layernorm": [hidden],
        "model.norm": [hidden],
    }
    return {f"{name}.weight": ("BF16", shape) for name, shape in shapes.items()}


def write_model(folder: Path, tensors: dict[str, tuple[str, list[int]]], config: dict | None = None) -> Path:
    """A model folder whose weights are a hole in the file: any size, no disk."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config or CONFIG))
    header, offset = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = 2
        for length in shape:
            size *= length
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + offset)
    return folder


def test_help_answers_for_every_command():
    commands = "plan quantize validate evaluate gate publish verify yank reconcile release batch demo status doctor hub"
    answer = fp8pipe("--help")
    assert answer.returncode == 0
    for command in commands.split():
        assert command in answer.stdout
        assert fp8pipe(command, "--help").returncode == 0


def test_unknown_option_is_a_usage_error():
    assert fp8pipe("plan", "org/model", "--recpe", "x").returncode == 2


def test_unknown_model(hub):
    assert_refused(fp8pipe("plan", "nobody/nothing"), 2, "nobody/nothing")


def test_missing_folder():
    assert_refused(fp8pipe("plan", "./no/such/folder"), 2, "no/such/folder")


def test_unknown_revision(hub, repo_id, tiny):
    push(repo_id, tiny)
    assert_refused(fp8pipe("plan", f"{repo_id}@v9"), 2, "v9", repo_id)


def test_gated_model_without_a_token(hub, repo_id, tiny):
    push(repo_id, tiny)
    client().update_repo_settings(repo_id, gated="manual")
    assert_refused(fp8pipe("plan", repo_id, HF_TOKEN=""), 2, repo_id, "access")


def test_unreachable_hub():
    answer = fp8pipe("plan", "some/model", HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(answer, 4, "127.0.0.1:9")


def test_recipe_with_unknown_key(tmp_path, tiny):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nweigths: {strategy: tensor}\n")
    assert_refused(fp8pipe("plan", tiny, "--recipe", recipe), 2, "weigths", "mine.yaml")


def test_ignore_entry_that_matches_nothing(tmp_path):
    model = write_model(tmp_path / "llama", llama_tensors(CONFIG))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\nignore: [model.layers.0.self_attn.kproj]\n")
    assert_refused(fp8pipe("plan", model, "--recipe", recipe), 2, "kproj", "k_proj")


def test_disk_too_small_for_the_plan(tmp_path):
    config = CONFIG | {"hidden_size": 1 << 20, "intermediate_size": 1 << 20, "num_attention_heads": 1 << 13}
    model = write_model(tmp_path / "huge", llama_tensors(config), config)
    answer = fp8pipe("quantize", model, "--output", tmp_path / "out")
    assert_refused(answer, 4, "GB", "free")
    assert not (tmp_path / "out" / "config.json").exists()


def test_device_that_is_none_is_refused_before_anything_is_read(tmp_path):
    answer = fp8pipe("quantize", tmp_path / "no-model", "--output", tmp_path / "out", "--device", "xyz")
    assert_refused(answer, 2, "device 'xyz'", "expected auto, cpu, cuda")


def test_a_gpu_that_is_asked_for_by_name_must_be_there(tmp_path):
    model = write_model(tmp_path / "llama", llama_tensors(CONFIG))
    answer = fp8pipe("quantize", model, "--output", tmp_path / "out", "--device", "cuda:99")
    assert_refused(answer, 4, "NoSuitableDevice", "cuda:99")


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
class OwnConfig(LlamaConfig):
    model_type = "own-model"
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_with_code_of_its_own_is_told_of_an_option_that_there_is(tmp_path):
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    config = CONFIG | {"model_type": "own-model", "architectures": ["OwnForCausalLM"], "auto_map": auto_map}
    model = write_model(tmp_path / "own", llama_tensors(CONFIG), config)
    (model / "own.py").write_text(OWN_CODE)
    cache = {"FP8PIPE_CACHE": str(tmp_path / "cache"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    assert_refused(fp8pipe("plan", model, **cache), 2, "--trust-remote-code")
    trusted = fp8pipe("plan", model, "--trust-remote-code", "--json", **cache)
    assert trusted.returncode == 0, trusted.stderr
    assert json.loads(trusted.stdout)["trust_remote_code"]
    out = tmp_path / "out"
    made = fp8pipe("quantize", model, "--output", out, "--trust-remote-code", **cache)
    assert made.returncode == 0, made.stderr
    assert (out / "own.py").exists()


def test_pickled_weights_only(tmp_path):
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    assert_refused(fp8pipe("plan", folder), 2, "safetensors")


def test_release_with_a_wrong_suite_starts_nothing(tmp_path):
    answer = fp8pipe("release", "o/m", "--repo-id", "o/m-FP8", "--suite", "nope", "--work-dir", tmp_path / "work")
    assert_refused(answer, 2, "nope")
    assert not (tmp_path / "work").exists()


def test_json_is_one_object_on_stdout(tmp_path):
    model = write_model(tmp_path / "llama", llama_tensors(CONFIG))
    answer = fp8pipe("plan", model, "--json")
    assert answer.returncode == 0, answer.stderr
    plan = json.loads(answer.stdout)
    assert plan["output_bytes"] < plan["source_bytes"]


def client():
    from fp8pipe.hub.client import client

    return client()


def push(repo_id: str, folder: Path) -> None:
    client().create_repo(repo_id, exist_ok=True)
    client().upload_folder(repo_id=repo_id, folder_path=folder)
