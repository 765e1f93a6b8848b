"""Routes about discussions and pull requests."""

from __future__ import annotations

from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.access import must_sign_in
from fp8pipe.rehearsal.localhub.discussions import Discussion, Event
from fp8pipe.rehearsal.localhub.refusals import Refusal
from fp8pipe.rehearsal.localhub.requests import (
    caller,
    field,
    flag_query,
    hub_of,
    int_query,
    json_object,
    text_field,
    visible_repo,
    writable_repo,
)
from fp8pipe.rehearsal.localhub.store import Repo

PAGE = 50


async def listing(request: Request) -> Response:
    """The discussions of a repository, newest first, filtered as the query says."""
    repo, query = visible_repo(request), request.query_params
    found = sorted(hub_of(request).discussions.all(repo), key=lambda one: one.num, reverse=True)
    if (kind := query.get("type")) not in (None, "all"):
        found = [one for one in found if (one.base is not None) == (kind == "pull_request")]
    if (status := query.get("status")) not in (None, "all"):
        found = [one for one in found if (one.status in ("open", "draft")) == (status == "open")]
    if author := query.get("author"):
        found = [one for one in found if one.author == author]
    start = PAGE * int_query(request, "p", 0)
    shown = [summary(repo, one) for one in found[start : start + PAGE]]
    return JSONResponse({"discussions": shown, "count": len(found), "start": start})


async def create(request: Request) -> Response:
    """Open a discussion or a draft pull request."""
    repo = visible_repo(request)
    who = must_sign_in(caller(request))
    body = await json_object(request)
    title = text_field(body, "title").strip()
    if not 3 <= len(title) <= 200:
        raise Refusal(400, f"'title': expected 3 to 200 characters, found {len(title)}")
    pull = field(body, "pullRequest", bool, False)
    made = hub_of(request).discussions.open(repo, title, text_field(body, "description", ""), who.name, pull=pull)
    return JSONResponse({"num": made.num, "pullRequest": pull})


async def get(request: Request) -> Response:
    """One discussion with all its events."""
    repo, hub = visible_repo(request), hub_of(request)
    found = hub.discussions.find(repo, number_of(request))
    answer = {**summary(repo, found), "events": [described(event) for event in found.events]}
    if found.base is not None:
        answer["changes"] = {"base": f"refs/heads/{found.base}", "mergeCommitId": found.merge_commit}
        answer["filesWithConflicts"] = hub.discussions.conflicts(repo, found)
    if flag_query(request, "diff"):
        answer["diff"] = ""
    return JSONResponse(answer)


async def comment(request: Request) -> Response:
    """Add a comment."""
    repo = visible_repo(request)
    who = must_sign_in(caller(request))
    text = text_field(await json_object(request), "comment")
    event = hub_of(request).discussions.comment(repo, number_of(request), who.name, text)
    return JSONResponse({"newMessage": described(event)})


async def rename(request: Request) -> Response:
    """Give a discussion another title."""
    repo, who = writable_repo(request)
    title = text_field(await json_object(request), "title")
    event = hub_of(request).discussions.rename(repo, number_of(request), who.name, title)
    return JSONResponse({"newTitle": described(event)})


async def set_status(request: Request) -> Response:
    """Open or close a discussion."""
    repo, who = writable_repo(request)
    body = await json_object(request)
    status, text = body.get("status"), text_field(body, "comment", "")
    if status not in ("open", "closed"):
        raise Refusal(400, f"'status': expected open or closed, found {status!r}")
    event = hub_of(request).discussions.set_status(repo, number_of(request), who.name, status, text)
    return JSONResponse({"newStatus": described(event)})


async def merge(request: Request) -> Response:
    """Merge a pull request into its base branch."""
    repo, who = writable_repo(request)
    text = text_field(await json_object(request), "comment", "")
    event = hub_of(request).discussions.merge(repo, number_of(request), who.name, text)
    return JSONResponse({"newStatus": described(event)})


def number_of(request: Request) -> int:
    """The number of the discussion that the path names."""
    return int(request.path_params["num"])


def summary(repo: Repo, discussion: Discussion) -> dict[str, Any]:
    """A discussion as the Hub lists it."""
    return {
        "num": discussion.num,
        "title": discussion.title,
        "author": {"name": discussion.author},
        "createdAt": discussion.created_at,
        "status": discussion.status,
        "isPullRequest": discussion.base is not None,
        "repo": {"name": repo.id, "type": repo.kind.removesuffix("s")},
    }


def described(event: Event) -> dict[str, Any]:
    """An event as the Hub lists it."""
    author = {"name": event.author}
    match event.type:
        case "comment":
            latest = {"raw": event.text, "html": escape(event.text), "updatedAt": event.date, "author": author}
            data: dict[str, Any] = {"edited": False, "hidden": False, "latest": latest, "history": []}
        case "commit":
            data = {"subject": event.text, "oid": event.detail}
        case "status-change":
            data = {"status": event.text}
        case "title-change":
            data = {"from": event.detail, "to": event.text}
    return {"id": event.id, "type": event.type, "author": author, "createdAt": event.date, "data": data}


ROUTES = [
    Route("/api/{kind:kind}/{repo:repo}/discussions", listing),
    Route("/api/{kind:kind}/{repo:repo}/discussions", create, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/discussions/{num:int}", get),
    Route("/api/{kind:kind}/{repo:repo}/discussions/{num:int}/comment", comment, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/discussions/{num:int}/title", rename, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/discussions/{num:int}/status", set_status, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/discussions/{num:int}/merge", merge, methods=["POST"]),
]
