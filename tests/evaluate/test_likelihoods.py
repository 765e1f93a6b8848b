"""Log-likelihoods: those of lm-eval's own method, in few requests and bounded windows."""

from __future__ import annotations

import json
import subprocess
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.processes import importing_the_repository

from fp8pipe.errors import InputError

pytestmark = pytest.mark.vllm

SCRIPT = Path(__file__).parents[1] / "support" / "vllm_likelihoods.py"


@pytest.fixture(scope="module")
def answers(tiny_llama: Path, warm_python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("likelihoods") / "answer.json"
    command, own = [warm_python, str(SCRIPT), str(tiny_llama), str(path)], importing_the_repository()
    done = subprocess.run(command, env=own, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_bytes())


@pytest.mark.parametrize("side", ["ours", "shuffled"])
def test_likelihoods_are_those_of_lm_eval(side: str, answers: dict[str, Any]) -> None:
    """But for the rounding of other batches in bfloat16, which may move two tokens that are close."""
    assert len(answers[side]) == len(answers["theirs"]) == 144
    for (nats, _), (expected, _) in zip(answers[side], answers["theirs"], strict=True):
        assert nats == pytest.approx(expected, rel=5e-3, abs=5e-2)
    greedy = [one[1] == other[1] for one, other in zip(answers[side], answers["theirs"], strict=True)]
    assert sum(greedy) >= 142


class Outputs:
    """An engine that counts its requests, and how many of its outputs are alive at once."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def generate(self, prompts: list[list[int]], sampling: list[Any]) -> list[Any]:
        self.prompts += prompts
        outputs = [self.output(prompt, options) for prompt, options in zip(prompts, sampling, strict=True)]
        self.alive.update(outputs)
        self.most = max(self.most, len(self.alive))
        return outputs

    def output(self, prompt: list[int], options: Any) -> Any:
        """Token t has logprob -t, and the likeliest is 0."""
        if options.prompt_logprobs is None:
            logprobs = {token: SimpleNamespace(logprob=-float(token)) for token in (0, *options.logprob_token_ids)}
            return Output(outputs=[SimpleNamespace(token_ids=[0], logprobs=[logprobs])])
        flat = Flat(
            start_indices=[0, *range(0, 2 * len(prompt) - 2, 2)],
            end_indices=[0, *range(2, 2 * len(prompt), 2)],
            logprobs=[value for token in prompt[1:] for value in (-float(token), 0.0)],
        )
        return Output(prompt_logprobs=flat)


class Output(SimpleNamespace):
    __hash__ = object.__hash__


class Flat(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.start_indices)


def test_answers_of_one_token_to_one_context_are_one_request_without_prompt_logprobs() -> None:
    from fp8pipe.evaluate.likelihood import likelihoods

    engine = Outputs()
    asked = [([1, 2], [token]) for token in (0, 3, 4, 3)] + [([1, 2], [0, 5]), ([1, 2], [0, 0])]
    found = likelihoods(asked, engine.generate, max_length=10)
    assert found == [(0.0, True), (-3.0, False), (-4.0, False), (-3.0, False), (-5.0, False), (0.0, True)]
    assert engine.prompts == [[1, 2], [1, 2, 0, 0], [1, 2, 0, 5]]


def test_outputs_are_held_a_window_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fp8pipe.evaluate import likelihood

    monkeypatch.setattr(likelihood, "WINDOW_TOKENS", 100)
    engine, windows = Outputs(), []
    asked = [([i % 7] * 8, [i, i]) for i in range(200)]
    likelihood.likelihoods(asked, engine.generate, max_length=50, on_window=lambda *done: windows.append(done))
    assert windows == [(done, 200) for done in range(0, 200, 10)]
    assert engine.most <= 20  # this window's, and the last one's until it is dropped


def test_context_is_cut_as_lm_eval_cuts_it_and_an_answer_without_room_is_refused() -> None:
    from fp8pipe.evaluate.likelihood import likelihoods

    engine = Outputs()
    likelihoods([([1, 2, 3, 4], [5]), ([1, 2, 3, 4], [5, 6])], engine.generate, max_length=5)
    assert engine.prompts == [[2, 3, 4], [3, 4, 5, 6]]
    with pytest.raises(InputError, match="answer of 4 tokens leaves no room"):
        likelihoods([([1], [5, 6, 7, 8])], engine.generate, max_length=5)
