"""Which engine, device and number of GPUs serve a checkpoint, and as what."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from fp8pipe.records.base import Record

Engine = Literal["vLLM", "transformers"]
DeviceClass = Literal["ada", "hopper", "blackwell"]
DEVICES: tuple[DeviceClass, ...] = ("ada", "hopper", "blackwell")
"""Compute capabilities 8.9, 9.0 and 10.0."""
RANKS: tuple[int, ...] = (1, 2, 4, 8)
"""Tensor-parallel sizes that are answered for."""
Verdict = Literal["w8a8", "otherwise", "no", "unknown"]
"""w8a8: loads, and multiplies FP8 weights by FP8 inputs with the numbers of the checkpoint. otherwise: loads, and
computes something else. no: does not load, or loads wrong numbers. unknown: its code does not say."""


class Serves(Record):
    """One engine on GPUs of one class."""

    engine: Engine
    device: DeviceClass
    ranks: int
    """Tensor-parallel size."""
    expert_parallel: bool = False
    """Whole experts are spread over the ranks, instead of a part of each."""
    verdict: Verdict
    word: str
    """The verdict in a word or two, for a table: W8A8, W8A16, requantized, no, ?"""
    counts: bool = True
    """A verdict of the gate on this device would count: the kernel is the one that the scheme asks for."""
    reason: str = ""
    """What is computed otherwise, or why it does not load; empty for w8a8."""


class Serving(Record):
    """What serves a checkpoint."""

    answers: tuple[Serves, ...]
    """Engine by engine, device by device, by growing number of ranks; experts in parallel last."""
    rules: dict[Engine, str]
    """Version of each engine whose code the rules follow."""

    def of(self, engine: Engine, device: DeviceClass, ranks: int, *, expert_parallel: bool = False) -> Serves:
        """The answer for one case. KeyError if there is none (expert parallelism of a model without experts)."""
        wanted = (engine, device, ranks, expert_parallel)
        for answer in self.answers:
            if (answer.engine, answer.device, answer.ranks, answer.expert_parallel) == wanted:
                return answer
        raise KeyError(wanted)

    def without_vllm(self, reason: str) -> Serving:
        """The same where vLLM was asked and does not load the checkpoint on any device."""
        answers = tuple(
            answer.model_copy(update={"verdict": "no", "word": "no", "counts": False, "reason": reason})
            if answer.engine == "vLLM"
            else answer
            for answer in self.answers
        )
        return self.model_copy(update={"answers": answers})

    def table(self) -> tuple[list[dict[str, str]], list[str]]:
        """For people: one row per engine and device, devices with equal answers together; and the reasons by number."""
        numbers: dict[str, int] = {}
        rows: dict[tuple[str, str, str], list[str]] = {}
        for engine in dict.fromkeys(answer.engine for answer in self.answers):
            for device in DEVICES:
                cases = [answer for answer in self.answers if (answer.engine, answer.device) == (engine, device)]
                tensor = _in_words([case for case in cases if not case.expert_parallel], numbers)
                expert = _in_words([case for case in cases if case.expert_parallel], numbers)
                rows.setdefault((engine, tensor, expert), []).append(device)
        cells = [
            {"engine": engine, "GPUs": ", ".join(devices), "tensor parallel": tensor, "expert parallel": expert}
            for (engine, tensor, expert), devices in rows.items()
        ]
        if not any(row["expert parallel"] for row in cells):
            cells = [{name: cell for name, cell in row.items() if name != "expert parallel"} for row in cells]
        return cells, [f"[{number}] {reason}" for reason, number in numbers.items()]

    def on(self, device_classes: Sequence[str], ranks: int = 1, *, expert_parallel: bool = False) -> Iterator[Serves]:
        """What vLLM does on so many GPUs of each of these classes, where it is known here."""
        sparse = any(answer.expert_parallel for answer in self.answers)
        wanted = (ranks, expert_parallel and sparse and ranks > 1)
        for answer in self.answers:
            if (
                answer.engine == "vLLM"
                and answer.device in device_classes
                and (answer.ranks, answer.expert_parallel) == wanted
            ):
                yield answer


def _in_words(cases: Sequence[Serves], numbers: dict[str, int]) -> str:
    """`W8A8 on 1, 2, 4; no on 8 [1]`. Adds the reasons to `numbers`."""
    groups: dict[tuple[str, str], list[str]] = {}
    for case in cases:
        groups.setdefault((case.word, case.reason), []).append(str(case.ranks))
    parts = []
    for (word, reason), ranks in groups.items():
        mark = f" [{numbers.setdefault(reason, len(numbers) + 1)}]" if reason else ""
        parts.append(f"{word} on {', '.join(ranks)}{mark}")
    return "; ".join(parts)
