"""Publish a checkpoint folder: an accepted folder in, a release out, verified on the Hub.

    evidence -> target -> hashes -> card -> private repository -> large files -> one commit -> verify -> tag
    -> visibility -> collection

Without the evidence in DIR/fp8pipe/ nothing is published, and what the Hub could refuse is asked before the first
byte. Every step checks the Hub before it acts: a run after a crash resumes where the last one stopped, and the same
content makes no second commit and no second tag. Only the folder's own files are uploaded, and nothing here writes a
time or a count that would differ the next time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from fp8pipe.config import Target
from fp8pipe.errors import EnvironmentFault, InputError, SourceChanged
from fp8pipe.files import write_atomically
from fp8pipe.gate.publishable import Evidence, require_publishable
from fp8pipe.hub.client import client, endpoint, translated, waits_told_to
from fp8pipe.hub.collections import MAX_NOTE, Listing, add_to_collection
from fp8pipe.hub.commits import ROUNDS
from fp8pipe.hub.contents import MANIFEST, read_at
from fp8pipe.hub.target import check_card, check_target
from fp8pipe.hub.upload import Refs, Say, Upload
from fp8pipe.model.identity import CARD, SIGNATURE, content_hashes, file_hashes, identity_of, published_files
from fp8pipe.progress import Progress, ProgressEvent, human_seconds, quiet
from fp8pipe.records import RECORD_DIR, FileHash, Manifest, Release
from fp8pipe.release.derived import derived, is_derived
from fp8pipe.release.signature import names, public_half, sign
from fp8pipe.release.tags import following, newest

_OF_THE_TAG = (CARD, MANIFEST, SIGNATURE)
"""Files that differ between two releases of the same evidence."""

CREATED = f"{RECORD_DIR}/.created"
"""Names the repository that publishing this folder created and has not shown yet: only such a repository, whose owner
cannot have chosen yet who may see it, is shown."""


def publish(
    folder: Path,
    target: Target,
    *,
    card: Callable[[str], str],
    note: str,
    progress: Progress = quiet,
) -> Release:
    """Put `folder` on the Hub, and prove that it is there. Safe to repeat.

    `card` renders README.md for the tag of the release. The collection is created if there is none; `note` is shown in
    it. The record that is returned is not saved here.

    Raises Refused if the evidence does not allow it; InputError for a target that does not fit, a card that the Hub
    does not accept, a note that is too long, or a key that cannot sign; AccessDenied; HubUnreachable; EnvironmentFault
    if the Hub holds other bytes than it was sent.
    """
    evidence = require_publishable(folder)
    say = _reporter(progress, folder)
    created, address = folder / CREATED, f"{endpoint()}/{target.repo_id}"
    unfinished = created.is_file() and created.read_text() == address
    upload = _checked(folder, target, evidence, note, say, unfinished=unfinished)

    def tell(seconds: float) -> None:
        say(f"wait {human_seconds(seconds)}, as the Hub asks")

    with translated(f"publishing to {target.repo_id}"), waits_told_to(tell):
        refs = upload.refs() if upload.clearance.exists else Refs("", {})
        check_card(upload.api, card(following(refs.tags, evidence.checkpoint.fingerprint)))
        contents = _Contents(folder, target, evidence, card, say)
        if not upload.clearance.exists:
            write_atomically(created, address.encode())
            upload.create_repository()
        released = _released(upload, contents)
        if unfinished or not upload.clearance.exists:
            upload.show()
            created.unlink()
        say("collection")
        shown_in = None
        if target.collection is not None:
            description = target.collection_description
            shown_in = add_to_collection(upload.api, target.repo_id, target.collection, note, description=description)
        say("done")
    return _record(evidence, upload, released, shown_in, note)


def _checked(folder: Path, target: Target, evidence: Evidence, note: str, say: Say, *, unfinished: bool) -> Upload:
    """The upload, once nothing is known that the Hub could refuse."""
    if len(note) > MAX_NOTE:
        raise InputError(f"collection note: {len(note)} characters, the Hub takes {MAX_NOTE}; shorten it")
    if target.sign is not None:
        public_half(Path(target.sign.key))
    say("check target")
    checkpoint = evidence.checkpoint
    local = checkpoint.source_commit.startswith("local-")
    clearance = check_target(target, checkpoint.model_id, local=local, unfinished=unfinished)
    return Upload(client(), target, clearance, checkpoint.model_id, folder, say)


class _Released(NamedTuple):
    """A release on the Hub."""

    tag: str
    commit: str
    new_commit: bool
    files: tuple[FileHash, ...]


def _record(evidence: Evidence, upload: Upload, released: _Released, shown_in: Listing | None, note: str) -> Release:
    checkpoint = evidence.checkpoint
    return Release(
        model_id=checkpoint.model_id,
        source_commit=checkpoint.source_commit,
        recipe=checkpoint.recipe,
        fingerprint=checkpoint.fingerprint,
        verdict=evidence.decision.verdict,
        endpoint=endpoint(),
        repo_id=upload.repo_id,
        repo_url=f"{endpoint()}/{upload.repo_id}",
        visibility=upload.clearance.visibility,
        visibility_note=upload.clearance.note,
        commit=released.commit,
        tag=released.tag,
        collection_slug=shown_in.slug if shown_in else None,
        collection_url=shown_in.url if shown_in else None,
        collection_note=note if shown_in else None,
        files=released.files,
        new_commit=released.new_commit,
    )


def _released(upload: Upload, contents: _Contents) -> _Released:
    """The repository's newest release if that is this content, and otherwise a new release."""
    checkpoint, fingerprint = contents.checkpoint, contents.checkpoint.fingerprint
    for _ in range(ROUNDS):
        tags = upload.refs().tags
        tag = newest(tags, fingerprint)
        if tag is not None and tag != upload.clearance.yanked:
            files = contents.tagged(tag, signature=read_at(upload.api, upload.repo_id, tags[tag], SIGNATURE))
            if upload.holds(tags[tag], files):
                upload.verify(tags[tag], files)
                return _Released(tag, tags[tag], False, files)
        tag = following(tags, fingerprint)
        files = contents.tagged(tag)
        commit, new_commit = upload.commit(files, f"{tag}: {checkpoint.model_id}, {checkpoint.recipe}")
        upload.verify(commit, files)
        if upload.tag(tag, commit):
            return _Released(tag, commit, new_commit, files)
    raise EnvironmentFault(f"{upload.repo_id}: other publishers took every tag that this release tried; publish again")


def _reporter(progress: Progress, folder: Path) -> Say:
    """Progress in bytes of the whole folder, with the step in words."""
    total = sum((folder / name).stat().st_size for name in published_files(folder))
    done = 0

    def say(step: str, sent: int = 0, whole: bool = False) -> None:
        nonlocal done
        done = total if whole else done + sent
        progress(ProgressEvent("publish", done, total, "B", step))

    return say


# ------------------------------------------------------------------------------------------ contents


class _Contents:
    """What is published: the folder's files, hashed once, with the card and the manifest of a tag."""

    def __init__(self, folder: Path, target: Target, evidence: Evidence, card: Callable[[str], str], say: Say) -> None:
        say("hash")
        self.checkpoint = evidence.checkpoint
        self._folder = folder
        self._target = target
        self._card = card
        made = derived(folder, evidence, content_hashes(folder))
        for name in filter(is_derived, published_files(folder)):
            if name not in made:  # an earlier release of other evidence made it
                (folder / name).unlink()
        for name, content in made.items():
            _write(folder / name, content)
        self._hashes = file_hashes(folder, (name for name in published_files(folder) if name not in _OF_THE_TAG))
        self._identity = identity_of(self._hashes)
        if self._identity != evidence.validation.folder_identity:
            raise SourceChanged(f"{folder}: altered since this run began; nothing was uploaded, publish again")

    def tagged(self, tag: str, signature: bytes | None = None) -> tuple[FileHash, ...]:
        """Every published file as the release `tag` has it. Writes the card, the manifest and the signature.

        signature: that of the release with this tag on the Hub, which is kept if it still holds."""
        _write(self._folder / CARD, self._card(tag).encode())
        files = tuple(sorted((*self._hashes, *file_hashes(self._folder, [CARD])), key=lambda file: file.name))
        manifest = Manifest(
            repo_id=self._target.repo_id,
            tag=tag,
            fingerprint=self.checkpoint.fingerprint,
            identity=self._identity,
            files=files,
        )
        path = self._folder / MANIFEST
        if manifest != Manifest.load_if_present(path):
            manifest.save(path)
        files = (*files, *file_hashes(self._folder, [MANIFEST]))
        return (*files, *self._signed(files, signature))

    def _signed(self, files: tuple[FileHash, ...], known: bytes | None) -> tuple[FileHash, ...]:
        """The signature of these files: by the target's key, or one that was made before and holds."""
        path = self._folder / SIGNATURE
        if known is not None and not (path.is_file() and names(path, files)):
            write_atomically(path, known)
        if self._target.sign is not None:
            sign(self._folder, self._target.repo_id, files, Path(self._target.sign.key))
        elif path.is_file() and not names(path, files):
            path.unlink()
        return file_hashes(self._folder, [SIGNATURE] if path.is_file() else [])


def _write(path: Path, content: bytes) -> None:
    """Write a file, unless it has that content."""
    if not path.exists() or path.read_bytes() != content:
        write_atomically(path, content)
