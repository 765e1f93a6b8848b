"""Runs one contender of a benchmark in the interpreter of its environment; the last line on stdout is JSON.

    python -m benchmarks.contender ours   RECIPE SOURCE OUTPUT
    python -m benchmarks.contender peer   SCHEME SOURCE OUTPUT     llm-compressor's model_free_ptq
    python -m benchmarks.contender floor  SIZES  SOURCE OUTPUT     SIZES: bytes of each output file, comma-separated
    python -m benchmarks.contender copy   SIZES  SOURCE OUTPUT     the same in one thread

`inside`: seconds from the plan to the checkpoint, without imports. `peak_mb`: the process's largest resident set. A
contender's libraries are imported only when it runs."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationConfig

CHUNK = 4 << 20
"""Bytes per read of the floor, the same as a stripe of the engine."""


def main() -> None:
    what, how, source, output = sys.argv[1:]
    contenders: dict[str, Callable[[str, Path, Path], float]] = {
        "ours": ours,
        "peer": peer,
        "floor": floor,
        "copy": copy,
    }
    inside = contenders[what](how, Path(source), Path(output))
    print(json.dumps({"inside": inside, "peak_mb": peak_mb()}))


def peak_mb() -> float:
    """Largest resident set so far. ru_maxrss would not do: a forked process starts with its parent's."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024 / 1e6


def ours(recipe: str, source: Path, output: Path) -> float:
    """Seconds of fp8pipe from the plan to the fsynced checkpoint."""
    from fp8pipe import stages
    from fp8pipe.config import load_recipe
    from fp8pipe.quantize import preload, quantize
    from fp8pipe.validate import planned  # noqa: F401  the plan is held against vLLM

    preload()  # loading code counts for the whole process, not for `inside`
    snapshot, chosen = stages.pin(str(source)), load_recipe(recipe)
    began = time.perf_counter()
    quantize(snapshot, stages.plan(snapshot, chosen), output)
    return time.perf_counter() - began


def peer(scheme: str, source: Path, output: Path) -> float:
    """Seconds of llm-compressor on all cores, configured to keep what fp8pipe keeps. It does not fsync."""
    from llmcompressor import model_free_ptq  # pyright: ignore[reportMissingImports]  the peer's environment

    config = peer_config(scheme)
    began = time.perf_counter()
    model_free_ptq(source, output, config=config, max_workers=len(os.sched_getaffinity(0)))
    return time.perf_counter() - began


def peer_config(scheme: str) -> QuantizationConfig:
    """A preset of llm-compressor by name, or `per-tensor`: one scale per tensor, activations dynamic."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        preset_name_to_scheme,
    )

    if scheme == "per-tensor":
        args = QuantizationArgs.model_validate({"num_bits": 8, "type": "float", "strategy": "tensor"})
        dynamic = args.model_copy(update={"dynamic": True})
        chosen = QuantizationScheme(targets=["Linear"], weights=args, input_activations=dynamic)
    else:
        chosen = preset_name_to_scheme(scheme, ["Linear"])
    return QuantizationConfig(config_groups={"group_0": chosen}, ignore=["re:.*embed_tokens", "lm_head"])


def floor(sizes: str, source: Path, output: Path) -> float:
    """Seconds to read every source byte and write and fsync as many bytes as the checkpoint has, on all cores."""
    return _floor(sizes, source, output, len(os.sched_getaffinity(0)))


def copy(sizes: str, source: Path, output: Path) -> float:
    """The same on one thread."""
    return _floor(sizes, source, output, 1)


def _floor(sizes: str, source: Path, output: Path, threads: int) -> float:
    from concurrent.futures import ThreadPoolExecutor
    from functools import partial

    output.mkdir(parents=True)
    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool, ThreadPoolExecutor(1) as fsyncs:
        jobs = []
        for path, size in zip(sorted(source.glob("*.safetensors")), map(int, sizes.split(",")), strict=True):
            file = _FileFloor(path, output / path.name, size)
            jobs.append((file, [pool.submit(file.chunk, at) for at in range(0, file.source_bytes, CHUNK)]))
        for file, chunks in jobs:
            for chunk in chunks:
                chunk.result()
            fsyncs.submit(partial(os.fsync, file.target))
    return time.perf_counter() - began


class _FileFloor:
    """One source file and its output file: chunks are read, and written as far as the smaller output reaches."""

    def __init__(self, path: Path, target: Path, size: int) -> None:
        self.source_bytes = path.stat().st_size
        self._size = size
        self._source = os.open(path, os.O_RDONLY)
        self.target = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
        os.posix_fallocate(self.target, 0, size)

    def chunk(self, at: int) -> None:
        buffer = memoryview(_thread_buffer())
        count = os.preadv(self._source, [buffer], at)
        begin, end = (place * self._size // self.source_bytes for place in (at, at + count))
        os.pwrite(self.target, buffer[: end - begin], begin)
        os.posix_fadvise(self.target, begin, end - begin, os.POSIX_FADV_DONTNEED)  # start writing to disk


_local = threading.local()


def _thread_buffer() -> bytearray:
    if not hasattr(_local, "buffer"):
        _local.buffer = bytearray(CHUNK)
    return _local.buffer


if __name__ == "__main__":
    main()
