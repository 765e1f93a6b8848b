"""Repositories on disk: settings, immutable commits, refs.

    ROOT/blobs/ab/<sha256>                       contents, shared
    ROOT/repos/{models,datasets}/NAMESPACE/NAME/
        repo.json                                settings; its presence means that the repository exists
        refs.json                                branches, tags and pull requests -> commit
        commits/<oid>.json                       one commit: parents, message, and the whole tree
        discussions.json                         see discussions.py
    ROOT/collections/<id>.json                   see collections.py

A commit is written before the ref that names it. The rename that replaces the refs is the instant of the commit. One
process serves the folder, and makes every change under one lock. Comes in: changes that the caller is allowed to make.
Goes out: frozen records, or a `Refusal`.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from fp8pipe.rehearsal.localhub.disk import Blobs, Entry, now, read_json, write_json
from fp8pipe.rehearsal.localhub.refusals import Refusal, entry_not_found, repo_not_found, revision_not_found

Kind = Literal["models", "datasets"]
Gating = Literal["auto", "manual"] | bool

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
"""The name of a namespace or repository. The name of a branch or tag may be several of these, joined by `/`."""
RESERVED_NAMESPACES = frozenset({"api", "datasets", "models", "spaces", "collections", "static"})
PULL = re.compile(r"refs/pr/(\d+)")
SHA = re.compile(r"[0-9a-f]{7,40}")

LFS_SUFFIXES = frozenset(
    "7z arrow bin bz2 ckpt ftz gz h5 joblib mlmodel model msgpack npy npz onnx ot parquet pb pickle pkl pt pth rar "  # noqa: SIM905
    "safetensors tar tflite tgz wasm xz zip zst".split()
)
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in sorted(LFS_SUFFIXES)).encode()
"""The file that every new repository starts with, as on the Hub."""


@dataclass(frozen=True, slots=True)
class Repo:
    """A repository's identity and settings."""

    kind: Kind
    id: str
    """namespace/name"""
    private: bool
    gated: Gating
    created_at: str
    granted: tuple[str, ...] = ()
    """Users who were granted access to a gated repository."""

    @property
    def namespace(self) -> str:
        return self.id.partition("/")[0]

    @property
    def url_path(self) -> str:
        """The path of its page: /org/name, /datasets/org/name."""
        return f"/{self.id}" if self.kind == "models" else f"/datasets/{self.id}"


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit with its whole tree."""

    oid: str
    parents: tuple[str, ...]
    title: str
    message: str
    author: str
    date: str
    tree: Mapping[str, Entry]


@dataclass(frozen=True, slots=True)
class Tag:
    """A fixed name for a commit."""

    target: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Refs:
    """The refs of a repository: all names of its commits."""

    branches: Mapping[str, str] = field(default_factory=dict)
    tags: Mapping[str, Tag] = field(default_factory=dict)
    pulls: Mapping[str, str] = field(default_factory=dict)
    """Number of the pull request, as text -> commit."""


@dataclass(frozen=True, slots=True)
class Put:
    """Add or replace a file."""

    path: str
    entry: Entry


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a file, or a folder with everything in it."""

    path: str
    folder: bool = False


Change = Put | Delete


class Store:
    """All repositories under one root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.temporary = root / "tmp"
        shutil.rmtree(self.temporary, ignore_errors=True)  # litter of a killed server
        self.temporary.mkdir(parents=True)
        self.blobs = Blobs(root / "blobs", self.temporary)
        self.lock = threading.RLock()

    # Repositories

    def folder(self, kind: Kind, repo_id: str) -> Path:
        """The folder of a repository. An id that could lead out of the root is refused as not found."""
        namespace, _, name = repo_id.partition("/")
        if not (NAME.fullmatch(namespace) and NAME.fullmatch(name)):
            raise repo_not_found(repo_id, signed_in=True)
        return self.root / "repos" / kind / namespace / name

    def find(self, kind: Kind, repo_id: str) -> Repo | None:
        """The repository; None if there is none."""
        try:
            settings = read_json(self.folder(kind, repo_id) / "repo.json")
        except FileNotFoundError:
            return None
        return Repo(kind, repo_id, **{**settings, "granted": tuple(settings["granted"])})

    def all(self, kind: Kind) -> Iterator[Repo]:
        """Every repository of a kind, by name."""
        for settings in sorted((self.root / "repos" / kind).glob("*/*/repo.json")):
            repo = self.find(kind, f"{settings.parent.parent.name}/{settings.parent.name}")
            if repo is not None:
                yield repo

    def create(self, kind: Kind, repo_id: str, *, private: bool, author: str) -> Repo:
        """A new repository with its first commit. Refused if the id is malformed (400) or in use (409)."""
        namespace, _, name = repo_id.partition("/")
        if not (NAME.fullmatch(namespace) and NAME.fullmatch(name)) or namespace in RESERVED_NAMESPACES:
            raise Refusal(400, f"{repo_id!r} is not a repository id of the form namespace/name")
        with self.lock:
            if self.find(kind, repo_id) is not None:
                raise Refusal(409, "You already created this repo", extra={"id": repo_id})
            repo = Repo(kind, repo_id, private, False, now())
            first = self._write_commit(
                repo, (), "initial commit", "", author, {".gitattributes": self.blobs.add(GITATTRIBUTES)}
            )
            self._write_refs(repo, Refs(branches={"main": first.oid}))
            self.save(repo)
            return repo

    def save(self, repo: Repo) -> None:
        """Write the settings."""
        settings = asdict(repo)
        del settings["kind"], settings["id"]
        self._write(self.folder(repo.kind, repo.id) / "repo.json", settings)

    def change_settings(self, repo: Repo, *, private: bool | None = None, gated: Gating | None = None) -> Repo:
        """The repository with new settings; None leaves a setting as it is."""
        with self.lock:
            changed = replace(
                repo,
                private=repo.private if private is None else private,
                gated=repo.gated if gated is None else gated,
            )
            self.save(changed)
            return changed

    def grant(self, repo: Repo, user: str) -> None:
        """Let a user read the files of a gated repository."""
        with self.lock:
            self.save(replace(repo, granted=tuple(sorted({*repo.granted, user}))))

    def delete(self, repo: Repo) -> None:
        """Remove a repository: the rename removes it at once. Blobs stay, as other repositories may share them."""
        with self.lock:
            grave = self.temporary / secrets.token_hex(8)
            self.folder(repo.kind, repo.id).rename(grave)
        shutil.rmtree(grave)

    def move(self, repo: Repo, new_id: str) -> None:
        """Give a repository another id. Refused with 409 if the new one is in use."""
        with self.lock:
            if self.find(repo.kind, new_id) is not None:
                raise Refusal(409, f"{new_id} already exists")
            target = self.folder(repo.kind, new_id)
            target.parent.mkdir(parents=True, exist_ok=True)
            self.folder(repo.kind, repo.id).rename(target)

    # Refs and commits

    def refs(self, repo: Repo) -> Refs:
        """The refs of a repository: all names of its commits."""
        raw = read_json(self.folder(repo.kind, repo.id) / "refs.json")
        return Refs(raw["branches"], {name: Tag(**tag) for name, tag in raw["tags"].items()}, raw["pulls"])

    def resolve(self, repo: Repo, revision: str) -> str:
        """The commit of a branch, a tag, a pull request's ref, or a commit id, which may be abbreviated."""
        refs = self.refs(repo)
        name = revision.removeprefix("refs/heads/")
        if name in refs.branches:
            return refs.branches[name]
        if revision.removeprefix("refs/tags/") in refs.tags:
            return refs.tags[revision.removeprefix("refs/tags/")].target
        if (pull := PULL.fullmatch(revision)) and pull[1] in refs.pulls:
            return refs.pulls[pull[1]]
        if SHA.fullmatch(revision):
            found = list((self.folder(repo.kind, repo.id) / "commits").glob(f"{revision}*.json"))
            if len(found) == 1:
                return found[0].stem
        raise revision_not_found(repo.id, revision)

    def commit_at(self, repo: Repo, revision: str) -> Commit:
        """The commit of a revision, with its tree."""
        oid = self.resolve(repo, revision)
        raw = read_json(self.folder(repo.kind, repo.id) / "commits" / f"{oid}.json")
        tree = {path: Entry(**entry) for path, entry in raw.pop("tree").items()}
        return Commit(oid, tuple(raw.pop("parents")), tree=tree, **raw)

    def history(self, repo: Repo, revision: str) -> Iterator[Commit]:
        """The commits of a revision, newest first, along first parents."""
        commit = self.commit_at(repo, revision)
        yield commit
        while commit.parents:
            commit = self.commit_at(repo, commit.parents[0])
            yield commit

    def commit(
        self,
        repo: Repo,
        revision: str,
        changes: Sequence[Change],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
    ) -> Commit:
        """Apply changes to a branch or pull request, atomically. Returns the new commit.

        Refused with 412 if `parent` is no longer the head. Changes that alter nothing make no commit; the head is
        returned.
        """
        with self.lock:
            head = self.commit_at(repo, self.head_of(repo, revision))
            must_be_head(head.oid, parent)
            tree = apply_changes(repo, head.tree, changes)
            if tree == head.tree:
                return head
            commit = self._write_commit(repo, (head.oid,), title, message, author, tree)
            self.point(repo, revision, commit.oid)
            return commit

    def commit_as_pull(
        self,
        repo: Repo,
        number: int,
        base: str,
        changes: Sequence[Change],
        *,
        title: str,
        message: str,
        author: str,
        parent: str | None = None,
    ) -> Commit:
        """Apply changes on top of `parent`, by default the head of `base`, as the commit of refs/pr/`number`."""
        with self.lock:
            head = self.commit_at(repo, parent or base)
            tree = apply_changes(repo, head.tree, changes)
            commit = self._write_commit(repo, (head.oid,), title, message, author, tree)
            self.point(repo, f"refs/pr/{number}", commit.oid)
            return commit

    def merge_commit(
        self, repo: Repo, branch: str, other: str, tree: Mapping[str, Entry], *, title: str, author: str
    ) -> Commit:
        """Put `tree` on a branch as a commit whose second parent is `other`."""
        with self.lock:
            head = self.head_of(repo, branch)
            commit = self._write_commit(repo, (head, other), title, "", author, tree)
            self.point(repo, branch, commit.oid)
            return commit

    def squash(self, repo: Repo, branch: str, *, title: str, author: str) -> Commit:
        """Replace a branch's history by one commit with the same files."""
        with self.lock:
            head = self.commit_at(repo, self.head_of(repo, branch))
            commit = self._write_commit(repo, (), title, "", author, head.tree)
            self.point(repo, branch, commit.oid)
            return commit

    def head_of(self, repo: Repo, revision: str) -> str:
        """The head of a branch or a pull request, the two kinds of refs that can move."""
        refs = self.refs(repo)
        if pull := PULL.fullmatch(revision):
            head = refs.pulls.get(pull[1])
        else:
            head = refs.branches.get(revision.removeprefix("refs/heads/"))
        if head is None:
            raise revision_not_found(repo.id, revision)
        return head

    def point(self, repo: Repo, revision: str, oid: str) -> None:
        """Point a branch or a pull request's ref to a commit; make it if there is none."""
        with self.lock:
            refs = self.refs(repo)
            if pull := PULL.fullmatch(revision):
                refs = replace(refs, pulls={**refs.pulls, pull[1]: oid})
            else:
                refs = replace(refs, branches={**refs.branches, revision.removeprefix("refs/heads/"): oid})
            self._write_refs(repo, refs)

    def add_branch(self, repo: Repo, name: str, start: str) -> None:
        """A new branch at a revision."""
        must_be_ref_name(name)
        with self.lock:
            if name in self.refs(repo).branches:
                raise Refusal(409, f"Reference already exists: refs/heads/{name}")
            self.point(repo, name, self.resolve(repo, start))

    def delete_branch(self, repo: Repo, name: str) -> None:
        """Remove a branch. Removing main is refused."""
        if name == "main":
            raise Refusal(400, "The main branch cannot be deleted")
        with self.lock:
            refs = self.refs(repo)
            if name not in refs.branches:
                raise revision_not_found(repo.id, name)
            self._write_refs(repo, replace(refs, branches=without(refs.branches, name)))

    def add_tag(self, repo: Repo, name: str, revision: str, message: str) -> None:
        """A new tag at a revision."""
        must_be_ref_name(name)
        with self.lock:
            refs = self.refs(repo)
            if name in refs.tags:
                raise Refusal(409, f"Tag reference exists already: refs/tags/{name}")
            tag = Tag(self.resolve(repo, revision), message)
            self._write_refs(repo, replace(refs, tags={**refs.tags, name: tag}))

    def delete_tag(self, repo: Repo, name: str) -> None:
        """Remove a tag."""
        with self.lock:
            refs = self.refs(repo)
            if name not in refs.tags:
                raise revision_not_found(repo.id, name)
            self._write_refs(repo, replace(refs, tags=without(refs.tags, name)))

    # Writing

    def _write_commit(
        self,
        repo: Repo,
        parents: tuple[str, ...],
        title: str,
        message: str,
        author: str,
        tree: Mapping[str, Entry],
    ) -> Commit:
        """Write a commit, named by a sha1 as clients expect: that of its JSON and a salt."""
        body = {
            "parents": parents,
            "title": title,
            "message": message,
            "author": author,
            "date": now(),
            "tree": {path: asdict(tree[path]) for path in sorted(tree)},
        }
        # The salt tells apart equal commits within one millisecond, as when a change is undone and redone.
        text = secrets.token_hex(8) + json.dumps(body, sort_keys=True)
        oid = hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()
        self._write(self.folder(repo.kind, repo.id) / "commits" / f"{oid}.json", body)
        return Commit(oid, parents, title, message, author, body["date"], tree)

    def _write_refs(self, repo: Repo, refs: Refs) -> None:
        self._write(self.folder(repo.kind, repo.id) / "refs.json", asdict(refs))

    def _write(self, path: Path, value: object) -> None:
        write_json(path, value, temporary=self.temporary)


def apply_changes(repo: Repo, tree: Mapping[str, Entry], changes: Iterable[Change]) -> dict[str, Entry]:
    """The tree after the changes. Refused if a file to delete is missing, or if a path would be file and folder."""
    result = dict(tree)
    for change in changes:
        match change:
            case Put(path, entry):
                result[path] = entry
            case Delete(path, folder):
                inside = f"{path.rstrip('/')}/"
                gone = [file for file in result if file.startswith(inside)] if folder else [path]
                if not gone or any(file not in result for file in gone):
                    raise entry_not_found(repo.id, path)
                for file in gone:
                    del result[file]
    must_be_one_tree(result)
    return result


def must_be_one_tree(tree: Mapping[str, Entry]) -> None:
    """Refuse a tree in which a path is both a file and a folder."""
    folders = {path[:i] for path in tree for i, character in enumerate(path) if character == "/"}
    both = sorted(folders & tree.keys())
    if both:
        raise Refusal(400, f"{both[0]!r} would be both a file and a folder")


def must_be_path(path: str) -> str:
    """The path; refused unless it is relative, without empty, `.` or `..` parts, and outside git's own folder."""
    parts = path.split("/")
    if not path or len(path) > 1024 or any(part in {"", ".", "..", ".git"} for part in parts) or not path.isprintable():
        raise Refusal(400, f"{path!r} is not a path inside a repository")
    return path


def must_be_ref_name(name: str) -> None:
    """Refuse what cannot be the name of a branch or tag."""
    if not all(NAME.fullmatch(part) for part in name.split("/")) or name.startswith("refs/") or ".." in name:
        raise Refusal(400, f"{name!r} is not a branch or tag name")


def must_be_head(head: str, parent: str | None) -> None:
    """Refuse if the commit that the client built on is no longer the head."""
    if parent is not None and not (SHA.fullmatch(parent) and head.startswith(parent)):
        raise Refusal(
            412,
            f"A commit has happened since. Please refresh and try again. (head {head}, parentCommit {parent})",
            extra={"head": head},
        )


def without(mapping: Mapping[str, str] | Mapping[str, Tag], name: str) -> dict:
    """The mapping without one key."""
    return {key: value for key, value in mapping.items() if key != name}
