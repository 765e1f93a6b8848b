"""Serving figures: a fixed workload, timed with vLLM's own benchmark on the engine that has just been measured.

vLLM's `benchmark` sends requests through a function that talks to a server. Here that function passes them to the
engine in this process, so no second engine starts and only the engine is timed. Prompts are random tokens of one length
from vLLM's own dataset, answers have one length, and a fixed number of requests are in the engine at once.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from fp8pipe.config import ServingWorkload
from fp8pipe.errors import EngineFailed, InputError
from fp8pipe.evaluate.copies import Copies
from fp8pipe.records import ServingFigures

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from tqdm import tqdm
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.benchmarks.datasets import SampleRequest
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncInput, RequestFuncOutput

    from fp8pipe.evaluate.engine import MeteredVLLM

BACKEND = "fp8pipe-engine"
NOWHERE = "http://127.0.0.1:9"
"""The address at which `benchmark` looks for a server's counters; nothing answers there."""


def serving_figures(lm: MeteredVLLM, workload: ServingWorkload, seed: int, *, comparable: bool) -> ServingFigures:
    """Time `workload`; of several copies of an engine, one. Raises EngineFailed if a request fails."""
    given = (lm.tokenizer, _requests(lm, workload, seed), workload)
    result = lm.model.on_first(_timed, *given) if isinstance(lm.model, Copies) else _timed(lm.model, *given)
    if result["completed"] != workload.num_prompts:
        errors = [error for error in result["errors"] if error]
        count = f"{result['completed']} of {workload.num_prompts}"
        raise EngineFailed(f"serving: {count} requests completed; the first error: {errors[:1]}")
    throughputs = ("request_throughput", "output_throughput", "total_token_throughput")
    times = [f"{kind}_{name}_ms" for name in ("ttft", "itl") for kind in ("mean", "median", "p99")]
    figures = {name: float(result[name]) for name in (*throughputs, *times)}
    return ServingFigures(workload=workload.model_dump() | {"seed": seed}, comparable=comparable, **figures)


def _timed(
    engine: LLM, tokenizer: Any, requests: list[SampleRequest], workload: ServingWorkload
) -> dict[str, Any]:  # Any: of whatever class; the figures of vLLM's benchmark
    """What vLLM's benchmark says of the engine in this process."""
    from vllm.benchmarks import serve
    from vllm.benchmarks.lib.endpoint_request_func import ASYNC_REQUEST_FUNCS

    engine.reset_prefix_cache()
    ASYNC_REQUEST_FUNCS[BACKEND] = EngineRequests(engine.llm_engine)
    return asyncio.run(
        serve.benchmark(
            task_type=serve.TaskType.GENERATION,
            endpoint_type=BACKEND,
            api_url=NOWHERE,
            base_url=NOWHERE,
            model_id="model",
            model_name="model",
            tokenizer=tokenizer,
            input_requests=requests,
            logprobs=None,
            request_rate=float("inf"),
            burstiness=1.0,
            disable_tqdm=True,
            num_warmups=workload.max_concurrency,
            profile=False,
            selected_percentile_metrics=["ttft", "itl"],
            selected_percentiles=[99.0],
            ignore_eos=True,
            goodput_config_dict={},
            max_concurrency=workload.max_concurrency,
            lora_modules=None,
            extra_headers=None,
            extra_body=None,
            ready_check_timeout_sec=0,
        )
    )


def check_fits(workload: ServingWorkload, context: int) -> None:
    """Raise InputError if prompt and answer together are longer than `context` tokens."""
    needed = workload.input_len + workload.output_len
    if needed > context:
        raise InputError(
            f"serving: input_len + output_len is {needed} tokens, the engine's context is {context}; lower them in the "
            "suite"
        )


def _requests(lm: MeteredVLLM, workload: ServingWorkload, seed: int) -> list[SampleRequest]:
    """vLLM's random prompts, encoded, so that their lengths are exactly as requested."""
    from vllm.benchmarks.datasets import RandomDataset

    drawn = RandomDataset(random_seed=seed).sample(
        tokenizer=lm.tokenizer,
        num_requests=workload.num_prompts,
        input_len=workload.input_len,
        output_len=workload.output_len,
    )
    tokens = [lm.tok_encode(request.prompt)[: workload.input_len] for request in drawn]
    return [replace(r, prompt=ids, prompt_len=len(ids)) for r, ids in zip(drawn, tokens, strict=True)]


class EngineRequests:
    """A request function for vLLM's benchmark that runs the engine in this process."""

    def __init__(self, engine: Any) -> None:  # Any: vLLM's LLMEngine, built by lm-eval
        self._engine = engine
        self._waiting: dict[str, asyncio.Queue[Any]] = {}
        self._stepping: asyncio.Task[None] | None = None
        self._count = 0

    async def __call__(
        self, request_func_input: RequestFuncInput, session: ClientSession, pbar: tqdm[Any] | None = None
    ) -> RequestFuncOutput:
        """Time one request token by token, as vLLM's own functions do over HTTP."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
        from vllm.sampling_params import RequestOutputKind

        wanted = SamplingParams(
            temperature=0.0,
            max_tokens=request_func_input.output_len,
            ignore_eos=request_func_input.ignore_eos,
            output_kind=RequestOutputKind.DELTA,
        )
        started = last = time.perf_counter()
        result = RequestFuncOutput(prompt_len=request_func_input.prompt_len, start_time=started)
        outputs = self._submit(TokensPrompt(prompt_token_ids=cast(list[int], request_func_input.prompt)), wanted)
        finished = False
        while not finished:
            output = await outputs.get()
            if isinstance(output, Exception):
                raise output
            now = time.perf_counter()
            new, finished = len(output.outputs[0].token_ids), output.finished
            if new and not result.output_tokens:
                result.ttft = now - started
            elif new:
                result.itl.append(now - last)
            result.output_tokens += new
            result.generated_text += output.outputs[0].text
            last = now
        result.latency, result.success = last - started, True
        return result

    def _submit(self, prompt: TokensPrompt, wanted: SamplingParams) -> asyncio.Queue[Any]:
        self._count += 1
        name = f"serving-{self._count}"
        self._waiting[name] = asyncio.Queue()
        self._engine.add_request(name, prompt, wanted)
        if self._stepping is None or self._stepping.done():
            self._stepping = asyncio.create_task(self._step())
        return self._waiting[name]

    async def _step(self) -> None:
        """Step the engine while it has requests, letting the waiting requests run between steps.

        Nothing awaits this task, so an error of the engine is passed to all waiting requests.
        """
        try:
            while self._engine.has_unfinished_requests():
                for output in self._engine.step():
                    self._waiting[output.request_id].put_nowait(output)
                    if output.finished:
                        del self._waiting[output.request_id]
                await asyncio.sleep(0)
        except Exception as error:
            for queue in self._waiting.values():
                queue.put_nowait(error)
