"""Routes about collections and their items."""

from __future__ import annotations

from html import escape
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.access import TokenOwner, may_see, must_sign_in, must_write_in
from fp8pipe.rehearsal.localhub.collections import Collection, Item
from fp8pipe.rehearsal.localhub.refusals import Refusal
from fp8pipe.rehearsal.localhub.requests import Hub, caller, field, hub_of, int_query, json_object, page, text_field
from fp8pipe.rehearsal.localhub.store import Repo

LISTED_ITEMS = 4
"""A listing shows this many items of each collection, as on the Hub."""

CHANGEABLE: dict[str, type] = {"title": str, "description": str, "private": bool, "theme": str, "position": int}
"""Metadata of a collection that may be changed, and its type in JSON."""


async def listing(request: Request) -> Response:
    """The collections that the caller may see, filtered by owner and by items that they list."""
    hub, who, query = hub_of(request), caller(request), request.query_params
    collections = [collection for collection in hub.collections.all() if may_see_collection(collection, who)]
    if owners := query.getlist("owner"):
        collections = [collection for collection in collections if collection.owner in owners]
    for wanted in query.getlist("item"):
        kind, _, item_id = wanted.partition("/")
        collections = [
            collection
            for collection in collections
            if any((f"{item.type}s", item.id) == (kind, item_id) for item in collection.items)
        ]
    answers = [described(hub, collection, who) for collection in collections]
    for answer in answers:
        answer["items"] = answer["items"][:LISTED_ITEMS]
        del answer["position"]  # the client counts positions itself and fails on a second one
    return page(request, answers, max(1, int_query(request, "limit", 100)))


async def create(request: Request) -> Response:
    """Make a collection. If its owner has one of this title, 409 with the slug of that one."""
    body = await json_object(request)
    who = must_sign_in(caller(request))
    owner = text_field(body, "namespace", who.name)
    must_write_in(owner, who)
    description = text_field(body, "description", "")
    hub = hub_of(request)
    collection = hub.collections.create(
        owner, text_field(body, "title"), description, private=field(body, "private", bool, False)
    )
    if body.get("item") is not None:
        collection = put_item(hub, collection, who, field(body, "item", dict), None)
    return JSONResponse(described(hub, collection, who))


async def get(request: Request) -> Response:
    """One collection with all its items."""
    who = caller(request)
    return JSONResponse(described(hub_of(request), visible_collection(request), who))


async def change(request: Request) -> Response:
    """Change title, description, privacy, theme or position."""
    collection, who = writable_collection(request)
    body = await json_object(request)
    known = {key: field(body, key, kind) for key, kind in CHANGEABLE.items() if body.get(key) is not None}
    hub = hub_of(request)
    return JSONResponse({"success": True, "data": described(hub, hub.collections.change(collection, **known), who)})


async def delete(request: Request) -> Response:
    """Remove a collection."""
    collection, _ = writable_collection(request)
    hub_of(request).collections.delete(collection)
    return JSONResponse({"success": True})


async def add_item(request: Request) -> Response:
    """Put a repository or a collection into a collection."""
    collection, who = writable_collection(request)
    body = await json_object(request)
    note = optional_note(body)
    hub = hub_of(request)
    return JSONResponse(described(hub, put_item(hub, collection, who, field(body, "item", dict), note), who))


def optional_note(body: dict[str, Any]) -> str | None:
    """The note in a body; None if there is none."""
    return text_field(body, "note") if body.get("note") is not None else None


def put_item(hub: Hub, collection: Collection, who: TokenOwner, item: dict[str, Any], note: str | None) -> Collection:
    """Add an item. Refused with 404 if it does not exist, or is a repository that the caller may not see."""
    item_type, item_id = item.get("type"), text_field(item, "id")
    if item_type == "collection":
        item_id = hub.collections.find(item_id).slug
    elif item_type in ("model", "dataset"):
        if item_repo(hub, Item("", item_type, item_id), who) is None:
            raise Refusal(404, f"There is no {item_type} {item_id}", "RepoNotFound")
    else:
        raise Refusal(400, f"'type': expected model, dataset or collection, found {item_type!r}")
    return hub.collections.add(collection, item_type, item_id, note)


async def change_item(request: Request) -> Response:
    """Change the note or the position of an item."""
    collection, _ = writable_collection(request)
    body = await json_object(request)
    position = field(body, "position", int) if body.get("position") is not None else None
    hub_of(request).collections.change_item(
        collection, request.path_params["item"], note=optional_note(body), position=position
    )
    return JSONResponse({"success": True})


async def delete_item(request: Request) -> Response:
    """Remove an item from a collection."""
    collection, _ = writable_collection(request)
    hub_of(request).collections.remove(collection, request.path_params["item"])
    return JSONResponse({"success": True})


def may_see_collection(collection: Collection, who: TokenOwner | None) -> bool:
    """Whether the caller may know that the collection exists."""
    return not collection.private or (who is not None and who.belongs_to(collection.owner))


def visible_collection(request: Request) -> Collection:
    """The collection that the path names. Refused as not found if the caller may not see it."""
    collection = hub_of(request).collections.find(request.path_params["slug"])
    if not may_see_collection(collection, caller(request)):
        raise Refusal(404, f"Collection not found: {request.path_params['slug']}")
    return collection


def writable_collection(request: Request) -> tuple[Collection, TokenOwner]:
    """The collection that the path names, and the caller. Refused unless the caller may change it."""
    collection = visible_collection(request)
    return collection, must_write_in(collection.owner, caller(request))


def item_repo(hub: Hub, item: Item, who: TokenOwner | None) -> Repo | None:
    """The repository that an item names; None if the caller may not see it."""
    repo = hub.store.find("models" if item.type == "model" else "datasets", item.id)
    return repo if repo is not None and may_see(repo, who) else None


def described(hub: Hub, collection: Collection, who: TokenOwner | None) -> dict[str, Any]:
    """A collection as the Hub describes it, without the items that the caller may not see."""
    items = [described_item(hub, item, place, who) for place, item in enumerate(collection.items)]
    return {
        "slug": collection.slug,
        "_id": collection.id,
        "title": collection.title,
        "description": collection.description,
        "owner": {"type": "org", "name": collection.owner, "fullname": collection.owner},
        "lastUpdated": collection.updated,
        "private": collection.private,
        "theme": collection.theme,
        "position": collection.position,
        "upvotes": 0,
        "gating": False,
        "items": [item for item in items if item is not None],
    }


def described_item(hub: Hub, item: Item, place: int, who: TokenOwner | None) -> dict[str, Any] | None:
    """An item as the Hub describes it; None if the caller may not see it."""
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
