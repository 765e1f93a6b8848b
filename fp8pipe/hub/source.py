"""Pins a model to one state: a Hub id or a folder goes in, a Snapshot comes out.

`resolve` asks only for names and sizes. `read_file` and `read_range` read from the folder, or from the Hub by HTTP
ranges, so a plan needs no download. Pickled weights are never read.
"""

from __future__ import annotations

import hashlib
from fnmatch import fnmatch
from io import BufferedReader
from pathlib import Path
from typing import Any

from fp8pipe.errors import (
    HubUnreachable,
    InputError,
    MalformedCheckpoint,
    ModelNotFound,
    SourceChanged,
    UnsafeWeights,
)
from fp8pipe.hub.client import cache_folder, client, translated
from fp8pipe.model.headers import INDEX_NAME, read_index
from fp8pipe.model.identity import folder_state
from fp8pipe.model.untrusted import MAX_FILE_BYTES, parse_config, too_long
from fp8pipe.records import Snapshot, SourceFile

COMPANIONS = (
    *("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.spm"),
    *("readme.md", "license*", "licence*", "notice*", "use_policy*"),
    "additional_chat_templates/*.jinja",
    ".eval_results/*.yaml",
)
"""Names, in lower case, of what a checkpoint or its card needs besides its weights."""
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
TRAINING_STATE = ("training_args.bin", "optimizer.*", "scheduler.*", "rng_state*", "scaler.*")
"""Pickles that hold no weights."""
DUPLICATES = ("consolidated*", "adapter_model*")
"""Safetensors at the top of a repository that are not the model in transformers' layout."""

# ---------------------------------------------------------------------------------------------- resolve


def resolve(model: str) -> Snapshot:
    """The present state of `model`: a Hub id, `id@revision`, or a folder. Downloads nothing.

    An existing folder wins over a Hub id of the same spelling. A name that starts with `/`, `.` or `~` is always a
    folder. With HF_HUB_OFFLINE, a Hub id is looked up in the cache. Raises ModelNotFound, RevisionNotFound,
    AccessDenied, HubUnreachable; UnsafeWeights if all weights are pickles; InputError if there are no weights or no
    config.json.
    """
    folder = Path(model).expanduser()
    if folder.is_dir():
        snapshot = _resolve_folder(folder.resolve())
    elif model.startswith(("/", ".", "~")):
        raise ModelNotFound(f"{model}: no such folder; give the folder that holds config.json, or a Hub id")
    else:
        snapshot = _resolve_on_hub(*_split(model))
    _require_model(snapshot)
    return snapshot


def model_id_of(model: str) -> str:
    """The name that the snapshot of `model` would have, without asking for it."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() or model.startswith(("/", ".", "~")) else _split(model)[0]


def _split(model: str) -> tuple[str, str | None]:
    model_id, at, revision = model.partition("@")
    if at and not revision:
        raise InputError(f"{model}: expected a revision after @; name a branch, tag or commit, or leave the @ out")
    return model_id, revision or None


def _resolve_on_hub(model_id: str, revision: str | None) -> Snapshot:
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    api = client()
    with translated(f"model {model_id}" + (f"@{revision}" if revision else "")):
        try:
            info = api.model_info(model_id, revision=revision)
        except OfflineModeIsEnabled:
            return _resolve_in_cache(model_id, revision)
        assert info.sha is not None
        if info.gated:  # the list of files is public, so without this check only the download would fail
            api.auth_check(model_id)
        tree = api.list_repo_tree(model_id, revision=info.sha, recursive=True)
        files = [
            SourceFile(name=entry.path, size=entry.size, oid=entry.lfs.sha256 if entry.lfs else entry.blob_id)
            for entry in tree
            if isinstance(entry, RepoFile)
        ]
    return Snapshot(model_id=model_id, commit=info.sha, files=tuple(files))


def _resolve_in_cache(model_id: str, revision: str | None) -> Snapshot:
    """The model as the Hub cache has it. Raises HubUnreachable unless the cache has exactly one commit that fits."""
    cached = cache_folder() / f"models--{model_id.replace('/', '--')}"
    commits = sorted(path.name for path in (cached / "snapshots").glob("*") if path.is_dir())
    named = cached / "refs" / (revision or "main")
    wanted = named.read_text().strip() if named.is_file() else revision
    found = [commit for commit in commits if wanted is None or commit == wanted]
    if len(found) != 1:
        there = (
            f"has the commits {', '.join(commits)}; name one as {model_id}@COMMIT" if commits else "does not have it"
        )
        raise HubUnreachable(
            f"model {model_id}{f'@{revision}' if revision else ''}: HF_HUB_OFFLINE is set, and the cache {there}, or "
            "unset it"
        )
    snapshot = _resolve_folder(cached / "snapshots" / found[0])
    files = tuple(
        file.model_copy(update={"oid": (snapshot.path / file.name).resolve().name}) for file in snapshot.files
    )  # the cache names each content by the Hub's own hash of it
    return snapshot.model_copy(update={"model_id": model_id, "commit": found[0], "files": files})


def tags_of(model_id: str) -> dict[str, str]:
    """Tag -> commit, of a model on the Hub. Raises ModelNotFound, AccessDenied, HubUnreachable."""
    with translated(f"tags of model {model_id}"):
        return {ref.name: ref.target_commit for ref in client().list_repo_refs(model_id).tags}


def _resolve_folder(folder: Path) -> Snapshot:
    paths = [path for path in sorted(folder.rglob("*")) if not _is_hidden(path.relative_to(folder))]
    for path in paths:
        if path.is_symlink():
            _require_inside(path, folder)
    files = tuple(
        SourceFile(name=path.relative_to(folder).as_posix(), size=path.stat().st_size)
        for path in paths
        if path.is_file()
    )
    return Snapshot(model_id=folder.name, commit=_local_commit(folder), files=files, root=str(folder))


def _local_commit(folder: Path) -> str:
    return f"local-{folder_state(folder)[:40]}"


def with_hashes(snapshot: Snapshot) -> Snapshot:
    """A local snapshot with the sha256 of each file that is copied into a checkpoint, so that the validator recognises
    an edited copy without the folder. A snapshot of the Hub has hashes already. Raises SourceChanged if a file is gone.
    """
    if not snapshot.is_local:
        return snapshot
    small = {file.name for file in companion_files(snapshot, trust_remote_code=True)}
    files = (
        file.model_copy(update={"oid": _sha256(snapshot.path / file.name)}) if file.name in small else file
        for file in snapshot.files
    )
    return snapshot.model_copy(update={"files": tuple(files)})


def _sha256(path: Path) -> str:
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_unchanged(snapshot: Snapshot) -> None:
    """Raise SourceChanged if a local folder is no longer what `resolve` saw. A commit of the Hub cannot change.

    Compares the content of small files, and the header, size and time of weight files; no weight is read.
    """
    if snapshot.is_local and _local_commit(snapshot.path) != snapshot.commit:
        raise SourceChanged(
            f"{snapshot.path}: expected the state {snapshot.commit}, but the folder has changed since. Once nothing "
            "writes to it, run again from the start: plan and calibration must see the weights that are quantized"
        )


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _require_inside(link: Path, folder: Path) -> None:
    """Raise InputError if a link is broken or leads out of its folder.

    In the Hub cache every file is a link, which may lead anywhere in the cache: `models--x/snapshots/SHA/f` ->
    `models--x/blobs/...`, and from there perhaps to the cache's shared `blobs/`.
    """
    in_hub_cache = folder.parent.name == "snapshots" and folder.parents[1].name.startswith("models--")
    fence = folder.parents[2] if in_hub_cache else folder
    try:
        target = link.resolve()
    except RuntimeError:  # a loop
        raise InputError(f"{link}: a link that leads back to itself; replace it by a copy of the file") from None
    if not target.exists():
        raise InputError(f"{link}: broken link, {target} does not exist; download the model again")
    if not target.is_relative_to(fence):
        raise InputError(f"{link}: leads out of the model's folder, to {target}; replace it by a copy of the file")


def _require_model(snapshot: Snapshot) -> None:
    """Raise unless there is a config, and weights that can be read without running code."""
    names = [file.name for file in snapshot.files]
    where = f"{snapshot.model_id}@{snapshot.commit}"
    if not any(name.endswith(".safetensors") for name in names):
        pickles = [name for name in names if _matches(name, PICKLES) and not _matches(name, TRAINING_STATE)]
        if pickles:
            raise UnsafeWeights(
                f"{where}: all weights are pickles ({', '.join(pickles[:3])}); loading a pickle runs the code in it;"
                " use a revision with safetensors, or convert the weights"
            )
        raise InputError(f"{where}: expected *.safetensors, found no weights among {len(names)} files")
    if "config.json" not in names:
        raise InputError(f"{where}: no config.json; name a whole model for transformers, not an adapter or a part")


# ---------------------------------------------------------------------------------------------- what belongs to a model


def weight_files(snapshot: Snapshot) -> tuple[str, ...]:
    """The safetensors files that make up the model: those that the index names, or the only one. Sorted.

    Raises MalformedCheckpoint if the index cannot be read, or names a file that is missing or outside the folder, or if
    there is no index and not exactly one file.
    """
    names = {file.name for file in snapshot.files}
    if INDEX_NAME in names:
        return _indexed_files(snapshot, names)
    single = sorted(n for n in names if "/" not in n and n.endswith(".safetensors") and not _matches(n, DUPLICATES))
    if "model.safetensors" in single:
        return ("model.safetensors",)
    if len(single) != 1:
        found = ", ".join(single[:4]) or "none at the top of the repository"
        raise MalformedCheckpoint(f"{snapshot.model_id}: expected {INDEX_NAME} or one safetensors file, found {found}")
    return (single[0],)


def _indexed_files(snapshot: Snapshot, names: set[str]) -> tuple[str, ...]:
    index = read_index(read_file(snapshot, INDEX_NAME))
    for fault in index.faults:
        raise fault.error()
    shards = sorted(set((index.weight_map or {}).values()))
    for shard in shards:
        if shard not in names or not shard.endswith(".safetensors"):
            found = (
                "which is missing; the upload is incomplete" if shard not in names else "which is no safetensors file"
            )
            raise MalformedCheckpoint(f"{snapshot.model_id}: {INDEX_NAME} names {shard}, {found}")
    return tuple(shards)


def needed_files(snapshot: Snapshot, *, trust_remote_code: bool = False) -> tuple[SourceFile, ...]:
    """The files that a quantized copy is made from: companions first, then the weights."""
    weights = set(weight_files(snapshot))
    return (
        *companion_files(snapshot, trust_remote_code=trust_remote_code),
        *sorted((file for file in snapshot.files if file.name in weights), key=lambda file: file.name),
    )


def companion_files(snapshot: Snapshot, *, trust_remote_code: bool = False) -> tuple[SourceFile, ...]:
    """The files besides the weights, with the index; `*.py` only if `trust_remote_code`. Reads nothing."""
    patterns = (*COMPANIONS, "*.py") if trust_remote_code else COMPANIONS
    return tuple(
        file for file in snapshot.files if _matches(file.name, patterns) and not file.name.endswith(".bin.index.json")
    )


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern fits. A pattern without a slash fits only at the top of the repository."""
    return any(fnmatch(name.lower(), pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


# ---------------------------------------------------------------------------------------------- read


def read_file(snapshot: Snapshot, name: str) -> bytes:
    """A whole small file, such as config.json. Raises MalformedCheckpoint if it is too large to be one."""
    size = _entry(snapshot, name).size
    if size > MAX_FILE_BYTES:
        raise MalformedCheckpoint(f"{snapshot.model_id}: {name}: {too_long(size)}; remove it from the model")
    return read_range(snapshot, name, 0, size)


def read_config(snapshot: Snapshot) -> dict[str, Any]:
    """The object in config.json. Raises MalformedCheckpoint if there is none that every reader reads alike."""
    value, problem = parse_config(read_file(snapshot, "config.json"))
    if problem or value is None:
        raise MalformedCheckpoint(
            f"{snapshot.model_id}: config.json: expected a JSON object that describes a model, found "
            f"{problem or 'null'}; download it again or mend it"
        )
    return value


def read_range(snapshot: Snapshot, name: str, begin: int, end: int) -> bytes:
    """Bytes [begin, end) of a file: from disk, or by one HTTP range request.

    Raises MalformedCheckpoint if the file is shorter, SourceChanged if it shrank since `resolve`.
    """
    size = _entry(snapshot, name).size
    if not 0 <= begin <= end <= size:
        raise MalformedCheckpoint(f"{name}: bytes {begin} to {end} were requested, but the file has {size}")
    if begin == end:
        return b""
    if snapshot.root is not None:
        data = _read_local(snapshot.path / name, begin, end)
    else:
        data = _read_remote(snapshot, name, begin, end)
    if len(data) != end - begin:
        raise SourceChanged(
            f"{name}: expected {end - begin} bytes at {begin}, found {len(data)}; resolve the model again"
        )
    return data


def _entry(snapshot: Snapshot, name: str) -> SourceFile:
    for file in snapshot.files:
        if file.name == name:
            return file
    raise InputError(f"{snapshot.model_id}@{snapshot.commit}: no file {name}")


def _read_local(path: Path, begin: int, end: int) -> bytes:
    with _opened(path) as file:
        file.seek(begin)
        return file.read(end - begin)


def _opened(path: Path) -> BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise SourceChanged(f"{path}: removed since the model was resolved; resolve the model again") from None


def _read_remote(snapshot: Snapshot, name: str, begin: int, end: int) -> bytes:
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    api = client()
    url = hf_hub_url(snapshot.model_id, name, revision=snapshot.commit, endpoint=api.endpoint)
    headers = build_hf_headers(token=api.token) | {"Range": f"bytes={begin}-{end - 1}", "Accept-Encoding": "identity"}
    with (
        translated(f"{name} of {snapshot.model_id}@{snapshot.commit}"),
        get_session().stream("GET", url, headers=headers) as response,
    ):
        hf_raise_for_status(response)
        data = bytearray()
        # 200: the server does not honour ranges, and sends the file from its start
        skip = 0 if response.status_code == 206 else begin
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= skip + end - begin:
                break
    return bytes(data[skip : skip + end - begin])
