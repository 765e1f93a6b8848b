"""Routes that write files (preupload, LFS upload, commit) and those about refs (tags, branches, history, squash)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
from typing import Any, TypedDict

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fp8pipe.rehearsal.localhub.access import must_read_files, must_sign_in
from fp8pipe.rehearsal.localhub.cards import check_card
from fp8pipe.rehearsal.localhub.disk import Blobs, Incoming, WrongContent
from fp8pipe.rehearsal.localhub.refusals import Refusal, revision_not_found
from fp8pipe.rehearsal.localhub.requests import (
    Hub,
    caller,
    digest_field,
    endpoint_of,
    field,
    flag_query,
    hub_of,
    int_query,
    json_object,
    must_be_digest,
    page,
    revision_of,
    text_field,
    visible_repo,
    writable_repo,
)
from fp8pipe.rehearsal.localhub.store import LFS_SUFFIXES, PULL, Change, Commit, Delete, Put, Refs, Repo, must_be_path

MAX_REGULAR_BYTES = 10_000_000
"""Larger files go through LFS, whatever their name."""
WRITE_BYTES = 1 << 20
COMMITS_PAGE = 50


async def preupload(request: Request) -> Response:
    """For each file: regular or LFS, and the id of the file that the Hub has there, as equal files need no upload."""
    repo = visible_repo(request)
    must_be_committer(request)
    head = hub_of(request).store.commit_at(repo, revision_of(request))
    answers = []
    for file in field(await json_object(request), "files", list, []):
        path = must_be_path(text_field(file, "path"))
        lfs = is_lfs(path, field(file, "size", int), from_base64(path, text_field(file, "sample")))
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        if (entry := head.tree.get(path)) is not None:
            answer["oid"] = entry.sha256 if entry.lfs else entry.oid
        answers.append(answer)
    return JSONResponse({"files": answers, "commitOid": head.oid})


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Whether git LFS stores a file: because of its suffix or its size, or because `sample`, its start, is not text."""
    suffix = path.rpartition(".")[2].lower() if "." in path else ""
    return suffix in LFS_SUFFIXES or size > MAX_REGULAR_BYTES or not is_text(sample)


def is_text(sample: bytes) -> bool:
    """Whether the first bytes of a file are UTF-8; the last character may be incomplete."""
    if b"\0" in sample:
        return False
    try:
        sample.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.reason == "unexpected end of data" and error.start >= len(sample) - 3
    return True


async def lfs_batch(request: Request) -> Response:
    """The address to upload each object to; none for an object that the Hub has."""
    visible_repo(request)
    must_be_committer(request)
    hub = hub_of(request)
    body = await json_object(request)
    if body.get("operation") != "upload":
        raise Refusal(
            400, f"'operation': expected upload, found {body.get('operation')!r}; download files through resolve"
        )
    wanted = [(digest_field(one, "oid"), field(one, "size", int)) for one in field(body, "objects", list)]
    objects = [lfs_object(request, hub, oid, size) for oid, size in wanted]
    answer = {"transfer": "basic", "objects": objects, "hash_algo": "sha256"}
    return JSONResponse(answer, media_type="application/vnd.git-lfs+json")


def lfs_object(request: Request, hub: Hub, oid: str, size: int) -> dict[str, Any]:
    """The answer for one object of an LFS batch."""
    answer: dict[str, Any] = {"oid": oid, "size": size, "authenticated": True}
    if hub.store.blobs.size(oid) != size:
        address = f"{endpoint_of(request)}/_lfs/{oid}?size={size}&signature={signature(hub.upload_key, oid, size)}"
        answer["actions"] = {"upload": {"href": address}, "verify": {"href": f"{endpoint_of(request)}/_lfs/verify"}}
    return answer


def signature(key: bytes, oid: str, size: int) -> str:
    """What proves that this server made an upload address."""
    return hmac.new(key, f"{oid} {size}".encode(), hashlib.sha256).hexdigest()


async def lfs_upload(request: Request) -> Response:
    """Receive an object's bytes, and keep them only if their size and sha256 are those in the address."""
    hub = hub_of(request)
    oid, size = must_be_digest(request.path_params["oid"]), int_query(request, "size", -1)
    if not hmac.compare_digest(request.query_params.get("signature", ""), signature(hub.upload_key, oid, size)):
        raise Refusal(403, "This upload address is not valid, or no longer; ask for a new one")
    with hub.store.blobs.receive() as incoming:
        await drain(request, incoming)
        try:
            incoming.keep(oid, size)
        except WrongContent as error:
            raise Refusal(400, str(error)) from error
    return Response(headers={"ETag": f'"{oid}"'})


async def drain(request: Request, incoming: Incoming) -> None:
    """Write a request's body to disk in large pieces, outside the event loop."""
    pending = bytearray()
    async for piece in request.stream():
        pending += piece
        if len(pending) >= WRITE_BYTES:
            await run_in_threadpool(incoming.write, bytes(pending))
            pending.clear()
    incoming.write(bytes(pending))


async def lfs_verify(request: Request) -> Response:
    """Succeeds if an object arrived; 404 if not."""
    must_sign_in(caller(request))
    body = await json_object(request)
    oid = digest_field(body, "oid")
    if hub_of(request).store.blobs.size(oid) != field(body, "size", int):
        raise Refusal(404, f"{oid} did not arrive; upload it again")
    return Response()


async def commit(request: Request) -> Response:
    """Apply the operations of an NDJSON body to a branch or a pull request, or, with `create_pr`, open a new one."""
    repo, who = visible_repo(request), must_be_committer(request)
    body = await request.body()
    take = take_as_pull if flag_query(request, "create_pr") else take_commit
    made, pull = await run_in_threadpool(take, hub_of(request), repo, revision_of(request), body, who)
    here = endpoint_of(request) + repo.url_path
    return JSONResponse(
        {
            "success": True,
            "commitOid": made.oid,
            "commitUrl": f"{here}/commit/{made.oid}",
            "pullRequestUrl": f"{here}/discussions/{pull}" if pull is not None else None,
            "hookOutput": "",
        }
    )


def take_commit(hub: Hub, repo: Repo, revision: str, body: bytes, who: str) -> tuple[Commit, int | None]:
    """Commit to a branch or pull request. Returns the commit, and the pull request's number or None."""
    header, changes = parse_commit(body, hub.store.blobs)
    made = hub.store.commit(repo, revision, changes, author=who, **header)
    pull = PULL.fullmatch(revision)
    if pull is None:
        return made, None
    hub.discussions.note_commit(repo, int(pull[1]), made)
    return made, int(pull[1])


def take_as_pull(hub: Hub, repo: Repo, revision: str, body: bytes, who: str) -> tuple[Commit, int | None]:
    """Commit as a new pull request to `revision`. Returns the commit and the pull request's number."""
    header, changes = parse_commit(body, hub.store.blobs)
    pull, made = hub.discussions.open_with(repo, revision, changes, author=who, **header)
    return made, pull.num


class CommitHeader(TypedDict):
    """The metadata of a commit."""

    title: str
    message: str
    parent: str | None
    """The commit that must still be the head; None for any."""


def must_be_committer(request: Request) -> str:
    """The caller's name. Refused unless the caller may write or, for a new pull request, may read the files."""
    if flag_query(request, "create_pr"):
        who = must_sign_in(caller(request))
        must_read_files(visible_repo(request), who)
        return who.name
    return writable_repo(request)[1].name


def parse_commit(body: bytes, blobs: Blobs) -> tuple[CommitHeader, list[Change]]:
    """The header and the changes of a commit's NDJSON. Regular files are stored; LFS files must have been uploaded."""
    header: CommitHeader | None = None
    changes: list[Change] = []
    for number, line in enumerate(body.splitlines(), 1):
        try:
            operation = json.loads(line)
        except ValueError as error:
            raise Refusal(400, f"Line {number} of the commit: expected a JSON object: {error}") from error
        key, value = text_field(operation, "key"), field(operation, "value", dict)
        if key == "header":
            header = parse_header(value)
        else:
            changes.append(parse_change(key, value, blobs))
    if header is None:
        raise Refusal(400, "The commit has no operation with the key header")
    return header, changes


def parse_header(value: dict[str, Any]) -> CommitHeader:
    """The first line of a commit."""
    title = text_field(value, "summary").strip()
    if not title:
        raise Refusal(400, "A commit needs a summary")
    parent = text_field(value, "parentCommit", "") or None
    return {"title": title, "message": text_field(value, "description", ""), "parent": parent}


def parse_change(key: str, value: dict[str, Any], blobs: Blobs) -> Change:
    """One operation of a commit."""
    path = must_be_path(text_field(value, "path").rstrip("/"))
    match key:
        case "file":
            return regular_file(path, decoded(value), blobs)
        case "lfsFile":
            return lfs_file(path, value, blobs)
        case "deletedFile" | "deletedFolder":
            return Delete(path, folder=key == "deletedFolder")
    raise Refusal(400, f"{path}: expected file, lfsFile, deletedFile or deletedFolder, found {key!r}")


def regular_file(path: str, data: bytes, blobs: Blobs) -> Put:
    """Store a regular file. A README whose card the Hub would not accept is refused."""
    if path == "README.md":
        errors = check_card(data.decode("utf-8", errors="replace")).errors
        if errors:
            raise Refusal(400, f"Invalid metadata in README.md: {'; '.join(errors)}")
    return Put(path, blobs.add(data))


def decoded(value: dict[str, Any]) -> bytes:
    """The bytes of a regular file in a commit."""
    content = text_field(value, "content")
    if value.get("encoding") != "base64":
        return content.encode("utf-8")
    return from_base64(text_field(value, "path"), content)


def from_base64(path: str, content: str) -> bytes:
    """The bytes; refused if `content` is not base64."""
    try:
        return base64.b64decode(content, validate=True)
    except ValueError as error:
        raise Refusal(400, f"{path}: the content is not base64: {error}") from error


def lfs_file(path: str, value: dict[str, Any], blobs: Blobs) -> Put:
    """Put an uploaded object into a commit. Refused if the object never arrived or has another size."""
    oid = digest_field(value, "oid")
    entry = blobs.lfs_entry(oid)
    if entry is None:
        raise Refusal(400, f"{path}: the LFS object {oid} was never uploaded; upload it first")
    if value.get("size") not in (None, entry.size):
        raise Refusal(400, f"{path}: the LFS object {oid} has {entry.size} bytes, the commit says {value['size']}")
    return Put(path, entry)


async def refs(request: Request) -> Response:
    """Every branch and tag, and with `include_prs` every pull request."""
    found = hub_of(request).store.refs(visible_repo(request))
    answer = {"branches": branch_list(found), "converts": [], "tags": tag_list(found)}
    if flag_query(request, "include_prs"):
        answer["pullRequests"] = [
            {"name": f"refs/pr/{number}", "ref": f"refs/pr/{number}", "targetCommit": oid}
            for number, oid in found.pulls.items()
        ]
    return JSONResponse(answer)


def branch_list(refs: Refs) -> list[dict[str, str]]:
    """The branches as the Hub lists them."""
    return [
        {"name": name, "ref": f"refs/heads/{name}", "targetCommit": oid} for name, oid in sorted(refs.branches.items())
    ]


def tag_list(refs: Refs) -> list[dict[str, str]]:
    """The tags as the Hub lists them."""
    return [
        {"name": name, "ref": f"refs/tags/{name}", "targetCommit": tag.target, "message": tag.message}
        for name, tag in sorted(refs.tags.items())
    ]


async def commits(request: Request) -> Response:
    """The history of a revision, newest first."""
    store, repo = hub_of(request).store, visible_repo(request)
    formatted = "formatted" in request.query_params.getlist("expand[]")
    history = [described(one, formatted=formatted) for one in store.history(repo, revision_of(request))]
    return page(request, history, COMMITS_PAGE)


def described(commit: Commit, *, formatted: bool) -> dict[str, Any]:
    """A commit as the Hub lists it."""
    answer: dict[str, Any] = {
        "id": commit.oid,
        "title": commit.title,
        "message": commit.message,
        "authors": [{"user": commit.author}],
        "date": commit.date,
    }
    if formatted:
        answer["formatted"] = {"title": commit.title, "message": commit.message}
    return answer


async def add_tag(request: Request) -> Response:
    """Tag a revision."""
    repo, _ = writable_repo(request)
    body = await json_object(request)
    message = text_field(body, "message", "")
    hub_of(request).store.add_tag(repo, text_field(body, "tag"), revision_of(request), message)
    return Response("OK")


async def delete_tag(request: Request) -> Response:
    """Remove a tag."""
    repo, _ = writable_repo(request)
    hub_of(request).store.delete_tag(repo, revision_of(request))
    return Response("OK")


async def add_branch(request: Request) -> Response:
    """Make a branch at `startingPoint`, by default main's head."""
    repo, _ = writable_repo(request)
    start = text_field(await json_object(request), "startingPoint", "main")
    hub_of(request).store.add_branch(repo, revision_of(request), start)
    return Response("OK")


async def delete_branch(request: Request) -> Response:
    """Remove a branch."""
    repo, _ = writable_repo(request)
    hub_of(request).store.delete_branch(repo, revision_of(request))
    return Response("OK")


async def squash(request: Request) -> Response:
    """Replace a branch's history by one commit."""
    repo, who = writable_repo(request)
    branch = revision_of(request)
    if PULL.fullmatch(branch):
        raise revision_not_found(repo.id, branch)
    title = text_field(await json_object(request), "message", "Super-squash")
    hub_of(request).store.squash(repo, branch, title=title, author=who.name)
    return Response("OK")


ROUTES = [
    Route("/api/{kind:kind}/{repo:repo}/preupload/{rev:rev}", preupload, methods=["POST"]),
    Route("/datasets/{repo:repo}.git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
    Route("/{repo:repo}.git/info/lfs/objects/batch", lfs_batch, methods=["POST"]),
    Route("/_lfs/verify", lfs_verify, methods=["POST"]),
    Route("/_lfs/{oid}", lfs_upload, methods=["PUT"]),
    Route("/api/{kind:kind}/{repo:repo}/commit/{rev:rev}", commit, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/refs", refs),
    Route("/api/{kind:kind}/{repo:repo}/commits/{rev:rev}", commits),
    Route("/api/{kind:kind}/{repo:repo}/tag/{rev:file}", add_tag, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/tag/{rev:file}", delete_tag, methods=["DELETE"]),
    Route("/api/{kind:kind}/{repo:repo}/branch/{rev:file}", add_branch, methods=["POST"]),
    Route("/api/{kind:kind}/{repo:repo}/branch/{rev:file}", delete_branch, methods=["DELETE"]),
    Route("/api/{kind:kind}/{repo:repo}/super-squash/{rev:file}", squash, methods=["POST"]),
]
