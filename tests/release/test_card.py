"""The card: what it must say, that nothing in a name or a foreign card can break it, and that it is always the same."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from markdown_it import MarkdownIt
from support.cards import SOURCE_CARD_TEXT, calibration, facts_of, saved, validation
from support.reports import (
    FINGERPRINT,
    SOURCE_COMMIT,
    change_engine,
    checkpoint,
    flipped,
    metric,
    pair,
    policy,
    recipe,
    report,
    task,
    timed,
    values,
)

from fp8pipe.config import TaskPolicy
from fp8pipe.errors import InputError, Refused
from fp8pipe.quantize.plan import SummaryRow
from fp8pipe.records import (
    Approval,
    Finding,
    FlipRate,
    GateDecision,
    ServingFigures,
    Snapshot,
)
from fp8pipe.release.card import (
    EVIDENCE,
    MAX_NOTE,
    PLOTS,
    SOURCE_CARD,
    CardFacts,
    card_for_folder,
    card_metadata,
    code,
    collection_note,
    escape,
    fence,
    render_card,
    summary_rows,
)
from fp8pipe.release.plots import changed_samples, write_plots
from fp8pipe.ui.sheets import decision_sheet


def on_cpu() -> CardFacts:
    fields = {"device_class": "cpu", "device_name": "Some CPU"}
    baseline, candidate = (change_engine(side, **fields) for side in pair(lost=34, won=26))
    candidate = change_engine(candidate, plugin="fp8pipe_cpu")
    return facts_of((baseline, candidate), policy(device_classes=("cpu",)))


def front_matter(card: str) -> dict[str, Any]:
    return yaml.safe_load(card.split("---\n")[1])


def commands(card: str) -> list[list[str]]:
    """Every command line in a bash block, split as a shell does."""
    blocks = re.findall(r"```bash\n(.*?)\n```", card, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.splitlines()]


def plain(card: str) -> str:
    """The card without its escapes."""
    return re.sub(r"\\(.)", r"\1", card)


# ---------------------------------------------------------------------------------------------- what it says


def test_card_states_verdict_drop_interval_margin_and_n() -> None:
    card = plain(render_card(facts_of()))
    assert "**Accepted.**" in card
    assert "qa: 91.00 -> 90.60, drop 0.40 points (-0.24 to 1.06), margin 2.00, n=2,000" in card


def test_card_states_versions_device_cache_tag_and_sizes() -> None:
    card = plain(render_card(facts_of()))
    for said in ("| vLLM | 0.32.0 |", "hopper (NVIDIA H100)", "| KV cache dtype | fp8 |", "2.0 MB -> 1.1 MB (55.0 %)"):
        assert said in card
    assert f"`fp8pipe-{FINGERPRINT[:12]}`" in card


def test_card_states_calibration_data_with_revision_and_hash() -> None:
    card = plain(render_card(facts_of()))
    for said in ("| dataset | acme/chats |", "9" * 40, "b" * 64, "128, 12,345 tokens"):
        assert said in card


def test_card_names_the_licence_of_the_source_and_its_link() -> None:
    card = render_card(facts_of())
    assert f"acme/tiny at {SOURCE_COMMIT}, under that model's licence: other (llama3.1), https" in plain(card)
    matter = front_matter(card)
    assert (matter["license"], matter["license_name"]) == ("other", "llama3.1")
    assert matter["language"] == ["en", "de"]
    assert "extra_gated_prompt" not in matter
    unknown = render_card(facts_of(source_card=None))
    assert "names no licence" in unknown
    assert "license" not in front_matter(unknown)


def test_front_matter_says_what_the_hub_indexes() -> None:
    matter = front_matter(render_card(facts_of()))
    assert matter["base_model"] == "acme/tiny"
    assert matter["base_model_relation"] == "quantized"
    assert matter["library_name"] == "vllm"
    assert {"fp8", "vllm", "compressed-tensors"} <= set(matter["tags"])
    assert matter["datasets"] == ["acme/chats"]
    assert matter["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.906


def test_serve_command_pins_the_tag_and_turns_on_the_cache_that_was_measured() -> None:
    serve = ["vllm", "serve", "acme/tiny-FP8-KV", "--revision", checkpoint().release_tag]
    assert [*serve, "--kv-cache-dtype", "fp8"] in commands(render_card(facts_of()))
    baseline, candidate = pair()
    plain_cache = facts_of((baseline, change_engine(candidate, kv_cache_dtype="auto")))
    accepted = plain_cache.decision.model_copy(update={"verdict": "accepted", "vetoed": ()})
    assert serve in commands(render_card(replace(plain_cache, decision=accepted, recipe=recipe(kv_cache=None))))


def test_reproduction_commands_are_ones_that_the_command_line_takes() -> None:
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
    arguments = dict(pair.split("=", 1) for pair in lm_eval[lm_eval.index("--model_args") + 1].split(","))
    assert arguments == {
        "pretrained": "acme/tiny-FP8-KV",
        "revision": checkpoint().release_tag,
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


def test_a_verdict_from_a_cpu_is_labelled_loudly() -> None:
    card = plain(render_card(on_cpu()))
    assert "**Measured on a CPU, not on a GPU.**" in card.split("## Serve")[0]
    assert "`fp8pipe_cpu`" in card
    assert "Measured on a CPU. Measure it again" in card.split("## Known limits")[1]
    assert "python -m fp8pipe.evaluate.lm_eval run" in card
    assert "not on a GPU" not in render_card(facts_of())


def test_warnings_of_the_validator_and_notes_of_the_plan_are_passed_on() -> None:
    warning = Finding(check="C9", severity="warning", expected="x", found="y", remedy="do z")
    card = plain(render_card(facts_of(validation=validation(warning), notes=("MLA: no KV scales",))))
    assert "C9 warning" in card
    assert "MLA: no KV scales" in card


def test_card_lists_plots_by_relative_path_and_the_evidence_that_is_there() -> None:
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


def test_a_local_source_is_no_base_model_of_the_hub() -> None:
    local = Snapshot(model_id="tiny", commit="local-" + "0" * 20, files=(), root="/data/someone/tiny")
    card = render_card(facts_of(source=local))
    assert "base_model" not in front_matter(card)
    assert "someone" not in card


# ---------------------------------------------------------------------------------------------- what it refuses


def test_a_rejected_checkpoint_gets_neither_card_nor_note() -> None:
    rejected = facts_of(pair(lost=200))
    assert rejected.decision.verdict == "rejected"
    with pytest.raises(Refused, match="rejected"):
        render_card(rejected)
    with pytest.raises(Refused, match="rejected"):
        collection_note(rejected.decision)


def test_an_inconclusive_result_needs_an_approval_of_this_very_decision() -> None:
    open_facts = facts_of(pair(lost=70, won=35))
    assert open_facts.decision.verdict == "inconclusive"
    with pytest.raises(Refused, match="approval"):
        render_card(open_facts)
    approval = Approval(who="ada", when="2026-08-01T10:00:00Z", reason="known noise", decision="0" * 64)
    with pytest.raises(Refused, match="approval"):
        render_card(replace(open_facts, approval=approval))
    signed = approval.model_copy(update={"decision": open_facts.decision.digest()})
    card = plain(render_card(replace(open_facts, approval=signed)))
    assert "**Inconclusive, released by decision.**" in card
    assert "released by ada on 2026-08-01T10:00:00Z: known noise" in card
    assert collection_note(open_facts.decision).startswith("Inconclusive, released by decision.")


# ---------------------------------------------------------------------------------------------- what cannot break it

HOSTILE = "a|b`c``d</td><script>alert(1)</script>[x](javascript:y)*_~\n# e\n| f |\n```\n{{ 7*7 }} $(rm)"


def html_of(card: str) -> str:
    """As a renderer that lets HTML through would show it."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(card.split("---\n", 2)[2])


def test_hostile_names_become_plain_text_everywhere() -> None:
    warning = Finding(check=HOSTILE, severity="warning", tensor=HOSTILE, expected=HOSTILE, found="y", remedy="z")
    ours = values(900, 1000)
    baseline, candidate = (
        report(task(ours, name=HOSTILE), candidate=role, suite=HOSTILE, model_id=HOSTILE) for role in (False, True)
    )
    candidate = change_engine(candidate, device_name=HOSTILE, attention_backend=HOSTILE)
    named = facts_of()
    decision = named.decision.model_copy(
        update={"tasks": (named.decision.tasks[0].model_copy(update={"task": HOSTILE}),), "policy": HOSTILE}
    )
    card = render_card(
        facts_of(
            baseline=baseline,
            candidate=candidate,
            decision=decision,
            repo_id=f"acme/{HOSTILE}",
            tag=HOSTILE,
            source=Snapshot(model_id=HOSTILE, commit=HOSTILE, files=()),
            recipe=recipe(description=HOSTILE),
            validation=validation(warning),
            notes=(HOSTILE,),
            calibration=calibration(dataset=HOSTILE, dataset_split=HOSTILE),
            plan_summary=(SummaryRow("keep", HOSTILE, 1, 2, 3),),
        )
    )
    ours_only, theirs = html_of(render_card(facts_of())), html_of(card)
    for tag in ("<script", "<a ", "<em", "<strong", "<h1", "<h2", "<h3", "<img", "<table", "<tr", "<pre", "<li"):
        extra = 1 if tag == "<li" else 0  # the warning itself
        assert theirs.count(tag) == ours_only.count(tag) + extra, tag
    assert "{{ 7*7 }}" in plain(card)
    for line in commands(card):
        assert line[0] in ("vllm", "fp8pipe", "lm_eval")


@pytest.mark.parametrize(
    "text", [HOSTILE, "a_b", "1 < 2", "`", "``x``", "a\\|b", "1. a", "1.5", "- a", "---", "# a", "> a", "=", "&amp;"]
)
def test_escaped_text_and_code_render_to_themselves(text: str) -> None:
    flat = " ".join(text.split())
    renderer = MarkdownIt("commonmark", {"html": True})
    import html

    assert html.unescape(renderer.render(escape(text))) == f"<p>{flat}</p>\n"
    if "|" not in text:  # a pipe in a code span is escaped for the table around it
        assert html.unescape(renderer.renderInline(code(text))) == f"<code>{flat}</code>"
    assert html.unescape(renderer.render(fence(text))) == f"<pre><code>{text}\n</code></pre>\n"


@pytest.mark.parametrize(
    "card",
    [
        None,
        "",
        "# no front matter",
        "---\n: [broken\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: {a: b}\nlanguage: 3\n---\n",
        "---\nlicense: !!python/object/apply:os.system [id]\n---\n",
    ],
)
def test_a_source_card_that_says_nothing_clear_is_not_quoted(card: str | None) -> None:
    assert card_metadata(card) == {}


# ---------------------------------------------------------------------------------------------- note, rows


def test_note_quotes_the_result() -> None:
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
    assert row["drop"] == "0.40 (-0.24 to 1.06)"
    assert (row["n"], row["verdict"]) == ("2,000", "accepted")


# ---------------------------------------------------------------------------------------------- always the same


def test_the_same_records_render_to_the_same_bytes_whatever_they_took() -> None:
    facts = facts_of()
    slower = checkpoint(seconds=99.0)
    again = facts_of(
        checkpoint=slower,
        baseline=facts.baseline.model_copy(update={"seconds": {"total": 77.0}}),
        candidate=facts.candidate.model_copy(update={"seconds": {"total": 88.0}}),
        calibration=calibration(seconds=55.0),
        decision=facts.decision,
    )
    assert render_card(facts) == render_card(again)


def test_plots_are_the_same_bytes_each_time_in_both_formats(tmp_path: Path) -> None:
    facts = facts_of()
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        drawn = write_plots(facts.decision, facts.baseline, facts.candidate, folder)
        assert set(drawn) == set(PLOTS)
    names = sorted(path.name for path in folders[0].iterdir())
    assert names == sorted(f"{plot}.{suffix}" for plot in PLOTS for suffix in ("png", "svg"))
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_changed_samples_are_found_where_they_are_in_either_direction() -> None:
    ours, theirs = (1.0, 1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0, 1.0)
    for higher, worse, better in ((True, [1], [3]), (False, [3], [1])):
        baseline, candidate = (
            report(task(side, metrics=(metric(side, higher_is_better=higher),)), candidate=side is theirs)
            for side in (ours, theirs)
        )
        compared = facts_of().decision.tasks[0]
        assert changed_samples(compared, baseline, candidate) == (worse, better)


def test_plots_of_a_vetoed_decision_without_tasks_are_none(tmp_path: Path) -> None:
    facts = facts_of()
    empty = facts.decision.model_copy(update={"tasks": (), "verdict": "rejected", "vetoed": ("metrics",)})
    assert write_plots(empty, facts.baseline, facts.candidate, tmp_path / "plots") == {}


def test_metrics_in_their_own_unit_are_drawn_and_written_so(tmp_path: Path) -> None:
    import numpy as np

    random = np.random.default_rng(0)
    ours = (30 + random.normal(0, 3, 400)).tolist()
    theirs = (np.array(ours) + random.normal(0, 0.2, 400)).tolist()
    sides = report(task(ours, name="bleu")), report(task(theirs, name="bleu"), candidate=True)
    facts = facts_of(sides, policy("bleu", margin=1.0))
    assert facts.decision.verdict == "accepted"
    assert "points" not in collection_note(facts.decision)
    assert set(write_plots(facts.decision, *sides, tmp_path)) == set(PLOTS)


def test_card_of_a_folder_is_the_same_before_and_after_it_replaced_the_sources_own(tmp_path: Path) -> None:
    saved(tmp_path)
    first = card_for_folder(tmp_path, repo_id="acme/tiny-FP8-KV")
    (tmp_path / "README.md").write_text(first)
    assert card_for_folder(tmp_path, repo_id="acme/tiny-FP8-KV") == first
    assert (tmp_path / SOURCE_CARD).read_text() == SOURCE_CARD_TEXT
    assert "llama3.1" in first
    assert "fp8pipe/plots/drop.png" in first


def test_card_of_a_folder_names_the_evidence_that_lies_there(tmp_path: Path) -> None:
    saved(tmp_path)
    listed = set(re.findall(r"`fp8pipe/([\w.]+)`", card_for_folder(tmp_path, repo_id="a/b").split("## Evidence")[1]))
    lying = {path.name for path in (tmp_path / "fp8pipe").iterdir() if path.is_file()}
    assert listed == lying | {"manifest.json"}
    assert listed <= set(EVIDENCE)


def test_card_of_a_folder_without_a_gate_names_the_missing_record(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "fp8pipe" / "gate.json").unlink()
    with pytest.raises(InputError, match=r"gate\.json"):
        card_for_folder(tmp_path, repo_id="a/b")


def test_a_decision_read_back_from_its_file_gives_the_same_card(tmp_path: Path) -> None:
    facts = facts_of()
    again = GateDecision.load(facts.decision.save(tmp_path / "gate.json"))
    assert render_card(replace(facts, decision=again)) == render_card(facts)


def test_flipped_is_what_it_says() -> None:
    assert flipped((1.0, 1.0, 0.0), lost=1, won=1) == (0.0, 1.0, 1.0)


def test_card_tells_the_engines_noise_and_both_sides_speed() -> None:
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
    assert "Taken on a CPU: not comparable" in card
    untimed = render_card(facts_of((timed[0], candidate)))
    assert "Speed and memory" not in untimed


def test_card_tells_the_limits_on_speed_and_memory_that_the_gate_held() -> None:
    baseline, candidate = pair(lost=34, won=26)
    sides = timed(baseline, 100.0), timed(candidate, 130.0, 1_100_000)
    rules = policy(min_speedup=1.2, max_memory_ratio=0.6)
    card = plain(render_card(facts_of(sides, rules, policy=rules)))
    assert "- The gate's limit on speed: passed, 100 -> 130 generated tokens per second, 1.300 times" in card
    assert "- The gate's limit on memory: passed, 2000000 -> 1100000 bytes of weights in memory, ratio 0.550" in card
    assert "The gate's limit" not in render_card(facts_of(sides, policy=policy()))


def test_metrics_of_one_task_are_told_apart_everywhere(tmp_path: Path) -> None:
    ours = values(1820, 2000)
    theirs = flipped(ours, lost=20, won=10)
    metrics = [(metric(side, filter="strict"), metric(ours, filter="loose")) for side in (ours, theirs)]
    sides = report(task(ours, metrics=metrics[0])), report(task(theirs, metrics=metrics[1]), candidate=True)
    limits = [TaskPolicy(metric="exact_match", filter=f, margin=0.02, min_baseline=0.3) for f in ("strict", "loose")]
    facts = facts_of(sides, policy(tasks={"qa": limits}))
    card = plain(render_card(facts))
    assert "qa exact_match,strict: 91.00 -> 90.50" in card and "qa exact_match,loose: 91.00 -> 91.00" in card
    assert "Paired on the same 2,000 samples" in card
    assert "qa exact_match,loose: 91.00" in collection_note(facts.decision)
    rows = decision_sheet(facts.decision).rows
    assert [row[0] for row in rows] == ["qa exact_match,strict", "qa exact_match,loose"]
    assert set(write_plots(facts.decision, *sides, tmp_path)) == set(PLOTS)
