"""Collection files of releases that tests published by hand."""

from __future__ import annotations

from typing import Any

from fp8pipe.config import CollectionSpec
from fp8pipe.config.files import validated
from fp8pipe.hub.client import client


def collection_of(*repo_ids: str, title: str, model: str = "acme/tiny", **fields: Any) -> CollectionSpec:
    """A collection whose releases are of `model` with the recipe of the sample folders, one per repository."""
    content = {
        "collection": {"namespace": "acme", "title": title},
        "models": [{"id": model, "overrides": {"repo_id": repo_id}} for repo_id in repo_ids],
        "recipes": ["fp8-static-kv"],
        "suite": "quick",
        "policy": "quick",
    }
    return validated(CollectionSpec, content | fields, "test")


def listed(title: str) -> dict[str, str | None]:
    """Repository -> note, of the collection acme/title; empty if there is none."""
    for collection in client().list_collections(owner="acme"):
        if collection.title == title:
            return {item.item_id: item.note for item in client().get_collection(collection.slug).items}
    return {}
