"""lm-eval's own command line, in the set-up that fp8pipe evaluates in: to verify a reported accuracy by hand.

    python -m fp8pipe.evaluate.lm_eval run --model vllm --model_args pretrained=DIR,max_model_len=2048 --tasks gsm8k

ARGS go to lm-eval unchanged. Around it: the version answer that lm-eval needs under vLLM's CPU build, the plugin
`fp8pipe_cpu` (which vLLM loads by itself), the environment variables of `environment.py` where they are not set, and on
the CPU platform the engine arguments `environment.CPU_ENGINE_ARGUMENTS` where `--model_args` names none: enforce_eager,
gpu_memory_utilization=0.3, distributed_executor_backend=uni. On a GPU vLLM's own defaults hold.
"""

from __future__ import annotations

import sys

from fp8pipe.evaluate.environment import prepare_process, use_cpu_engine

_WITHOUT_ENGINE = {"ls", "validate", "-h", "--help"}
"""First arguments that start no model, and need not wait for vLLM's import."""


def main() -> None:
    """Entry point of `python -m fp8pipe.evaluate.lm_eval`."""
    prepare_process()
    if len(sys.argv) > 1 and sys.argv[1] not in _WITHOUT_ENGINE:
        use_cpu_engine()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
