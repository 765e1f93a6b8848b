"""Who the token belongs to, and where it lets us publish: the Hub's answer to "who am I?"."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import AccessDenied
from fp8pipe.hub.client import endpoint

if TYPE_CHECKING:
    from huggingface_hub import HfApi

ANY_NAMESPACE = "*"
"""The organization that a local Hub lists for the one person whom it serves: every namespace is that person's."""

WRITE = "repo.write"
"""The permission of a fine-grained token to create repositories, to write in them, and to change their settings."""
_ROLES = {"admin", "write", "contributor"}
"""Roles in an organization that may create repositories."""


@dataclass(frozen=True, slots=True)
class Account:
    """The owner of the token, and what the token allows."""

    user: str
    token: str
    """The name that its owner gave it."""
    role: str
    """read, write or fineGrained; another word for another kind of login."""
    organizations: Mapping[str, str]
    """Organization -> the user's role in it."""
    scopes: Mapping[str, frozenset[str]]
    """Of a fine-grained token: user, organization or repository -> permissions there."""

    def writable(self) -> tuple[str, ...]:
        """The namespaces in which the token may publish, the user's own first."""
        return tuple(name for name in (self.user, *self.organizations) if self.objection(name) is None)

    def objection(self, place: str) -> str | None:
        """Why the token may not write in `place`, a namespace or a repository; None if nothing is known against it."""
        namespace = place.partition("/")[0]
        if self.role == "read":
            return "may only read; use one with the role write"
        if not self._belongs_to(namespace):
            known = ", ".join((self.user, *self.organizations))
            return f"belongs to {self.user}, who may not create repositories of {namespace}, only of: {known}"
        if self.role == "fineGrained" and not self._granted(namespace, place):
            return f"is fine-grained and lacks the permission {WRITE} for {namespace}"
        return None

    def _belongs_to(self, namespace: str) -> bool:
        own = namespace == self.user or ANY_NAMESPACE in self.organizations
        return own or self.organizations.get(namespace) in _ROLES

    def _granted(self, namespace: str, place: str) -> bool:
        return any(WRITE in self.scopes.get(one, ()) for one in (namespace, place, ANY_NAMESPACE))

    def require(self, place: str) -> None:
        """Raise AccessDenied unless the token may write in `place`, a namespace or a repository."""
        if (objection := self.objection(place)) is not None:
            raise AccessDenied(
                f"{place}: the token {self.token!r} {objection} "
                f"(HF_TOKEN or `hf auth login`; tokens are made at {endpoint()}/settings/tokens)"
            )


def account(api: HfApi) -> Account:
    """The owner of the token. Call it inside `translated`."""
    answer = api.whoami()
    access = _mapping(_mapping(answer.get("auth")).get("accessToken"))
    return Account(
        user=str(answer["name"]),
        token=str(access.get("displayName", "")),
        role=str(access.get("role", _mapping(answer.get("auth")).get("type", "unknown"))),
        organizations={str(org["name"]): str(org.get("roleInOrg", "write")) for org in answer.get("orgs") or ()},
        scopes={
            str(_mapping(scope.get("entity")).get("name")): frozenset(map(str, scope.get("permissions") or ()))
            for scope in _mapping(access.get("fineGrained")).get("scoped") or ()
        },
    )


def _mapping(value: Any) -> Mapping[str, Any]:  # Any: JSON
    return value if isinstance(value, dict) else {}
