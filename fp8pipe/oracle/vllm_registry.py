"""Whether the vLLM that is installed has a class for a model, read from its registry without importing it (17 s).

In: a snapshot's config.json and what the transformers oracle says of its class. Out: a note, or an error. The rules are
those of vLLM 0.32, `_ModelRegistry.inspect_model_cls` in vllm/model_executor/models/registry.py: a class of its own, or
transformers' class in its Transformers backend, or its class for the same model with another head.
"""

from __future__ import annotations

import ast
import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.hub import source
from fp8pipe.machine.builds import vllm_version
from fp8pipe.machine.engine_python import Environment, engine
from fp8pipe.model.architecture import Architecture
from fp8pipe.model.untrusted import clip
from fp8pipe.records import Snapshot

_OWN_PLUGINS = ("fp8pipe.", "vllm.")
"""Modules whose plugins add no model to vLLM."""


@dataclass(frozen=True, slots=True)
class Registry:
    """The classes that vLLM knows, as config.json names them in `architectures`."""

    version: str
    """vLLM's."""
    classes: frozenset[str]
    """Those that it builds, by its own code or by its Transformers backend."""
    former: Mapping[str, str]
    """Those that it does not build any more -> the last version that did."""
    elsewhere: Mapping[str, str]
    """Those that a plugin adds -> the plugin's address."""
    heads: tuple[str, ...]
    """Ends of names of classes, one for each head, in the order in which vLLM tries them."""

    def has_other_head(self, name: str) -> bool:
        """Whether it builds the same model with another head."""
        head = next((head for head in self.heads if name.endswith(head)), None)
        return head is not None and any(name.replace(head, other) in self.classes for other in self.heads)

    def lacks(self, name: str) -> str:
        """Why vLLM does not build the class, and what to do."""
        if name in self.former:
            last = self.former[name]
            return f"its last version with this class was {last}; install that one to quantize, validate and serve it"
        if name in self.elsewhere:
            return f"a plugin adds it: install {self.elsewhere[name]}"
        return "install a version of vLLM or a plugin that has it, or choose another model"


def require_class(snapshot: Snapshot, architecture: Architecture) -> tuple[str, ...]:
    """Notes on the class that vLLM would build for the model; none if it has one, or if vLLM is not installed.

    Raises UnsupportedArchitecture if vLLM would build none: a checkpoint is made for vLLM.
    """
    registry = installed(engine())
    names = source.read_config(snapshot).get("architectures")
    if registry is None or not isinstance(names, list) or not names or architecture.answered_by == "vLLM":
        return ()
    names = [str(name) for name in names]
    if not registry.classes.isdisjoint(names):
        return ()
    is_same = architecture.trust_remote_code or names[0] == architecture.model_class
    if architecture.backend_compatible and is_same:
        return (
            f"vLLM {registry.version} has no {names[0]} of its own and builds transformers' class, in its Transformers "
            "backend",
        )
    if any(map(registry.has_other_head, names)):
        return ()
    raise UnsupportedArchitecture(
        f"{snapshot.model_id}: vLLM {registry.version}, for which the checkpoint would be made, has no "
        f"{clip(names[0], 200)}, and its Transformers backend does not take the class of transformers "
        f"{architecture.transformers_version}; {registry.lacks(names[0])}"
    )


@functools.cache
def installed(environment: Environment) -> Registry | None:
    """The registry of the engine's vLLM; None if there is none, or plugins may add to it."""
    root, version = environment.place("vllm"), vllm_version()
    if root is None or version is None or _has_foreign_plugins(environment):
        return None
    tables = _tables(root / "model_executor" / "models" / "registry.py")
    heads = _tables(root / "config" / "model.py")["_SUFFIX_TO_DEFAULTS"]
    return Registry(
        version=version,
        classes=frozenset(tables["_VLLM_MODELS"]),
        former=tables["_PREVIOUSLY_SUPPORTED_MODELS"],
        elsewhere=tables["_OOT_SUPPORTED_MODELS"],
        heads=tuple(head for head, _ in heads),
    )


def _has_foreign_plugins(environment: Environment) -> bool:
    """Whether a plugin may add models, which only vLLM itself can tell."""
    return any(not plugin.startswith(_OWN_PLUGINS) for plugin in environment.plugins())


def _tables(file: Path) -> dict[str, Any]:
    """The dicts and lists of a module that need no import, by name: made of constants, and of one another."""
    found: dict[str, Any] = {}
    for statement in ast.parse(file.read_bytes()).body:
        target = statement.targets[0] if isinstance(statement, ast.Assign) else getattr(statement, "target", None)
        value = getattr(statement, "value", None)
        if isinstance(target, ast.Name) and isinstance(value, ast.Dict | ast.List):
            with contextlib.suppress(NameError):  # what the module imports or defines
                found[target.id] = eval(compile(ast.Expression(value), str(file), "eval"), found)
    return found
