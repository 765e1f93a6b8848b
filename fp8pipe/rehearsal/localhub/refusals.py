"""What the server answers when it refuses: status, `X-Error-Code` and `X-Error-Message`, in the Hub's own words.

huggingface_hub chooses its exception by these headers (`hf_raise_for_status`), so they are part of the protocol.
"""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse, Response


class Refusal(Exception):
    """An HTTP error as an exception, raised anywhere under a route: `Refusal(status, message, code, extra)`."""

    def __init__(self, status: int, message: str, code: str | None = None, extra: dict[str, Any] | None = None) -> None:
        super().__init__(status, message, code, extra)
        self.status = status
        self.message = message
        self.code = code
        self.extra = extra or {}
        self.headers: dict[str, str] = {}


def repo_not_found(repo_id: str, *, signed_in: bool) -> Refusal:
    """There is no such repository, or the caller may not know of it. Anonymous callers get 401, as from the Hub."""
    return Refusal(404 if signed_in else 401, f"Repository not found: {repo_id}", "RepoNotFound")


def revision_not_found(repo_id: str, revision: str) -> Refusal:
    """The repository has no such branch, tag, pull request or commit."""
    return Refusal(404, f"Invalid rev id: {revision} ({repo_id})", "RevisionNotFound")


def entry_not_found(repo_id: str, path: str) -> Refusal:
    """The revision has no such file or folder."""
    return Refusal(404, f"Entry not found: {path} ({repo_id})", "EntryNotFound")


def gated_repo(repo_id: str, *, signed_in: bool) -> Refusal:
    """The caller may see the repository, but not its files."""
    who = "You have not been granted access." if signed_in else "You must be authenticated to access it."
    return Refusal(403 if signed_in else 401, f"Access to {repo_id} is restricted. {who}", "GatedRepo")


def answer_refusal(refusal: Refusal) -> Response:
    """The JSON answer of a refusal. In the header, where HTTP allows no others, the message is reduced to ASCII."""
    message = refusal.message.replace("\n", " ").encode("ascii", "replace").decode()
    headers = {**refusal.headers, "X-Error-Message": message}
    if refusal.code is not None:
        headers["X-Error-Code"] = refusal.code
    return JSONResponse({"error": refusal.message, **refusal.extra}, refusal.status, headers)
