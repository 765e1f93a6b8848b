"""The engine arguments of a suite, looked at before any engine starts: names, and the length of the context.

vLLM is not imported for it, which would take 17 s: the names are read from the sources of vLLM and lm-eval.
"""

from __future__ import annotations

import ast
import difflib
import functools
import os
from collections.abc import Iterator, Mapping
from typing import Any

from fp8pipe.config import EvalSuite
from fp8pipe.errors import ConfigError
from fp8pipe.machine.engine_python import Environment, engine

_SOURCES = {
    "vllm": (("engine/arg_utils.py", "EngineArgs"), ("entrypoints/llm.py", "LLM")),
    "lm_eval": (("models/vllm_causallms.py", "VLLM"),),
}
"""Package -> file and class whose fields, or parameters of `__init__`, are arguments."""
_LENGTHS = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
"""Keys of config.json that limit the context: `derive_max_model_len_and_key` in
vllm/transformers_utils/model_arch_config_convertor.py."""


def check_arguments(suite: EvalSuite, config: Mapping[str, Any]) -> None:
    """Raise ConfigError for an argument that the engine does not know, or a context longer than the model's.

    config: content of the model's config.json.
    """
    known = known_arguments(engine())
    for name in suite.engine:
        if known and name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]}?" if close else "see `vllm serve --help=all`"
            raise ConfigError(f"suite {suite.name}: engine: {name} is no argument of the installed vLLM; {hint}")
    wanted, longest = suite.engine.get("max_model_len"), longest_context(config)
    allowed = os.environ.get("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "0") in ("1", "true")
    if isinstance(wanted, int) and longest is not None and wanted > longest and not allowed:
        raise ConfigError(
            f"suite {suite.name}: engine: max_model_len: {wanted} is more than the {longest} tokens that the model's "
            "config.json allows; lower it"
        )


def longest_context(config: Mapping[str, Any]) -> int | None:
    """The most tokens that vLLM might accept for this config.json; None if it does not say.

    The text model's part of it has many names, so the most generous part counts; vLLM itself looks again.
    """
    places = [config, *(part for part in config.values() if isinstance(part, Mapping))]
    found = [place[name] for place in places for name in _LENGTHS if isinstance(place.get(name), int)]
    factors = [factor for place in places for factor in _rope_factors(place)]
    return int(max(found) * max([1.0, *factors])) if found else None


def _rope_factors(place: Mapping[str, Any]) -> Iterator[float]:
    for name in ("rope_scaling", "rope_parameters"):
        settings = place.get(name)
        if isinstance(settings, Mapping):
            for part in (settings, *(value for value in settings.values() if isinstance(value, Mapping))):
                if isinstance(factor := part.get("factor"), int | float):
                    yield float(factor)


@functools.cache
def known_arguments(environment: Environment) -> frozenset[str]:
    """Names that lm-eval's vLLM model and vLLM's engine take; empty if one is not installed or has other sources."""
    names: set[str] = set()
    for package, classes in _SOURCES.items():
        folder = environment.place(package)
        if folder is None:
            return frozenset()
        for file, name in classes:
            path = folder / file
            if not path.is_file():
                return frozenset()
            names |= set(_arguments(ast.parse(path.read_text()), name))
    return frozenset(names)


def _arguments(tree: ast.Module, class_name: str) -> Iterator[str]:
    found = next((node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name), None)
    for node in found.body if found is not None else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            yield node.target.id
        elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
            yield from (argument.arg for argument in (*node.args.args[1:], *node.args.kwonlyargs))
