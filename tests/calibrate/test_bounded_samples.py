"""Tokenizers and chat templates that loop, allocate or crash end within bounds of time and memory, as bad input."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import pytest
from support.calibration import STATIC_KV, TEXTS, planned, run_calibration, with_data, write_dataset

from fp8pipe.calibrate import calibrate, samples
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError, EnvironmentFault

LOOPS = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}" + (
    "{% endfor %}{% endfor %}"
)
DOUBLES = "{% set n = namespace(x='word') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}"
OWN_CODE = """
import os
from transformers import PreTrainedTokenizerFast

class Own(PreTrainedTokenizerFast):
    def __call__(self, *args, **kwargs):
        os.kill(os.getpid(), {signal})
"""


@pytest.fixture
def spec(tmp_path: Path) -> CalibrationSpec:
    rows = [{"messages": [{"role": "user", "content": text}]} for text in TEXTS]
    data = write_dataset(tmp_path / "data.jsonl", rows)
    return CalibrationSpec(dataset=str(data), num_samples=5, max_seq_len=32)


def find(spec: CalibrationSpec, folder: Path, *, trust_remote_code: bool = False) -> samples.Samples:
    return samples.find_samples(spec, [Path(spec.dataset)], folder, trust_remote_code=trust_remote_code)


def test_a_dataset_of_the_hub_is_read_by_the_name_of_its_link(
    spec: CalibrationSpec, llama: Path, tmp_path: Path
) -> None:
    """The Hub's cache holds files without a suffix, to which links lead that have one."""
    expected = find(spec, llama)
    blob = Path(spec.dataset).rename(tmp_path / "blob")
    Path(spec.dataset).symlink_to(blob)
    assert find(spec, llama) == expected


def with_template(llama: Path, tmp_path: Path, template: str) -> Path:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(template)
    return folder


def with_code(llama: Path, tmp_path: Path, number: signal.Signals) -> Path:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    (folder / "tokenization_own.py").write_text(OWN_CODE.replace("{signal}", str(int(number))))
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": [None, "tokenization_own.Own"]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def error_of(spec: CalibrationSpec, folder: Path, *, trust_remote_code: bool = False) -> str:
    with pytest.raises(CalibrationDataError) as caught:
        find(spec, folder, trust_remote_code=trust_remote_code)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_template_that_loops_is_ended(
    llama: Path, tmp_path: Path, spec: CalibrationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_STEP_S", 5.0)
    assert "still tokenizing row" in error_of(spec, with_template(llama, tmp_path, LOOPS))


def test_template_that_allocates_is_refused(
    llama: Path, tmp_path: Path, spec: CalibrationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_MEMORY_BYTES", 300_000_000)
    assert "rejects a row (MemoryError)" in error_of(spec, with_template(llama, tmp_path, DOUBLES))


def test_tokenizer_that_panics_is_refused(llama: Path, tmp_path: Path, spec: CalibrationSpec) -> None:
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    tokenizer["pre_tokenizer"] = {"type": "FixedLength", "length": 0}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "tokenizer fails on a row (chunk size must be non-zero)" in error_of(spec, folder)


def test_tokenizer_that_crashes_is_refused(llama: Path, tmp_path: Path, spec: CalibrationSpec) -> None:
    folder = with_code(llama, tmp_path, signal.SIGABRT)
    assert "crashed while tokenizing row" in error_of(spec, folder, trust_remote_code=True)


def test_tokenizer_whose_text_grows_without_end_is_refused(
    llama: Path, tmp_path: Path, spec: CalibrationSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(samples, "_MEMORY_BYTES", 300_000_000)
    folder = Path(shutil.copytree(llama, tmp_path / "model"))
    tokenizer = json.loads((folder / "tokenizer.json").read_bytes())
    doubled = {"type": "Replace", "pattern": {"Regex": "."}, "content": "word" * 16}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [doubled] * 6}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert re.search(
        r"crashed while tokenizing row \d+ \(memory allocation of \d+ bytes failed\)", error_of(spec, folder)
    )


def test_a_killed_child_does_not_blame_the_model(llama: Path, tmp_path: Path, spec: CalibrationSpec) -> None:
    with pytest.raises(EnvironmentFault, match="signal 9"):
        find(spec, with_code(llama, tmp_path, signal.SIGKILL), trust_remote_code=True)


def test_calibrate_chooses_its_samples_in_the_child(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"))
    snapshot, plan, architecture = planned(llama, recipe)
    found = calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture)
    assert found.digest() == run_calibration(llama, recipe, tmp_path / "again").digest()
