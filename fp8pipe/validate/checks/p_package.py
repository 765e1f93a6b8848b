"""P1 to P9: the package. Tokenizer, chat template, code and licence beside the weights, and the engine's records.

A tokenizer of another revision or a lost eos token changes every answer, and no loader can tell.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from fp8pipe.model.untrusted import clip
from fp8pipe.records import RECORD_DIR
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.reading.place import HubPlace, Place, same_content
from fp8pipe.validate.subject import Subject

TOKENIZER = re.compile(
    r"^(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model|tekken\.json|.*\.tiktoken)$"
)
CHAT_TEMPLATE = re.compile(r"^(chat_template\.(jinja|json)|additional_chat_templates/.*\.jinja)$")
PROCESSOR = re.compile(r"^(video_)?(pre)?processor_config\.json$")
POOLING = re.compile(
    r"^(modules\.json|sentence_[\w-]+_config\.json|config_sentence_transformers\.json|\d+_\w+/config\.json)$"
)
"""Files of sentence-transformers, by which vLLM makes of any model one that pools, of another length
(transformers_utils/config.py: `get_pooling_config`, `get_sentence_transformer_tokenizer_config`)."""
CODE = re.compile(r"^[\w./-]+\.py$")
FOLDED = ("special_tokens_map.json", "added_tokens.json")
"""Files that transformers 5 no longer writes: their content is in tokenizer.json and tokenizer_config.json."""
NOTES = frozenset(
    ("transformers_version", "is_local", "local_files_only", "name_or_path", "backend", "_from_model_config")
)
"""Keys that transformers writes about itself; no reader's answer depends on them."""
LICENCE = re.compile(r"^(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*$", re.IGNORECASE)
TEXT = re.compile(r"\.(json|jinja|md|py|ya?ml|txt)$")
MAX_TEXT_BYTES = 32_000_000
CHUNK_BYTES = 1 << 22
MAX_FETCHED_BYTES = 1_000_000
"""The limit for files that are read over the network."""

SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{40,})\b")
PRIVATE_PATH = re.compile(rb"\"(?:file://)?((?:/home|/root|/Users|/tmp|/mnt|/work|/workspace|/scratch)/[^\"]*)\"")


def _against_source(subject: Subject, pattern: re.Pattern[str], *, extra: bool) -> Iterator[Fault]:
    """Files that match `pattern`: each of the source's is there with the same content (and no other, if `extra`).

    Without a source at hand, the engine's record of its files tells."""
    ours, theirs = subject.files.sizes, subject.source_sizes
    by_size: list[str] = []
    for name in sorted(filter(pattern.match, theirs)):
        if name not in ours:
            yield _missing(subject, name)
        elif not _has_source_content(subject, name):
            yield _other_content(subject, name)
        elif not _is_content_known(subject, name):
            by_size.append(name)
    if by_size:
        yield _known_by_size(by_size)
    for name in sorted(filter(pattern.match, ours.keys() - theirs.keys())) if extra else ():
        if not _is_template_moved(subject, name):
            yield Fault("only files of the source", "a file that it does not have", file=name)


def _has_source_content(subject: Subject, name: str) -> bool:
    """Whether the file has the source's bytes; its size decides where a record alone knows the source, and no hash."""
    if subject.source_or_none is not None:
        return same_content(subject.files.place, subject.source.place, name)
    recorded = HubPlace(subject.source_record)
    if not _is_content_known(subject, name):
        return subject.files.sizes[name] == recorded.sizes[name]
    return same_content(subject.files.place, recorded, name)


def _is_content_known(subject: Subject, name: str) -> bool:
    """Whether the source's file is at hand, or the record of it has a hash."""
    if subject.source_or_none is not None:
        return True
    return any(file.name == name and file.oid is not None for file in subject.source_record.files)


def _known_by_size(names: list[str]) -> Fault:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Fault(
        "the source's bytes",
        f"as many bytes; {RECORD_DIR}/source.json has no hash of {clip(names[0])}{more}",
        file=names[0],
        severity="warning",
        consequence="none known: the content was compared with nothing",
        remedy="name the source (--source)",
    )


def _missing(subject: Subject, name: str) -> Fault:
    if name in FOLDED and {"tokenizer.json", "tokenizer_config.json"} <= subject.files.sizes.keys():
        consequence = "none: tokenizer.json and tokenizer_config.json say the same"
        return Fault("the source's file", "missing", name, severity="warning", consequence=consequence)
    return Fault("the source's file", "missing", file=name)


def _other_content(subject: Subject, name: str) -> Fault:
    """A file with other bytes. Of JSON, the keys that differ; a warning if they are only notes of the library."""
    both = (subject.files, subject.source_or_none) if name.endswith(".json") else ()
    objects = [content for files in both if files and (content := files.json_object(name)[0]) is not None]
    if len(objects) < 2:
        return Fault("the source's bytes", "other bytes", file=name)
    ours, theirs = objects
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if set(keys) <= NOTES:
        consequence = "none: the library wrote the file again, with the same meaning"
        found = clip(f"other {keys}")
        return Fault("the source's bytes", found, name, severity="warning", consequence=consequence)
    meant = [key for key in keys if key not in NOTES]
    found = "; ".join(f"{key}: {clip(repr(ours.get(key)), 60)}" for key in meant[:3])
    wanted = "; ".join(f"{key}: {clip(repr(theirs.get(key)), 60)}" for key in meant[:3])
    return Fault(wanted, found, file=name)


def _is_template_moved(subject: Subject, name: str) -> bool:
    """Whether a chat template of its own is the one that the source keeps in tokenizer_config.json."""
    if name != "chat_template.jinja" or subject.source_or_none is None:
        return False
    settings = subject.source.json_object("tokenizer_config.json")[0] or {}
    text = subject.files.place.read(name, 0, min(subject.files.sizes[name], MAX_TEXT_BYTES))
    return settings.get("chat_template") == text.decode(errors="replace")


@check(
    "P1",
    "Tokenizer files say what the source's say.",
    needs=("files",),
    consequence="vLLM silently encodes prompts with other ids than the model was trained on",
    remedy="copy the file from the source at the same revision",
)
def tokenizer_equals_source(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, TOKENIZER, extra=True)


@check(
    "P2",
    "generation_config.json equals the source's.",
    needs=("files",),
    consequence="vLLM stops at other tokens, or samples with other defaults",
    remedy="copy the file from the source",
)
def generation_config_equals_source(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, re.compile(r"^generation_config\.json$"), extra=True)


@check(
    "P3",
    "Chat templates equal the source's.",
    needs=("files",),
    consequence="vLLM formats conversations otherwise, or refuses chat requests",
    remedy="copy the file from the source",
)
def chat_template_equals_source(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, CHAT_TEMPLATE, extra=True)


@check(
    "P4",
    "Configs of processors and of pooling, and the model's own code, are those of the source.",
    needs=("files",),
    consequence="vLLM cannot build the model, or prepares images and audio otherwise, or pools instead of generating",
    remedy="copy the file from the source",
)
def processors_and_code_equal_source(subject: Subject) -> Iterator[Fault]:
    yield from _against_source(subject, PROCESSOR, extra=True)
    yield from _against_source(subject, POOLING, extra=True)
    yield from _against_source(subject, CODE, extra=False)


@check(
    "P5",
    "The source's licence files travel along.",
    severity="warning",
    needs=("source",),
    consequence="none in vLLM; most licences demand it",
    remedy="copy the file from the source",
)
def licence_travels_along(subject: Subject) -> Iterator[Fault]:
    for name in sorted(name for name in subject.source.sizes if LICENCE.match(name)):
        if name not in subject.files.sizes:
            yield Fault("the source's file", "missing", file=name)


@check(
    "P6",
    "No text file that was made here holds an access token or a path of the machine that made it.",
    consequence="none in vLLM; the secret is public as soon as the checkpoint is",
    remedy="remove it, and revoke the token",
)
def nothing_private_is_published(subject: Subject) -> Iterator[Fault]:
    place = subject.files.place
    limit = MAX_TEXT_BYTES if place.root is not None else MAX_FETCHED_BYTES
    for name, size in place.sizes.items():
        if not TEXT.search(name) or not 0 < size <= limit or _is_copied(subject, name):
            continue
        content = place.read(name, 0, size)
        if SECRET.search(content):
            yield Fault("no access token", "something of its form", file=name)
        if path := PRIVATE_PATH.search(content):
            found = clip(path[1].decode(errors="replace"))
            yield Fault("no local path", found, file=name, severity="warning", remedy="remove it")


def _is_copied(subject: Subject, name: str) -> bool:
    """What the source publishes already is no secret of this checkpoint."""
    source = subject.source_or_none
    return source is not None and name in source.sizes and same_content(subject.files.place, source.place, name)


@check(
    "P7",
    "The engine's records agree with each other and with the source.",
    consequence="none in vLLM; nobody can tell what this checkpoint was made from",
    remedy="quantize again into an empty folder; name the source at the revision that the record names",
)
def records_agree(subject: Subject) -> Iterator[Fault]:
    records = subject.records_or_none
    if records is None:
        return
    for reason in records.unreadable:
        yield Fault("a record that can be read", clip(reason), file=reason.split(":")[0], severity="warning")
    record, file = records.checkpoint, f"{RECORD_DIR}/checkpoint.json"
    if records.plan is not None and records.plan.source_commit != record.source_commit:
        yield Fault(f"source commit {record.source_commit}", records.plan.source_commit, f"{RECORD_DIR}/plan.json")
    if records.calibration is not None and records.calibration.digest() != record.calibration_digest:
        found = f"{records.calibration.digest()[:16]}..."
        yield Fault(f"calibration digest {record.calibration_digest}", found, f"{RECORD_DIR}/calibration.json")
    named = (record.source_commit, subject.source_commit)
    if None not in named and not any(str(one).startswith("local-") for one in named) and named[0] != named[1]:
        yield Fault(f"a source at {record.source_commit}", f"one at {subject.source_commit}", file)
    if records.manifest is not None and records.manifest.fingerprint != record.fingerprint:
        found = f"one of {records.manifest.fingerprint[:12]}"
        manifest = f"{RECORD_DIR}/manifest.json"
        yield Fault(f"a manifest of {record.fingerprint[:12]}", found, manifest, severity="warning")


@check(
    "P8",
    "Weight files have the sizes that the plan computed before the first byte was written.",
    needs=("records",),
    yields_to=("F1", "F2", "F3", "F4", "F6", "F8", "F9"),
    consequence="vLLM stops on it, or loads a checkpoint that is not the planned one",
    remedy="quantize again into an empty folder",
)
def sizes_are_as_planned(subject: Subject) -> Iterator[Fault]:
    sizes = subject.files.sizes
    for name, outputs in subject.plan.shards().items():
        planned = max(output.end for output in outputs)
        if name in sizes and sizes[name] != planned:
            yield Fault(f"{planned} bytes, as planned", f"{sizes[name]} bytes", file=name)


@check(
    "P9",
    "Every published file has the sha256 that the manifest names.",
    depth="values",
    needs=("manifest",),
    consequence="vLLM loads it; these are not the bytes that were measured and published",
    remedy="download the file again, or publish again",
)
def files_are_those_of_the_manifest(subject: Subject) -> Iterator[Fault]:
    """Without the records and the card, which later stages may write again."""
    manifest = subject.records.manifest
    if manifest is None or manifest.fingerprint != subject.records.checkpoint.fingerprint:
        return  # it is the manifest of another checkpoint
    files = [f for f in manifest.files if not f.name.startswith(f"{RECORD_DIR}/") and f.name != "README.md"]
    place = subject.files.place
    present = [file for file in files if place.sizes.get(file.name) == file.size]
    for file in files:
        if file.name not in place.sizes:
            yield Fault("the file", "missing", file=file.name)
        elif place.sizes[file.name] != file.size:
            yield Fault(f"{file.size} bytes", f"{place.sizes[file.name]} bytes", file=file.name)
    with ThreadPoolExecutor(thread_name_prefix="sha256") as pool:
        hashes = pool.map(lambda file: _sha256(place, file.name), present)
        for file, found in zip(present, hashes, strict=True):
            if found != file.sha256:
                yield Fault(f"sha256 {file.sha256[:16]}...", f"{found[:16]}...", file=file.name)


def _sha256(place: Place, name: str) -> str:
    digest = hashlib.sha256()
    for begin in range(0, place.sizes[name], CHUNK_BYTES):
        digest.update(place.read(name, begin, begin + CHUNK_BYTES))
    return digest.hexdigest()
