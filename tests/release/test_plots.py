"""The plots: the right samples, the metric's own unit, the same bytes each time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from support.cards import facts_of
from support.reports import metric, policy, report, task

from fp8pipe.release.card import collection_note
from fp8pipe.release.card.facts import PLOTS
from fp8pipe.release.plots import changed_samples, write_plots


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


def test_changed_samples_are_found_in_either_direction() -> None:
    ours, theirs = (1.0, 1.0, 0.0, 0.0, 1.0), (1.0, 0.0, 0.0, 1.0, 1.0)
    for higher, worse, better in ((True, [1], [3]), (False, [3], [1])):
        baseline, candidate = (
            report(task(side, metrics=(metric(side, higher_is_better=higher),)), candidate=side is theirs)
            for side in (ours, theirs)
        )
        compared = facts_of().decision.tasks[0]
        assert changed_samples(compared, baseline, candidate) == (worse, better)


def test_a_vetoed_decision_without_tasks_has_no_plots(tmp_path: Path) -> None:
    facts = facts_of()
    empty = facts.decision.model_copy(update={"tasks": (), "verdict": "rejected", "vetoed": ("metrics",)})
    assert write_plots(empty, facts.baseline, facts.candidate, tmp_path / "plots") == {}


def test_a_metric_that_is_not_a_share_is_drawn_and_written_in_its_own_unit(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ours = (30 + random.normal(0, 3, 400)).tolist()
    theirs = (np.array(ours) + random.normal(0, 0.2, 400)).tolist()
    sides = report(task(ours, name="bleu")), report(task(theirs, name="bleu"), candidate=True)
    facts = facts_of(sides, policy("bleu", margin=1.0))
    assert facts.decision.verdict == "accepted"
    assert "points" not in collection_note(facts.decision)
    assert set(write_plots(facts.decision, *sides, tmp_path)) == set(PLOTS)
