"""Routes that read files: tree, paths-info, and resolve, through which every byte leaves the Hub."""

from __future__ import annotations

import hashlib
import mimetypes
from collections.abc import Iterable, Mapping
from typing import Any
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.access import must_read_files
from fp8pipe.rehearsal.localhub.disk import Entry
from fp8pipe.rehearsal.localhub.refusals import Refusal, entry_not_found
from fp8pipe.rehearsal.localhub.requests import (
    caller,
    field,
    flag_query,
    hub_of,
    int_query,
    json_object,
    page,
    revision_of,
    visible_repo,
)
from fp8pipe.rehearsal.localhub.store import Commit, Repo, Store

PAGE = 1000
EXPANDED_PAGE = 50
"""Entries in one page of a tree, as on the Hub."""


async def tree(request: Request) -> Response:
    """What a folder holds, with `recursive` at any depth; with `expand`, the last commit of each entry too."""
    repo = visible_repo(request)
    store = hub_of(request).store
    commit = store.commit_at(repo, revision_of(request))
    folder = request.path_params.get("path", "").strip("/")
    prefix = f"{folder}/" if folder else ""
    inside = {path for path in commit.tree if path.startswith(prefix)}
    if folder and not inside:
        raise entry_not_found(repo.id, folder)
    folders = {path for path in folders_of(inside) if path.startswith(prefix)}
    names = inside | folders
    if not flag_query(request, "recursive"):
        names = {name for name in names if "/" not in name.removeprefix(prefix)}
    expand = flag_query(request, "expand")
    last = last_commits(store, repo, commit, names) if expand else {}
    items = [described(commit.tree, name, last.get(name)) for name in sorted(names)]
    size = EXPANDED_PAGE if expand else PAGE
    return page(request, items, min(size, max(1, int_query(request, "limit", size))))


async def paths_info(request: Request) -> Response:
    """Of the paths in the body, those that exist, described."""
    repo = visible_repo(request)
    store = hub_of(request).store
    commit = store.commit_at(repo, revision_of(request))
    paths, expand = await asked_paths(request)
    folders = folders_of(commit.tree)
    found = [path for path in paths if path in commit.tree or path in folders]
    last = last_commits(store, repo, commit, set(found)) if expand else {}
    return JSONResponse([described(commit.tree, path, last.get(path)) for path in found])


async def asked_paths(request: Request) -> tuple[list[str], bool]:
    """The paths and the expand flag of a paths-info request, which huggingface_hub sends as a form, others as JSON."""
    if request.headers.get("content-type", "").startswith("application/json"):
        body = await json_object(request)
        return [str(path).strip("/") for path in field(body, "paths", list)], field(body, "expand", bool, False)
    form = parse_qs((await request.body()).decode("utf-8", errors="replace"), keep_blank_values=True)
    expand = form.get("expand", ["false"])[0].lower() in {"1", "true"}
    return [path.strip("/") for path in form.get("paths", [])], expand


async def resolve(request: Request) -> Response:
    """A file's bytes, all or a range, with the headers by which clients cache it."""
    repo = visible_repo(request)
    must_read_files(repo, caller(request))
    store = hub_of(request).store
    commit = store.commit_at(repo, revision_of(request))
    path = request.path_params["path"]
    entry = commit.tree.get(path)
    if entry is None:
        refusal = entry_not_found(repo.id, path)
        refusal.headers["X-Repo-Commit"] = commit.oid
        raise refusal
    blob = store.blobs.path(entry.sha256)
    if not blob.is_file():
        raise Refusal(500, f"{repo.id}/{path}: its content is missing from the Hub's folder, expected at {blob}")
    return FileResponse(blob, headers=file_headers(commit, path, entry), media_type=safe_media_type(path))


def file_headers(commit: Commit, path: str, entry: Entry) -> dict[str, str]:
    """The headers of an answer that holds a file."""
    headers = {
        "X-Repo-Commit": commit.oid,
        "ETag": f'"{entry.etag}"',
        "Content-Disposition": f"inline; filename*=UTF-8''{quote(path.rpartition('/')[2])}",
        # A file of a repository may be anything; in a browser it must not become a page that acts for this Hub.
        "Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; sandbox",
        "X-Content-Type-Options": "nosniff",
        "Access-Control-Expose-Headers": "X-Repo-Commit, ETag, X-Linked-Size, X-Linked-Etag",
    }
    if entry.lfs:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return headers


def safe_media_type(path: str) -> str:
    """The media type of a file. Pages and scripts are served as plain text, so that no browser runs them."""
    guess = mimetypes.guess_type(path)[0] or "application/octet-stream"
    harmless = guess.startswith(("image/", "audio/", "video/")) or guess in {"application/json", "application/pdf"}
    return guess if harmless else "text/plain" if guess.startswith("text/") else "application/octet-stream"


def folders_of(paths: Iterable[str]) -> set[str]:
    """Every folder that holds one of the paths, at any depth."""
    return {path[:i] for path in paths for i, character in enumerate(path) if character == "/"}


def described(tree: Mapping[str, Entry], name: str, last: Commit | None) -> dict[str, Any]:
    """A file or folder as the Hub lists it."""
    entry = tree.get(name)
    if entry is None:
        answer: dict[str, Any] = {"type": "directory", "oid": folder_id(tree, name), "size": 0, "path": name}
    else:
        answer = {"type": "file", "oid": entry.oid, "size": entry.size, "path": name}
        if entry.lfs:
            answer["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": len(entry.pointer)}
    if last is not None:
        answer["lastCommit"] = {"id": last.oid, "title": last.title, "date": last.date}
    return answer


def folder_id(tree: Mapping[str, Entry], folder: str) -> str:
    """A hash of a folder's content: equal exactly if everything in it is equal."""
    inside = [f"{path} {tree[path].oid}" for path in sorted(tree) if path.startswith(f"{folder}/")]
    return hashlib.sha1("\n".join(inside).encode(), usedforsecurity=False).hexdigest()


def last_commits(store: Store, repo: Repo, head: Commit, names: set[str]) -> dict[str, Commit]:
    """For each file or folder, the commit that gave it its present content."""
    last: dict[str, Commit] = {}
    wanted = {name: state(head.tree, name) for name in names}
    for commit in store.history(repo, head.oid):
        wanted = {name: value for name, value in wanted.items() if state(commit.tree, name) == value}
        if not wanted:
            break
        last |= dict.fromkeys(wanted, commit)
    return last


def state(tree: Mapping[str, Entry], name: str) -> str:
    """What identifies a file's or folder's content at a commit."""
    return tree[name].oid if name in tree else folder_id(tree, name)


ROUTES = [
    Route("/api/{kind:kind}/{repo:repo}/tree/{rev:rev}", tree),
    Route("/api/{kind:kind}/{repo:repo}/tree/{rev:rev}/{path:file}", tree),
    Route("/api/{kind:kind}/{repo:repo}/paths-info/{rev:rev}", paths_info, methods=["POST"]),
    *(
        Route(f"{prefix}/{{repo:repo}}/{verb}/{{rev:rev}}/{{path:file}}", resolve)
        for prefix in ("/datasets", "")
        for verb in ("resolve", "raw")
    ),
]
