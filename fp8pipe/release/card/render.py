"""From facts to the card: `card.md.j2`, and the values that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fp8pipe.errors import Refused
from fp8pipe.gate.publishable import verdict_objections
from fp8pipe.records import RECORD_DIR
from fp8pipe.release.card import markdown
from fp8pipe.release.card.commands import fp8pipe_commands, lm_eval_commands, serve_command
from fp8pipe.release.card.facts import PLOTS, RECORDS, CardFacts, facts_of_folder
from fp8pipe.release.card.limits import known_limits, validation_line
from fp8pipe.release.card.measurement import engine_rows, noise_lines, serving_limits, serving_note, serving_rows
from fp8pipe.release.card.metadata import card_front_matter, licence_sentence
from fp8pipe.release.card.modules import modules_note, worst_modules
from fp8pipe.release.card.scheme import calibration_rows, describe_scheme, plan_rows, recipe_yaml, scheme_rows
from fp8pipe.release.card.verdict import alpha_note, headline, summary_rows, verdict_lines


def card_for_folder(folder: Path, *, repo_id: str) -> str:
    """The card of the checkpoint in `folder`. InputError names a record that is missing.

    The source's own README.md is kept as fp8pipe/source_card.md before the card takes its place.
    """
    return render_card(facts_of_folder(folder, repo_id=repo_id))


def render_card(facts: CardFacts) -> str:
    """The release's README.md. Refused if the verdict does not allow a release."""
    from importlib.resources import files

    from jinja2 import Environment, StrictUndefined

    for objection in verdict_objections(facts.decision, facts.policy, facts.approval):
        raise Refused(f"no card for {facts.repo_id}: {objection}")
    environment = Environment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {
        "md": markdown.escape,
        "code": markdown.code,
        "url": markdown.url,
        "fence": markdown.fence,
    }
    template = environment.from_string((files("fp8pipe.release.card") / "card.md.j2").read_text())
    return re.sub(r"\n{3,}", "\n\n", template.render(_context(facts)))


def _context(facts: CardFacts) -> dict[str, Any]:
    """What the template names."""
    decision, candidate = facts.decision, facts.candidate
    serving = facts.validation.serving
    served = serving.table() if serving is not None else ([], [])
    return {
        "front_matter": card_front_matter(facts),
        "name": facts.repo_id.rsplit("/", 1)[-1],
        "source": facts.source,
        "recipe": facts.recipe,
        "scheme": describe_scheme(facts.recipe),
        "made_by": candidate.versions.get("fp8pipe", "(version not recorded)"),
        "headline": headline(decision),
        "verdict_lines": list(verdict_lines(facts)),
        "on_cpu": candidate.engine.device_class == "cpu",
        "engine": candidate.engine,
        "serve_command": serve_command(facts),
        "tag": facts.checkpoint.release_tag,
        "fp8_cache": facts.fp8_cache,
        "asks_for_cache": facts.asks_for_cache,
        "served_table": markdown.table(served[0]),
        "served_notes": served[1],
        "served_rules": " and ".join(map(" ".join, serving.rules.items())) if serving is not None else "",
        "engine_rows": engine_rows(candidate),
        "accuracy_table": markdown.table(summary_rows(decision, facts.baseline, candidate)),
        "noise": list(noise_lines(facts.baseline)),
        "serving_table": markdown.table(serving_rows(facts)),
        "serving_note": serving_note(facts),
        "serving_limits": serving_limits(facts),
        "samples": f"{sum({task.task: task.n for task in decision.tasks}.values()):,}",
        "alpha": f"{decision.alpha_spent:.3g}",
        "alpha_note": alpha_note(decision),
        "plots": [(PLOTS[name], facts.plots[name]) for name in PLOTS if name in facts.plots and name != "modules"],
        "modules_plot": (PLOTS["modules"], facts.plots["modules"]) if "modules" in facts.plots else None,
        "modules_table": markdown.table(worst_modules(facts)),
        "modules_note": modules_note(facts),
        "scheme_rows": scheme_rows(facts),
        "plan_table": markdown.table(plan_rows(facts.plan_summary)),
        "notes": facts.notes,
        "calibration_rows": calibration_rows(facts.calibration),
        "validation": facts.validation,
        "validation_line": validation_line(facts.validation),
        "fp8pipe_commands": "\n".join(fp8pipe_commands(facts)),
        "lm_eval_commands": "\n".join(lm_eval_commands(facts)),
        "recipe_yaml": recipe_yaml(facts.recipe),
        "licence": licence_sentence(facts),
        "limits": list(known_limits(facts)),
        "records": [(f"{RECORD_DIR}/{name}", meaning) for name, meaning in RECORDS.items() if name in facts.records],
    }
