"""What travels with the weights: tokenizer, generation config, chat template, code, licence (checks P1 to P6).

In: a Subject with its source. A tokenizer of another revision or a lost eos token changes every answer, and no loader
can tell.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fp8pipe.model.untrusted import clip
from fp8pipe.validate.findings import Fault, check
from fp8pipe.validate.place import same_content
from fp8pipe.validate.shelf import Shelf

if TYPE_CHECKING:
    from fp8pipe.validate.subject import Subject

TOKENIZER = re.compile(
    r"^(tokenizer\.json|tokenizer_config\.json|special_tokens_map\.json|added_tokens\.json|vocab\.(json|txt)|merges\.txt|"
    r"tokenizer\.model|spiece\.model|sentencepiece\.bpe\.model|tekken\.json|.*\.tiktoken)$"
)
CHAT_TEMPLATE = re.compile(r"^(chat_template\.(jinja|json)|additional_chat_templates/.*\.jinja)$")
PROCESSOR = re.compile(r"^((video_)?(pre)?processor_config\.json|processor_config\.json|[\w./-]+\.py)$")
FOLDED = ("special_tokens_map.json", "added_tokens.json")
"""Files that transformers 5 no longer writes: their content is in tokenizer.json and tokenizer_config.json."""
NOTES = frozenset(
    ("transformers_version", "is_local", "local_files_only", "name_or_path", "backend", "_from_model_config")
)
"""Keys that transformers writes about itself; no reader's answer depends on them."""
LICENCE = re.compile(r"^(LICEN[CS]E|NOTICE|USE_POLICY)[\w.-]*$", re.IGNORECASE)
TEXT = re.compile(r"\.(json|jinja|md|py|ya?ml|txt)$")
MAX_TEXT_BYTES = 32_000_000
MAX_FETCHED_BYTES = 1_000_000
"""The same where each byte comes over the network."""

SECRET = re.compile(rb"\b(hf_[A-Za-z0-9]{30,}|AKIA[A-Z0-9]{16}|gh[pousr]_[A-Za-z0-9]{36,}|sk-[A-Za-z0-9_-]{40,})\b")
PRIVATE_PATH = re.compile(rb"\"(?:file://)?((?:/home|/root|/Users|/tmp|/mnt|/work|/workspace|/scratch)/[^\"]*)\"")


def _against_source(subject: Subject, pattern: re.Pattern[str], *, extra: bool) -> Iterator[Fault]:
    """Files that match `pattern`: each of the source's is there with the same content (and no other, if `extra`)."""
    assert subject.source is not None
    ours, theirs = subject.shelf, subject.source
    for name in sorted(name for name in theirs.sizes if pattern.match(name)):
        if name not in ours.sizes:
            yield from _missing(subject, name)
        elif not same_content(ours.place, theirs.place, name):
            yield _other_content(subject, name)
    for name in sorted(name for name in ours.sizes.keys() - theirs.sizes.keys() if pattern.match(name) and extra):
        if not _is_template_moved(subject, name):
            yield Fault("only files of the source", "a file that it does not have", file=name)


def _missing(subject: Subject, name: str) -> Iterator[Fault]:
    told = "none: tokenizer.json and tokenizer_config.json say the same"
    folded = name in FOLDED and {"tokenizer.json", "tokenizer_config.json"} <= subject.shelf.sizes.keys()
    severity, consequence = ("warning", told) if folded else (None, None)
    yield Fault("the source's file", "missing", file=name, severity=severity, consequence=consequence)


def _other_content(subject: Subject, name: str) -> Fault:
    """Other bytes; of JSON the keys that differ, and whether they are only notes of the library that wrote it."""
    assert subject.source is not None
    ours, theirs = (_json_object(shelf, name) for shelf in (subject.shelf, subject.source))
    if ours is None or theirs is None:
        return Fault("the source's bytes", "other bytes", file=name)
    keys = sorted(key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key))
    if set(keys) <= NOTES:
        told = "none: it was written again by the library, and says the same"
        return Fault("the source's bytes", clip(f"other {keys}"), name, severity="warning", consequence=told)
    meant = [key for key in keys if key not in NOTES]
    found = "; ".join(f"{key}: {clip(repr(ours.get(key)), 60)}" for key in meant[:3])
    wanted = "; ".join(f"{key}: {clip(repr(theirs.get(key)), 60)}" for key in meant[:3])
    return Fault(wanted, found, file=name)


def _json_object(shelf: Shelf, name: str) -> dict[str, Any] | None:
    content = shelf.json(name)[0] if name.endswith(".json") else None
    return content if isinstance(content, dict) else None


def _is_template_moved(subject: Subject, name: str) -> bool:
    """A template of its own that the source keeps in tokenizer_config.json."""
    assert subject.source is not None
    if name != "chat_template.jinja" or "tokenizer_config.json" not in subject.source.sizes:
        return False
    settings = _json_object(subject.source, "tokenizer_config.json") or {}
    text = subject.shelf.place.read(name, 0, min(subject.shelf.sizes[name], MAX_TEXT_BYTES))
    return settings.get("chat_template") == text.decode(errors="replace")


@check(
    "P1",
    "Tokenizer files say what the source's say.",
    needs=("source",),
    consequence="vLLM encodes prompts with other ids than the model was trained on, without a word",
    remedy="copy the file from the source at the same revision",
)
def tokenizer_is_the_source_s(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, TOKENIZER, extra=True)


@check(
    "P2",
    "generation_config.json equals the source's.",
    needs=("source",),
    consequence="vLLM stops at other tokens, or samples with other defaults",
    remedy="copy the file from the source",
)
def generation_config_is_the_source_s(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, re.compile(r"^generation_config\.json$"), extra=True)


@check(
    "P3",
    "Chat templates equal the source's.",
    needs=("source",),
    consequence="vLLM formats conversations otherwise, or refuses chat requests",
    remedy="copy the file from the source",
)
def chat_template_is_the_source_s(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, CHAT_TEMPLATE, extra=True)


@check(
    "P4",
    "Processor configs and the model's own code are those of the source.",
    needs=("source",),
    consequence="vLLM cannot build the model, or prepares images and audio otherwise",
    remedy="copy the file from the source",
)
def processors_and_code_are_the_source_s(subject: Subject) -> Iterator[Fault]:
    return _against_source(subject, PROCESSOR, extra=False)


@check(
    "P5",
    "The source's licence files travel along.",
    severity="warning",
    needs=("source",),
    consequence="none in vLLM; most licences demand it",
    remedy="copy the file from the source",
)
def licence_travels_along(subject: Subject) -> Iterator[Fault]:
    assert subject.source is not None
    for name in sorted(name for name in subject.source.sizes if LICENCE.match(name)):
        if name not in subject.shelf.sizes:
            yield Fault("the source's file", "missing", file=name)


@check(
    "P6",
    "No text file that was made here holds an access token or a path of the machine that made it.",
    consequence="none in vLLM; the secret is public as soon as the checkpoint is",
    remedy="remove it, and revoke the token",
)
def nothing_private_is_told(subject: Subject) -> Iterator[Fault]:
    place = subject.shelf.place
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
    """What the source says itself is not this checkpoint's secret."""
    source = subject.source
    return source is not None and name in source.sizes and same_content(subject.shelf.place, source.place, name)
