"""The child process that loads checkpoints into real vLLM, one after the other, and saves their logits.

    python -m benchmarks.served.serve < REQUESTS

REQUESTS: one JSON object a line, {"folder", "kv_cache_dtype", "prompts", "vocabulary", "output": an .npz}. On stdout
one line each: {"message": ""}, or vLLM's error message. Everything else goes to stderr.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.served.answers import save_answers
from fp8pipe.evaluate.environment import CPU_ENGINE_ARGUMENTS, import_architecture, library_versions, prepare_process
from fp8pipe.machine.builds import is_cpu_build
from fp8pipe.oracle.vllm_probe import FOREIGN

if TYPE_CHECKING:
    from torch import nn
    from vllm import LLM

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 1,
    "num_gpu_blocks_override": 16,
    "enable_prefix_caching": False,
    "max_logprobs": -1,
    "logprobs_mode": "raw_logits",
    "enforce_eager": True,
    "disable_log_stats": True,
}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    prepare_process()
    import vllm  # noqa: F401  # before the heap is frozen

    gc.collect()
    gc.freeze()  # going through all objects of vLLM's imports after every model costs more than serving it
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps({"message": _serve(request)}) + "\n")
        answers.flush()


def _serve(request: dict[str, Any]) -> str:
    try:
        with _engine(request["folder"], request["kv_cache_dtype"]) as llm:
            logits, routing = _answers(llm, request["prompts"], request["vocabulary"])
    except FOREIGN as error:
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    save_answers(Path(request["output"]), logits, routing)
    return ""


@contextlib.contextmanager
def _engine(folder: str, kv_cache_dtype: str) -> Iterator[LLM]:
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    import_architecture(folder, False)
    on_cpu = CPU_ENGINE_ARGUMENTS if is_cpu_build(library_versions()["vllm"]) else {}
    llm = None
    try:
        llm = LLM(folder, **(on_cpu | ENGINE), kv_cache_dtype=kv_cache_dtype)
        yield llm
    finally:
        if llm is not None:
            llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def _answers(llm: LLM, prompts: list[list[int]], vocabulary: int) -> tuple[Any, Any]:
    """Logits [prompts x positions, vocabulary] and chosen experts [prompts x positions, layers, top_k] or None."""
    import numpy as np
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt

    wanted = SamplingParams(max_tokens=1, prompt_logprobs=-1, detokenize=False, temperature=0.0)
    rows: list[list[float]] = []
    experts: list[Any] = []
    for prompt in prompts:  # one forward pass each, so that the routers' choices are in the order of the tokens
        chosen: list[Any] = []
        llm.apply_model(lambda model, chosen=chosen: _listen(model, chosen))
        (output,) = llm.generate([TokensPrompt(prompt_token_ids=prompt)], wanted, use_tqdm=False)
        assert output.prompt_logprobs is not None
        rows += [[row[token].logprob for token in range(vocabulary)] for row in output.prompt_logprobs[1:] if row]
        if chosen:
            experts.append(np.stack([np.sort(layer[: len(prompt) - 1]) for layer in chosen], axis=1))
    return np.array(rows, dtype=np.float32), np.concatenate(experts) if experts else None


def _listen(model: nn.Module, chosen: list[Any]) -> None:
    """Have every router of `model` append the experts it chooses, layer by layer."""
    for module in model.modules():
        router = getattr(module, "router", None)
        if hasattr(router, "set_capture_fn"):
            router.set_capture_fn(lambda ids: chosen.append(ids.cpu().numpy().copy()))  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
