"""A fixed tenth of the architectures is right or refused with a reason; and the zoo sees what is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks.zoo.__main__ import make
from benchmarks.zoo.models import all_names
from benchmarks.zoo.page import page
from benchmarks.zoo.predictors import kept
from benchmarks.zoo.rows import Cell, Row, unproven, wrong

STATIC = {
    "llama": "dense",
    "qwen3_moe": "experts in one 3-D tensor, each with an input of its own",
    "blip-2": "a decoder that holds its own tied head",
    "gemma4_text:shared": "layers that read another layer's keys and values",
}


def _wrong(rows: list[Row]) -> dict[str, str]:
    return {f"{row.name} {name}": why for row in rows for name, cell in row.cells.items() if (why := wrong(cell))}


REFUSED = {"cohere_compass_text": "Validation error for field 'rope_parameters'"}
"""Of the tenth, what is not built or is refused: name -> words of the reason. A new refusal is a fault until it is
understood and named here."""


def test_every_tenth_architecture_is_right_or_refused_with_a_known_reason(tmp_path: Path) -> None:
    names = all_names()
    assert len(names) > 250
    rows = make(names[::10], ["fp8-dynamic"], tmp_path)
    assert _wrong(rows) == {}
    reasons = {row.name: row.not_built or row.cells["fp8-dynamic"].message for row in rows}
    refused = {name: reason for name, reason in reasons.items() if reason}
    assert refused.keys() == REFUSED.keys(), refused
    assert all(words in refused[name] for name, words in REFUSED.items())
    right = [row for row in rows if row.name not in REFUSED]
    assert all(cell.weight_error > 0.02 and cell.share > 0 for row in right for cell in row.cells.values())


def test_static_ranges_are_those_of_plain_hooks(tmp_path: Path) -> None:
    rows = make(STATIC, ["fp8-static-kv"], tmp_path)
    assert _wrong(rows) == {}
    for row in rows:
        cell = row.cells["fp8-static-kv"]
        assert cell.inputs > 10 and cell.kv == 4 and not cell.unseen


RIGHT = Cell(weight_error=0.0265, logits_error=0.05, inputs=14, input_error=0.004, share=1.0, vllm="ok")


@pytest.mark.parametrize(
    "change",
    [
        {"exit_code": 5, "message": "KeyError"},
        {"errors": ["K6 error"]},
        {"faults": ["model.norm.weight: the checkpoint does not fill it"]},
        {"weight_error": 1.4},
        {"weight_error": float("nan")},
        {"kept_error": 0.001},
        {"logits_error": 0.9},
        {"input_error": 0.02},
        {"unseen": ["model.layers.0.mlp.up_proj"]},
        {"vllm": "model.norm.weight: unread"},
        {"predictor": "no entry of ignore covers mtp.layers.0.mlp.up_proj"},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_row_is_wrong_for_one_reason_and_says_it(change: dict[str, object]) -> None:
    assert wrong(RIGHT) == "" == wrong(Cell(exit_code=2, message="a reason"))
    assert wrong(dataclasses.replace(RIGHT, **change)) != ""  # pyright: ignore[reportArgumentType]  any field


def test_what_nothing_compared_is_not_called_right() -> None:
    apart = dataclasses.replace(RIGHT, logits_error=None, incomparable=["experts: vLLM only"])
    assert wrong(apart) == "" and "experts" in unproven(apart)
    assert unproven(RIGHT) == unproven(dataclasses.replace(apart, logits_error=0.05)) == ""


def test_a_predicting_layer_is_added_and_kept(tmp_path: Path) -> None:
    (row,) = make(["qwen3_next"], ["fp8-block"], tmp_path)
    assert row.cells["fp8-block"].predictor == "kept"
    folder = tmp_path / "models" / "qwen3_next" / "fp8-block"
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["ignore"] = ["lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "no entry of ignore covers mtp.layers.0." in kept(folder, "mtp.layers.0")


def test_the_page_is_narrow_and_names_what_is_wrong() -> None:
    rows = [
        Row("llama", cells=dict.fromkeys(("fp8-dynamic", "fp8-block", "fp8-static-kv"), RIGHT)),
        Row("bad", cells={"fp8-dynamic": dataclasses.replace(RIGHT, weight_error=1.4)}),
        Row("gpt2", cells={"fp8-dynamic": Cell(exit_code=2, message="transposed Conv1D " * 9)}),
        Row("timm", not_built="ImportError: timm"),
    ]
    text = page(rows)
    assert max(map(len, text.splitlines())) <= 80
    said = " ".join(text.split())
    assert "Of 3 architectures, 1 are right under every recipe, 0 are right under some" in said
    assert "1 are refused with a reason under all. Unproven: none. Wrong (1): bad." in said
    assert "| llama | ok | 0 | 100 | 0.026 | 0.05 | 0.4 | 0.4 | ok | - |" in text
    assert "| gpt2 | 2 [" in text and "`timm`: ImportError: timm" in text
