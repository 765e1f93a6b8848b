"""Downloads the files of a pinned model into the Hub cache, all at once or one by one."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from typing import Any

from fp8pipe.errors import (
    DiskTooSmall,
    Fp8PipeError,
    HubUnreachable,
    SourceChanged,
)
from fp8pipe.hub.client import cache_folder, client, translated
from fp8pipe.hub.source import needed_files
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records import Snapshot, SourceFile

DOWNLOADS_AT_ONCE = 4


def download(snapshot: Snapshot, *, trust_remote_code: bool = False, progress: Progress = quiet) -> Snapshot:
    """The snapshot with everything needed on disk: `root` is set, and `files` lists only what was needed.

    Files that are already in the Hub cache are not fetched again, so an interrupted download resumes. Raises what
    `download_iter` raises.
    """
    for _ in download_iter(snapshot, trust_remote_code=trust_remote_code, progress=progress):
        pass
    return local_snapshot(snapshot, trust_remote_code=trust_remote_code)


def local_snapshot(snapshot: Snapshot, *, trust_remote_code: bool = False) -> Snapshot:
    """What `download` will return: the folder in the cache follows from id and commit, so it is known in advance."""
    root = Path(snapshot.root) if snapshot.root else _cache_root(snapshot)
    files = needed_files(snapshot, trust_remote_code=trust_remote_code)
    return snapshot.model_copy(update={"root": str(root), "files": files})


def _cache_root(snapshot: Snapshot) -> Path:
    return cache_folder() / f"models--{snapshot.model_id.replace('/', '--')}" / "snapshots" / snapshot.commit


def download_iter(snapshot: Snapshot, *, trust_remote_code: bool = False, progress: Progress = quiet) -> Iterator[Path]:
    """Yield the path of each needed file as soon as it is complete, while others are still being downloaded.

    Companions are requested first, then the weights; all are yielded in order of arrival. Leaving the loop early stops
    the downloads. If one file fails, those already under way are completed and yielded before its error is raised.
    Raises HubUnreachable, AccessDenied, DiskTooSmall; SourceChanged if a local file differs from what `resolve` saw.
    """
    files = needed_files(snapshot, trust_remote_code=trust_remote_code)
    if snapshot.root is not None:
        yield from (_require_size(snapshot.path / file.name, file) for file in files)
        return
    yield from _arriving(snapshot, files, progress)


def fetch(snapshot: Snapshot, files: Sequence[SourceFile], progress: Progress = quiet) -> Path:
    """The folder in the Hub cache that holds these files of a snapshot of the Hub, and perhaps others of it.

    Raises HubUnreachable, AccessDenied, DiskTooSmall."""
    for _ in _arriving(snapshot, files, progress):
        pass
    return _cache_root(snapshot)


def _arriving(snapshot: Snapshot, files: Sequence[SourceFile], progress: Progress) -> Iterator[Path]:
    _require_disk(snapshot, files)
    meter = _Meter(sum(file.size for file in files), progress)
    pool = ThreadPoolExecutor(DOWNLOADS_AT_ONCE, thread_name_prefix="download")
    failure: Fp8PipeError | None = None
    try:
        arriving = [pool.submit(_fetch, snapshot, file, meter) for file in files]
        for future in as_completed(arriving):
            try:
                path = future.result()
            except CancelledError:
                continue
            except Fp8PipeError as error:
                failure = failure or error
                for other in arriving:
                    other.cancel()  # has no effect on one that has begun
                continue
            yield path
        if failure is not None:
            raise failure
    finally:
        meter.stopped.set()
        pool.shutdown(cancel_futures=True)


def _require_disk(snapshot: Snapshot, files: Sequence[SourceFile]) -> None:
    root = _cache_root(snapshot)
    missing = sum(file.size for file in files if not (root / file.name).exists())
    existing = next(folder for folder in root.parents if folder.exists())
    free = shutil.disk_usage(existing).free
    if missing > free:
        raise DiskTooSmall(
            f"{snapshot.model_id}: {missing / 1e9:.1f} GB to download, only {free / 1e9:.1f} GB free at {existing}; "
            "free some space, or set HF_HUB_CACHE to a larger disk"
        )


def _fetch(snapshot: Snapshot, file: SourceFile, meter: _Meter) -> Path:
    """The path of one file, from the cache or the Hub. A cached file of the wrong size is fetched again."""
    get = partial(
        client().hf_hub_download,
        snapshot.model_id,
        file.name,
        revision=snapshot.commit,
        cache_dir=cache_folder(),
        tqdm_class=_bar_class(partial(meter.add, file)),
    )
    with translated(f"{file.name} of {snapshot.model_id}@{snapshot.commit}"):
        path = Path(get())
        if path.stat().st_size != file.size:
            path = Path(get(force_download=True))
    if path.stat().st_size != file.size:
        raise HubUnreachable(f"{file.name}: expected {file.size} bytes, {path.stat().st_size} arrived; try again")
    meter.complete(file)
    return path


def _require_size(path: Path, file: SourceFile) -> Path:
    size = path.stat().st_size if path.exists() else None
    if size != file.size:
        raise SourceChanged(f"{path}: expected {file.size} bytes, found {size}; resolve the model again")
    return path


class _Meter:
    """Bytes that have arrived, over all files and threads."""

    def __init__(self, total: int, progress: Progress) -> None:
        self.total = total
        self.progress = progress
        self.done: dict[str, int] = {}
        self.lock = threading.Lock()
        self.stopped = threading.Event()

    def add(self, file: SourceFile, count: int) -> None:
        """Count bytes of `file` that arrived; negative if a transfer starts over. CancelledError once stopped."""
        if self.stopped.is_set():
            raise CancelledError
        self._set(file, self.done.get(file.name, 0) + count)

    def complete(self, file: SourceFile) -> None:
        self._set(file, file.size)

    def _set(self, file: SourceFile, count: int) -> None:
        with self.lock:
            self.done[file.name] = count
            self.progress(ProgressEvent("source", sum(self.done.values()), self.total, "B", file.name))


def _bar_class(count: Callable[[int], None]) -> type[Any]:  # Any: the library's bar class exists only after its import
    """A progress bar for huggingface_hub that draws nothing, and calls `count` with the bytes that arrived."""
    from huggingface_hub.utils import tqdm

    class Bar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # Any: whatever the library passes to its bars
            super().__init__(*args, **(kwargs | {"disable": True}))

        def update(self, n: float | None = 1) -> None:
            count(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignored: bytes on the wire, which Xet counts apart from bytes in the file."""

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:  # Any: not looked at
            """Ignored: Xet's transfer speed."""

    return Bar
