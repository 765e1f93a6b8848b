"""Compares calibrating with llm-compressor's oneshot and with a plain forward pass, in turns on one machine.

    python -m benchmarks.calibrate [--rounds 3] [--data 16x256:3] [--no-peer [64x512]] [--device cuda]
                                   [--folder DIR] [--page FILE]
    python -m benchmarks.calibrate --compare-scales [--fixtures DIR]
    python -m benchmarks.calibrate --through-weights MODEL TEXTS

Source: the synthetic Llama of benchmarks.quantize, with 16 samples of 256 tokens and 64 of 512. Every contender runs in
a process of its own; one round runs each of them once, and a ratio is taken within its round. On a CPU without bf16
instructions (AVX512-BF16, AMX) a round takes many minutes, most of them for the peer: begin there with --no-peer, or
leave the peer out for the longer samples.

ours       calibrate, quantize and save: fp8-static-kv
datafree   the same weights without calibration
floor      the decoder's plain forward over the same tokens, one sample at a time, all weights in memory, no lm_head;
           in float32 where the CPU has no bf16 instructions, since that is faster there
peer       oneshot with FP8 static and an FP8 KV cache, and its save, in its own environment (benchmarks/peer.txt)

--compare-scales runs oneshot (static_minmax, propagate_error=False) and fp8pipe on tiny models and the same samples,
and prints the largest relative difference of their scales; --fixtures writes the peer's scales for the tests.
--through-weights asks whether ranges should be found through FP8 weights (recipe option quantized_weights)."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import peer
from benchmarks.page import machine, prose, put, table

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
DATA = {"16x256": (16, 256), "64x512": (64, 512), "512x2048": (512, 2048)}
"""Samples and tokens. The last, the default of recipes, is for a GPU: it runs only if --data names it."""
USUAL = ("16x256", "64x512")
QUICK = (4, 64)

Timing = Mapping[str, float]
"""What one process took: whole, inside, cpu and (ours) calibrate in seconds; peak_mb, device_mb."""
Rounds = Mapping[str, Sequence[Mapping[str, Timing]]]
"""Samples -> what each contender took in each round."""


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the models and the outputs go")
    parser.add_argument("--page", type=Path, default=None, help=f"page to write the tables to, such as {PAGE.name}")
    parser.add_argument(
        "--no-peer", nargs="*", choices=DATA, help="leave out llm-compressor; for these samples, or all"
    )
    parser.add_argument("--data", action="append", type=_asked, help="only these samples; :N for N rounds of them")
    parser.add_argument("--device", default="cpu", help="where fp8pipe and the floor run; the peer chooses for itself")
    parser.add_argument("--quick", action="store_true", help="a model of 20 MB, to try the command")
    parser.add_argument("--compare-scales", action="store_true", help="compare scales of tiny models with the peer's")
    parser.add_argument(
        "--fixtures", type=Path, default=None, help="with --compare-scales: folder for the peer's scales"
    )
    parser.add_argument("--through-weights", nargs=2, type=Path, metavar=("MODEL", "TEXTS"))
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="fp8pipe-bench-") as scratch:
        if options.compare_scales:
            from benchmarks.calibrate_scales import compare

            print(compare(Path(scratch), options.fixtures))
        elif options.through_weights:
            from benchmarks.calibrate_scales import through_weights

            model, texts = options.through_weights
            found = through_weights(model, texts, Path(scratch))
            print(found)
            if options.page is not None:
                _fill(options.page, "through weights", found)
        else:
            _measure(Path(scratch), options)


def _asked(text: str) -> tuple[str, int | None]:
    """--data: 16x256, or 16x256:3 for 3 rounds."""
    title, _, count = text.partition(":")
    if title not in DATA:
        raise argparse.ArgumentTypeError(f"{title} is not one of {', '.join(DATA)}")
    return title, int(count) if count else None


def _measure(scratch: Path, options: Any) -> None:
    counts = {title: count or options.rounds for title, count in options.data or [(title, None) for title in USUAL]}
    sizes = {title: QUICK if options.quick else DATA[title] for title in counts}
    alone = set(sizes if options.no_peer == [] else options.no_peer or ())
    peer_python = peer.interpreter() if sizes.keys() - alone else None
    arena = Arena(scratch, peer_python, quick=options.quick, device=options.device)
    rounds = {
        title: arena.rounds(*sizes[title], count, with_peer=title not in alone) for title, count in counts.items()
    }
    doubled = {title: arena.doubled(*size) for title, size in sizes.items()}
    section = report(rounds, doubled, options.device)
    print(section)
    if options.page is not None:
        put(options.page, "Calibrating", section)


# ---------------------------------------------------------------------------------------------- running


class Arena:
    """The model and the samples on disk, and the processes that run on them."""

    def __init__(self, folder: Path, peer_python: Path | None, *, quick: bool, device: str) -> None:
        self._folder, self._peer_python, self._quick, self._device = folder, peer_python, quick, device
        self._layers = 2 if quick else 16
        self._source = self._make_llama(self._layers)

    def rounds(self, samples: int, tokens: int, count: int, *, with_peer: bool) -> list[dict[str, Timing]]:
        """`count` rounds, after a warm-up that fills the page cache and the cache of architectures."""
        data = self._make_data(samples, tokens)
        self._contend("datafree", self._source, data)
        contenders = ("ours", "floor", "datafree", *(("peer",) if with_peer else ()))
        found = []
        for number in range(1, count + 1):
            found.append({what: self._contend(what, self._source, data) for what in contenders})
            print(f"{samples} x {tokens}: round {number} of {count}", file=sys.stderr, flush=True)
        return found

    def doubled(self, samples: int, tokens: int) -> Timing:
        """Calibrate and quantize with twice the layers."""
        source = self._make_llama(2 * self._layers)
        return self._contend("ours", source, self._make_data(samples, tokens))

    def _contend(self, what: str, source: Path, data: Path) -> Timing:
        python = self._peer_python if what == "peer" else sys.executable
        with tempfile.TemporaryDirectory(dir=self._folder) as output:
            command = [
                str(python),
                "-m",
                "benchmarks.calibrate_contender",
                what,
                str(source),
                str(data),
                f"{output}/out",
                self._device,
            ]
            began = time.perf_counter()
            own = os.environ | {"FP8PIPE_CACHE": str(self._folder / "cache")}
            answer = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
            whole = time.perf_counter() - began
        if answer.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{answer.stderr[-3000:]}")
        os.sync()
        return json.loads(answer.stdout.splitlines()[-1]) | {"whole": whole}

    def _make_llama(self, layers: int) -> Path:
        source = self._folder / f"llama-{layers}"
        if not source.exists():
            tiny = ["--tiny"] if self._quick else []
            subprocess.run([sys.executable, "-m", "benchmarks.llama", "llama", source, str(layers), *tiny], check=True)
            write_tokenizer(source)
        return source

    def _make_data(self, samples: int, tokens: int) -> Path:
        """Random letters: one token each under the tokenizer of bytes."""
        letters, path = random.Random(0), self._folder / f"{samples}x{tokens}.jsonl"
        rows = ("".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=tokens)) for _ in range(samples))
        path.write_text("\n".join(json.dumps({"text": row}) for row in rows))
        return path


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of single bytes, so that a text has as many tokens as letters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)


# ---------------------------------------------------------------------------------------------- reporting


def _fill(page: Path, name: str, text: str) -> None:
    """Put `text` between the marks called `name`."""
    before, mark, rest = page.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- /{name} -->")
    assert mark and end, f"{page} has no place for {name}"
    page.write_text(before + mark + text + end + after)


def report(rounds: Rounds, doubled: Mapping[str, Timing], device: str) -> str:
    """The figures as Markdown: seconds, ratios and memory, with the limits that they must keep."""
    intro = (
        f"Llama of 16 layers, hidden 2048, ffn 8192, bf16; fp8-static-kv. {machine()}, {_where(device)}. "
        f"Rounds: {', '.join(f'{len(found)} of {title}' for title, found in rounds.items())}; medians, with the "
        "smallest and largest in brackets; a ratio is taken within its round. CPU is the CPU time of all threads, "
        "which other work on the machine hardly changes. Peak memory may be 1.2 GB plus twice the hidden states of all "
        "samples. Made by `python -m benchmarks.calibrate`."
    )
    return "\n".join((f"{prose(intro)}\n", _seconds(rounds), _ratios(rounds), _memory(rounds, doubled)))


def _where(device: str) -> str:
    import torch

    if device != "cpu":
        return f"on {torch.cuda.get_device_name(device)}"

    from fp8pipe.calibrate.cpu_linear import is_emulated

    if not is_emulated(torch.bfloat16, torch.device("cpu")):
        return "with bf16 instructions"
    return "without bf16 instructions: fp8pipe and the floor multiply in float32, the peer emulates bf16"


def _seconds(rounds: Rounds) -> str:
    columns = [
        (title, what, field)
        for title, what, field in (
            ("floor", "floor", "inside"),
            ("CPU", "floor", "cpu"),
            ("data-free", "datafree", "inside"),
            ("CPU", "datafree", "cpu"),
            ("fp8pipe inside", "ours", "inside"),
            ("CPU", "ours", "cpu"),
            ("peer inside", "peer", "inside"),
            ("CPU", "peer", "cpu"),
            ("fp8pipe whole", "ours", "whole"),
            ("peer whole", "peer", "whole"),
        )
        if any(what in one for found in rounds.values() for one in found)
    ]
    rows = [
        [title, *(_spread([one[what][field] for one in found if what in one]) for _, what, field in columns)]
        for title, found in rounds.items()
    ]
    return table(["seconds", *(title for title, _, _ in columns)], rows)


def _ratios(rounds: Rounds) -> str:
    rows = []
    for title, found in rounds.items():
        for field, label in (("inside", "inside / (floor + data-free)"), ("cpu", "the same in CPU time")):
            over = [one["ours"][field] / (one["floor"][field] + one["datafree"][field]) for one in found]
            rows.append([title, label, _spread(over), "at most 1.25"])
        pace = [one["floor"]["inside"] / one["ours"]["calibrate"] for one in found]
        rows.append([title, "tokens per second, calibrating / plain forward", _spread(pace), "on a GPU at least 0.8"])
        if all("peer" in one for one in found):
            for field, asked in (("inside", "at least 1.7"), ("cpu", ""), ("whole", "at least 1.3")):
                ratios = [one["peer"][field] / one["ours"][field] for one in found]
                rows.append([title, f"peer {field} / {field}", _spread(ratios), asked])
    return table(["samples", "ratio", "measured", "asked"], rows)


def _memory(rounds: Rounds, doubled: Mapping[str, Timing]) -> str:
    rows = []
    for title, found in rounds.items():
        samples, tokens = DATA[title]
        hidden = samples * tokens * 2048 * 2 / 1e6
        base = max(one["ours"]["peak_mb"] for one in found)
        theirs = f"{max(one['peer']['peak_mb'] for one in found):.0f}" if "peer" in found[0] else "not run"
        rows.append([title, f"{base:.0f}", f"{doubled[title]['peak_mb']:.0f}", f"{1200 + 2 * hidden:.0f}", theirs])
        on_device = max(one["ours"]["device_mb"] for one in found)
        if on_device:
            plain = max(one["floor"]["device_mb"] for one in found)
            twice = doubled[title]["device_mb"]
            rows.append([f"{title}, GPU", f"{on_device:.0f}", f"{twice:.0f}", f"plain forward {plain:.0f}", ""])
    return table(["peak MB", "model", "twice the layers", "at most", "peer"], rows)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "not run"
    return f"{median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
