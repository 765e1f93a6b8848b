"""Rewrites an FP8 checkpoint in the other spelling (compressed-tensors or fp8), and legacy names as current ones.

`plan_conversion`: a Snapshot of any FP8 checkpoint, made by fp8pipe or not, in; a ConversionPlan out. `convert`: that
plan in; a new folder with the same FP8 bytes, and a Conversion record, out. The source is never changed.

    plan       every tensor of the result and every refusal, from headers alone
    draft      the tensors of the result before they have a place
    legacy     names that early tools wrote -> current ones
    respell    one spelling -> the other
    write      the folder, tile by tile; an interrupted run is resumed
    record     what was changed
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.convert.plan import ConversionPlan, plan_conversion
from fp8pipe.convert.record import Change, Conversion, Method
from fp8pipe.progress import Progress, quiet

__all__ = ["Change", "Conversion", "ConversionPlan", "Method", "convert", "plan_conversion"]


def convert(conversion: ConversionPlan, folder: Path, *, progress: Progress = quiet) -> Conversion:
    """Write the planned conversion into `folder`, resume an interrupted run, or return the record of a finished one.

    A conversion without changes writes nothing. `folder` must be new, empty, or this conversion's own unfinished work,
    and neither inside the source nor around it; raises InputError for any other, SourceChanged, DiskTooSmall. The
    result is not released: it has no evidence, and if fp8pipe made the source, a fingerprint of its own."""
    if not conversion.record.changes:
        return conversion.record
    from fp8pipe.convert.write import write

    return write(conversion, folder, progress)
