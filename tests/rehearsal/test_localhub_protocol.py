"""The local Hub, asked by bare HTTP: rules that a client would hide."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.local_hub import commit, head, http_client, make_repo, titles, upload_address

from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.rehearsal.localhub.discussions import conflicting, merged
from fp8pipe.rehearsal.localhub.disk import Entry


def test_a_commit_on_an_outdated_parent_is_refused_and_changes_nothing(http: httpx.Client) -> None:
    repo = make_repo(http, "outdated")
    old = head(http, repo)
    commit(http, repo, {"a.txt": b"theirs"}).raise_for_status()
    now = head(http, repo)
    late = commit(http, repo, {"a.txt": b"ours"}, parentCommit=old)
    assert late.status_code == 412
    assert head(http, repo) == now
    assert http.get(f"/{repo}/resolve/main/a.txt").content == b"theirs"


def test_of_many_commits_on_one_parent_exactly_one_wins_and_without_parent_all_land(local_hub: LocalHub) -> None:
    with http_client(local_hub) as http:
        repo = make_repo(http, "crowd")
        parent = head(http, repo)

        def race(number: int) -> int:
            return commit(http, repo, {f"race-{number}.txt": b"x"}, parentCommit=parent).status_code

        def land(number: int) -> int:
            return commit(http, repo, {f"all-{number}.txt": b"x"}).status_code

        with ThreadPoolExecutor(8) as pool:
            assert sorted(pool.map(race, range(16))) == [200] + [412] * 15
            assert set(pool.map(land, range(16))) == {200}
        files = {one["path"] for one in http.get(f"/api/models/{repo}/tree/main").json()}
        assert {f"all-{number}.txt" for number in range(16)} <= files
        assert len([file for file in files if file.startswith("race-")]) == 1
        assert len(titles(http, repo)) == 1 + 1 + 16


def test_a_commit_that_changes_nothing_is_no_commit(http: httpx.Client) -> None:
    repo = make_repo(http, "nothing")
    first = commit(http, repo, {"a.txt": b"1"}).json()["commitOid"]
    assert commit(http, repo, {"a.txt": b"1"}).json()["commitOid"] == first
    assert titles(http, repo) == ["files", "initial commit"]


def test_an_upload_is_kept_only_if_its_bytes_are_what_was_announced(http: httpx.Client, local_hub: LocalHub) -> None:
    repo = make_repo(http, "uploads")
    data = os.urandom(100_000)
    oid = hashlib.sha256(data).hexdigest()
    address = upload_address(http, repo, oid, len(data))
    for wrong in (data[:-1], data[:-1] + b"\0", data + b"\0"):
        assert http.put(address, content=wrong).status_code == (400 if wrong != data else 200)
    assert http.put(address.replace("size=100000", "size=1"), content=b"x").status_code == 403
    lfs = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(data)}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, lfs]))
    assert http.post(f"/api/models/{repo}/commit/main", content=body).status_code == 400
    assert http.put(address, content=data).status_code == 200
    assert http.post(f"/api/models/{repo}/commit/main", content=body).status_code == 200
    batch = {"operation": "upload", "objects": [{"oid": oid, "size": len(data)}]}
    assert "actions" not in http.post(f"/{repo}.git/info/lfs/objects/batch", json=batch).json()["objects"][0]
    answer = http.head(f"/{repo}/resolve/main/w.bin")
    assert answer.headers["ETag"] == answer.headers["X-Linked-Etag"] == f'"{oid}"'
    assert answer.headers["X-Linked-Size"] == answer.headers["Content-Length"] == "100000"
    assert not list((local_hub.root / "tmp").iterdir())


def test_etag_of_a_regular_file_is_the_id_that_git_gives_it(http: httpx.Client) -> None:
    repo = make_repo(http, "git-id")
    commit(http, repo, {"hello.txt": b"hello\n"})
    answer = http.head(f"/{repo}/resolve/main/hello.txt")
    assert answer.headers["ETag"] == '"ce013625030ba8dba906f756967f9e9ca394464a"'  # git hash-object, "hello\n"
    assert answer.headers["X-Repo-Commit"] == head(http, repo)


def test_a_long_listing_comes_in_pages_that_lead_on(http: httpx.Client) -> None:
    repo = make_repo(http, "pages")
    names = [f"part-{number:04}.txt" for number in range(120)]
    commit(http, repo, {f"folder/{name}": b"x" for name in names}).raise_for_status()
    found, address, pages = [], f"/api/models/{repo}/tree/main/folder?expand=true", 0
    while address:
        answer = http.get(address)
        found += [one["path"] for one in answer.json()]
        address = answer.links.get("next", {}).get("url")
        pages += 1
    assert found == [f"folder/{name}" for name in names]
    assert pages == 3


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "a//x", ".git/config", "a\0b", ""])
def test_a_commit_stays_inside_its_repository(http: httpx.Client, path: str) -> None:
    repo = make_repo(http, f"inside-{hashlib.sha256(path.encode()).hexdigest()[:6]}")
    assert commit(http, repo, {path: b"x"}).status_code == 400
    assert len(titles(http, repo)) == 1


@pytest.mark.parametrize("path", ["..%2F..%2Ftoken", "%2e%2e/%2e%2e/lock", "..%2F..%2F..%2F..%2Fetc%2Fpasswd"])
def test_no_address_leads_out_of_the_repositories(http: httpx.Client, path: str) -> None:
    make_repo(http, f"out-{len(path)}")
    assert http.get(f"/acme/out-{len(path)}/resolve/main/{path}").status_code == 404
    assert http.get(f"/api/models/acme/{path}").status_code == 404


@pytest.mark.parametrize("path", ["/api/agent-harnesses", "/api/spaces/acme/x", "/static/none.css", "/nothing"])
def test_an_address_that_means_nothing_is_not_taken_for_a_repository(anonymous: httpx.Client, path: str) -> None:
    answer = anonymous.get(path)
    assert (answer.status_code, answer.headers.get("X-Error-Code")) == (404, None)


def test_a_path_cannot_be_a_file_and_a_folder(http: httpx.Client) -> None:
    repo = make_repo(http, "both")
    commit(http, repo, {"a": b"file"}).raise_for_status()
    assert commit(http, repo, {"a/b": b"x"}).status_code == 400


def test_a_card_that_the_hub_would_refuse_is_refused(http: httpx.Client) -> None:
    repo = make_repo(http, "card")
    answer = commit(http, repo, {"README.md": b"---\ntags: {a: 1}\n---\n"})
    assert answer.status_code == 400
    assert "tags" in answer.headers["X-Error-Message"]
    check = http.post("/api/validate-yaml", json={"content": "---\nlicense: [\n---\n", "repoType": "model"})
    assert check.status_code == 400
    assert check.json()["errors"]


def test_a_granted_user_reads_a_gated_repository(local_hub: LocalHub, http: httpx.Client) -> None:
    repo = make_repo(http, "granted", gated="auto")
    with http_client(local_hub, "hf_bob") as bob:
        before = bob.get(f"/{repo}/resolve/main/.gitattributes")
        http.post(f"/api/models/{repo}/user-access-request/grant", json={"user": "bob"}).raise_for_status()
        after = bob.get(f"/{repo}/resolve/main/.gitattributes")
    assert (before.status_code, before.headers["X-Error-Code"]) == (403, "GatedRepo")
    assert after.status_code == 200


def test_a_private_repository_shows_nowhere(http: httpx.Client, anonymous: httpx.Client) -> None:
    repo = make_repo(http, "veiled", visibility="private")
    slug = http.post("/api/collections", json={"title": "Other things", "namespace": "acme"}).json()["slug"]
    item = {"item": {"id": repo, "type": "model"}}
    http.post(f"/api/collections/{slug}/items", json=item).raise_for_status()
    pages = {"Accept": "text/html"}
    assert repo not in anonymous.get("/", headers=pages).text
    assert anonymous.get(f"/{repo}", headers=pages).status_code == 401
    assert anonymous.get(f"/{repo}/resolve/main/.gitattributes").status_code == 401
    assert "veiled" not in anonymous.get(f"/collections/{slug}", headers=pages).text
    assert anonymous.get(f"/api/collections/{slug}").json()["items"] == []
    assert repo not in [one["id"] for one in anonymous.get("/api/models").json()]
    assert repo in [one["id"] for one in http.get("/api/models").json()]


TREES = st.dictionaries(st.sampled_from("abcd"), st.sampled_from("123"), max_size=4).map(
    lambda files: {path: Entry(content, 1, content, lfs=False) for path, content in files.items()}
)


@given(TREES, TREES, TREES)
def test_a_merge_keeps_what_each_side_did(ancestor: dict, base: dict, ours: dict) -> None:
    if conflicting(ancestor, base, ours):
        return
    result = merged(ancestor, base, ours)
    for path in "abcd":
        touched = ours if ours.get(path) != ancestor.get(path) else base
        assert result.get(path) == touched.get(path)


def test_an_object_is_named_by_a_sha256_and_by_nothing_else(http: httpx.Client, tmp_path: Path) -> None:
    """A path in its place would put any file that the server can read into a repository."""
    repo, secret = make_repo(http, "objects"), tmp_path / "secret"
    secret.write_bytes(b"secret")
    for oid in (str(secret), "../" * 20 + str(secret), "A" * 64, "a" * 63, ""):
        one = {"oid": oid, "size": 6}
        lines = [{"key": "header", "value": {"summary": "x"}}]
        lines += [{"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", **one}}]
        body = "\n".join(json.dumps(line) for line in lines).encode()
        answers = [
            http.post(f"/api/models/{repo}/commit/main", content=body),
            http.post(f"/{repo}.git/info/lfs/objects/batch", json={"operation": "upload", "objects": [one]}),
            http.post("/_lfs/verify", json=one),
        ]
        assert [answer.status_code for answer in answers] == [400, 400, 400], oid
    assert http.get(f"/{repo}/resolve/main/x.bin").status_code == 404


WRITES = (
    *(("POST", f"/api/repos/{what}") for what in ("create", "move")),
    ("DELETE", "/api/repos/delete"),
    ("PUT", "/api/models/acme/fuzzed/settings"),
    *(("POST", f"/api/models/acme/fuzzed/{what}") for what in ("preupload/main", "commit/main", "paths-info/main")),
    *(("POST", f"/api/models/acme/fuzzed/{what}") for what in ("tag/main", "branch/new", "super-squash/main")),
    *(("POST", f"/api/models/acme/fuzzed/{what}") for what in ("discussions", "user-access-request/grant")),
    *(("POST", f"/api/models/acme/fuzzed/discussions/1/{what}") for what in ("comment", "title", "status", "merge")),
    ("POST", "/acme/fuzzed.git/info/lfs/objects/batch"),
    ("POST", "/_lfs/verify"),
    ("POST", "/api/validate-yaml"),
    ("POST", "/api/collections"),
)
FIELDS = (
    *("name", "organization", "type", "fromRepo", "toRepo", "private", "visibility", "gated", "files", "paths", "tag"),
    *("message", "startingPoint", "title", "description", "pullRequest", "comment", "status", "user", "operation"),
    *("objects", "oid", "size", "content", "namespace", "item", "key", "value", "path", "sample", "expand", "summary"),
)
ANY_VALUE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 3)
    | st.floats()
    | st.sampled_from(["", "upload", "header", "é", "a/b"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=6,
)


def test_no_body_is_an_error_of_the_server(local_hub: LocalHub) -> None:
    with http_client(local_hub) as http:
        make_repo(http, "fuzzed")

        @settings(max_examples=1000, deadline=None, derandomize=True)
        @given(st.sampled_from(WRITES), ANY_VALUE, st.sampled_from([b"%s", b"\xff%s", b"%s{"]))
        def send(route: tuple[str, str], value: object, frame: bytes) -> None:
            body = frame.replace(b"%s", json.dumps(value).encode())
            answer = http.request(*route, content=body, headers={"Content-Type": "application/json"})
            assert answer.status_code < 500, (route, body, answer.text)

        send()
