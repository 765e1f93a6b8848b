"""Measures what the scales of FP8 blocks cost, before and after vLLM's own rounding for DeepGEMM; needs vLLM.

    python -m benchmarks.block_scales [--check]

Writes the table between the marks `block scales` of docs/formats.md; --check changes nothing, and its exit status is 1
if the page is out of date. The weights are seeded, the quantizer is the engine's, the rounding is vLLM's function.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.formats import PAGE
from benchmarks.page import table
from benchmarks.support import of_the_tests
from fp8pipe.quantize import numerics

BLOCK = (128, 128)
SIDE = 2048
"""Rows and columns of each weight."""
STANDARD_DEVIATION = 0.02


def weights() -> Iterator[tuple[str, Tensor]]:
    """Title and weight [out, in] in bf16: without outliers, and with many (Student's t, 4 degrees of freedom)."""
    generator = torch.Generator().manual_seed(0)
    normal, *squares = torch.randn(5, SIDE, SIDE, generator=generator)
    yield "normal", (STANDARD_DEVIATION * normal).bfloat16()
    heavy = normal / torch.stack(squares).square().mean(0).sqrt()
    yield "heavy tails", (STANDARD_DEVIATION * heavy).bfloat16()


def decibels(weight: Tensor, restored: Tensor) -> str:
    """Signal-to-noise ratio of `restored`, dB."""
    exact = weight.double()
    return f"{10 * torch.log10(exact.square().sum() / (restored.double() - exact).square().sum()):.1f}"


def row(title: str, weight: Tensor) -> list[str]:
    """A row of the table."""
    requantized = of_the_tests("vllm_requantizes").requantized
    cells = []
    for power_of_two in (False, True):
        scale = numerics.weight_scale(numerics.block_amax(weight, BLOCK), power_of_two=power_of_two)
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        numerics.encode(weight, scale, codes, block=BLOCK)
        cells += [decibels(weight, numerics.dequantize(codes, scale, block=BLOCK))]
        cells += [decibels(weight, requantized(codes, scale))]
    return [title, *cells]


def main() -> None:
    """Command line."""
    head = ["weights", "exact", "then DeepGEMM", "power of two", "then DeepGEMM"]
    text = table(head, [row(*weight) for weight in weights()])
    marks = r"(<!-- block scales -->\n).*?(<!-- /block scales -->)"
    page = PAGE.read_text()
    made = re.sub(marks, lambda match: f"{match[1]}{text}{match[2]}", page, flags=re.DOTALL)
    if sys.argv[1:] == ["--check"]:
        sys.exit(None if page == made else f"{PAGE.name} is out of date; run python -m benchmarks.block_scales")
    PAGE.write_text(made)


if __name__ == "__main__":
    main()
