"""The tag of a release: which checkpoint it is, and its place among the releases of its repository.

    fp8-ab12cd34-2      the second release of the repository, of the checkpoint whose fingerprint starts with ab12cd34

A checkpoint that is released again with other evidence, another card or another policy gets the next number. A tag is
made once, after its commit was verified, and never moves.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_TAG = re.compile(r"fp8-([0-9a-f]{8})-([1-9]\d*)")


def is_release(tag: str) -> bool:
    """Whether a tag is one of a release."""
    return _TAG.fullmatch(tag) is not None


def tag_of(fingerprint: str, number: int) -> str:
    """The tag of the repository's release `number`, of the checkpoint with this fingerprint."""
    return f"fp8-{fingerprint[:8]}-{number}"


def newest(tags: Iterable[str], fingerprint: str) -> str | None:
    """The tag of the repository's newest release, if that is one of this checkpoint.

    Two publishers at once may have given one number to two checkpoints; both are the newest then.
    """
    number = _last(tags := tuple(tags))
    tag = tag_of(fingerprint, number)
    return tag if tag in tags else None


def following(tags: Iterable[str], fingerprint: str) -> str:
    """The tag of the next release of this checkpoint."""
    return tag_of(fingerprint, _last(tags) + 1)


def _last(tags: Iterable[str]) -> int:
    """The number of the newest release; 0 if there is none."""
    return max((int(found[2]) for tag in tags if (found := _TAG.fullmatch(tag))), default=0)
