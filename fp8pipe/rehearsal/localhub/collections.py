"""Collections on disk: one JSON file each, `ROOT/collections/<id>.json`, replaced whole by every change.

A slug is namespace/title-id. Only the id counts, so the slug of an earlier title still finds its collection.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Literal

from fp8pipe.rehearsal.localhub.disk import now, read_json, write_json
from fp8pipe.rehearsal.localhub.refusals import Refusal
from fp8pipe.rehearsal.localhub.store import NAME, Store

ItemType = Literal["model", "dataset", "collection"]
MAX_TITLE = 59
MAX_DESCRIPTION = 150
MAX_NOTE = 500
"""Characters, as on the Hub."""


@dataclass(frozen=True, slots=True)
class Item:
    """One entry of a collection."""

    object_id: str
    type: ItemType
    id: str
    """namespace/name of a repository, or the slug of a collection."""
    note: str | None = None


@dataclass(frozen=True, slots=True)
class Collection:
    """A titled list of repositories."""

    id: str
    owner: str
    title: str
    description: str
    private: bool
    updated: str
    theme: str = "blue"
    position: int = 0
    items: tuple[Item, ...] = field(default=())

    @property
    def slug(self) -> str:
        """namespace/title-in-words-id"""
        words = re.sub(r"[^a-z0-9]+", "-", self.title.lower()).strip("-")
        return f"{self.owner}/{words}-{self.id}" if words else f"{self.owner}/{self.id}"


class Collections:
    """All collections."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.root / "collections"

    def all(self) -> Iterator[Collection]:
        """Every collection, the latest changed first."""
        found = (self._read(path.stem) for path in self._folder.glob("*.json"))
        yield from sorted((one for one in found if one is not None), key=lambda one: one.updated, reverse=True)

    def find(self, slug: str) -> Collection:
        """The collection of a slug, current or earlier, or of a bare namespace/id. 404 if there is none."""
        namespace, _, rest = slug.partition("/")
        identifier = rest.rpartition("-")[2]
        collection = self._read(identifier) if re.fullmatch(r"[0-9a-f]{24}", identifier) else None
        if collection is None or collection.owner != namespace:
            raise Refusal(404, f"Collection not found: {slug}")
        return collection

    def create(self, owner: str, title: str, description: str, *, private: bool) -> Collection:
        """A new collection. If the owner has one of this title, it is refused with 409 and the slug of that one."""
        must_be_title(title)
        must_be_short("description", description, MAX_DESCRIPTION)
        if not NAME.fullmatch(owner):
            raise Refusal(400, f"{owner!r} is not a namespace")
        with self._store.lock:
            for collection in self.all():
                if (collection.owner, collection.title) == (owner, title):
                    raise Refusal(409, "A collection with this title already exists", extra={"slug": collection.slug})
            collection = Collection(secrets.token_hex(12), owner, title, description, private, now())
            return self._save(collection)

    def change(
        self,
        collection: Collection,
        *,
        title: str | None = None,
        description: str | None = None,
        private: bool | None = None,
        theme: str | None = None,
        position: int | None = None,
    ) -> Collection:
        """The collection with new metadata; None leaves a field as it is."""
        must_be_title(collection.title if title is None else title)
        must_be_short("description", description or "", MAX_DESCRIPTION)
        given = {"title": title, "description": description, "private": private, "theme": theme, "position": position}
        with self._store.lock:
            current = self.find(collection.slug)
            return self._save(replace(current, **{key: value for key, value in given.items() if value is not None}))

    def delete(self, collection: Collection) -> None:
        """Remove a collection; the repositories that it lists stay."""
        with self._store.lock:
            (self._folder / f"{collection.id}.json").unlink()

    def add(self, collection: Collection, item_type: ItemType, item_id: str, note: str | None) -> Collection:
        """Add an item at the end of a collection; refused with 409 if the collection has it."""
        must_be_short("note", note or "", MAX_NOTE)
        with self._store.lock:
            current = self.find(collection.slug)
            if any((item.type, item.id) == (item_type, item_id) for item in current.items):
                raise Refusal(409, f"{item_id} is already in the collection {current.slug}")
            item = Item(secrets.token_hex(12), item_type, item_id, note or None)
            return self._save(replace(current, items=(*current.items, item)))

    def change_item(
        self, collection: Collection, object_id: str, *, note: str | None = None, position: int | None = None
    ) -> Collection:
        """Give an item another note (an empty text removes it) or another position, counted from 0."""
        must_be_short("note", note or "", MAX_NOTE)
        with self._store.lock:
            current = self.find(collection.slug)
            items = list(current.items)
            place = place_of(current, object_id)
            item = items.pop(place)
            if note is not None:
                item = replace(item, note=note or None)
            items.insert(place if position is None else position, item)
            return self._save(replace(current, items=tuple(items)))

    def remove(self, collection: Collection, object_id: str) -> Collection:
        """Remove an item from a collection."""
        with self._store.lock:
            current = self.find(collection.slug)
            place = place_of(current, object_id)
            return self._save(replace(current, items=current.items[:place] + current.items[place + 1 :]))

    def forget_repo(self, item_type: ItemType, repo_id: str) -> None:
        """Remove a deleted repository from every collection."""
        with self._store.lock:
            for collection in list(self.all()):
                kept = tuple(item for item in collection.items if (item.type, item.id) != (item_type, repo_id))
                if kept != collection.items:
                    self._save(replace(collection, items=kept))

    def rename_repo(self, item_type: ItemType, old_id: str, new_id: str) -> None:
        """Give a moved repository its new id in every collection."""
        with self._store.lock:
            for collection in list(self.all()):
                items = tuple(
                    replace(item, id=new_id) if (item.type, item.id) == (item_type, old_id) else item
                    for item in collection.items
                )
                if items != collection.items:
                    self._save(replace(collection, items=items))

    def _read(self, identifier: str) -> Collection | None:
        try:
            raw = read_json(self._folder / f"{identifier}.json")
        except FileNotFoundError:
            return None
        return Collection(**{**raw, "items": tuple(Item(**item) for item in raw["items"])})

    def _save(self, collection: Collection) -> Collection:
        collection = replace(collection, updated=now())
        write_json(self._folder / f"{collection.id}.json", asdict(collection), temporary=self._store.temporary)
        return collection


def place_of(collection: Collection, object_id: str) -> int:
    """The position of an item, counted from 0. Refused with 404 if the collection lacks it."""
    for place, item in enumerate(collection.items):
        if item.object_id == object_id:
            return place
    raise Refusal(404, f"No item {object_id} in the collection {collection.slug}")


def must_be_short(name: str, text: str, limit: int) -> None:
    """Refuse a text that is longer than the Hub allows."""
    if len(text) > limit:
        raise Refusal(400, f"{name!r} may have at most {limit} characters, found {len(text)}")


def must_be_title(title: str) -> None:
    """Refuse an empty title, or one that is longer than the Hub allows."""
    if not title.strip():
        raise Refusal(400, "'title' must not be empty")
    must_be_short("title", title, MAX_TITLE)
