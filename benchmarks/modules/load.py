"""The child process that proves checkpoints in vLLM, one after the other.

    python -m benchmarks.modules.load FOLDER... >> PROOFS

For each folder one line on stdout: {"folder", "proof": a ModuleProof or null, "seconds", "error": vLLM's message}.
Models are loaded by vLLM's own loader and no engine is started, which takes a second or two for each and needs no
processor of images or sound.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from torch import nn

from fp8pipe.evaluate.environment import import_architecture, prepare_process
from fp8pipe.records import PROOF_VERSION, ModuleOutput, ModuleProof


def main() -> None:
    """Command line."""
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print to stdout
    enter_world()
    for folder in sys.argv[1:]:
        answer: dict[str, object] = {"folder": folder, "proof": None, "seconds": 0.0, "error": ""}
        try:
            with loaded(Path(folder)) as model:
                started = time.monotonic()
                answer["proof"] = proof_of(model).model_dump(mode="json")
                answer["seconds"] = time.monotonic() - started
        except Exception as error:  # whatever vLLM raises on a checkpoint
            answer["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        lines.write(json.dumps(answer) + "\n")
        lines.flush()


def enter_world() -> None:
    """Make this process one that can load vLLM's models on the CPU, with the plugin's kernels."""
    prepare_process()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import torch
    from vllm.config import VllmConfig, set_current_vllm_config
    from vllm.distributed import init_distributed_environment

    from fp8pipe.evaluate.cpu_platform import register
    from fp8pipe.evaluate.stored_weights import watch_loading

    register()
    watch_loading()
    torch.accelerator.empty_cache = lambda: None  # as vLLM's runner on the CPU does: there is no accelerator
    store = Path(tempfile.mkdtemp(prefix="fp8pipe-")) / "store"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{store}", 0, "gloo")


@contextlib.contextmanager
def loaded(folder: Path) -> Iterator[nn.Module]:
    """vLLM's model with the weights in `folder`, as its engine has it before the first prompt."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import destroy_model_parallel, initialize_model_parallel
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model

    import_architecture(str(folder), False)
    config = EngineArgs(model=str(folder), enforce_eager=True, skip_tokenizer_init=True).create_engine_config()
    with set_current_vllm_config(config):
        initialize_model_parallel(1)  # for each model, since experts have a group of their own
        try:
            yield get_model(vllm_config=config)
        finally:
            destroy_model_parallel()


def proof_of(model: nn.Module) -> ModuleProof:
    """The proof as an evaluation would keep it."""
    from fp8pipe.evaluate.modules import prove

    return ModuleProof(version=PROOF_VERSION, modules=tuple(ModuleOutput(rank=0, **one) for one in prove(model)))


if __name__ == "__main__":
    main()
