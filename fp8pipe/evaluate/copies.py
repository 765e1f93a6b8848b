"""Several copies of the engine, each in a process and on devices of its own, behind the face of one.

vLLM's `LLM` refuses a `data_parallel_size`, and lm-eval starts all engines again with Ray for each batch of requests.
Here all copies start at the same time, once, and each answers every n-th request. A copy is the process
`python -m fp8pipe.evaluate.copies FD`. It reads function calls from a pipe, calls each function with its engine, and
writes the result to the pipe. It ends when the pipe is closed.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from multiprocessing.connection import Connection, Pipe, wait
from types import SimpleNamespace
from typing import Any, Literal

from fp8pipe.config import Parallel
from fp8pipe.evaluate.bars import reporting_bar
from fp8pipe.evaluate.environment import BINDING, engine_class, prepare_process, processor_shares
from fp8pipe.machine.gpus import visible

Message = tuple[Literal["answer", "error", "progress"], Any]
"""What a copy sends: an answer, the words of an error, or how many requests are done."""


def use_copies(count: int) -> None:
    """Make the `LLM` that lm-eval creates so many copies of one."""
    from lm_eval.models import vllm_causallms

    vllm_causallms.LLM = functools.partial(Copies, count)  # pyright: ignore[reportAttributeAccessIssue]


class Copies:
    """What lm-eval and the worker use of vLLM's `LLM`."""

    def __init__(self, copies: int, **arguments: Any) -> None:  # Any: vLLM's engine arguments
        """arguments: of each copy. Raises RuntimeError for one that does not start, and as vLLM does for what it sees
        before it loads a model."""
        from vllm.engine.arg_utils import EngineArgs

        self._pipes: list[Connection] = []
        self._processes: list[subprocess.Popen[bytes]] = []
        for environ in _environments(copies, Parallel.of(arguments).copy_devices):
            ours, theirs = Pipe()
            command = [sys.executable, "-m", "fp8pipe.evaluate.copies", str(theirs.fileno())]
            self._processes.append(subprocess.Popen(command, env=os.environ | environ, pass_fds=(theirs.fileno(),)))
            theirs.close()
            ours.send(arguments)
            self._pipes.append(ours)
        # Made here as each copy makes it: one that has loaded a model holds its layers, and cannot be sent.
        config = EngineArgs(**arguments).create_engine_config()
        self._answers(range(copies))
        self.llm_engine = SimpleNamespace(vllm_config=config, model_config=config.model_config)

    def generate(
        self,
        prompts: Sequence[Any],  # Any: vLLM's classes, which are imported late
        sampling_params: Any = None,
        *,
        use_tqdm: Any = None,
        lora_request: Any = None,
    ) -> list[Any]:
        """As `LLM.generate`: outputs in the order of the prompts. use_tqdm: class of a progress bar, or None."""
        each = sampling_params if isinstance(sampling_params, list) else [sampling_params] * len(prompts)
        busy = range(min(len(self._pipes), len(prompts)))
        shares = [slice(place, None, len(self._pipes)) for place in busy]
        for place, share in zip(busy, shares, strict=True):
            self._ask(place, _generate, prompts[share], each[share], lora_request)
        outputs: list[Any] = [None] * len(prompts)
        with contextlib.ExitStack() as stack:
            bar = stack.enter_context(use_tqdm(total=len(prompts), desc="Processed prompts")) if use_tqdm else None
            answers = self._answers(busy, lambda: bar and bar.update(1))
        for share, answer in zip(shares, answers, strict=True):
            outputs[share] = answer
        return outputs

    def apply_model(self, function: Callable[[Any], Any]) -> list[Any]:
        """As `LLM.apply_model`: an answer of each worker of each copy."""
        return [answer for answers in self._all(_apply_model, function) for answer in answers]

    def reset_prefix_cache(self) -> None:
        """As `LLM.reset_prefix_cache`, in all copies."""
        self._all(_reset_prefix_cache)

    def on_first(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """function(engine, *arguments), in the first copy alone."""
        self._ask(0, function, *arguments)
        return self._answers([0])[0]

    def _all(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        everyone = range(len(self._pipes))
        for place in everyone:
            self._ask(place, function, *arguments)
        return self._answers(everyone)

    def _ask(self, place: int, function: Callable[..., Any], *arguments: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended: `_answers` says so
            self._pipes[place].send((function, arguments))

    def _answers(self, places: Iterable[int], on_progress: Callable[[], object] = lambda: None) -> list[Any]:
        """What these copies answer to what they were asked. Raises the first error that one sends, once all copies
        have ended: the last words in the log are then those of the error."""
        found: dict[int, Any] = {}
        waiting = {self._pipes[place]: place for place in places}
        order = list(waiting.values())
        while waiting:
            for pipe in wait(list(waiting)):
                assert isinstance(pipe, Connection)
                where = f"copy {waiting[pipe] + 1} of {len(self._pipes)}"
                try:
                    kind, content = pipe.recv()
                except (EOFError, ConnectionResetError):
                    self._kill()
                    raise RuntimeError(f"{where} of the engine ended before it answered") from None
                if kind == "progress":
                    on_progress()
                elif kind == "answer":
                    found[waiting.pop(pipe)] = content
                else:
                    self._kill()
                    raise RuntimeError(f"{where} of the engine: {content}")
        return [found[place] for place in order]

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()


def _environments(copies: int, devices: int) -> list[dict[str, str]]:
    """Environment variables that show each copy its own devices: GPUs, or an equal share of the processors."""
    if gpus := [gpu.uuid for gpu in visible()]:
        shares = [gpus[place * devices : (place + 1) * devices] for place in range(copies)]
        return [{"CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares]
    shares = processor_shares(copies * devices)
    of_copies = [shares[place * devices : (place + 1) * devices] for place in range(copies)]
    return [{BINDING: "|".join(share), "OMP_NUM_THREADS": str(share[0].count(",") + 1)} for share in of_copies]


# ---------------------------------------------------------------------------------------------- in a copy


def _generate(engine: Any, prompts: Any, sampling_params: Any, lora_request: Any) -> list[Any]:
    return engine.generate(prompts, sampling_params, lora_request=lora_request)


def _apply_model(engine: Any, function: Callable[[Any], Any]) -> list[Any]:
    return engine.apply_model(function)


def _reset_prefix_cache(engine: Any) -> None:
    engine.reset_prefix_cache()


def main() -> None:
    """Entry point of a copy, which ends without shutting the engine down, as the worker does."""
    pipe: Connection[Message, Any] = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError):
        try:
            _serve(pipe, pipe.recv())
        except EOFError:
            raise
        except Exception as error:  # whatever vLLM raises
            traceback.print_exc()
            pipe.send(("error", f"{type(error).__name__}: {error}"))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _serve(pipe: Connection[Message, Any], arguments: dict[str, Any]) -> None:
    """Start the engine, say so, then do what is asked. Raises EOFError when nobody asks more."""
    prepare_process()
    engine: Any = engine_class()(**arguments)
    bar = reporting_bar(lambda done, total: pipe.send(("progress", done)))
    engine.generate = functools.partial(engine.generate, use_tqdm=bar)
    pipe.send(("answer", None))
    while True:
        function, given = pipe.recv()
        pipe.send(("answer", function(engine, *given)))


if __name__ == "__main__":
    main()
