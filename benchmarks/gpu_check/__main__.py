"""Is the GPU path right, and how fast is it? One run of at most eight minutes on a bare machine.

    python -m benchmarks.gpu_check [--device cuda] [--quick] [--output FILE.json] [--page docs/benchmarks.md]

Needs Python, torch, transformers and numba; no vLLM, no pydantic, no network. The bytes and scales of every scheme must
be the CPU's; calibration must find the CPU's ranges at 0.8 of the plain forward's speed; torch's own FP8 products of
our codes must be those of BF16. Prints a table, writes it as JSON, and ends with status 1 if a check fails. --quick
takes tiny sizes, to try the command; `--device cpu` runs the same checks without a GPU, against torch's operations."""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu_check.bare import provide_pydantic

if TYPE_CHECKING:
    import torch

    from benchmarks.gpu_check.row import Row

HAS_PYDANTIC = provide_pydantic()  # before anything of fp8pipe is imported


def main() -> None:
    """Command line."""
    import torch
    import transformers

    from benchmarks.page import machine, put, table

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="cuda, cuda:<n> or cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to try the command")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.json"), help="where the JSON goes")
    parser.add_argument("--page", type=Path, default=None, help="page to put the table on, as docs/benchmarks.md")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu_check: torch finds no GPU; see `fp8pipe doctor`, or try --device cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {platform.machine()}"
    start, rows = time.monotonic(), []
    for row in _all_rows(device, quick=options.quick or device.type == "cpu"):
        rows.append(row)
        print(f"{time.monotonic() - start:6.1f} s  {_verdict(row):6}  {row.name}: {row.found}", flush=True)
    spent = time.monotonic() - start
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    versions |= {"transformers": transformers.__version__, "pydantic": "real" if HAS_PYDANTIC else "stand-in"}
    found = {"device": name, "host": machine(), "versions": versions, "seconds": spent}
    options.output.write_text(json.dumps(found | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    words = ", ".join(f"{key} {value}" for key, value in versions.items() if key != "pydantic")
    cells = [[row.name, row.found, row.limit, _verdict(row)] for row in rows]
    text = f"{name}; {machine()}; {words}; {spent:.0f} s.\n\n{table(['check', 'found', 'limit', ''], cells)}"
    print(f"\n{text}")
    if options.page is not None:
        put(options.page, "On a GPU", text)
    sys.exit(any(row.passed is False for row in rows))


def _all_rows(device: torch.device, *, quick: bool) -> Iterator[Row]:
    from benchmarks.gpu_check import calibration, products, weights

    for part in (weights, products, calibration):
        yield from part.rows(device, quick=quick)


def _verdict(row: Row) -> str:
    return {True: "ok", False: "FAILED", None: ""}[row.passed]


if __name__ == "__main__":
    main()
