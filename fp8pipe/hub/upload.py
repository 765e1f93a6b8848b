"""Uploads one folder into one repository of the Hub, and verifies it by the Hub's own checksums.

Every step checks the state of the Hub before it acts. Run again after a crash, an upload continues from that state; run
again on the same bytes, it makes no second commit. A repository that only its owners can read gets its commit directly.
Any other gets a pull request, which is merged after the Hub's checksums were compared, so that main never shows
anything unverified.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fp8pipe.config import Target
from fp8pipe.errors import AccessDenied, EnvironmentFault
from fp8pipe.hub.client import endpoint
from fp8pipe.hub.commits import settled
from fp8pipe.hub.contents import OF_THE_REPOSITORY, files_at
from fp8pipe.hub.target import Clearance, require_replaceable, visibility_of
from fp8pipe.records import FileHash

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, Discussion, HfApi
    from huggingface_hub.hf_api import RepoFile

UPLOADS = 4
"""Groups of files that are sent at the same time."""
GROUP_BYTES = 64_000_000
"""Files are sent in groups of about this size: a request about a group costs as much as one about a file."""
OURS = re.compile(r"fp8-[0-9a-f]{8}-\d+: ")
"""How the titles of our commits and pull requests begin."""


Changes = tuple[list[str], list[str]]
"""Names to add or replace, and names to delete."""


class Say(Protocol):
    """Reports a step in words. `sent` counts the bytes that reached the Hub since the last step; `whole` means all."""

    def __call__(self, step: str, sent: int = 0, whole: bool = False) -> None: ...


@dataclass(frozen=True)
class Refs:
    """The names of a repository's commits."""

    head: str
    """The commit of main."""
    tags: Mapping[str, str]
    """Tag -> commit."""


@dataclass(frozen=True)
class Upload:
    """The upload of `folder` to its target."""

    api: HfApi
    target: Target
    clearance: Clearance
    model_id: str
    """The base model. Another model's release is not replaced."""
    folder: Path
    say: Say

    @property
    def repo_id(self) -> str:
        return self.target.repo_id

    def create_repository(self) -> None:
        """Create a private repository if there is none."""
        self.say("create repository")
        self.api.create_repo(self.repo_id, private=True, exist_ok=True)

    def refs(self) -> Refs:
        """The head of main and the tags, as they are now."""
        found = self.api.list_repo_refs(self.repo_id)
        head = next(branch.target_commit for branch in found.branches if branch.name == "main")
        return Refs(head, {tag.name: tag.target_commit for tag in found.tags})

    def commit(self, files: Sequence[FileHash], title: str) -> tuple[str, bool]:
        """The commit on main that holds exactly `files`, and whether this call made it."""
        first = self.refs().head

        def attempt() -> tuple[str, bool] | None:
            head = self.refs().head
            changes = self._changes(head, files)
            if not any(changes):
                self._close_stale(head)
                return head, head != first
            if not self.target.replace:
                require_replaceable(self.api, self.repo_id, head, self.model_id)
            if self.api.model_info(self.repo_id).private:
                self._send(head, files, changes, title)
            else:
                self._propose(head, files, changes, title)
            return None

        return settled(self.repo_id, attempt)

    def holds(self, commit: str, files: Sequence[FileHash]) -> bool:
        """Whether `commit` has exactly these files, by the Hub's own checksums."""
        return not any(self._changes(commit, files))

    def verify(self, commit: str, files: Sequence[FileHash]) -> None:
        """Raise EnvironmentFault unless the Hub's checksum of every file of `commit` is that of the folder's file."""
        self.say("verify", whole=True)
        to_add, to_delete = self._changes(commit, files)
        if to_add or to_delete:
            raise EnvironmentFault(
                f"{self.repo_id}@{commit[:12]}: the Hub's checksums of {len(to_add)} files differ from what was sent "
                f"({', '.join(to_add[:3])}) and {len(to_delete)} files are extra; nothing was tagged, publish again"
            )

    def tag(self, tag: str, commit: str) -> bool:
        """Make `tag` if there is none. Whether it points to `commit` now: a tag never moves."""
        self.say("tag")
        if tag not in self.refs().tags:
            self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
        return self.refs().tags.get(tag) == commit

    def show(self) -> None:
        """Let the repository be seen by those who may see the release. Raises AccessDenied if the Hub forbids it."""
        from huggingface_hub.errors import HfHubHTTPError

        wanted = self.clearance.visibility
        self.say(f"make {wanted}")
        if visibility_of(self.api.model_info(self.repo_id)) == wanted:
            return
        try:
            gated = self.clearance.gating if wanted == "gated" else False
            self.api.update_repo_settings(self.repo_id, private=wanted == "private", gated=gated)
        except HfHubHTTPError as error:
            if error.response.status_code not in {400, 402, 403}:
                raise
            raise AccessDenied(
                f"{self.repo_id}: {endpoint()} does not let it be {wanted}: {error.server_message or error}; the "
                "release is complete and tagged, and private. Publish it with visibility: private, or ask an owner of "
                f"{self.repo_id.partition('/')[0]} to allow it, and publish again"
            ) from error

    # -------------------------------------------------------------------------------------- the commit

    def _send(
        self,
        parent: str,
        files: Sequence[FileHash],
        changes: Changes,
        title: str,
        *,
        pull: bool = False,
    ) -> None:
        """Commit on `parent`: to main, or as a new pull request."""
        from huggingface_hub import CommitOperationDelete

        to_add, to_delete = changes
        additions = self._preuploaded([file for file in files if file.name in to_add], pull=pull)
        self.say("commit")
        self.api.create_commit(
            self.repo_id,
            [*additions, *(CommitOperationDelete(path_in_repo=name) for name in to_delete)],
            commit_message=title,
            parent_commit=parent,
            create_pr=pull,
        )

    def _propose(self, head: str, files: Sequence[FileHash], changes: Changes, title: str) -> None:
        """Open a pull request on `head`, unless there is one with these files; verify it and merge it.

        All publishers of the same files merge the same pull request, the first one.
        """
        if not self._ready(head, files):
            self._send(head, files, changes, title, pull=True)
        self.say("verify pull request")
        for pull in self._ready(head, files)[:1]:
            if self.refs().head == head:
                self._merge(pull.num)

    def _merge(self, number: int) -> None:
        from huggingface_hub.errors import BadRequestError

        self.say("merge")
        try:
            self.api.merge_pull_request(self.repo_id, number)
        except BadRequestError:
            if any(pull.num == number for pull in self._pulls()):
                raise
            # another publisher merged or closed it in the meantime; the next round sees which

    def _ready(self, head: str, files: Sequence[FileHash]) -> list[Discussion]:
        """Our open pull requests that would make main hold exactly `files`, the first one first."""
        ready = [
            pull for pull in self._pulls() if self._parent(pull) == head and self.holds(f"refs/pr/{pull.num}", files)
        ]
        return sorted(ready, key=lambda pull: pull.num)

    def _close_stale(self, head: str) -> None:
        """Close our pull requests that are based on another commit than main's `head`: nobody will merge them."""
        if self.api.model_info(self.repo_id).private:
            return
        for pull in self._pulls():
            if self._parent(pull) != head:
                self.api.change_discussion_status(
                    self.repo_id, pull.num, "closed", comment="Another release came first, or this one was interrupted."
                )

    def _pulls(self) -> Iterator[Discussion]:
        """Our open pull requests."""
        found = self.api.get_repo_discussions(
            self.repo_id, author=self.clearance.user, discussion_type="pull_request", discussion_status="open"
        )
        return (pull for pull in found if OURS.match(pull.title))

    def _parent(self, pull: Discussion) -> str | None:
        """The commit of main that a pull request of ours, which has one commit, is based on."""
        history = self.api.list_repo_commits(self.repo_id, revision=f"refs/pr/{pull.num}")
        return history[1].commit_id if len(history) > 1 else None

    # -------------------------------------------------------------------------------------- the files

    def _preuploaded(self, files: Sequence[FileHash], *, pull: bool) -> list[CommitOperationAdd]:
        """The files to add, after uploading the large ones. Those of an earlier run are still on the Hub."""
        additions = [self._addition(file) for file in files]
        weights = [addition for addition in additions if addition.path_in_repo.endswith(".safetensors")]

        def send(group: Sequence[CommitOperationAdd]) -> int:
            self.api.preupload_lfs_files(self.repo_id, group, create_pr=pull, num_threads=1, free_memory=False)
            return sum(addition.upload_info.size for addition in group)

        self.say("upload small files")
        send([addition for addition in additions if addition not in weights])
        self.say("upload weights")
        with ThreadPoolExecutor(UPLOADS) as pool:
            sending = {pool.submit(copy_context().run, send, group): group for group in _groups(weights)}
            try:
                for done in as_completed(sending):
                    self.say(f"uploaded {sending[done][-1].path_in_repo}", sent=done.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # what is on its way arrives, and nothing new starts
                raise
        return additions

    def _addition(self, file: FileHash) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=self.folder / file.name)
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # saves a second reading of all weights
        return addition

    # -------------------------------------------------------------------------------------- what the Hub holds

    def _changes(self, commit: str, files: Sequence[FileHash]) -> Changes:
        """What would make `commit` hold exactly `files`."""
        remote = files_at(self.api, self.repo_id, commit)
        to_add = [file.name for file in files if not self._same(remote.get(file.name), file)]
        to_delete = sorted(set(remote) - {file.name for file in files} - OF_THE_REPOSITORY)
        return to_add, to_delete

    def _same(self, remote: RepoFile | None, file: FileHash) -> bool:
        """Whether the Hub's checksum is that of this file: the sha256 of a large file, git's sha1 of another."""
        if remote is None or remote.size != file.size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == file.sha256
        content = (self.folder / file.name).read_bytes()
        return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _groups(additions: Sequence[CommitOperationAdd]) -> Iterator[list[CommitOperationAdd]]:
    """Files in their order, in groups of about GROUP_BYTES."""
    group: list[CommitOperationAdd] = []
    for addition in additions:
        group.append(addition)
        if sum(one.upload_info.size for one in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
