"""The sample generation: how the model continues fixed prompts, before anything is measured.

A checkpoint with wrong scales often loads and serves, but says nothing, or repeats the same words without end. In: the
engine and the suite's prompts. Out: one SampleText per prompt, with a finding for such text.
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
"""Tokens of the longest passage that is checked for repetition."""
TIMES = 4
"""How many times in a row a passage must occur to count as repeating."""


def sample_texts(lm: MeteredVLLM, suite: EvalSuite) -> tuple[SampleText, ...]:
    """Greedy continuations of the suite's prompts, through the chat template if the suite applies it."""
    from vllm import SamplingParams, TokensPrompt

    if not suite.sample_prompts:
        return ()
    texts = [_templated(lm, prompt, suite) for prompt in suite.sample_prompts]
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


def _templated(lm: MeteredVLLM, prompt: str, suite: EvalSuite) -> str:
    return lm.apply_chat_template([{"role": "user", "content": prompt}]) if suite.apply_chat_template else prompt


def finding(text: str, tokens: Sequence[int]) -> Literal["empty", "repeating"] | None:
    """`empty` for white space only; `repeating` for a passage of up to LONGEST_PASSAGE tokens that ends the text TIMES
    over.

    The repetition must span at least LONGEST_PASSAGE tokens, so that a short row of dots is not a finding.
    """
    if not text.strip():
        return "empty"
    return "repeating" if any(_ends_in_repetition(tokens, length) for length in range(1, LONGEST_PASSAGE + 1)) else None


def _ends_in_repetition(tokens: Sequence[int], length: int) -> bool:
    span = max(length * TIMES, LONGEST_PASSAGE)
    end = tokens[-span:]
    return len(end) == span and all(one == other for one, other in zip(end, end[length:], strict=False))
