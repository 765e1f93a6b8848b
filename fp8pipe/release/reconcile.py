"""Make a file's Hub collection list what the file says: a plan first, and then its changes.

    reconcile(spec)                 what would be added, updated and removed
    reconcile(spec, apply=True)     the same, done

The collection shall list each release of the file that is published and was not yanked, with the note of its verdict.
What a release is, its repository says: main's evidence, not a work folder. Nothing is quantized, measured or published
here, and items that no release of fp8pipe is behind belong to other people.

Safe to repeat: each change looks at the collection as it is then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from itertools import chain

from pydantic import ValidationError

from fp8pipe.config import CollectionSpec, ResolvedRelease
from fp8pipe.errors import EnvironmentFault, Refused
from fp8pipe.hub.account import account
from fp8pipe.hub.client import client, endpoint, translated
from fp8pipe.hub.collections import add_to_collection, find_collection, remove_from_collection
from fp8pipe.hub.published import Published, published_at
from fp8pipe.hub.source import model_id_of
from fp8pipe.records import CollectionChange, GateDecision, Reconciliation
from fp8pipe.release.card.verdict import collection_note

Look = Callable[[str], Published | None]
"""What main of a repository shows."""


def reconcile(spec: CollectionSpec, *, apply: bool = False) -> Reconciliation:
    """Compare the file's Hub collections with what is published, and with `apply` change them accordingly.

    Raises ConfigError for a file that names what does not exist; ModelNotFound for a collection named by a slug that
    does not exist; AccessDenied; HubUnreachable; EnvironmentFault if a collection lists something else again
    right after it was changed.
    """
    jobs = tuple(one.resolve() for one in spec.releases())
    with translated(f"reconciling collection {spec.collection.title}"):
        planned = _plan(jobs)
        if not apply or not planned.changes:
            return planned
        owner = account(client())
        for name in dict.fromkeys(change.collection for change in planned.changes):
            owner.require(name.removeprefix(f"{endpoint()}/collections/").partition("/")[0])
        descriptions = {job.spec.collection: job.spec.collection_description for job in jobs}
        for change in planned.changes:
            _apply(change, descriptions)
        if left := _plan(jobs).changes:
            raise EnvironmentFault(
                f"collection {left[0].collection}: still to {left[0].action} {left[0].repo_id} after the changes were "
                "made; somebody else is changing it. Look at it, and run again"
            )
    return planned.model_copy(update={"applied": True})


def wanted_releases(job: ResolvedRelease, look: Look) -> Iterator[Published]:
    """What is published of one entry of a file: by its recipe, and by the fallbacks that may have taken its place."""
    model_id = model_id_of(job.spec.model)
    for rung in job.ladder():
        found = look(rung.spec.repo_id)
        if found is not None and (found.model_id, found.recipe) == (model_id, rung.recipe.name):
            yield found


def _plan(jobs: Sequence[ResolvedRelease]) -> Reconciliation:
    look = cache(published_at)
    wanted: dict[str, dict[str, Published]] = {}
    missing: list[str] = []
    for job in jobs:
        found = tuple(wanted_releases(job, look))
        standing = {one.repo_id: one for one in found if one.yank is None}
        if not standing:
            missing.append(_missing(job, found, look))
        if job.spec.collection is not None:
            wanted.setdefault(job.spec.collection, {}).update(standing)
    found = [_differences(name, releases, look) for name, releases in wanted.items()]
    return Reconciliation(
        changes=tuple(chain.from_iterable(changes for changes, _ in found)),
        missing=tuple(missing),
        kept=tuple(chain.from_iterable(kept for _, kept in found)),
        applied=False,
    )


def _missing(job: ResolvedRelease, found: Sequence[Published], look: Look) -> str:
    """Why an entry of the file has no release to list."""
    spec = job.spec
    if found:
        yank = found[0].yank
        assert yank is not None
        return f"{spec.model}, {job.recipe.name}: {found[0].repo_id}: {yank.sentence()}"
    other = look(spec.repo_id)
    if other is not None:
        return f"{spec.model}, {job.recipe.name}: {spec.repo_id} holds {other.model_id}, {other.recipe}"
    return f"{spec.model}, {job.recipe.name}: not published as {spec.repo_id}"


def _differences(name: str, releases: Mapping[str, Published], look: Look) -> tuple[list[CollectionChange], list[str]]:
    """What one collection lists otherwise than these releases, and its items that fp8pipe has no say in."""
    collection = find_collection(client(), name)
    listed = {item.item_id: item for item in collection.items if item.item_type == "model"} if collection else {}
    change, changes, kept = partial(CollectionChange, collection=name), [], []
    for repo_id, release in releases.items():
        item = listed.pop(repo_id, None)
        note = _note(release)
        if item is None:
            why = f"{release.tag} is published and not listed"
            changes.append(change(action="add", repo_id=repo_id, note=note, why=why))
        elif note is not None and item.note != note:
            why = f"its note is not that of {release.tag}"
            changes.append(change(action="update", repo_id=repo_id, note=note, why=why))
    for repo_id in listed:
        found = look(repo_id)
        if found is None:
            kept.append(f"{repo_id} in {name}: no release of fp8pipe")
            continue
        unnamed = f"the file names no release of {found.model_id} with {found.recipe}"
        why = found.yank.sentence() if found.yank else unnamed
        changes.append(change(action="remove", repo_id=repo_id, note=None, why=why))
    return changes, kept


def _note(release: Published) -> str | None:
    """The line for its collection; None if this version of fp8pipe cannot read the decision."""
    try:
        return collection_note(GateDecision.model_validate_json(release.gate))
    except (ValidationError, Refused):
        return None


def _apply(change: CollectionChange, descriptions: Mapping[str | None, str]) -> None:
    api = client()
    if change.action == "remove":
        found = find_collection(api, change.collection)
        if found is not None:
            remove_from_collection(api, change.repo_id, found.slug)
    else:
        description = descriptions.get(change.collection, "")
        add_to_collection(api, change.repo_id, change.collection, change.note or "", description=description)
