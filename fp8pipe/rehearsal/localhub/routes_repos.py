"""Routes about repositories: who am I, create, delete, move, settings, access, listing, info."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.access import TokenOwner, must_read_files, must_sign_in, must_write_in
from fp8pipe.rehearsal.localhub.cards import card_tags, check_card, read_card
from fp8pipe.rehearsal.localhub.collections import ItemType
from fp8pipe.rehearsal.localhub.refusals import Refusal, repo_not_found
from fp8pipe.rehearsal.localhub.requests import (
    caller,
    endpoint_of,
    field,
    flag_query,
    hub_of,
    int_query,
    json_object,
    kind_of,
    page,
    revision_of,
    text_field,
    visible,
    visible_repo,
    writable_repo,
)
from fp8pipe.rehearsal.localhub.store import Commit, Kind, Repo, Store

MAX_CARD_BYTES = 1 << 20
KINDS: dict[str, Kind] = {"model": "models", "dataset": "datasets"}


async def whoami(request: Request) -> Response:
    """The caller as the Hub describes a user."""
    who = must_sign_in(caller(request))
    token: dict[str, Any] = {"displayName": "local", "role": who.role}
    if who.role == "fineGrained":
        scoped = [
            {"entity": {"type": "user" if place == who.name else "org", "name": place}, "permissions": list(granted)}
            for place, granted in who.scopes.items()
        ]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
    return JSONResponse(
        {
            "type": "user",
            "id": who.name,
            "name": who.name,
            "fullname": who.name,
            "isPro": False,
            "orgs": [{"type": "org", "id": name, "name": name, "roleInOrg": "write"} for name in who.orgs],
            "auth": {"type": "access_token", "accessToken": token},
        }
    )


async def create(request: Request) -> Response:
    """Make a repository. If it exists, 409 with its address."""
    body = await json_object(request)
    kind, repo_id, who = named_repo(body, caller(request))
    hub = hub_of(request)
    private = body.get("visibility") == "private" or field(body, "private", bool, False)
    existing = hub.store.find(kind, repo_id)
    if existing is not None:
        raise Refusal(409, "You already created this repo", extra={"url": endpoint_of(request) + existing.url_path})
    repo = hub.store.create(kind, repo_id, private=private, author=who.name)
    return JSONResponse({"url": endpoint_of(request) + repo.url_path, "name": repo.id, "id": repo.id})


async def delete(request: Request) -> Response:
    """Remove a repository, also from every collection."""
    kind, repo_id, _ = named_repo(await json_object(request), caller(request))
    hub = hub_of(request)
    hub.store.delete(existing_repo(hub.store, kind, repo_id))
    hub.collections.forget_repo(item_type(kind), repo_id)
    return Response("OK")


async def move(request: Request) -> Response:
    """Rename a repository, also in every collection."""
    body = await json_object(request)
    kind = repo_kind(body)
    old, new = text_field(body, "fromRepo"), text_field(body, "toRepo")
    for repo_id in (old, new):
        must_write_in(repo_id.partition("/")[0], caller(request))
    hub = hub_of(request)
    hub.store.move(existing_repo(hub.store, kind, old), new)
    hub.collections.rename_repo(item_type(kind), old, new)
    return Response("OK")


async def change_settings(request: Request) -> Response:
    """Change visibility and gating."""
    repo, _ = writable_repo(request)
    body = await json_object(request)
    gated = body.get("gated")
    if gated not in (None, False, "auto", "manual"):
        raise Refusal(400, f"'gated': expected auto, manual or false, found {gated!r}")
    visibility = body.get("visibility")
    if visibility not in (None, "public", "private"):
        raise Refusal(400, f"'visibility': expected public or private, found {visibility!r}")
    private = field(body, "private", bool, repo.private) if visibility is None else visibility == "private"
    hub_of(request).store.change_settings(repo, private=private, gated=gated)
    return JSONResponse({"private": private, "gated": gated})


async def grant_access(request: Request) -> Response:
    """Let a user read the files of a gated repository."""
    repo, _ = writable_repo(request)
    hub_of(request).store.grant(repo, text_field(await json_object(request), "user"))
    return Response(status_code=200)


async def check_access(request: Request) -> Response:
    """Succeeds if the caller may read the files."""
    must_read_files(visible_repo(request), caller(request))
    return Response("OK")


async def check_write_access(request: Request) -> Response:
    """Succeeds if the caller may write."""
    writable_repo(request)
    return Response("OK")


async def validate_yaml(request: Request) -> Response:
    """The errors and warnings about a card; 400 if there is an error."""
    check = check_card(text_field(await json_object(request), "content"))
    answer = {
        "errors": [{"message": message} for message in check.errors],
        "warnings": [{"message": message} for message in check.warnings],
    }
    return JSONResponse(answer, 400 if check.errors else 200)


async def listing(request: Request) -> Response:
    """The repositories of a kind that the caller may see, filtered as the query says."""
    store = hub_of(request).store
    query = request.query_params
    infos = [repo_info(store, repo, "main") for repo in visible(request, list(store.all(kind_of(request))))]
    if author := query.get("author"):
        infos = [info for info in infos if info["author"] == author]
    if search := query.get("search"):
        infos = [info for info in infos if search.lower() in info["id"].lower()]
    for tag in query.getlist("filter"):
        infos = [info for info in infos if tag in info["tags"]]
    key = {"createdAt": "createdAt", "lastModified": "lastModified"}.get(query.get("sort", ""))
    if key is not None:
        infos.sort(key=lambda info: info[key], reverse=True)
    if not (flag_query(request, "full") or "siblings" in query.getlist("expand")):
        infos = [{name: value for name, value in info.items() if name != "siblings"} for info in infos]
    return page(request, infos, max(1, int_query(request, "limit", 1000)))


async def info(request: Request) -> Response:
    """A repository at a revision, described in full."""
    repo = visible_repo(request)
    with_sizes = flag_query(request, "blobs")
    return JSONResponse(repo_info(hub_of(request).store, repo, revision_of(request), with_sizes=with_sizes))


def repo_info(store: Store, repo: Repo, revision: str, *, with_sizes: bool = False) -> dict[str, Any]:
    """A repository as the Hub describes it."""
    commit = store.commit_at(repo, revision)
    card = card_metadata(store, commit)
    answer: dict[str, Any] = {
        "_id": repo.id,
        "id": repo.id,
        "author": repo.namespace,
        "sha": commit.oid,
        "lastModified": commit.date,
        "createdAt": repo.created_at,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card_tags(card),
        "cardData": card,
        "usedStorage": sum(entry.size for entry in commit.tree.values()),
        "siblings": [sibling(path, commit, with_sizes=with_sizes) for path in commit.tree],
    }
    if repo.kind == "models":
        answer["modelId"] = repo.id
        answer |= {key: card[key] for key in ("library_name", "pipeline_tag") if isinstance(card.get(key), str)}
    return answer


def sibling(path: str, commit: Commit, *, with_sizes: bool) -> dict[str, Any]:
    """A file as a repository's description lists it."""
    entry = commit.tree[path]
    answer: dict[str, Any] = {"rfilename": path}
    if with_sizes:
        answer |= {"size": entry.size, "blobId": entry.oid}
        if entry.lfs:
            answer["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
    return answer


def card_metadata(store: Store, commit: Commit) -> dict[str, Any]:
    """The front matter of the README. What JSON lacks, such as dates, becomes text."""
    entry = commit.tree.get("README.md")
    if entry is None or entry.size > MAX_CARD_BYTES:
        return {}
    text = store.blobs.path(entry.sha256).read_text(encoding="utf-8", errors="replace")
    return as_json(read_card(text).metadata)


def as_json(value: Any) -> Any:
    """A YAML value with everything that JSON lacks turned into text. `Any`: YAML holds anything."""
    match value:
        case dict():
            return {str(key): as_json(item) for key, item in value.items()}
        case list():
            return [as_json(item) for item in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        case None | bool() | int() | float() | str():
            return value
        case _:
            return str(value)


def named_repo(body: dict[str, Any], who: TokenOwner | None) -> tuple[Kind, str, TokenOwner]:
    """The repository that a create or delete request names, and the caller. Refused unless the caller may write."""
    who = must_sign_in(who)
    namespace = text_field(body, "organization", who.name)
    must_write_in(namespace, who)
    return repo_kind(body), f"{namespace}/{text_field(body, 'name')}", who


def repo_kind(body: dict[str, Any]) -> Kind:
    """The kind that a request's body names; models if it names none."""
    kind = KINDS.get(text_field(body, "type", "model"))
    if kind is None:
        raise Refusal(400, f"'type': expected model or dataset, found {body.get('type')!r}")
    return kind


def existing_repo(store: Store, kind: Kind, repo_id: str) -> Repo:
    """The repository; refused as not found if there is none."""
    repo = store.find(kind, repo_id)
    if repo is None:
        raise repo_not_found(repo_id, signed_in=True)
    return repo


def item_type(kind: Kind) -> ItemType:
    """What a collection calls a repository of this kind."""
    return "model" if kind == "models" else "dataset"


ROUTES = [
    Route("/api/whoami-v2", whoami),
    Route("/api/validate-yaml", validate_yaml, methods=["POST"]),
    Route("/api/repos/create", create, methods=["POST"]),
    Route("/api/repos/delete", delete, methods=["DELETE"]),
    Route("/api/repos/move", move, methods=["POST"]),
    Route("/api/{kind:kind}", listing),
    Route("/api/{kind:kind}/{repo:repo}", info),
    Route("/api/{kind:kind}/{repo:repo}/revision/{rev:rev}", info),
    Route("/api/{kind:kind}/{repo:repo}/settings", change_settings, methods=["PUT"]),
    Route("/api/{kind:kind}/{repo:repo}/auth-check", check_access),
    Route("/api/{kind:kind}/{repo:repo}/auth-check/write", check_write_access),
    Route("/api/{kind:kind}/{repo:repo}/user-access-request/grant", grant_access, methods=["POST"]),
]
