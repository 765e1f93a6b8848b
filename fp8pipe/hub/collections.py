"""Finds a collection on the Hub, lists its models, adds one, and removes one."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

from fp8pipe.config import MAX_TITLE
from fp8pipe.errors import InputError
from fp8pipe.hub.client import endpoint

if TYPE_CHECKING:
    from huggingface_hub import Collection, HfApi

    from fp8pipe.hub.account import Account

MAX_NOTE = 500
"""Characters that the Hub accepts in the note of a collection item."""


def check_collection(api: HfApi, name: str, account: Account) -> None:
    """Raise InputError or AccessDenied unless `add_to_collection` could use the collection `name`. Changes nothing."""
    namespace, title, is_slug = _parse(name)
    account.require(namespace)
    if is_slug:
        api.get_collection(f"{namespace}/{title}")
    elif len(title) > MAX_TITLE:
        raise InputError(
            f"collection {name}: a title of {len(title)} characters, the Hub takes {MAX_TITLE}; shorten it"
        )


class Listing(NamedTuple):
    """A collection that lists a model."""

    slug: str
    url: str


def add_to_collection(api: HfApi, repo_id: str, name: str, note: str, *, description: str = "") -> Listing:
    """Make sure that the collection exists and lists the model with this note.

    name: `namespace/title`, a slug, or the collection's address. If the namespace has no collection with that title,
    one is created with `description`. Raises InputError for a name in any other form.
    """
    collection = _find_or_create(api, name, description)
    item = next((item for item in collection.items if item.item_type == "model" and item.item_id == repo_id), None)
    if item is None:
        api.add_collection_item(collection.slug, repo_id, "model", note=note, exists_ok=True)
    elif item.note != note:
        api.update_collection_item(collection.slug, item.item_object_id, note=note)
    return Listing(collection.slug, collection.url)


def remove_from_collections(api: HfApi, repo_id: str, account: Account) -> tuple[str, ...]:
    """Remove the model from every collection that the token may change. Returns the slugs of those that listed it."""
    slugs = sorted(collection.slug for collection in api.list_collections(item=f"models/{repo_id}"))
    ours = [slug for slug in slugs if account.objection(slug.partition("/")[0]) is None]
    for slug in ours:
        remove_from_collection(api, repo_id, slug)
    return tuple(ours)


def remove_from_collection(api: HfApi, repo_id: str, slug: str) -> None:
    """Remove the model from a collection, if that lists it."""
    for item in api.get_collection(slug).items:
        if item.item_type == "model" and item.item_id == repo_id:
            api.delete_collection_item(slug, item.item_object_id, missing_ok=True)


def find_collection(api: HfApi, name: str) -> Collection | None:
    """The collection, with all its items; None if there is none with that title. Raises InputError for a bad name."""
    namespace, title, is_slug = _parse(name)
    if is_slug:
        return api.get_collection(f"{namespace}/{title}")
    for collection in api.list_collections(owner=namespace):
        if collection.title == title:
            return api.get_collection(collection.slug)  # a listing shows only the first four items
    return None


def _find_or_create(api: HfApi, name: str, description: str) -> Collection:
    """The collection, with all its items."""
    if (found := find_collection(api, name)) is not None:
        return found
    namespace, title, _ = _parse(name)
    return api.create_collection(title, namespace=namespace, description=description or None, exists_ok=True)


def _parse(name: str) -> tuple[str, str, bool]:
    """Namespace, title or the slug's last part, and whether it is a slug. Raises InputError for anything else."""
    short = name.removeprefix(f"{endpoint()}/collections/").rstrip("/")
    namespace, _, title = short.partition("/")
    if not (namespace and title.strip()) or "://" in short:
        raise InputError(
            f"collection {name}: expected namespace/title, a slug or its address ({endpoint()}/collections/ORG/SLUG)"
        )
    return namespace, title, re.fullmatch(r"(?:[a-z0-9-]+-)?[0-9a-f]{24}", title) is not None
