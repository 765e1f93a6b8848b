"""Resolving, reading and downloading a model, from a real Hub on loopback and from folders."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sample_folders import safetensors, write_model

from fp8pipe.errors import (
    AccessDenied,
    Fp8PipeError,
    HubUnreachable,
    InputError,
    MalformedCheckpoint,
    ModelNotFound,
    RevisionNotFound,
    SourceChanged,
    UnsafeWeights,
)
from fp8pipe.hub.client import client
from fp8pipe.hub.download import download, download_iter
from fp8pipe.hub.source import needed_files, read_config, read_file, read_range, resolve, weight_files
from fp8pipe.progress import ProgressEvent
from fp8pipe.rehearsal.localhub import Disruption, LocalHub


def push(repo_id: str, folder: Path, **settings: object) -> None:
    api = client()
    api.create_repo(repo_id, private=bool(settings.get("private")))
    api.upload_folder(repo_id=repo_id, folder_path=folder)
    if "gated" in settings:
        api.update_repo_settings(repo_id, gated="manual")


@pytest.fixture
def model(hub: LocalHub, repo_id: str, tmp_path: Path) -> str:
    """A sound model on the Hub, beside files that must not be fetched."""
    folder = write_model(tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# base")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(safetensors(w=b"x"))
    (folder / "modeling_x.py").write_text("raise SystemExit")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    push(repo_id, folder)
    return repo_id


# ---------------------------------------------------------------------------------------------- the Hub


def test_resolve_pins_the_commit_and_lists_sizes_and_oids(model: str, tmp_path: Path) -> None:
    snapshot = resolve(model)
    assert snapshot.commit == client().model_info(model).sha
    assert snapshot.root is None and not snapshot.is_local
    files = {file.name: file for file in snapshot.files}
    shard = "model-00001-of-00002.safetensors"
    assert files[shard].size == (tmp_path / "model" / shard).stat().st_size
    assert len(files[shard].oid or "") == 64, "an LFS file is known by its sha256"
    assert len(files["config.json"].oid or "") == 40, "another by git's sha1"
    assert not (tmp_path / "cache").exists(), "nothing was downloaded"


def test_resolve_of_a_revision_ignores_later_commits_to_main(model: str) -> None:
    before = resolve(model)
    client().create_tag(model, tag="v1")
    client().upload_file(repo_id=model, path_in_repo="config.json", path_or_fileobj=b'{"model_type": "qwen3"}')
    assert resolve(f"{model}@v1") == resolve(f"{model}@{before.commit}") == before
    assert resolve(model).commit != before.commit


def test_unknown_model_is_not_found_with_and_without_a_token(
    hub: LocalHub, repo_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ModelNotFound, match=f"model {repo_id}.*Check the name"):
        resolve(repo_id)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelNotFound, match="if it is private, set HF_TOKEN"):
        resolve(repo_id)


def test_unknown_revision_is_told_from_unknown_model(model: str) -> None:
    with pytest.raises(RevisionNotFound, match="@no-such-tag"):
        resolve(f"{model}@no-such-tag")


def test_name_that_no_hub_can_have_is_bad_input(hub: LocalHub) -> None:
    for name in ("a/b/c", "acme/x@", "spaces in/name"):
        with pytest.raises(InputError, match=name.split("@")[0]):
            resolve(name)


def test_gated_model_without_a_token_names_the_page_of_access(
    hub: LocalHub, repo_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(repo_id, write_model(tmp_path / "model"), gated=True)
    resolve(repo_id)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(AccessDenied, match=f"ask for access at {hub.endpoint}/{repo_id}, then set HF_TOKEN"):
        resolve(repo_id)


def test_private_model_opens_for_its_owner_only(
    hub: LocalHub, repo_id: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(repo_id, write_model(tmp_path / "model"), private=True)
    assert download(resolve(repo_id)).path.is_dir()
    monkeypatch.setenv("HF_TOKEN", "hf_not_a_token")
    with pytest.raises(AccessDenied, match="use a token of an account that has access"):
        resolve(repo_id)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ModelNotFound, match="if it is private, set HF_TOKEN"):
        resolve(repo_id)


def test_unreachable_hub_is_transient_and_named(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{port}")
    with pytest.raises(HubUnreachable, match=f"http://127.0.0.1:{port} cannot be reached") as error:
        resolve("acme/any")
    assert error.value.transient


@pytest.mark.parametrize("status", [429, 500, 503])
def test_hub_in_trouble_is_transient_and_its_status_is_named(
    hub: LocalHub, repo_id: str, break_hub: Callable[..., None], status: int
) -> None:
    break_hub(Disruption(path=f"^/api/models/{re.escape(repo_id)}", action="status", status=status))
    with pytest.raises(HubUnreachable, match=f"answered HTTP {status}") as error:
        resolve(repo_id)
    assert error.value.transient


def test_endpoint_that_is_no_hub_is_unreachable(hub: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "no-scheme.example")
    with pytest.raises(HubUnreachable, match=r"no-scheme\.example"):
        resolve("acme/any")


def test_pickled_weights_only_are_refused_by_name(hub: LocalHub, repo_id: str, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    (tmp_path / "config.json").write_text("{}")
    push(repo_id, tmp_path)
    with pytest.raises(UnsafeWeights, match=r"pytorch_model\.bin"):
        resolve(repo_id)


# ---------------------------------------------------------------------------------------------- read


def test_read_range_brings_those_bytes_and_nothing_else_is_downloaded(model: str, tmp_path: Path) -> None:
    snapshot = resolve(model)
    shard = "model-00002-of-00002.safetensors"
    content = (tmp_path / "model" / shard).read_bytes()
    header = 8 + int.from_bytes(read_range(snapshot, shard, 0, 8), "little")
    assert read_range(snapshot, shard, 0, header) == content[:header]
    assert read_range(snapshot, shard, header, len(content)) == content[header:]
    assert read_range(snapshot, shard, 7, 7) == b""
    assert read_file(snapshot, "config.json") == b'{"model_type": "llama"}'
    assert not (tmp_path / "cache").exists()


def test_read_of_a_private_model_sends_the_token(hub: LocalHub, repo_id: str, tmp_path: Path) -> None:
    push(repo_id, write_model(tmp_path / "model"), private=True)
    assert read_file(resolve(repo_id), "config.json") == b'{"model_type": "llama"}'


def test_range_outside_the_file_is_a_malformed_checkpoint(tmp_path: Path) -> None:
    snapshot = resolve(str(write_model(tmp_path / "model")))
    size = (tmp_path / "model" / "config.json").stat().st_size
    for begin, end in ((0, size + 1), (-1, 4), (5, 4)):
        with pytest.raises(MalformedCheckpoint, match=f"the file has {size}"):
            read_range(snapshot, "config.json", begin, end)


def test_read_of_a_file_that_shrank_says_that_the_source_changed(tmp_path: Path) -> None:
    snapshot = resolve(str(write_model(tmp_path / "model")))
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(SourceChanged, match=r"config\.json"):
        read_file(snapshot, "config.json")


# ---------------------------------------------------------------------------------------------- download


def test_download_brings_what_is_needed_and_no_pickle_duplicate_or_code(model: str) -> None:
    snapshot = download(resolve(model))
    expected = {
        *("README.md", "LICENSE", "config.json", "tokenizer.json", "model.safetensors.index.json"),
        *("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
    }
    assert {file.name for file in snapshot.files} == expected
    assert {path.name for path in snapshot.path.iterdir()} == expected
    assert not snapshot.is_local and snapshot.commit == resolve(model).commit


def test_code_is_downloaded_only_when_it_is_trusted(model: str) -> None:
    snapshot = resolve(model)
    assert not any(file.name.endswith(".py") for file in needed_files(snapshot))
    assert (download(snapshot, trust_remote_code=True).path / "modeling_x.py").is_file()


def test_download_reports_bytes_up_to_the_whole(model: str) -> None:
    events: list[ProgressEvent] = []
    snapshot = download(resolve(model), progress=events.append)
    total = sum(file.size for file in snapshot.files)
    assert events[-1].done == events[-1].total == total
    assert [event.done for event in events] == sorted(event.done for event in events)
    assert {event.unit for event in events} == {"B"}


def test_interrupted_download_keeps_finished_files_and_resumes(model: str) -> None:
    snapshot = resolve(model)
    arriving = download_iter(snapshot)
    first = next(arriving)
    arriving.close()
    stamp = first.stat().st_mtime_ns
    finished = download(snapshot)
    assert (finished.path / first.name).stat().st_mtime_ns == stamp, "a finished file is not fetched again"
    assert all((finished.path / file.name).stat().st_size == file.size for file in finished.files)


def test_connection_lost_in_the_middle_of_a_download_does_no_harm(
    model: str, break_hub: Callable[..., None], tmp_path: Path
) -> None:
    snapshot = resolve(model)
    shard = "model-00001-of-00002.safetensors"
    break_hub(Disruption(path=f"/resolve/.*{shard}", method="GET", action="drop-before"))
    path = next(path for path in download_iter(snapshot) if path.name == shard)
    assert path.read_bytes() == (tmp_path / "model" / shard).read_bytes()


def test_files_on_their_way_arrive_although_one_cannot_be_had(model: str, break_hub: Callable[..., None]) -> None:
    snapshot = resolve(model)
    shard = "model-00002-of-00002.safetensors"
    break_hub(
        Disruption(path=f"/resolve/.*{shard}", method="GET", action="status", status=404, times=1000),
        Disruption(
            path="/resolve/.*00001-of-00002", method="GET", action="slow", delay_s=1.0
        ),  # still under way by then
    )
    found: list[str] = []
    with pytest.raises(Fp8PipeError, match=shard):
        for path in download_iter(snapshot):
            found.append(path.name)
    assert "model-00001-of-00002.safetensors" in found and shard not in found


def test_cached_file_of_the_wrong_size_is_fetched_again(model: str) -> None:
    snapshot = download(resolve(model))
    shard = snapshot.path / "model-00001-of-00002.safetensors"
    good = shard.read_bytes()
    shard.resolve().write_bytes(good[:100])
    assert download(resolve(model)).path.joinpath(shard.name).read_bytes() == good


def test_downloaded_files_arrive_one_by_one_as_paths(model: str) -> None:
    snapshot = resolve(model)
    paths = list(download_iter(snapshot))
    assert {path.name for path in paths} == {file.name for file in needed_files(snapshot)}
    assert all(path.is_file() for path in paths)


# ---------------------------------------------------------------------------------------------- folders


def test_folder_is_known_by_content_and_headers_not_by_its_readme(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    first = resolve(str(folder))
    assert first.is_local and first.model_id == "model" and first.path == folder
    (folder / "README.md").write_text("new words")
    assert resolve(str(folder)).commit == first.commit
    (folder / "tokenizer.json").write_text('{"added": 1}')
    assert resolve(str(folder)).commit != first.commit


def test_weights_rewritten_in_place_are_another_state(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    first = resolve(str(folder))
    shard = folder / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"!")
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    assert resolve(str(folder)).commit != first.commit


def test_missing_folder_and_empty_folder_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such folder"):
        resolve(str(tmp_path / "nowhere"))
    with pytest.raises(ModelNotFound, match="no such folder"):
        resolve("./nowhere")
    with pytest.raises(InputError, match="found no weights"):
        resolve(str(tmp_path))


def test_folder_without_config_is_bad_input(tmp_path: Path) -> None:
    (write_model(tmp_path) / "config.json").unlink()
    with pytest.raises(InputError, match=r"no config\.json"):
        resolve(str(tmp_path))


def test_pickles_of_the_training_are_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "training_args.bin").write_bytes(b"")
    with pytest.raises(InputError, match="found no weights") as error:
        resolve(str(tmp_path))
    assert not isinstance(error.value, UnsafeWeights)


def test_link_that_leads_back_to_itself_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    (folder / "notes.txt").symlink_to("notes.txt")
    with pytest.raises(InputError, match="leads back to itself"):
        resolve(str(folder))


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a":' * 500 + b"1" + b"}" * 500, b'{"a": 1, "a": 2}', b"[]"])
def test_config_that_readers_may_not_agree_on_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_model(tmp_path)
    (folder / "config.json").write_bytes(content)
    with pytest.raises(MalformedCheckpoint, match=r"config\.json: expected a JSON object .* found"):
        read_config(resolve(str(folder)))


def test_file_too_large_for_its_kind_is_not_read(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    with (folder / "LICENSE").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MalformedCheckpoint, match="LICENSE: 1099511627776 bytes"):
        read_file(resolve(str(folder)), "LICENSE")


def test_link_that_leaves_the_folder_is_refused_but_not_inside_the_hub_cache(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("secret")
    folder = write_model(tmp_path / "model")
    (folder / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="leads out of the model's folder"):
        resolve(str(folder))

    repo = tmp_path / "hub" / "models--acme--base"
    cached = write_model(repo / "snapshots" / "c0ffee")
    (repo / "blobs").mkdir()
    (cached / "config.json").rename(repo / "blobs" / "1234")
    (cached / "config.json").symlink_to("../../blobs/1234")
    assert resolve(str(cached)).root == str(cached)
    (cached / "notes.txt").symlink_to(tmp_path / "secret.txt")
    with pytest.raises(InputError, match="leads out"):
        resolve(str(cached))


# ---------------------------------------------------------------------------------------------- index


@pytest.mark.parametrize(
    "name", ["../other.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "a/../../b.safetensors"]
)
def test_index_may_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    folder = write_model(tmp_path / "model")
    (tmp_path / "other.safetensors").write_bytes(safetensors(w=b"x"))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(MalformedCheckpoint, match="a file name without folders"):
        weight_files(resolve(str(folder)))


def test_index_that_names_a_missing_shard_is_malformed(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(MalformedCheckpoint, match="model-00002-of-00002"):
        weight_files(resolve(str(folder)))


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"w": 1}}']
)
def test_index_that_is_no_index_is_malformed(tmp_path: Path, text: str) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(MalformedCheckpoint, match=r"model\.safetensors\.index\.json"):
        weight_files(resolve(str(folder)))


def test_files_that_the_index_does_not_name_are_no_weights(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model")
    (folder / "extra.safetensors").write_bytes(safetensors(w=b"x"))
    expected = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    assert weight_files(resolve(str(folder))) == expected


def test_without_an_index_there_must_be_one_file(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "model", shards=1)
    (folder / "model.safetensors.index.json").unlink()
    assert weight_files(resolve(str(folder))) == ("model-00001-of-00001.safetensors",)
    (folder / "other.safetensors").write_bytes(safetensors(w=b"x"))
    with pytest.raises(MalformedCheckpoint, match=r"other\.safetensors"):
        weight_files(resolve(str(folder)))
