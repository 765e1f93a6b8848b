"""Rows of the dataset become token ids; unfit data is an error before any weight is read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from datasets import Dataset
from huggingface_hub import CommitOperationAdd
from pyarrow import parquet
from support.calibration import STATIC_KV, TEXTS, planned, run_calibration, samples_of, with_data, write_dataset

from fp8pipe.calibrate import calibrate
from fp8pipe.calibrate.dataset import read_rows
from fp8pipe.errors import CalibrationDataError
from fp8pipe.hub.client import client
from fp8pipe.rehearsal.localhub import LocalHub


def data_error(llama: Path, tmp_path: Path, dataset: Path | str, **changes: Any) -> str:
    """The message of the error, for a model whose weights are not there."""
    recipe = with_data(STATIC_KV, dataset, **changes)
    model = Path(shutil.copytree(llama, tmp_path / "weightless"))
    snapshot, plan, architecture = planned(model, recipe)
    for path in model.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(CalibrationDataError) as caught:
        samples = samples_of(model, recipe)  # in this process, which is faster than in a child
        calibrate(snapshot, plan, recipe, tmp_path / "out", architecture=architecture, samples=samples)
    return str(caught.value)


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        ([], {}, "empty"),
        ([{"text": "one"}, {"text": " "}], {}, "expected 5 samples, found 1"),
        ([{"prompt": "one", "answer": "two"}], {}, "found answer, prompt"),
        ([{"text": "word " * 200}] * 5, {"max_seq_len": 4096}, "has 1000 tokens, the model's context is 256"),
        ([{"text": 3}] * 5, {}, "expected str in every row, found int"),
        ([{"messages": [{"role": "user"}]}] * 5, {"chat_template": "none"}, "in every message, found NoneType"),
        ([{"messages": ["hello"]}] * 5, {"chat_template": "none"}, "in every message, found NoneType"),
    ],
)
def test_unfit_data_is_an_error_before_any_weight_is_read(
    llama: Path, tmp_path: Path, rows: list[dict[str, Any]], changes: dict[str, Any], expected: str
) -> None:
    assert expected in data_error(llama, tmp_path, write_dataset(tmp_path / "data.jsonl", rows), **changes)


def test_chat_messages_need_a_chat_template(llama: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(llama, tmp_path / "base-model"))
    (model / "chat_template.jinja").unlink()
    data = write_dataset(tmp_path / "data.jsonl", [{"messages": [{"role": "user", "content": "hello"}]}] * 5)
    assert "no chat template; set calibration.chat_template: none" in data_error(model, tmp_path, data)
    joined = samples_of(model, with_data(STATIC_KV, data, chat_template="none"))
    text = write_dataset(tmp_path / "text.jsonl", [{"text": "hello"}] * 5)
    assert joined.token_ids == samples_of(model, with_data(STATIC_KV, text)).token_ids


def test_a_chat_that_the_template_rejects_is_an_error_with_its_roles(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "strict")
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    (tmp_path / "strict" / "chat_template.jinja").write_text(template)
    rows = [{"messages": [{"role": "system", "content": "be kind"}]}] * 5
    message = data_error(tmp_path / "strict", tmp_path, write_dataset(tmp_path / "data.jsonl", rows))
    assert "chat template rejects a row (no system role) with the roles ['system']" in message


def test_a_missing_file_is_an_error_that_names_it(llama: Path, tmp_path: Path) -> None:
    assert "nowhere.parquet: no such file" in data_error(llama, tmp_path, tmp_path / "nowhere.parquet")


def test_only_a_line_feed_ends_a_line_of_jsonl(tmp_path: Path) -> None:
    texts = [f"one\u2028two\u0085{index}" for index in range(5)]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    (tmp_path / "data.jsonl").write_text("\n".join(lines))
    rows = read_rows([tmp_path / "data.jsonl"])
    assert [rows[index]["text"] for index in range(len(rows))] == texts


@pytest.mark.parametrize("suffix", [".txt", ".jsonl"])
def test_a_final_line_feed_makes_no_row(tmp_path: Path, suffix: str) -> None:
    written = [json.dumps({"text": text}) if suffix == ".jsonl" else text for text in TEXTS]
    for name, end in (("without", ""), ("with", "\n")):
        (tmp_path / f"{name}{suffix}").write_text("\n".join(written) + end)
    (tmp_path / f"empty{suffix}").write_text("")
    rows = [read_rows([tmp_path / f"{name}{suffix}"]) for name in ("without", "with", "empty")]
    assert [len(found) for found in rows] == [len(TEXTS), len(TEXTS), 0]


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".parquet", ".txt"])
def test_every_local_format_gives_the_same_tokens(llama: Path, tmp_path: Path, suffix: str) -> None:
    rows = [{"text": text} for text in TEXTS]
    path = tmp_path / f"data{suffix}"
    match suffix:
        case ".json":
            path.write_text(json.dumps(rows))
        case ".jsonl":
            write_dataset(path)
        case ".parquet":
            parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
        case _:
            path.write_text("\n".join(TEXTS))
    found = samples_of(llama, with_data(STATIC_KV, path))
    assert found == samples_of(llama, with_data(STATIC_KV, write_dataset(tmp_path / "reference.jsonl")))
    assert found.tokens == sum(min(len(text), 32) for text in TEXTS)


def test_chat_messages_go_through_the_models_template(llama: Path, tmp_path: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ok"}]} for text in TEXTS]
    templated = samples_of(llama, with_data(STATIC_KV, write_dataset(tmp_path / "chat.jsonl", rows)))
    as_text = [{"text": f"<user>{text}<assistant>ok"} for text in TEXTS]
    assert templated == samples_of(llama, with_data(STATIC_KV, write_dataset(tmp_path / "text.jsonl", as_text)))


def test_samples_are_shuffled_by_the_seed_as_datasets_does(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"), num_samples=3, seed=7)
    shuffled = Dataset.from_dict({"row": list(range(len(TEXTS)))}).shuffle(seed=7)
    assert list(samples_of(llama, recipe).indices) == shuffled["row"][:3]


def test_the_record_says_which_data_was_run(llama: Path, tmp_path: Path) -> None:
    recipe = with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl"), num_samples=3)
    samples, found = samples_of(llama, recipe), run_calibration(llama, recipe, tmp_path / "out")
    assert found.sample_indices == samples.indices
    assert (found.tokens, found.token_ids_sha256) == (samples.tokens, samples.sha256())


def publish_dataset(repo_id: str, files: dict[str, str]) -> str:
    """Publish a dataset on the test's Hub; the commit sha."""
    api = client()
    api.create_repo(repo_id, repo_type="dataset")
    operations = [CommitOperationAdd(name, content.encode()) for name, content in files.items()]
    return api.create_commit(repo_id, operations, commit_message="data", repo_type="dataset").oid


def lines(texts: Sequence[str]) -> str:
    return "\n".join(json.dumps({"text": text}) for text in texts)


CARD = """---
configs:
- config_name: default
  data_files:
  - split: train_sft
    path: parts/*.jsonl
---
"""


@pytest.mark.parametrize(
    "files",
    [
        {
            "data/train_sft-0.jsonl": lines(TEXTS[:2]),
            "data/train_sft-1.jsonl": lines(TEXTS[2:]),
            "data/test.jsonl": "x",
        },
        {"README.md": CARD, "parts/a.jsonl": lines(TEXTS[:2]), "parts/b.jsonl": lines(TEXTS[2:]), "train_sft.txt": "x"},
    ],
    ids=["by-name", "by-card"],
)
def test_a_hub_dataset_is_pinned_and_its_split_is_read(
    hub: LocalHub, repo_id: str, llama: Path, tmp_path: Path, files: dict[str, str]
) -> None:
    sha = publish_dataset(repo_id, files)
    spec = STATIC_KV.calibration.model_copy(update={"dataset": repo_id})
    found = run_calibration(llama, STATIC_KV.model_copy(update={"calibration": spec}), tmp_path / "hub")
    local = run_calibration(llama, with_data(STATIC_KV, write_dataset(tmp_path / "data.jsonl")), tmp_path / "local")
    assert found.dataset_revision == sha
    assert found.token_ids_sha256 == local.token_ids_sha256
    assert found.digest() == local.digest()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"split": "validation"}, "belongs to split validation, found train.jsonl"),
        ({"split": "train", "subset": "german"}, "belongs to split train of german"),
        ({"revision": "nowhere"}, "has no revision nowhere"),
        ({"dataset": "acme/no-such-dataset"}, "shows no such dataset"),
    ],
)
def test_a_wrong_name_on_the_hub_is_an_error_before_any_weight_is_read(
    hub: LocalHub, repo_id: str, llama: Path, tmp_path: Path, changes: dict[str, Any], expected: str
) -> None:
    changes = dict(changes)
    publish_dataset(repo_id, {"train.jsonl": lines(TEXTS)})
    assert expected in data_error(llama, tmp_path, changes.pop("dataset", repo_id), **changes)
