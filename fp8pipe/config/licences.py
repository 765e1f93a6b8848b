"""Licences: what each asks of a quantized copy (`configs/licences.yaml`), and what a release says of its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, model_validator

from fp8pipe.config.base import Config
from fp8pipe.config.files import CONFIG_DIR, load_file


class Licence(Config):
    """What one licence asks of a quantized copy."""

    title: str
    names: tuple[str, ...] = ()
    """Other spellings of its identifier."""
    on_hub: bool = True
    """Whether the Hub knows the identifier; otherwise the card says `license: other` with `license_name`."""
    link: str | None = None
    """Address of the text, for cards whose source gives none."""
    publish: bool = True
    """Whether a changed copy may be given to others."""
    because: str = ""
    """Why it may not."""
    text: Literal["required", "kept"] = "kept"
    """required: the licence's text must go along. kept: it does where the source has it."""
    notice: str = ""
    """Sentence that a NOTICE file must hold."""
    shown: str = ""
    """Line that the card must show."""
    name_prefix: str = ""
    """How the name of the released model must begin."""
    terms: str = ""
    """What a user of the copy must know."""

    @model_validator(mode="after")
    def _says_why(self) -> Licence:
        if self.publish == bool(self.because):
            raise ValueError("`because` goes with `publish: false`: give both, or neither")
        return self


class LicenceTable(Config):
    """Every licence that a release may inherit, by identifier."""

    licences: dict[str, Licence]

    def find(self, name: str) -> str | None:
        """The identifier that `name` spells; None if the table has none."""
        wanted = _spelling(name)
        for identifier, licence in self.licences.items():
            if wanted in map(_spelling, (identifier, licence.title, *licence.names)):
                return identifier
        return None


def _spelling(name: str) -> str:
    """What counts in a name: `Apache License, Version 2.0` and `apache-2.0` are the same."""
    words = re.sub(r"\b(?:the|licen[cs]e|version|v(?=\d))\b|\bv(?=\d)", " ", name.lower())
    return re.sub(r"[^a-z0-9.+]", "", words)


class LicenceClaim(Config):
    """What a team says of a licence that the source's card leaves open, and on what ground. The card shows it."""

    id: str = Field(description="Identifier in configs/licences.yaml")
    reason: str = Field(min_length=1, description="How the team knows; published in the card")
    file: str | None = Field(default=None, description="The licence's text, where the source has no file of it")


def load_licences(path: str | None = None) -> LicenceTable:
    """The table in a file; None: the shipped one. Raises ConfigError."""
    return load_file(LicenceTable, CONFIG_DIR / "licences.yaml" if path is None else Path(path).expanduser())
