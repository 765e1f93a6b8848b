"""One run of the engine over one folder: lock, journal, shards, weights, companions, config.json, record. In that
order."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fp8pipe.errors import EnvironmentFault, Fp8PipeError, InputError, NoSuitableDevice
from fp8pipe.files import digest_of
from fp8pipe.hub import source
from fp8pipe.model.headers import INDEX_NAME
from fp8pipe.model.shards import OutputShard, SourceFiles, partial_path, sync_folder
from fp8pipe.progress import Progress
from fp8pipe.quantize.engine.journal import FolderLock, Journal, open_journal, void_unless
from fp8pipe.quantize.engine.meter import WORK
from fp8pipe.quantize.engine.package import companions, write_companions, write_config
from fp8pipe.quantize.engine.pool import Pool
from fp8pipe.quantize.engine.scales import calibrated_scales
from fp8pipe.quantize.engine.weights import Engine
from fp8pipe.quantize.identity import ENGINE_VERSION, JOURNAL_NAME, LOCK_NAME, device_for, fingerprint
from fp8pipe.quantize.plan import OutputTensor, Plan, check_disk
from fp8pipe.records import RECORD_DIR, Checkpoint, Snapshot

if TYPE_CHECKING:
    from fp8pipe.records.calibration import Calibration


def run(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    *,
    calibration: Calibration | None,
    threads: int | None,
    arriving: Iterable[Path] | None,
    device: str,
    progress: Progress,
) -> Checkpoint:
    """See `fp8pipe.quantize.quantize`."""
    started = time.monotonic()
    if snapshot.commit != plan.source_commit:
        raise InputError(f"the plan is of {plan.source_commit}, the source is {snapshot.commit} now; plan again")
    device = _present(device)
    source.require_unchanged(snapshot)  # both names are of the time when it was pinned
    scales = calibrated_scales(plan, calibration)  # fails before anything is written
    identity = fingerprint(snapshot, plan.settings, calibration.digest() if calibration is not None else None)
    records = folder / RECORD_DIR
    _require_own_folder(snapshot, folder)
    with ExitStack() as stack:
        lock = FolderLock(records / LOCK_NAME)
        stack.callback(lock.release)
        journal = _begin(snapshot, plan, folder, identity, stack)
        plan.save(records / "plan.json")
        if calibration is not None:
            calibration.save(records / "calibration.json")
        _write_shards(snapshot, plan, folder, scales, journal, threads, arriving, device, progress)
        write_companions(snapshot, plan, folder)
        write_config(snapshot, plan, folder)
        checkpoint = _record(snapshot, plan, identity, calibration, journal, time.monotonic() - started)
        checkpoint.save(records / "checkpoint.json")
        journal.path.unlink()
        (records / LOCK_NAME).unlink()
    return checkpoint


def _present(asked: str) -> str:
    """The device to quantize on; NoSuitableDevice when it is not there."""
    device = torch.device(device_for(asked))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise NoSuitableDevice(f"device {asked}: torch finds {torch.cuda.device_count()} GPUs here; use --device cpu")
    return str(device)


def _begin(snapshot: Snapshot, plan: Plan, folder: Path, identity: str, stack: ExitStack) -> Journal:
    """The journal to write on, in a folder that holds nothing but this run's own work."""
    _require_own_folder(snapshot, folder)  # again, now that no other run can write here
    _sweep(snapshot, plan, folder)
    path = folder / RECORD_DIR / JOURNAL_NAME
    work = digest_of([identity, plan.work_digest()])  # the plan may change where the fingerprint does not: transformers
    stale = void_unless(path, work)
    if stale is not None:
        _remove_unfinished(folder, stale)
    shard_of = {output.name: output.shard for output in plan.outputs}
    files = (*plan.shards(), *companions(snapshot, plan), INDEX_NAME)
    journal = open_journal(path, work, files=files, is_safe=lambda name: (folder / shard_of[name]).exists())
    stack.callback(journal.close)
    check_disk(plan, folder)
    return journal


def _remove_unfinished(folder: Path, names: Iterable[str]) -> None:
    """Remove the work of another plan: its records, its config, its shards, and `names`, the files it was writing."""
    records = [folder / RECORD_DIR / name for name in ("checkpoint.json", "plan.json", "calibration.json")]
    written = [folder / name for name in (*names, INDEX_NAME)]
    shards = [*folder.glob("*.safetensors"), *folder.glob(".*.partial")]
    for stale in (*records, folder / "config.json", *shards, *written, *map(partial_path, written)):
        stale.unlink(missing_ok=True)
    sync_folder(folder)  # gone before a journal speaks of new ones


def _require_own_folder(snapshot: Snapshot, folder: Path) -> None:
    """InputError for the source itself, and for a folder with a model that no unfinished run explains."""
    if folder.resolve() == snapshot.path.resolve():
        raise InputError(f"{folder}: output and source are the same folder; choose another output")
    if (folder / RECORD_DIR / JOURNAL_NAME).exists():
        return
    found = [path.name for path in sorted(folder.glob("*")) if _is_of_a_model(path)]
    if found:
        raise InputError(f"{folder}: holds {found[0]} of another model or recipe; choose another output, or remove it")


def _sweep(snapshot: Snapshot, plan: Plan, folder: Path) -> None:
    """Remove the temporary files of `write_atomically` that a kill left behind: nobody else writes here now."""
    written = (*companions(snapshot, plan), INDEX_NAME, "config.json")
    records = folder / RECORD_DIR
    stale = [path for name in written for path in (folder / name).parent.glob(f".{Path(name).name}.*")]
    for name in ("plan.json", "calibration.json", "checkpoint.json", JOURNAL_NAME):
        stale += records.glob(f".{name}.*")
    for path in stale:
        path.unlink()


def _is_of_a_model(path: Path) -> bool:
    return path.suffix == ".safetensors" or path.name == "config.json"


def _write_shards(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    scales: dict[str, bytes],
    journal: Journal,
    threads: int | None,
    arriving: Iterable[Path] | None,
    device: str,
    progress: Progress,
) -> None:
    """All safetensors files, complete and on disk when this returns."""
    threads_before = torch.get_num_threads()
    with ExitStack() as stack:
        files = SourceFiles(snapshot.path, stack)
        shards = _open_shards(plan, folder, scales, stack)
        pool = Pool(threads or len(os.sched_getaffinity(0)), prepare=partial(torch.set_num_threads, 1))
        stack.callback(torch.set_num_threads, threads_before)
        stack.callback(pool.close)
        finisher = _Finisher(plan, shards, journal, stack)
        engine = Engine(plan, files, shards, journal, pool, finisher.count_down, progress, device)
        finisher.start()
        wanted = {tensor.shard for tensor in plan.tensors}
        try:
            for name in _arrivals(snapshot, wanted, arriving):
                pool.check()
                files.open(name)
                engine.release(files.names)
        except Fp8PipeError:
            pool.drain()  # what has arrived is worth finishing, even if something is missing
            raise
        pool.drain()
        if missing := wanted - files.names:
            raise EnvironmentFault(f"{', '.join(sorted(missing))} did not arrive; download again and run again")
        finisher.wait()
    sync_folder(folder)


def _open_shards(plan: Plan, folder: Path, scales: dict[str, bytes], stack: ExitStack) -> dict[str, OutputShard]:
    """Preallocated files of the shards that are not finished, calibrated scales inside."""
    shards = {}
    for name, outputs in plan.shards().items():
        if (folder / name).exists():
            continue
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shards[name] = OutputShard(folder / name, [output.info for output in outputs], stack)
        for output in outputs:
            if output.name in scales:
                shards[name].write_at(output.begin, memoryview(scales[output.name]), output.name)
    return shards


def _arrivals(snapshot: Snapshot, wanted: set[str], arriving: Iterable[Path] | None) -> Iterator[str]:
    """Names of source shards, each when it is there."""
    if arriving is None:
        yield from sorted(wanted)
        return
    for path in arriving:
        name = path.relative_to(snapshot.path).as_posix()
        if name in wanted:
            yield name


class _Finisher:
    """Renames each shard when its last tensor is written, after an fsync that other shards' work hides."""

    def __init__(self, plan: Plan, shards: Mapping[str, OutputShard], journal: Journal, stack: ExitStack) -> None:
        self._shards = shards
        self._journal = journal
        self._lock = threading.Lock()
        self._left = Counter(
            output.shard for output in plan.outputs if output.role in WORK and output.name not in journal.finished
        )
        self._executor = stack.enter_context(ThreadPoolExecutor(1, thread_name_prefix="fsync"))
        self._futures: list[Future[None]] = []

    def start(self) -> None:
        """Finish the shards that an earlier run wrote and did not rename."""
        for name in self._shards:
            if not self._left[name]:
                self._futures.append(self._executor.submit(self._finish, name))

    def count_down(self, output: OutputTensor) -> None:
        """One tensor more is written."""
        with self._lock:
            self._left[output.shard] -= 1
            if self._left[output.shard] == 0:
                self._futures.append(self._executor.submit(self._finish, output.shard))

    def _finish(self, name: str) -> None:
        self._journal.sync()
        self._shards[name].finish()

    def wait(self) -> None:
        """Until every shard has its name, or the first error."""
        for future in self._futures:
            future.result()


def _record(
    snapshot: Snapshot,
    plan: Plan,
    identity: str,
    calibration: Calibration | None,
    journal: Journal,
    seconds: float,
) -> Checkpoint:
    actions = Counter(tensor.action for tensor in plan.tensors)
    return Checkpoint(
        fingerprint=identity,
        model_id=snapshot.model_id,
        source_commit=snapshot.commit,
        recipe=plan.recipe,
        recipe_digest=plan.settings.digest(),
        engine_version=ENGINE_VERSION,
        calibration_digest=calibration.digest() if calibration is not None else None,
        source_bytes=plan.source_bytes,
        output_bytes=plan.output_bytes,
        quantized_tensors=actions["quantize"],
        kept_tensors=actions["keep"],
        zero_units=tuple(sorted(journal.zero_units)),
        seconds=round(seconds, 3),
    )
