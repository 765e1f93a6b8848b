"""What llm-compressor writes is sound, in every scheme; each warning is listed, and true."""

from __future__ import annotations

import json

import pytest
from support import DATA
from support.findings import ids

from fp8pipe.hub.source import resolve
from fp8pipe.validate import validate

pytestmark = pytest.mark.usefixtures("architecture_cache")

PEER = DATA / "peer"
FOLDERS = sorted(path.name for path in PEER.iterdir() if path.is_dir() and "-" in path.name)

BFLOAT16_DIVISION = {"D2"}
"""It divides weights by their scale in bfloat16: 3 to 7 % of the codes are the second nearest."""
NO_FORMAT = {"F8"}
"""model_free_ptq writes no metadata into the header."""
TOKENIZER_WRITTEN_AGAIN = {"P1"}
"""oneshot has transformers save the tokenizer anew: is_local and local_files_only are added."""
SCALES_OF_THEIR_OWN = {"V9"}
"""Per-tensor scales of q, k, v and of gate, up are not joined: vLLM rounds these weights a second time."""


def expected_warnings(name: str) -> set[str]:
    model, way, scheme = name.split("-", 2)
    found = set(NO_FORMAT if way == "free" else TOKENIZER_WRITTEN_AGAIN)
    if scheme.startswith("FP8"):
        found |= BFLOAT16_DIVISION
    if scheme in ("FP8", "FP8-KV"):
        found |= SCALES_OF_THEIR_OWN
    entries = json.loads((PEER / name / "config.json").read_text())["quantization_config"]["ignore"]
    return found | ({"C5"} if model != "moe" and any("gate" in entry for entry in entries) else set())


@pytest.mark.parametrize("name", FOLDERS)
def test_checkpoint_of_llm_compressor_has_no_error_and_the_warnings_that_are_true(name: str) -> None:
    source = resolve(str(PEER / name.split("-")[0]))
    report = validate(PEER / name, source=source)
    assert report.sound, [finding.sentence() for finding in report.errors]
    assert ids(report) == expected_warnings(name), [finding.sentence() for finding in report.findings]
    assert validate(PEER / name).sound


def test_router_that_llm_compressor_quantized_is_an_error() -> None:
    """model_free_ptq without an ignore entry for it: the report says what is wrong, and what vLLM makes of it."""
    report = validate(PEER / "router" / "moe-free-FP8_DYNAMIC", source=resolve(str(PEER / "moe")))
    reported = {(finding.check, finding.tensor) for finding in report.errors}
    assert reported == {("K2", "model.layers.0.mlp.gate"), ("K4", "model.layers.0.mlp.gate.weight")}


def test_every_scheme_of_llm_compressor_is_here() -> None:
    schemes = {name.split("-", 2)[2] for name in FOLDERS}
    assert schemes == {
        "FP8", "FP8-KV", "FP8_DYNAMIC", "FP8_BLOCK", "NVFP4", "NVFP4A16", "MXFP4", "MXFP4A16", "MXFP8",
    }  # fmt: skip
