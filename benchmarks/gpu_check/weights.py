"""Weights: the device's bytes and scales are the CPU's, and how fast they are made."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_check.row import Row, peak_row, seconds
from fp8pipe.quantize import kernels, numerics
from fp8pipe.quantize.engine.views import STRIPE_BYTES
from fp8pipe.quantize.engine.workbench import Workbench

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPE = (1000, 777)
"""No multiple of any block."""
UNITS = {"tensor": SHAPE, "channel": (1, SHAPE[1]), "block 128x128": (128, 128)}
COLUMNS = 8192
THREADS = min(8, len(os.sched_getaffinity(0)))


def rows(device: torch.device, *, quick: bool) -> Iterator[Row]:
    """The same bytes, then GB/s of 16-bit weights."""
    yield from _same_bytes(device)
    yield from _speed(device, (32 if quick else 1024) << 20)
    yield from peak_row("weights", device)


# ---------------------------------------------------------------------------------------------- bytes


def hard_weight(dtype: torch.dtype) -> Tensor:
    """[1000, 777]: rows of very different size, rows of zeros, subnormals, ties between two codes, outliers."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(SHAPE, generator=generator) * torch.logspace(-7, 3, SHAPE[0])[:, None]
    weight[::97] = 0
    weight[5] = torch.finfo(dtype).smallest_normal / 4
    weight[7] = (torch.randint(0, 256, (SHAPE[1],), generator=generator) - 128) * 0.0625 + 0.03125
    weight[:, 13] *= 30
    limit = torch.finfo(dtype).max
    return weight.clamp(-limit, limit).to(dtype)


def _same_bytes(device: torch.device) -> Iterator[Row]:
    bench = _bench(device)
    for unit_name, unit in UNITS.items():
        differing = 0
        for dtype in DTYPES:
            array = numerics.array_of(hard_weight(dtype))
            for power_of_two in (False, True):
                amax = kernels.amax_blocks(array, unit)
                scale = kernels.scale_of(amax, power_of_two=power_of_two)
                codes = np.empty(array.shape, np.uint8)
                kernels.encode_blocks(array, scale, codes, unit)
                stripe = bench.take(array)
                theirs = bench.amax(stripe, unit)
                differing += int((theirs.view(np.uint32) != amax.view(np.uint32)).sum())
                differing += int((bench.encode(stripe, scale, unit) != codes).sum())
                differing += int((_plain_torch(hard_weight(dtype).to(device), scale, unit) != codes).sum())
        yield Row(
            f"bytes and scales, {unit_name}, bf16 fp16 fp32, exact and powers of two",
            f"{differing} differ from the CPU's",
            "0",
            differing == 0,
            differing,
        )
    differing = sum(_mse_differs(hard_weight(dtype), device) for dtype in DTYPES)
    yield Row("ranges of the mse observer", f"{differing} differ from the CPU's", "0", differing == 0, differing)


def _plain_torch(weight: Tensor, scale: np.ndarray, unit: tuple[int, int]) -> np.ndarray:
    """Codes by torch's own operations on the weight's device: those that a GPU runs, and a reference for a CPU."""
    spread = numerics.expand_scale(torch.from_numpy(scale).to(weight.device), unit, SHAPE)
    codes = torch.div(weight.float(), spread).clamp(-numerics.E4M3_MAX, numerics.E4M3_MAX).to(torch.float8_e4m3fn)
    return codes.view(torch.uint8).cpu().numpy()


def _mse_differs(weight: Tensor, device: torch.device) -> int:
    amax = numerics.channel_amax(weight)
    ours = numerics.best_amax(amax, numerics.shrink_errors(weight, amax))
    there, moved = amax.to(device), weight.to(device)
    theirs = numerics.best_amax(amax, numerics.shrink_errors(moved, there).cpu())
    return int((ours != theirs).sum())


# ---------------------------------------------------------------------------------------------- speed


def _speed(device: torch.device, size: int) -> Iterator[Row]:
    """GB/s of bf16 weights from host memory to codes in host memory, in the engine's stripes and threads."""
    generator = torch.Generator().manual_seed(1)
    weight = (torch.randn(size // 2 // COLUMNS, COLUMNS, generator=generator) * 0.02).bfloat16()
    array = numerics.array_of(weight)
    height = STRIPE_BYTES // 2 // COLUMNS
    stripes = [array[start : start + height] for start in range(0, len(array), height)]
    cpu, floor = Workbench(), _copy_floor(weight, device)
    for name, unit in {"channel": (1, COLUMNS), "block 128x128": (128, 128), "tensor": (height, COLUMNS)}.items():
        here = _rate(cpu, stripes, unit, size, torch.device("cpu"))
        there = _rate(_bench(device), stripes, unit, size, device)
        share = f", {there / floor:.2f} of the copy floor" if floor else ""
        found = f"{there:.1f} GB/s on {device.type}, {here:.1f} on the CPU ({THREADS} threads){share}"
        yield Row(f"quantizing, {name}", found, value=there)
    if floor:
        yield Row("copy floor: there in 16 bits, back in 8, pinned", f"{floor:.1f} GB/s", value=floor)


def _rate(bench: Workbench, stripes: list[np.ndarray], unit: tuple[int, int], size: int, device: torch.device) -> float:
    def work(stripe: np.ndarray) -> None:
        raw = bench.raw(stripe.nbytes)
        source = np.frombuffer(raw, stripe.dtype).reshape(stripe.shape)
        np.copyto(source, stripe)  # as reading a file that is in the page cache
        taken = bench.take(source)
        scale = kernels.scale_of(bench.amax(taken, unit))
        bench.encode(taken, scale, unit)

    with ThreadPoolExecutor(THREADS) as pool:
        return size / 1e9 / seconds(lambda: list(pool.map(work, stripes)), device)


def _copy_floor(weight: Tensor, device: torch.device) -> float:
    """GB/s of 16-bit weights that only go to the device and come back as 8-bit codes; 0 for a CPU."""
    if device.type != "cuda":
        return 0.0
    pinned = weight[: 256 * 2**20 // 2 // COLUMNS].pin_memory()
    there = torch.empty_like(pinned, device=device)
    codes = torch.empty(pinned.shape, dtype=torch.uint8, device=device)
    back = torch.empty(pinned.shape, dtype=torch.uint8).pin_memory()

    def copy() -> None:
        there.copy_(pinned, non_blocking=True)
        with torch.cuda.stream(other):
            back.copy_(codes, non_blocking=True)

    other = torch.cuda.Stream(device)
    return pinned.nbytes / 1e9 / seconds(copy, device)


def _bench(device: torch.device) -> Workbench:
    if device.type != "cuda":
        return Workbench()
    from fp8pipe.quantize.engine.gpu_bench import GpuBench

    return GpuBench(str(device))
