"""Measures quantizing against its peer and its floor, alternating on one machine.

    python -m benchmarks.quantize [--rounds 3] [--folder DIR] [--page FILE] [--scheme RECIPE] [--no-peer] [--quick]

Source: a synthetic Llama (16 layers, hidden 2048, ffn 8192, vocabulary 32000, bf16, 5 shards; 2.1 GB). Peer:
llm-compressor's `model_free_ptq` on all cores, in its own environment (benchmarks/peer.txt). Floor: read every source
byte, write and fsync as many bytes as the checkpoint has, on one thread and on all cores. Each contender runs in a
process of its own. A round runs all of them once, and ratios are taken within a round.

inside    from the plan to the fsynced checkpoint; for the peer its own call, which does not fsync
whole     the command `fp8pipe quantize`, without and with an architecture record; for the peer its whole process
peak      largest resident set of the writing process, for the model, for twice its layers, and for a model with two
          weights of 8.6 GB each

--quick takes a model of 20 MB, to try the command. Needs 10 GB of free disk in --folder and 12 GB of memory."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from benchmarks import peer
from benchmarks.page import machine, prose, put, table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"


@dataclass(frozen=True, slots=True)
class Scheme:
    """One recipe, the peer's name for it, and how many times faster than the peer it must be inside."""

    title: str
    recipe: str
    peer: str
    faster: float


SCHEMES = (
    Scheme("per channel", "fp8-dynamic", "FP8_DYNAMIC", 5),
    Scheme("block 128x128", "fp8-block", "FP8_BLOCK", 4),
    Scheme("per tensor", "autofp8-dynamic", "per-tensor", 4),
)


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds and peak memory of one process."""

    whole: float
    inside: float = 0.0
    peak_mb: float = 0.0


Round = Mapping[str, Timing]
"""Contender -> its timing: ours, copy (the floor on one thread), floor (on all cores), peer, cold, warm."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the models and the outputs go")
    parser.add_argument("--page", type=Path, default=None, help=f"page to put the tables on, as {PAGE.name}")
    parser.add_argument("--no-peer", action="store_true", help="leave out llm-compressor")
    parser.add_argument("--scheme", action="append", choices=[s.recipe for s in SCHEMES], help="only this recipe")
    parser.add_argument("--quick", action="store_true", help="a model of 20 MB, to try the command")
    options = parser.parse_args(arguments)
    other = None if options.no_peer else peer.interpreter()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fp8pipe-bench-") as scratch:
        arena = Arena(Path(scratch), other, quick=options.quick)
        wanted = [scheme for scheme in SCHEMES if scheme.recipe in (options.scheme or [scheme.recipe])]
        rounds = {scheme: arena.rounds(scheme, options.rounds) for scheme in wanted}
        section = report(rounds, arena.source_bytes, options.rounds)
        section += "\n" + memory_table(arena.peaks(rounds))
    print(section)
    if options.page is not None:
        put(options.page, "Quantizing", section)


# ---------------------------------------------------------------------------------------------- running


class Arena:
    """The models on disk, and the processes that quantize them."""

    def __init__(self, folder: Path, peer_python: Path | None, *, quick: bool) -> None:
        self._folder = folder
        self._peer_python = peer_python
        self._quick = quick
        self._layers = 2 if quick else 16
        self._source = self._make_llama(self._layers)
        self.source_bytes = sum(path.stat().st_size for path in self._source.glob("*.safetensors"))

    def rounds(self, scheme: Scheme, count: int) -> list[Round]:
        """`count` rounds, after a warm-up that fills the page cache and measures the bytes that the floor writes."""
        with self._output() as output:
            self._ours(scheme, self._source, output)
            sizes = ",".join(str(path.stat().st_size) for path in sorted(output.glob("*.safetensors")))
        found = []
        for number in range(1, count + 1):
            found.append(self._round(scheme, sizes))
            _report_progress(f"{scheme.title}: round {number} of {count}")
        return found

    def _round(self, scheme: Scheme, sizes: str) -> Round:
        timings = {}
        with self._output() as output:
            timings["ours"] = self._ours(scheme, self._source, output)
        for floor in ("copy", "floor"):
            with self._output() as output:
                timings[floor] = self._contend(sys.executable, floor, sizes, self._source, output)
        if self._peer_python is not None:
            with self._output() as output:
                timings["peer"] = self._contend(self._peer_python, "peer", scheme.peer, self._source, output)
        with self._output() as output:
            timings["warm"] = self._command(scheme, output, self._folder / "cache")
        with self._output() as output, tempfile.TemporaryDirectory(dir=self._folder) as cache:
            timings["cold"] = self._command(scheme, output, Path(cache))
        return timings

    def peaks(self, rounds: Mapping[Scheme, Sequence[Round]]) -> dict[Scheme, list[float]]:
        """Peak MB of the writing process for the model, for twice its layers, and for a model of giant tensors."""
        peaks = {scheme: [max(one["ours"].peak_mb for one in found)] for scheme, found in rounds.items()}
        for make in (lambda: self._make_llama(2 * self._layers), self._make_giant):
            source = make()
            for scheme in rounds:
                with self._output() as output:
                    peaks[scheme].append(self._ours(scheme, source, output).peak_mb)
            shutil.rmtree(source)
            _report_progress(f"memory: {source.name}")
        return peaks

    def _ours(self, scheme: Scheme, source: Path, output: Path) -> Timing:
        return self._contend(sys.executable, "ours", scheme.recipe, source, output)

    def _contend(self, python: str | Path, what: str, how: str, source: Path, output: Path) -> Timing:
        command = [python, "-m", "benchmarks.contender", what, how, source, output]
        whole, answer = _timed(command, self._folder / "cache")
        return Timing(whole, **json.loads(answer.splitlines()[-1]))

    def _command(self, scheme: Scheme, output: Path, cache: Path) -> Timing:
        """Run the command as a user types it."""
        program = Path(sys.executable).with_name("fp8pipe")
        command = [program, "quantize", self._source, "--recipe", scheme.recipe, "--output", output]
        return Timing(_timed(command, cache)[0])

    @contextmanager
    def _output(self) -> Iterator[Path]:
        """A folder that is removed afterwards; all writes are then on disk, so that the next process need not wait."""
        output = self._folder / "output"
        try:
            yield output
        finally:
            shutil.rmtree(output, ignore_errors=True)
            os.sync()

    def _make_llama(self, layers: int) -> Path:
        source = self._folder / f"llama-{layers}"
        tiny = ["--tiny"] if self._quick else []
        subprocess.run([sys.executable, "-m", "benchmarks.llama", "llama", source, str(layers), *tiny], check=True)
        return source

    def _make_giant(self) -> Path:
        source = self._folder / "giant"
        size = 1 << (26 if self._quick else 32)
        subprocess.run([sys.executable, "-m", "benchmarks.llama", "giant", source, str(size)], check=True)
        return source


def _timed(command: Sequence[str | Path], cache: Path) -> tuple[float, str]:
    """Seconds of a process from start to end, and its stdout."""
    began = time.perf_counter()
    own = os.environ | {"FP8PIPE_CACHE": str(cache)}
    own.pop("PYTHONDONTWRITEBYTECODE", None)  # a user's Python keeps what it compiles
    answer = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if answer.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{answer.stderr[-2000:]}")
    return seconds, answer.stdout


def _report_progress(what: str) -> None:
    print(what, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------- reporting


def report(rounds: Mapping[Scheme, Sequence[Round]], source_bytes: int, count: int) -> str:
    """The figures as Markdown: seconds, then ratios beside what is required."""
    intro = (
        f"Source {source_bytes / 1e9:.2f} GB in bf16. {machine()}. {count} rounds; medians, smallest to largest in "
        "brackets; a ratio is taken within its round. Made by `python -m benchmarks.quantize`."
    )
    return "\n".join((f"{prose(intro)}\n", _seconds_table(rounds), _ratio_table(rounds)))


def _seconds_table(rounds: Mapping[Scheme, Sequence[Round]]) -> str:
    columns = {
        "floor, one thread": lambda one: one["copy"].inside,
        "floor, all cores": lambda one: one["floor"].inside,
        "fp8pipe inside": lambda one: one["ours"].inside,
        "peer inside": lambda one: one["peer"].inside,
        "fp8pipe whole, cold": lambda one: one["cold"].whole,
        "fp8pipe whole, with record": lambda one: one["warm"].whole,
        "of which not inside": lambda one: one["warm"].whole - one["ours"].inside,
        "peer whole": lambda one: one["peer"].whole,
    }
    with_peer = all("peer" in one for found in rounds.values() for one in found)
    kept = {title: value for title, value in columns.items() if with_peer or "peer" not in title}
    rows = [
        [scheme.title, *(_spread([value(one) for one in found]) for value in kept.values())]
        for scheme, found in rounds.items()
    ]
    return table(["seconds", *kept], rows)


def _ratio_table(rounds: Mapping[Scheme, Sequence[Round]]) -> str:
    rows = []
    for scheme, found in rounds.items():
        wanted = [
            ("inside / floor, one thread", "ours.inside", "copy.inside", "at most 2.0" if scheme is SCHEMES[0] else ""),
            ("inside / floor, all cores", "ours.inside", "floor.inside", "at most 2.0"),
        ]
        if all("peer" in one for one in found):
            wanted += [
                ("peer inside / inside", "peer.inside", "ours.inside", f"at least {scheme.faster:g}"),
                ("peer whole / whole, cold", "peer.whole", "cold.whole", "at least 1.7"),
                ("peer whole / whole, with record", "peer.whole", "warm.whole", "at least 4"),
            ]
        rows += [[scheme.title, title, _ratio(found, above, below), asked] for title, above, below, asked in wanted]
    return table(["scheme", "ratio", "measured", "asked"], rows)


def _ratio(found: Sequence[Round], above: str, below: str) -> str:
    return _spread([_value(one, above) / _value(one, below) for one in found])


def _value(one: Round, path: str) -> float:
    contender, field = path.split(".")
    return getattr(one[contender], field)


def _spread(values: Sequence[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def memory_table(peaks: Mapping[Scheme, Sequence[float]]) -> str:
    """Peak MB of the writing process, and its growth, as Markdown."""
    rows = [
        [
            scheme.title,
            f"{base:.0f}",
            f"{double:.0f} ({double / base - 1:+.0%})",
            f"{giant:.0f} ({giant / base - 1:+.0%})",
        ]
        for scheme, (base, double, giant) in peaks.items()
    ]
    return table(["peak MB (at most 700, within 10 %)", "model", "twice the layers", "8.6 GB tensors"], rows)


if __name__ == "__main__":
    main()
