"""A plan is held against vLLM's loader, whose answer the validator then finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import architecture_of, make_model, plan_of, recipe

from fp8pipe import stages
from fp8pipe.errors import ConfigError
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
from fp8pipe.oracle import vllm
from fp8pipe.quantize import quantize
from fp8pipe.validate import validate
from fp8pipe.validate.planned import Asked, require_read


@pytest.fixture
def answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What vLLM's child answers, which a test may change, and how often it was asked."""
    found: dict[str, Any] = {"refusal": "", "mismatches": [], "lacks": "", "limit": "", "source": None, "asked": 0}

    def run_probe(requests: Any, scratch: Path) -> list[dict[str, Any]]:
        found["asked"] += 1
        return [dict(found)]

    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(vllm, "run_probe", run_probe)
    return found


def test_vllm_is_asked_about_a_plan_and_not_again_about_its_checkpoint(answer: dict[str, Any], tmp_path: Path) -> None:
    source = resolve(str(make_model(tmp_path / "source")))
    plan = plan_of(source.path, recipe("fp8-block"))
    assert require_read(source, read_headers(source), plan) == Asked() and answer["asked"] == 1
    quantize(source, plan, tmp_path / "out")
    report = validate(tmp_path / "out", source=source, architecture=architecture_of(source.path), oracles=None)
    assert report.vllm and answer["asked"] == 1


def test_what_vllm_does_not_read_of_the_source_either_is_said(answer: dict[str, Any], tmp_path: Path) -> None:
    source = resolve(str(make_model(tmp_path / "source")))
    refused = {"refusal": "ValueError: no kernel for this attention", "mismatches": [], "lacks": "", "limit": ""}
    answer.update(refused, source=refused)
    asked = require_read(source, read_headers(source), plan_of(source.path, recipe()))
    assert "does not read the source as it is" in asked.note and "no kernel for this attention" in asked.note


def test_the_table_of_what_serves_says_what_vllm_says(answer: dict[str, Any], tmp_path: Path) -> None:
    source = resolve(str(make_model(tmp_path / "source")))
    refused = {"refusal": "ValueError: no kernel for this attention", "mismatches": [], "lacks": "", "limit": ""}
    answer.update(refused, source=refused)
    plan = stages.plan(source, recipe())
    quantize(source, plan, tmp_path / "out")
    report = validate(tmp_path / "out", source=source, architecture=architecture_of(source.path), oracles=None)
    assert plan.serving is not None and report.serving is not None
    for serving, words in ((plan.serving, "no kernel for this attention"), (report.serving, "see R1")):
        answers = [one for one in serving.answers if one.engine == "vLLM"]
        assert {one.verdict for one in answers} == {"no"} and all(words in one.reason for one in answers)
        assert serving.of("transformers", "ada", 1).verdict != "no"
    unasked = stages.plan(source, recipe(), oracles=False).serving
    assert unasked is not None and unasked.of("vLLM", "ada", 1).verdict == "w8a8"


def test_a_recipe_that_vllm_does_not_read_is_refused_before_a_weight_is(answer: dict[str, Any], tmp_path: Path) -> None:
    source = resolve(str(make_model(tmp_path / "source")))
    answer["mismatches"] = [["unfilled", "", "model.norm.weight_scale", "data for all 8 elements", "nothing", ""]]
    with pytest.raises(ConfigError, match=r"does not read what recipe .* would write: model\.norm\.weight_scale"):
        stages.quantize_model(str(source.path), recipe(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    stages.quantize_model(str(source.path), recipe(), tmp_path / "out", oracles=False)


def test_only_tensors_that_the_plan_makes_must_be_read(answer: dict[str, Any], tmp_path: Path) -> None:
    source = resolve(str(make_model(tmp_path / "source")))
    plan, headers = plan_of(source.path, recipe()), read_headers(source)
    copied = next(output.name for output in plan.outputs if output.role == "copy")
    answer["mismatches"] = [["unread", copied, "", "a parameter for it", "none", ""]]
    assert require_read(source, headers, plan) == Asked()
    other = plan_of(source.path, recipe("fp8-block"))
    scale = next(output.name for output in other.outputs if output.role == "weight_scale")
    answer["mismatches"] += [["unread", scale, "", "a parameter for it", "none", ""]]
    with pytest.raises(ConfigError, match=r"does not read what recipe fp8-block would write: .*weight_scale: unread"):
        require_read(source, headers, other)
    answer["limit"] = "no such device"
    narrow = plan_of(source.path, recipe("autofp8-dynamic"))
    assert require_read(source, headers, narrow).note == (
        "vLLM cannot tell here whether its loader reads this checkpoint: no such device"
    )
