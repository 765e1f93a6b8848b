"""The base class of all configuration."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from fp8pipe.files import digest_of


class Config(BaseModel):
    """Base of everything read from YAML."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """sha256 hex of the resolved content, as it enters identities."""
        return digest_of(self.model_dump(mode="json"))
