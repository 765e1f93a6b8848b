"""The licence of a release: which one the source has, what it asks of a copy, and whether the release fulfils it.

settle(card, table, claim)             the Terms of a checkpoint, settled or with the reason why not
require(terms, repo_id, files)         Refused, with everything that stands against publishing under these terms
licence_files(terms, files, source)    what must go along and is not a file of the source: NOTICE, LICENSE
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

from fp8pipe.config import LicenceClaim, LicenceTable
from fp8pipe.errors import ConfigError, Refused
from fp8pipe.hub.source import read_file
from fp8pipe.hub.source_card import SourceCard
from fp8pipe.model.untrusted import clip
from fp8pipe.records import Snapshot, Terms

_CLAIM = (
    "read the source's licence; if a quantized copy may be published, say so: `licence: {id: ..., reason: ...}` in the "
    "release, or --licence ID --licence-reason WHY"
)
LICENCE_FILE, NOTICE_FILES = "LICENSE", ("NOTICE", "NOTICE.txt", "NOTICE.fp8.txt")
_MAX_LICENCE_BYTES = 1_000_000


def settle(card: SourceCard, table: LicenceTable, claim: LicenceClaim | None) -> Terms:
    """What `card` and `claim` say together, by `table`. ConfigError for a claim that the table does not know, or that
    contradicts the card: a claim is for what the card leaves open."""
    identifier, problem = _named(card, table)
    if claim is not None:
        claimed = table.find(claim.id)
        if claimed is None:
            raise ConfigError(
                f"licence: {claim.id}: not in the table of licences, which has {', '.join(table.licences)}"
            )
        if identifier not in {None, claimed}:
            raise ConfigError(f"licence: {claim.id}, but the source's card names {identifier}; leave `licence` out")
        identifier, problem = claimed, ""
        claim = claim.model_copy(update={"id": claimed, "file": claim.file and Path(claim.file).name})
    return Terms(
        id=identifier,
        licence=table.licences[identifier] if identifier is not None else None,
        name=card.one("license_name"),
        link=card.one("license_link"),
        claim=claim,
        problem=problem,
    )


def _named(card: SourceCard, table: LicenceTable) -> tuple[str | None, str]:
    """The licence that the card names, and why it is not settled."""
    named = list(card.texts.get("license", ()))
    if not named:
        because = f" ({'; '.join(card.problems)})" if card.problems else ""
        return None, f"the source's card names no licence{because}; {_CLAIM}"
    if len(named) > 1:
        return None, f"the source's card names several licences ({clip(', '.join(named))}); {_CLAIM}"
    name = card.one("license_name") if named[0].lower() == "other" else named[0]
    if name is None:
        return None, f"the source's card names the licence `other` without a license_name; {_CLAIM}"
    identifier = table.find(name)
    if identifier is None:
        return None, f"the source's licence, {clip(name)}, is not in the table of licences; add it there, or {_CLAIM}"
    return identifier, ""


def require(terms: Terms, repo_id: str, files: Collection[str]) -> None:
    """Raise Refused unless a copy with these files may be published as `repo_id`. Names every reason."""
    if against := list(_objections(terms, repo_id, files)):
        raise Refused(f"{repo_id} may not be published:\n" + "\n".join(f"  licence: {reason}" for reason in against))


def _objections(terms: Terms, repo_id: str, files: Collection[str]) -> Iterator[str]:
    licence = terms.licence
    if licence is None:
        yield terms.problem
        return
    if not licence.publish:
        yield f"{terms.id}: {licence.because}; ask the source's owners for another licence"
        return
    if licence.text == "required" and not any(map(_is_licence_text, files)):
        yield (
            f"{terms.id} asks for a copy of its text, and the source has no such file (LICENSE, ...); give one: "
            f"`licence: {{id: {terms.id}, reason: ..., file: PATH}}`, or --licence-file PATH"
        )
    name = repo_id.rpartition("/")[2]
    if not _letters(name).startswith(_letters(licence.name_prefix)):
        yield f"{terms.id} asks for a name that begins with {licence.name_prefix}; {name} does not"


def _letters(name: str) -> str:
    """A name without what repositories write for spaces: `Llama-3-8B` begins with `Llama 3`."""
    return name.lower().translate(dict.fromkeys(map(ord, " -_")))


def _is_licence_text(name: str) -> bool:
    return "/" not in name and name.lower().startswith(("license", "licence"))


def licence_files(terms: Terms, claim: LicenceClaim | None, source: Snapshot) -> dict[str, bytes]:
    """Name and content of the files that the licence needs and the source does not bring: the text that the team gives,
    and a NOTICE. `claim` has the path of the text. Raises ConfigError if that cannot be read or the source has one."""
    made: dict[str, bytes] = {}
    if claim is not None and claim.file is not None:
        if theirs := [file.name for file in source.files if _is_licence_text(file.name)]:
            raise ConfigError(f"licence: file {claim.file}: the source has its own, {theirs[0]}; leave `file` out")
        made[LICENCE_FILE] = _given_text(claim.file)
    notice = terms.licence.notice if terms.licence is not None else ""
    theirs = [file.name for file in source.files if re.fullmatch(r"notice(\.\w+)?", file.name.lower())]
    if notice and not any(_flat(notice) in _flat(read_file(source, name).decode(errors="replace")) for name in theirs):
        name = next(name for name in NOTICE_FILES if name.lower() not in map(str.lower, theirs))
        changed = f"Quantized to FP8 from {source.model_id} at {source.commit}"
        made[name] = f"{notice}\n\n{changed}: *.safetensors and config.json are changed.\n".encode()
    return made


def _flat(text: str) -> str:
    return " ".join(text.replace("©", "(c)").lower().split())


def _given_text(path: str) -> bytes:
    try:
        content = Path(path).expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"licence: file {path} cannot be read: {error.strerror}") from error
    if not 0 < len(content) <= _MAX_LICENCE_BYTES:
        raise ConfigError(f"licence: file {path}: {len(content)} bytes, expected the text of a licence")
    return content
