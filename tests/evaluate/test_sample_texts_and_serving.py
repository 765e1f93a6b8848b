"""What is measured beside the tasks: the sample generation's findings, and the timed workload."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from fp8pipe.config import ServingWorkload
from fp8pipe.errors import InputError
from fp8pipe.evaluate.sample_texts import finding
from fp8pipe.evaluate.serving import check_fits


@pytest.mark.parametrize(
    ("text", "tokens", "expected"),
    [
        ("Paris, which lies on the Seine.", list(range(40)), None),
        ("", [], "empty"),
        (" \n\t", [5, 6, 7], "empty"),
        ("the the the", [9] * 64, "repeating"),
        ("...", [1, 2, 3] + [9] * 15, None),
        ("...", [1, 2, 3] + [9] * 16, "repeating"),
        ("a b c d", [4, 5, 6, 7, 8] * 4, "repeating"),
        ("a b c d", [*([4, 5, 6, 7, 8] * 4), 3], None),
        ("a b c d", [4, 5, 6, 7, 8] * 3, None),
        ("long", [*range(100, 116)] * 4, "repeating"),
    ],
)
def test_empty_and_endlessly_repeating_text_is_a_finding(text: str, tokens: list[int], expected: str | None) -> None:
    assert finding(text, tokens) == expected


def test_workload_longer_than_the_context_is_refused() -> None:
    check_fits(ServingWorkload(input_len=100, output_len=28), 128)
    with pytest.raises(InputError, match="129 tokens, the engine's context is 128"):
        check_fits(ServingWorkload(input_len=100, output_len=29), 128)


def test_an_engine_that_fails_while_it_is_timed_ends_every_request() -> None:
    from fp8pipe.evaluate.serving import EngineRequests

    class Engine:
        def add_request(self, *_: object) -> None: ...

        def has_unfinished_requests(self) -> bool:
            return True

        def step(self) -> list[Any]:
            raise torch.OutOfMemoryError("CUDA out of memory")

    async def ask() -> list[object]:
        requests, one = (
            EngineRequests(Engine()),
            SimpleNamespace(output_len=4, ignore_eos=True, prompt_len=2, prompt=[1, 2]),
        )
        asked = [requests(cast(Any, one), cast(Any, None)) for _ in range(3)]
        return await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 60)

    assert [type(answer) for answer in asyncio.run(ask())] == [torch.OutOfMemoryError] * 3
