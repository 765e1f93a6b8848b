"""Every shipped suite is executed: the real tasks of lm-eval on synthetic rows, from a Hub, through real vLLM."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import TESTS
from support.suite_datasets import datasets, page, put_on_hub, write_datasets, write_punkt
from support.suite_runner import DOCUMENTS, OTHERWISE

from fp8pipe import config
from fp8pipe.errors import InputError
from fp8pipe.records import EvalReport
from fp8pipe.rehearsal.localhub import LocalHub, start

SUITES = config.shipped("suites")
EXPECTED = {"openllm-v1", "leaderboard-v2", "long-context", "perplexity", "gsm8k", "quick", "demo"}

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant :{% endif %}"
)


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """A Hub with every data set that a shipped suite names."""
    with start(tmp_path_factory.mktemp("hub")) as running:
        put_on_hub(write_datasets(tmp_path_factory.mktemp("rows") / "data"), running.endpoint, running.token)
        yield running


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of one layer whose tokens are words, so that 8,000 words are not many more tokens."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model")
    vocabulary = ["<unk>", "<s>", "</s>", *sorted(set(words()))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=TEMPLATE
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=40960,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(shape).to(torch.bfloat16).save_pretrained(folder)
    return folder


def words() -> list[str]:
    """Words of the rows: what is not among them is unknown to the model."""
    from tokenizers.pre_tokenizers import Whitespace

    text = " ".join(str(rows) for splits in datasets().values() for split in splits.values() for rows in split.values())
    return [word for word, _ in Whitespace().pre_tokenize_str(text)] + [str(i) for i in range(10)]


@pytest.fixture(scope="module")
def reports(hub: LocalHub, model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvalReport]:
    """All suites through one engine in one child process, whose only Hub is the local one."""
    folder = tmp_path_factory.mktemp("reports")
    punkt = write_punkt(tmp_path_factory.mktemp("nltk"))
    environment = os.environ | hub.environment() | {"HF_HOME": str(folder / "cache"), "NLTK_DATA": str(punkt)}
    command = [sys.executable, str(TESTS / "support" / "suite_runner.py"), str(model), str(folder)]
    with (folder / "log").open("w") as log:
        code = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT).returncode
    assert code == 0, (folder / "log").read_text()[-5000:]
    return {name: EvalReport.load(folder / f"{name}.json") for name in SUITES}


def test_the_suites_that_the_field_measures_with_are_shipped() -> None:
    assert set(SUITES) >= EXPECTED


@pytest.mark.vllm
@pytest.mark.parametrize("name", SUITES)
def test_every_task_of_a_shipped_suite_is_in_its_report(reports: dict[str, EvalReport], name: str) -> None:
    suite, report = config.load_suite(name), reports[name]
    assert [task.task for task in report.tasks] == list(suite.tasks)
    for task in report.tasks:
        assert len(task.doc_ids) == len(set(task.doc_ids)) == DOCUMENTS.get(task.task, OTHERWISE)
        assert task.num_fewshot == suite.tasks[task.task].num_fewshot
        assert task.metrics
        for metric in task.metrics:
            assert all(math.isfinite(value) for value in metric.values)
            assert math.isfinite(metric.mean)
        assert f"|{task.task}" in report.table.replace(" - ", "").replace("| ", "|") or task.clusters
    assert "Stderr" in report.table
    assert (report.chat_template_hash is not None) == suite.apply_chat_template
    assert {flip.task for flip in report.flips} == {task for task, spec in suite.tasks.items() if spec.repeat}
    assert (report.serving is not None) == (suite.serving is not None)
    assert len(report.samples) == len(suite.sample_prompts)


METRICS = {
    "arc_easy": {"acc", "acc_norm"},
    "arc_challenge": {"acc", "acc_norm"},
    "hellaswag": {"acc", "acc_norm"},
    "mmlu": {"acc"},
    "truthfulqa_mc2": {"acc"},
    "winogrande": {"acc"},
    "gsm8k": {"exact_match"},
    "leaderboard_mmlu_pro": {"acc"},
    "leaderboard_bbh": {"acc_norm"},
    "leaderboard_gpqa": {"acc_norm"},
    "leaderboard_math_hard": {"exact_match", "exact_match_original"},
    "leaderboard_musr": {"acc_norm"},
    "leaderboard_ifeval": {
        "prompt_level_strict_acc",
        "inst_level_strict_acc",
        "prompt_level_loose_acc",
        "inst_level_loose_acc",
    },
    "needle": {"exact_match"},
    "hops": {"exact_match"},
    "wikitext_sliding": {"nll", "word_perplexity", "byte_perplexity", "bits_per_byte"},
    "arrows": {"exact_match"},
}
"""What the leaderboards report, and what our own tasks do."""


@pytest.mark.vllm
def test_the_metrics_of_every_task_are_the_known_ones(reports: dict[str, EvalReport]) -> None:
    found = {task.task: {metric.metric for metric in task.metrics} for r in reports.values() for task in r.tasks}
    assert found == METRICS


@pytest.mark.vllm
def test_policies_name_metrics_that_their_suites_report(reports: dict[str, EvalReport]) -> None:
    for name in config.shipped("gates"):
        policy = config.load_policy(name)
        fitting = [
            r for suite, r in reports.items() if set(policy.gated_tasks) <= config.load_suite(suite).tasks.keys()
        ]
        assert fitting, f"no shipped suite measures what policy {name} gates on"
        for report in fitting:
            for task, wanted in policy.gated:
                result = report.task(task)
                assert result is not None and result.samples_of(wanted.metric, wanted.filter) is not None


@pytest.mark.vllm
def test_sub_tasks_are_clusters_and_each_of_them_is_scored(reports: dict[str, EvalReport]) -> None:
    mmlu, bbh = reports["openllm-v1"].task("mmlu"), reports["leaderboard-v2"].task("leaderboard_bbh")
    assert mmlu is not None and len(set(mmlu.clusters)) == 57
    assert bbh is not None and len(set(bbh.clusters)) == 24


@pytest.mark.vllm
def test_sliding_window_perplexity_equals_transformers(reports: dict[str, EvalReport], model: Path) -> None:
    """Nats per word of each page, by a loop over windows of 2,048 tokens of which 1,024 are context."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    task = reports["perplexity"].task("wikitext_sliding")
    assert task is not None
    nll = task.samples_of("nll", "none")
    assert nll is not None
    tokenizer, llama = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)
    llama = llama.float()
    for document, measured in zip(task.doc_ids, nll.values, strict=True):
        row = page(document)
        ids = [1, *tokenizer(detokenized(row), add_special_tokens=False).input_ids]
        assert document == 0 or len(ids) > 2500, "a page that needs several windows"
        total, scored = 0.0, 1
        while scored < len(ids):
            end = min(len(ids), 2049 if scored == 1 else scored + 1025)
            begin = 0 if scored == 1 else scored - 1024
            with torch.no_grad():
                logits = llama(torch.tensor([ids[begin:end]])).logits[0].log_softmax(-1)
            total -= sum(float(logits[i - begin - 1, ids[i]]) for i in range(scored, end))
            scored = end
        # vLLM computes in bf16 here, and both sum hundreds of tokens: measured differences are below 0.1 %.
        assert measured == pytest.approx(total / len(row["page"].split()), rel=0.02)


def detokenized(row: dict[str, Any]) -> str:
    from lm_eval.tasks.wikitext import preprocess_wikitext

    return preprocess_wikitext.wikitext_detokenizer(row)


def test_long_context_prompts_hold_8192_words_and_their_answer_once() -> None:
    from fp8pipe.evaluate.tasks import load_tasks

    for loaded in load_tasks(config.load_suite("long-context"), limit=None):
        [task] = loaded.leaves.values()
        rows = list(task.eval_docs)
        assert len(rows) == len({row["prompt"] for row in rows}) == 400
        assert min(row["words"] for row in rows) >= 8192
        assert {round(row["words"], -3) for row in rows} >= {9000, 13000, 17000}
        assert all(row["prompt"].count(row["answer"]) == 1 for row in rows)


def test_long_context_documents_are_fixed_by_their_seed() -> None:
    from hashlib import sha256

    from fp8pipe.evaluate.tasks import load_tasks

    digests = {}
    for loaded in load_tasks(config.load_suite("long-context"), limit=None):
        [task] = loaded.leaves.values()
        digests[loaded.name] = sha256(task.eval_docs[7]["prompt"].encode()).hexdigest()[:12]
    # Written out: a verdict compares documents hash by hash, on whatever machine each side was measured.
    assert digests == {"needle": "cca5bec8cb2f", "hops": "0e561fdeb0ae"}


def test_ifeval_without_its_sentence_splitter_is_refused_before_anything_is_generated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nltk

    from fp8pipe.evaluate.tasks import sentence_splitter_or_refusal

    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)  # as NLTK answers without a network
    with (
        pytest.raises(InputError, match=r"punkt_tab is not on this machine.*NLTK_DATA"),
        sentence_splitter_or_refusal(),
    ):
        nltk.download("punkt_tab")
