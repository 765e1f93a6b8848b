"""How far checkpoints that transformers loads are from their source, on texts that did not calibrate them.

    python -m benchmarks.real_model.distance SOURCE TEXTS CHECKPOINT

On stdout: {"kl": mean over texts, "error": its standard error, "same": share of equal best tokens}; kl is the mean
KL divergence of next-token distributions from the source's, in nats per token.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

TEXTS, TOKENS = 24, 128
"""Texts compared, and the most tokens of each."""


def main() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source, texts, checkpoint = map(Path, sys.argv[1:])
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()[-TEXTS:]]
    both: list[Any] = [AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (source, checkpoint)]
    divergence, same = [], []
    with torch.inference_mode():
        for row in rows:
            ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(row, add_special_tokens=False).input_ids]])
            one, other = (model(ids[:, :TOKENS]).logits[0].float().log_softmax(-1) for model in both)
            divergence.append((one.exp() * (one - other)).sum(-1).mean())
            same.append((one.argmax(-1) == other.argmax(-1)).float().mean())
    found = torch.stack(divergence)
    error = float(found.std()) / len(found) ** 0.5
    print(json.dumps({"kl": float(found.mean()), "error": error, "same": float(torch.stack(same).mean())}))


if __name__ == "__main__":
    main()
