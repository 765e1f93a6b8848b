"""The client of huggingface_hub, and the translation of its errors into ours.

In: the environment (HF_ENDPOINT, HF_TOKEN or the stored login, HF_HUB_CACHE). Out: a quiet `HfApi`, and `translated`,
which turns the library's errors into those of `errors.py`, with what was asked, which Hub was asked, and what to do
next. Nothing is retried here: HubUnreachable is transient, and the caller of a stage decides how often to try. Only a
Hub that says how long to wait (HTTP 429) is waited for, as its quotas are hourly, and no caller would try that long.
"""

from __future__ import annotations

import errno
import functools
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import (
    AccessDenied,
    DiskTooSmall,
    EnvironmentFault,
    Fp8PipeError,
    HubUnreachable,
    InputError,
    ModelNotFound,
    RevisionNotFound,
)
from fp8pipe.machine.loopback import exempt_loopback
from fp8pipe.machine.supervise import NO_LOGIN, TOKENS

if TYPE_CHECKING:
    import httpx2
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

CONNECT_TIMEOUT_S = 10.0
ANSWER_TIMEOUT_S = 120.0
"""The longest pause within one answer of the Hub. By itself, huggingface_hub waits forever."""
LONGEST_WAIT_S = 2 * 3600.0
"""A Hub that asks to wait for longer is answered with an error."""

_on_wait: ContextVar[Callable[[float], None] | None] = ContextVar("on_wait", default=None)


def endpoint() -> str:
    """The Hub's address, without a slash at the end."""
    return os.environ.get("HF_ENDPOINT", "").rstrip("/") or "https://huggingface.co"


def cache_folder() -> Path:
    """The folder of the Hub cache, by the present environment; huggingface_hub read its own at import."""
    from huggingface_hub import constants

    if chosen := os.environ.get("HF_HUB_CACHE"):
        return Path(chosen).expanduser()
    home = os.environ.get("HF_HOME")
    return Path(home).expanduser() / "hub" if home else Path(constants.HF_HUB_CACHE)


def client() -> HfApi:
    """A client of `endpoint()` that uses HF_TOKEN or the stored login."""
    from huggingface_hub import HfApi, constants

    exempt_loopback()  # a worker's flow does not come through the command line
    _make_quiet_and_impatient()
    # huggingface_hub reads its environment at import, but a Hub that was started since may not speak Xet.
    constants.HF_HUB_DISABLE_XET = os.environ.get("HF_HUB_DISABLE_XET", "").upper() in {"1", "ON", "YES", "TRUE"}
    return HfApi(endpoint=endpoint())


def forget_token() -> None:
    """This process and those that it starts have no token any more, neither given nor stored."""
    from huggingface_hub import constants

    for name in TOKENS:
        os.environ.pop(name, None)
    os.environ.update(NO_LOGIN)
    constants.HF_TOKEN_PATH = os.devnull  # read from the environment at import


@functools.cache
def _make_quiet_and_impatient() -> None:
    """Once per process: turn off the library's bars and warnings, as we have our own, and limit every wait."""
    import httpx2
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging
    from huggingface_hub.utils._http import default_client_factory

    class Client(httpx2.Client):
        """A client that waits for as long as the Hub asks, and sends the request again."""

        def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:  # Any: those of the base class
            while True:
                response = super().send(request, **options)
                # a body that comes from a file or generator is gone; huggingface_hub itself sends those again
                wait = _asked_wait(response) if isinstance(request.stream, httpx2.ByteStream) else None
                if wait is None or wait > LONGEST_WAIT_S:
                    return response
                response.close()
                if (told := _on_wait.get()) is not None:
                    told(wait)
                time.sleep(wait)

    def patient() -> httpx2.Client:
        usual = default_client_factory()
        timeout = httpx2.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S)
        return Client(event_hooks=usual.event_hooks, follow_redirects=usual.follow_redirects, timeout=timeout)

    disable_progress_bars()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", module=r"huggingface_hub\.|httpx2\.")
    set_client_factory(patient)


_AGAIN_IN = re.compile(r"retry this action in (\d+) (second|minute|hour)s?", re.IGNORECASE)
"""The Hub's message when its quota of commits is used up. Its headers are no help then: they describe the quota of
requests."""
_UNITS_S = {"second": 1, "minute": 60, "hour": 3600}


def _asked_wait(response: httpx2.Response) -> float | None:
    """How many seconds the Hub asks to wait before the same request may succeed; None if it asks for no wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    if response.status_code != 429:
        return None
    said = _AGAIN_IN.search(response.read().decode(errors="replace"))
    limit = parse_ratelimit_headers(response.headers)
    after = response.headers.get("retry-after", "")
    waits = [
        int(said[1]) * _UNITS_S[said[2].lower()] if said else 0,
        limit.reset_in_seconds if limit is not None and limit.remaining == 0 else 0,
        int(after) if after.isdecimal() else 0,
    ]
    return max(waits) + 1.0 if any(waits) else None  # a second more, as all of these are rounded


@contextmanager
def waits_told_to(tell: Callable[[float], None]) -> Iterator[None]:
    """Call `tell` with the seconds that the Hub asks to wait for, before each wait."""
    before = _on_wait.set(tell)
    try:
        yield
    finally:
        _on_wait.reset(before)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Run Hub calls; `what` names the request in messages, as in "model org/name@main".

    Raises ModelNotFound, RevisionNotFound, AccessDenied, InputError, HubUnreachable, DiskTooSmall or EnvironmentFault
    in place of the library's errors, which become the cause. Other errors pass unchanged.
    """
    try:
        yield
    except Fp8PipeError:
        raise
    except (OSError, RuntimeError, ValueError, _foreign()) as error:
        ours = _translation(what, error)
        if ours is None:
            raise
        raise ours from error


def _foreign() -> type[Exception]:
    """The base class of the HTTP library's errors. An except clause calls this only on an error: the import is late."""
    import httpx2

    return httpx2.HTTPError


def _translation(what: str, error: BaseException) -> Fp8PipeError | None:
    """Our error for the first one in the chain of causes that we know; None if we know none.

    The library wraps the 503 of an upload in a RuntimeError, and an unreachable Hub in LocalEntryNotFoundError.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError

    link: BaseException | None = error
    while link is not None:
        if (ours := _one_translation(what, link)) is not None:
            return ours
        link = link.__cause__
    if isinstance(error, LocalEntryNotFoundError):
        return HubUnreachable(f"{what}: {endpoint()} gave no usable answer, and the cache does not have it: {error}")
    return None


def _one_translation(what: str, error: BaseException) -> Fp8PipeError | None:
    import httpx2
    from huggingface_hub import errors as hub

    match error:
        case hub.HfHubHTTPError():
            return _of_answer(what, error)
        case hub.OfflineModeIsEnabled():
            return HubUnreachable(f"{what}: HF_HUB_OFFLINE is set and the file is not cached; unset it and try again")
        case httpx2.TransportError():
            reason = str(error) or type(error).__name__
            return HubUnreachable(
                f"{what}: {endpoint()} cannot be reached ({reason}); check HF_ENDPOINT and the network"
            )
        case hub.LocalTokenNotFoundError():
            return AccessDenied(f"{what}: no token; set HF_TOKEN or log in with `hf auth login`")
        case hub.HFValidationError():
            return InputError(f"{what}: the Hub allows no such name: {error}")
        case hub.FileMetadataError() | json.JSONDecodeError():
            return HubUnreachable(f"{what}: the answer of {endpoint()} is not a Hub's ({error}); check HF_ENDPOINT")
        case OSError(errno=errno.ENOSPC):
            return DiskTooSmall(
                f"{what}: the disk is full: {error}; free some space and run again; finished files are kept"
            )
        case OSError() if "Consistency check failed" in str(error):
            return HubUnreachable(f"{what}: the transfer from {endpoint()} was cut off: {error}")
        case _:
            return None


def _of_answer(what: str, error: HfHubHTTPError) -> Fp8PipeError:
    """Our error for an HTTP status."""
    from huggingface_hub import errors as hub

    status = error.response.status_code
    said = error.server_message or "no reason given"
    match error:
        case hub.GatedRepoError():
            page = f"{endpoint()}/{error.repo_id}" if error.repo_id else endpoint()
            return AccessDenied(f"{what}: gated; ask for access at {page}, then {_login(error.response.request)}")
        case hub.RepositoryNotFoundError():
            return ModelNotFound(
                f"{what}: not found on {endpoint()}. Check the name; {_if_private(error.response.request)}"
            )
        case hub.RevisionNotFoundError():
            return RevisionNotFound(
                f"{what}: {endpoint()} does not have this revision; name another branch, tag or commit"
            )
        case hub.RemoteEntryNotFoundError():
            return InputError(f"{what}: no such file on {endpoint()}")
    if status in {401, 403} or isinstance(error, hub.DisabledRepoError):
        return AccessDenied(f"{what}: {endpoint()} refuses access: {said}; {_login(error.response.request)}")
    if status in {408, 429} or status >= 500:
        return HubUnreachable(f"{what}: {endpoint()} answered HTTP {status}: {said}; try again later")
    if status in {400, 404, 422}:
        return InputError(f"{what}: {endpoint()} rejects the request: {said}")
    return EnvironmentFault(f"{what}: {endpoint()} answered HTTP {status}: {said}")


def _login(request: httpx2.Request) -> str:
    if "authorization" in request.headers:
        return "use a token of an account that has access (HF_TOKEN or `hf auth login`)"
    return "set HF_TOKEN or run `hf auth login`: no token was sent"


def _if_private(request: httpx2.Request) -> str:
    """What to do if the model is private: the Hub gives the same answer as for one that does not exist."""
    return f"if it is private, {_login(request)}"
