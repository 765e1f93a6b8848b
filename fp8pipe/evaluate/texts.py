"""The model's own tokenizer and chat template, which are a stranger's code: they may raise, crash or never end.

In: a call of theirs. Out: its answer, or an InputError that names the file. A call that takes too long ends the worker
with SIGALRM, even where no Python code runs; its parent knows by that whose fault it was.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from fp8pipe.errors import Fp8PipeError, InputError
from fp8pipe.machine import memory
from fp8pipe.machine.supervise import Ending
from fp8pipe.model.untrusted import clip

TRYING = "trying the tokenizer and the chat template"
"""The worker's message before it runs them for the first time, so that a crash of theirs is known as such."""
_LIMIT_S, _EACH_S = 240.0, 10.0
"""For one call, and for each text in it. Tokenizers written in Python take the first for tens of megabytes."""
_MEMORY_BYTES = 4_000_000_000
"""Private memory for the first calls. The largest tokenizers take 1 GB."""

Part = Literal["tokenizer", "chat template"]
_FILES: dict[Part, tuple[str, ...]] = {
    "tokenizer": ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json"),
    "chat template": ("chat_template.jinja", "chat_template.json"),
}
"""Where each may be, the first of which counts; otherwise in tokenizer_config.json."""


@contextlib.contextmanager
def bounded(model: str, part: Part, *, count: int = 1) -> Iterator[None]:
    """Context of a call of the tokenizer or the chat template in the folder `model`, for `count` texts.

    Raises InputError for whatever the call raises, but ImportError, which is the environment's fault. A tokenizer in
    Rust panics with an exception that is no Exception."""
    signal.setitimer(signal.ITIMER_REAL, _LIMIT_S + _EACH_S * count)
    try:
        yield
    except (Fp8PipeError, ImportError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        file = next((name for name in _FILES[part] if Path(model, name).is_file()), "tokenizer_config.json")
        words = clip(" ".join(f"{type(error).__name__}: {error}".split()), 300)
        raise InputError(f"{Path(model) / file}: the model's {part} fails ({words}); mend this file") from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def try_out(model: str, load: Callable[[], Any], *, templated: bool) -> None:  # Any: tokenizers share no typed base
    """Load the tokenizer of the folder `model`, tokenize a word and, if `templated`, render a question, within a bound
    of memory. Raises InputError."""
    with memory.at_most(_MEMORY_BYTES):
        with bounded(model, "tokenizer"):
            tokenizer = load()
            tokenizer("The")
        if templated and isinstance(getattr(tokenizer, "chat_template", None), str):
            with bounded(model, "chat template"):
                tokenizer.apply_chat_template(
                    [{"role": "user", "content": "1 + 1 ="}], tokenize=False, add_generation_prompt=True
                )


def require_answer(model: str, ending: Ending, note: str) -> None:
    """Raise InputError if a worker, whose last message was `note`, ended because a call took too long or crashed."""
    number = ending.returncode - 128
    if number == signal.SIGALRM:
        what = "took too long"
    elif note == TRYING and number > 0 and number != signal.SIGKILL:
        what = f"crashed (signal {number})"
    else:
        return
    raise InputError(f"{model}: its tokenizer or chat template {what}; mend its files (log: {ending.log})")
