"""The validator: silent on correct checkpoints, one voice for each corruption, calm before garbage."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import reference_checkpoints as reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from malformed import (
    ALL,
    BASES,
    CASES,
    INDEX,
    O_PROJ,
    Q_PROJ,
    Base,
    Case,
    Model,
    alter,
    edit_quantization,
    edit_tensors,
    quantize,
    shards_of,
)
from safetensors.torch import load_file, save_file

from fp8pipe.errors import InputError
from fp8pipe.records import Snapshot, ValidationReport
from fp8pipe.source import resolve
from fp8pipe.validate import all_checks, validate
from fp8pipe.validate.measure import TILE_BYTES

OWN_WARNINGS: dict[Base, set[str]] = {"fp8": {"C9"}, "modelopt": {"C9"}, "modelopt-nvfp4": {"C9"}}
"""Warnings that are true of the correct checkpoint."""


@pytest.fixture(scope="session")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The three BF16 models."""
    root = tmp_path_factory.mktemp("models")
    reference.llama(root / "dense")
    reference.llama(root / "tied", tied=True)
    reference.moe(root / "moe")
    return root


@pytest.fixture(scope="session")
def checkpoint(shelf: Path) -> Callable[[Model, Base], Path]:
    """A correct FP8 checkpoint, made once and not to be altered."""

    def make(model: Model, base: Base) -> Path:
        folder = shelf / f"{model}-{base}"
        return folder if folder.exists() else quantize(shelf / model, folder, base)

    return make


@pytest.fixture(autouse=True)
def architecture_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architecture records are kept for the session: the child that makes them costs seconds."""
    monkeypatch.setenv("FP8PIPE_CACHE", str(tmp_path_factory.getbasetemp() / "architectures"))


def ids(report: ValidationReport) -> set[str]:
    return {finding.check for finding in report.findings}


@pytest.mark.parametrize("model", ALL)
@pytest.mark.parametrize("base", BASES)
def test_correct_checkpoint_has_no_finding_at_any_depth(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], model: Model, base: Base
) -> None:
    folder = checkpoint(model, base)
    for report in (
        validate(folder, depth="headers"),
        validate(folder),
        validate(folder, source=resolve(str(shelf / model))),
    ):
        assert ids(report) == OWN_WARNINGS.get(base, set()), [f.sentence() for f in report.findings]
        assert report.sound


@pytest.mark.parametrize(
    ("case", "model"),
    [(case, model) for case in CASES for model in case.models],
    ids=lambda value: f"{value.number}-{value.name}" if isinstance(value, Case) else value,
)
def test_corruption_brings_its_own_findings_and_no_others(
    shelf: Path, checkpoint: Callable[[Model, Base], Path], tmp_path: Path, case: Case, model: Model
) -> None:
    folder = reference.copy(checkpoint(model, case.base), tmp_path / "checkpoint")
    (tmp_path / "source").write_text(str(shelf / model))
    case.spoil(folder)
    report = validate(folder, source=resolve((tmp_path / "source").read_text()))
    found = ids(report) - OWN_WARNINGS.get(case.base, set())
    assert found == case.findings, "\n".join(f.sentence() for f in report.findings)
    assert all(finding.remedy and finding.consequence for finding in report.findings)


# ---------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize("base", ["static", "channel", "block"])
def test_weights_larger_than_a_tile_are_judged_to_their_last_code(tmp_path: Path, base: Base) -> None:
    source = reference.llama(tmp_path / "source", intermediate=20_000)
    folder = reference.quantize(source, tmp_path / "fp8", **BASES[base])
    assert (folder / "model-00002-of-00002.safetensors").stat().st_size > 2 * TILE_BYTES
    assert not ids(validate(folder, source=resolve(str(source))))
    down_proj = "model.layers.1.mlp.down_proj.weight"

    def flip(codes: torch.Tensor) -> torch.Tensor:
        codes.view(torch.uint8)[63, -1] ^= 0x80
        return codes

    alter(folder, down_proj, flip)
    (finding,) = validate(folder, source=resolve(str(source))).findings
    assert (finding.check, finding.tensor) == ("D1", down_proj)
    assert "the first at [63, 19999]" in finding.found


# ---------------------------------------------------------------------------------------------- garbage


@given(st.binary(max_size=300))
@settings(max_examples=40, deadline=None)
def test_arbitrary_bytes_as_header_index_or_config_are_findings_not_exceptions(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        good = reference.quantize(reference.llama(Path(name) / "source"), Path(name) / "good", strategy="channel")
        shard = shards_of(good)[0]
        whole = shard.read_bytes()
        for number, (path, content) in enumerate(
            [
                (shard, data),
                (shard, len(data).to_bytes(8, "little") + data),
                (shard, whole[: len(data)] + data + whole[2 * len(data) :]),
                (good / INDEX, data),
                (good / "config.json", data),
            ]
        ):
            folder = reference.copy(good, Path(name) / str(number))
            (folder / path.name).write_bytes(content)
            report = validate(folder, depth="headers")
            assert content == path.read_bytes() or not report.sound


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_any_value_anywhere_in_config_or_index_is_judged_without_an_exception(data: st.DataObject) -> None:
    config = json.loads(GOOD_CONFIG)
    value = data.draw(JSON)
    place: Any = config
    while isinstance(place, dict | list) and place:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            place[key] = value
            break
        place = place[key]
    with tempfile.TemporaryDirectory() as name:
        reference.write_json(Path(name) / "config.json", config)
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}, Path(name) / "model.safetensors")
        assert not validate(Path(name)).sound  # the tensors are not those of the config


def _good_config() -> str:
    with tempfile.TemporaryDirectory() as name:
        source = reference.llama(Path(name) / "source")
        return (reference.quantize(source, Path(name) / "fp8", kv="tensor") / "config.json").read_text()


GOOD_CONFIG = _good_config()


@given(st.integers(min_value=0), st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_one_flipped_bit_in_weights_scales_or_copies_is_an_error_or_a_code_that_rounding_allows(
    spot: int, bit: int
) -> None:
    folder, source = _flip_subject()
    path = shards_of(folder)[spot % 2]
    whole = path.read_bytes()
    at = spot // 2 % len(whole)
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1 << bit]) + whole[at + 1 :])
    try:
        report = validate(folder, source=source)
        assert not report.sound or _same_values(folder, whole, path) or _is_allowed_code(path, whole)
    finally:
        path.write_bytes(whole)


@cache
def _flip_subject() -> tuple[Path, Snapshot]:
    """One small checkpoint for all flips; each flip is undone."""
    root = Path(tempfile.mkdtemp(prefix="fp8pipe-test-"))
    atexit.register(shutil.rmtree, root)
    source = reference.llama(root / "source")
    folder = reference.quantize(source, root / "fp8", strategy="channel", static=False)
    return folder, resolve(str(source))


def _same_values(folder: Path, whole: bytes, path: Path) -> bool:
    """JSON may spell one header in several ways."""
    (folder.parent / "before.safetensors").write_bytes(whole)
    before, now = load_file(folder.parent / "before.safetensors"), load_file(path)
    return before.keys() == now.keys() and all(torch.equal(_bytes(before[n]), _bytes(now[n])) for n in before)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _is_allowed_code(path: Path, whole: bytes) -> bool:
    """The flip hit a code and moved it by one step, to the other side of a near tie."""
    (path.parent.parent / "before.safetensors").write_bytes(whole)
    before, now = load_file(path.parent.parent / "before.safetensors"), load_file(path)
    changed = [name for name in before if not torch.equal(_bytes(before[name]), _bytes(now[name]))]
    return len(changed) == 1 and before[changed[0]].dtype == torch.float8_e4m3fn


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
def test_hostile_json_becomes_findings_that_can_be_saved(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path, file: str, content: bytes
) -> None:
    folder = reference.copy(checkpoint("dense", "channel"), tmp_path / "checkpoint")
    (folder / file).write_bytes(content)
    report = validate(folder)
    assert not report.sound
    assert ValidationReport.load(report.save(tmp_path / "validation.json")) == report


# ---------------------------------------------------------------------------------------------- contract


def test_depth_follows_what_is_at_hand(shelf: Path, checkpoint: Callable[[Model, Base], Path]) -> None:
    folder = checkpoint("dense", "channel")
    headers, values = validate(folder, depth="headers"), validate(folder)
    fidelity = validate(folder, source=resolve(str(shelf / "dense")))
    assert (headers.depth, values.depth, fidelity.depth) == ("headers", "values", "fidelity")
    assert headers.bytes_read == 0 < values.bytes_read < fidelity.bytes_read
    unrecorded = {check.id for check in all_checks()} - OF_OUR_ENGINE
    assert set(headers.checks) < set(values.checks) < set(fidelity.checks) == unrecorded
    assert (values.known_from, fidelity.known_from) == ("names", "architecture")


def test_every_check_has_a_corruption_that_makes_it_speak() -> None:
    silent = {check.id for check in all_checks()} - set().union(*(case.findings for case in CASES))
    assert silent == SPOKEN_FOR_ELSEWHERE


OF_OUR_ENGINE = {"P8", "P9", "V11", "D7"}
"""Checks that need the engine's records."""

SPOKEN_FOR_ELSEWHERE = {"C9", "K10", "V7", "D5", "P4", "P7"} | OF_OUR_ENGINE
"""Checks whose corruption is not one of the table's, with a test of their own here."""


def test_per_tensor_fp8_method_is_said_not_to_load_in_transformers(checkpoint: Callable[[Model, Base], Path]) -> None:
    assert ids(validate(checkpoint("dense", "fp8"))) == {"C9"}


def test_mostly_ignored_model_is_a_warning(shelf: Path, tmp_path: Path) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = load_all(shelf / "dense")

    def keep_mlp(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".mlp." in name]:
            tensors.update({name: source[name]}) if name in source else tensors.pop(name)

    edit_tensors(folder, keep_mlp)
    edit_quantization(folder, lambda quant: quant["ignore"].append("re:.*\\.mlp\\..*"))
    report = validate(folder, source=resolve(str(shelf / "dense")))
    assert (ids(report), report.sound) == ({"K10"}, True)


def test_scale_far_beyond_the_need_loses_small_weights_and_range(shelf: Path, tmp_path: Path) -> None:
    """The codes are right for the scale, the scale is 16384 times too large."""
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = load_all(shelf / "dense")

    def widen(tensors: dict[str, torch.Tensor]) -> None:
        scale = tensors[f"{O_PROJ}.weight_scale"] * 16384
        tensors[f"{O_PROJ}.weight_scale"] = scale
        tensors[f"{O_PROJ}.weight"] = (source[f"{O_PROJ}.weight"].float() / scale).to(torch.float8_e4m3fn)

    edit_tensors(folder, widen)
    report = validate(folder, source=resolve(str(shelf / "dense")))
    assert ids(report) == {"V6", "V7", "D3", "D5", "D6"}, [f.sentence() for f in report.findings]


@pytest.mark.parametrize(("factor", "severity"), [(2, "warning"), (100, "error")])
def test_unequal_scales_in_a_fused_group_are_requantized_by_vllm(
    shelf: Path, tmp_path: Path, factor: float, severity: str
) -> None:
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8")
    alter(folder, f"{Q_PROJ}.weight_scale", lambda scale: scale * factor)
    (finding,) = (f for f in validate(folder).findings if f.check == "V9")
    assert finding.severity == severity


def test_remote_code_that_differs_is_an_error(shelf: Path, tmp_path: Path) -> None:
    source = reference.copy(shelf / "dense", tmp_path / "source")
    (source / "modeling_custom.py").write_text("x = 1\n")
    folder = reference.quantize(source, tmp_path / "fp8")
    (folder / "modeling_custom.py").write_text("x = 2\n")
    assert ids(validate(folder, source=resolve(str(source)))) == {"P4"}


def test_source_in_the_layout_of_the_hub_cache_is_no_link_out_of_the_folder(
    checkpoint: Callable[[Model, Base], Path], tmp_path: Path
) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for path in checkpoint("dense", "channel").iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert not ids(validate(snapshot))
    outside = tmp_path / "elsewhere.safetensors"
    shard = shards_of(snapshot)[0]
    outside.write_bytes(shard.read_bytes())
    shard.unlink()
    shard.symlink_to(outside)
    assert "F9" in ids(validate(snapshot))


def test_llm_compressor_s_bf16_scales_and_division_pass_with_a_warning_that_says_so(
    shelf: Path, tmp_path: Path
) -> None:
    """Scale and division in the weight's own dtype: what llm-compressor writes."""
    folder = reference.quantize(shelf / "dense", tmp_path / "fp8", strategy="channel", static=False)
    source = load_all(shelf / "dense")

    def in_bf16(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("weight_scale")]:
            weight = source[name.removesuffix("_scale")]
            scale = weight.abs().amax(1, keepdim=True) / 448
            tensors[name] = scale
            tensors[name.removesuffix("_scale")] = (weight / scale).clamp(-448, 448).to(torch.float8_e4m3fn)

    edit_tensors(folder, in_bf16)
    report = validate(folder, source=resolve(str(shelf / "dense")))
    assert (ids(report), report.sound) == ({"D2"}, True), [f.sentence() for f in report.findings]


def test_report_survives_its_file(checkpoint: Callable[[Model, Base], Path], tmp_path: Path) -> None:
    report = validate(checkpoint("dense", "fp8"))
    assert ValidationReport.load(report.save(tmp_path / "validation.json")) == report


def test_fidelity_without_a_source_is_a_wrong_request(checkpoint: Callable[[Model, Base], Path]) -> None:
    with pytest.raises(InputError, match="--source"):
        validate(checkpoint("dense", "channel"), depth="fidelity")


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return reference.read(folder)[0]
