"""Commits on a Hub whose answers may be lost, and which others write to at the same time."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fp8pipe.errors import EnvironmentFault

T = TypeVar("T")

ROUNDS = 4
"""How often a commit is tried. Each round reads again what the Hub has, as an answer may have been lost, or another
publisher may have come first."""


def settled(repo_id: str, attempt: Callable[[], T | None]) -> T:
    """What `attempt` returns once it finds nothing left to do.

    An attempt reads the head of main, works out what is left to do, does it on that head and returns None. Where the
    Hub's answer leaves open what was applied, the next attempt finds out. Raises the last such error, or
    EnvironmentFault, if there is something to do after the last of ROUNDS attempts.
    """
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    failure: Exception | None = None
    for _ in range(ROUNDS):
        try:
            found = attempt()
        except HfHubHTTPError as error:
            # 409 and 412: another commit or merge came first; 5xx: the answer may be lost, not the commit
            if error.response.status_code not in {409, 412} and error.response.status_code < 500:
                raise
            failure = error
        except httpx2.TransportError as error:
            failure = error
        else:
            if found is not None:
                return found
            failure = None
    if failure is not None:
        raise failure
    raise EnvironmentFault(f"{repo_id}: main kept changing while this was committed; run again")
