"""vLLM is asked by default: what its answer means, how long it is kept, and what the report says without one.

The child that asks vLLM is replaced by answers of the kinds that it gives; tests/oracle has the real one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from support import reference_checkpoints as reference
from support.malformed import Base, Model, edit_config, shards_of
from support.tiny_models import architecture_of

from fp8pipe import stages
from fp8pipe.errors import EngineFailed
from fp8pipe.hub.source import resolve
from fp8pipe.oracle import vllm as oracle
from fp8pipe.oracle.cache import cache_dir
from fp8pipe.oracle.limits import is_limit
from fp8pipe.records import Finding, ValidationReport
from fp8pipe.records.paths import record_path
from fp8pipe.validate import validate
from fp8pipe.validate.reading import place

Q = "model.layers.0.self_attn.q_proj"
FAULT = ["unfilled", "", "model.router.weight", "data", "nothing"]


class Child:
    """In the place of the child process: gives the answers in turn, the last one again and again."""

    def __init__(self, *answers: dict[str, Any]) -> None:
        self.answers = list(answers)
        self.asked: list[dict[str, Any]] = []

    def __call__(self, requests: list[dict[str, Any]], _: Path) -> list[dict[str, Any]]:
        for request in requests:
            files = sorted(path.name for path in Path(request["folder"]).iterdir())
            self.asked.append(request | {"files": files})
        return [self.answers.pop(0) if len(self.answers) > 1 else dict(self.answers[0])]


def said(**answer: Any) -> dict[str, Any]:
    """What the child writes about a model in which it finds no fault, but for `answer`."""
    return {"mismatches": [], "refusal": "", "lacks": "", "limit": "", "source": None} | answer


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Child]:
    """`answer(said(...), ...)`: vLLM is installed, and its child says this. Nothing has been asked before."""

    def use(*answers: dict[str, Any]) -> Child:
        child = Child(*answers)
        monkeypatch.setattr(oracle, "run_probe", child)
        return child

    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(oracle, "version", lambda: "9.9")
    return use


@pytest.fixture
def folder(checkpoint: Callable[[Model, Base], Path], tmp_path: Path) -> Path:
    return reference.copy(checkpoint("dense", "static"), tmp_path / "checkpoint")


def report_on(folder: Path, *, oracles: bool | None = None) -> ValidationReport:
    return validate(folder, architecture=architecture_of(folder), depth="headers", oracles=oracles)


def runtime(report: ValidationReport) -> list[Finding]:
    return [finding for finding in report.findings if finding.check == "R1"]


# ---------------------------------------------------------------------------------------------- kept answers


def test_an_answer_is_kept_for_each_config_and_header_set(answer: Callable[..., Child], folder: Path) -> None:
    child = answer(said(mismatches=[FAULT], source=said()))
    first = report_on(folder)
    assert first == report_on(folder) and len(runtime(first)) == 1 and first.vllm == "9.9"
    assert len(child.asked) == 1
    edit_config(folder, lambda config: config.update(rope_theta=7.0))
    report_on(folder)
    save_file({"more": torch.zeros(2)}, shards_of(folder)[0], metadata={"format": "pt"})
    report_on(folder)
    assert len(child.asked) == 3


def test_an_answer_that_cannot_be_read_is_asked_for_again(answer: Callable[..., Child], folder: Path) -> None:
    child = answer(said())
    report_on(folder)
    (kept,) = cache_dir("vllm").iterdir()
    kept.write_text("{")
    assert report_on(folder).vllm == "9.9" and len(child.asked) == 2


@pytest.mark.parametrize("fault", [{"refusal": "KeyError: 'x'"}, {"lacks": "torchaudio"}, {"limit": "no data"}])
def test_what_may_be_due_to_the_machine_is_not_kept(
    answer: Callable[..., Child], folder: Path, fault: dict[str, str]
) -> None:
    child = answer(said(**fault), said(mismatches=[FAULT], source=said(**fault)), said())
    reports = [report_on(folder) for _ in range(3)]
    assert len(child.asked) == 3 and reports[-1].sound


# ---------------------------------------------------------------------------------------------- what it means


def unread(*names: str) -> dict[str, Any]:
    return said(mismatches=[["unread", name, "", "a parameter", "none"] for name in names], source=said())


def test_what_vllm_drops_without_loss_is_no_finding(answer: Callable[..., Child], folder: Path) -> None:
    answer(unread("model.norm.weight", *(f"{Q}.{leaf}" for leaf in ("weight", "weight_scale", "input_scale"))))
    report = report_on(folder)
    assert not runtime(report) and "R1" in report.checks


@pytest.mark.parametrize("name", [f"{Q}.weight_scale", f"{Q}.weight", "model.layers.0.self_attn.k_scale"])
def test_a_scale_that_vllm_drops_from_codes_that_it_reads_is_a_finding(
    answer: Callable[..., Child], folder: Path, name: str
) -> None:
    answer(unread(name))
    assert [finding.tensor for finding in runtime(report_on(folder))] == [name]


def test_faults_that_vllm_has_with_the_source_too_are_told_as_such(
    answer: Callable[..., Child], folder: Path, shelf: Path
) -> None:
    other = ["unfilled", "", "model.norm.weight", "data", "nothing"]
    child = answer(said(mismatches=[FAULT, other], source=said(mismatches=[FAULT])))
    report = validate(folder, source=resolve(str(shelf / "dense")), depth="headers", oracles=None)
    theirs, ours = runtime(report)
    assert theirs.consequence == "vLLM 9.9 does the same to the source" and "loads the source" in theirs.remedy
    assert "leaves (part of) the parameter uninitialised" in ours.consequence
    assert Path(child.asked[0]["source"]["folder"]) == (shelf / "dense").resolve()
    assert not report.sound


def test_a_model_that_vllm_refuses_quantized_or_not_is_told_as_such(answer: Callable[..., Child], folder: Path) -> None:
    words = "ValueError: NoSuchForCausalLM is not supported"
    answer(said(refusal=words, source=said(refusal=words)), said(refusal=words, source=said()))
    at_all, quantized = (runtime(report_on(folder))[0] for _ in range(2))
    assert at_all.consequence == "vLLM 9.9 cannot load this model at all, quantized or not"
    assert quantized.consequence == "vLLM stops with this message"


# ---------------------------------------------------------------------------------------------- no answer


def test_a_repository_on_the_hub_is_asked_about_by_its_headers_and_configs(
    answer: Callable[..., Child], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place.source, "read_range", lambda _, name, begin, end: (folder / name).read_bytes()[begin:end])

    def report() -> ValidationReport:
        remote = resolve(str(folder)).model_copy(update={"root": None, "commit": "0" * 40})
        return validate(remote, architecture=architecture_of(folder), depth="headers", oracles=None)

    child = answer(said(mismatches=[FAULT], source=said()), said(refusal="OSError: no preprocessor_config.json"))
    found = report()
    assert len(runtime(found)) == 1
    edit_config(folder, lambda config: config.update(rope_theta=7.0))
    refused = report()
    assert not runtime(refused) and "--depth values" in refused.vllm_silent
    assert "config.json" in child.asked[0]["files"] and len(child.asked[0]["tensors"]) == found.tensors
    assert not [name for name in child.asked[0]["files"] if not name.endswith(".json") or "index" in name]


@pytest.mark.parametrize("limit", ["Cannot copy out of meta tensor; no data!", "not supported on CPU."])
def test_what_cannot_be_told_here_is_no_finding(answer: Callable[..., Child], folder: Path, limit: str) -> None:
    answer(said(limit=limit))
    report = report_on(folder, oracles=True)
    assert report.sound and "R1" not in report.checks
    assert (report.vllm, report.vllm_silent) == ("9.9", f"vLLM 9.9 cannot tell here: {limit}")


def test_a_config_that_counts_more_layers_than_there_are_tensors_is_not_built(
    answer: Callable[..., Child], folder: Path
) -> None:
    child = answer(said())
    edit_config(folder, lambda config: config.update(num_hidden_layers=9_000))
    report = validate(folder, depth="headers", oracles=None)
    assert not child.asked and "counts 9000 layers" in report.vllm_silent and not report.sound


def test_a_missing_package_is_told_and_is_an_error_only_if_the_answer_is_demanded(
    answer: Callable[..., Child], folder: Path
) -> None:
    answer(said(lacks="torchaudio"))
    report = report_on(folder)
    assert report.sound and report.vllm == "" and "needs the Python package torchaudio" in report.vllm_silent
    with pytest.raises(EngineFailed, match="needs the Python package torchaudio"):
        report_on(folder, oracles=True)


def test_without_vllm_the_report_says_so_and_only_a_demand_fails(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oracle, "version", lambda: None)
    report = report_on(folder)
    assert report.sound and (report.vllm, report.vllm_silent) == ("", "vLLM is not installed here")
    with pytest.raises(EngineFailed, match="vLLM is not installed"):
        report_on(folder, oracles=True)


# ---------------------------------------------------------------------------------------------- the stages


def test_stages_ask_unless_told_not_to_and_reuse_only_what_was_asked(
    answer: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Path
) -> None:
    from fp8pipe.config import load_recipe

    folder, source = tmp_path / "made", str(shelf / "dense")
    stages.quantize_model(source, load_recipe("fp8-dynamic"), folder)
    child = answer(said())
    assert stages.validate_model(str(folder), depth="headers", oracles=False).vllm_silent == "vLLM was not asked"
    assert stages.validate(folder, source=None, oracles=False).vllm == "" and not child.asked
    assert stages.validate(folder, source=None).vllm == "9.9" and len(child.asked) == 1
    monkeypatch.setattr(oracle, "parity", None)
    assert stages.validate(folder, source=None).vllm == "9.9", "an answer of the same version is not asked for again"
    assert json.loads(record_path(folder, "validation").read_bytes())["vllm"] == "9.9"


def test_stages_ask_again_where_vllm_was_silent(
    answer: Callable[..., Child], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Path
) -> None:
    from fp8pipe.config import load_recipe

    folder, source = tmp_path / "made", str(shelf / "dense")
    stages.quantize_model(source, load_recipe("fp8-dynamic"), folder)
    child = answer(said(limit="not supported on CPU."), said(lacks="torchaudio"), said())
    reports = [stages.validate(folder, source=None) for _ in range(4)]
    assert [bool(report.vllm_silent) for report in reports] == [True, True, False, False] and len(child.asked) == 3
    monkeypatch.setattr(oracle, "version", lambda: None)
    assert not stages.validate(folder, source=None).vllm_silent, "what was heard is kept where vLLM is not installed"


# ---------------------------------------------------------------------------------------------- limits


def raised(provoke: Callable[[], object]) -> BaseException:
    try:
        provoke()
    except Exception as error:
        return error
    raise AssertionError("no error")


EMPTY = torch.empty(2, device="meta")
DATA_WANTED = (EMPTY.tolist, EMPTY.cpu, EMPTY.numpy, lambda: bool(EMPTY.sum()), EMPTY.nonzero)


@pytest.mark.parametrize("provoke", DATA_WANTED, ids=["tolist", "cpu", "numpy", "bool", "nonzero"])
def test_tensors_that_lack_data_are_a_limit(provoke: Callable[[], object]) -> None:
    assert is_limit(raised(provoke))


@pytest.mark.parametrize("file", ["vllm/platforms/cpu.py", "torch/cuda/__init__.py", "vllm/models/llama.py"])
def test_what_a_platform_refuses_is_a_limit(file: str) -> None:
    code = compile("raise ValueError('Sparse Attention is not supported')", f"/site-packages/{file}", "exec")
    assert is_limit(raised(lambda: exec(code))) == ("models" not in file)


def test_a_processor_that_is_not_at_hand_is_a_limit() -> None:
    code = compile("raise OSError('no preprocessor_config.json')", "/vllm/transformers_utils/processor.py", "exec")
    assert is_limit(raised(lambda: exec(code)))
    assert not is_limit(raised(lambda: Path("/no/file").read_text()))


def test_a_model_that_needs_its_own_code_is_a_limit() -> None:
    assert is_limit(ValueError("acme/model contains custom code; please pass `trust_remote_code=True` to allow it"))


def test_operators_that_a_build_lacks_are_a_limit_and_shapes_that_do_not_fit_are_none() -> None:
    assert is_limit(raised(lambda: torch.ops._C.no_such_operator))
    assert not is_limit(raised(lambda: torch.nn.Linear(1, 1).weight_scale))
    assert not is_limit(raised(lambda: torch.empty(2).copy_(torch.empty(3))))
    assert not is_limit(raised(lambda: EMPTY.copy_(torch.empty(3, device="meta"))))
