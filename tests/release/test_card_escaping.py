"""Nothing in a name, a text or a foreign card can break the card."""

from __future__ import annotations

import html

import pytest
from markdown_it import MarkdownIt
from support.cards import calibration, commands, facts_of, plain, validation
from support.reports import change_engine, checkpoint, recipe, report, task, values

from fp8pipe.quantize.plan import SummaryRow
from fp8pipe.records import Finding, Snapshot
from fp8pipe.release.card import render_card
from fp8pipe.release.card.markdown import code, escape, fence
from fp8pipe.ui.sheets import Sheet, markdown

HOSTILE = "a|b`c``d</td><script>alert(1)</script>[x](javascript:y)*_~\n# e\n| f |\n```\n{{ 7*7 }} $(rm)"


def html_of(card: str) -> str:
    """The card as a renderer that passes HTML through would show it."""
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
            checkpoint=checkpoint(fingerprint=HOSTILE),
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
        assert line[0] in ("vllm", "hf", "fp8pipe", "lm_eval")


@pytest.mark.parametrize(
    "text", [HOSTILE, "a_b", "1 < 2", "`", "``x``", "a\\|b", "1. a", "1.5", "- a", "---", "# a", "> a", "=", "&amp;"]
)
def test_escaped_text_and_code_render_to_themselves(text: str) -> None:
    flat = " ".join(text.split())
    renderer = MarkdownIt("commonmark", {"html": True})
    assert html.unescape(renderer.render(escape(text))) == f"<p>{flat}</p>\n"
    if "|" not in text:  # a pipe in a code span is escaped for the table around it
        assert html.unescape(renderer.renderInline(code(text))) == f"<code>{flat}</code>"
    assert html.unescape(renderer.render(fence(text))) == f"<pre><code>{text}\n</code></pre>\n"


def test_hostile_names_become_plain_text_in_artifacts_too() -> None:
    sheet = Sheet(title=HOSTILE, columns=("a", HOSTILE), rows=((HOSTILE, "1"),), notes=(HOSTILE,))
    shown = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown(sheet))
    assert "<script" not in shown
    assert "<a " not in shown
    assert "<code" not in shown
    assert shown.count("<h2>") == shown.count("<table>") == shown.count("<ul>") == 1
    assert shown.count("<th>") + shown.count("<th ") == 2
    assert html.escape("<script>alert(1)</script>") in shown
