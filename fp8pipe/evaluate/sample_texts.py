"""The sample generation: what the model says to fixed prompts, before anything is measured.

A checkpoint whose scales are wrong often loads, serves, and says nothing or the same words without end. In: the engine
and the suite's prompts. Out: one SampleText per prompt, in which such text is a finding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from fp8pipe.config import EvalSuite
from fp8pipe.records import SampleText

if TYPE_CHECKING:
    from fp8pipe.evaluate.engine import MeteredVLLM

MAX_TOKENS = 64
LONGEST_PASSAGE = 16
"""Tokens of the longest passage whose repetition is looked for."""
TIMES = 4
"""How often the same passage must follow itself."""


def sample_texts(lm: MeteredVLLM, suite: EvalSuite) -> tuple[SampleText, ...]:
    """Greedy continuations of the suite's prompts, through its chat template if it has one."""
    from vllm import SamplingParams, TokensPrompt

    if not suite.sample_prompts:
        return ()
    texts = [_as_asked(lm, prompt, suite) for prompt in suite.sample_prompts]
    room = lm.max_length - min(MAX_TOKENS, lm.max_length // 2)
    prompts = [TokensPrompt(prompt_token_ids=tokens[-room:]) for tokens in lm.tok_encode(texts)]
    greedy = SamplingParams(temperature=0.0, max_tokens=lm.max_length - room)
    answers = [output.outputs[0] for output in lm.model.generate(prompts, sampling_params=greedy)]
    return tuple(
        SampleText(
            prompt=prompt, text=said.text, tokens=len(said.token_ids), finding=finding(said.text, said.token_ids)
        )
        for prompt, said in zip(suite.sample_prompts, answers, strict=True)
    )


def _as_asked(lm: MeteredVLLM, prompt: str, suite: EvalSuite) -> str:
    return lm.apply_chat_template([{"role": "user", "content": prompt}]) if suite.apply_chat_template else prompt


def finding(text: str, tokens: Sequence[int]) -> Literal["empty", "repeating"] | None:
    """What is odd about a text: nothing in it, or at its end one passage of up to LONGEST_PASSAGE tokens TIMES over.

    A passage of few tokens must go on for LONGEST_PASSAGE tokens at least: a row of dots is no fault yet.
    """
    if not text.strip():
        return "empty"
    return "repeating" if any(_ends_in_repetition(tokens, length) for length in range(1, LONGEST_PASSAGE + 1)) else None


def _ends_in_repetition(tokens: Sequence[int], length: int) -> bool:
    span = max(length * TIMES, LONGEST_PASSAGE)
    end = tokens[-span:]
    return len(end) == span and all(one == other for one, other in zip(end, end[length:], strict=False))
