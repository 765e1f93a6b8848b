"""What could stop a release at its end, asked before its first work.

require_admission(job, source)    everything that the Hub, the licence or the card would refuse
licence_terms(source)             what the source's licence asks of a copy
terms_and_files(source)           the same, with the files that fulfil it
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.config import LicenceClaim, ResolvedRelease, load_licences, read_template
from fp8pipe.hub.client import client, translated
from fp8pipe.hub.source import companion_files
from fp8pipe.hub.source_card import parse_source_card, read_source_card
from fp8pipe.hub.target import check_card, check_target
from fp8pipe.records import Snapshot, Terms
from fp8pipe.release.card.metadata import expected_front_matter
from fp8pipe.release.card.render import check_template
from fp8pipe.release.licence import licence_files, require, settle
from fp8pipe.release.signature import public_half


def require_admission(job: ResolvedRelease, source: Snapshot) -> tuple[str, ...]:
    """Refuse a release that could not be published: because of its repository, under the name of each recipe of the
    ladder, its collection, the token, who would see it, the source's licence, a key that cannot sign it, its card's
    template, or metadata that the Hub does not accept.

    Returns notes for a person. Raises as `fp8pipe.hub.target.check_target` and `require_licence` do; ConfigError for
    the template; InputError for the key or the metadata.
    """
    spec = job.spec
    if spec.sign is not None:
        public_half(Path(spec.sign.key))
    if spec.card_template is not None:
        check_template(read_template(spec.card_template))
    notes: list[str] = []
    for rung in job.ladder():
        target = rung.spec.target
        clearance = check_target(target, source.model_id, local=source.is_local)
        notes += [clearance.note] if clearance.note is not None else []
        notes += require_licence(source, target.repo_id, claim=spec.licence, licences=spec.licences)
        _check_metadata(rung, source)
    return tuple(dict.fromkeys(notes))


def _check_metadata(job: ResolvedRelease, source: Snapshot) -> None:
    """Ask the Hub whether it accepts the card's metadata, as far as it is known before the measurement."""
    spec, recipe = job.spec, job.recipe
    terms, _, made = terms_and_files(source, spec.licence, spec.licences)
    metadata = expected_front_matter(
        spec.repo_id,
        source,
        recipe,
        source_card=parse_source_card(read_source_card(source)),
        terms=terms,
        files=sorted({file.name for file in source.files} | made.keys()),
        dataset=recipe.calibration.dataset if recipe.needs_calibration else None,
    )
    with translated(f"publishing to {spec.repo_id}"):
        check_card(client(), f"---\n{metadata}\n---\n")


# ------------------------------------------------------------------------------------------ licence


def licence_terms(
    source: Snapshot, *, claim: LicenceClaim | None = None, licences: str | None = None
) -> tuple[Terms, tuple[str, ...]]:
    """What the source's licence asks of a copy, by its card at the pinned commit, and what is wrong with that card.

    claim: the team's word where the card leaves the licence open. licences: the file that says what each asks for.
    """
    card = parse_source_card(read_source_card(source))
    return settle(card, load_licences(licences), claim), card.problems


def require_licence(
    source: Snapshot, repo_id: str, *, claim: LicenceClaim | None = None, licences: str | None = None
) -> tuple[str, ...]:
    """Refuse, before any work, what could not be published as `repo_id`. Returns what is wrong with the source's card.

    Raises Refused; ConfigError for a claim that contradicts the card, or whose file cannot be read.
    """
    terms, problems, made = terms_and_files(source, claim, licences)
    require(terms, repo_id, {file.name for file in companion_files(source)} | made.keys())
    return problems


def terms_and_files(
    source: Snapshot, claim: LicenceClaim | None, licences: str | None
) -> tuple[Terms, tuple[str, ...], dict[str, bytes]]:
    """The terms, what is wrong with the source's card, and the files that a copy needs because of them."""
    terms, problems = licence_terms(source, claim=claim, licences=licences)
    return terms, problems, licence_files(terms, claim, source)
