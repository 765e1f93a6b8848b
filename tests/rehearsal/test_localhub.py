"""The local Hub, asked by the unmodified clients, and by bare HTTP where a client would hide what is claimed.

Each client script runs in a process of its own, as huggingface_hub reads the environment when it is imported.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fp8pipe.errors import ServerFailed
from fp8pipe.rehearsal.localhub import Fault, LocalHub, TokenOwner, start
from fp8pipe.rehearsal.localhub.cards import check_card, read_card
from fp8pipe.rehearsal.localhub.discussions import conflicting, merged
from fp8pipe.rehearsal.localhub.disk import Entry
from fp8pipe.rehearsal.localhub.markdown import render

TOKENS = {
    "hf_ann": TokenOwner("ann", ("acme",)),
    "hf_bob": TokenOwner("bob"),
    "hf_reader": TokenOwner("ann", ("acme",), role="read"),
}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One server for all tests here; each uses repositories of its own name."""
    with start(tmp_path_factory.mktemp("hub"), tokens=TOKENS, faults=True) as running:
        yield running


@pytest.fixture
def http(hub: LocalHub) -> Iterator[httpx.Client]:
    """Bare HTTP as ann."""
    with http_client(hub) as client:
        yield client


@pytest.fixture
def anonymous(hub: LocalHub) -> Iterator[httpx.Client]:
    """Bare HTTP as nobody."""
    with http_client(hub, token=None) as client:
        yield client


@pytest.fixture
def broken(http: httpx.Client) -> Iterator[Any]:
    """`broken(Fault(...))` breaks the Hub until the test ends."""

    def set_faults(*faults: Fault) -> None:
        http.post("/_faults", json=[asdict(fault) for fault in faults]).raise_for_status()

    yield set_faults
    set_faults()


def http_client(hub: LocalHub, token: str | None = "hf_ann") -> httpx.Client:
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    return httpx.Client(base_url=hub.endpoint, headers=headers, timeout=30, trust_env=False)


def with_client(hub: LocalHub, home: Path, script: str, **given: object) -> Any:
    """Run a script that has `api`, `hf` (huggingface_hub) and the given values, and sets `result`; returns `result`."""
    code = "import json, huggingface_hub as hf\nfrom pathlib import Path\napi = hf.HfApi()\n"
    code += "".join(f"{name} = {value!r}\n" for name, value in given.items())
    code += textwrap.dedent(script) + "\nprint(json.dumps(result))\n"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {**hub.environment(), "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def make_repo(http: httpx.Client, name: str, kind: str = "model", **settings: object) -> str:
    body = {"name": name, "organization": "acme", "type": kind}
    http.post("/api/repos/create", json=body).raise_for_status()
    if settings:
        http.put(f"/api/{kind}s/acme/{name}/settings", json=settings).raise_for_status()
    return f"acme/{name}"


def commit(
    http: httpx.Client, repo: str, files: dict[str, bytes], *, title: str = "files", revision: str = "main", **more: Any
) -> httpx.Response:
    header = {"key": "header", "value": {"summary": title, **more}}
    lines = [header] + [
        {"key": "file", "value": {"path": path, "content": base64.b64encode(data).decode(), "encoding": "base64"}}
        for path, data in files.items()
    ]
    body = "\n".join(json.dumps(line) for line in lines)
    return http.post(f"/api/models/{repo}/commit/{revision}", content=body)


def head(http: httpx.Client, repo: str) -> str:
    return http.get(f"/api/models/{repo}").json()["sha"]


def titles(http: httpx.Client, repo: str) -> list[str]:
    return [one["title"] for one in http.get(f"/api/models/{repo}/commits/main").json()]


def upload(http: httpx.Client, repo: str, data: bytes) -> str:
    """Upload a large file and return its sha256."""
    oid = hashlib.sha256(data).hexdigest()
    http.put(upload_address(http, repo, oid, len(data)), content=data).raise_for_status()
    return oid


def upload_address(http: httpx.Client, repo: str, oid: str, size: int) -> str:
    body = {"operation": "upload", "objects": [{"oid": oid, "size": size}]}
    answer = http.post(f"/{repo}.git/info/lfs/objects/batch", json=body)
    return answer.json()["objects"][0]["actions"]["upload"]["href"]


# Publishing and reading back, with the client


def test_a_published_model_comes_back_byte_for_byte(hub: LocalHub, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "fp8pipe" / "plots").mkdir(parents=True)
    files = {
        "model-00001-of-00002.safetensors": os.urandom(3_000_000),
        "model-00002-of-00002.safetensors": os.urandom(1000),
        "config.json": b'{"a": 1}',
        "empty.txt": b"",
        "README.md": b"---\nlicense: mit\ntags: [fp8]\nbase_model: acme/base\n---\n# Model\n",
        "fp8pipe/plots/drop.png": bytes(range(256)),
        "naïve name #1 %2F.txt": "ü".encode(),
    }
    for path, data in files.items():
        (folder / path).write_bytes(data)
    result = with_client(
        hub,
        tmp_path / "home",
        """
        api.create_repo("acme/roundtrip", private=True)
        files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
        def additions():
            return [hf.CommitOperationAdd(str(p.relative_to(folder)), p) for p in files]
        first = api.model_info("acme/roundtrip").sha
        large = additions()
        api.preupload_lfs_files("acme/roundtrip", large)
        made = api.create_commit("acme/roundtrip", large, commit_message="release", parent_commit=first)
        again = api.create_commit("acme/roundtrip", additions(), commit_message="release again")
        api.create_tag("acme/roundtrip", tag="v1", revision=made.oid)
        check = api.verify_repo_checksums("acme/roundtrip", revision="v1", local_dir=folder)
        info = api.model_info("acme/roundtrip", files_metadata=True)
        result = {
            "snapshot": api.snapshot_download("acme/roundtrip", revision="v1"),
            "same": made.oid == again.oid,
            "commits": [c.title for c in api.list_repo_commits("acme/roundtrip")],
            "mismatches": check.mismatches, "missing": check.missing_paths, "checked": check.checked_count,
            "license": info.card_data.license, "tags": info.tags,
            "sha256": {s.rfilename: s.lfs.sha256 for s in info.siblings if s.lfs},
        }
        """,
        folder=str(folder),
    )
    snapshot = Path(result["snapshot"])
    assert {path: (snapshot / path).read_bytes() for path in files} == files
    assert result["same"]
    assert result["commits"] == ["release", "initial commit"]
    assert (result["mismatches"], result["missing"], result["checked"]) == ([], [".gitattributes"], len(files))
    assert result["license"] == "mit"
    assert "base_model:acme/base" in result["tags"]
    large = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "fp8pipe/plots/drop.png")
    assert result["sha256"] == {path: hashlib.sha256(files[path]).hexdigest() for path in large}


def test_the_client_names_what_is_missing_or_closed(hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    make_repo(http, "errors")
    make_repo(http, "errors-private", visibility="private")
    make_repo(http, "errors-gated", gated="manual")
    result = with_client(
        hub,
        tmp_path,
        """
        def why(call):
            try:
                call()
            except hf.errors.HfHubHTTPError as error:
                return type(error).__name__, error.response.status_code
        bob = hf.HfApi(token="hf_bob")
        nobody = hf.HfApi(token=False)
        result = {
            "no repo": why(lambda: api.model_info("acme/none")),
            "no namespace": why(lambda: api.model_info("none")),
            "no repo, nobody asks": why(lambda: nobody.model_info("acme/none")),
            "no revision": why(lambda: api.model_info("acme/errors", revision="v9")),
            "no file": why(lambda: api.hf_hub_download("acme/errors", "none.json")),
            "no folder": why(lambda: list(api.list_repo_tree("acme/errors", "none"))),
            "private": why(lambda: bob.model_info("acme/errors-private")),
            "private, nobody asks": why(lambda: nobody.model_info("acme/errors-private")),
            "gated": why(lambda: bob.hf_hub_download("acme/errors-gated", ".gitattributes")),
            "gated, nobody asks": why(lambda: nobody.auth_check("acme/errors-gated")),
            "gated, its owner asks": why(lambda: api.auth_check("acme/errors-gated")),
            "not a member": why(lambda: bob.create_repo("acme/bobs")),
            "read token": why(lambda: hf.HfApi(token="hf_reader").create_repo("acme/readers")),
            "wrong token": why(lambda: hf.HfApi(token="hf_wrong").whoami()),
            "exists": why(lambda: api.create_repo("acme/errors")),
            "exists, fine": why(lambda: api.create_repo("acme/errors", exist_ok=True)),
            "no file to delete": why(lambda: api.create_commit("acme/errors", commit_message="x", operations=[
                hf.CommitOperationDelete("not-there.txt")])),
        }
        """,
    )
    assert result == {
        "no repo": ["RepositoryNotFoundError", 404],
        "no namespace": ["RepositoryNotFoundError", 404],
        "no repo, nobody asks": ["RepositoryNotFoundError", 401],
        "no revision": ["RevisionNotFoundError", 404],
        "no file": ["RemoteEntryNotFoundError", 404],
        "no folder": ["RemoteEntryNotFoundError", 404],
        "private": ["RepositoryNotFoundError", 404],
        "private, nobody asks": ["RepositoryNotFoundError", 401],
        "gated": ["GatedRepoError", 403],
        "gated, nobody asks": ["GatedRepoError", 401],
        "gated, its owner asks": None,
        "not a member": ["HfHubHTTPError", 403],
        "read token": ["HfHubHTTPError", 403],
        "wrong token": ["HfHubHTTPError", 401],
        "exists": ["HfHubHTTPError", 409],
        "exists, fine": None,
        "no file to delete": ["RemoteEntryNotFoundError", 404],
    }


def test_safetensors_headers_are_read_without_the_tensors(hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    import numpy as np
    from safetensors.numpy import save

    repo = make_repo(http, "headers")
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    shards = {
        first: save({"a": np.zeros((1000, 500), np.float32)}),
        second: save({"b": np.zeros(3, np.float16)}),
    }
    index = {"metadata": {}, "weight_map": {"a": first, "b": second}}
    commit(http, repo, {**shards, "model.safetensors.index.json": json.dumps(index).encode()}).raise_for_status()
    result = with_client(
        hub,
        tmp_path,
        """
        found = api.get_safetensors_metadata("acme/headers")
        result = {name: [t.dtype, t.shape] for f in found.files_metadata.values() for name, t in f.tensors.items()}
        """,
    )
    assert result == {"a": ["F32", [1000, 500]], "b": ["F16", [3]]}
    part = http.get(f"/{repo}/resolve/main/{first}", headers={"Range": "bytes=8-15"})
    assert (part.status_code, part.content) == (206, shards[first][8:16])
    assert part.headers["Content-Range"] == f"bytes 8-15/{len(shards[first])}"


def test_datasets_loads_jsonl_and_parquet_at_a_commit(hub: LocalHub, tmp_path: Path) -> None:
    result = with_client(
        hub,
        tmp_path,
        r"""
        import datasets
        datasets.disable_progress_bars()
        api.create_repo("acme/lines", repo_type="dataset")
        def put(text):
            return api.create_commit("acme/lines", repo_type="dataset", commit_message="lines", operations=[
                hf.CommitOperationAdd("data/train.jsonl", text), hf.CommitOperationAdd("data/test.jsonl", text)]).oid
        old = put(b'{"text": "old"}\n')
        put(b'{"text": "new"}\n{"text": "newer"}\n')
        datasets.Dataset.from_dict({"q": [1, 2, 3]}).push_to_hub("acme/columns", private=True)
        result = {
            "old": datasets.load_dataset("acme/lines", split="train", revision=old)["text"][:],
            "new": datasets.load_dataset("acme/lines", split="test")["text"][:],
            "parquet": datasets.load_dataset("acme/columns", split="train")["q"][:],
            "listed": sorted(d.id for d in api.list_datasets(author="acme")),
            "models": [m.id for m in api.list_models(author="acme", search="lines")],
        }
        """,
    )
    assert result["old"] == ["old"]
    assert result["new"] == ["new", "newer"]
    assert result["parquet"] == [1, 2, 3]
    assert result["listed"] == ["acme/columns", "acme/lines"]
    assert result["models"] == []


def test_a_collection_is_made_filled_annotated_and_emptied(hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    make_repo(http, "shelf-a")
    make_repo(http, "shelf-b")
    result = with_client(
        hub,
        tmp_path,
        """
        made = api.create_collection("FP8: models!", namespace="acme", description="Measured.", private=True)
        slug = api.create_collection("FP8: models!", namespace="acme", exists_ok=True).slug
        assert slug == made.slug
        api.add_collection_item(slug, "acme/shelf-a", "model", note="drop 0.1")
        api.add_collection_item(slug, "acme/shelf-b", "model")
        again = api.add_collection_item(slug, "acme/shelf-a", "model", note="drop 0.2", exists_ok=True)
        kept = again.items[0].note
        api.update_collection_item(slug, again.items[0].item_object_id, note="drop 0.2", position=1)
        hidden = len(list(hf.HfApi(token=False).list_collections(owner="acme")))
        renamed = api.update_collection_metadata(slug, title="Other", private=False).slug
        order = [(item.item_id, item.note) for item in api.get_collection(slug).items]
        listed = [(c.title, c.description) for c in hf.HfApi(token=False).list_collections(item="models/acme/shelf-a")]
        api.move_repo("acme/shelf-b", "acme/shelf-c")
        api.delete_repo("acme/shelf-a")
        left = [item.item_id for item in api.get_collection(renamed).items]
        api.delete_collection_item(slug, api.get_collection(slug).items[0].item_object_id)
        api.delete_collection(slug)
        api.delete_collection(slug, missing_ok=True)
        result = {"kept": kept, "hidden": hidden, "order": order, "listed": listed, "left": left,
                  "slug": slug.rpartition("-")[0], "renamed": renamed.rpartition("-")[0]}
        """,
    )
    assert result == {
        "kept": "drop 0.1",
        "hidden": 0,
        "order": [["acme/shelf-b", None], ["acme/shelf-a", "drop 0.2"]],
        "listed": [["Other", "Measured."]],
        "left": ["acme/shelf-c"],
        "slug": "acme/fp8-models",
        "renamed": "acme/other",
    }


def test_a_pull_request_is_opened_discussed_and_merged(hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    repo = make_repo(http, "pulls")
    commit(http, repo, {"a.txt": b"1", "b.txt": b"1"})
    result = with_client(
        hub,
        tmp_path,
        """
        def add(path, data, **more):
            return api.create_commit("acme/pulls", [hf.CommitOperationAdd(path, data)], commit_message=path, **more)
        opened = add("c.txt", b"1", create_pr=True)
        add("d.txt", b"1", revision=opened.pr_revision)
        add("a.txt", b"2")
        api.comment_discussion("acme/pulls", opened.pr_num, "please")
        api.merge_pull_request("acme/pulls", opened.pr_num)
        clash = add("a.txt", b"3", create_pr=True)
        add("a.txt", b"4")
        conflicting = api.get_discussion_details("acme/pulls", clash.pr_num).conflicting_files
        try:
            api.merge_pull_request("acme/pulls", clash.pr_num)
        except hf.errors.HfHubHTTPError as error:
            refused = error.response.status_code
        draft = api.create_pull_request("acme/pulls", title="Draft")
        api.rename_discussion("acme/pulls", draft.num, "Later")
        api.change_discussion_status("acme/pulls", draft.num, "closed")
        merged = api.get_discussion_details("acme/pulls", opened.pr_num)
        result = {
            "number": opened.pr_num, "status": merged.status, "events": [e.type for e in merged.events],
            "files": api.list_repo_files("acme/pulls"), "refused": refused, "conflicting": conflicting,
            "all": [[d.num, d.title, d.status] for d in api.get_repo_discussions("acme/pulls")],
            "refs": [r.name for r in api.list_repo_refs("acme/pulls", include_pull_requests=True).pull_requests],
        }
        """,
    )
    assert result["number"] == 1
    assert result["status"] == "merged"
    assert result["events"] == ["comment", "commit", "commit", "comment", "status-change"]
    assert result["files"] == [".gitattributes", "a.txt", "b.txt", "c.txt", "d.txt"]
    assert (result["refused"], result["conflicting"]) == (409, ["a.txt"])
    assert result["all"] == [[3, "Later", "closed"], [2, "a.txt", "open"], [1, "c.txt", "merged"]]
    assert result["refs"] == ["refs/pr/1", "refs/pr/2", "refs/pr/3"]


def test_branches_tags_and_a_squash(hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    repo = make_repo(http, "refs")
    commit(http, repo, {"a.txt": b"1"}, title="one")
    result = with_client(
        hub,
        tmp_path,
        """
        one = api.model_info("acme/refs").sha
        api.create_tag("acme/refs", tag="v1/beta", tag_message="first")
        api.create_tag("acme/refs", tag="v1/beta", exist_ok=True)
        api.create_branch("acme/refs", branch="candidate/x", revision="v1/beta")
        api.create_commit("acme/refs", [hf.CommitOperationAdd("b.txt", b"2")], commit_message="two",
                          revision="candidate/x")
        api.super_squash_history("acme/refs", branch="candidate/x", commit_message="all")
        refs = api.list_repo_refs("acme/refs")
        result = {
            "tag": [[t.name, t.target_commit == one] for t in refs.tags],
            "branches": sorted(b.name for b in refs.branches),
            "squashed": [c.title for c in api.list_repo_commits("acme/refs", revision="candidate/x")],
            "files": api.list_repo_files("acme/refs", revision="candidate/x"),
            "main": api.list_repo_files("acme/refs"),
            "short": api.model_info("acme/refs", revision=one[:8]).sha == one,
        }
        api.delete_tag("acme/refs", tag="v1/beta")
        api.delete_branch("acme/refs", branch="candidate/x")
        result["after"] = [api.revision_exists("acme/refs", r) for r in ("v1/beta", "candidate/x", "main", one)]
        """,
    )
    assert result == {
        "tag": [["v1/beta", True]],
        "branches": ["candidate/x", "main"],
        "squashed": ["all"],
        "files": [".gitattributes", "a.txt", "b.txt"],
        "main": [".gitattributes", "a.txt"],
        "short": True,
        "after": [False, False, True, True],
    }


# The protocol underneath


def test_a_commit_on_an_outdated_parent_is_refused_and_changes_nothing(http: httpx.Client) -> None:
    repo = make_repo(http, "outdated")
    old = head(http, repo)
    commit(http, repo, {"a.txt": b"theirs"}).raise_for_status()
    now = head(http, repo)
    late = commit(http, repo, {"a.txt": b"ours"}, parentCommit=old)
    assert late.status_code == 412
    assert head(http, repo) == now
    assert http.get(f"/{repo}/resolve/main/a.txt").content == b"theirs"


def test_of_many_commits_on_one_parent_exactly_one_wins_and_without_parent_all_land(hub: LocalHub) -> None:
    with http_client(hub) as http:
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


def test_an_upload_is_kept_only_if_its_bytes_are_what_was_announced(http: httpx.Client, hub: LocalHub) -> None:
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
    assert not list((hub.root / "tmp").iterdir())


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


def test_a_granted_user_reads_a_gated_repository(hub: LocalHub, http: httpx.Client) -> None:
    repo = make_repo(http, "granted", gated="auto")
    with http_client(hub, "hf_bob") as bob:
        before = bob.get(f"/{repo}/resolve/main/.gitattributes")
        http.post(f"/api/models/{repo}/user-access-request/grant", json={"user": "bob"}).raise_for_status()
        after = bob.get(f"/{repo}/resolve/main/.gitattributes")
    assert (before.status_code, before.headers["X-Error-Code"]) == (403, "GatedRepo")
    assert after.status_code == 200


def test_a_private_repository_shows_nowhere(http: httpx.Client, anonymous: httpx.Client) -> None:
    repo = make_repo(http, "veiled", visibility="private")
    shelf = http.post("/api/collections", json={"title": "Other things", "namespace": "acme"}).json()["slug"]
    item = {"item": {"id": repo, "type": "model"}}
    http.post(f"/api/collections/{shelf}/items", json=item).raise_for_status()
    pages = {"Accept": "text/html"}
    assert repo not in anonymous.get("/", headers=pages).text
    assert anonymous.get(f"/{repo}", headers=pages).status_code == 401
    assert anonymous.get(f"/{repo}/resolve/main/.gitattributes").status_code == 401
    assert "veiled" not in anonymous.get(f"/collections/{shelf}", headers=pages).text
    assert anonymous.get(f"/api/collections/{shelf}").json()["items"] == []
    assert repo not in [one["id"] for one in anonymous.get("/api/models").json()]
    assert repo in [one["id"] for one in http.get("/api/models").json()]


# Pages for people


def test_a_card_is_shown_with_its_plots_and_without_its_scripts(http: httpx.Client, anonymous: httpx.Client) -> None:
    repo = make_repo(http, "shown")
    card = b"""---
license: mit
base_model: acme/shown-base
tags: [fp8, "<b>bold</b>"]
---
# Title
| Task | Drop |
|---|---:|
| sums | 0.25 |

![drop](fp8pipe/plots/drop.png) [gate](./fp8pipe/gate.json) [bad](javascript:alert(1))
<script>alert(1)</script><img src=x onerror=alert(1)><details onclick=alert(1)>
"""
    files = {
        "README.md": card,
        "fp8pipe/plots/drop.png": b"\x89PNG",
        "<i>.txt": b"x",
        "page.html": b"<script></script>",
    }
    commit(http, repo, files, title="<u>release</u>").raise_for_status()
    http.post(f"/api/models/{repo}/tag/main", json={"tag": "v1"}).raise_for_status()
    answer = anonymous.get(f"/{repo}")
    page = answer.text
    assert '<td style="text-align:right">0.25</td>' in page
    assert f'src="/{repo}/resolve/main/fp8pipe/plots/drop.png"' in page
    assert anonymous.get(f"/{repo}/resolve/main/fp8pipe/plots/drop.png").headers["Content-Type"] == "image/png"
    assert f'href="/{repo}/blob/main/fp8pipe/gate.json"' in page
    assert "license: mit" not in page
    assert all(text in page for text in (">mit<", ">acme/shown-base<", ">fp8<", ">v1<", "drop.png</a>"))
    assert not re.search(r"<(script|img src=x|details|b>|i>|u>)|href=\"javascript", page)
    assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    served = anonymous.get(f"/{repo}/resolve/main/page.html")
    assert served.headers["Content-Type"].startswith("text/plain")
    assert "sandbox" in served.headers["Content-Security-Policy"]


def test_every_page_answers_and_leads_only_to_pages_that_answer(http: httpx.Client, anonymous: httpx.Client) -> None:
    repo = make_repo(http, "linked")
    make_repo(http, "linked-data", "dataset")
    commit(http, repo, {"README.md": b"---\ndatasets: [acme/linked-data]\n---\nHi", "a b.txt": b"1"})
    http.post(f"/api/models/{repo}/tag/main", json={"tag": "v1/x", "message": "first"})
    http.post(f"/api/models/{repo}/discussions", json={"title": "Draft", "description": "d", "pullRequest": True})
    shelf = http.post("/api/collections", json={"title": "Linked", "namespace": "acme"}).json()["slug"]
    for kind, name in (("model", repo), ("dataset", "acme/linked-data")):
        http.post(f"/api/collections/{shelf}/items", json={"item": {"id": name, "type": kind}, "note": f"n {kind}"})
    todo, seen = {"/", f"/collections/{shelf}", f"/{repo}"}, set()
    while todo:
        address = todo.pop()
        seen.add(address)
        answer = anonymous.get(address, headers={"Accept": "text/html"}, follow_redirects=True)
        assert answer.status_code == 200, address
        if address in ("/", f"/collections/{shelf}") or "linked" in address:
            links = re.findall(r'(?:href|src)="(/[^"#]*)', answer.text)
            todo |= {link for link in links if link not in seen and ("linked" in link or "static" in link)}
    assert {
        f"/{repo}/tree/v1%2Fx",
        "/datasets/acme/linked-data",
        f"/{repo}/discussions/1",
    } <= seen
    assert "n dataset" in anonymous.get(f"/collections/{shelf}").text
    lost = anonymous.get("/acme/linked-nowhere", headers={"Accept": "text/html"})
    assert (lost.status_code, lost.headers["X-Error-Code"]) == (401, "RepoNotFound")
    assert lost.headers["Content-Type"].startswith("text/html")


@given(st.text(alphabet=st.sampled_from("<>/ \"'=abdeilmrstuy!-\n`&;"), max_size=60))
def test_no_text_makes_markdown_emit_an_element_of_its_own(source: str) -> None:
    shown = render(source, link=str, image=str)
    ours = "p|h[1-6]|em|strong|ul|ol|li|code|pre|blockquote|hr|br|a|img|s|table|thead|tbody|tr|th|td"
    folded = "details|summary|sub|sup|kbd|b|i"
    assert not re.search(rf"<(?!/?(?:{ours}|{folded})(?:>| /?>| [a-z]+=\"))[a-zA-Z/!]", shown), shown
    assert not re.search(r"<[^>]* on\w+=", shown)


def test_a_front_matter_is_taken_off_the_text_and_checked() -> None:
    card = read_card("---\r\nlicense: mit\r\n---\r\n# T\r\n---\r\nnot yaml\r\n---\r\n")
    assert card.metadata == {"license": "mit"}
    assert card.body.startswith("# T")
    assert read_card("# no front matter\n---\na: 1\n---\n").metadata == {}
    assert check_card("---\n---\nx").warnings
    assert check_card("---\nlicense: 3\n---\n").errors


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


# When things break


def test_a_lost_answer_hides_a_commit_that_was_made(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "lost")
    broken(Fault("/api/models/acme/lost/commit/", "drop-after", method="POST"))
    with pytest.raises(httpx.RemoteProtocolError):
        commit(http, repo, {"a.txt": b"1"}, title="release")
    assert titles(http, repo) == ["release", "initial commit"]
    assert commit(http, repo, {"a.txt": b"1"}, title="release").status_code == 200
    assert titles(http, repo) == ["release", "initial commit"]


def test_a_dropped_request_did_nothing(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "dropped")
    broken(Fault("/dropped/commit/", "drop-before"))
    with pytest.raises(httpx.RemoteProtocolError):
        commit(http, repo, {"a.txt": b"1"})
    assert titles(http, repo) == ["initial commit"]


def test_faults_strike_the_requests_that_they_name(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "counted")
    broken(Fault("/counted/commit/", "status", after=1, times=2, status=412), Fault("/elsewhere", "status"))
    answers = [commit(http, repo, {"a.txt": str(number).encode()}).status_code for number in range(5)]
    assert answers == [200, 412, 412, 200, 200]
    assert [fault["met"] for fault in http.get("/_faults").json()] == [5, 0]


def test_the_client_retries_a_failed_upload(hub: LocalHub, http: httpx.Client, broken: Any, tmp_path: Path) -> None:
    make_repo(http, "retried")
    broken(
        Fault("^/_lfs/[0-9a-f]", "status", method="PUT", status=500), Fault("^/_lfs/", "slow", delay_s=0.01, times=9)
    )
    script = """
    api.create_commit("acme/retried", [hf.CommitOperationAdd("w.bin", bytes(300_000))], commit_message="w")
    result = Path(api.hf_hub_download("acme/retried", "w.bin")).read_bytes() == bytes(300_000)
    """
    assert with_client(hub, tmp_path, script)
    assert http.get("/_faults").json()[0]["met"] == 2


def test_a_corrupted_blob_keeps_its_name_and_changes_its_bytes(http: httpx.Client, broken: Any) -> None:
    repo = make_repo(http, "corrupted")
    broken(Fault("^/_lfs/[0-9a-f]", "corrupt", method="PUT"))
    data = os.urandom(5000)
    oid = upload(http, repo, data)
    lfs = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": oid, "size": len(data)}}
    body = "\n".join(map(json.dumps, [{"key": "header", "value": {"summary": "x"}}, lfs]))
    http.post(f"/api/models/{repo}/commit/main", content=body).raise_for_status()
    served = http.get(f"/{repo}/resolve/main/w.bin")
    assert served.headers["ETag"] == f'"{oid}"'
    assert len(served.content) == len(data)
    assert hashlib.sha256(served.content).hexdigest() != oid


def test_a_hub_without_faults_has_no_address_for_them(tmp_path: Path) -> None:
    with start(tmp_path / "hub") as hub, http_client(hub, hub.token) as http:
        assert http.get("/_faults").status_code == 404
        assert http.get("/api/whoami-v2").json()["name"] == "local"


def test_the_state_survives_a_kill(tmp_path: Path) -> None:
    hub = start(tmp_path / "hub")
    with http_client(hub, hub.token) as http:
        repo = make_repo(http, "kept")
        commit(http, repo, {"a.txt": b"1"}).raise_for_status()
        http.post(f"/api/models/{repo}/tag/main", json={"tag": "v1"}).raise_for_status()
        shelf = http.post("/api/collections", json={"title": "Kept", "namespace": "acme"}).json()["slug"]
        before = http.get(f"/api/models/{repo}").json()
    os.kill(hub.process.pid, signal.SIGKILL)
    hub.stop()
    (tmp_path / "hub" / "tmp" / "half-written").write_text("litter")
    with start(tmp_path / "hub") as again, http_client(again, hub.token) as http:
        assert http.get(f"/api/models/{repo}").json() == before
        assert http.get(f"/{repo}/resolve/v1/a.txt").content == b"1"
        assert http.get(f"/api/collections/{shelf}").json()["title"] == "Kept"
        assert commit(http, repo, {"b.txt": b"2"}, parentCommit=before["sha"]).status_code == 200
        assert not (tmp_path / "hub" / "tmp" / "half-written").exists()


def test_a_hub_ends_with_the_process_that_started_it_but_not_with_the_thread(tmp_path: Path) -> None:
    code = """
import sys, threading, time, urllib.request
from pathlib import Path
from fp8pipe.rehearsal.localhub import start
made = []
thread = threading.Thread(target=lambda: made.append(start(Path(sys.argv[1]))))
thread.start(); thread.join(); time.sleep(0.3)
assert urllib.request.urlopen(made[0].endpoint).status == 200
print(made[0].endpoint, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent, parent.stdout:
        endpoint = parent.stdout.readline().strip()
        assert httpx.get(endpoint, trust_env=False).status_code == 200
        parent.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            httpx.get(endpoint, trust_env=False)
        except httpx.TransportError:
            return
        time.sleep(0.05)
    pytest.fail("the Hub outlived the process that started it")


def test_a_hub_that_cannot_start_says_why(hub: LocalHub, tmp_path: Path) -> None:
    port = int(hub.endpoint.rpartition(":")[2])
    with pytest.raises(ServerFailed, match=f"cannot listen on 127.0.0.1:{port}"):
        start(tmp_path / "other", port=port)
    with pytest.raises(ServerFailed, match="Another process serves the local Hub"):
        start(hub.root, log=tmp_path / "second.log")


def test_tokens_stay_out_of_command_line_and_log(hub: LocalHub, http: httpx.Client) -> None:
    make_repo(http, "secretive")
    command = Path(f"/proc/{hub.process.pid}/cmdline").read_bytes()
    environment = Path(f"/proc/{hub.process.pid}/environ").read_bytes()
    assert not any(token.encode() in command + environment + hub.log.read_bytes() for token in TOKENS)
