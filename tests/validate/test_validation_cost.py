"""What hostile checkpoints may cost: patterns, headers and records of absurd size, in bounded time and memory."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support import reference_checkpoints as reference
from support.malformed import edit_quantization, edit_tensors
from support.processes import peak_memory_mb

from fp8pipe.model.untrusted import MAX_JSON_TOKENS, parse_json
from fp8pipe.records import Checkpoint
from fp8pipe.validate import validate


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("good")
    return reference.quantize(reference.llama(root / "source"), root / "fp8", strategy="channel", kv="tensor")


def test_pattern_too_costly_for_the_names_is_a_finding_that_names_it(good: Path, tmp_path: Path) -> None:
    folder = reference.copy(good, tmp_path / "checkpoint")
    edit_tensors(folder, lambda tensors: tensors.update({f"{'a' * 980}!.weight": torch.ones(1)}))
    slow = "re:" + "(a?)" * 200 + r"\1" * 60 + "!"
    edit_quantization(folder, lambda quant: quant["ignore"].extend([slow, r"re:.*layers\.(9|10)$"]))
    found = [finding.found for finding in validate(folder, depth="headers").errors if finding.check == "C5"]
    assert any("(a?)(a?)" in text and "to match one name" in text for text in found), found
    assert not any("lm_head" in text for text in found)


READ_HEADERS = """
import sys
from pathlib import Path
from fp8pipe.validate.reading.checkpoint import open_checkpoint
from fp8pipe.validate.reading.place import place_of
assert open_checkpoint(place_of(Path(sys.argv[1]))).faults["F1"]
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
    baseline = peak_memory_mb("import sys\nimport fp8pipe.validate.reading.checkpoint")
    assert peak_memory_mb(READ_HEADERS, str(tmp_path)) - baseline < 600


READ_RECORDS = """
import sys
from pathlib import Path
from fp8pipe.validate.reading.place import place_of
from fp8pipe.validate.reading.records import read_records
print(read_records(place_of(Path(sys.argv[1]))).unreadable)
"""


@pytest.mark.parametrize(
    "text",
    [
        '{"outputs": [' + "[]," * 13_000_000 + "[]]}",
        '{"outputs": [' + "{}," * 300_000 + "{}]}",
        '{"settings": {' + ",".join(f'"{number:x}": 1' for number in range(600_000)) + "}}",
        "{" + ",".join(f'"{number:x}": 1' for number in range(600_000)) + "}",
        '{"outputs": [{"shape": [' + '"a",' * 600_000 + '"a"]}]}',
    ],
    ids=["lists", "objects", "settings", "keys", "shape"],
)
def test_record_of_mistakes_costs_little_memory(tmp_path: Path, text: str) -> None:
    numbers = {"engine_version": 1, "source_bytes": 1, "output_bytes": 1, "quantized_tensors": 1, "kept_tensors": 1}
    texts = dict.fromkeys(("fingerprint", "model_id", "source_commit", "recipe", "recipe_digest"), "x")
    record = Checkpoint.model_validate(numbers | texts | {"seconds": 1, "calibration_digest": None})
    (tmp_path / "fp8pipe").mkdir()
    record.save(tmp_path / "fp8pipe" / "checkpoint.json")
    (tmp_path / "fp8pipe" / "plan.json").write_text(text)
    baseline = peak_memory_mb("import sys\nimport fp8pipe.validate.reading.records")
    assert peak_memory_mb(READ_RECORDS, str(tmp_path)) - baseline < 300


def test_json_with_more_marks_than_any_real_file_is_refused_before_it_is_parsed() -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    value, problem = parse_json(b"[" + b"[]," * MAX_JSON_TOKENS + b"1]")
    assert value is None and problem is not None and "more than any real file" in problem
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
