"""Writes a planned conversion to its folder, tile by tile, so that memory does not grow with the model.

Order: journal, shards, companions, index, config.json, records; the journal is then removed. Killed at any moment and
run again, it keeps finished shards and writes the rest. Until config.json exists, no loader takes the folder for a
model."""

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
from fp8pipe.quantize.engine.folder import FolderLock
from fp8pipe.quantize.engine.package import companion_names
from fp8pipe.records import RECORD_DIR

RECORD = "conversion.json"
JOURNAL = "convert.journal"
LOCK = "convert.lock"
"""Files in DIR/fp8pipe/; the last two exist only while a run is unfinished."""

TILE = 1 << 23
"""Bytes read and written at a time."""

LINEAGE = ("source.json", "source_config.json", "source_card.md", "terms.json", "published.json", "calibration.json")
"""Records of the source that hold for the result too: where its weights and ranges came from, and their licence."""


def write(conversion: ConversionPlan, folder: Path, progress: Progress) -> Conversion:
    """See `fp8pipe.convert.convert`."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: is not a folder; choose another --output")
    records = folder / RECORD_DIR
    if Conversion.load_if_present(records / RECORD) == conversion.record and _is_whole(conversion, folder):
        _finish(records)
        return conversion.record
    _require_own_folder(conversion, folder)
    with ExitStack() as stack:
        lock = FolderLock(records / LOCK)
        stack.callback(lock.release)
        _require_own_folder(conversion, folder)  # again, now that no other run can write here
        write_atomically(records / JOURNAL, conversion.record.fingerprint.encode())
        _sweep(conversion, folder)
        require_disk(folder, conversion.shards(), sum(conversion.sizes().values()))
        _write_shards(conversion, folder, progress)
        _write_companions(conversion, folder)
        write_atomically(folder / "config.json", conversion.config)
        _write_records(conversion, records)
        _finish(records)
    return conversion.record


def _finish(records: Path) -> None:
    for name in (JOURNAL, LOCK):
        (records / name).unlink(missing_ok=True)


def _is_whole(conversion: ConversionPlan, folder: Path) -> bool:
    files = [(folder / name, size) for name, size in conversion.sizes().items()]
    return (folder / "config.json").is_file() and all(p.is_file() and p.stat().st_size == size for p, size in files)


def _require_own_folder(conversion: ConversionPlan, folder: Path) -> None:
    """Raise InputError unless `folder` is new, empty, or holds this conversion's own unfinished work."""
    origin, target = conversion.snapshot.path.resolve(), folder.resolve()
    if target.is_relative_to(origin) or origin.is_relative_to(target):
        raise InputError(f"{folder}: output and source may not contain each other; choose another --output")
    records = folder / RECORD_DIR
    if (records / JOURNAL).exists():
        if (records / JOURNAL).read_text() == conversion.record.fingerprint:
            return
        raise InputError(f"{folder}: holds another, unfinished conversion; remove it, or choose another --output")
    found = [path for path in sorted(folder.rglob("*")) if not _is_lock(path, records)]
    if found:
        raise InputError(f"{folder}: is not empty (it holds {found[0].relative_to(folder)}); choose another --output")


def _is_lock(path: Path, records: Path) -> bool:
    """Whether a run that was killed before it wrote its journal leaves this."""
    return path == records or (path.parent == records and (path.name == LOCK or path.name.startswith(f".{JOURNAL}.")))


def _sweep(conversion: ConversionPlan, folder: Path) -> None:
    """Remove temporary files that a killed run left. Safe under the lock."""
    written = (*_companions(conversion), INDEX_NAME, "config.json")
    stale = [path for name in written for path in (folder / name).parent.glob(f".{Path(name).name}.*")]
    for path in (*stale, *(folder / RECORD_DIR).glob(".*")):
        path.unlink()


# ---------------------------------------------------------------------------------------------- weights


def _write_shards(conversion: ConversionPlan, folder: Path, progress: Progress) -> None:
    total, done = sum(placed.info.nbytes for placed in conversion.outputs), 0
    for name, outputs in conversion.shards().items():
        path = folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            for count in _write_shard(conversion, path, outputs):
                done += count
                progress(ProgressEvent("convert", done, total, "B", name))
        else:
            done += sum(placed.info.nbytes for placed in outputs)
    sync_folder(folder)


def _write_shard(conversion: ConversionPlan, path: Path, outputs: tuple[Placed, ...]) -> Iterator[int]:
    """Write one file; yields the bytes written since the last yield."""
    with ExitStack() as stack:
        files = SourceFiles(conversion.snapshot.path, stack)
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
    """The bytes of a bfloat16 or float16 tensor in float32, which represents every such number exactly."""
    import numpy as np

    data = bytearray(info.nbytes)
    files.read_into(info.shard, info.begin, memoryview(data), info.name)
    if info.dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype("<u4") << np.uint32(16)).tobytes()
    assert info.dtype == "F16"
    return np.frombuffer(data, "<f2").astype("<f4").tobytes()


# ---------------------------------------------------------------------------------------------- the rest


def _companions(conversion: ConversionPlan) -> tuple[str, ...]:
    """Files copied byte for byte. The model's own code too if the source is a folder: it is copied, not run."""
    return companion_names(conversion.snapshot, trust_remote_code=conversion.snapshot.is_local)


def _write_companions(conversion: ConversionPlan, folder: Path) -> None:
    for name in _companions(conversion):
        write_atomically(folder / name, source.read_file(conversion.snapshot, name))
    if len(conversion.shards()) > 1:
        write_atomically(folder / INDEX_NAME, index_bytes(placed.info for placed in conversion.outputs))


def _write_records(conversion: ConversionPlan, records: Path) -> None:
    """Write the records of the result, the conversion last. Evidence of the source is left behind."""
    if conversion.own_records is not None:
        for name in LINEAGE:
            path = conversion.snapshot.path / RECORD_DIR / name
            if path.exists():
                write_atomically(records / name, path.read_bytes())
        conversion.own_records.plan.save(records / "plan.json")
        conversion.own_records.checkpoint.save(records / "checkpoint.json")
    conversion.record.save(records / RECORD)
