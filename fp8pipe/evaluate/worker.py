"""The child process of one evaluation: `python -m fp8pipe.evaluate.worker request.json`.

Reads the request, loads the tasks, starts vLLM in this process, runs lm-eval, writes report.json beside the request.
Progress and errors of fp8pipe's own kind go to the parent as JSON lines; everything else is on stdout and stderr, which
the parent keeps in worker.log.
"""

from __future__ import annotations

import os
import random
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fp8pipe
from fp8pipe.errors import EngineFailed, Fp8PipeError
from fp8pipe.evaluate.environment import library_versions, prepare_process, use_cpu_engine
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.evaluate.supervise import take_channel
from fp8pipe.records import EvalReport

if TYPE_CHECKING:
    from fp8pipe.evaluate.engine import MeteredVLLM, Tell
    from fp8pipe.evaluate.tasks import Subject

STDERR_RESAMPLES = 1000
"""Bootstrap draws for metrics that are no means; they serve lm-eval's table only, the gate resamples by itself."""


def main() -> None:
    """Entry point. Ends without tearing the engine down: the record is on disk, and the process is the clean-up."""
    path, tell = Path(sys.argv[1]), take_channel()
    try:
        report = measure(EvalRequest.load(path), tell)
    except Fp8PipeError as error:
        tell({"error": type(error).__name__, "message": str(error)})
        raise
    report.save(path.with_name("report.json"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def measure(request: EvalRequest, tell: Tell) -> EvalReport:
    """Everything between request and report."""
    started = time.monotonic()
    tell({"note": "loading tasks"})
    prepare_process()
    from fp8pipe.evaluate.tasks import load_subjects

    _seed_generators(request.suite.seed)
    subjects = load_subjects(request.suite, limit=request.limit)
    tell({"note": "starting vLLM"})
    lm = _start_engine(request, tell)
    ready = time.monotonic()
    tell({"note": "measuring"})
    results = _run(request, subjects, lm)
    done = time.monotonic()
    seconds = {"start": ready - started, "evaluate": done - ready, "total": done - started}
    return _report(request, subjects, lm, results, seconds)


def _seed_generators(seed: int) -> None:
    """As lm-eval does before it loads tasks: some shuffle while loading."""
    import numpy

    random.seed(seed)
    numpy.random.seed(seed)


def _start_engine(request: EvalRequest, tell: Tell) -> MeteredVLLM:
    use_cpu_engine()
    from fp8pipe.evaluate.engine import MeteredVLLM

    arguments = {"pretrained": request.model, "add_bos_token": request.suite.add_bos_token, "batch_size": "auto"}
    return MeteredVLLM(tell=tell, **arguments, **request.engine)


def _run(request: EvalRequest, subjects: list[Subject], lm: MeteredVLLM) -> dict[str, Any]:  # Any: lm-eval's results
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    evaluator.add_env_info = lambda storage: (
        None
    )  # asks pip, lscpu and git for seconds; the report has its own versions
    suite = request.suite
    scored: list[Any] = [item for subject in subjects for item in subject.scored()]  # Any: lm-eval declares no groups
    results = evaluator.simple_evaluate(
        model=lm,
        tasks=scored,
        task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
        samples={leaf: ids for subject in subjects for leaf, ids in subject.sample_ids().items()},
        gen_kwargs=dict(suite.generation) or None,
        apply_chat_template=suite.apply_chat_template,
        fewshot_as_multiturn=suite.apply_chat_template,
        log_samples=True,
        bootstrap_iters=STDERR_RESAMPLES,
        random_seed=suite.seed,
        numpy_random_seed=suite.seed,
        torch_random_seed=suite.seed,
        fewshot_random_seed=suite.seed,
    )
    if results is None:
        raise EngineFailed("lm-eval returned no results: this process is not its rank 0; unset LOCAL_RANK")
    return dict(results)


def _report(
    request: EvalRequest,
    subjects: list[Subject],
    lm: MeteredVLLM,
    results: dict[str, Any],  # Any: lm-eval's results
    seconds: dict[str, float],
) -> EvalReport:
    from hashlib import sha256

    from lm_eval.utils import make_table

    from fp8pipe.evaluate.engine import adds_bos, engine_facts, tokenizer_hash
    from fp8pipe.evaluate.results import task_result

    suite, seed = request.suite, request.suite.seed
    template = lm.hf_chat_template if suite.apply_chat_template else None
    return EvalReport(
        role=request.role,
        model_id=request.model_id,
        fingerprint=request.fingerprint,
        suite=suite.name,
        suite_digest=request.suite_digest,
        engine=engine_facts(lm, request.engine),
        tasks=tuple(task_result(subject, results, lm.cut) for subject in subjects),
        add_bos_token=adds_bos(lm),
        chat_template_hash=None if template is None else sha256(template.encode()).hexdigest(),
        tokenizer_hash=tokenizer_hash(lm),
        seeds=dict.fromkeys(("permutation", "random", "numpy", "torch", "fewshot", "engine"), seed),
        versions=library_versions() | {"fp8pipe": fp8pipe.__version__},
        table="\n".join(make_table(results, column) for column in ("results", "groups") if column in results),
        folder_identity=request.folder_identity,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
