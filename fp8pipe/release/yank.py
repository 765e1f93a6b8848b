"""Withdraw a release: main says so, its collections no longer list it, and its tag stays for those who rely on it.

    yank("org/model", reason)          the newest release
    yank("org/model@tag", reason)      that release

Safe to repeat: what is done already is not done again.
"""

from __future__ import annotations

from datetime import UTC, datetime

from fp8pipe.errors import InputError, RevisionNotFound
from fp8pipe.hub.account import account
from fp8pipe.hub.client import client, endpoint, translated
from fp8pipe.hub.collections import remove_from_collections
from fp8pipe.hub.yanked import manifest_tag, say_yanked
from fp8pipe.records import Withdrawal, Yank
from fp8pipe.release.card.markdown import code, escape
from fp8pipe.release.tags import is_release


def yank(release: str, reason: str) -> Withdrawal:
    """Withdraw `release`, a repository or `repository@tag`. Given again with another reason, that replaces the first.

    Only the newest release has its banner in the card and leaves the collections: main shows no other.

    Raises InputError for a reason without words or a repository without a release, RevisionNotFound, ModelNotFound,
    AccessDenied, HubUnreachable.
    """
    reason = " ".join(reason.split())
    if not reason:
        raise InputError("a yank needs a reason, which the card shows; give one")
    repo_id, _, tag = release.partition("@")
    api = client()
    with translated(f"yanking {release}"):
        owner = account(api)
        owner.require(repo_id)
        tag = _release_tag(repo_id, tag)

        def entry(known: Yank | None) -> Yank:
            if known is not None and known.reason == reason:
                return known
            return Yank(tag=tag, by=owner.user, when=datetime.now(UTC).isoformat(timespec="seconds"), reason=reason)

        made, newest, commit, new_commit = say_yanked(api, repo_id, tag, entry, banner)
        left = remove_from_collections(api, repo_id, owner) if newest else ()
    return Withdrawal(repo_id=repo_id, yank=made, newest=newest, commit=commit, new_commit=new_commit, left=left)


def banner(yank: Yank) -> str:
    """What the card says of a release that was withdrawn: Markdown that no reason can break."""
    return (
        f"> **Yanked: do not use this release.** {escape(yank.by)} withdrew {code(yank.tag)} on {yank.when[:10]}: "
        f"{escape(yank.reason)}\n>\n> The tag stays for those who rely on it."
    )


def _release_tag(repo_id: str, asked: str) -> str:
    """The tag that was asked for, or that of the newest release."""
    api = client()
    tags = {ref.name for ref in api.list_repo_refs(repo_id).tags if is_release(ref.name)}
    wanted = asked or manifest_tag(api, repo_id, "main")
    if not tags or wanted is None:
        raise InputError(f"{repo_id}: {endpoint()} has no release of fp8pipe there; nothing to yank")
    if wanted not in tags:
        raise RevisionNotFound(f"{repo_id}: no release {wanted}; its releases are {', '.join(sorted(tags))}")
    return wanted
