"""Everything that the Hub could refuse about the place of a release, asked before any work: only questions, no change.

    check_target(target, model_id, local=...)    the Clearance; raises for the first objection
    check_card(api, card)                        whether the Hub accepts a card's metadata
    require_replaceable(api, ...)                whether a release may take the place of what a commit holds

One rule decides who may see a release. fp8pipe sets the visibility of a repository that it creates itself, once, when
the release in it is verified. A repository that exists keeps the visibility that its owner chose, and a release that
would be seen by more people than it should be is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from fp8pipe.config import Target, Visibility
from fp8pipe.errors import InputError, Withdrawn
from fp8pipe.hub.account import account
from fp8pipe.hub.client import client, endpoint, translated
from fp8pipe.hub.collections import check_collection
from fp8pipe.hub.contents import GITATTRIBUTES, MANIFEST, files_at, json_at, read_at
from fp8pipe.hub.yanked import manifest_tag, without_banner, yanked_at
from fp8pipe.model.identity import CARD
from fp8pipe.records import RECORD_DIR

if TYPE_CHECKING:
    from huggingface_hub import HfApi, ModelInfo

MARK = f"{RECORD_DIR}/checkpoint.json"
"""A repository with this file was made by fp8pipe."""

Gating = Literal["auto", "manual"]


@dataclass(frozen=True, slots=True)
class Clearance:
    """What publishing needs to know about its target."""

    user: str
    """The owner of the token."""
    exists: bool
    """Whether the repository is there already."""
    visibility: Visibility
    """Who will see the release."""
    gating: Gating
    """How requests for access to a gated repository are answered."""
    note: str | None
    """Why this differs from what was asked for, for a person."""
    yanked: str | None
    """The tag of the repository's newest release, if that was withdrawn."""


def check_target(target: Target, model_id: str, *, local: bool, unfinished: bool = False) -> Clearance:
    """Ask the Hub everything about `target` that can be known before there is anything to publish.

    model_id: the base model; local: it is a folder of this machine. unfinished: an earlier run of the same release
    created the repository. Raises AccessDenied if the token is missing, unknown or may not write there; InputError for
    a repository or collection that cannot be used, whose visibility does not fit, or whose newest release was yanked;
    HubUnreachable.
    """
    from huggingface_hub.utils import validate_repo_id

    with translated(f"publishing to {target.repo_id}"):
        validate_repo_id(target.repo_id)
        api = client()
        owner = account(api)
        owner.require(target.repo_id)
        if target.collection is not None:
            check_collection(api, target.collection, owner)
        existing, yanked = _model(api, target.repo_id), None
        if existing is not None:
            api.auth_check(target.repo_id, write=True)
            assert existing.sha is not None
            if not target.replace:
                require_replaceable(api, target.repo_id, existing.sha, model_id)
            yanked = _require_superseded(api, target, existing.sha)
        base = None if local else _model(api, model_id)
        visibility, note = _visibility(target, model_id, base, None if unfinished else existing)
    gating: Gating = "manual" if base is not None and base.gated == "manual" else "auto"
    return Clearance(owner.user, existing is not None, visibility, gating, note, yanked)


def _require_superseded(api: HfApi, target: Target, commit: str) -> str | None:
    """The tag of the newest release if it was yanked, which this one says to supersede. Raises Withdrawn if not."""
    tag = manifest_tag(api, target.repo_id, commit)
    yank = yanked_at(api, target.repo_id, commit).of(tag) if tag is not None else None
    if yank is None:
        return None
    if yank.tag not in target.supersedes:
        raise Withdrawn(f"{target.repo_id}: its newest release {yank.sentence()}; {yank.remedy()}")
    return yank.tag


def _model(api: HfApi, repo_id: str) -> ModelInfo | None:
    """The repository; None if there is none, or none that the token may see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        return api.model_info(repo_id)
    except RepositoryNotFoundError:
        return None


# ------------------------------------------------------------------------------------------ who may see it


def visibility_of(model: ModelInfo) -> Visibility:
    """Who may read a repository."""
    return "private" if model.private else "gated" if model.gated else "public"


def _visibility(
    target: Target, model_id: str, base: ModelInfo | None, existing: ModelInfo | None
) -> tuple[Visibility, str | None]:
    """Who will see the release, and a note if that differs from what a person may expect."""
    wanted = target.visibility or ("private" if base is None else visibility_of(base))
    if existing is None:
        if target.visibility is None and base is None:
            return wanted, f"{model_id} is not on {endpoint()}, so its release is private; say visibility: public"
        return wanted, None
    found = visibility_of(existing)
    reach = get_args(Visibility).index
    if reach(found) > reach(wanted):
        why = "as this release asks for" if target.visibility else f"as its base model {model_id} is"
        raise InputError(
            f"{target.repo_id}: is {found}, and not {wanted} {why}; nothing was published. Make it {wanted} at "
            f"{endpoint()}/{target.repo_id}/settings, name another repository, or say visibility: {found}"
        )
    if reach(found) < reach(wanted):
        page = f"{endpoint()}/{target.repo_id}/settings"
        return found, f"{target.repo_id} is {found} and stays so, as its owner chose; {page} changes it"
    return found, None


# ------------------------------------------------------------------------------------------ the card


def check_card(api: HfApi, card: str) -> None:
    """Raise InputError with the Hub's own words if it does not accept the metadata of `card`."""
    from huggingface_hub.errors import BadRequestError
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    body = {"content": card, "repoType": "model"}
    answer = get_session().post(f"{endpoint()}/api/validate-yaml", json=body, headers=build_hf_headers(token=api.token))
    try:
        hf_raise_for_status(answer)
    except BadRequestError as error:
        said = "; ".join(str(one.get("message")) for one in answer.json().get("errors", ()))
        raise InputError(f"the metadata of the card: {endpoint()} does not accept it: {said or error}") from error


# ------------------------------------------------------------------------------------------ what is there already


def require_replaceable(api: HfApi, repo_id: str, commit: str, model_id: str) -> None:
    """Raise InputError if `commit` holds files that no release made, another model's release, or a card made by hand.

    A release replaces the whole repository, and what people wrote is theirs.
    """
    held = files_at(api, repo_id, commit)
    remedy = "name another repository, or say --replace (in a file, replace: true) to overwrite it"
    if MARK not in held:
        foreign = sorted(held.keys() - {GITATTRIBUTES})
        if foreign:
            raise InputError(
                f"{repo_id}: holds files that fp8pipe did not make ({', '.join(foreign[:3])}), and a release would "
                f"replace them; {remedy}"
            )
        return
    made_from = json_at(api, repo_id, commit, MARK).get("model_id")
    if made_from != model_id:
        raise InputError(f"{repo_id}: is a release of {made_from}, not of {model_id}; {remedy}")
    card = read_at(api, repo_id, commit, CARD)
    if card is not None and hashlib.sha256(without_banner(card)).hexdigest() != _card_of_release(api, repo_id, commit):
        raise InputError(f"{repo_id}: {CARD} was edited since the last release, and the next would undo that; {remedy}")


def _card_of_release(api: HfApi, repo_id: str, commit: str) -> str | None:
    """The sha256 of the card that the release at `commit` wrote, from its manifest; None if it cannot be told."""
    files = json_at(api, repo_id, commit, MANIFEST).get("files")
    listed = [one for one in files if isinstance(one, dict)] if isinstance(files, list) else []
    return next((str(one.get("sha256")) for one in listed if one.get("name") == CARD), None)
