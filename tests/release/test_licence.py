"""Licences: what each asks of a quantized copy, how a release fulfils it, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from support.cards import facts_of, licensed, plain
from support.tiny_models import make_model, plan_of

from fp8pipe import stages
from fp8pipe.config import LicenceClaim, LicenceTable, load_licences, load_recipe
from fp8pipe.errors import ConfigError, Refused
from fp8pipe.hub.source import resolve
from fp8pipe.records import Snapshot, SourceFile, Terms, record_path
from fp8pipe.release.admission import require_licence
from fp8pipe.release.card import render_card
from fp8pipe.release.licence import licence_files, require

TABLE = load_licences()
NAMED = {  # what a card says -> the entry of the table
    "license: Apache 2.0": "apache-2.0",
    "license: apache-2.0": "apache-2.0",
    "license: Apache License, Version 2.0": "apache-2.0",
    "license: [MIT License]": "mit",
    "license: llama2": "llama2",
    "license: llama3": "llama3",
    "license: Llama 3.1": "llama3.1",
    "license: other\nlicense_name: llama3.2": "llama3.2",
    "license: llama3.3": "llama3.3",
    "license: other\nlicense_name: llama4": "llama4",
    "license: gemma": "gemma",
    "license: other\nlicense_name: tongyi-qianwen": "tongyi-qianwen",
    "license: other\nlicense_name: qwen": "qwen",
    "license: other\nlicense_name: qwen-research": "qwen-research",
    "license: other\nlicense_name: deepseek": "deepseek",
    "license: other\nlicense_name: nvidia-open-model-license": "nvidia-open-model-license",
    "license: CC BY-NC 4.0": "cc-by-nc-4.0",
    "license: cc-by-4.0": "cc-by-4.0",
    "license: bigscience-openrail-m": "bigscience-openrail-m",
}


def terms(front_matter: str, claim: LicenceClaim | None = None) -> Terms:
    return licensed(f"---\n{front_matter}\n---\n", claim)["terms"]


def source(*files: str) -> Snapshot:
    return Snapshot(model_id="acme/base", commit="c" * 40, files=tuple(SourceFile(name=name, size=1) for name in files))


@pytest.mark.parametrize(("front_matter", "identifier"), NAMED.items())
def test_a_card_names_its_licence_in_any_common_spelling(front_matter: str, identifier: str) -> None:
    assert terms(front_matter).id == identifier


def test_no_two_licences_of_the_shipped_table_share_a_spelling() -> None:
    for identifier, licence in TABLE.licences.items():
        for name in (identifier, licence.title, *licence.names):
            assert TABLE.find(name) == identifier, name


@pytest.mark.parametrize(
    ("front_matter", "reason"),
    [
        ("language: en", "names no licence"),
        ("license: unknown", "unknown, is not in the table"),
        ("license: other", "without a license_name"),
        ("license: other\nlicense_name: acme-terms", "acme-terms, is not in the table"),
        ("license: [mit, apache-2.0]", "several licences"),
        ("license: : [", "not YAML"),
        ("license: cc-by-nc-nd-4.0", "changed copies may not be shared"),
        ("license: llama3.1", "a copy of its text"),
        ("license: gemma", "--licence-file PATH"),
    ],
)
def test_what_may_not_be_published_is_refused_with_what_to_do(front_matter: str, reason: str) -> None:
    with pytest.raises(Refused, match="may not be published") as refusal:
        require(terms(front_matter), "acme/Llama-FP8", ["config.json", "docs/LICENSE"])
    assert reason in str(refusal.value)


@pytest.mark.parametrize(
    ("licence", "repo_id", "fits"),
    [
        ("llama3.1", "acme/Llama-3.1-8B-FP8", True),
        ("llama3.1", "acme/Meta-Llama-3.1-8B-FP8", False),
        ("llama3.1", "llama/tiny-FP8", False),
        ("llama3", "acme/Llama-3-8B-FP8", True),
        ("llama3", "acme/Llama-8B-FP8", False),
        ("llama2", "acme/tiny-FP8", True),
    ],
)
def test_names_begin_as_the_licence_asks(licence: str, repo_id: str, fits: bool) -> None:
    if fits:
        require(terms(f"license: {licence}"), repo_id, ["LICENSE.txt"])
        return
    with pytest.raises(Refused, match="begins with Llama"):
        require(terms(f"license: {licence}"), repo_id, ["LICENSE.txt"])


def test_a_claim_settles_what_the_card_leaves_open_and_the_card_says_so() -> None:
    claim = LicenceClaim(id="MIT", reason="the authors' mail of 3 May")
    settled = terms("language: en", claim)
    require(settled, "acme/tiny-FP8", [])
    assert settled.id == "mit"
    card = plain(render_card(facts_of(**licensed("---\nlanguage: en\n---\n", claim))))
    assert "what the publisher of this copy states. On what ground: the authors' mail of 3 May" in card
    with pytest.raises(ConfigError, match=r"card names apache-2\.0"):
        terms("license: apache-2.0", claim)
    with pytest.raises(ConfigError, match="not in the table"):
        terms("language: en", LicenceClaim(id="acme-terms", reason="x"))


def test_a_text_that_the_source_lacks_comes_with_the_release(tmp_path: Path) -> None:
    text = tmp_path / "gemma-terms.txt"
    text.write_text("the terms")
    claim = LicenceClaim(id="gemma", reason="from the owners' page", file=str(text))
    settled = terms("license: gemma", claim)
    made = licence_files(settled, claim, source("config.json"))
    assert made["LICENSE"] == b"the terms"
    require(settled, "acme/gemma-FP8", made.keys())
    assert settled.claim is not None and settled.claim.file == "gemma-terms.txt"
    with pytest.raises(ConfigError, match="the source has its own, LICENSE"):
        licence_files(settled, claim, source("LICENSE"))
    with pytest.raises(ConfigError, match="cannot be read"):
        licence_files(settled, claim.model_copy(update={"file": str(tmp_path / "none")}), source())


def test_a_notice_is_written_unless_the_source_brings_one(tmp_path: Path) -> None:
    settled = terms("license: llama3.1")
    assert settled.licence is not None
    made = licence_files(settled, None, source())
    assert settled.licence.notice in made["NOTICE"].decode()
    assert "acme/base at cccc" in made["NOTICE"].decode()
    folder = make_model(tmp_path / "model")
    (folder / "Notice").write_text("Something else.")
    assert list(licence_files(settled, None, resolve(str(folder)))) == ["NOTICE.txt"]
    (folder / "Notice").write_text(settled.licence.notice.replace("©", "(c)").replace(" ", "\n"))
    assert licence_files(settled, None, resolve(str(folder))) == {}
    assert licence_files(terms("license: mit"), None, source()) == {}


@pytest.mark.parametrize(
    ("front_matter", "entries"),
    [
        ("license: Llama 3.1", {"license": "llama3.1"}),
        (
            "license: other\nlicense_name: Qwen\nlicense_link: https://example.com/licence",
            {"license": "other", "license_name": "qwen", "license_link": "https://example.com/licence"},
        ),
        (
            "license: other\nlicense_name: qwen\nlicense_link: javascript:alert(1)",
            {"license": "other", "license_name": "qwen", "license_link": "LICENSE"},
        ),
        (
            "license: other\nlicense_name: deepseek\nlicense_link: LICENSE",
            {"license": "other", "license_name": "deepseek", "license_link": "LICENSE"},
        ),
    ],
)
def test_the_front_matter_has_what_the_hub_accepts(front_matter: str, entries: dict[str, str]) -> None:
    facts = facts_of(**licensed(f"---\n{front_matter}\n---\n"), files=("LICENSE", "NOTICE"))
    matter = yaml.safe_load(render_card(facts).split("---\n")[1])
    assert {key: value for key, value in matter.items() if key.startswith("license")} == entries


def test_the_card_says_what_is_wrong_with_the_sources() -> None:
    facts = facts_of(**licensed("---\nlicense: mit\nlanguage: Klingon\n---\n"))
    limits = plain(render_card(facts)).split("## Known limits")[1]
    assert "The source's own card is not clear: `language` in the source's README.md" in limits


def test_the_card_shows_what_the_licence_asks_for() -> None:
    card = plain(render_card(facts_of(**licensed("---\nlicense: llama3.2\n---\n"), files=("LICENSE.txt", "NOTICE"))))
    section = card.split("## Licence")[1].split("\n## ")[0]
    assert "**Built with Llama**" in section
    assert "Llama 3.2 is licensed under the Llama 3.2 Community License" in section
    assert "use-policy" in section and "NOTICE" in section
    assert "*.safetensors and config.json are changed" in section


def test_a_checkpoint_carries_the_sources_card_its_terms_and_its_notice(tmp_path: Path) -> None:
    folder, out = make_model(tmp_path / "model"), tmp_path / "out"
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n# Tiny")
    (folder / "LICENSE").write_text("the agreement")
    snapshot = resolve(str(folder))
    stages.quantize(snapshot, plan_of(folder, load_recipe("fp8-dynamic")), out, calibration=None)
    assert record_path(out, "source_card").read_text() == "---\nlicense: llama3.1\n---\n# Tiny"
    kept = Terms.load(record_path(out, "terms"))
    assert (kept.id, kept.problem) == ("llama3.1", "")
    assert (out / "LICENSE").read_text() == "the agreement"
    assert "Llama 3.1 Community License" in (out / "NOTICE").read_text()
    assert require_licence(snapshot, "acme/Llama-tiny-FP8") == ()
    with pytest.raises(Refused, match="begins with Llama"):
        require_licence(snapshot, "acme/tiny-FP8")


def test_a_teams_own_table_takes_the_place_of_the_shipped_one(tmp_path: Path) -> None:
    content: dict[str, Any] = {"licences": {"acme-terms": {"title": "Terms of Acme", "on_hub": False}}}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(content))
    folder = make_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: acme-terms\n---\n")
    snapshot = resolve(str(folder))
    with pytest.raises(Refused, match="not in the table"):
        require_licence(snapshot, "acme/tiny-FP8")
    require_licence(snapshot, "acme/tiny-FP8", licences=str(tmp_path / "own.yaml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        load_licences(str(tmp_path / "none.yaml"))


def test_a_licence_that_forbids_copies_says_why() -> None:
    with pytest.raises(ValueError, match="because"):
        LicenceTable.model_validate({"licences": {"x": {"title": "X", "publish": False}}})
