"""Who asks, and what that person may do.

Comes in: the server's tokens, and a request. Goes out: the caller, or a `Refusal` with the status and `X-Error-Code`
that the Hub would answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from fp8pipe.hub.account import ANY_NAMESPACE, WRITE
from fp8pipe.rehearsal.localhub.refusals import Refusal, gated_repo, repo_not_found

if TYPE_CHECKING:
    from fp8pipe.rehearsal.localhub.store import Repo


@dataclass(frozen=True, slots=True)
class TokenOwner:
    """The person behind a token."""

    name: str
    """User name; also the user's own namespace."""
    orgs: tuple[str, ...] = field(default=())
    """Organizations that the owner may write in; `ANY_NAMESPACE` stands for all, on a Hub that serves one person."""
    role: Literal["read", "write", "fineGrained"] = "write"
    """The most that the token allows, whatever its owner may do."""
    scopes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Of a fine-grained token: namespace or repository -> permissions there, such as repo.write."""

    def belongs_to(self, namespace: str) -> bool:
        """Whether `namespace` is the owner's own or one of the owner's organizations."""
        return namespace == self.name or namespace in self.orgs or ANY_NAMESPACE in self.orgs

    def granted(self, permission: str, *places: str) -> bool:
        """Whether a fine-grained token has the permission in one of the places; any other token is not limited so."""
        return self.role != "fineGrained" or any(permission in self.scopes.get(place, ()) for place in places)


Tokens = Mapping[str, TokenOwner]


def caller_of(authorization: str | None, tokens: Tokens) -> TokenOwner | None:
    """The owner of the bearer token; None for an anonymous request. An unknown token is refused, as on the Hub."""
    if authorization is None:
        return None
    scheme, _, token = authorization.partition(" ")
    owner = tokens.get(token.strip()) if scheme.lower() == "bearer" else None
    if owner is None:
        raise Refusal(401, "Invalid credentials in Authorization header")
    return owner


def must_sign_in(caller: TokenOwner | None) -> TokenOwner:
    """The caller; an anonymous one is refused."""
    if caller is None:
        raise Refusal(401, "This request needs a token: set HF_TOKEN to one that this Hub knows.")
    return caller


def must_write_in(namespace: str, caller: TokenOwner | None, repo_id: str = "") -> TokenOwner:
    """The caller; refused unless the caller may write in `namespace`, or in this repository of it."""
    caller = must_sign_in(caller)
    if caller.role == "read" or not caller.granted(WRITE, namespace, repo_id):
        raise Refusal(403, f"This token may only read; to write in {namespace!r}, use a token that may write there.")
    if not caller.belongs_to(namespace):
        raise Refusal(403, f"{caller.name!r} does not belong to {namespace!r} and may not write there.")
    return caller


def may_see(repo: Repo, caller: TokenOwner | None) -> bool:
    """Whether the caller may know that the repository exists."""
    return not repo.private or (caller is not None and caller.belongs_to(repo.namespace))


def must_see(repo: Repo, caller: TokenOwner | None) -> None:
    """Answer a stranger's request for a private repository as if it did not exist."""
    if not may_see(repo, caller):
        raise repo_not_found(repo.id, signed_in=caller is not None)


def must_read_files(repo: Repo, caller: TokenOwner | None) -> None:
    """Refuse the files of a gated repository to everyone without a grant. The list of its files stays public."""
    must_see(repo, caller)
    if not repo.gated:
        return
    if caller is None or not (caller.belongs_to(repo.namespace) or caller.name in repo.granted):
        raise gated_repo(repo.id, signed_in=caller is not None)
