"""What every route needs from a request: the Hub behind it, the caller, the repository that the path names, paging.

Revisions and file names in paths may hold quoted slashes (`refs%2Fpr%2F1`). Servers unquote a path before they route
it, so `KeepQuotedSlashes` hides these slashes from the router, and the path convertors here restore them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import unquote, urlencode

from starlette.convertors import Convertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import JSONResponse

from fp8pipe.rehearsal.localhub.access import TokenOwner, Tokens, caller_of, may_see, must_see, must_write_in
from fp8pipe.rehearsal.localhub.refusals import Refusal, repo_not_found
from fp8pipe.rehearsal.localhub.store import RESERVED_NAMESPACES, Kind, Repo, Store

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from fp8pipe.rehearsal.localhub.collections import Collections
    from fp8pipe.rehearsal.localhub.discussions import Discussions

T = TypeVar("T")
HIDDEN_SLASH = "\x1f"
_JSON_NAMES = {str: "a string", int: "a whole number", bool: "true or false", list: "a list", dict: "an object"}


@dataclass(frozen=True, slots=True)
class Hub:
    """Everything behind the routes."""

    store: Store
    collections: Collections
    discussions: Discussions
    tokens: Tokens
    upload_key: bytes
    """Signs upload addresses, which carry no token."""


class KeepQuotedSlashes:
    """ASGI middleware: `%2F` in a path reaches the router as one hidden character, not as a separator."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = scope["raw_path"].decode("ascii").partition("?")[0].replace(HIDDEN_SLASH, "")
            path = unquote(raw.replace("%2F", "%1F").replace("%2f", "%1F"))
            scope = {**scope, "path": path}
        await self._app(scope, receive, send)


class QuotedConvertor(Convertor[str]):
    """A path parameter in which hidden slashes become slashes again."""

    def convert(self, value: str) -> str:
        return value.replace(HIDDEN_SLASH, "/")

    def to_string(self, value: str) -> str:
        return value


class RevisionConvertor(QuotedConvertor):
    """A branch, tag or commit, or a ref such as refs/pr/1 with plain slashes."""

    regex = "(?:refs/[^/]+/[^/]+|[^/]+)"


class FileConvertor(QuotedConvertor):
    """The rest of the path: a file or folder of a repository."""

    regex = ".+"


class RepoConvertor(QuotedConvertor):
    """namespace/name, unless the server keeps the namespace for its own addresses."""

    regex = f"(?!(?:{'|'.join(sorted(RESERVED_NAMESPACES))})/)[^/]+/[^/]+"


class KindConvertor(QuotedConvertor):
    """models or datasets."""

    regex = "models|datasets"


register_url_convertor("rev", RevisionConvertor())
register_url_convertor("file", FileConvertor())
register_url_convertor("repo", RepoConvertor())
register_url_convertor("kind", KindConvertor())


def hub_of(request: Request) -> Hub:
    """The Hub that the application serves."""
    return request.app.state.hub


def caller(request: Request) -> TokenOwner | None:
    """Who asks; None for an anonymous request."""
    return caller_of(request.headers.get("authorization"), hub_of(request).tokens)


def kind_of(request: Request) -> Kind:
    """The kind of repository that the path names; outside /api, models have no prefix."""
    kind = request.path_params.get("kind")
    if kind is None:
        kind = "datasets" if request.scope["path"].startswith("/datasets/") else "models"
    return kind


def visible_repo(request: Request) -> Repo:
    """The repository that the path names. Refused as not found if the caller may not see it."""
    who = caller(request)
    repo_id = request.path_params["repo"]
    repo = hub_of(request).store.find(kind_of(request), repo_id)
    if repo is None:
        raise repo_not_found(repo_id, signed_in=who is not None)
    must_see(repo, who)
    return repo


def writable_repo(request: Request) -> tuple[Repo, TokenOwner]:
    """The repository that the path names, and the caller. Refused unless the caller may write in it."""
    repo = visible_repo(request)
    return repo, must_write_in(repo.namespace, caller(request), repo.id)


def revision_of(request: Request) -> str:
    """The revision that the path names; main if it names none."""
    return request.path_params.get("rev", "main")


def visible(request: Request, repos: Sequence[Repo]) -> list[Repo]:
    """The repositories that the caller may see."""
    who = caller(request)
    return [repo for repo in repos if may_see(repo, who)]


async def json_object(request: Request) -> dict[str, Any]:
    """The JSON object in the body; an empty body is an empty object."""
    try:
        body = json.loads(await request.body() or b"{}")
    except ValueError as error:
        raise Refusal(400, f"Expected a JSON object as the body: {error}") from error
    if not isinstance(body, dict):
        raise Refusal(400, f"Expected a JSON object as the body, found {type(body).__name__}")
    return body


def field(body: object, name: str, kind: type[T], default: T | None = None) -> T:
    """A field of a JSON object. Refused if `body` is no object, or the field is no `kind`. null counts as missing; what
    is missing and has no default is refused as well."""
    if not isinstance(body, dict):
        raise Refusal(400, f"Expected a JSON object with {name!r}, found {type(body).__name__}")
    value = default if body.get(name) is None else body[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is int):
        raise Refusal(400, f"{name!r}: expected {_JSON_NAMES[kind]}, found {value!r}")
    return value


def text_field(body: object, name: str, default: str | None = None) -> str:
    """A string in a JSON body."""
    return field(body, name, str, default)


def digest_field(body: object, name: str) -> str:
    """A sha256 in a JSON body. It becomes a file name of the store, so nothing else may pass."""
    return must_be_digest(field(body, name, str))


def must_be_digest(oid: str) -> str:
    """The sha256; refused unless it is one, in 64 lower-case hex digits."""
    if not re.fullmatch("[0-9a-f]{64}", oid):
        raise Refusal(400, f"{oid!r} is no sha256; expected 64 lower-case hex digits")
    return oid


def endpoint_of(request: Request) -> str:
    """This Hub's address as the client wrote it, without a slash at the end; addresses in answers start with it."""
    return str(request.base_url).rstrip("/")


def page(request: Request, items: Sequence[object], size: int) -> JSONResponse:
    """`size` items of a listing from the query's cursor on; `Link: rel="next"` leads to the next page."""
    start = int_query(request, "cursor", 0)
    headers = {}
    if start + size < len(items):
        others = [(key, value) for key, value in request.query_params.multi_items() if key != "cursor"]
        path = request.scope["raw_path"].decode("ascii").partition("?")[0]
        following = f"{endpoint_of(request)}{path}?{urlencode([*others, ('cursor', start + size)])}"
        headers["Link"] = f'<{following}>; rel="next"'
    return JSONResponse(items[start : start + size], headers=headers)


def int_query(request: Request, name: str, default: int) -> int:
    """A non-negative whole number in the query. Refused if it is something else."""
    text = request.query_params.get(name)
    if text is None:
        return default
    if not text.isdecimal():
        raise Refusal(400, f"{name!r}: expected a non-negative number, found {text!r}")
    return int(text)


def flag_query(request: Request, name: str) -> bool:
    """A flag in the query; true as the client spells it, `1` or `true`."""
    return request.query_params.get(name, "").lower() in {"1", "true"}
