"""The output folder: one writer at a time, and no weights or config.json in it but this run's own."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path

from fp8pipe.errors import InputError
from fp8pipe.files import digest_of
from fp8pipe.model.headers import INDEX_NAME
from fp8pipe.model.shards import partial_path, sync_folder
from fp8pipe.quantize.engine.journal import Journal, open_journal, void_unless
from fp8pipe.quantize.engine.package import companions
from fp8pipe.quantize.identity import JOURNAL_NAME
from fp8pipe.quantize.plan import Plan, check_disk
from fp8pipe.records import RECORD_DIR, RECORD_FILES, Snapshot

_OWN_RECORDS = tuple(RECORD_FILES[name] for name in ("checkpoint", "plan", "calibration", "source_config"))
"""Records that this room writes."""


class FolderLock:
    """A lock file in DIR/fp8pipe, held until `release`. Raises InputError if another process holds it."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._handle)
            raise InputError(
                f"{path.parent.parent}: another run is writing this checkpoint; wait until it ends"
            ) from None

    def release(self) -> None:
        """Let another process have the folder."""
        os.close(self._handle)


def begin(snapshot: Snapshot, plan: Plan, folder: Path, fingerprint: str, stack: ExitStack) -> Journal:
    """The journal to resume from, in a folder with no weights or config.json but this run's own.

    Call it under the folder's lock. Raises InputError, DiskTooSmall."""
    require_own_folder(snapshot, folder)
    _sweep(snapshot, plan, folder)
    path = folder / RECORD_DIR / JOURNAL_NAME
    # Another version of transformers may change the plan and not the fingerprint, hence both.
    identity = digest_of([fingerprint, plan.work_digest()])
    stale = void_unless(path, identity)
    if stale is not None:
        _remove_unfinished(folder, stale)
    shard_of = {output.name: output.shard for output in plan.outputs}
    files = (*plan.shards(), *companions(snapshot, plan), INDEX_NAME)
    journal = open_journal(path, identity, files=files, is_safe=lambda name: (folder / shard_of[name]).exists())
    stack.callback(journal.close)
    check_disk(plan, folder)
    return journal


def require_own_folder(snapshot: Snapshot, folder: Path) -> None:
    """Raise InputError if `folder` is the source itself, or holds a model that no unfinished run explains."""
    if folder.resolve() == snapshot.path.resolve():
        raise InputError(f"{folder}: output and source are the same folder; choose another output")
    if (folder / RECORD_DIR / JOURNAL_NAME).exists():
        return
    found = [path.name for path in sorted(folder.glob("*")) if _is_of_a_model(path)]
    if found:
        raise InputError(f"{folder}: holds {found[0]} of another model or recipe; choose another output, or remove it")


def _is_of_a_model(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name == "config.json"


def _remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Remove the unfinished work of another plan: records, config, shards, and `names`, the other files it wrote."""
    records = [folder / RECORD_DIR / name for name in _OWN_RECORDS]
    written = [folder / name for name in (*names, INDEX_NAME)]
    shards = [*folder.glob("*.safetensors"), *folder.glob(".*.partial")]
    for stale in (*records, folder / "config.json", *shards, *written, *map(partial_path, written)):
        stale.unlink(missing_ok=True)
    sync_folder(folder)  # gone before a journal names new ones


def _sweep(snapshot: Snapshot, plan: Plan, folder: Path) -> None:
    """Remove temporary files of `write_atomically` that a killed run left. Safe under the lock."""
    written = (*companions(snapshot, plan), INDEX_NAME, "config.json")
    records = folder / RECORD_DIR
    stale = [path for name in written for path in (folder / name).parent.glob(f".{Path(name).name}.*")]
    for name in (*_OWN_RECORDS, JOURNAL_NAME):
        stale += records.glob(f".{name}.*")
    for path in stale:
        path.unlink()
