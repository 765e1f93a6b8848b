"""One run of the engine over one folder, in this order: lock, journal, shards, companions, config.json, record."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from fp8pipe.errors import EnvironmentFault, Fp8PipeError, InputError, NoSuitableDevice
from fp8pipe.hub import source
from fp8pipe.machine.locks import devices, hold
from fp8pipe.model.shards import OutputShard, SourceFiles, sync_folder
from fp8pipe.progress import Progress
from fp8pipe.quantize.engine.context import Context
from fp8pipe.quantize.engine.finisher import Finisher
from fp8pipe.quantize.engine.folder import FolderLock, begin, require_own_folder
from fp8pipe.quantize.engine.journal import Journal
from fp8pipe.quantize.engine.meter import Meter
from fp8pipe.quantize.engine.package import write_companions, write_config
from fp8pipe.quantize.engine.pool import Pool, Task
from fp8pipe.quantize.engine.scales import calibrated_scales
from fp8pipe.quantize.engine.work import Work
from fp8pipe.quantize.engine.workbench import Workbench
from fp8pipe.quantize.identity import ENGINE_VERSION, LOCK_NAME, device_for, fingerprint
from fp8pipe.quantize.plan import Plan
from fp8pipe.records import RECORD_DIR, Checkpoint, Snapshot
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
        raise InputError(
            f"the plan was made for source {plan.source_commit}, the source is now {snapshot.commit}; plan again"
        )
    device = _present(device)
    source.require_unchanged(snapshot)  # the commits above are those of the time when it was pinned
    scales = calibrated_scales(plan, calibration)  # fails before anything is written
    identity = fingerprint(snapshot, plan.settings, calibration.digest() if calibration is not None else None)
    records = folder / RECORD_DIR
    require_own_folder(snapshot, folder)
    with ExitStack() as stack:
        lock = FolderLock(records / LOCK_NAME)
        stack.callback(lock.release)
        if device != "cpu":
            work = f"quantize {snapshot.model_id} into {folder}"
            exactly = device if ":" in device else f"{device}:0"  # torch's first, in this process
            stack.enter_context(hold([devices(exactly)], work, stage="quantize", progress=progress))
        journal = begin(snapshot, plan, folder, identity, stack)
        plan.save(records / "plan.json")
        if calibration is not None:
            calibration.save(records / "calibration.json")
        amax = calibration.weights if calibration is not None else {}
        _write_shards(snapshot, plan, folder, scales, amax, journal, threads, arriving, device, progress)
        write_companions(snapshot, plan, folder)
        write_config(snapshot, plan, folder)
        checkpoint = _record(snapshot, plan, identity, calibration, journal, time.monotonic() - started)
        checkpoint.save(records / "checkpoint.json")
        journal.path.unlink()
        (records / LOCK_NAME).unlink()
    return checkpoint


def _present(asked: str) -> str:
    """The device to quantize on. Raises NoSuitableDevice if this machine does not have it."""
    if (device := device_for(asked)) == "cpu":
        return device
    import torch

    if (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise NoSuitableDevice(f"device {asked}: torch finds {torch.cuda.device_count()} GPUs here; use --device cpu")
    return device


def _write_shards(
    snapshot: Snapshot,
    plan: Plan,
    folder: Path,
    scales: dict[str, bytes],
    amax: Mapping[str, float],
    journal: Journal,
    threads: int | None,
    arriving: Iterable[Path] | None,
    device: str,
    progress: Progress,
) -> None:
    """Write all safetensors files; they are complete and on disk when this returns."""
    with ExitStack() as stack:
        files = SourceFiles(snapshot.path, stack)
        shards = _open_shards(plan, folder, scales, stack)
        bench, prepare = _bench(plan, device, stack)
        pool = Pool(threads or len(os.sched_getaffinity(0)), prepare)
        stack.callback(pool.close)
        finisher = Finisher(plan, shards, journal, stack)
        meter = Meter(plan, journal.finished, progress)
        work = Work(plan, Context(files, shards, journal, pool, bench, meter, amax, finisher.count_down))
        finisher.start()
        wanted = {tensor.shard for tensor in plan.tensors}
        try:
            for name in _arrivals(snapshot, wanted, arriving):
                pool.check()
                files.open(name)
                work.release(files.names)
        except Fp8PipeError:
            pool.drain()  # finish what has arrived, for the next run
            raise
        pool.drain()
        if missing := wanted - files.names:
            raise EnvironmentFault(
                f"{', '.join(sorted(missing))} did not arrive; download the model again and run again"
            )
        finisher.wait()
    sync_folder(folder)


def _bench(plan: Plan, device: str, stack: ExitStack) -> tuple[Workbench, Task]:
    """The workbench of all threads, and what each thread does first: its share of torch, if torch is needed."""
    if device == "cpu" and plan.settings.weights.observer == "minmax" and not any(t.scale for t in plan.tensors):
        return Workbench(), lambda: None
    import torch

    from fp8pipe.quantize.engine.gpu_bench import GpuBench

    stack.callback(torch.set_num_threads, torch.get_num_threads())
    bench = Workbench() if device == "cpu" else GpuBench(device)
    return bench, partial(torch.set_num_threads, 1)


def _open_shards(plan: Plan, folder: Path, scales: dict[str, bytes], stack: ExitStack) -> dict[str, OutputShard]:
    """The shards that are not finished, preallocated, with the calibrated scales already written."""
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
    """Names of source shards, each as soon as it is available."""
    if arriving is None:
        yield from sorted(wanted)
        return
    for path in arriving:
        name = path.relative_to(snapshot.path).as_posix()
        if name in wanted:
            yield name


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
        faint_units=tuple(sorted(journal.faint_units)),
        seconds=round(seconds, 3),
    )
