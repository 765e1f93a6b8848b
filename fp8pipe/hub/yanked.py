"""Says on main that a release was withdrawn: in `fp8pipe/yanked.json`, and in a banner of the card.

    yanked_at(api, ...)        what a commit says
    say_yanked(api, ...)       make main say it; one commit, or none if it says so already
    without_banner(card)       the card as the release has it

The tag and the commit of the release stay what they are.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from pydantic import ValidationError

from fp8pipe.errors import InputError
from fp8pipe.hub.commits import settled
from fp8pipe.hub.contents import MANIFEST, YANKED, json_at, read_at
from fp8pipe.model.identity import CARD
from fp8pipe.records import Yank, Yanked

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_BEGIN, _END = b"<!-- fp8pipe: yanked -->\n", b"<!-- fp8pipe: end of yanked -->\n\n"
_BANNER = re.compile(_BEGIN + b".*?" + _END, re.DOTALL)
_FRONT_MATTER = re.compile(rb"\A---\n.*?\n---\n\n?", re.DOTALL)


def yanked_at(api: HfApi, repo_id: str, commit: str) -> Yanked:
    """The releases that were withdrawn, by a commit of main. Raises InputError if somebody else wrote that file."""
    content = read_at(api, repo_id, commit, YANKED)
    try:
        return Yanked() if content is None else Yanked.model_validate_json(content)
    except ValidationError as error:
        raise InputError(
            f"{repo_id}: {YANKED} is not what fp8pipe writes there; remove it, and yank again what was yanked"
        ) from error


def manifest_tag(api: HfApi, repo_id: str, commit: str) -> str | None:
    """The tag of the release that a commit holds, by its manifest; None if it holds none."""
    tag = json_at(api, repo_id, commit, MANIFEST).get("tag")
    return tag if isinstance(tag, str) else None


def without_banner(card: bytes) -> bytes:
    """The card as its release has it."""
    return _BANNER.sub(b"", card, count=1)


def with_banner(card: bytes, text: str) -> bytes:
    """The card with a banner below its front matter, in place of an earlier one. `text`: Markdown."""
    card = without_banner(card)
    begin = found.end() if (found := _FRONT_MATTER.match(card)) else 0
    return card[:begin] + _BEGIN + text.encode() + b"\n" + _END + card[begin:]


def say_yanked(
    api: HfApi, repo_id: str, tag: str, yank: Callable[[Yank | None], Yank], banner: Callable[[Yank], str]
) -> tuple[Yank, bool, str, bool]:
    """Make main say that the release `tag` was withdrawn, and show a banner if it is the one that main shows.

    yank: the entry to make, given the one that is there. Returns the entry, whether main shows that release, and the
    commit, and whether this call made it.
    """
    from huggingface_hub import CommitOperationAdd

    first: list[str] = []

    def attempt() -> tuple[Yank, bool, str, bool] | None:
        head = api.model_info(repo_id).sha
        assert head is not None
        first.append(head)
        known = yanked_at(api, repo_id, head)
        entry, newest = yank(known.of(tag)), manifest_tag(api, repo_id, head) == tag
        wanted = {YANKED: known.adding(entry).model_dump_json(indent=1).encode() + b"\n"}
        if newest:
            wanted[CARD] = with_banner(read_at(api, repo_id, head, CARD) or b"", banner(entry))
        changed = {name: content for name, content in wanted.items() if read_at(api, repo_id, head, name) != content}
        if not changed:
            return entry, newest, head, head != first[0]
        api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=content) for name, content in changed.items()],
            commit_message=f"Yank {tag}",
            parent_commit=head,
        )
        return None

    return settled(repo_id, attempt)
