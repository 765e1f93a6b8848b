"""lm-eval's own command line, in the environment that fp8pipe evaluates in: to reproduce a reported score.

    python -m fp8pipe.evaluate.lm_eval run --model vllm --model_args pretrained=DIR,max_model_len=2048 --tasks gsm8k

Arguments go to lm-eval unchanged. The environment supplies vLLM's version, which lm-eval cannot find under the CPU
build, and the variables of `environment.py` that are not set; vLLM loads the plugin `fp8pipe_cpu` by itself. On the CPU
platform, `environment.cpu_engine_arguments` are the defaults of `--model_args`: enforce_eager=True,
gpu_memory_utilization=0.3, distributed_executor_backend=uni (mp for several ranks). On a GPU they are vLLM's own.
"""

from __future__ import annotations

import sys

from fp8pipe.evaluate.environment import prepare_process, use_cpu_engine

_WITHOUT_ENGINE = {"ls", "validate", "-h", "--help"}
"""First arguments that start no model, so that vLLM need not be imported."""


def main() -> None:
    """Entry point of `python -m fp8pipe.evaluate.lm_eval`."""
    prepare_process()
    if len(sys.argv) > 1 and sys.argv[1] not in _WITHOUT_ENGINE:
        use_cpu_engine()
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
