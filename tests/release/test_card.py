"""The card and the collection note: what they must say."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from support.cards import TAG, calibration, commands, facts_of, plain, validation
from support.reports import (
    SOURCE_COMMIT,
    change_engine,
    flipped,
    metric,
    module,
    pair,
    policy,
    recipe,
    report,
    suite,
    task,
    timed,
    values,
)

from fp8pipe.config import TaskPolicy
from fp8pipe.hub.collections import MAX_NOTE
from fp8pipe.records import Finding, FlipRate, ModuleProof, ServingFigures, Snapshot
from fp8pipe.release.card import collection_note, render_card
from fp8pipe.release.card.facts import PLOTS, CardFacts
from fp8pipe.release.card.verdict import comparison_rows, summary_rows
from fp8pipe.release.plots import write_plots
from fp8pipe.ui.sheets import decision_sheet


def on_cpu() -> CardFacts:
    fields = {"device_class": "cpu", "device_name": "Some CPU"}
    baseline, candidate = (change_engine(side, **fields) for side in pair(lost=34, won=26))
    candidate = change_engine(candidate, plugin="fp8pipe_cpu")
    return facts_of((baseline, candidate), policy(device_classes=("cpu",)))


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def test_card_states_verdict_drop_interval_margin_and_n() -> None:
    card = plain(render_card(facts_of()))
    assert "**Accepted.**" in card
    assert "qa: 91.00 -> 90.60, drop 0.40 points (-0.24 to 1.06), margin 2.00, n=2,000" in card


def test_card_states_versions_device_cache_tag_and_sizes() -> None:
    card = plain(render_card(facts_of()))
    for said in ("| vLLM | 0.32.0 |", "hopper (NVIDIA H100)", "| KV cache dtype | fp8 |", "2.0 MB -> 1.1 MB (55.0 %)"):
        assert said in card
    assert f"`{TAG}`" in card


def test_card_states_calibration_data_with_revision_and_hash() -> None:
    card = plain(render_card(facts_of()))
    for said in ("| dataset | acme/chats |", "9" * 40, "b" * 64, "128, 12,345 tokens"):
        assert said in card


def test_card_names_the_licence_of_the_source_and_its_link() -> None:
    card = render_card(facts_of())
    assert f"A copy of acme/tiny at {SOURCE_COMMIT}, quantized to FP8" in plain(card)
    assert "Apache License 2.0 (apache-2.0, https://www.apache.org/licenses/LICENSE-2.0)" in plain(card)
    matter = front_matter(card)
    assert matter["license"] == "apache-2.0"
    assert matter["language"] == ["en", "de"]
    assert "extra_gated_prompt" not in matter


def test_front_matter_says_what_the_hub_indexes() -> None:
    matter = front_matter(render_card(facts_of()))
    assert matter["base_model"] == "acme/tiny"
    assert matter["base_model_relation"] == "quantized"
    assert matter["library_name"] == "vllm"
    assert {"fp8", "vllm", "compressed-tensors"} <= set(matter["tags"])
    assert matter["datasets"] == ["acme/chats"]
    (result,) = matter["model-index"][0]["results"]
    assert (result["dataset"]["type"], result["metrics"][0]["value"]) == ("qa", 0.906)
    public = report(task(values(900, 1000), name="gsm8k"))
    matter = front_matter(render_card(facts_of((public, report(*public.tasks, candidate=True)))))
    assert matter["model-index"][0]["results"][0]["dataset"] == {"name": "gsm8k", "type": "openai/gsm8k"}


def test_serve_command_pins_the_tag_and_turns_on_the_cache_that_was_measured() -> None:
    serve = ["vllm", "serve", "acme/tiny-FP8-KV", "--revision", TAG]
    assert [*serve, "--kv-cache-dtype", "fp8"] in commands(render_card(facts_of()))
    baseline, candidate = pair()
    plain_cache = facts_of((baseline, change_engine(candidate, kv_cache_dtype="auto")))
    accepted = plain_cache.decision.model_copy(update={"verdict": "accepted", "vetoed": ()})
    assert serve in commands(render_card(replace(plain_cache, decision=accepted, recipe=recipe(kv_cache=None))))


def test_a_card_says_how_the_measured_engine_was_spread() -> None:
    assert "| parallelism | none |" in plain(render_card(facts_of()))
    arguments = {"tensor_parallel_size": 4, "enable_expert_parallel": True}
    baseline, candidate = (change_engine(side, arguments=arguments) for side in pair())
    card = render_card(facts_of((baseline, candidate)))
    assert "| parallelism | tensor 4, expert |" in plain(card)


def test_a_card_says_what_turns_the_cache_on() -> None:
    """As measured in tests/evaluate/test_reports_from_vllm.py."""
    facts = facts_of()
    by_itself = render_card(facts)
    assert "The checkpoint asks for it, so vLLM uses it without" in by_itself
    assert "With --kv-cache-dtype bfloat16, the KV cache stays in 16 bits" in by_itself
    assert "keeps the model's dtype" not in by_itself
    kv = facts.recipe.kv_cache
    by_the_flag = render_card(replace(facts, recipe=recipe(kv_cache=kv, checkpoint_format="fp8")))
    assert "It was measured with `--kv-cache-dtype fp8`, which turns on the FP8 KV cache" in by_the_flag
    assert "Without --kv-cache-dtype fp8, the KV cache keeps the model's dtype" in by_the_flag


def test_reproduction_commands_name_the_release_and_its_measurement() -> None:
    lines = commands(render_card(facts_of()))
    assert [
        "fp8pipe",
        "quantize",
        f"acme/tiny@{SOURCE_COMMIT}",
        "--recipe",
        "fp8-static-kv",
        "--output",
        "checkpoint",
    ] in lines
    assert [line[1] for line in lines if line[0] == "fp8pipe"] == [
        "quantize",
        "validate",
        "evaluate",
        "evaluate",
        "gate",
    ]
    (lm_eval,) = (line for line in lines if line[0] == "lm_eval")
    assert lm_eval[lm_eval.index("--seed") + 1] == "0,None,None,1234"
    arguments = dict(word.split("=", 1) for word in lm_eval if "=" in word)
    assert "--gen_kwargs" not in lm_eval
    assert arguments == {
        "pretrained": "acme/tiny-FP8-KV",
        "revision": TAG,
        "add_bos_token": "True",
        "dtype": "bfloat16",
        "max_model_len": "512",
        "kv_cache_dtype": "fp8",
    }


def test_tasks_with_different_shots_get_commands_of_their_own() -> None:
    ours = values(900, 1000)
    sides = report(task(ours, name="a", num_fewshot=5), task(ours, name="b"), task(ours, name="c"))
    candidate = report(*sides.tasks, candidate=True)
    lines = [line for line in commands(render_card(facts_of((sides, candidate)))) if line[0] == "lm_eval"]
    chosen = [(line[line.index("--tasks") + 1], line[line.index("--num_fewshot") + 1]) for line in lines]
    assert chosen == [("b,c", "0"), ("a", "5")]


def test_reproduction_commands_have_everything_that_decides_a_score() -> None:
    engine = {"max_model_len": 512, "rope_parameters": {"factor": 4.0}, "tensor_parallel_size": 2, "seed": 7}
    seeds = {"seeds": {"random": 0, "fewshot": 1234, "engine": 7}}
    baseline, candidate = (change_engine(side, arguments=engine).model_copy(update=seeds) for side in pair(lost=1))
    asked = suite().model_copy(update={"generation": {"temperature": 0.6, "until": ["\n\n"]}})
    lines = commands(render_card(facts_of((baseline, candidate), suite=asked)))
    (lm_eval,) = (line for line in lines if line[0] == "lm_eval")
    assert json.loads(lm_eval[lm_eval.index("--gen_kwargs") + 1]) == {"temperature": 0.6, "until": ["\n\n"]}
    arguments = json.loads(lm_eval[lm_eval.index("--model_args") + 1])
    assert arguments["rope_parameters"] == {"factor": 4.0} and arguments["seed"] == 7
    assert arguments["pretrained"] == "acme/tiny-FP8-KV" and arguments["kv_cache_dtype"] == "fp8"
    for line in (line for line in lines if line[:2] == ["fp8pipe", "evaluate"]):
        assert line[line.index("--parallel") + 1] == "tensor=2"
        assert line[line.index("--suite") + 1] == "release/fp8pipe/suite.json"


def test_a_verdict_from_a_cpu_is_labelled_loudly() -> None:
    card = plain(render_card(on_cpu()))
    assert "**Measured on a CPU, not on a GPU.**" in card.split("## Serve")[0]
    assert "`fp8pipe_cpu`" in card
    assert "Measured on a CPU. Measure it again" in card.split("## Known limits")[1]
    assert "python -m fp8pipe.evaluate.lm_eval run" in card
    assert "not on a GPU" not in render_card(facts_of())


def test_card_repeats_the_validations_warnings_and_the_plans_notes() -> None:
    warning = Finding(check="C9", severity="warning", expected="x", found="y", remedy="do z")
    card = plain(render_card(facts_of(validation=validation(warning), notes=("MLA: no KV scales",))))
    assert "C9 warning" in card
    assert "MLA: no KV scales" in card


def test_card_lists_plots_by_relative_path_and_only_records_that_exist() -> None:
    card = render_card(facts_of())
    assert re.findall(r"!\[.*?\]\((.*?)\)", card) == [f"fp8pipe/plots/{name}.png" for name in PLOTS]
    assert "`fp8pipe/gate.json`" in card
    assert "`fp8pipe/calibration.json`" not in card


def test_a_local_calibration_file_is_named_without_the_machines_path() -> None:
    local = "/data/someone/secret/data.jsonl"
    card = render_card(facts_of(calibration=calibration(dataset=local), recipe=recipe(calibration={"dataset": local})))
    assert "data.jsonl" in plain(card)
    assert "someone" not in card
    assert "datasets" not in front_matter(card)


def test_a_local_source_is_not_named_as_a_base_model() -> None:
    local = Snapshot(model_id="tiny", commit="local-" + "0" * 20, files=(), root="/data/someone/tiny")
    card = render_card(facts_of(source=local))
    assert "base_model" not in front_matter(card)
    assert "someone" not in card


def test_a_note_quotes_the_result() -> None:
    note = collection_note(facts_of().decision)
    assert note == (
        "Accepted. qa: 91.00 -> 90.60, drop 0.40 points (-0.24 to 1.06), margin 2.00, n=2,000. Measured on hopper."
    )
    assert "no GPU verdict" in collection_note(on_cpu().decision)


def test_a_note_of_many_tasks_fits_the_hub_and_says_what_it_leaves_out() -> None:
    names = [f"leaderboard_task_number_{i}" for i in range(12)]
    ours = values(900, 1000)
    baseline = report(*(task(ours, name=name) for name in names))
    note = collection_note(facts_of((baseline, report(*baseline.tasks, candidate=True))).decision)
    assert len(note) <= MAX_NOTE
    assert re.search(r" \d+ more task\(s\) in the card\. Measured on hopper\.$", note)


def test_summary_rows_show_both_sides_with_intervals() -> None:
    facts = facts_of()
    (row,) = summary_rows(facts.decision, facts.baseline, facts.candidate)
    assert row["BF16"] == "91.00 (89.67 to 92.18)"
    assert row["FP8"].startswith("90.60 (")
    assert (row["task"], row["recovery"]) == ("qa", "99.56 %")
    (compared,) = comparison_rows(facts.decision, facts.baseline)
    assert list(compared.values()) == ["qa: exact_match, 0-shot", "2,000", "0.40 (-0.24 to 1.06)", "2.00", "accepted"]


def test_flipped_loses_ones_and_wins_zeros() -> None:
    assert flipped((1.0, 1.0, 0.0), lost=1, won=1) == (0.0, 1.0, 1.0)


def test_card_states_the_engines_noise_and_the_speed_of_both_sides() -> None:
    workload = {"num_prompts": 8, "input_len": 64, "output_len": 16, "max_concurrency": 4, "seed": 1}
    times = {f"{kind}_{name}_ms": 10.0 for kind in ("mean", "median", "p99") for name in ("ttft", "itl")}
    tokens = {"output_throughput": 32.0, "total_token_throughput": 160.0}
    slow = ServingFigures(workload=workload, request_throughput=2.0, comparable=False, **tokens, **times)
    fast = slow.model_copy(update={"request_throughput": 3.0})
    baseline, candidate = pair(lost=34, won=26)
    name = baseline.tasks[0].task
    flips = (FlipRate(task=name, metric="exact_match", filter="none", n=1000, flipped=13),)
    timed = (
        baseline.model_copy(update={"serving": slow, "flips": flips}),
        candidate.model_copy(update={"serving": fast}),
    )
    card = render_card(facts_of(timed))
    assert "13 of 1,000 (1.30 %)" in card
    assert re.search(r"\| requests per second \| 2\.0 \| 3\.0 \| 1\.50 \|", card)
    assert "Timed on a CPU" in card
    untimed = render_card(facts_of((timed[0], candidate)))
    assert "Speed and memory" not in untimed


def test_card_states_what_the_gate_ruled_on_limits_of_speed_and_memory() -> None:
    baseline, candidate = pair(lost=34, won=26)
    sides = timed(baseline, 100.0), timed(candidate, 130.0, 1_100_000)
    rules = policy(min_speedup=1.2, max_memory_ratio=0.6)
    card = plain(render_card(facts_of(sides, rules, policy=rules)))
    assert "- The gate's limit on speed: passed, 100 -> 130 generated tokens per second, 1.300 times" in card
    assert "- The gate's limit on memory: passed, 2000000 -> 1100000 bytes of weights in memory, ratio 0.550" in card
    assert "The gate's limit" not in render_card(facts_of(sides, policy=policy()))


def test_several_metrics_of_one_task_are_named_apart_everywhere(tmp_path: Path) -> None:
    ours = values(1820, 2000)
    theirs = flipped(ours, lost=20, won=10)
    metrics = [(metric(side, filter="strict"), metric(ours, filter="loose")) for side in (ours, theirs)]
    sides = report(task(ours, metrics=metrics[0])), report(task(theirs, metrics=metrics[1]), candidate=True)
    limits = [TaskPolicy(metric="exact_match", filter=f, margin=0.02, min_baseline=0.3) for f in ("strict", "loose")]
    facts = facts_of(sides, policy(tasks={"qa": limits}))
    card = plain(render_card(facts))
    assert "qa exact_match,strict: 91.00 -> 90.50" in card and "qa exact_match,loose: 91.00 -> 91.00" in card
    assert "the same 2,000 prompts" in card
    assert "qa exact_match,loose: 91.00" in collection_note(facts.decision)
    rows = decision_sheet(facts.decision).rows
    assert [row[0] for row in rows] == ["qa exact_match,strict", "qa exact_match,loose"]
    assert set(write_plots(facts.decision, *sides, tmp_path)) == set(PLOTS)


def test_card_shows_the_layers_furthest_from_the_baseline_in_a_table_of_80_columns() -> None:
    baseline, candidate = pair()
    plain_layer: dict[str, Any] = {}
    fp8: dict[str, Any] = {"scheme": "Fp8LinearMethod, SomeKernel", "stored_error": 0.002}
    ours, theirs = (
        [module(f"language_model.model.layers.{n}.self_attn.qkv_proj", off=off * n, **more) for n in range(1, 13)]
        for off, more in ((0.0, plain_layer), (0.004, fp8))
    )
    sides = (
        side.model_copy(update={"proof": ModuleProof(version=1, modules=(*modules, module("lm_head")))})
        for side, modules in ((baseline, ours), (candidate, theirs))
    )
    section = render_card(facts_of((next(sides), next(sides)))).split("## Layer by layer")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if "qkv" in line]
    assert [re.findall(r"layers\.(\d+)", row) for row in rows] == [[str(n)] for n in range(12, 2, -1)]
    assert re.match(r"\| ….* \| [45]\.\d % \| 6 % \| 0\.2 % \|", rows[0])
    assert all(len(row.replace("\\", "")) <= 80 for row in rows)
    assert "each of the 13 Linears" in section and "12 of them are quantized" in section


def test_card_of_reports_without_a_proof_has_no_such_section() -> None:
    sides = (side.model_copy(update={"proof": None}) for side in pair())
    assert "Layer by layer" not in render_card(facts_of((next(sides), next(sides))))
