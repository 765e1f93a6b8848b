"""A team's own template of the card, and the preview of a card."""

from __future__ import annotations

import os
import signal
import subprocess
import urllib.request
from dataclasses import replace
from pathlib import Path

import pytest
from support.cards import TAG, facts_of, saved
from support.processes import FP8PIPE
from support.tiny_models import make_model, plan_of
from typer.testing import CliRunner

from fp8pipe import stages
from fp8pipe.cli import app
from fp8pipe.config import ReleaseSpec, load_recipe
from fp8pipe.errors import ConfigError
from fp8pipe.hub.source import resolve
from fp8pipe.records import record_path
from fp8pipe.release.card import card_for_folder, render_card
from fp8pipe.release.card.render import _context, check_template, shipped_template, template_values


def rendered(template: str) -> str:
    return render_card(replace(facts_of(), template=template))


def test_a_template_has_the_values_and_filters_of_the_shipped_one() -> None:
    assert rendered("{{ name | md }}: {{ headline }}\n\n{{ accuracy_table }}").startswith(
        "tiny-FP8-KV: Accepted\n\n| task"
    )
    assert rendered(shipped_template()) == render_card(facts_of())


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("line\n{% if %}", "line 2"),
        ("{{ nonsense }}", "'nonsense' is undefined"),
        ("{{ name.no }}", "no attribute 'no'"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ name | shout }}", "shout"),
        ("{% include 'other.j2' %}", "no loader"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ name.format.__globals__ }}", "unsafe"),
        ("{% for a in range(10 ** 9) %}{% endfor %}", "ange too big"),
    ],
)
def test_a_template_that_is_wrong_or_leaves_its_sandbox_is_refused_with_the_reason(template: str, said: str) -> None:
    with pytest.raises(ConfigError, match="card template") as refusal:
        rendered(template)
    assert said in str(refusal.value)


def test_what_no_card_has_is_refused_before_there_is_one() -> None:
    check_template(shipped_template())
    check_template("{% for label, value in scheme_rows %}{{ label | md }}{{ loop.index }}{% endfor %}")
    wrong = {"{{ nonsense }}": "no value nonsense", "{{ name | shout }}": "shout", "{% if": "line 1"}
    for template, said in wrong.items():
        with pytest.raises(ConfigError, match="card template") as refusal:
            check_template(template)
        assert said in str(refusal.value)


def test_the_shipped_template_names_every_value_that_a_card_has() -> None:
    assert template_values(shipped_template()) == _context(facts_of()).keys()


def test_a_template_among_the_records_makes_the_card_of_its_folder(tmp_path: Path) -> None:
    saved(tmp_path)
    record_path(tmp_path, "card_template").write_text("# {{ name | md }}\n")
    assert card_for_folder(tmp_path, repo_id="acme/own", tag=TAG) == "# own\n"


def test_a_releases_template_is_kept_with_its_checkpoint_and_checked_before_any_work(tmp_path: Path) -> None:
    folder, out, own = make_model(tmp_path / "model"), tmp_path / "out", tmp_path / "own.md.j2"
    own.write_text("# {{ name | md }}\n")
    snapshot, plan = resolve(str(folder)), plan_of(folder, load_recipe("fp8-dynamic"))
    stages.quantize(snapshot, plan, out, calibration=None, card_template=str(own))
    assert record_path(out, "card_template").read_text() == "# {{ name | md }}\n"
    stages.quantize(snapshot, plan, out, calibration=None)
    assert not record_path(out, "card_template").exists()
    own.write_text("\n{% if %}")
    spec = ReleaseSpec(model="acme/tiny", repo_id="acme/tiny-FP8", card_template=str(own))
    with pytest.raises(ConfigError, match="line 2"):
        spec.resolve()


def test_a_card_is_previewed_with_another_template_and_nothing_is_written(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint")
    before = sorted(path.as_posix() for path in tmp_path.rglob("*"))
    own = tmp_path.parent / "own.md.j2"
    own.write_text("# {{ name | md }}\n")
    shown = CliRunner().invoke(app, ["card", str(tmp_path / "checkpoint"), "--markdown", "--card-template", str(own)])
    assert (shown.exit_code, shown.output) == (0, "# checkpoint\n")
    assert sorted(path.as_posix() for path in tmp_path.rglob("*")) == before
    with pytest.raises(ConfigError, match="cannot be read"):
        stages.card(tmp_path / "checkpoint", repo_id="a/b", template=str(tmp_path / "none"))


def test_a_preview_shows_the_card_and_its_plots_on_loopback_until_it_is_interrupted(tmp_path: Path) -> None:
    saved(tmp_path)
    command = [FP8PIPE, "card", str(tmp_path), "--repo-id", "acme/tiny-FP8-KV"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "200"}) as shown:
        assert shown.stdout is not None
        address = shown.stdout.readline().strip()
        assert address.startswith("http://127.0.0.1:")
        page = urllib.request.urlopen(address).read().decode()
        assert "<h1" in page and "tiny-FP8-KV" in page and "plots/drop.png" in page
        shown.send_signal(signal.SIGINT)
        assert shown.wait(60) == 0
