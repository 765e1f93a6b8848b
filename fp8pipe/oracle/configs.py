"""The oracle of configs: two config.json in, every difference between what transformers and vLLM make of them out.

Each library reads both configs with its own classes, which fill in defaults and bring old spellings up to date, so that
only what makes another model is left. A supervised child process does it (`configs_probe.py`), because importing the
libraries takes seconds. Its answers are cached.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from fp8pipe.files import digest_of
from fp8pipe.machine.engine_python import engine
from fp8pipe.machine.supervise import supervise
from fp8pipe.oracle.basis import basis
from fp8pipe.oracle.cache import cache_dir
from fp8pipe.oracle.vllm import version as vllm_version
from fp8pipe.records import Record

log = logging.getLogger(__name__)

_TIMEOUT_S = 150
"""To start, and for each config."""


class Difference(Record):
    """One value that differs between two configs, as libraries read them."""

    key: str
    """Dotted, by the libraries' own names: a `rope_theta` of config.json is `rope_parameters.rope_theta`."""
    expected: str
    """What it is in the source's config, as Python writes it."""
    found: str
    readers: tuple[str, ...]
    """The libraries that ask for it when they build the model, or may ask, being `unheard`; empty if none does."""


class Comparison(Record):
    """What the libraries make of two configs."""

    readers: tuple[str, ...]
    """The libraries that can read the source's config; empty if none can, and then there is no difference to see."""
    differences: tuple[Difference, ...]
    unheard: dict[str, str] = Field(default_factory=dict)
    """Library -> why it did not say all of this, although another machine or set of packages might let it."""

    @property
    def is_settled(self) -> bool:
        """Whether it depends on the configs and versions alone. What a config could not be read for may be memory."""
        return not self.unheard and all(difference.key for difference in self.differences)


def compare(ours: dict[str, Any], theirs: dict[str, Any], *, dtype: str | None) -> Comparison:
    """Compare a checkpoint's config.json with its source's. Their quantization_config does not count.

    `dtype`: that of the source's weights (`bfloat16`), which is what a config without a dtype means; None if it is not
    known. The model's own code is never run: for a class that no library has, no library can read the config.
    """
    text = json.dumps([ours, theirs], sort_keys=True)  # they may hold NaN, which no digest takes
    path = cache_dir("configs") / f"{digest_of([text, dtype, basis(vllm_version())])}.json"
    known = Comparison.load_if_present(path)
    if known is not None:
        return known
    try:
        (answer,) = compare_each([ours], theirs, dtype=dtype)
    except _NoAnswer as reason:
        log.warning("no library compared config.json with the source's, their text decides: %s", reason)
        return Comparison(readers=(), differences=())
    if answer.is_settled:
        answer.save(path)
    return answer


def compare_each(ours: Sequence[dict[str, Any]], theirs: dict[str, Any], *, dtype: str | None) -> list[Comparison]:
    """The same for several configs beside one source's, in one child process and without the cache."""
    request = {"ours": ours, "theirs": theirs, "dtype": dtype, "vllm": vllm_version() is not None}
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory(prefix="fp8pipe-") as name:  # answers are files: libraries print on stdout
        asked, answer = Path(name) / "request.json", Path(name) / "answer.json"
        asked.write_text(json.dumps(request))
        command = engine().command("fp8pipe.oracle.configs_probe", asked, answer)
        limit = _TIMEOUT_S * (1 + len(ours))
        ending = supervise(command, log=Path(name) / "log", env=engine().variables(quiet), timeout_s=limit)
        if not ending.succeeded or not answer.exists():
            raise _NoAnswer(ending.tail(3).replace("\n", " | ") or ending.reason)
        return [Comparison.model_validate(found) for found in json.loads(answer.read_bytes())]


class _NoAnswer(Exception):
    """The child gave no answer, for the reason in the message."""
