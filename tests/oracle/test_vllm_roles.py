"""Models that vLLM knows and transformers does not: vLLM says what may be quantized, and serves what comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.findings import ids
from support.tiny_models import recipe
from support.vllm_only import MODELS, make_vllm_only

from fp8pipe import stages
from fp8pipe.errors import ConfigError, UnsupportedArchitecture
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import Architecture
from fp8pipe.oracle import transformers, vllm_roles
from fp8pipe.oracle.vllm import ask_vllm
from fp8pipe.quantize import quantize
from fp8pipe.quantize.plan import make_plan
from fp8pipe.validate import validate

pytestmark = pytest.mark.vllm

RECIPES = ("fp8-dynamic", "fp8-block")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("vllm-only")
    return {name: make_vllm_only(root / name, name) for name in MODELS}


@pytest.fixture(scope="module")
def architectures(sources: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Architecture]:
    """All of them from one child."""
    requests = []
    for name, folder in sources.items():
        scratch = tmp_path_factory.mktemp(name)
        (scratch / "config.json").write_bytes((folder / "config.json").read_bytes())
        tensors = {info.name: [info.dtype, info.shape] for info in read_headers(resolve(str(folder))).tensors.values()}
        requests.append({"folder": str(scratch), "tensors": tensors, "trust_remote_code": False})
    answers = vllm_roles.ask(requests, tmp_path_factory.mktemp("answers"))
    return {name: Architecture.model_validate(answer) for name, answer in zip(sources, answers, strict=True)}


def _kinds(architecture: Architecture) -> dict[str, str]:
    return {name: role.kind for name, role in architecture.tensors.items()}


def test_roles_are_those_of_vllms_layers(architectures: dict[str, Architecture]) -> None:
    glm, step, kimi = (_kinds(architectures[name]) for name in ("chatglm", "step3", "kimi"))
    assert glm["transformer.output_layer.weight"] == "lm_head"
    assert glm["transformer.embedding.word_embeddings.weight"] == "embedding"
    inside = {name: kind for name, kind in glm.items() if ".layers." in name and "norm" not in name}
    assert {kind for name, kind in inside.items() if name.endswith(".weight")} == {"linear"}
    assert step["model.layers.1.moe.gate.weight"] == kimi["model.layers.1.mlp.gate.weight"] == "router"
    assert {kind for name, kind in step.items() if ".moe." in name and "proj" in name} == {"kept_experts"}
    assert {kind for name, kind in kimi.items() if ".experts." in name} == {"expert"}
    found = architectures.values()
    assert {(one.answered_by, one.misfits, one.num_layers) for one in found} == {("vLLM", (), 2)}


def test_tensors_that_share_a_weight_are_fused(architectures: dict[str, Architecture]) -> None:
    def group(model: str, name: str) -> str:
        return architectures[model].tensors[f"{name}.weight"].group

    assert group("step3", "model.layers.0.self_attn.k_proj") == "model.layers.0.self_attn.(q_proj+k_proj+v_proj)"
    assert group("step3", "model.layers.0.self_attn.wq") == ""
    assert group("kimi", "model.layers.1.mlp.experts.2.up_proj") == "model.layers.1.mlp.experts.2.(gate_proj+up_proj)"
    assert group("kimi", "model.layers.0.self_attn.q_a_proj").endswith("(q_a_proj+kv_a_proj_with_mqa)")
    glm = architectures["chatglm"].tensors
    assert glm["transformer.encoder.layers.0.self_attention.query_key_value.weight"].parts == (128, 64, 64)
    assert glm["transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"].parts == (256, 256)


def test_what_comes_of_it_lies_whole_in_vllms_own_model(
    sources: dict[str, Path], architectures: dict[str, Architecture], tmp_path: Path
) -> None:
    made = {}
    for name, source in sources.items():
        snapshot = resolve(str(source))
        for wanted in RECIPES:
            plan = make_plan(snapshot, read_headers(snapshot), recipe(wanted), architectures[name])
            assert sum(tensor.action == "quantize" for tensor in plan.tensors) >= 6
            quantize(snapshot, plan, tmp_path / f"{name}-{wanted}")
            made[tmp_path / f"{name}-{wanted}"] = validate(
                tmp_path / f"{name}-{wanted}", source=snapshot, architecture=architectures[name]
            )
    assert {folder.name: ids(report) for folder, report in made.items() if ids(report) - {"K10"}} == {}
    answers = ask_vllm(list(made))
    assert not [answer.refusal for answer in answers.values() if answer.refusal]
    at_fault = {folder.name: answer.mismatches for folder, answer in answers.items() if answer.mismatches}
    assert set(at_fault) == {"step3-fp8-block"}, at_fault
    # Step 3's loader does not rename compressed-tensors' block scales, and the oracle says so before they are served.
    refused = [one for one in at_fault["step3-fp8-block"] if one.kind == "refused"]
    assert refused and all(one.tensor.endswith(".weight_scale") for one in refused)


def test_recipe_that_vllms_loader_does_not_read_is_refused_by_the_plan(
    sources: dict[str, Path], architectures: dict[str, Architecture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    monkeypatch.setattr(transformers, "inspect", lambda *_, **__: architectures["step3"])
    snapshot = resolve(str(sources["step3"]))
    with pytest.raises(
        ConfigError, match=r"does not read what recipe fp8-block would write: .*weight_scale.*no-oracles"
    ):
        stages.plan(snapshot, recipe("fp8-block"))
    assert not any("asked" in note or "cannot tell" in note for note in stages.plan(snapshot, recipe()).notes)


def test_recipe_that_measures_ranges_is_refused(
    sources: dict[str, Path], architectures: dict[str, Architecture]
) -> None:
    snapshot = resolve(str(sources["kimi"]))
    with pytest.raises(ConfigError, match="transformers must run the model, but only vLLM knows DeepseekV3ForCausalLM"):
        make_plan(snapshot, read_headers(snapshot), recipe("fp8-static"), architectures["kimi"])


def test_vllm_is_asked_about_what_transformers_does_not_know_and_about_nothing_else(
    sources: dict[str, Path], architectures: dict[str, Architecture], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path))
    answers = iter([[architectures["step3"].model_dump(mode="json")], [{"unsupported": "vLLM cannot either"}]])
    monkeypatch.setattr(vllm_roles, "ask", lambda requests, scratch: next(answers))
    assert transformers.inspect(resolve(str(sources["step3"]))) == architectures["step3"]
    assert transformers.inspect(resolve(str(sources["step3"]))) == architectures["step3"]  # from the cache
    with pytest.raises(UnsupportedArchitecture, match=r"chatglm.*; vLLM cannot either"):
        transformers.inspect(resolve(str(sources["chatglm"])))
