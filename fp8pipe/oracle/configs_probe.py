"""The child process in which transformers and vLLM read two configs, and say where they differ.

    python -m fp8pipe.oracle.configs_probe REQUEST ANSWER

REQUEST: {"ours": [config, ...], "theirs": config, "dtype": of the weights, or null, "vllm": is it installed}.
ANSWER: for each of ours, the fields of `configs.Comparison`.

A value that a config's class declares makes another model when it differs. Classes also keep keys that they do not
declare, and models may ask for those all the same; so for such a key the models are built, and what they ask for is
recorded.
"""

from __future__ import annotations

import inspect
import json
import resource
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol

from fp8pipe.evaluate.environment import prepare_process
from fp8pipe.model.untrusted import clip
from fp8pipe.oracle.lean import without

# transformers imports these packages if they are installed, which takes seconds. No config needs them.
with without("sklearn", "scipy") if __name__ == "__main__" else nullcontext():
    from transformers import AutoConfig, PreTrainedConfig

MAX_MEMORY = 8 << 30
"""Bytes that this process may fill: a config can ask for lists as long as a number in it."""

_NOT_THE_MODEL = frozenset(("quantization_config", "compression_config", "transformers_version"))
"""Attributes that say nothing about the unquantized model."""

_CHOOSES_CODE = frozenset(("auto_map",))
"""Keys that transformers reads before there is a config, to choose whose code makes it."""


def main() -> None:
    request, answer = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    resource.setrlimit(resource.RLIMIT_DATA, (MAX_MEMORY, MAX_MEMORY))
    if request["vllm"]:
        prepare_process()
    readers = [_Transformers(), *([_Vllm(answer.parent)] if request["vllm"] else [])]
    theirs = _written(answer.parent / "theirs", request["theirs"])
    folders = [_written(answer.parent / f"ours-{place}", config) for place, config in enumerate(request["ours"])]
    answer.write_text(json.dumps([compare(folder, theirs, request["dtype"], readers) for folder in folders]))


def _written(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with the config, without its quantization."""
    plain = {key: value for key, value in config.items() if key not in _NOT_THE_MODEL}
    if isinstance(text := plain.get("text_config"), dict):
        plain["text_config"] = {key: value for key, value in text.items() if key not in _NOT_THE_MODEL}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(plain))
    return folder


# ---------------------------------------------------------------------------------------------- the libraries


class Reader(Protocol):
    """A library."""

    name: str

    def read(self, folder: Path) -> PreTrainedConfig:
        """The config as the library's own classes read it. Raises whatever the library does."""
        ...

    def build(self, folder: Path) -> None:
        """Build its model on the meta device. Raises whatever the library does."""
        ...


class _Transformers:
    name = "transformers"

    def read(self, folder: Path) -> PreTrainedConfig:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)

    def build(self, folder: Path) -> None:
        from fp8pipe.oracle.transformers_probe import build

        build(folder, trust_remote_code=False)


class _Vllm:
    name = "vLLM"

    def __init__(self, scratch: Path) -> None:
        self._store = scratch / "store"

    def read(self, folder: Path) -> PreTrainedConfig:
        from vllm.transformers_utils.config import get_config

        return get_config(folder, trust_remote_code=False)

    def build(self, folder: Path) -> None:
        from fp8pipe.oracle import vllm_probe

        if not self._store.exists():
            vllm_probe.prepare(self._store)
        with vllm_probe.built(folder):
            pass


# ---------------------------------------------------------------------------------------------- comparing


@dataclass(frozen=True, slots=True)
class Fact:
    """One value in a config."""

    attribute: str
    """The config's attribute that holds it, by itself or in a dictionary."""
    declared: bool
    """Its class declares the attribute, or makes it."""
    value: Any


_ABSENT = Fact("", True, "nothing")


def compare(ours: Path, theirs: Path, dtype: str | None, readers: Sequence[Reader]) -> dict[str, Any]:
    """The fields of `Comparison` for two folders with config.json."""
    asked: list[str] = []
    rows: dict[str, dict[str, Any]] = {}
    unheard: dict[str, str] = {}
    for reader in readers:
        try:
            wanted = facts(reader.read(theirs), dtype, _keys(theirs))
        except (ImportError, MemoryError) as error:
            unheard[reader.name] = f"it could not read the source's config here: {_words(error)}"
            continue
        except Exception:  # huggingface_hub validates values by error classes that share no base with other libraries'
            continue  # the library does not know this model
        asked.append(reader.name)
        for key, expected, found, matters in _differing(reader, ours, theirs, wanted, dtype, unheard):
            row = rows.setdefault(key, {"key": key, "expected": expected, "found": found, "readers": []})
            row["readers"] += [reader.name] if matters else []
    return {"readers": asked, "differences": list(rows.values()), "unheard": unheard}


def _differing(
    reader: Reader, ours: Path, theirs: Path, wanted: Mapping[str, Fact], dtype: str | None, unheard: dict[str, str]
) -> Iterator[tuple[str, str, str, bool]]:
    """(key, expected, found, whether the model depends on it) for each value that differs. `unheard` gets the library
    if it could build neither model: then the model may depend on any key that its class does not declare."""
    try:
        found = facts(reader.read(ours), dtype, _keys(ours))
    except Exception as error:
        yield "", f"a config that {reader.name} reads, like the source's", _words(error), True
        return
    keys = [key for key in sorted(wanted.keys() | found.keys()) if wanted.get(key) != found.get(key)]
    keys = [_CLASS] if _CLASS in keys else keys
    pairs = {key: (wanted.get(key, _ABSENT), found.get(key, _ABSENT)) for key in keys}
    loose = {fact.attribute for pair in pairs.values() for fact in pair if not fact.declared}
    asked_for, problem = _asked_for(reader, (theirs, ours)) if loose else (frozenset[str](), "")
    if problem:
        unheard[reader.name] = f"it could build neither model here: {problem}"
    for key, pair in pairs.items():
        matters = bool(problem) or all(fact.declared or fact.attribute in asked_for for fact in pair)
        expected, value = ("absent" if fact is _ABSENT else clip(repr(fact.value)) for fact in pair)
        yield key, expected, value, matters


def _keys(folder: Path) -> frozenset[str]:
    """Every key of config.json, however deep."""
    keys: set[str] = set()
    json.loads((folder / "config.json").read_bytes(), object_hook=keys.update)
    return frozenset(keys)


_CLASS = "model_type"
"""The key that stands for the config's class: where classes differ, all else does too."""


def facts(config: PreTrainedConfig, dtype: str | None, keys: frozenset[str], prefix: str = "") -> dict[str, Fact]:
    """Every value in a config and in the configs inside it, by dotted key. A missing dtype is `dtype`.

    `keys`: the keys of config.json. Any other attribute was set by the config class, not read from the file.
    """
    dtype = str(config.dtype).removeprefix("torch.") if config.dtype is not None else dtype
    known = {field.name for field in fields(config)} | inspect.signature(type(config).__init__).parameters.keys()
    kind = f"{type(config).__name__} of {config.model_type}" if config.model_type else type(config).__name__
    found = {f"{prefix}{_CLASS}": Fact(_CLASS, True, kind), f"{prefix}dtype": Fact("dtype", True, dtype)}
    for name, value in vars(config).items():
        if name.startswith("_") or name in _NOT_THE_MODEL or name in (_CLASS, "dtype"):
            continue
        declared = name in known or name not in keys or name in _CHOOSES_CODE
        for path, part in _flat(f"{prefix}{name}", value):
            if isinstance(part, PreTrainedConfig):
                found |= facts(part, dtype, keys, f"{path}.")
            else:
                found[path] = Fact(name, declared, part)
    return found


def _flat(path: str, value: Any) -> Iterator[tuple[str, Any]]:
    """A value, or each value in its dictionaries and lists that hold any, by dotted path."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from _flat(f"{path}.{key}", part)
    elif isinstance(value, list | tuple) and any(isinstance(part, dict | PreTrainedConfig) for part in value):
        for place, part in enumerate(value):
            yield from _flat(f"{path}.{place}", part)
    else:
        yield path, list(value) if isinstance(value, tuple) else value


def _asked_for(reader: Reader, folders: tuple[Path, ...]) -> tuple[frozenset[str], str]:
    """The attributes that a library asks a config for while it builds the model: the first that can be built. If none
    can, the second value says why, and the first holds no more than it asked for until then.

    What the base of all configs asks itself does not count: it goes through whatever attributes there are."""
    plain = PreTrainedConfig.__getattribute__
    base = inspect.getfile(PreTrainedConfig)
    seen: set[str] = set()
    problem = ""

    def watched(self: PreTrainedConfig, key: str) -> Any:
        if sys._getframe(1).f_code.co_filename != base:
            seen.add(key)
        return plain(self, key)

    PreTrainedConfig.__getattribute__ = watched
    try:
        for folder in folders:
            try:
                reader.build(folder)
            except Exception as error:  # the libraries raise whatever they stumble on
                problem = problem or _words(error)
            else:
                return frozenset(seen), ""
    finally:
        PreTrainedConfig.__getattribute__ = plain
    return frozenset(seen), problem


def _words(error: Exception) -> str:
    return clip(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
