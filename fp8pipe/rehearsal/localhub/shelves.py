"""Collections on disk: one JSON file each, `ROOT/collections/<id>.json`, replaced whole by every change.

A slug is namespace/title-id; only the id counts: a slug from before a change of title still finds its collection.
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
MAX_DESCRIPTION = 150
MAX_NOTE = 500
"""Characters, as on the Hub."""


@dataclass(frozen=True, slots=True)
class Item:
    """One thing on a shelf."""

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


class Shelves:
    """All collections."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._folder = store.root / "collections"

    def all(self) -> Iterator[Collection]:
        """Every collection, the latest changed first."""
        found = (self._read(path.stem) for path in self._folder.glob("*.json"))
        yield from sorted((shelf for shelf in found if shelf is not None), key=lambda s: s.updated, reverse=True)

    def find(self, slug: str) -> Collection:
        """The collection that a slug, old or new, or a bare namespace/id means."""
        namespace, _, rest = slug.partition("/")
        identifier = rest.rpartition("-")[2]
        shelf = self._read(identifier) if re.fullmatch(r"[0-9a-f]{24}", identifier) else None
        if shelf is None or shelf.owner != namespace:
            raise Refusal(404, f"Collection not found: {slug}")
        return shelf

    def create(self, owner: str, title: str, description: str, *, private: bool) -> Collection:
        """A new collection. One of the same owner and title is refused with 409 and its slug."""
        must_be_title(title)
        must_be_short("description", description, MAX_DESCRIPTION)
        if not NAME.fullmatch(owner):
            raise Refusal(400, f"{owner!r} is not a namespace")
        with self._store.lock:
            for shelf in self.all():
                if (shelf.owner, shelf.title) == (owner, title):
                    raise Refusal(409, "A collection with this title exists already", extra={"slug": shelf.slug})
            shelf = Collection(secrets.token_hex(12), owner, title, description, private, now())
            return self._save(shelf)

    def change(
        self,
        shelf: Collection,
        *,
        title: str | None = None,
        description: str | None = None,
        private: bool | None = None,
        theme: str | None = None,
        position: int | None = None,
    ) -> Collection:
        """The collection with new metadata; None leaves something as it is."""
        must_be_title(shelf.title if title is None else title)
        must_be_short("description", description or "", MAX_DESCRIPTION)
        given = {"title": title, "description": description, "private": private, "theme": theme, "position": position}
        with self._store.lock:
            current = self.find(shelf.slug)
            return self._save(replace(current, **{key: value for key, value in given.items() if value is not None}))

    def delete(self, shelf: Collection) -> None:
        """Remove a collection; what it listed stays."""
        with self._store.lock:
            (self._folder / f"{shelf.id}.json").unlink()

    def add(self, shelf: Collection, item_type: ItemType, item_id: str, note: str | None) -> Collection:
        """Put something at the end of the shelf; refused with 409 if it is there."""
        must_be_short("note", note or "", MAX_NOTE)
        with self._store.lock:
            current = self.find(shelf.slug)
            if any((item.type, item.id) == (item_type, item_id) for item in current.items):
                raise Refusal(409, f"{item_id} is already in the collection {current.slug}")
            item = Item(secrets.token_hex(12), item_type, item_id, note or None)
            return self._save(replace(current, items=(*current.items, item)))

    def change_item(
        self, shelf: Collection, object_id: str, *, note: str | None = None, position: int | None = None
    ) -> Collection:
        """Give an item another note (an empty one removes it) or another place."""
        must_be_short("note", note or "", MAX_NOTE)
        with self._store.lock:
            current = self.find(shelf.slug)
            items = list(current.items)
            place = place_of(current, object_id)
            item = items.pop(place)
            if note is not None:
                item = replace(item, note=note or None)
            items.insert(place if position is None else position, item)
            return self._save(replace(current, items=tuple(items)))

    def remove(self, shelf: Collection, object_id: str) -> Collection:
        """Take an item off the shelf."""
        with self._store.lock:
            current = self.find(shelf.slug)
            place = place_of(current, object_id)
            return self._save(replace(current, items=current.items[:place] + current.items[place + 1 :]))

    def forget_repo(self, item_type: ItemType, repo_id: str) -> None:
        """Take a deleted repository off every shelf."""
        with self._store.lock:
            for shelf in list(self.all()):
                kept = tuple(item for item in shelf.items if (item.type, item.id) != (item_type, repo_id))
                if kept != shelf.items:
                    self._save(replace(shelf, items=kept))

    def rename_repo(self, item_type: ItemType, old_id: str, new_id: str) -> None:
        """Follow a moved repository on every shelf."""
        with self._store.lock:
            for shelf in list(self.all()):
                items = tuple(
                    replace(item, id=new_id) if (item.type, item.id) == (item_type, old_id) else item
                    for item in shelf.items
                )
                if items != shelf.items:
                    self._save(replace(shelf, items=items))

    def _read(self, identifier: str) -> Collection | None:
        try:
            raw = read_json(self._folder / f"{identifier}.json")
        except FileNotFoundError:
            return None
        return Collection(**{**raw, "items": tuple(Item(**item) for item in raw["items"])})

    def _save(self, shelf: Collection) -> Collection:
        shelf = replace(shelf, updated=now())
        write_json(self._folder / f"{shelf.id}.json", asdict(shelf), temporary=self._store.temporary)
        return shelf


def place_of(shelf: Collection, object_id: str) -> int:
    """Where an item stands."""
    for place, item in enumerate(shelf.items):
        if item.object_id == object_id:
            return place
    raise Refusal(404, f"No item {object_id} in the collection {shelf.slug}")


def must_be_short(name: str, text: str, limit: int) -> None:
    """The Hub's limits on texts."""
    if len(text) > limit:
        raise Refusal(400, f"{name!r} may have at most {limit} characters, found {len(text)}")


def must_be_title(title: str) -> None:
    """A title that says something."""
    if not title.strip():
        raise Refusal(400, "'title' must not be empty")
