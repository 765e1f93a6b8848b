"""What a card tells its readers to do: serve it, ask it, load it, make it again; and the scores beside ours."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cards import commands, facts_of, plain, validation
from support.reports import change_engine, pair, policy, recipe, report, task, values
from support.tiny_models import make_model, plan_of

from fp8pipe import stages
from fp8pipe.config import Recipe, load_recipe, shipped
from fp8pipe.hub.source import resolve
from fp8pipe.records import Serves, Serving, record_path
from fp8pipe.records.published import PublishedScore, PublishedScores
from fp8pipe.release.card import render_card
from fp8pipe.release.card.commands import WIDTH
from fp8pipe.release.card.parsers import REASONING, TOOL_CALLS, reasoning_parser, tool_parser
from fp8pipe.release.card.published import DATASETS, published_for
from fp8pipe.release.card.scheme import llmcompressor_recipe

CHATML = "<|im_start|>{% if enable_thinking %}<think>{% endif %}{% if tools %}<tool_call>{}</tool_call>{% endif %}"


def code_blocks(card: str) -> list[str]:
    return re.findall(r"```\w+\n(.*?)\n```", card, re.DOTALL)


def test_serving_has_the_parallelism_that_was_measured_and_the_parsers_of_the_chat_template() -> None:
    spread = {"tensor_parallel_size": 4, "pipeline_parallel_size": 1, "enable_expert_parallel": True}
    sides = [change_engine(side, arguments=spread) for side in pair()]
    (serve,) = [
        line
        for line in commands(render_card(facts_of((sides[0], sides[1]), chat_template=CHATML)))
        if line[0] == "vllm"
    ]
    assert serve[serve.index("--tensor-parallel-size") + 1] == "4"
    assert "--enable-expert-parallel" in serve and "--pipeline-parallel-size" not in serve
    assert serve[serve.index("--reasoning-parser") + 1] == "qwen3"
    assert serve[serve.index("--tool-call-parser") + 1] == "hermes"
    (plain_serve,) = [line for line in commands(render_card(facts_of())) if line[0] == "vllm"]
    assert not any("parser" in word or "parallel" in word for word in plain_serve)


@pytest.mark.parametrize(
    ("template", "reasoning", "tools"),
    [
        (CHATML, "qwen3", "hermes"),
        ("<|im_start|><tool_call><function=x>", None, "qwen3_coder"),
        ("<|python_tag|> ipython", None, "llama3_json"),
        ("[INST] [TOOL_CALLS]", None, "mistral"),
        ("<think> <｜tool▁calls▁begin｜>", "deepseek_r1", "deepseek_v3"),
        ("<|channel|>analysis to=functions.x", "openai_gptoss", "openai"),
        ("<tool_call><arg_key> <think>", "glm45", "glm45"),
        ("{{ messages }}", None, None),
    ],
)
def test_a_chat_template_shows_which_parsers_its_model_needs(
    template: str, reasoning: str | None, tools: str | None
) -> None:
    assert (reasoning_parser(template), tool_parser(template)) == (reasoning, tools)


@pytest.mark.vllm
@pytest.mark.parametrize(("table", "package"), [(TOOL_CALLS, "tool_parsers"), (REASONING, "reasoning")])
def test_vllm_has_every_parser_by_that_name(table: dict[tuple[str, ...], str], package: str) -> None:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.origin is not None
    registry = (Path(spec.origin).parent / package / "__init__.py").read_text()
    known = set(re.findall(r'^    "([\w.-]+)": \(', registry, re.MULTILINE))
    assert set(table.values()) <= known


@pytest.mark.parametrize(("template", "call"), [(CHATML, "chat.completions"), ("", "completions")])
def test_the_code_of_a_card_is_python_and_asks_for_the_release(template: str, call: str) -> None:
    answers = (Serves(engine="transformers", device="hopper", ranks=1, verdict="otherwise", word="W8A16"),)
    serving = validation().model_copy(update={"serving": Serving(answers=answers, rules={"transformers": "5.19"})})
    config = {"architectures": ["LlamaForCausalLM"]}
    card = render_card(facts_of(chat_template=template, validation=serving, config=config))
    client, loader = (block for block in code_blocks(card) if "import" in block)
    for block in (client, loader):
        ast.parse(block)
    assert f"client.{call}.create(" in client and '"acme/tiny-FP8-KV"' in client
    assert "AutoModelForCausalLM.from_pretrained(name, revision=tag" in loader
    vision = render_card(facts_of(validation=serving, config={"architectures": ["XForConditionalGeneration"]}))
    assert "AutoModelForImageTextToText" in vision
    assert "transformers reads it" not in render_card(facts_of())


def test_no_line_of_code_is_wider_than_a_laptops_page() -> None:
    spread = {"tensor_parallel_size": 4, **{f"some_engine_argument_{n}": n for n in range(3)}}
    sides = [change_engine(side, arguments=spread) for side in pair()]
    card = render_card(facts_of((sides[0], sides[1]), chat_template=CHATML))
    assert max(len(line) for block in code_blocks(card) for line in block.splitlines()) <= WIDTH + 4


@pytest.mark.parametrize("name", [name for name in shipped("recipes") if not name.startswith("demo")])
def test_the_recipe_for_llm_compressor_is_read_back_as_the_same_scheme(name: str, tmp_path: Path) -> None:
    ours = load_recipe(name)
    kept = {"quantization_config": {"ignore": ["lm_head", "model.layers.0.mlp.gate"]}}
    (tmp_path / "recipe.yaml").write_text(llmcompressor_recipe(ours, kept))
    theirs = load_recipe(str(tmp_path / "recipe.yaml"))
    assert theirs.weights.model_copy(update={"share_scales": ours.weights.share_scales}) == ours.weights
    assert (theirs.activations, theirs.kv_cache) == (ours.activations, ours.kv_cache)
    assert theirs.ignore == ("lm_head", "model.layers.0.mlp.gate")


def test_a_scheme_that_llm_compressor_has_no_word_for_is_not_spelled_in_its_words() -> None:
    cut = recipe(activations={"mode": "static", "strategy": "tensor", "observer": "percentile"})
    keeping = Recipe.model_validate(recipe().model_dump() | {"keep_bf16": {"worst": 0.02}})
    assert llmcompressor_recipe(cut, {}) == llmcompressor_recipe(keeping, {}) == ""
    assert "llm-compressor" not in render_card(facts_of(recipe=cut))


def test_several_tasks_have_an_average_and_the_card_begins_with_what_is_left() -> None:
    ours = {name: values(right, 2000) for name, right in (("a", 1600), ("b", 1000))}
    baseline = report(*(task(outcomes, name=name) for name, outcomes in ours.items()))
    candidate = report(task(values(1590, 2000), name="a"), task(values(1000, 2000), name="b"), candidate=True)
    card = plain(render_card(facts_of((baseline, candidate), policy("a", "b"))))
    assert "It keeps 99.62 % of the BF16 model's score (2 scores on average: 65.00 → 64.75)." in card.split("## ")[0]
    assert re.search(r"\| average \| 65\.00 \| 64\.75 \| 99\.62 % \|", card)
    single = plain(render_card(facts_of()))
    assert "(qa: 91.00 → 90.60)" in single and "| average |" not in single


def test_scores_that_others_publish_stand_beside_our_baseline(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "out"
    index: dict[str, Any] = {
        "model-index": [
            {
                "name": "x",
                "results": [
                    {
                        "dataset": {"type": "openai/gsm8k", "name": "GSM8K (8-shot)"},
                        "metrics": [{"type": "acc", "value": 75.9}, {"type": "acc", "value": "no number"}],
                    },
                    {"dataset": {"type": "other/set", "name": "Other"}, "metrics": [{"type": "acc", "value": 1}]},
                    {"dataset": "broken"},
                ],
            }
        ]
    }
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(index)}---\n")
    stages.quantize(resolve(str(folder)), plan_of(folder, load_recipe("fp8-dynamic")), out, calibration=None)
    kept = PublishedScores.load(record_path(out, "published")).scores
    assert [(score.dataset, score.value) for score in kept] == [("openai/gsm8k", 75.9), ("other/set", 1.0)]
    baseline = report(task(values(910, 1000), name="gsm8k"))
    facts = facts_of((baseline, report(*baseline.tasks, candidate=True)), published=kept)
    card = plain(render_card(facts))
    assert re.search(r"\| gsm8k \| 75\.9 acc \| 91\.00", card)
    assert "measured by its authors in their own way" in card
    assert "published" not in plain(render_card(facts_of(published=kept))).split("## Accuracy")[1].split("\n\n")[1]


def test_scores_of_a_share_and_of_an_eval_result_are_found_by_dataset() -> None:
    baseline = report(task(values(900, 1000), name="gsm8k"))
    decision = facts_of((baseline, report(*baseline.tasks, candidate=True))).decision
    scores = [
        PublishedScore(dataset="openai/gsm8k", name="gsm8k", metric="", value=0.412, where=".eval_results"),
        PublishedScore(dataset="openai/gsm8k-platinum", name="x", metric="", value=50, where=".eval_results"),
    ]
    assert published_for(decision.tasks[0], scores) == scores[:1]


def test_every_task_of_the_shipped_suites_has_its_dataset_or_data_of_its_own() -> None:
    from fp8pipe.config import load_suite

    for name in shipped("suites"):
        suite = load_suite(name)
        if suite.task_dir is None:
            assert set(suite.tasks) <= set(DATASETS), name
