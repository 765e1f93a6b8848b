"""Damaged checkpoints: a flipped bit is a finding; arbitrary bytes and a vLLM that fails neither crash nor hang it."""

from __future__ import annotations

import atexit
import json
import os
import random
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support import reference_checkpoints as reference
from support.findings import ids
from support.malformed import INDEX, edit_config, shards_of
from support.settings import CALM
from support.tiny_models import architecture_of, calibration_for, make_model, plan_of, recipe

from fp8pipe.errors import EngineFailed
from fp8pipe.hub.source import resolve
from fp8pipe.model.architecture import Architecture
from fp8pipe.model.untrusted import parse_config
from fp8pipe.oracle import configs
from fp8pipe.oracle import vllm as oracle
from fp8pipe.quantize import quantize
from fp8pipe.records import Snapshot, ValidationReport
from fp8pipe.validate import validate

pytestmark = pytest.mark.usefixtures("architecture_cache")

LONG = bool(os.environ.get("FP8PIPE_LONG"))
FLIPS = 2000 if LONG else 200
GARBAGE = 10_000 if LONG else 200


# ---------------------------------------------------------------------------------------------- flips, without records


@cache
def flip_subject() -> tuple[Path, Snapshot, Architecture]:
    """One small checkpoint for all flips; each flip is undone."""
    root = Path(tempfile.mkdtemp(prefix="fp8pipe-test-"))
    atexit.register(shutil.rmtree, root)
    source = reference.llama(root / "source")
    folder = reference.quantize(source, root / "fp8", strategy="channel", static=False)
    return folder, resolve(str(source)), architecture_of(source)


@given(st.data())
@settings(max_examples=FLIPS, **CALM)
def test_flip_is_an_error_or_changes_no_value_or_is_a_code_that_rounding_allows(data: st.DataObject) -> None:
    folder = flip_subject()[0]
    path = data.draw(st.sampled_from([*shards_of(folder), *shards_of(folder), folder / INDEX]))
    whole = path.read_bytes()
    changed = data.draw(st.one_of(flipped_bits(whole), flipped_bytes(whole), cut(whole)))
    report = report_with(path, changed)
    is_harmless = same_content(path, whole, changed) or is_allowed_code(whole, changed)
    assert not report.sound or is_harmless, [finding.sentence() for finding in report.findings]


def test_flip_of_the_config_is_an_error_or_changes_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """One child reads every config that C7 will ask about: each by itself would cost the start of the libraries."""
    folder, source, _ = flip_subject()
    path = folder / "config.json"
    whole, chance = path.read_bytes(), random.Random(12)
    flips = [flipped(whole, chance) for _ in range(FLIPS // 4)]
    parsed = [config for config, _ in map(parse_config, flips) if config is not None]
    theirs = json.loads((source.path / "config.json").read_bytes())
    answers = zip(parsed, configs.compare_each(parsed, theirs, dtype="bfloat16"), strict=True)
    known = {json.dumps(config): answer for config, answer in answers}

    def compare(ours: dict[str, Any], other: dict[str, Any], *, dtype: str | None) -> configs.Comparison:
        assert (other, dtype) == (theirs, "bfloat16")
        return known[json.dumps(ours)]

    monkeypatch.setattr(configs, "compare", compare)
    for changed in flips:
        report = report_with(path, changed)
        # A key that holds its default may change its name: no library builds another model for that.
        is_harmless = same_content(path, whole, changed) or {finding.check for finding in report.findings} == {"C7"}
        assert not report.sound or is_harmless, [changed, *(finding.sentence() for finding in report.findings)]


def report_with(path: Path, content: bytes) -> ValidationReport:
    """What is found while a file of the checkpoint has this content."""
    folder, source, architecture = flip_subject()
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        return validate(folder, source=source, architecture=architecture)
    finally:
        path.write_bytes(whole)


def flipped(whole: bytes, chance: random.Random) -> bytes:
    """One bit flipped, one byte replaced, or the end cut off."""
    at = chance.randrange(len(whole))
    replaced = (with_byte(whole, at, whole[at] ^ 1 << chance.randrange(8)), with_byte(whole, at, chance.randrange(256)))
    return chance.choice((*replaced, whole[:at]))


def flipped_bits(whole: bytes) -> st.SearchStrategy[bytes]:
    """One bit, in the data or in the first kilobytes, where headers are."""
    places = st.one_of(st.integers(0, len(whole) - 1), st.integers(0, min(4000, len(whole) - 1)))
    return st.tuples(places, st.integers(0, 7)).map(lambda at: with_byte(whole, at[0], whole[at[0]] ^ 1 << at[1]))


def flipped_bytes(whole: bytes) -> st.SearchStrategy[bytes]:
    """One byte replaced."""
    places = st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 255))
    return places.map(lambda at: with_byte(whole, at[0], (whole[at[0]] + at[1]) % 256))


def cut(whole: bytes) -> st.SearchStrategy[bytes]:
    """The end cut off."""
    return st.integers(0, len(whole) - 1).map(lambda at: whole[:at])


def with_byte(whole: bytes, at: int, value: int) -> bytes:
    return whole[:at] + bytes([value]) + whole[at + 1 :]


def same_content(path: Path, whole: bytes, changed: bytes) -> bool:
    """Whether readers find the same: JSON may spell one content in several ways, and some keys mean nothing."""
    if path.suffix == ".json":
        return meaning(path.name, whole) == meaning(path.name, changed)
    before, now = tensors_of(whole), tensors_of(changed)
    if before is None or now is None or before.keys() != now.keys():
        return False
    return all(raw(before[n]) == raw(now[n]) and before[n].dtype == now[n].dtype for n in before)


def meaning(name: str, content: bytes) -> Any:
    """What readers take from the JSON, without the keys that none of them uses."""
    try:
        value = json.loads(content)
    except ValueError:
        return object()
    if name == INDEX:
        return value.get("weight_map") if isinstance(value, dict) else object()
    if not isinstance(value, dict):
        return object()
    return parsed(value.pop("quantization_config", None)), value


def parsed(quantization: Any) -> Any:
    """As compressed-tensors reads it, without notes on how the numbers were found."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        fields = QuantizationConfig.model_validate(quantization).model_dump(exclude={"quantization_status"})
    except Exception:  # its validators raise whatever they stumble on
        return object()
    fields["config_groups"] = list(fields["config_groups"].values())  # the names of groups mean nothing
    for group in fields["config_groups"]:
        for arguments in filter(None, (group["weights"], group["input_activations"])):
            arguments.pop("observer")
            arguments.pop("observer_kwargs")
    return fields


def tensors_of(content: bytes) -> dict[str, torch.Tensor] | None:
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "x.safetensors"
        path.write_bytes(content)
        try:
            return load_file(path)
        except Exception:  # the library's own error types are many; here they mean one thing
            return None


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def is_allowed_code(whole: bytes, changed: bytes) -> bool:
    """The flip hit one code and moved it to the other side of a near tie."""
    before, now = tensors_of(whole), tensors_of(changed)
    if before is None or now is None or before.keys() != now.keys():
        return False
    other = [name for name in before if raw(before[name]) != raw(now[name])]
    return len(other) == 1 and before[other[0]].dtype == now[other[0]].dtype == torch.float8_e4m3fn


def test_at_most_six_percent_of_code_flips_pass_as_another_rounding() -> None:
    """Each bit of each code of one matrix flipped in turn, judged by D1's rule as docs/validate.md states it."""
    source = reference.read(flip_subject()[1].path)[0]
    tensors = reference.read(flip_subject()[0])[0]
    passed = total = 0
    for name, codes in tensors.items():
        if codes.dtype != torch.float8_e4m3fn:
            continue
        scaled = source[name].double() / tensors[f"{name}_scale"].double()
        for bit in range(8):
            value = (codes.view(torch.uint8) ^ (1 << bit)).view(torch.float8_e4m3fn).double()
            exponent = torch.frexp(scaled).exponent.double() - 1
            allowed = torch.exp2(exponent.clamp(min=-6) - 3) / 2 + scaled.abs() / 256
            passed += int(((scaled - value).abs() <= allowed).sum())
            total += codes.numel()
    assert 0 < passed / total <= 0.06, passed / total


@given(st.integers(0), st.integers(0, 7))
@settings(max_examples=FLIPS // 10, **CALM)
def test_code_flips_that_pass_are_those_of_the_rule(place: int, bit: int) -> None:
    """The validator lets a flipped code pass only if the rule counted above does."""
    folder, source, architecture = flip_subject()
    path = shards_of(folder)[place % 2]
    whole = path.read_bytes()
    tensors, originals = load_file(path), reference.read(source.path)[0]
    names = sorted(name for name in tensors if tensors[name].dtype == torch.float8_e4m3fn)
    name = names[place // 2 % len(names)]
    at = place // 7 % tensors[name].numel()
    tensors[name].view(torch.uint8).view(-1)[at] ^= 1 << bit
    scaled = (originals[name].double() / tensors[f"{name}_scale"].double()).view(-1)[at]
    value = tensors[name].view(-1)[at].double()
    step = torch.exp2((torch.frexp(scaled).exponent.double() - 1).clamp(min=-6) - 3)
    save_file(tensors, path, metadata={"format": "pt"})
    try:
        is_allowed = bool((scaled - value).abs() <= step / 2 + scaled.abs() / 256)
        assert validate(folder, source=source, architecture=architecture).sound is is_allowed
    finally:
        path.write_bytes(whole)


# ---------------------------------------------------------------------------------------------- flips, with records


@cache
def recorded_subject() -> tuple[Path, Snapshot, Architecture]:
    """A checkpoint of this engine with static input and KV scales."""
    root = Path(tempfile.mkdtemp(prefix="fp8pipe-test-"))
    atexit.register(shutil.rmtree, root)
    source = make_model(root / "source")
    plan = plan_of(source, recipe("fp8-static-kv"))
    quantize(resolve(str(source)), plan, root / "fp8", calibration=calibration_for(plan))
    return root / "fp8", resolve(str(source)), architecture_of(source)


@given(st.data())
@settings(max_examples=FLIPS, **CALM)
def test_every_flip_in_a_checkpoint_of_the_engine_is_an_error_or_changes_no_value(data: st.DataObject) -> None:
    folder, source, architecture = recorded_subject()
    path = data.draw(st.sampled_from(shards_of(folder)))
    whole = path.read_bytes()
    changed = data.draw(st.one_of(flipped_bits(whole), flipped_bytes(whole)))
    path.write_bytes(changed)
    try:
        report = validate(folder, source=source, architecture=architecture)
        assert not report.sound or same_content(path, whole, changed), [f.sentence() for f in report.findings]
    finally:
        path.write_bytes(whole)


# ---------------------------------------------------------------------------------------------- garbage


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    return reference.quantize(reference.llama(root / "source"), root / "fp8", strategy="channel", kv="tensor")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=GARBAGE, **CALM)
def test_garbage_as_header_index_or_config_is_a_finding_not_an_exception(good: Path, data: st.DataObject) -> None:
    shard = shards_of(good)[0]
    path = data.draw(st.sampled_from([shard, good / INDEX, good / "config.json"]))
    whole = path.read_bytes()
    content = data.draw(st.one_of(st.binary(max_size=300), with_length(), mixed(whole), changed_json(path, whole)))
    path.write_bytes(content)
    try:
        report = validate(good, depth="headers")
        assert ValidationReport.model_validate_json(report.model_dump_json()) == report
        assert not report.sound or same_meaning(path, whole, content)
    finally:
        path.write_bytes(whole)


def with_length() -> st.SearchStrategy[bytes]:
    """A header length that is right, before garbage."""
    return st.binary(max_size=300).map(lambda data: len(data).to_bytes(8, "little") + data)


@st.composite
def mixed(draw: st.DrawFn, whole: bytes) -> bytes:
    """A piece of the file replaced."""
    at = draw(st.integers(0, min(len(whole), 3000)))
    data = draw(st.binary(max_size=40))
    return whole[:at] + data + whole[at + draw(st.integers(0, 40)) :]


@st.composite
def changed_json(draw: st.DrawFn, path: Path, whole: bytes) -> bytes:
    """Any value anywhere in the JSON of a config, an index, or a header (with its length)."""
    is_shard = path.suffix == ".safetensors"
    length = int.from_bytes(whole[:8], "little")
    document = json.loads(whole[8 : 8 + length] if is_shard else whole)
    place: Any = document
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or draw(st.booleans()):
            place[key] = draw(JSON)
            break
        place = place[key]
    text = json.dumps(document).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + length :] if is_shard else text


def same_meaning(path: Path, whole: bytes, content: bytes) -> bool:
    """Whether two files differ in nothing that headers show: not in names and shapes, nor in keys that readers use."""
    if path.suffix == ".safetensors":
        before, now = tensors_of(whole), tensors_of(content)
        return before is not None and now is not None and shapes_of(before) == shapes_of(now)
    return path.name == "config.json" or meaning(path.name, whole) == meaning(path.name, content)


def shapes_of(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """vLLM reads the one scale of a module or a cache as [] and as [1]."""
    scalars = (".input_scale", ".k_scale", ".v_scale")
    return {name: tuple(t.shape) or (1,) if name.endswith(scalars) else tuple(t.shape) for name, t in tensors.items()}


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", b"[" * 100_000),
        ("config.json", b'{"quantization_config": ' + b'{"a":' * 500 + b"1" + b"}" * 501),
        ("config.json", b'{"num_hidden_layers": ' + b"9" * 5000 + b"}"),
        (INDEX, b'{"weight_map": {"\\ud800.weight": "\\ud800.safetensors"}}'),
        (INDEX, b'{"weight_map": {"a": ["b"], "c": "", "d": "/etc/passwd", "e": "..", "f": "a\\u0000.safetensors"}}'),
        (INDEX, b"\xff\xfe"),
    ],
)
def test_hostile_json_becomes_findings_that_can_be_saved(good: Path, tmp_path: Path, file: str, content: bytes) -> None:
    folder = reference.copy(good, tmp_path / "checkpoint")
    (folder / file).write_bytes(content)
    report = validate(folder)
    assert not report.sound
    assert ValidationReport.load(report.save(tmp_path / "validation.json")) == report


@pytest.mark.timeout(60)
@pytest.mark.parametrize("file", ["config.json", INDEX, "model-00001-of-00002.safetensors", "README.md"])
def test_pipe_in_the_place_of_a_file_is_no_file(good: Path, tmp_path: Path, file: str) -> None:
    """A read of it would wait for a writer for ever."""
    folder = reference.copy(good, tmp_path / "checkpoint")
    (folder / file).unlink(missing_ok=True)
    os.mkfifo(folder / file)
    assert validate(folder).sound is (file == "README.md")


def test_link_to_itself_is_no_weight_file(good: Path, tmp_path: Path) -> None:
    folder = reference.copy(good, tmp_path / "checkpoint")
    shard = shards_of(folder)[0]
    shard.unlink()
    shard.symlink_to(shard.name)
    assert "F9" in ids(validate(folder))


# ---------------------------------------------------------------------------------------------- oracles


def spoil_headers(folder: Path) -> None:
    """One tensor in two files, and metadata that is null: the first has a fault, and vLLM reads it all the same."""
    first, second = shards_of(folder)
    save_file(load_file(first) | dict([load_file(second).popitem()]), first, metadata={"format": "pt"})
    whole = second.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    text = json.dumps(json.loads(whole[8 : 8 + length]) | {"__metadata__": None}).encode()
    second.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])


def test_vllm_is_asked_about_what_can_be_read_of_broken_headers(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = reference.copy(good, tmp_path / "checkpoint")
    spoil_headers(folder)
    asked: list[dict[str, Any]] = []

    def answer(requests: list[dict[str, Any]], _: Path) -> list[dict[str, Any]]:
        asked.extend(requests)
        return [said(refusal="no")]

    monkeypatch.setattr(oracle, "run_probe", answer)
    monkeypatch.setattr(oracle, "version", lambda: "0")
    report = validate(folder, architecture=architecture_of(good), depth="headers", oracles=None)
    assert {"F4", "R1"} <= ids(report)
    assert len(asked[0]["tensors"]) == report.tensors


def said(**answer: Any) -> dict[str, Any]:
    """What the child of the vLLM oracle writes about a model in which it finds no fault, but for `answer`."""
    return {"mismatches": [], "refusal": "", "lacks": "", "limit": "", "source": None} | answer


@pytest.mark.parametrize("wanted", [None, True])
def test_child_of_vllm_that_dies_costs_its_own_check_alone(
    good: Path, monkeypatch: pytest.MonkeyPatch, wanted: bool | None
) -> None:
    def die(*_: object) -> None:
        raise EngineFailed("vLLM ended while it built the model: killed")

    monkeypatch.setattr(oracle, "run_probe", die)
    monkeypatch.setattr(oracle, "version", lambda: "0")
    report = validate(good, architecture=architecture_of(good), depth="headers", oracles=wanted)
    assert report.sound and "F1" in report.checks and "R1" not in report.checks
    assert (report.vllm, report.vllm_silent) == ("", "vLLM ended while it built the model: killed")


@pytest.mark.parametrize("case", ["no config", "no shard"])
def test_vllm_that_cannot_be_asked_is_reported(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    folder = reference.copy(good, tmp_path / "checkpoint")
    architecture = architecture_of(good)
    monkeypatch.setattr(oracle, "run_probe", None)
    monkeypatch.setattr(oracle, "version", lambda: "0")
    if case == "no config":
        (folder / "config.json").write_bytes(b"[" * 100_000)
    else:
        shards_of(folder)[0].unlink()
    report = validate(folder, architecture=architecture, depth="headers", oracles=True)
    assert "R1" not in report.checks
    assert {"no config": "config.json: ", "no shard": "F2"}[case] in report.vllm_silent


@pytest.mark.vllm
@pytest.mark.parametrize("change", [{"num_attention_heads": 0}, {"hidden_size": -3}], ids=["zero", "negative"])
def test_config_on_which_vllm_stumbles_is_a_finding(good: Path, tmp_path: Path, change: dict[str, int]) -> None:
    """The first ends in a ZeroDivisionError, the second in an exception of huggingface_hub's own."""
    folder = reference.copy(good, tmp_path / "checkpoint")
    edit_config(folder, lambda config: config.update(change))
    report = validate(folder, architecture=architecture_of(good), depth="headers", oracles=True)
    (finding,) = [finding for finding in report.findings if finding.check == "R1"]
    assert finding.consequence == f"vLLM {report.vllm} cannot load this model at all, quantized or not"


def test_an_empty_folder_is_reported_at_any_depth(tmp_path: Path) -> None:
    assert {finding.check for finding in validate(tmp_path, depth="values").errors} >= {"F2", "C1"}
