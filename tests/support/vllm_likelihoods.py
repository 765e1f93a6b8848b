"""Child process: log-likelihoods from real vLLM, by lm-eval's own method and by ours.

    python vllm_likelihoods.py MODEL ANSWER

ANSWER: {"theirs": [[nats, greedy], ...], "ours": ..., "shuffled": ..., "requests": how many requests ours were}."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any


def questions(vocabulary: int) -> list[tuple[None, list[int], list[int]]]:
    """Answers of one token and of several, to contexts that are shared, short, or too long for the engine."""
    draw = random.Random(0)
    contexts = [[draw.randrange(2, vocabulary) for _ in range(draw.choice((1, 9, 40, 200)))] for _ in range(24)]
    lengths = (1, 1, 1, 1, 2, 7)
    asked = [
        (None, context, [draw.randrange(2, vocabulary) for _ in range(n)]) for context in contexts for n in lengths
    ]
    return draw.sample(asked, len(asked))


def main() -> None:
    from fp8pipe.evaluate.environment import prepare_process, use_cpu_engine

    prepare_process()
    use_cpu_engine()
    from fp8pipe.evaluate import engine, likelihood

    model, path = Path(sys.argv[1]), Path(sys.argv[2])
    arguments = {"pretrained": str(model), "add_bos_token": True, "batch_size": "auto", "max_model_len": 128}
    lm = engine.MeteredVLLM(send=lambda message: None, templated=False, **arguments)
    asked = questions(len(lm.tokenizer))
    theirs: Any = engine._VLLM._loglikelihood_tokens(lm, asked)
    likelihood.WINDOW_TOKENS = 300
    ours = lm._loglikelihood_tokens(asked)
    lm.shuffle = random.Random(1)
    answer = {"theirs": theirs, "ours": ours, "shuffled": lm._loglikelihood_tokens(asked)}
    path.write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
