"""Verify a release: anyone can, with nothing but what was published. Nothing in it is believed.

    files        each is the one that the manifest names, by the Hub's own checksums or by its bytes; none is added
    structure    headers and configs describe a checkpoint without errors
    evidence     the records follow from each other, and what was validated and measured is what is here
    verdict      made again from the samples of both reports, it is what gate.json says, and allows a release
    card         rendered again from the evidence, it is README.md
    tag          the Hub has this very commit under the tag that the manifest names
    provenance   made again from the records, the files for others' tools are what is here (derived.py)
    standing     main does not say that the release was yanked
    signature    model.sig signs exactly these files

In: a repository or a folder. Out: a Verification, with one Proof for each part. What is wrong with a release is never
an exception.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from fp8pipe import __version__
from fp8pipe.errors import InputError, Refused
from fp8pipe.gate.publishable import Evidence, changed, not_rederived, unsound, verdict_objections
from fp8pipe.hub.client import client, translated
from fp8pipe.hub.contents import GITATTRIBUTES, MANIFEST, YANKED
from fp8pipe.hub.download import fetch
from fp8pipe.hub.source import resolve, tags_of
from fp8pipe.hub.yanked import with_banner, without_banner, yanked_at
from fp8pipe.model.identity import CARD, SIGNATURE, file_hashes, identity_of, published_files
from fp8pipe.progress import Progress, quiet
from fp8pipe.quantize.identity import fingerprint_of
from fp8pipe.records import RECORD_DIR, FileHash, Manifest, Proof, Snapshot, SourceFile, Verification, Yanked
from fp8pipe.records.paths import record_path
from fp8pipe.release.card import card_for_folder
from fp8pipe.release.derived import derived, is_derived
from fp8pipe.release.signature import why_broken
from fp8pipe.release.tags import is_release
from fp8pipe.release.yank import banner
from fp8pipe.validate import validate

_MALFORMED = (ArithmeticError, AssertionError, AttributeError, LookupError, Refused, TypeError, ValueError)
"""What records raise that were written by somebody else than a stage."""


@dataclass(frozen=True)
class _Published:
    """A release as it was found."""

    snapshot: Snapshot
    folder: Path
    """Its files, without those that are only on the Hub."""
    files: tuple[FileHash, ...]
    """All its files."""
    corrupt: tuple[str, ...]
    """What is wrong with files, whatever the manifest says."""
    manifest: Manifest | None
    card: bytes | None
    """README.md as it is, with a banner if the release was yanked."""


def verify(target: str, *, download: bool = False, key: Path | None = None, progress: Progress = quiet) -> Verification:
    """Look at every part of the release `target`: a repository, `repository@tag`, or a folder.

    download: read every byte, where otherwise the Hub's own checksums tell of weights. key: the signer's EC public key
    (PEM). Raises ModelNotFound, RevisionNotFound, AccessDenied, HubUnreachable, and InputError for a repository without
    a model, or a key that cannot be read.
    """
    snapshot = resolve(target)
    with TemporaryDirectory(prefix="fp8pipe-verify-") as temporary:
        found = _read(snapshot, Path(temporary), download=download, progress=progress)
        return Verification(
            model_id=snapshot.model_id,
            commit=None if snapshot.is_local else snapshot.commit,
            tag=found.manifest.tag if found.manifest else "",
            proofs=(
                _files(found),
                _structure(found, download),
                *_records(found),
                _tag(found, target),
                *_standing(found),
                _signature(found, key),
            ),
        )


def _settled(part: str, faults: Iterable[str], proven: str) -> Proof:
    """The proof of a part: broken by each of its faults, or proven."""
    listed = tuple(faults)
    return Proof(part=part, outcome="broken" if listed else "proven", found=listed or (proven,))


def _open(part: str, why: str) -> Proof:
    return Proof(part=part, outcome="open", found=(why,))


# ------------------------------------------------------------------------------------------ what is there


def _read(snapshot: Snapshot, folder: Path, *, download: bool, progress: Progress) -> _Published:
    """The release with the hashes of all its files, and links in `folder` to those that are on this machine."""
    if snapshot.is_local:
        root, corrupt = snapshot.path, ()
        files = file_hashes(root, published_files(root))
    else:
        root, files, corrupt = _from_the_hub(snapshot, download=download, progress=progress)
    card = (root / CARD).read_bytes() if (root / CARD).is_file() else None
    for file in files:
        if (root / file.name).is_file():
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            (folder / file.name).symlink_to((root / file.name).resolve())
    if not snapshot.is_local:
        files = _of_the_release(folder, files, card)
    manifest = Manifest.load_if_present(record_path(folder, "manifest"))
    return _Published(snapshot, folder, files, tuple(corrupt), manifest, card)


def _of_the_release(folder: Path, files: tuple[FileHash, ...], card: bytes | None) -> tuple[FileHash, ...]:
    """The files without what a yank adds: its record and the banner in the card. Takes them from `folder`, too."""
    if Yanked.load_if_present(folder / YANKED) is None:
        return files
    (folder / YANKED).unlink()
    if card is not None:
        (folder / CARD).unlink()
        (folder / CARD).write_bytes(without_banner(card))
    kept = [file for file in files if file.name not in {YANKED, CARD}]
    return tuple(sorted([*kept, *file_hashes(folder, [CARD] if card is not None else [])], key=lambda file: file.name))


def _from_the_hub(
    snapshot: Snapshot, *, download: bool, progress: Progress
) -> tuple[Path, tuple[FileHash, ...], list[str]]:
    """The folder in the cache, every file with its sha256, and each whose bytes are not those of the Hub's checksum.

    Of a large file the Hub's checksum is the sha256, and it is fetched only for `download`; of any other it is git's.
    """
    corrupt = [f"{file.name!r} leads out of the repository" for file in snapshot.files if not _is_inside(file.name)]
    present = [file for file in snapshot.files if file.name != GITATTRIBUTES and _is_inside(file.name)]
    wanted = [file for file in present if download or not _is_large(file) or file.name.startswith(f"{RECORD_DIR}/")]
    root = fetch(snapshot, wanted, progress)
    hashes = {file.name: file for file in file_hashes(root, [file.name for file in wanted])}
    for file in wanted:
        if file.oid not in {hashes[file.name].sha256, None if _is_large(file) else _git_hash(root / file.name)}:
            corrupt.append(f"{file.name}: its bytes are not those of the Hub's own checksum; they were damaged")
    for file in present:
        if file.name not in hashes:
            assert file.oid is not None, "a large file of the Hub has its sha256"
            hashes[file.name] = FileHash(name=file.name, size=file.size, sha256=file.oid)
    return root, tuple(hashes[name] for name in sorted(hashes)), corrupt


def _is_inside(name: str) -> bool:
    return not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts


def _is_large(file: SourceFile) -> bool:
    """Whether the Hub stores the file by its sha256."""
    return file.oid is not None and len(file.oid) == 64


def _git_hash(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: digest).hexdigest()


# ------------------------------------------------------------------------------------------ its parts


def _files(found: _Published) -> Proof:
    return _settled("files", _file_faults(found), f"{len(found.files)} files, each as the manifest names it")


def _file_faults(found: _Published) -> Iterator[str]:
    yield from found.corrupt
    if found.manifest is None:
        yield f"{MANIFEST} is missing, or no manifest: this is no release of fp8pipe, or one of another version"
        return
    listed = {file.name: file for file in found.manifest.files}
    there = {file.name: file for file in found.files if file.name not in {MANIFEST, SIGNATURE}}
    yield from (f"{name}: is not in the manifest; it was added" for name in sorted(there.keys() - listed.keys()))
    yield from (f"{name}: is in the manifest, but missing" for name in sorted(listed.keys() - there.keys()))
    for name in sorted(listed.keys() & there.keys()):
        if listed[name] != there[name]:
            yield f"{name}: sha256 {there[name].sha256[:16]}..., the manifest says {listed[name].sha256[:16]}..."
    if found.manifest.identity != identity_of(found.manifest.files):
        yield f"{MANIFEST}: its identity is not that of its files"


def _structure(found: _Published, download: bool) -> Proof:
    snapshot = found.snapshot
    if download and not snapshot.is_local:
        snapshot = snapshot.model_copy(update={"root": str(fetch(snapshot, []))})
    report = validate(snapshot, depth="values" if download else "headers", oracles=False)
    faults = (finding.sentence() for finding in report.errors)
    return _settled(
        "structure", faults, f"{report.tensors} tensors, {len(report.checks)} checks at depth {report.depth}"
    )


def _records(found: _Published) -> Iterator[Proof]:
    """The proofs of what is derived again from the records."""
    try:
        evidence = Evidence.load(found.folder)
    except InputError as error:
        yield Proof(part="evidence", outcome="broken", found=(str(error).replace(f"{found.folder}/", ""),))
        return
    decision = evidence.decision
    samples = sum(len(task.doc_ids) for task in evidence.candidate.tasks)
    yield _judged(
        "evidence", lambda: _evidence_faults(found, evidence), "validated and measured as it is here, with no error"
    )
    yield _judged(
        "verdict",
        lambda: (*not_rederived(evidence), *verdict_objections(decision, evidence.policy, evidence.approval)),
        f"{decision.verdict}, made again from {samples:,} samples: {decision.reason}",
    )
    yield _card(found, evidence)
    yield _derived(found, evidence)


def _judged(part: str, faults: Callable[[], Iterable[str]], proven: str) -> Proof:
    """As `_settled`, for faults that are found by work on records that anyone may have written."""
    try:
        return _settled(part, faults(), proven)
    except _MALFORMED as error:
        return _settled(part, [f"its records contradict each other: {type(error).__name__}: {error}"], "")


def _evidence_faults(found: _Published, evidence: Evidence) -> Iterator[str]:
    yield from changed(evidence, found.files)
    yield from unsound(evidence.validation)
    checkpoint, settings = evidence.checkpoint, evidence.plan.settings
    made = fingerprint_of(checkpoint.source_commit, settings, checkpoint.engine_version, checkpoint.calibration_digest)
    if not record_path(found.folder, "conversion").exists() and checkpoint.fingerprint != made:
        yield f"{RECORD_DIR}/checkpoint.json: its fingerprint is not that of its source, recipe, engine and calibration"
    if found.manifest is not None and found.manifest.fingerprint != checkpoint.fingerprint:
        yield f"{MANIFEST}: is of checkpoint {found.manifest.fingerprint[:12]}, not {checkpoint.fingerprint[:12]}"
    if evidence.decision.unchecked:
        yield f"{RECORD_DIR}/gate.json: rules left unchecked: {', '.join(evidence.decision.unchecked)}"


def _card(found: _Published, evidence: Evidence) -> Proof:
    if found.manifest is None or not (found.folder / CARD).is_file():
        return _open("card", f"{CARD} or the manifest, which names its repository, is missing")
    card = (found.folder / CARD).read_text(errors="replace")
    made_by = evidence.candidate.versions.get("fp8pipe")
    try:
        rendered = card_for_folder(found.folder, repo_id=found.manifest.repo_id, tag=found.manifest.tag)
    except _MALFORMED as error:
        return _settled("card", [f"cannot be rendered from the evidence: {error}"], "")
    if card != rendered and made_by != __version__:
        return _open("card", f"this is fp8pipe {__version__}; install {made_by}, which wrote it, to render it again")
    return _settled("card", _differences(card, rendered), f"{CARD} is what the evidence gives")


def _differences(card: str, rendered: str) -> Iterator[str]:
    """`README.md line 12: says ..., is ...` for each passage that differs."""
    ours, theirs = card.splitlines(), rendered.splitlines()
    for kind, begin, end, first, last in difflib.SequenceMatcher(None, ours, theirs, autojunk=False).get_opcodes():
        if kind != "equal":
            says, real = (" ".join(lines)[:100] for lines in (ours[begin:end], theirs[first:last]))
            yield f"{CARD} line {begin + 1}: says {says!r}, the evidence gives {real!r}"


def _derived(found: _Published, evidence: Evidence) -> Proof:
    names = sorted(filter(is_derived, (file.name for file in found.files)))
    if record_path(found.folder, "provenance").relative_to(found.folder).as_posix() not in names:
        return _open("provenance", "the release has none")
    made_by = evidence.candidate.versions.get("fp8pipe")

    def faults() -> Iterator[str]:
        made = derived(found.folder, evidence, found.files)
        yield from (f"{name}: is missing" for name in sorted(made.keys() - set(names)))
        for name in names:
            if name not in made:
                yield f"{name}: nothing in the records gives it"
            elif (found.folder / name).read_bytes() != made[name]:
                yield f"{name}: does not follow from the records and files"

    checkpoint = evidence.checkpoint
    made = f"made of {checkpoint.model_id}@{checkpoint.source_commit[:12]} with recipe {checkpoint.recipe}"
    proof = _judged("provenance", faults, made)
    if proof.outcome == "broken" and made_by != __version__:
        return _open(
            "provenance", f"this is fp8pipe {__version__}; install {made_by}, which wrote it, to make it again"
        )
    return proof


def _tag(found: _Published, target: str) -> Proof:
    if found.snapshot.is_local:
        return _open("tag", "a folder has none; name the repository to compare it")
    if found.manifest is None:
        return _open("tag", "without a manifest there is no tag to compare")
    named, commit = found.manifest.tag, found.snapshot.commit
    tags = tags_of(found.snapshot.model_id)

    def faults() -> Iterator[str]:
        if named not in tags:
            yield f"the manifest names tag {named}, which the Hub does not have"
        elif tags[named] != commit and not _only_yanked_since(found, named):
            yield f"the manifest names tag {named}, which is commit {tags[named][:12]}, not {commit[:12]}"
        for other in sorted(tag for tag, of in tags.items() if of == commit and tag != named and is_release(tag)):
            yield f"tag {other} was moved here, to the release {named}"

    return _settled("tag", faults(), f"{named} is commit {commit[:12]}")


def _only_yanked_since(found: _Published, tag: str) -> bool:
    """Whether the commit of `tag` has the files that were found, and only a yank came after it."""
    card = _git_hash(found.folder / CARD) if found.card is not None else None
    now = {file.name: card if file.name == CARD else file.oid for file in found.snapshot.files}
    before = {file.name: file.oid for file in resolve(f"{found.snapshot.model_id}@{tag}").files}
    return YANKED in now and now | {YANKED: None} == before | {YANKED: None}


def _standing(found: _Published) -> Iterator[Proof]:
    """Whether main says that the release was yanked; of a folder, it cannot be known."""
    if found.snapshot.is_local or found.manifest is None:
        return
    repo_id, tag = found.snapshot.model_id, found.manifest.tag
    with translated(f"verifying {repo_id}"):
        try:
            yank = yanked_at(client(), repo_id, "main").of(tag)
        except InputError as error:
            yield _settled("standing", [str(error)], "")
            return
    faults = [yank.sentence()] if yank is not None else []
    shown = found.card or b""
    if without_banner(shown) != shown and (yank is None or shown != with_banner(shown, banner(yank))):
        faults.append(f"{CARD}: its banner is not what {YANKED} gives")
    yield _settled("standing", faults, "it was not yanked")


def _signature(found: _Published, key: Path | None) -> Proof:
    path = found.folder / SIGNATURE
    if not path.is_file():
        if key is not None:
            return _settled(
                "signature", [f"there is no {SIGNATURE}, but a key was given: the release is not signed"], ""
            )
        return _open("signature", "not signed")
    signed = [file for file in found.files if file.name != SIGNATURE]
    why = why_broken(path, signed, key)
    if why is None and key is None:
        return _open("signature", "signed, but by whom is not verified: give the signer's public key with --key")
    return _settled(
        "signature", [f"{SIGNATURE}: {why}"] if why else [], "signed by the owner of the key, over all files"
    )
