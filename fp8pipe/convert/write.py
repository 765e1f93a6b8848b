"""A planned conversion -> its folder: ranges copied tile by tile, so that memory does not grow with the model.

Order: mark of the unfinished work, shards, companions, index, config.json, records, mark removed. Killed at any moment
and run again, finished shards are kept and the rest is done; until config.json is there no loader takes the folder for
a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from fp8pipe.convert.plan import ConversionPlan, Placed
from fp8pipe.convert.record import Conversion
from fp8pipe.errors import InputError
from fp8pipe.files import write_atomically
from fp8pipe.hub import source
from fp8pipe.model.headers import INDEX_NAME, TensorInfo, index_bytes
from fp8pipe.model.shards import OutputShard, SourceFiles, require_disk, sync_folder
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.quantize.engine.journal import FolderLock
from fp8pipe.quantize.engine.package import companion_names
from fp8pipe.records import RECORD_DIR

RECORD = "conversion.json"
JOURNAL = "convert.journal"
LOCK = "convert.lock"
"""Files in DIR/fp8pipe/; the last two exist while a run is unfinished."""

TILE = 1 << 23
"""Bytes in memory at a time."""

ORIGINS = ("source.json", "calibration.json")
"""Records of our checkpoints that are as true of the result: where the weights and ranges came from."""


def write(plan: ConversionPlan, folder: Path, progress: Progress) -> Conversion:
    """See `fp8pipe.convert.convert`."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is no folder; choose another --output")
    records = folder / RECORD_DIR
    if Conversion.load_if_present(records / RECORD) == plan.conversion and _is_whole(plan, folder):
        _finish(records)
        return plan.conversion
    _require_own_folder(plan, folder)
    with ExitStack() as stack:
        lock = FolderLock(records / LOCK)
        stack.callback(lock.release)
        _require_own_folder(plan, folder)  # again, now that no other run can write here
        write_atomically(records / JOURNAL, plan.conversion.fingerprint.encode())
        _sweep(plan, folder)
        require_disk(folder, plan.shards(), sum(plan.sizes().values()))
        _write_shards(plan, folder, progress)
        _write_companions(plan, folder)
        write_atomically(folder / "config.json", plan.config)
        _write_records(plan, records)
        _finish(records)
    return plan.conversion


def _finish(records: Path) -> None:
    for name in (JOURNAL, LOCK):
        (records / name).unlink(missing_ok=True)


def _is_whole(plan: ConversionPlan, folder: Path) -> bool:
    files = [(folder / name, size) for name, size in plan.sizes().items()]
    return (folder / "config.json").is_file() and all(p.is_file() and p.stat().st_size == size for p, size in files)


def _require_own_folder(plan: ConversionPlan, folder: Path) -> None:
    """InputError unless `folder` is new, empty, or holds this conversion's own unfinished work."""
    origin, target = plan.snapshot.path.resolve(), folder.resolve()
    if target.is_relative_to(origin) or origin.is_relative_to(target):
        raise InputError(f"{folder}: output and source may not lie in one another; choose another --output")
    records = folder / RECORD_DIR
    if (records / JOURNAL).exists():
        if (records / JOURNAL).read_text() == plan.conversion.fingerprint:
            return
        raise InputError(f"{folder}: holds an unfinished conversion of something else; remove it, or choose another")
    found = [path for path in sorted(folder.rglob("*")) if not _is_lock(path, records)]
    if found:
        raise InputError(f"{folder}: is not empty (it holds {found[0].relative_to(folder)}); choose another --output")


def _is_lock(path: Path, records: Path) -> bool:
    """What a run leaves that was killed before it wrote its mark."""
    return path == records or (path.parent == records and (path.name == LOCK or path.name.startswith(f".{JOURNAL}.")))


def _sweep(plan: ConversionPlan, folder: Path) -> None:
    """Remove temporary files that a kill left behind: nobody else writes here now."""
    written = (*_companions(plan), INDEX_NAME, "config.json")
    stale = [path for name in written for path in (folder / name).parent.glob(f".{Path(name).name}.*")]
    for path in (*stale, *(folder / RECORD_DIR).glob(".*")):
        path.unlink()


# ---------------------------------------------------------------------------------------------- weights


def _write_shards(plan: ConversionPlan, folder: Path, progress: Progress) -> None:
    total, done = sum(placed.info.nbytes for placed in plan.outputs), 0
    for name, outputs in plan.shards().items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for count in _write_shard(plan, path, outputs):
                done += count
                progress(ProgressEvent("convert", done, total, "B", name))
        else:
            done += sum(placed.info.nbytes for placed in outputs)
    sync_folder(folder)


def _write_shard(plan: ConversionPlan, path: Path, outputs: tuple[Placed, ...]) -> Iterator[int]:
    """Write one file; yields the bytes written since the last time."""
    with ExitStack() as stack:
        files = SourceFiles(plan.snapshot.path, stack)
        origin = outputs[0].source.shard
        files.open(origin)
        shard = OutputShard(path, [placed.info for placed in outputs], stack)
        for placed in outputs:
            if placed.info.dtype == placed.source.dtype:
                yield from _copy(files, shard, placed)
            else:
                shard.write_at(placed.info.begin, memoryview(_as_float32(files, placed.source)))
                yield placed.info.nbytes
        files.check_unchanged(origin)
        shard.finish()


def _copy(files: SourceFiles, shard: OutputShard, placed: Placed) -> Iterator[int]:
    for offset in range(0, placed.info.nbytes, TILE):
        count = min(TILE, placed.info.nbytes - offset)
        buffer = memoryview(bytearray(count))
        files.read_into(placed.source.shard, placed.source.begin + offset, buffer, placed.source.name)
        begin = placed.info.begin + offset
        shard.write_at(begin, buffer)
        shard.start_flush(begin, begin + count)
        yield count


def _as_float32(files: SourceFiles, info: TensorInfo) -> bytes:
    """The same numbers in float32: every bfloat16 and float16 is one."""
    import numpy as np

    data = bytearray(info.nbytes)
    files.read_into(info.shard, info.begin, memoryview(data), info.name)
    if info.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).tobytes()
    assert info.dtype == "F16"
    return np.frombuffer(data, "<f2").astype("<f4").tobytes()


# ---------------------------------------------------------------------------------------------- the rest


def _companions(plan: ConversionPlan) -> tuple[str, ...]:
    """Files copied byte for byte; the model's own code too where the source is a folder: it is copied, not run."""
    return companion_names(plan.snapshot, trust_remote_code=plan.snapshot.is_local)


def _write_companions(plan: ConversionPlan, folder: Path) -> None:
    for name in _companions(plan):
        write_atomically(folder / name, source.read_file(plan.snapshot, name))
    if len(plan.shards()) > 1:
        write_atomically(folder / INDEX_NAME, index_bytes(placed.info for placed in plan.outputs))


def _write_records(plan: ConversionPlan, records: Path) -> None:
    """The lineage last. What proved the source (validation, measurements, verdict, approval) is not about this one."""
    if plan.origin is not None:
        for name in ORIGINS:
            path = plan.snapshot.path / RECORD_DIR / name
            if path.exists():
                write_atomically(records / name, path.read_bytes())
        plan.origin.plan.save(records / "plan.json")
        plan.origin.checkpoint.save(records / "checkpoint.json")
    plan.conversion.save(records / RECORD)
