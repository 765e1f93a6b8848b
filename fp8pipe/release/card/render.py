"""From facts to the card: `card.md.j2`, and the values that it names."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import ConfigError, Refused
from fp8pipe.gate.publishable import verdict_objections
from fp8pipe.records import RECORD_DIR
from fp8pipe.release.card import markdown
from fp8pipe.release.card.commands import (
    client_code,
    fp8pipe_commands,
    lm_eval_commands,
    serve_command,
    transformers_code,
)
from fp8pipe.release.card.facts import PLOTS, RECORDS, CardFacts, facts_of_folder
from fp8pipe.release.card.limits import known_limits, validation_line
from fp8pipe.release.card.measurement import engine_rows, noise_lines, serving_limits, serving_note, serving_rows
from fp8pipe.release.card.metadata import card_front_matter, licence_lines
from fp8pipe.release.card.modules import modules_note, worst_modules
from fp8pipe.release.card.published import published_for
from fp8pipe.release.card.scheme import (
    calibration_rows,
    describe_scheme,
    llmcompressor_recipe,
    plan_rows,
    recipe_yaml,
    scheme_rows,
)
from fp8pipe.release.card.verdict import (
    alpha_note,
    comparison_rows,
    headline,
    recovery_sentence,
    summary_rows,
    verdict_lines,
)

if TYPE_CHECKING:
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def card_for_folder(folder: Path, *, repo_id: str, tag: str) -> str:
    """The card of the checkpoint in `folder`, for the release `tag`. InputError names a record that is missing."""
    return render_card(facts_of_folder(folder, repo_id=repo_id, tag=tag))


def render_card(facts: CardFacts) -> str:
    """The release's README.md. Refused if the verdict does not allow a release."""
    for objection in verdict_objections(facts.decision, facts.policy, facts.approval):
        raise Refused(f"no card for {facts.repo_id}: {objection}")
    return re.sub(r"\n{3,}", "\n\n", _filled(facts.template, _context(facts)))


def shipped_template() -> str:
    """The text of the template that makes a card unless a team has its own."""
    from importlib.resources import files

    return (files("fp8pipe.release.card") / "card.md.j2").read_text()


def template_values(template: str) -> set[str]:
    """The values that a template names. Those of the shipped one are all that a card has."""
    from jinja2 import meta

    return meta.find_undeclared_variables(_environment().parse(template))


def check_template(template: str) -> None:
    """Raise ConfigError for a template of a team's own that cannot work for any card: it does not compile, or names a
    value or a filter that there is none of."""
    from jinja2 import TemplateError

    known = template_values(shipped_template())
    try:
        _environment().from_string(template)
        unknown = sorted(template_values(template) - known)
    except TemplateError as error:
        raise _template_error(error) from error
    if unknown:
        raise ConfigError(f"card template: no value {', '.join(unknown)}; a card has {', '.join(sorted(known))}")


def _filled(template: str | None, context: dict[str, Any]) -> str:
    """The template with its values. Raises ConfigError for one of a team's own that is wrong, or asks for more than its
    values: it is run in a sandbox, because it may come from somebody else."""
    from jinja2 import TemplateError

    if template is None:
        return _environment().from_string(shipped_template()).render(context)
    try:
        return _environment().from_string(template).render(context)
    except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise _template_error(error) from error


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False
    )
    environment.filters |= {
        "md": markdown.escape,
        "code": markdown.code,
        "url": markdown.url,
        "fence": markdown.fence,
    }
    return environment


def _template_error(error: Exception) -> ConfigError:
    from jinja2 import TemplateSyntaxError

    line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
    return ConfigError(f"card template{line}: {error}; compare it with the shipped card.md.j2")


def _context(facts: CardFacts) -> dict[str, Any]:
    """What the template names."""
    decision, candidate = facts.decision, facts.candidate
    published = facts.published
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
        "recovery": recovery_sentence(decision),
        "serve_command": serve_command(facts),
        "client_code": client_code(facts),
        "transformers_code": transformers_code(facts),
        "tag": facts.tag,
        "fp8_cache": facts.fp8_cache,
        "asks_for_cache": facts.asks_for_cache,
        "served_table": markdown.table(served[0]),
        "served_notes": served[1],
        "served_rules": " and ".join(map(" ".join, serving.rules.items())) if serving is not None else "",
        "engine_rows": engine_rows(candidate),
        "accuracy_table": markdown.table(summary_rows(decision, facts.baseline, candidate, published)),
        "test_table": markdown.table(comparison_rows(decision, facts.baseline)),
        "published": any(published_for(task, published) for task in decision.tasks),
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
        "llmcompressor_recipe": llmcompressor_recipe(facts.recipe, facts.config),
        "licence_lines": list(licence_lines(facts)),
        "shown": facts.terms.licence.shown if facts.terms.licence is not None else "",
        "limits": list(known_limits(facts)),
        "records": [(f"{RECORD_DIR}/{name}", meaning) for name, meaning in RECORDS.items() if name in facts.records],
    }
