"""Estimates what quantizing and calibrating take on one H100. Nothing of it was measured on one.

    python -m benchmarks.estimate [--page docs/gpu.md]

Bytes follow from the models' shapes; what the GPU holds is decided by calibration's own rule. Times are bytes and
operations over the rates below: change them to those of your machine and run it again."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.page import table
from fp8pipe.calibrate.memory import TOKENS, Placement, placement_in

MARKS = "<!-- estimate -->", "<!-- /estimate -->"
GB = 1e9

# Measured on two cores without a GPU: docs/benchmarks.md.
QUANTIZE_PER_CORE = 0.48e9
"""Source bytes a second, per tensor."""
OF_PLAIN_FORWARD = 0.82
"""Tokens per second, calibrating over a plain forward."""

# Assumed. Sources: NVIDIA's H100 data sheet (SXM); Samsung's PM9A3 data sheet; Amazon's p5.48xlarge, an eighth of it.
FLOPS = 989e12 * 0.4
"""BF16 without sparsity, and the share of it that large matrix products of a plain forward reach."""
GPU_BYTES, HELD = 85.5e9, 2.5e9
"""Memory of the GPU, and what CUDA's context and libraries take."""
PCIE = 64e9 * 0.6
"""PCIe 5.0 x16 in one direction, and the share of it that pinned copies reach."""
DISK_READ, DISK_WRITE = 6.5e9 / 2, 3.5e9 / 2
"""Half of an NVMe disk's sequential rates."""
CORES = 12
STAGE = 5e9
"""Bytes a second that the loader's threads copy from the page cache into pinned memory."""
EXPERT_CALL = 0.5e-3
"""Seconds for Python and CUDA to start one expert's products: experts run one by one, so that each is observed."""
SAMPLE_TOKENS = 512 * 2048
"""The default samples."""


@dataclass(frozen=True, slots=True)
class Model:
    """A published model, from its config.json."""

    name: str
    layers: int
    hidden: int
    inner: int
    """Width of the largest activation of a token."""
    linears: float
    """Parameters of its quantized Linears."""
    active: float
    """Those that one token meets."""
    rest: float
    """Parameters that stay in BF16: embeddings, head, norms, routers."""
    source_bytes: float
    """Bytes of a Linear's parameter in the source: 2 in BF16, 1 in FP8."""
    experts: int = 0
    """In all layers."""

    @property
    def source(self) -> float:
        return self.linears * self.source_bytes + self.rest * 2

    @property
    def checkpoint(self) -> float:
        return self.linears + self.rest * 2

    @property
    def layer(self) -> float:
        """Bytes of one layer in BF16."""
        return self.linears / self.layers * 2

    @property
    def states(self) -> float:
        """Bytes of the hidden states of all samples, and of their embeddings."""
        return 2 * SAMPLE_TOKENS * self.hidden * 2

    @property
    def place(self) -> Placement:
        return placement_in(int(GPU_BYTES - HELD), layer=int(self.layer), hidden=int(self.states))

    @property
    def workspace(self) -> float:
        """Bytes of the activations of one pass: hidden states five times, the wide ones four times."""
        return TOKENS["cuda"] * (5 * self.hidden + 4 * self.inner) * 2

    @property
    def gpu(self) -> float:
        """Peak of the GPU's memory while calibrating."""
        states = self.states * (2 * TOKENS["cuda"] / SAMPLE_TOKENS if self.place.hidden_on_host else 1)
        if self.place.load_ahead:
            return HELD + states + 3 * self.layer + self.workspace  # what is being loaded may exist twice
        return HELD + states + max(2 * self.layer, self.layer + self.workspace)

    @property
    def compute(self) -> float:
        products = 2 * self.active * SAMPLE_TOKENS / FLOPS / OF_PLAIN_FORWARD
        return products + self.experts * SAMPLE_TOKENS / TOKENS["cuda"] * EXPERT_CALL

    @property
    def load(self) -> float:
        """Seconds to bring all layers to the GPU, from the disk or, once the kernel has read ahead, from memory."""
        size = self.linears * self.source_bytes
        if self.place.load_ahead:
            return size / DISK_READ
        return max(0, size / DISK_READ - self.compute) + size / STAGE

    @property
    def moves(self) -> float:
        """Seconds to carry hidden states to the host and back, in both directions at once."""
        return self.layers * self.states / PCIE if self.place.hidden_on_host else 0

    @property
    def calibrate(self) -> float:
        """The first layer is waited for; then what takes longer counts, and all that nothing hides."""
        beside = max(self.compute, self.moves)
        if self.place.load_ahead:
            return self.load / self.layers + max(beside, self.load)
        return beside + self.load

    @property
    def quantize(self) -> float:
        return max(self.source / (QUANTIZE_PER_CORE * CORES), self.source / DISK_READ, self.checkpoint / DISK_WRITE)


MODELS = (
    Model("8B", 32, 4096, 14336, linears=6.98e9, active=6.98e9, rest=1.05e9, source_bytes=2),
    Model("70B", 80, 8192, 28672, linears=68.45e9, active=68.45e9, rest=2.10e9, source_bytes=2),
    Model("671B", 61, 7168, 18432, linears=669.2e9, active=35.6e9, rest=1.97e9, source_bytes=1, experts=58 * 256),
)
"""Llama 3.1 of 8B and 70B in BF16, and DeepSeek-V3 in FP8 as published, without its layer for a second token."""

ROWS: tuple[tuple[str, Callable[[Model], str]], ...] = (
    ("source, GB", lambda one: f"{one.source / GB:,.0f}"),
    ("checkpoint, GB", lambda one: f"{one.checkpoint / GB:,.0f}"),
    ("quantize: memory of the host, GB", lambda one: "0.5"),
    ("quantize: disk read, GB", lambda one: f"{one.source / GB:,.0f}"),
    ("quantize: disk written, GB", lambda one: f"{one.checkpoint / GB:,.0f}"),
    ("quantize: time", lambda one: _time(one.quantize)),
    ("calibrate: one layer in BF16, GB", lambda one: f"{one.layer / GB:.1f}"),
    ("calibrate: the next one is loaded ahead", lambda one: "yes" if one.place.load_ahead else "no"),
    ("calibrate: hidden states, embeddings, GB", lambda one: f"{one.states / GB:.0f}"),
    ("calibrate: where these wait", lambda one: "host" if one.place.hidden_on_host else "GPU"),
    ("calibrate: peak of GPU memory, GB", lambda one: f"{one.gpu / GB:.0f}"),
    ("calibrate: disk read, GB", lambda one: f"{one.source / GB:,.0f}"),
    ("calibrate: compute", lambda one: _time(one.compute)),
    ("calibrate: load the layers", lambda one: _time(one.load)),
    ("calibrate: move hidden states", lambda one: _time(one.moves) if one.moves else "none"),
    ("calibrate: time", lambda one: _time(one.calibrate)),
)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def estimate() -> str:
    """The table, in Markdown."""
    return table(["", *(one.name for one in MODELS)], [[title, *map(value, MODELS)] for title, value in ROWS])


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=None, help="page whose table is replaced")
    page = parser.parse_args(arguments).page
    print(estimate())
    if page is not None:
        before, _, rest = page.read_text().partition(MARKS[0])
        after = rest.partition(MARKS[1])[2]
        page.write_text(f"{before}{MARKS[0]}\n\n{estimate()}\n{MARKS[1]}{after}")


if __name__ == "__main__":
    main()
