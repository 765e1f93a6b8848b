"""What could not be published at its end is refused at its beginning, whatever it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.sample_folders import write_model

from fp8pipe.config import ReleaseSpec, Sign
from fp8pipe.errors import ConfigError, Fp8PipeError, HubUnreachable, InputError, Refused
from fp8pipe.hub.client import client
from fp8pipe.hub.source import resolve
from fp8pipe.rehearsal.localhub import Disruption, LocalHub
from fp8pipe.release.admission import require_admission

README = "---\nlicense: mit\nlanguage: [English]\n---\n"


@pytest.fixture
def source(hub: LocalHub, repo_id: str, tmp_path: Path) -> str:
    """A source model on the Hub, with a licence that permits copies."""
    source = f"{repo_id}-source"
    folder = write_model(tmp_path / "source")
    (folder / "README.md").write_text(README)
    client().create_repo(source)
    client().upload_folder(repo_id=source, folder_path=folder)
    return source


def ask(source: str, **fields: Any) -> tuple[str, ...]:
    known: dict[str, Any] = {"model": source, "repo_id": source.replace("-source", "-FP8"), "collection": "acme/FP8"}
    return require_admission(ReleaseSpec(**(known | fields)).resolve(), resolve(source))


def test_what_can_be_published_is_admitted_without_a_change_on_the_hub(source: str) -> None:
    before = {model.id for model in client().list_models(author="acme")}
    ask(source)
    assert {model.id for model in client().list_models(author="acme")} == before


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"repo_id": "acme/a..b"}, InputError, "allows no such name"),
        ({"collection": f"acme/{'x' * 60}"}, InputError, "a title of 60 characters"),
        ({"collection": "acme"}, InputError, "expected namespace/title"),
        ({"collection": f"acme/fp8-{'0' * 24}"}, InputError, "acme/fp8-0"),
        ({"sign": Sign(key="/no/such/key.pem")}, Fp8PipeError, "key.pem"),
        ({"licences": "/no/such/table.yaml"}, ConfigError, "table.yaml"),
        ({"licence": {"id": "apache-2.0", "reason": "so they say"}}, ConfigError, "card names mit"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_each_field_that_could_not_be_published_is_refused(
    source: str, fields: dict[str, Any], error: type[Exception], said: str
) -> None:
    with pytest.raises(error) as refusal:
        ask(source, **fields)
    assert said in str(refusal.value)


def test_a_template_that_names_what_no_card_has_is_refused(source: str, tmp_path: Path) -> None:
    own = tmp_path / "own.md.j2"
    own.write_text("{{ front_matter }}\n{{ nonsense }}")
    with pytest.raises(ConfigError, match="no value nonsense"):
        ask(source, card_template=str(own))


def test_a_licence_that_forbids_copies_is_refused(source: str) -> None:
    readme = b"---\nlicense: cc-by-nd-4.0\n---\n"
    client().upload_file(repo_id=source, path_in_repo="README.md", path_or_fileobj=readme)
    with pytest.raises(Refused):
        ask(source)


def test_metadata_that_the_hub_does_not_accept_is_refused_in_its_words(
    source: str, break_hub: Callable[..., None]
) -> None:
    break_hub(Disruption(path="/validate-yaml", action="status", status=400, method="POST"))
    with pytest.raises(InputError, match="the metadata of the card"):
        ask(source)
    break_hub(Disruption(path="/validate-yaml", action="status", status=503, method="POST"))
    with pytest.raises(HubUnreachable):
        ask(source)
