"""An accepted checkpoint folder goes in; a release on the Hub, proven by re-reading it, comes out.

    evidence -> private repository -> hashes -> large files -> one commit -> verify -> tag -> public -> collection

The evidence is what lies in DIR/fp8pipe/: there is no way to publish without it. Every step looks before it acts, so
that a run after a crash at any point goes on from there, and the same bytes make no second commit. Only what lies in
the folder is uploaded; nothing here writes a time or a count that would differ the next time.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fp8pipe.errors import EnvironmentFault, InputError, Refused
from fp8pipe.files import write_atomically
from fp8pipe.gate.approval import objection
from fp8pipe.hub.client import client, endpoint, translated
from fp8pipe.model.identity import folder_identity
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records import (
    RECORD_DIR,
    Checkpoint,
    EvalReport,
    FileHash,
    GateDecision,
    Manifest,
    Record,
    Release,
    ValidationReport,
)

if TYPE_CHECKING:
    from huggingface_hub import Collection, CommitOperationAdd, HfApi
    from huggingface_hub.hf_api import RepoFile

R = TypeVar("R", bound=Record)
Say = Callable[..., None]

MANIFEST = f"{RECORD_DIR}/manifest.json"
CARD = "README.md"
MARK = f"{RECORD_DIR}/checkpoint.json"
"""A repository that holds it was made by fp8pipe."""

KEPT_PRIVATE = (
    *("*.tmp", "*.part", "*.partial", "*.incomplete", "*.lock", "*.log", "*.journal", "*.pyc"),
    f"{RECORD_DIR}/release.json",
)
"""Never uploaded, like everything hidden: half-made files, traces of this machine, and the record of the upload."""

MAX_NOTE = 500
"""Characters of a collection note, a limit of the Hub."""


# ---------------------------------------------------------------------------------------------- evidence


@dataclass(frozen=True)
class Evidence:
    """What allows a folder to be published."""

    checkpoint: Checkpoint
    validation: ValidationReport
    candidate: EvalReport
    decision: GateDecision


def load_evidence(folder: Path) -> Evidence:
    """The evidence in DIR/fp8pipe/, if it allows `folder`, as it is now, to be published.

    Raises Refused with every objection when it does not.
    """
    evidence = Evidence(
        checkpoint=_required(Checkpoint, folder, "checkpoint.json", "quantize"),
        validation=_required(ValidationReport, folder, "validation.json", "validate"),
        candidate=_required(EvalReport, folder, "candidate.json", "gate --checkpoint"),
        decision=_required(GateDecision, folder, "gate.json", "gate --checkpoint"),
    )
    objections = [*_objections(folder, evidence), *_folder_objections(evidence, folder_identity(folder))]
    if objections:
        raise Refused(f"{folder} is not published:\n" + "\n".join(f"  {line}" for line in objections))
    return evidence


def _required(kind: type[R], folder: Path, name: str, stage: str) -> R:
    try:
        return kind.load(folder / RECORD_DIR / name)
    except InputError as error:
        raise Refused(f"{folder} is not published: {error}; run `fp8pipe {stage}` first") from error


def _objections(folder: Path, evidence: Evidence) -> Iterator[str]:
    """What the verdict forbids."""
    decision = evidence.decision
    if decision.candidate_fingerprint != evidence.checkpoint.fingerprint:
        yield (
            f"the gate decided on checkpoint {decision.candidate_fingerprint[:12]}, "
            f"this is {evidence.checkpoint.fingerprint[:12]}; run the gate on this one"
        )
    if decision.verdict == "rejected" or decision.vetoed:
        yield f"the gate rejected it: {decision.reason}"
    if decision.verdict == "inconclusive" and (unapproved := objection(folder, decision)):
        yield unapproved
    if decision.unchecked:
        yield f"the gate left rules unchecked: {', '.join(decision.unchecked)}; give it the evidence they need"


def _folder_objections(evidence: Evidence, identity: str) -> Iterator[str]:
    """What the folder itself forbids: unsound, or not what was validated and measured."""
    for finding in evidence.validation.errors:
        yield f"validation: {finding.sentence()}"
    if evidence.validation.folder_identity != identity:
        yield "the folder changed since it was validated; validate, evaluate and gate it again"
    if evidence.candidate.digest() != evidence.decision.candidate_report:
        yield f"{RECORD_DIR}/candidate.json is not the measurement that the gate decided on; run the gate again"
    if evidence.candidate.folder_identity != identity:
        yield "the folder changed since it was measured; evaluate and gate it again"


# ---------------------------------------------------------------------------------------------- publish


def publish(
    folder: Path,
    *,
    repo_id: str,
    card: str | None = None,
    collection: str | None = None,
    note: str | None = None,
    tag: str | None = None,
    private_first: bool = True,
    progress: Progress = quiet,
) -> Release:
    """Put `folder` on the Hub as `repo_id`, and prove it. Safe to repeat.

    `card` becomes README.md (None: the one in the folder stays). `collection` is `namespace/title` or a slug; it is
    made when there is none. `tag` defaults to `fp8pipe-` and 12 digits of the fingerprint. The caller saves the record.

    Raises Refused when the evidence does not allow it; InputError for a repository that holds something else, a tag
    that points elsewhere, a note that is too long; AccessDenied; HubUnreachable; EnvironmentFault when the Hub holds
    other bytes than it was given.
    """
    proof = load_evidence(folder)
    checkpoint, decision = proof.checkpoint, proof.decision
    if note is not None and len(note) > MAX_NOTE:
        raise InputError(f"collection note: {len(note)} characters, the Hub takes {MAX_NOTE}; shorten it")
    if card is not None and (not (folder / CARD).exists() or (folder / CARD).read_bytes() != card.encode()):
        write_atomically(folder / CARD, card.encode())
    tag = tag or f"fp8pipe-{checkpoint.fingerprint[:12]}"
    say = _teller(progress, folder)

    files = _contents(folder, checkpoint.fingerprint, say)
    api = client()
    with translated(f"publishing to {repo_id}"):
        say("create repository")
        api.create_repo(repo_id, private=private_first, exist_ok=True)
        upload = _Upload(api, repo_id, folder, files, say, title=f"{checkpoint.model_id}, {checkpoint.recipe}")
        commit, new_commit = upload.released(tag)
        say("verify", whole=True)
        upload.require_equal(commit)
        say("tag")
        _tag(api, repo_id, tag, commit)
        say("make public")
        if api.model_info(repo_id).private:
            api.update_repo_settings(repo_id, private=False)
        say("collection")
        shelf = _collect(api, repo_id, collection, note) if collection is not None else None
        say("done")
    return Release(
        model_id=checkpoint.model_id,
        source_commit=checkpoint.source_commit,
        recipe=checkpoint.recipe,
        fingerprint=checkpoint.fingerprint,
        verdict=decision.verdict,
        endpoint=endpoint(),
        repo_id=repo_id,
        repo_url=f"{endpoint()}/{repo_id}",
        commit=commit,
        tag=tag,
        collection_slug=shelf.slug if shelf else None,
        collection_url=shelf.url if shelf else None,
        collection_note=note if shelf else None,
        files=files,
        new_commit=new_commit,
    )


def _teller(progress: Progress, folder: Path) -> Say:
    """`say(step, sent=bytes)`: progress in bytes over the whole folder, with the step in words; `whole` once all of it
    is on the Hub, in the commit itself or from before."""
    total = sum((folder / name).stat().st_size for name in publishable(folder))
    done = 0

    def say(step: str, sent: int = 0, whole: bool = False) -> None:
        nonlocal done
        done = total if whole else done + sent
        progress(ProgressEvent("publish", done, total, "B", step))

    return say


# ---------------------------------------------------------------------------------------------- contents


def publishable(folder: Path) -> list[str]:
    """Names of the files that are uploaded, sorted. Raises InputError for a link, which would publish its target."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or any(fnmatch(name, p) for p in KEPT_PRIVATE):
            continue
        if path.is_symlink():
            raise InputError(f"{path}: is a link; only plain files are published, replace it by a copy")
        if path.is_file():
            names.append(name)
    return names


def _contents(folder: Path, fingerprint: str, say: Say) -> tuple[FileHash, ...]:
    """Every file to publish with its sha256. Weights are hashed once and remembered in the manifest, which is itself
    the last of the files."""
    path, identity = folder / MANIFEST, folder_identity(folder)
    known = Manifest.load_if_present(path)
    remembered = {}
    if known is not None and known.identity == identity:
        remembered = {file.name: file for file in known.files if file.name.endswith(".safetensors")}
    names = [name for name in publishable(folder) if name != MANIFEST]
    files = []
    for name in names:
        if name not in remembered:
            say(f"hash {name}")
        files.append(remembered.get(name) or _hash(folder, name))
    manifest = Manifest(fingerprint=fingerprint, identity=identity, files=tuple(files))
    if manifest != known:
        manifest.save(path)
    return (*files, _hash(folder, MANIFEST))


def _hash(folder: Path, name: str) -> FileHash:
    with (folder / name).open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return FileHash(name=name, size=(folder / name).stat().st_size, sha256=sha256)


# ---------------------------------------------------------------------------------------------- upload


@dataclass(frozen=True)
class _Upload:
    """One folder on its way into one repository."""

    api: HfApi
    repo_id: str
    folder: Path
    files: tuple[FileHash, ...]
    say: Say
    title: str

    def released(self, tag: str) -> tuple[str, bool]:
        """The commit that holds exactly the folder, and whether it was made just now.

        A tag that exists is the release: it must hold these bytes, and then nothing is left to upload.
        """
        target = _tagged(self.api, self.repo_id, tag)
        if target is None:
            return self._committed()
        to_add, to_delete = self._changes(target)
        if to_add or to_delete:
            raise InputError(
                f"{self.repo_id}: tag {tag} exists and holds other files ({', '.join([*to_add, *to_delete][:3])}); "
                "publish under another tag, or delete that one first"
            )
        return target, False

    def _committed(self) -> tuple[str, bool]:
        """Bring the head of main to the folder's content by at most one commit on a parent that was read before.

        A commit that fails may have been applied all the same (the answer was lost), or lost against somebody else's:
        either way the head is read again, what is still to do is worked out anew, and tried once more.
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

    def _head(self) -> str:
        sha = self.api.model_info(self.repo_id).sha
        assert sha is not None
        return sha

    def _try_commit(self, parent: str, to_add: list[str], to_delete: list[str]) -> Exception | None:
        """One commit on `parent`; the error when it may or may not have been applied."""
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
        """Additions whose large files are on the Hub already; those it has from an earlier run are not sent again."""
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
        addition.upload_info.sha256 = bytes.fromhex(file.sha256)  # known: spares a second reading of all weights
        return addition

    def _changes(self, commit: str) -> tuple[list[str], list[str]]:
        """Names to add or replace, and names to delete, to make `commit` equal to the folder."""
        remote = self._remote(commit)
        foreign = set(remote) - {".gitattributes", CARD}
        if foreign and MARK not in remote:
            raise InputError(
                f"{self.repo_id}: holds files that are not fp8pipe's ({', '.join(sorted(foreign)[:3])}), which "
                "a release would replace; name another repository, or delete this one first"
            )
        to_add = [file.name for file in self.files if not self._holds(remote.get(file.name), file)]
        to_delete = sorted(set(remote) - {file.name for file in self.files} - {".gitattributes"})
        return to_add, to_delete

    def _remote(self, commit: str) -> dict[str, RepoFile]:
        from huggingface_hub.hf_api import RepoFile

        tree = self.api.list_repo_tree(self.repo_id, revision=commit, recursive=True)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    def _holds(self, remote: RepoFile | None, file: FileHash) -> bool:
        """Whether the Hub's checksum says that it has this content: sha256 for large files, git's sha1 for others."""
        if remote is None or remote.size != file.size:
            return False
        if remote.lfs is not None:
            return remote.lfs.sha256 == file.sha256
        content = (self.folder / file.name).read_bytes()
        return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def require_equal(self, commit: str) -> None:
        """Compare every file of `commit` with the folder, by the Hub's own checksums."""
        to_add, to_delete = self._changes(commit)
        if to_add or to_delete:
            raise EnvironmentFault(
                f"{self.repo_id}@{commit[:12]}: the Hub's checksums of {len(to_add)} files differ from what was sent "
                f"({', '.join(to_add[:3])}), {len(to_delete)} files are too many; nothing was tagged: publish again"
            )


# ---------------------------------------------------------------------------------------------- tag, collection


def _tagged(api: HfApi, repo_id: str, tag: str) -> str | None:
    """The commit that `tag` points to."""
    targets = {ref.name: ref.target_commit for ref in api.list_repo_refs(repo_id).tags}
    return targets.get(tag)


def _tag(api: HfApi, repo_id: str, tag: str, commit: str) -> None:
    if _tagged(api, repo_id, tag) is None:
        api.create_tag(repo_id, tag=tag, revision=commit, exist_ok=True)
    if (target := _tagged(api, repo_id, tag)) != commit:
        raise InputError(f"{repo_id}: tag {tag} points to {target}, not to {commit}; publish under another tag")


def _collect(api: HfApi, repo_id: str, name: str, note: str | None) -> Collection:
    """Make sure that the collection exists and shows the model with this note."""
    shelf = _find_or_create(api, name)
    item = next((item for item in shelf.items if item.item_type == "model" and item.item_id == repo_id), None)
    if item is None:
        api.add_collection_item(shelf.slug, repo_id, "model", note=note, exists_ok=True)
    elif note is not None and item.note != note:
        api.update_collection_item(shelf.slug, item.item_object_id, note=note)
    return shelf


def _find_or_create(api: HfApi, name: str) -> Collection:
    """The collection that `namespace/title` or a slug means, with all its items."""
    namespace, slash, title = name.partition("/")
    if not (namespace and slash and title):
        raise InputError(f"collection {name}: expected namespace/title, or a slug as in the collection's address")
    if re.fullmatch(r"(?:[a-z0-9-]+-)?[0-9a-f]{24}", title):
        return api.get_collection(name)
    for shelf in api.list_collections(owner=namespace):
        if shelf.title == title:
            return api.get_collection(shelf.slug)  # a listing shows four items at most
    return api.create_collection(title, namespace=namespace, exists_ok=True)
