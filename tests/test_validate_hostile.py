"""The validator before garbage: flipped bits are told, arbitrary bytes neither crash it nor hang it nor fill memory."""

from __future__ import annotations

import atexit
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference_checkpoints as reference
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from malformed import INDEX, edit_quantization, shards_of
from safetensors.torch import load_file, save_file
from test_validate import ids
from tiny_models import architecture_of, calibration_for, make_model, plan_of, recipe

from fp8pipe.architecture import Architecture
from fp8pipe.quantize import quantize
from fp8pipe.records import Snapshot, ValidationReport
from fp8pipe.source import resolve
from fp8pipe.validate import validate
from fp8pipe.validate.patterns import Patterns
from fp8pipe.validate.untrusted import MAX_JSON_TOKENS, parse_json

LONG = bool(os.environ.get("FP8PIPE_LONG"))
FLIPS = 2000 if LONG else 200
GARBAGE = 10_000 if LONG else 200
CALM = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large]}


@pytest.fixture(autouse=True)
def architecture_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.getbasetemp() / "architectures"))


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
    folder, source, architecture = flip_subject()
    path = data.draw(st.sampled_from([*shards_of(folder), *shards_of(folder), folder / INDEX, folder / "config.json"]))
    whole = path.read_bytes()
    changed = data.draw(st.one_of(flipped_bits(whole), flipped_bytes(whole), cut(whole)))
    path.write_bytes(changed)
    try:
        report = validate(folder, source=source, architecture=architecture)
        is_harmless = same_content(path, whole, changed) or is_allowed_code(whole, changed)
        assert not report.sound or is_harmless, [finding.sentence() for finding in report.findings]
    finally:
        path.write_bytes(whole)


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
    """JSON may spell one content in several ways, and not every key of it has a meaning."""
    if path.suffix == ".json":
        return meaning(path.name, whole) == meaning(path.name, changed)
    before, now = tensors_of(whole), tensors_of(changed)
    if before is None or now is None or before.keys() != now.keys():
        return False
    return all(raw(before[n]) == raw(now[n]) and before[n].dtype == now[n].dtype for n in before)


def meaning(name: str, content: bytes) -> Any:
    """What readers take from the JSON; keys that none of them looks at are no part of it."""
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
    """As compressed-tensors reads it, without what is only a note on how the numbers came about."""
    from compressed_tensors.quantization import QuantizationConfig

    try:
        fields = QuantizationConfig.model_validate(quantization).model_dump(exclude={"quantization_status"})
    except Exception:  # its validators raise whatever they stumble on
        return object()
    for group in fields["config_groups"].values():
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
    """Each bit of each code of one matrix flipped in turn, judged by D1's rule as it stands in the notes."""
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
    """The validator lets no other flip of a code through than the rule counted above does."""
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
    """Headers say the same; of values and of what no reader looks at headers tell nothing."""
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


# ---------------------------------------------------------------------------------------------- time and memory


REFUSED_PATTERNS = ["re:(?=(a+)+b)", r"re:(a+)\1+b+", "re:a{65000}{65000}", "re:" + "x" * 100_000]
HOSTILE_PATTERNS = [
    *REFUSED_PATTERNS,
    "re:(a+)+$",
    "re:(.*)*(.*)*x",
    "re:" + ".*" * 40 + "x",
    "re:(a|a)*b",
    "re:(model|m.*|mo.*l|.*)*Q",
    "re:" + "(" * 400 + "Q" + ")" * 400,
    "re:(?P<n>a)(?(n)b|c)",
]


def test_patterns_that_would_backtrack_for_ever_are_matched_or_refused_at_once(good: Path, tmp_path: Path) -> None:
    folder = reference.copy(good, tmp_path / "checkpoint")
    edit_quantization(folder, lambda quant: quant["ignore"].extend(HOSTILE_PATTERNS))
    edit_quantization(folder, lambda quant: quant["config_groups"]["group_0"]["targets"].extend(HOSTILE_PATTERNS))
    assert "C5" in ids(validate(folder, depth="headers"))
    patterns = Patterns(HOSTILE_PATTERNS)
    assert not patterns.matches("model." * 500 + "!")
    assert set(patterns.refused) == set(REFUSED_PATTERNS)


TAILS = ["", "$", "b", "(a|b)", "[^a]", "a{1,3}", ".*c", r"\d?", "(ab)*"]


@given(st.text("ab.c1_", max_size=12), st.sampled_from(TAILS))
@settings(max_examples=300, **CALM)
def test_patterns_match_what_re_matches(name: str, tail: str) -> None:
    import re

    for head in ("", "a", ".*", "(a|ab)", "[ab.]+?", r"\w*\.", "^a?", "(?:b|c.){0,2}", "(?!a)"):
        pattern = head + tail
        found = Patterns([f"re:{pattern}"])
        assert not found.refused
        assert found.matches(name) is (re.match(pattern, name) is not None), pattern


def in_child(code: str, *arguments: str) -> int:
    """Peak memory in MB of a process that runs `code`."""
    code += "\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1000)"
    child = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    )
    return int(child.stdout.splitlines()[-1])


READ_SHELF = """
import resource, sys
from pathlib import Path
from fp8pipe.validate.place import place_of
from fp8pipe.validate.shelf import open_shelf
assert open_shelf(place_of(Path(sys.argv[1]))).faults["F1"]
"""


@pytest.mark.parametrize(
    "make",
    [
        lambda: b"[" + b"[],[]," * 16_600_000 + b"[]]",
        pytest.param(lambda: b'{"a":[' + b"{}," * 33_000_000 + b"{}]}", marks=pytest.mark.long),
        pytest.param(lambda: b'{"a":"' + b"x" * 99_000_000 + b'"}', marks=pytest.mark.long),
        pytest.param(lambda: b'{"a":"' + b"x" * 99_000_000 + "😀".encode() + b'"}', marks=pytest.mark.long),
        pytest.param(lambda: b"[" + b"1.5," * 24_900_000 + b"1]", marks=pytest.mark.long),
    ],
    ids=["lists", "objects", "string", "wide-string", "numbers"],
)
def test_header_of_100_mb_costs_little_more_memory_than_itself(tmp_path: Path, make: Callable[[], bytes]) -> None:
    text = make()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
    (tmp_path / "config.json").write_text("{}")
    baseline = in_child("import resource, sys\nimport fp8pipe.validate.shelf")
    assert in_child(READ_SHELF, str(tmp_path)) - baseline < 600


def test_json_with_more_marks_than_any_real_file_is_refused_before_it_is_parsed() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, problem = parse_json(b"[" + b"[]," * MAX_JSON_TOKENS + b"1]")
    assert value is None and problem is not None and "more than any real file" in problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
