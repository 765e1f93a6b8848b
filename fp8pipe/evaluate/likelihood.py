"""Log-likelihoods of answers, from vLLM: in windows of bounded memory, and asking for no more than is used.

lm-eval asks for the logprobs of every token of every prompt, all prompts at once, and holds them until the last has
come: 588 bytes a token. Here an answer of one token is the next token of its context: all answers to one context are
one request, which needs no logprobs of its prompt and may read vLLM's prefix cache. Longer answers are scored as
lm-eval does it, a window of them at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from vllm import SamplingParams
from vllm.sampling_params import MAX_LOGPROB_TOKEN_IDS

from fp8pipe.errors import InputError

WINDOW_TOKENS = 1 << 18
"""Prompt tokens whose logprobs are in memory together: 0.15 GB. Enough to keep an engine busy, which idles a little at
the end of each window."""

Scored = tuple[float, bool]
"""Log-likelihood of an answer in nats, and whether it is what greedy decoding gives."""

Generate = Callable[[list[list[int]], list[SamplingParams]], Sequence[Any]]
"""vLLM's outputs (RequestOutput) for token ids and how to sample after them, in their order."""


@dataclass(slots=True)
class _Query:
    """One request to the engine, and the questions it answers."""

    prompt: list[int]
    sampling: SamplingParams
    asked: dict[int, list[int]] = field(default_factory=dict)
    """Questions, by position, for each possible next token; for a scored answer, by its number of tokens."""

    @property
    def scores_prompt(self) -> bool:
        return self.sampling.prompt_logprobs is not None


def likelihoods(
    questions: Sequence[tuple[list[int], list[int]]],
    generate: Generate,
    *,
    max_length: int,
    shuffle: random.Random | None = None,
    on_window: Callable[[int, int], None] = lambda before, total: None,
) -> list[Scored]:
    """For each question, token ids of a context of at least one and of an answer, how likely the answer is after it.

    A context is cut from the left so that context and answer have at most max_length - 1 tokens, as vLLM generates one
    more. shuffle: draws the order in which prompts enter the engine. on_window(requests done, of all) is called before
    each window. Raises InputError for an answer that leaves no room for a context."""
    queries = [*_next_tokens(questions, max_length), *_whole_answers(questions, max_length)]
    if shuffle is not None:
        shuffle.shuffle(queries)
    found: dict[int, Scored] = {}
    done = 0
    for window in _windows(queries):
        on_window(done, len(queries))
        outputs = generate([query.prompt for query in window], [query.sampling for query in window])
        for query, output in zip(window, outputs, strict=True):
            read = _score_of if query.scores_prompt else _next_score
            for asked, places in query.asked.items():
                found |= dict.fromkeys(places, read(output, asked))
        done += len(window)
    return [found[place] for place in range(len(questions))]


def _next_tokens(questions: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[_Query]:
    """Requests for the answers of one token, in an order that keeps common beginnings together."""
    wanted: dict[tuple[int, ...], dict[int, list[int]]] = {}
    for place, (context, answer) in enumerate(questions):
        if len(answer) == 1:
            tokens = _cut(context, answer, max_length)
            wanted.setdefault(tuple(tokens[:-1]), {}).setdefault(answer[0], []).append(place)
    queries = []
    for context, asked in sorted(wanted.items()):
        ids = sorted(asked)
        for part in (ids[i : i + MAX_LOGPROB_TOKEN_IDS] for i in range(0, len(ids), MAX_LOGPROB_TOKEN_IDS)):
            sampling = SamplingParams(temperature=0, max_tokens=1, detokenize=False, logprob_token_ids=part)
            queries.append(_Query(list(context), sampling, {token: asked[token] for token in part}))
    return queries


def _whole_answers(questions: Sequence[tuple[list[int], list[int]]], max_length: int) -> list[_Query]:
    """Requests for the longer answers, the longest first, as lm-eval sorts them."""
    sampling = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False, flat_logprobs=True)
    queries = [
        _Query(_cut(context, answer, max_length), sampling, {len(answer): [place]})
        for place, (context, answer) in enumerate(questions)
        if len(answer) != 1
    ]
    return sorted(queries, key=lambda query: (-len(query.prompt), query.prompt))


def _cut(context: list[int], answer: list[int], max_length: int) -> list[int]:
    if len(answer) + 1 >= max_length:
        raise InputError(
            f"an answer of {len(answer)} tokens leaves no room for its context in a max_model_len of {max_length}; "
            "raise max_model_len in the suite's engine"
        )
    return (context + answer)[-(max_length - 1) :]


def _windows(queries: list[_Query]) -> Iterator[list[_Query]]:
    window: list[_Query] = []
    tokens = 0
    for query in queries:
        if window and tokens + len(query.prompt) > WINDOW_TOKENS:
            yield window
            window, tokens = [], 0
        window.append(query)
        tokens += len(query.prompt)
    if window:
        yield window


def _next_score(output: Any, token: int) -> Scored:
    sampled = output.outputs[0]
    logprobs = sampled.logprobs[0]
    return logprobs[token].logprob, logprobs[token].logprob >= logprobs[sampled.token_ids[0]].logprob


def _score_of(output: Any, tokens: int) -> Scored:
    """The last `tokens` of the prompt: each is the first of its position, before the most likely token there."""
    flat = output.prompt_logprobs
    total, is_greedy = 0.0, True
    for begin, end in list(zip(flat.start_indices, flat.end_indices, strict=True))[len(flat) - tokens :]:
        total += flat.logprobs[begin]
        is_greedy = is_greedy and flat.logprobs[begin] >= max(flat.logprobs[begin:end])
    return total, is_greedy
