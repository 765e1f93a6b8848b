"""Every shipped suite through one engine: `python suite_runner.py MODEL FOLDER` writes FOLDER/<suite>.json.

What the worker does for one request is done here for each suite, on as few documents as show every part of every task.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fp8pipe.config import EvalSuite, ServingWorkload, load_suite, shipped
from fp8pipe.evaluate.environment import library_versions, prepare_process, use_cpu_engine
from fp8pipe.evaluate.parts import Parts
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.evaluate.worker import Measurement

CONTEXT = 32768
DOCUMENTS = {"mmlu": 57, "leaderboard_bbh": 24, "leaderboard_math_hard": 7, "needle": 2, "hops": 2}
"""At least one of each sub-task; long prompts take seconds each."""
OTHERWISE = 3


def cut(suite: EvalSuite) -> EvalSuite:
    """The suite as shipped, on few documents, with short answers."""
    tasks = {
        name: spec.model_copy(update={"samples": DOCUMENTS.get(name, OTHERWISE), "documents": None, "subtasks": None})
        for name, spec in suite.tasks.items()
    }
    serving = suite.serving and ServingWorkload(num_prompts=3, input_len=64, output_len=4, max_concurrency=2)
    return suite.model_copy(update={"tasks": tasks, "generation": {"max_gen_toks": 12}, "serving": serving})


def request_for(suite: EvalSuite, model: str) -> EvalRequest:
    """As a baseline, which runs the tasks marked `repeat` twice."""
    return EvalRequest(
        role="baseline",
        model_id="tiny",
        model=model,
        fingerprint="sha",
        folder_identity=None,
        suite=suite,
        suite_digest=suite.digest(),
        limit=None,
        engine={"max_model_len": CONTEXT},
        versions=library_versions(),
        device_class="cpu",
    )


def main() -> None:
    """One engine, all suites."""
    model, folder = sys.argv[1], Path(sys.argv[2])
    prepare_process()
    use_cpu_engine()
    from fp8pipe.evaluate.engine import MeteredVLLM
    from fp8pipe.evaluate.tasks import load_tasks

    arguments = {"pretrained": model, "add_bos_token": True, "batch_size": "auto", "max_model_len": CONTEXT}
    lm = MeteredVLLM(send=lambda message: None, templated=False, **arguments)
    for name in shipped("suites"):
        suite = cut(load_suite(name))
        print(f"suite {name}", flush=True)
        request, tasks = request_for(suite, model), load_tasks(suite, limit=None)
        report = Measurement(lm, request, tasks, Parts(folder / name, request.parts_identity())).up_to(1)
        report.save(folder / f"{name}.json")


if __name__ == "__main__":
    main()
