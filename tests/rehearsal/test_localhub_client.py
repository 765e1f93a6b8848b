"""The local Hub, asked by the unmodified clients: what is published comes back.

Each client script runs in a process of its own, as huggingface_hub reads the environment when it is imported.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import httpx
from support.local_hub import commit, make_repo, with_client

from fp8pipe.rehearsal.localhub import LocalHub


def test_a_published_model_comes_back_byte_for_byte(local_hub: LocalHub, tmp_path: Path) -> None:
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
        local_hub,
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


def test_the_client_names_what_is_missing_or_closed(local_hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    make_repo(http, "errors")
    make_repo(http, "errors-private", visibility="private")
    make_repo(http, "errors-gated", gated="manual")
    result = with_client(
        local_hub,
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


def test_safetensors_headers_are_read_without_the_tensors(
    local_hub: LocalHub, http: httpx.Client, tmp_path: Path
) -> None:
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
        local_hub,
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


def test_datasets_loads_jsonl_and_parquet_at_a_commit(local_hub: LocalHub, tmp_path: Path) -> None:
    result = with_client(
        local_hub,
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


def test_a_collection_is_made_filled_annotated_and_emptied(
    local_hub: LocalHub, http: httpx.Client, tmp_path: Path
) -> None:
    make_repo(http, "listed-a")
    make_repo(http, "listed-b")
    result = with_client(
        local_hub,
        tmp_path,
        """
        made = api.create_collection("FP8: models!", namespace="acme", description="Measured.", private=True)
        slug = api.create_collection("FP8: models!", namespace="acme", exists_ok=True).slug
        assert slug == made.slug
        api.add_collection_item(slug, "acme/listed-a", "model", note="drop 0.1")
        api.add_collection_item(slug, "acme/listed-b", "model")
        again = api.add_collection_item(slug, "acme/listed-a", "model", note="drop 0.2", exists_ok=True)
        kept = again.items[0].note
        api.update_collection_item(slug, again.items[0].item_object_id, note="drop 0.2", position=1)
        hidden = len(list(hf.HfApi(token=False).list_collections(owner="acme")))
        renamed = api.update_collection_metadata(slug, title="Other", private=False).slug
        order = [(item.item_id, item.note) for item in api.get_collection(slug).items]
        listed = [(c.title, c.description) for c in hf.HfApi(token=False).list_collections(item="models/acme/listed-a")]
        api.move_repo("acme/listed-b", "acme/listed-c")
        api.delete_repo("acme/listed-a")
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
        "order": [["acme/listed-b", None], ["acme/listed-a", "drop 0.2"]],
        "listed": [["Other", "Measured."]],
        "left": ["acme/listed-c"],
        "slug": "acme/fp8-models",
        "renamed": "acme/other",
    }


def test_a_pull_request_is_opened_discussed_and_merged(local_hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    repo = make_repo(http, "pulls")
    commit(http, repo, {"a.txt": b"1", "b.txt": b"1"})
    result = with_client(
        local_hub,
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


def test_branches_tags_and_a_squash(local_hub: LocalHub, http: httpx.Client, tmp_path: Path) -> None:
    repo = make_repo(http, "refs")
    commit(http, repo, {"a.txt": b"1"}, title="one")
    result = with_client(
        local_hub,
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
