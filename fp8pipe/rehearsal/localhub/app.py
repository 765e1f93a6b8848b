"""The Hub as an ASGI application: routes over a state folder.

Comes in: the folder, the tokens, faults if wanted. Goes out: a Starlette application that the unmodified clients,
huggingface_hub and `datasets`, talk to.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub import (
    pages,
    routes_collections,
    routes_commits,
    routes_discussions,
    routes_files,
    routes_repos,
)
from fp8pipe.rehearsal.localhub.access import Tokens
from fp8pipe.rehearsal.localhub.discussions import Discussions
from fp8pipe.rehearsal.localhub.faults import Faults, FaultyServer, list_faults, set_faults
from fp8pipe.rehearsal.localhub.refusals import Refusal, answer_refusal, repo_not_found
from fp8pipe.rehearsal.localhub.requests import Hub, KeepQuotedSlashes
from fp8pipe.rehearsal.localhub.shelves import Shelves
from fp8pipe.rehearsal.localhub.store import Store


def create_app(root: Path, tokens: Tokens, faults: Faults | None = None) -> Starlette:
    """The Hub whose state is in `root`. `tokens` says who may do what; with `faults`, /_faults exists."""
    store = Store(root)
    shelves = Shelves(store)
    routes = [
        *routes_repos.ROUTES,
        *routes_files.ROUTES,
        *routes_commits.ROUTES,
        *routes_collections.ROUTES,
        *routes_discussions.ROUTES,
        *pages.ROUTES,  # last: /namespace/name fits many paths
    ]
    middleware = [Middleware(KeepQuotedSlashes)]
    if faults is not None:
        routes += [Route("/_faults", set_faults, methods=["POST"]), Route("/_faults", list_faults)]
        middleware.insert(0, Middleware(FaultyServer, faults=faults, blobs=root / "blobs"))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={Refusal: answer_refused, HTTPException: answer_unrouted},
    )
    app.state.hub = Hub(store, shelves, Discussions(store), tokens, secrets.token_bytes(32))
    app.state.faults = faults
    return app


async def answer_refused(request: Request, error: Exception) -> Response:
    """A refusal: JSON for clients, a page for people. The headers are the same."""
    assert isinstance(error, Refusal)
    answer = answer_refusal(error)
    if request.scope["path"].startswith("/api/") or "text/html" not in request.headers.get("accept", ""):
        return answer
    shown = pages.error_page(request, error)
    shown.headers.update({name: value for name, value in answer.headers.items() if name.startswith("x-")})
    return shown


async def answer_unrouted(request: Request, error: Exception) -> Response:
    """A path or method without a route. A repository path that is not namespace/name names no repository."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404 and path.startswith(("/api/models/", "/api/datasets/")):
        name = path.split("/")[3]
        return await answer_refused(request, repo_not_found(name, signed_in=True))
    return await answer_refused(request, Refusal(error.status_code, f"{request.method} {path}: {error.detail}"))
