"""Uploads one folder into one repository of the Hub, and verifies it by the Hub's own checksums.

Every step checks the state of the Hub before it acts. Run again after a crash, an upload continues from that state; run
again on the same bytes, it makes no second commit.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from fp8pipe.errors import EnvironmentFault, InputError
from fp8pipe.records import RECORD_DIR, FileHash

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

CARD = "README.md"
MARK = f"{RECORD_DIR}/checkpoint.json"
"""A repository with this file was made by fp8pipe."""


class Say(Protocol):
    """Reports a step in words. `sent` counts the bytes that reached the Hub since the last step; `whole` means all."""

    def __call__(self, step: str, sent: int = 0, whole: bool = False) -> None: ...


@dataclass(frozen=True)
class Upload:
    """The upload of `folder`, whose files have these hashes, into `repo_id`."""

    api: HfApi
    repo_id: str
    folder: Path
    files: tuple[FileHash, ...]
    title: str
    """The first words of the commit message."""
    say: Say

    def create_repository(self) -> None:
        """Create a private repository if there is none."""
        self.say("create repository")
        self.api.create_repo(self.repo_id, private=True, exist_ok=True)

    def commit(self, tag: str) -> tuple[str, bool]:
        """The commit that holds exactly the folder, and whether this call made it.

        If the tag exists, its commit is the release, and nothing is uploaded. Raises InputError if that commit holds
        other files, or if the repository holds files that fp8pipe did not make.
        """
        target = self._tagged(tag)
        if target is None:
            return self._committed()
        to_add, to_delete = self._changes(target)
        if to_add or to_delete:
            raise InputError(
                f"{self.repo_id}: tag {tag} exists and holds other files ({', '.join([*to_add, *to_delete][:3])}); "
                "a tag never moves: quantize again, or delete the tag to release this folder in its place"
            )
        return target, False

    def verify(self, commit: str) -> None:
        """Raise EnvironmentFault unless the Hub's checksum of every file of `commit` is that of the folder's file."""
        self.say("verify", whole=True)
        to_add, to_delete = self._changes(commit)
        if to_add or to_delete:
            raise EnvironmentFault(
                f"{self.repo_id}@{commit[:12]}: the Hub's checksums of {len(to_add)} files differ from what was sent "
                f"({', '.join(to_add[:3])}) and {len(to_delete)} files are extra; nothing was tagged, publish again"
            )

    def tag(self, tag: str, commit: str) -> None:
        """Make `tag` point to `commit`. Raises InputError if it points to another commit."""
        self.say("tag")
        if self._tagged(tag) is None:
            self.api.create_tag(self.repo_id, tag=tag, revision=commit, exist_ok=True)
        if (target := self._tagged(tag)) != commit:
            raise InputError(f"{self.repo_id}: tag {tag} points to {target}, not to {commit}; a tag never moves")

    def make_public(self) -> None:
        """Make the repository public."""
        self.say("make public")
        if self.api.model_info(self.repo_id).private:
            self.api.update_repo_settings(self.repo_id, private=False)

    # -------------------------------------------------------------------------------------- the commit

    def _committed(self) -> tuple[str, bool]:
        """Give main exactly the folder's content, by at most one commit on the head that was compared with it.

        A commit that fails may still have been applied, its answer lost; or another commit came first. Either way, read
        the head again, work out what is left to do, and try once more.
        """
        first, failure = self._head(), None
        for _ in range(2):
            head = self._head()
            to_add, to_delete = self._changes(head)
            if not to_add and not to_delete:
                return head, head != first
            failure = self._try_commit(head, to_add, to_delete)
        head = self._head()
        if failure is not None and any(self._changes(head)):
            raise failure
        return head, True

    def _try_commit(self, parent: str, to_add: list[str], to_delete: list[str]) -> Exception | None:
        """Commit on `parent`. Returns the error if it leaves open whether the commit was applied; raises any other."""
        import httpx2
        from huggingface_hub import CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        additions = self._preuploaded(to_add)
        self.say("commit")
        try:
            self.api.create_commit(
                self.repo_id,
                [*additions, *(CommitOperationDelete(path_in_repo=name) for name in to_delete)],
                commit_message=f"{self.title}: FP8 checkpoint with its evidence",
                parent_commit=parent,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 412 and error.response.status_code < 500:
                raise
            return error
        except httpx2.TransportError as error:
            return error
        return None

    def _preuploaded(self, names: list[str]) -> list[CommitOperationAdd]:
        """The files to add, after uploading the large ones. Those of an earlier run are still on the Hub."""
        additions = {file.name: self._addition(file) for file in self.files if file.name in names}
        small = [addition for name, addition in additions.items() if not name.endswith(".safetensors")]
        self.say("upload small files")
        self.api.preupload_lfs_files(self.repo_id, small, free_memory=False)
        for name, addition in additions.items():
            if name.endswith(".safetensors"):
                self.say(f"upload {name}")
                self.api.preupload_lfs_files(self.repo_id, [addition], free_memory=False)
                self.say(f"uploaded {name}", sent=addition.upload_info.size)
        return list(additions.values())

    def _addition(self, file: FileHash) -> CommitOperationAdd:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(path_in_repo=file.name, path_or_fileobj=self.folder / file.name)
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # saves a second reading of all weights
        return addition

    # -------------------------------------------------------------------------------------- what the Hub holds

    def _head(self) -> str:
        sha = self.api.model_info(self.repo_id).sha
        assert sha is not None
        return sha

    def _tagged(self, tag: str) -> str | None:
        """The commit that `tag` points to; None if there is no such tag."""
        return {ref.name: ref.target_commit for ref in self.api.list_repo_refs(self.repo_id).tags}.get(tag)

    def _changes(self, commit: str) -> tuple[list[str], list[str]]:
        """The names to add or replace, and the names to delete, that would make `commit` equal to the folder."""
        remote = self._remote(commit)
        foreign = set(remote) - {".gitattributes", CARD}
        if foreign and MARK not in remote:
            raise InputError(
                f"{self.repo_id}: holds files that fp8pipe did not make ({', '.join(sorted(foreign)[:3])}), and "
                "a release would replace them; name another repository, or delete this one first"
            )
        to_add = [file.name for file in self.files if not self._holds(remote.get(file.name), file)]
        to_delete = sorted(set(remote) - {file.name for file in self.files} - {".gitattributes"})
        return to_add, to_delete

    def _remote(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _holds(self, remote: RepoFile | None, file: FileHash) -> bool:
        """Whether the Hub's checksum is that of this file: the sha256 of a large file, git's sha1 of another."""
        if remote is None or remote.size != file.size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == file.sha256
        content = (self.folder / file.name).read_bytes()
        return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
