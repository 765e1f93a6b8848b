"""Adds a model to a collection on the Hub."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from fp8pipe.errors import InputError

if TYPE_CHECKING:
    from huggingface_hub import Collection, HfApi

MAX_NOTE = 500
"""Characters that the Hub accepts in the note of a collection item."""


def add_to_collection(api: HfApi, repo_id: str, name: str, note: str, *, description: str = "") -> Collection:
    """Make sure that the collection exists and lists the model with this note.

    `name` is `namespace/title`, or a slug as in the collection's address. If no collection of the namespace has the
    title, one is created with `description`. Raises InputError if `name` is neither title nor slug.
    """
    collection = _find_or_create(api, name, description)
    item = next((item for item in collection.items if item.item_type == "model" and item.item_id == repo_id), None)
    if item is None:
        api.add_collection_item(collection.slug, repo_id, "model", note=note, exists_ok=True)
    elif item.note != note:
        api.update_collection_item(collection.slug, item.item_object_id, note=note)
    return collection


def _find_or_create(api: HfApi, name: str, description: str) -> Collection:
    """The collection, with all its items."""
    namespace, slash, title = name.partition("/")
    if not (namespace and slash and title):
        raise InputError(f"collection {name}: expected namespace/title, or a slug as in the collection's address")
    if re.fullmatch(r"(?:[a-z0-9-]+-)?[0-9a-f]{24}", title):
        return api.get_collection(name)
    for collection in api.list_collections(owner=namespace):
        if collection.title == title:
            return api.get_collection(collection.slug)  # a listing shows only the first four items
    return api.create_collection(title, namespace=namespace, description=description or None, exists_ok=True)
