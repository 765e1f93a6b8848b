"""Publish a checkpoint folder: an accepted folder in, a release out, verified on the Hub.

    evidence -> hashes -> private repository -> large files -> one commit -> verify -> tag -> public -> collection

Without the evidence in DIR/fp8pipe/ nothing is published. Every step checks the Hub before it acts: a run after a crash
resumes where the last one stopped, and the same bytes make no second commit. Only the folder's own files are uploaded,
and nothing here writes a time or a count that would differ the next time.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from pathlib import Path

from fp8pipe.errors import InputError
from fp8pipe.files import write_atomically
from fp8pipe.gate.publishable import require_publishable
from fp8pipe.hub.client import client, endpoint, translated
from fp8pipe.hub.collections import MAX_NOTE, add_to_collection
from fp8pipe.hub.upload import CARD, Say, Upload
from fp8pipe.model.identity import folder_identity
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records import RECORD_DIR, FileHash, Manifest, Release

MANIFEST = f"{RECORD_DIR}/manifest.json"

KEPT_PRIVATE = (
    *("*.tmp", "*.part", "*.partial", "*.incomplete", "*.lock", "*.log", "*.journal", "*.pyc"),
    f"{RECORD_DIR}/release.json",
)
"""Never uploaded, like everything hidden: unfinished files, traces of this machine, and the record of the upload."""


def publish(
    folder: Path,
    *,
    repo_id: str,
    card: str,
    note: str,
    collection: str | None = None,
    collection_description: str = "",
    progress: Progress = quiet,
) -> Release:
    """Put `folder` on the Hub as `repo_id`, and prove that it is there. Safe to repeat.

    `card` becomes README.md. `collection` is `namespace/title` or a slug, and is created with
    `collection_description` if there is none; `note` is shown in it. The record that is returned is not saved here.

    Raises Refused if the evidence does not allow it; InputError for a repository that holds something else, a tag that
    points elsewhere, or a note that is too long; AccessDenied; HubUnreachable; EnvironmentFault if the Hub holds other
    bytes than it was sent.
    """
    evidence = require_publishable(folder)
    checkpoint = evidence.checkpoint
    if len(note) > MAX_NOTE:
        raise InputError(f"collection note: {len(note)} characters, the Hub takes {MAX_NOTE}; shorten it")
    if not (folder / CARD).exists() or (folder / CARD).read_bytes() != card.encode():
        write_atomically(folder / CARD, card.encode())

    say = _reporter(progress, folder)
    files = _hashed(folder, checkpoint.fingerprint, say)
    api, tag = client(), checkpoint.release_tag
    upload = Upload(api, repo_id, folder, files, f"{checkpoint.model_id}, {checkpoint.recipe}", say)
    with translated(f"publishing to {repo_id}"):
        upload.create_repository()
        commit, new_commit = upload.commit(tag)
        upload.verify(commit)
        upload.tag(tag, commit)
        upload.make_public()
        say("collection")
        shown_in = None
        if collection is not None:
            shown_in = add_to_collection(api, repo_id, collection, note, description=collection_description)
        say("done")
    return Release(
        model_id=checkpoint.model_id,
        source_commit=checkpoint.source_commit,
        recipe=checkpoint.recipe,
        fingerprint=checkpoint.fingerprint,
        verdict=evidence.decision.verdict,
        endpoint=endpoint(),
        repo_id=repo_id,
        repo_url=f"{endpoint()}/{repo_id}",
        commit=commit,
        tag=tag,
        collection_slug=shown_in.slug if shown_in else None,
        collection_url=shown_in.url if shown_in else None,
        collection_note=note if shown_in else None,
        files=files,
        new_commit=new_commit,
    )


def _reporter(progress: Progress, folder: Path) -> Say:
    """Progress in bytes of the whole folder, with the step in words."""
    total = sum((folder / name).stat().st_size for name in _published_files(folder))
    done = 0

    def say(step: str, sent: int = 0, whole: bool = False) -> None:
        nonlocal done
        done = total if whole else done + sent
        progress(ProgressEvent("publish", done, total, "B", step))

    return say


# ------------------------------------------------------------------------------------------ contents


def _published_files(folder: Path) -> list[str]:
    """Names of the files that are uploaded, sorted. InputError for a link, which would publish its target."""
    names = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if any(part.startswith(".") for part in name.split("/")) or any(fnmatch(name, p) for p in KEPT_PRIVATE):
            continue
        if path.is_symlink():
            raise InputError(f"{path}: is a link, but only plain files are published; replace it with a copy")
        if path.is_file():
            names.append(name)
    return names


def _hashed(folder: Path, fingerprint: str, say: Say) -> tuple[FileHash, ...]:
    """Every published file with its sha256, the manifest last. The manifest saves hashing the weights again."""
    path, identity = folder / MANIFEST, folder_identity(folder)
    known = Manifest.load_if_present(path)
    remembered = {}
    if known is not None and known.identity == identity:
        remembered = {file.name: file for file in known.files if file.name.endswith(".safetensors")}
    files = []
    for name in _published_files(folder):
        if name == MANIFEST:
            continue
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
