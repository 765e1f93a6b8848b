"""Discussions and pull requests of a repository, in its `discussions.json`.

A pull request is a discussion with a ref of its own, refs/pr/NUMBER. A merge applies its changes since the common
ancestor to its base branch. It is refused if both sides changed a file differently.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from fp8pipe.rehearsal.localhub.disk import Entry, now, read_json, write_json
from fp8pipe.rehearsal.localhub.refusals import Refusal
from fp8pipe.rehearsal.localhub.store import Change, Commit, Repo, Store

Status = Literal["draft", "open", "closed", "merged"]
EventType = Literal["comment", "commit", "status-change", "title-change"]


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened in a discussion."""

    id: str
    type: EventType
    author: str
    date: str
    text: str
    """The comment, the new status, the new title, or the commit's title."""
    detail: str = ""
    """The old title of a title change, the commit id of a commit."""


@dataclass(frozen=True, slots=True)
class Discussion:
    """One discussion, or one pull request when it has a base."""

    num: int
    title: str
    author: str
    created_at: str
    status: Status
    base: str | None
    """The branch that a pull request merges into; None for a plain discussion."""
    events: tuple[Event, ...] = ()
    merge_commit: str | None = None

    @property
    def ref(self) -> str:
        """The ref of a pull request's commits."""
        return f"refs/pr/{self.num}"


class Discussions:
    """The discussions of all repositories."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def all(self, repo: Repo) -> list[Discussion]:
        """Every discussion of a repository, by number."""
        try:
            raw = read_json(self._store.folder(repo.kind, repo.id) / "discussions.json")
        except FileNotFoundError:
            return []
        return [Discussion(**{**one, "events": tuple(Event(**event) for event in one["events"])}) for one in raw]

    def find(self, repo: Repo, num: int) -> Discussion:
        """The discussion with this number. Refused with 404 if there is none."""
        for discussion in self.all(repo):
            if discussion.num == num:
                return discussion
        raise Refusal(404, f"{repo.id} has no discussion {num}")

    def open(self, repo: Repo, title: str, description: str, author: str, *, pull: bool) -> Discussion:
        """A new discussion, or a draft pull request at main's head."""
        with self._store.lock:
            num = len(self.all(repo)) + 1
            if pull:
                self._store.point(repo, f"refs/pr/{num}", self._store.head_of(repo, "main"))
            status = "draft" if pull else "open"
            first = (new_event("comment", author, description),) if description else ()
            return self._save(repo, Discussion(num, title, author, now(), status, "main" if pull else None, first))

    def open_with(
        self,
        repo: Repo,
        base: str,
        changes: Sequence[Change],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None,
    ) -> tuple[Discussion, Commit]:
        """A new pull request that holds one commit."""
        with self._store.lock:
            num = len(self.all(repo)) + 1
            self._store.head_of(repo, base)  # only a branch can be the base
            commit = self._store.commit_as_pull(
                repo, num, base, changes, title=title, message=message, author=author, parent=parent
            )
            events = (new_event("comment", author, message), new_event("commit", author, title, commit.oid))
            return self._save(repo, Discussion(num, title, author, now(), "open", base, events)), commit

    def note_commit(self, repo: Repo, num: int, commit: Commit) -> None:
        """Record a commit that was added to a pull request."""
        with self._store.lock:
            discussion = self.find(repo, num)
            self._append(repo, discussion, new_event("commit", commit.author, commit.title, commit.oid))

    def comment(self, repo: Repo, num: int, author: str, text: str) -> Event:
        """Add a comment."""
        with self._store.lock:
            return self._append(repo, self.find(repo, num), new_event("comment", author, text))

    def rename(self, repo: Repo, num: int, author: str, title: str) -> Event:
        """Give a discussion another title."""
        with self._store.lock:
            discussion = self.find(repo, num)
            event = new_event("title-change", author, title, discussion.title)
            return self._append(repo, replace(discussion, title=title), event)

    def set_status(self, repo: Repo, num: int, author: str, status: Status, comment: str) -> Event:
        """Open or close a discussion."""
        with self._store.lock:
            discussion = self.find(repo, num)
            if discussion.status == "merged":
                raise Refusal(400, f"Pull request {num} is already merged")
            if comment:
                self._append(repo, discussion, new_event("comment", author, comment))
            changed = replace(self.find(repo, num), status=status)
            return self._append(repo, changed, new_event("status-change", author, status))

    def merge(self, repo: Repo, num: int, author: str, comment: str) -> Event:
        """Merge a pull request into its base branch. Refused with 409 on conflicts."""
        with self._store.lock:
            discussion = self.find(repo, num)
            if discussion.base is None:
                raise Refusal(400, f"{num} is a discussion, not a pull request; there is nothing to merge")
            if discussion.status not in {"open", "draft"}:
                raise Refusal(400, f"Pull request {num} is already {discussion.status}")
            ancestor, base, ours = self._three(repo, discussion)
            conflicts = conflicting(ancestor.tree, base.tree, ours.tree)
            if conflicts:
                raise Refusal(409, f"Pull request {num} conflicts with {discussion.base} in {', '.join(conflicts)}")
            tree = merged(ancestor.tree, base.tree, ours.tree)
            title = f"{discussion.title} (#{num})"
            commit = self._store.merge_commit(repo, discussion.base, ours.oid, tree, title=title, author=author)
            if comment:
                self._append(repo, discussion, new_event("comment", author, comment))
            done = replace(self.find(repo, num), status="merged", merge_commit=commit.oid)
            return self._append(repo, done, new_event("status-change", author, "merged"))

    def conflicts(self, repo: Repo, discussion: Discussion) -> list[str]:
        """The files that a pull request and its base changed differently."""
        if discussion.base is None or discussion.status == "merged":
            return []
        ancestor, base, ours = self._three(repo, discussion)
        return conflicting(ancestor.tree, base.tree, ours.tree)

    def _three(self, repo: Repo, discussion: Discussion) -> tuple[Commit, Commit, Commit]:
        """Common ancestor, head of the base, head of the pull request."""
        assert discussion.base is not None
        base = list(self._store.history(repo, discussion.base))
        known = {commit.oid for commit in base}
        pull = list(self._store.history(repo, discussion.ref))
        for commit in pull:
            if commit.oid in known:
                return commit, base[0], pull[0]
        raise Refusal(
            409,
            f"{discussion.ref} and {discussion.base} have no common history since a squash; open a new pull request",
        )

    def _append(self, repo: Repo, discussion: Discussion, event: Event) -> Event:
        self._save(repo, replace(discussion, events=(*discussion.events, event)))
        return event

    def _save(self, repo: Repo, discussion: Discussion) -> Discussion:
        others = [one for one in self.all(repo) if one.num != discussion.num]
        every = sorted([*others, discussion], key=lambda one: one.num)
        path = self._store.folder(repo.kind, repo.id) / "discussions.json"
        write_json(path, [asdict(one) for one in every], temporary=self._store.temporary)
        return discussion


def new_event(event_type: EventType, author: str, text: str, detail: str = "") -> Event:
    """An event that happens now."""
    return Event(secrets.token_hex(12), event_type, author, now(), text, detail)


Tree = Mapping[str, Entry]


def changed_paths(before: Tree, after: Tree) -> set[str]:
    """The paths that differ between two trees."""
    return {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}


def conflicting(ancestor: Tree, base: Tree, ours: Tree) -> list[str]:
    """The paths that both sides changed, each in another way; sorted."""
    both = changed_paths(ancestor, base) & changed_paths(ancestor, ours)
    return sorted(path for path in both if base.get(path) != ours.get(path))


def merged(ancestor: Tree, base: Tree, ours: Tree) -> dict[str, Entry]:
    """The base with the changes that we made since the ancestor."""
    result: dict[str, Any] = dict(base)
    for path in changed_paths(ancestor, ours):
        if path in ours:
            result[path] = ours[path]
        else:
            result.pop(path, None)
    return result
