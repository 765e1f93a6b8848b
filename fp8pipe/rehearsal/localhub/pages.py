"""The pages for people: the contents of this Hub, a repository with its card, files, history and tags, a collection.

They show what an anonymous visitor may see, load nothing from elsewhere and run no script. Comes in: a request. Goes
out: HTML, made from the templates beside this file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from importlib.resources import files
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.cards import read_card, text_list
from fp8pipe.rehearsal.localhub.collections import Collection
from fp8pipe.rehearsal.localhub.disk import Entry
from fp8pipe.rehearsal.localhub.markdown import render
from fp8pipe.rehearsal.localhub.refusals import Refusal
from fp8pipe.rehearsal.localhub.requests import Hub, caller, endpoint_of, hub_of, revision_of, visible, visible_repo
from fp8pipe.rehearsal.localhub.routes_collections import item_repo, may_see_collection, visible_collection
from fp8pipe.rehearsal.localhub.routes_repos import MAX_CARD_BYTES, card_metadata, repo_info
from fp8pipe.rehearsal.localhub.store import Commit, Repo

SHOWN_COMMITS = 30
SHOWN_TAGS = 6
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' data:; style-src 'self'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


@dataclass(frozen=True, slots=True)
class RepoLine:
    """A repository in a list."""

    repo: Repo
    updated: str
    size: int
    tags: list[str]
    release: str | None
    """The newest tag on the head of main, if any."""
    note: str | None = None


async def index(request: Request) -> Response:
    """Everything on this Hub."""
    hub, who = hub_of(request), caller(request)
    return html(
        request,
        "index.html",
        models=[repo_line(hub, repo) for repo in visible(request, list(hub.store.all("models")))],
        datasets=[repo_line(hub, repo) for repo in visible(request, list(hub.store.all("datasets")))],
        collections=[collection for collection in hub.collections.all() if may_see_collection(collection, who)],
    )


async def repository(request: Request) -> Response:
    """A repository at a revision: card, files, history, tags; at a commit, also what the commit changed."""
    repo, hub = visible_repo(request), hub_of(request)
    revision = revision_of(request)
    history = list(hub.store.history(repo, revision))
    commit = history[0]
    at_commit = request.scope["path"].removeprefix(repo.url_path).startswith("/commit/")
    names: dict[str, list[str]] = {}
    refs = hub.store.refs(repo)
    for name, tag in refs.tags.items():
        names.setdefault(tag.target, []).append(name)
    return html(
        request,
        "repo.html",
        repo=repo,
        revision=revision,
        commit=commit,
        info=repo_info(hub.store, repo, commit.oid),
        facts=facts(hub, request, card_metadata(hub.store, commit)),
        card=card_html(hub, repo, revision, commit),
        files=[(path, commit.tree[path]) for path in sorted(commit.tree)],
        history=history[:SHOWN_COMMITS],
        older=max(0, len(history) - SHOWN_COMMITS),
        tags_of=names,
        releases=dict(sorted(refs.tags.items(), key=lambda item: item[0], reverse=True)),
        branches=refs.branches,
        changes=changes(commit, history[1].tree if len(history) > 1 else {}) if at_commit else None,
        collections=[
            collection
            for collection in hub.collections.all()
            if holds(collection, repo) and may_see_collection(collection, caller(request))
        ],
        derived=derived(request, repo),
        pulls=hub.discussions.all(repo),
    )


async def blob(request: Request) -> Response:
    """A file that a card links to: redirect to its bytes."""
    repo = visible_repo(request)
    return RedirectResponse(file_address(repo, revision_of(request), request.path_params["path"]), 302)


async def discussion(request: Request) -> Response:
    """A discussion or pull request."""
    repo, hub = visible_repo(request), hub_of(request)
    found = hub.discussions.find(repo, int(request.path_params["num"]))
    return html(request, "discussion.html", repo=repo, discussion=found)


async def collection(request: Request) -> Response:
    """A collection with its items and notes."""
    hub, who = hub_of(request), caller(request)
    found = visible_collection(request)
    lines: list[RepoLine | Collection] = []
    for item in found.items:
        if item.type == "collection":
            lines.append(hub.collections.find(item.id))
        elif (repo := item_repo(hub, item, who)) is not None:
            lines.append(repo_line(hub, repo, item.note))
    return html(request, "collection.html", collection=found, lines=lines)


async def style(request: Request) -> Response:
    """The style sheet of all pages."""
    sheet = files("fp8pipe.rehearsal.localhub").joinpath("templates", "style.css").read_text(encoding="utf-8")
    return Response(sheet, media_type="text/css", headers={"Cache-Control": "no-cache"})


def error_page(request: Request, refusal: Refusal) -> Response:
    """A refusal as a page."""
    return html(request, "error.html", status=refusal.status, message=refusal.message, answer=refusal.status)


def html(request: Request, template: str, *, answer: int = 200, **context: object) -> Response:
    """A page made from a template, with the HTTP status `answer`."""
    page = TEMPLATES.get_template(template).render(endpoint=endpoint_of(request), **context)
    return HTMLResponse(page, answer, HEADERS)


def repo_line(hub: Hub, repo: Repo, note: str | None = None) -> RepoLine:
    """A repository as an entry of a list."""
    info = repo_info(hub.store, repo, "main")
    tags = hub.store.refs(repo).tags
    release = next((name for name in reversed(list(tags)) if tags[name].target == info["sha"]), None)
    own_tags = text_list(info["cardData"], "tags")[:SHOWN_TAGS]
    return RepoLine(repo, info["lastModified"], info["usedStorage"], own_tags, release, note)


def card_html(hub: Hub, repo: Repo, revision: str, commit: Commit) -> str | None:
    """The README without its front matter; None if there is none, or if it is gated or too long."""
    entry = commit.tree.get("README.md")
    if entry is None or entry.size > MAX_CARD_BYTES or repo.gated:
        return None
    source = hub.store.blobs.path(entry.sha256).read_text(encoding="utf-8", errors="replace")
    return render(
        read_card(source).body,
        link=lambda path: f"{repo.url_path}/blob/{quoted(revision)}/{path}",
        image=lambda path: f"{repo.url_path}/resolve/{quoted(revision)}/{path}",
    )


def facts(hub: Hub, request: Request, card: dict[str, Any]) -> list[tuple[str, list[tuple[str, str | None]]]]:
    """The front matter as rows: a label and its texts, each with an address if it names a repository of this Hub."""
    relation = card.get("base_model_relation")
    base_label = f"base model ({relation})" if isinstance(relation, str) else "base model"
    rows = (
        ("license", "license"),
        ("license", "license_name"),
        (base_label, "base_model"),
        ("datasets", "datasets"),
        ("language", "language"),
        ("library", "library_name"),
        ("task", "pipeline_tag"),
        ("tags", "tags"),
    )
    found = [(label, [(text, here(hub, request, key, text)) for text in text_list(card, key)]) for label, key in rows]
    return [(label, texts) for label, texts in found if texts]


def here(hub: Hub, request: Request, key: str, text: str) -> str | None:
    """The address of a repository that a card names; None if this Hub does not show it to the caller."""
    kind = {"base_model": "models", "datasets": "datasets"}.get(key)
    if kind is None or text.count("/") != 1 or ".." in text:
        return None
    found = [repo for repo in hub.store.all("models" if kind == "models" else "datasets") if repo.id == text]
    return next((repo.url_path for repo in visible(request, found)), None)


def derived(request: Request, repo: Repo) -> list[Repo]:
    """The models of this Hub whose cards name this one as their base."""
    store = hub_of(request).store
    if repo.kind != "models":
        return []
    others = visible(request, list(store.all("models")))
    cards = {other: card_metadata(store, store.commit_at(other, "main")) for other in others}
    return [other for other, card in cards.items() if repo.id in text_list(card, "base_model")]


def holds(collection: Collection, repo: Repo) -> bool:
    """Whether a collection lists a repository."""
    return any((f"{item.type}s", item.id) == (repo.kind, repo.id) for item in collection.items)


def changes(commit: Commit, before: Mapping[str, Entry]) -> list[tuple[str, str]]:
    """What a commit did to each file that it touched: (added, removed or changed; path)."""
    paths = sorted(commit.tree.keys() | before.keys())
    return [
        ("added" if path not in before else "removed" if path not in commit.tree else "changed", path)
        for path in paths
        if before.get(path) != commit.tree.get(path)
    ]


def file_address(repo: Repo, revision: str, path: str) -> str:
    """The address of a file's bytes."""
    return f"{repo.url_path}/resolve/{quoted(revision)}/{quote(path)}"


def quoted(revision: str) -> str:
    """A revision as one part of an address, with its slashes quoted."""
    return quote(revision, safe="")


def bytes_text(size: int) -> str:
    """12,582,912 bytes as 12.6 MB: in decimal units, as on the Hub."""
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.0f} B" if unit == "B" else f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"


def time_text(moment: str) -> str:
    """A time of the Hub as people read it: 23 Nov 2026, 08:59 UTC."""
    return datetime.fromisoformat(moment).strftime("%d %b %Y, %H:%M UTC").lstrip("0")


TEMPLATES = Environment(
    loader=PackageLoader("fp8pipe.rehearsal.localhub"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
TEMPLATES.filters |= {"bytes": bytes_text, "time": time_text, "quoted": quoted}
TEMPLATES.globals |= {"file_address": file_address}

ROUTES = [
    Route("/", index),
    Route("/static/style.css", style),
    Route("/collections/{slug:repo}", collection),
    *(
        route
        for prefix in ("/datasets", "")
        for route in (
            Route(f"{prefix}/{{repo:repo}}/tree/{{rev:rev}}", repository),
            Route(f"{prefix}/{{repo:repo}}/commit/{{rev:rev}}", repository),
            Route(f"{prefix}/{{repo:repo}}/blob/{{rev:rev}}/{{path:file}}", blob),
            Route(f"{prefix}/{{repo:repo}}/discussions/{{num:int}}", discussion),
            Route(f"{prefix}/{{repo:repo}}", repository),
        )
    ),
]
