"""Routes about collections and their items."""

from __future__ import annotations

from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.access import TokenOwner, may_see, must_sign_in, must_write_in
from fp8pipe.rehearsal.localhub.refusals import Refusal
from fp8pipe.rehearsal.localhub.requests import Hub, caller, hub_of, int_query, json_object, page, text_field
from fp8pipe.rehearsal.localhub.shelves import Collection, Item
from fp8pipe.rehearsal.localhub.store import Repo

LISTED_ITEMS = 4
"""How many items of each collection a listing shows, as on the Hub."""


async def listing(request: Request) -> Response:
    """The collections that the caller may see, by owner or by an item that they hold."""
    hub, who, query = hub_of(request), caller(request), request.query_params
    shelves = [shelf for shelf in hub.shelves.all() if may_see_shelf(shelf, who)]
    if owners := query.getlist("owner"):
        shelves = [shelf for shelf in shelves if shelf.owner in owners]
    for wanted in query.getlist("item"):
        kind, _, item_id = wanted.partition("/")
        shelves = [
            shelf for shelf in shelves if any((f"{item.type}s", item.id) == (kind, item_id) for item in shelf.items)
        ]
    answers = [described(hub, shelf, who) for shelf in shelves]
    for answer in answers:
        answer["items"] = answer["items"][:LISTED_ITEMS]
        del answer["position"]  # the client counts positions itself and fails on a second one
    return page(request, answers, max(1, int_query(request, "limit", 100)))


async def create(request: Request) -> Response:
    """Make a collection; 409 with its slug if there is one of the same title."""
    body = await json_object(request)
    who = must_sign_in(caller(request))
    owner = text_field(body, "namespace", who.name)
    must_write_in(owner, who)
    description = text_field(body, "description", "")
    hub = hub_of(request)
    shelf = hub.shelves.create(owner, text_field(body, "title"), description, private=bool(body.get("private")))
    for item in [body["item"]] if "item" in body else []:
        shelf = put_item(hub, shelf, who, item, None)
    return JSONResponse(described(hub, shelf, who))


async def get(request: Request) -> Response:
    """One collection with all its items."""
    who = caller(request)
    return JSONResponse(described(hub_of(request), visible_shelf(request), who))


async def change(request: Request) -> Response:
    """Title, description, privacy, theme, place."""
    shelf, who = writable_shelf(request)
    body = await json_object(request)
    known = {key: body[key] for key in ("title", "description", "private", "theme", "position") if key in body}
    hub = hub_of(request)
    return JSONResponse({"success": True, "data": described(hub, hub.shelves.change(shelf, **known), who)})


async def delete(request: Request) -> Response:
    """Remove a collection."""
    shelf, _ = writable_shelf(request)
    hub_of(request).shelves.delete(shelf)
    return JSONResponse({"success": True})


async def add_item(request: Request) -> Response:
    """Put a repository or a collection into a collection."""
    shelf, who = writable_shelf(request)
    body = await json_object(request)
    note = text_field(body, "note") if "note" in body else None
    hub = hub_of(request)
    return JSONResponse(described(hub, put_item(hub, shelf, who, body["item"], note), who))


def put_item(hub: Hub, shelf: Collection, who: TokenOwner, item: dict[str, Any], note: str | None) -> Collection:
    """Put on the shelf what exists for the caller."""
    item_type, item_id = item.get("type"), text_field(item, "id")
    if item_type == "collection":
        item_id = hub.shelves.find(item_id).slug
    elif item_type in ("model", "dataset"):
        if item_repo(hub, Item("", item_type, item_id), who) is None:
            raise Refusal(404, f"There is no {item_type} {item_id}", "RepoNotFound")
    else:
        raise Refusal(400, f"A collection here holds models, datasets and collections, not {item_type!r}")
    return hub.shelves.add(shelf, item_type, item_id, note)


async def change_item(request: Request) -> Response:
    """Note and place of an item."""
    shelf, _ = writable_shelf(request)
    body = await json_object(request)
    hub_of(request).shelves.change_item(
        shelf, request.path_params["item"], note=body.get("note"), position=body.get("position")
    )
    return JSONResponse({"success": True})


async def delete_item(request: Request) -> Response:
    """Take an item out of a collection."""
    shelf, _ = writable_shelf(request)
    hub_of(request).shelves.remove(shelf, request.path_params["item"])
    return JSONResponse({"success": True})


def may_see_shelf(shelf: Collection, who: TokenOwner | None) -> bool:
    """Whether a collection exists for the caller."""
    return not shelf.private or (who is not None and who.belongs_to(shelf.owner))


def visible_shelf(request: Request) -> Collection:
    """The collection that the path names, if it exists for the caller."""
    shelf = hub_of(request).shelves.find(request.path_params["slug"])
    if not may_see_shelf(shelf, caller(request)):
        raise Refusal(404, f"Collection not found: {request.path_params['slug']}")
    return shelf


def writable_shelf(request: Request) -> tuple[Collection, TokenOwner]:
    """The collection that the path names, and the caller, who may change it."""
    shelf = visible_shelf(request)
    return shelf, must_write_in(shelf.owner, caller(request))


def item_repo(hub: Hub, item: Item, who: TokenOwner | None) -> Repo | None:
    """The repository behind an item, if it exists for the caller."""
    repo = hub.store.find("models" if item.type == "model" else "datasets", item.id)
    return repo if repo is not None and may_see(repo, who) else None


def described(hub: Hub, shelf: Collection, who: TokenOwner | None) -> dict[str, Any]:
    """A collection as the Hub describes it. Items that do not exist for the caller are left out."""
    items = [described_item(hub, item, place, who) for place, item in enumerate(shelf.items)]
    return {
        "slug": shelf.slug,
        "_id": shelf.id,
        "title": shelf.title,
        "description": shelf.description,
        "owner": {"type": "org", "name": shelf.owner, "fullname": shelf.owner},
        "lastUpdated": shelf.updated,
        "private": shelf.private,
        "theme": shelf.theme,
        "position": shelf.position,
        "upvotes": 0,
        "gating": False,
        "items": [item for item in items if item is not None],
    }


def described_item(hub: Hub, item: Item, place: int, who: TokenOwner | None) -> dict[str, Any] | None:
    """An item as the Hub describes it, None if it does not exist for the caller."""
    answer: dict[str, Any] = {"_id": item.object_id, "id": item.id, "type": item.type, "position": place}
    if item.note is not None:
        answer["note"] = {"text": item.note, "html": escape(item.note)}
    if item.type == "collection":
        return {**answer, "slug": item.id}
    repo = item_repo(hub, item, who)
    if repo is None:
        return None
    return {**answer, "repoType": item.type, "author": repo.namespace, "private": repo.private, "gated": repo.gated}


ROUTES = [
    Route("/api/collections", listing),
    Route("/api/collections", create, methods=["POST"]),
    Route("/api/collections/{slug:repo}", get),
    Route("/api/collections/{slug:repo}", change, methods=["PATCH"]),
    Route("/api/collections/{slug:repo}", delete, methods=["DELETE"]),
    Route("/api/collections/{slug:repo}/items", add_item, methods=["POST"]),
    Route("/api/collections/{slug:repo}/items/{item}", change_item, methods=["PATCH"]),
    Route("/api/collections/{slug:repo}/items/{item}", delete_item, methods=["DELETE"]),
]
