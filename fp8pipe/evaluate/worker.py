"""The child process of one evaluation: `python -m fp8pipe.evaluate.worker request.json`.

It reads the request, loads the tasks, starts vLLM in this process, runs lm-eval task by task, look by look, and writes
report.json beside the request. After a look it asks the parent whether to go on with the next, in the same engine. Each
finished task is kept in parts/ at once, so that an interrupted evaluation resumes there.
Progress and errors of fp8pipe's own kind go to the parent as messages; all output goes to the parent's worker.log.
"""

from __future__ import annotations

import os
import random
import sys
import time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fp8pipe
from fp8pipe.errors import EngineFailed
from fp8pipe.evaluate import looks
from fp8pipe.evaluate.cpu_platform import NOTES_WEIGHTS
from fp8pipe.evaluate.environment import library_versions, prepare_process, use_cpu_engine
from fp8pipe.evaluate.flips import flip_rates, keep_rates, known_rates
from fp8pipe.evaluate.parts import ROWS, Part, Parts, joined, table_rows
from fp8pipe.evaluate.request import EvalRequest, need_for
from fp8pipe.hub.client import forget_token
from fp8pipe.machine import device
from fp8pipe.machine.child import reporting_errors
from fp8pipe.machine.supervise import Channel, Send, take_channel
from fp8pipe.records import (
    PROOF_VERSION,
    EngineFacts,
    EvalReport,
    FlipRate,
    ModuleOutput,
    ModuleProof,
    SampleText,
    ServingFigures,
)

if TYPE_CHECKING:
    from fp8pipe.evaluate.engine import MeteredVLLM
    from fp8pipe.evaluate.tasks import LoadedTask

STDERR_RESAMPLES = 1000
"""Bootstrap draws for the standard errors in lm-eval's table, for metrics that are not means. The gate does not use
them."""


def main() -> None:
    """Entry point. Exits without shutting the engine down: the reports are on disk, nothing else has to be saved."""
    path, channel = Path(sys.argv[1]), take_channel()
    with reporting_errors(channel):
        measure(EvalRequest.load(path), channel, path.parent)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def measure(request: EvalRequest, channel: Channel, folder: Path) -> None:
    """Start the engine, measure look by look, and save the report of each; after every look but the last, the parent
    answers whether to go on. Finished parts of tasks are kept in `folder`/parts. Looks with a report are left out."""
    started = time.monotonic()
    channel({"note": "loading tasks"})
    device.require([need_for(request)], starts=True)
    prepare_process()
    from fp8pipe.evaluate.tasks import load_tasks

    tasks = load_tasks(request.suite, limit=request.limit, looks=request.looks)
    forget_token()  # nothing is asked of the Hub any more, and a model may bring its own code
    lm = _start_engine(request, channel)
    ready = time.monotonic()
    measurement = Measurement(lm, request, tasks, Parts(folder / "parts", request.parts_identity()))
    for look in range(1, len(request.looks) + 1):
        asked = request.up_to(look)
        if looks.find(folder, asked) is not None:
            continue
        report = measurement.up_to(look)
        done = time.monotonic()
        seconds = {"start": ready - started, "evaluate": done - ready, "total": done - started}
        looks.keep(folder, asked, report.model_copy(update={"seconds": seconds}))
        if look < len(request.looks) and channel.ask({"look": look}) != looks.GO_ON:
            break


def _start_engine(request: EvalRequest, send: Send) -> MeteredVLLM:
    send({"note": "importing vLLM"})
    os.environ[NOTES_WEIGHTS] = "1"
    use_cpu_engine()
    engine = request.engine | request.reduced
    if (copies := int(engine.pop("data_parallel_size", 1))) > 1:
        from fp8pipe.evaluate.copies import use_copies

        use_copies(copies)
    from fp8pipe.evaluate.engine import MeteredVLLM

    arguments = {"pretrained": request.model, "add_bos_token": request.suite.add_bos_token, "batch_size": "auto"}
    templated = request.suite.apply_chat_template
    return MeteredVLLM(send=send, templated=templated, **arguments, **engine)


class Measurement:
    """A measurement on a running engine: module proof and samples at once, then tasks look by look."""

    def __init__(self, lm: MeteredVLLM, request: EvalRequest, tasks: list[LoadedTask], parts: Parts) -> None:
        from fp8pipe.evaluate.engine import engine_facts
        from fp8pipe.evaluate.sample_texts import sample_texts
        from fp8pipe.evaluate.serving import check_fits

        self._lm, self._request, self._tasks, self._parts = lm, request, tasks, parts
        self._facts = engine_facts(lm, request.engine | request.reduced)
        if request.suite.serving is not None:
            check_fits(request.suite.serving, self._facts.max_model_len)
        self._proof = _proof(lm, parts)
        lm.doing = "sample generation"
        self._samples = sample_texts(lm, request.suite)
        self._flips: tuple[FlipRate, ...] | None = None

    def up_to(self, look: int) -> EvalReport:
        """Tasks up to this look; a baseline's second run of the first look; serving figures, timed once."""
        lm, request, parts = self._lm, self._request, self._parts
        chains = [_scored(request, task.up_to(look), lm, parts) for task in self._tasks]
        if self._flips is None:
            self._flips = _flips(request, self._tasks, lm, parts) if request.role == "baseline" else ()
        return _report(
            request,
            lm,
            self._facts,
            chains,
            proof=self._proof,
            samples=self._samples,
            flips=self._flips,
            serving=_served(request, lm, parts, comparable=self._facts.device_class != "cpu"),
        )


def _proof(lm: MeteredVLLM, parts: Parts) -> ModuleProof:
    """Run every layer on its seeded input, once for all looks."""
    from fp8pipe.evaluate.modules import prove

    known = parts.find_proof()
    if known is None:
        lm.note("every module through its kernel")
        found = [(rank, one) for rank, seen in enumerate(lm.model.apply_model(prove)) for one in seen]
        modules = tuple(ModuleOutput(rank=rank, **one) for rank, one in found)
        known = ModuleProof(version=PROOF_VERSION, modules=modules)
        parts.save_proof(known)
    return known


def _scored(request: EvalRequest, task: LoadedTask, lm: MeteredVLLM, parts: Parts) -> list[Part]:
    """All parts of one task. Those that are missing are scored now, look by look."""
    chain = parts.find(task.name, task.stops, whole_looks=task.draws_examples)
    lm.doing = f"{task.name} ({list(request.suite.tasks).index(task.name) + 1} of {len(request.suite.tasks)})"
    for stop in task.stops:
        start = chain[-1].stop if chain else 0
        if start < stop:
            chain.append(_score(request, task, lm, parts, start, stop))
    return chain


def _score(request: EvalRequest, task: LoadedTask, lm: MeteredVLLM, parts: Parts, start: int, stop: int) -> Part:
    """Score one range of a task's documents, and save it."""
    from fp8pipe.evaluate.results import task_result

    asked = replace(task, picks=task.picks[start:stop])
    results = _run(request, asked, lm)
    part = Part(
        identity=parts.identity,
        start=start,
        stop=stop,
        result=task_result(asked, results, lm.cut),
        rows={name: _plain(results[name]) for name in ROWS if name in results},
    )
    parts.save(task.name, part)
    return part


def _plain(value: Any) -> Any:  # Any: lm-eval's results, in which numbers may be numpy scalars
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    return value.item() if hasattr(value, "item") else value


def _flips(request: EvalRequest, tasks: list[LoadedTask], lm: MeteredVLLM, parts: Parts) -> tuple[FlipRate, ...]:
    """Score the documents of the first look again, of the tasks marked `repeat`: part by part, with the prompts in
    another order and so in other batches. Tasks whose rates are known are not scored."""
    found: list[FlipRate] = []
    again = parts.again()
    for task in (task.up_to(1) for task in tasks if request.suite.tasks[task.name].repeat):
        chain = _scored(request, task, lm, parts)
        begun = {(part.start, part.stop): part for part in again.find(task.name, task.stops)}
        if not begun and (known := known_rates(request, task.name)):
            found += known
            continue
        second: list[Part] = []
        lm.doing = f"{task.name} again, in other batches"
        lm.shuffle = random.Random(request.suite.seed)
        for start, stop in ((part.start, part.stop) for part in chain):
            lm.model.reset_prefix_cache()
            second.append(begun.get((start, stop)) or _score(request, task, lm, again, start, stop))
        lm.shuffle = None
        rates = flip_rates(joined(chain), joined(second))
        keep_rates(request, task.name, rates)
        found += rates
    return tuple(found)


def _served(request: EvalRequest, lm: MeteredVLLM, parts: Parts, *, comparable: bool) -> ServingFigures | None:
    """Time the suite's workload, once for all looks."""
    from fp8pipe.evaluate.serving import serving_figures

    suite = request.suite
    if suite.serving is None:
        return None
    known = parts.find_timing()
    if known is None:
        lm.doing = "serving figures"
        known = serving_figures(lm, suite.serving, suite.seed, comparable=comparable)
        parts.save_timing(known)
    return known


def _run(request: EvalRequest, task: LoadedTask, lm: MeteredVLLM) -> dict[str, Any]:  # Any: lm-eval's results
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from fp8pipe.evaluate.engine import sliding_windows

    # lm-eval spends seconds on asking pip, lscpu and git; the report has its own versions
    evaluator.add_env_info = lambda storage: None
    suite = request.suite
    scored: list[Any] = list(task.scored())  # Any: lm-eval declares no groups
    lm.cut.clear()
    lm.windows = sliding_windows(task.leaves)
    results = evaluator.simple_evaluate(
        model=lm,
        tasks=scored,
        task_manager=TaskManager(include_defaults=False),  # the tasks are loaded already
        samples=task.sample_ids(),
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
        raise EngineFailed("lm-eval returned no results, because this process is not its rank 0; unset LOCAL_RANK")
    return dict(results)


def _report(
    request: EvalRequest,
    lm: MeteredVLLM,
    facts: EngineFacts,
    chains: list[list[Part]],
    *,
    proof: ModuleProof,
    samples: tuple[SampleText, ...],
    flips: tuple[FlipRate, ...],
    serving: ServingFigures | None,
) -> EvalReport:
    from fp8pipe.evaluate.engine import adds_bos, tokenizer_hash

    suite, seed = request.suite, request.suite.seed
    template = lm.hf_chat_template if suite.apply_chat_template else None
    return EvalReport(
        role=request.role,
        model_id=request.model_id,
        fingerprint=request.fingerprint,
        suite=suite.name,
        suite_digest=request.suite_digest,
        engine=facts,
        tasks=tuple(joined(chain) for chain in chains),
        add_bos_token=adds_bos(lm),
        chat_template_hash=None if template is None else sha256(template.encode()).hexdigest(),
        tokenizer_hash=tokenizer_hash(lm),
        seeds=dict.fromkeys(("permutation", "random", "numpy", "torch", "fewshot", "engine"), seed),
        versions=library_versions() | {"fp8pipe": fp8pipe.__version__},
        machine=device.particulars(),
        table=_table(list(suite.tasks), chains),
        folder_identity=request.folder_identity,
        proof=proof,
        samples=samples,
        flips=flips,
        serving=serving,
        retries=request.retries,
        seconds={},
    )


def _table(names: list[str], chains: list[list[Part]]) -> str:
    """lm-eval's own table of all tasks, and that of groups if there are any."""
    from lm_eval.utils import make_table

    together: dict[str, dict[str, Any]] = {}
    for name, chain in zip(names, chains, strict=True):
        for column, rows in table_rows(name, chain).items():
            together.setdefault(column, {}).update(rows)
    return "\n".join(make_table(together, column) for column in ("results", "groups") if together.get(column))


if __name__ == "__main__":
    main()
