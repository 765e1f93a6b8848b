"""What vLLM has no class for is refused by the plan; and the registry that is read is the one that vLLM goes by."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from support import vllm_classes
from support.tiny_models import architecture_of, recipe
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from fp8pipe import stages
from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.hub.source import resolve
from fp8pipe.machine import survey
from fp8pipe.machine.engine_python import own
from fp8pipe.oracle import transformers as oracle
from fp8pipe.oracle import vllm_registry
from fp8pipe.oracle.transformers_probe import is_backend_compatible
from fp8pipe.oracle.vllm import version

SIZES = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 64}
CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "former": ("MptConfig", {"d_model": 64, "n_heads": 4, "n_layers": 2}),
    "never": ("GPTNeoConfig", {"num_heads": 4, "num_layers": 2, "attention_types": [[["global", "local"], 1]]}),
    "backend": ("HeliumConfig", SIZES),
    "listed for the backend": ("GPTNeoXConfig", {"num_attention_heads": 4, "intermediate_size": 64}),
    "own": ("LlamaConfig", SIZES),
}


@pytest.fixture
def model(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The tiny model of CONFIGS that the test names; the transformers oracle answers in this process."""
    name, own = CONFIGS[request.param]
    sizes = {"vocab_size": 96, "hidden_size": 64, "num_hidden_layers": 2, "bos_token_id": 1, "eos_token_id": 2} | own
    config = getattr(transformers, name)(**{key: value for key, value in sizes.items() if _takes(own, key)})
    transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(oracle, "inspect", lambda snapshot, **_: architecture_of(snapshot.path))
    return str(tmp_path)


def _takes(own: dict[str, Any], key: str) -> bool:
    """Configs of older models have other names for these."""
    return key in own or not (key in ("hidden_size", "num_hidden_layers") and {"n_layers"} & set(own))


def _notes(model: str) -> list[str]:
    made = stages.plan(resolve(model), recipe())
    return [note for note in made.notes if "vLLM" in note]


@pytest.mark.parametrize(
    ("model", "reason"),
    [("former", "no MptForCausalLM, .* its last version with this class was 0"), ("never", "no GPTNeoForCausalLM, ")],
    indirect=["model"],
)
def test_a_model_that_vllm_has_no_class_for_is_refused_by_the_plan(model: str, reason: str) -> None:
    with pytest.raises(
        UnsupportedArchitecture, match=rf"vLLM {re.escape(version() or '')}.* has {reason}.*install"
    ) as caught:
        stages.plan(resolve(model), recipe())
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)


@pytest.mark.parametrize("model", ["backend"], indirect=True)
def test_a_model_for_the_transformers_backend_is_planned_with_a_note(model: str) -> None:
    (note,) = _notes(model)
    assert "no HeliumForCausalLM of its own" in note and "Transformers backend" in note


@pytest.mark.parametrize("model", ["own", "listed for the backend"], indirect=True)
def test_a_model_that_vllm_lists_needs_no_note(model: str) -> None:
    assert _notes(model) == []


@pytest.mark.parametrize("model", ["former"], indirect=True)
@pytest.mark.parametrize("why", ["no vLLM", "a plugin", "another name"])
def test_what_the_registry_cannot_tell_is_planned(model: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    architecture = architecture_of(Path(model))
    if why == "no vLLM":
        monkeypatch.setattr(survey, "place", lambda package: None)
    elif why == "a plugin":
        monkeypatch.setattr(survey, "plugins", lambda: ("mpt_for_vllm:register",))
    else:
        path = Path(model) / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["LlamaForCausalLM"]}))
    vllm_registry.installed.cache_clear()
    try:
        assert vllm_registry.require_class(resolve(model), architecture) == ()
    finally:
        vllm_registry.installed.cache_clear()


def test_for_a_class_that_a_plugin_adds_the_plugin_is_named() -> None:
    registry = vllm_registry.installed(own())
    assert registry is not None and registry.elsewhere
    assert all(f"install {address}" in registry.lacks(name) for name, address in registry.elsewhere.items())


@pytest.mark.vllm
@pytest.mark.filterwarnings("ignore")  # some of transformers' modules warn when they are imported
def test_the_rules_are_those_of_vllms_own_registry(tmp_path: Path) -> None:
    ours = vllm_registry.installed(own())
    names = {*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values(), *MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()}
    names |= {name.replace("ForCausalLM", "Model") for name in names} | {"MPTForCausalLM", "Nobody"}
    request, answer = tmp_path / "request.json", tmp_path / "answer.json"
    request.write_text(json.dumps(sorted(names)))
    subprocess.run([sys.executable, vllm_classes.__file__, request, answer], check=True, capture_output=True)
    theirs = json.loads(answer.read_text())
    assert ours is not None and sorted(ours.classes) == theirs["classes"]
    assert {name: _ours(ours, name) for name in sorted(names)} == theirs["found"]
    assert set(theirs["found"].values()) == {"own", "backend", "other head", "former", "none"}


def _ours(registry: vllm_registry.Registry, name: str) -> str:
    if name in registry.classes:
        return "own"
    known = getattr(transformers, name, None)
    if known is not None and is_backend_compatible(known):
        return "backend"
    if registry.has_other_head(name):
        return "other head"
    words = {"its last version": "former", "a plugin adds it": "plugin"}
    return next((kind for part, kind in words.items() if registry.lacks(name).startswith(part)), "none")
