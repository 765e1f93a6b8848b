"""One FP8 checkpoint under other names: compressed-tensors to fp8 and back, and legacy names to current ones.

In: a Snapshot of a checkpoint, ours or anybody's. Out: a new folder with the same FP8 bytes and a Conversion record;
never the source changed in place.

    plan       every tensor of the result, every refusal, from headers alone
    legacy     names that early tools wrote, to current ones
    respell    one spelling to the other
    write      the folder, tile by tile, resumable
"""

from __future__ import annotations

from pathlib import Path

from fp8pipe.convert.plan import ConversionPlan, plan_conversion
from fp8pipe.convert.record import Change, Conversion, Method
from fp8pipe.progress import Progress, quiet

__all__ = ["Change", "Conversion", "ConversionPlan", "Method", "convert", "plan_conversion"]


def convert(plan: ConversionPlan, folder: Path, *, progress: Progress = quiet) -> Conversion:
    """Write what `plan` says into `folder`, or go on with it, or return its record when it is there.

    A plan without changes writes nothing. `folder` must be new, empty, or this conversion's own unfinished work, and
    apart from the source's. Raises InputError for any other folder, SourceChanged, DiskTooSmall. The result is no
    release: evidence of the source is not carried over, and a checkpoint of ours has a fingerprint of its own."""
    if not plan.conversion.changes:
        return plan.conversion
    from fp8pipe.convert.write import write

    return write(plan, folder, progress)
