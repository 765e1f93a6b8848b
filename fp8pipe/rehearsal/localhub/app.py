"""The Hub as an ASGI application: routes over a state folder.

Comes in: the folder, the tokens, and disruptions if wanted. Goes out: a Starlette application to which the unmodified
clients, huggingface_hub and `datasets`, can talk.
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
from fp8pipe.rehearsal.localhub.collections import Collections
from fp8pipe.rehearsal.localhub.discussions import Discussions
from fp8pipe.rehearsal.localhub.disruptions import DisruptedServer, Disruptions, list_disruptions, set_disruptions
from fp8pipe.rehearsal.localhub.refusals import Refusal, answer_refusal, repo_not_found
from fp8pipe.rehearsal.localhub.requests import Hub, KeepQuotedSlashes
from fp8pipe.rehearsal.localhub.store import Store


def create_app(root: Path, tokens: Tokens, disruptions: Disruptions | None = None) -> Starlette:
    """The Hub whose state is in `root`. `tokens` says who may do what; `disruptions` opens /_disruptions."""
    store = Store(root)
    collections = Collections(store)
    routes = [
        *routes_repos.ROUTES,
        *routes_files.ROUTES,
        *routes_commits.ROUTES,
        *routes_collections.ROUTES,
        *routes_discussions.ROUTES,
        *pages.ROUTES,  # last: /namespace/name fits many paths
    ]
    middleware = [Middleware(KeepQuotedSlashes)]
    if disruptions is not None:
        routes += [Route("/_disruptions", set_disruptions, methods=["POST"]), Route("/_disruptions", list_disruptions)]
        middleware.insert(0, Middleware(DisruptedServer, disruptions=disruptions, blobs=root / "blobs"))
    app = Starlette(
        routes=routes,
        middleware=middleware,
        exception_handlers={Refusal: answer_refused, HTTPException: answer_unrouted},
    )
    app.state.hub = Hub(store, collections, Discussions(store), tokens, secrets.token_bytes(32))
    app.state.disruptions = disruptions
    return app


async def answer_refused(request: Request, error: Exception) -> Response:
    """Answer a refusal with JSON to a client, with a page to a browser. The X- headers are the same."""
    assert isinstance(error, Refusal)
    answer = answer_refusal(error)
    if request.scope["path"].startswith("/api/") or "text/html" not in request.headers.get("accept", ""):
        return answer
    shown = pages.error_page(request, error)
    shown.headers.update({name: value for name, value in answer.headers.items() if name.startswith("x-")})
    return shown


async def answer_unrouted(request: Request, error: Exception) -> Response:
    """Answer a path or method without a route. In the API, a bare name in place of namespace/name is no repository."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"]
    if error.status_code == 404 and path.startswith(("/api/models/", "/api/datasets/")):
        name = path.split("/")[3]
        return await answer_refused(request, repo_not_found(name, signed_in=True))
    return await answer_refused(request, Refusal(error.status_code, f"{request.method} {path}: {error.detail}"))
