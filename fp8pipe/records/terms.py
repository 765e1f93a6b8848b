"""The licence that a checkpoint inherits from its source."""

from __future__ import annotations

from fp8pipe.config import Licence, LicenceClaim
from fp8pipe.records.base import Record


class Terms(Record):
    """What the source's licence asks of a copy. `DIR/fp8pipe/terms.json`, written with the checkpoint."""

    id: str | None
    """Identifier in the table of licences; None if it is not settled."""
    licence: Licence | None
    """The table's entry, as it was."""
    name: str | None = None
    """`license_name` of the source's card."""
    link: str | None = None
    """`license_link` of the source's card: an address, or the name of one of its files."""
    claim: LicenceClaim | None = None
    """What the team said of it; only the name of its file, without a path."""
    problem: str = ""
    """Why the licence is not settled, and what to do; empty if it is."""
