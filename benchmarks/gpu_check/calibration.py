"""Calibration: the device finds the CPU's ranges, and costs little more than the plain forward pass."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.row import Row, peak_row, synchronize
from benchmarks.llama import SIZES, TINY, VOCABULARY, make_llama
from fp8pipe.calibrate.forward import run
from fp8pipe.calibrate.resume import Finished
from fp8pipe.calibrate.skeleton import Skeleton
from fp8pipe.calibrate.targets import Schemes, Targets
from fp8pipe.config import ActivationScheme, KVCacheScheme, WeightScheme
from fp8pipe.model.headers import read_folder_headers
from fp8pipe.model.shards import SourceFiles
from fp8pipe.records.calibration import Ranges

CLOSE = 2.0**-8
LEAST = 0.8
"""Tokens/s of calibrating, as a share of the plain forward's."""

_LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


class NoBookmark:
    """For a run that nobody resumes."""

    def find(self) -> Finished:
        return Finished((), Ranges(), {})

    def set(self, *_: object) -> None:
        """Nothing is kept."""


def rows(device: torch.device, *, quick: bool) -> Iterator[Row]:
    """Ranges in float32 and bf16, then tokens/s."""
    with tempfile.TemporaryDirectory(prefix="fp8pipe-gpu-check-") as scratch:
        small = make_llama(Path(scratch) / "small", 4, TINY)
        for dtype in ("float32", "bfloat16"):
            yield _ranges_row(small, dtype, device)
        large = small if quick else make_llama(Path(scratch) / "large", 16, SIZES)
        yield from _speed(large, tokens(*((8, 64) if quick else (64, 2048))), device)
    yield from peak_row("calibration", device)


def tokens(samples: int, length: int) -> list[list[int]]:
    """Random token ids, the same on every machine."""
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCABULARY, (samples, length), generator=generator).tolist()


def _ranges_row(model: Path, dtype: str, device: torch.device) -> Row:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"torch_dtype": dtype, "dtype": dtype}))
    ids = tokens(8, 128)
    ours, theirs = (calibrate(model, ids, torch.device(where)) for where in ("cpu", device))
    off = max(_distances(ours, theirs))
    limited = dtype == "float32"  # in bf16 one last bit of an amax is up to 2^-7 of it
    return Row(
        f"ranges of inputs, keys and values, {dtype}",
        f"at most {off:.2g} off the CPU's",
        f"{CLOSE:.2g}" if limited else "",
        off <= CLOSE if limited else None,
        off,
    )


def calibrate(model: Path, ids: Sequence[Sequence[int]], device: torch.device) -> Ranges:
    """Ranges of every Linear's input and of the KV cache of a Llama."""
    layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
    names = [f"model.layers.{layer}.{name}" for layer in range(layers) for name in (*_LINEARS, *_MLP)]
    attention = [f"model.layers.{layer}.self_attn" for layer in range(layers)]
    schemes = Schemes(
        weights=WeightScheme(strategy="tensor"),
        activations=ActivationScheme(mode="static", strategy="tensor"),
        kv=KVCacheScheme(),
    )
    targets = Targets(linears={name: name for name in names}, attention={name: name for name in attention})
    bookmark: Any = NoBookmark()
    with ExitStack() as stack:
        skeleton = Skeleton(model, read_folder_headers(model), SourceFiles(model, stack), str(device))
        return run(skeleton, targets, ids, schemes, bookmark)


def _distances(ours: Ranges, theirs: Ranges) -> Iterator[float]:
    """Relative, of every range."""
    for name, amax in ours.inputs.items():
        yield abs(theirs.inputs[name] - amax) / amax
    for name, known in ours.kv.items():
        pairs: Mapping[str, tuple[float, ...]] = {"k": known.k_amax, "v": known.v_amax}
        for part, values in pairs.items():
            found = theirs.kv[name].k_amax if part == "k" else theirs.kv[name].v_amax
            yield from (abs(b - a) / a for a, b in zip(values, found, strict=True))


def _speed(model: Path, ids: Sequence[Sequence[int]], device: torch.device) -> Iterator[Row]:
    """Tokens/s of calibrating, weights read layer by layer, and of a forward pass with all weights on the device."""
    count = sum(map(len, ids))
    calibrate(model, ids[:2], device)
    synchronize(device)
    start = time.perf_counter()
    calibrate(model, ids, device)
    synchronize(device)
    calibrating = count / (time.perf_counter() - start)
    plain = count / _plain_forward(model, ids, device)
    share = calibrating / plain
    limited = device.type == "cuda"
    yield Row("plain forward", f"{plain:,.0f} tokens/s", value=plain)
    yield Row(
        "calibrating",
        f"{calibrating:,.0f} tokens/s, {share:.2f} of the plain forward",
        f"{LEAST}" if limited else "",
        share >= LEAST if limited else None,
        calibrating,
    )


@torch.inference_mode()
def _plain_forward(model: Path, ids: Sequence[Sequence[int]], device: torch.device) -> float:
    """Seconds of the decoder over the same tokens, in passes as large as calibration's."""
    from transformers import AutoModelForCausalLM

    from fp8pipe.calibrate.memory import TOKENS

    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    decoder = loaded.get_decoder().to(device)
    size = max(1, TOKENS[device.type] // len(ids[0]))
    batches = [torch.tensor(ids[start : start + size]) for start in range(0, len(ids), size)]
    decoder(input_ids=batches[0].to(device))
    synchronize(device)
    start = time.perf_counter()
    for batch in batches:
        decoder(input_ids=batch.to(device))
    synchronize(device)
    return time.perf_counter() - start
