"""What every task of a run works with, and how a task reports a finished tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fp8pipe.model.shards import OutputShard, SourceFiles
from fp8pipe.quantize.engine.journal import Journal
from fp8pipe.quantize.engine.meter import Meter
from fp8pipe.quantize.engine.pool import Pool
from fp8pipe.quantize.engine.workbench import Workbench
from fp8pipe.quantize.plan import OutputTensor


@dataclass(frozen=True, slots=True)
class Context:
    """The files, buffers and records of one run."""

    files: SourceFiles
    shards: Mapping[str, OutputShard]
    """By file name, without those that an earlier run finished."""
    journal: Journal
    pool: Pool
    bench: Workbench
    meter: Meter
    amax: Mapping[str, float]
    """Largest magnitudes of weights by output name, as far as calibration has kept them."""
    on_finished: Callable[[OutputTensor], None]
    """Called when all bytes of an output are written."""

    def is_finished(self, output: OutputTensor) -> bool:
        """Whether an earlier run wrote it."""
        return output.name in self.journal.finished

    def finish(self, output: OutputTensor, zeros: Sequence[str] = (), faint: Sequence[str] = ()) -> None:
        """Note that all bytes of `output` are written; `zeros`: its scale units that hold only zeros; `faint`: those
        whose weights are too small for any code but zero."""
        self.shards[output.shard].start_flush(output.begin, output.end)
        self.journal.add_finished(output.name, zeros, faint)
        self.meter.finish_tensor()
        self.on_finished(output)
