"""Reads llm-compressor's recipe files as recipes.

From a file with stages, modifiers and one QuantizationModifier, as llm-compressor reads it or writes it beside a
checkpoint (recipe.yaml), to the fields of a Recipe. The presets FP8, FP8_DYNAMIC and FP8_BLOCK are known by name. A
setting that cannot be honoured raises ConfigError, which names the key: nothing is dropped silently.

Blocks get scales that are powers of two, as in our own recipes.

Two settings are read as they are meant. The observer `minmax` is a running maximum, not the moving average that
llm-compressor makes of it for activations and caches. An `ignore` entry that matches nothing becomes a note in the
plan, because these files often list modules of several models.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from fp8pipe.errors import ConfigError

_MODIFIER = "QuantizationModifier"
_OBSERVERS = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "memoryless_minmax": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
}
_FP8 = {"num_bits": 8, "type": "float"}
_DYNAMIC = _FP8 | {"dynamic": True}
_PRESETS: Mapping[str, dict[str, Any]] = {
    "FP8": {"weights": _FP8 | {"strategy": "tensor"}, "input_activations": _FP8 | {"strategy": "tensor"}},
    "FP8_DYNAMIC": {"weights": _FP8 | {"strategy": "channel"}, "input_activations": _DYNAMIC | {"strategy": "token"}},
    "FP8_BLOCK": {
        "weights": _FP8 | {"strategy": "block", "block_structure": [128, 128]},
        "input_activations": _DYNAMIC | {"strategy": "group", "group_size": 128},
    },
}
_SUFFIXES = {"tensor": "-FP8", "channel": "-FP8-dynamic", "block": "-FP8-block"}


def is_recipe(content: Mapping[str, Any]) -> bool:
    """Whether a YAML mapping is an llm-compressor recipe."""
    return any(str(key).endswith(("_stage", "_modifiers", "Modifier")) for key in content)


def recipe_fields(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The equivalent fields of a Recipe, named after the file `path`."""
    modifier = _the_modifier(_Node(content, "", path))
    ignore = modifier.take("ignore", [])
    kv_cache = _kv_cache(modifier.child("kv_cache_scheme"))
    scheme = _scheme(modifier)
    modifier.expect("bypass_divisibility_checks", False)
    modifier.done()
    static = scheme["activations"] is not None and scheme["activations"]["mode"] == "static"
    suffix = "-FP8" if static else _SUFFIXES[scheme["weights"]["strategy"]]
    return {
        "name": re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("-._") or "recipe",
        "description": f"llm-compressor recipe {path.name}",
        **scheme,
        "kv_cache": kv_cache,
        "ignore": [ignore] if isinstance(ignore, str) else ignore,
        "unmatched_ignore": "note",
        "repo_suffix": suffix if kv_cache is None else f"{suffix}-KV",
    }


# ---------------------------------------------------------------------------------------------- stages and modifiers


def _the_modifier(root: _Node) -> _Node:
    """The only QuantizationModifier, inside stages and modifier groups or outside."""
    found: list[_Node] = []
    _collect(root, found)
    if len(found) != 1:
        root.refuse(f"expected one {_MODIFIER}, found {len(found)}")
    return found[0]


def _collect(node: _Node, found: list[_Node]) -> None:
    for key in list(node.content):
        if key == _MODIFIER:
            found.append(node.child(key) or _Node({}, node.path_of(key), node.file))
        elif str(key).endswith(("_stage", "_modifiers")):
            _collect(node.child(key) or _Node({}, node.path_of(key), node.file), found)
        elif key == "run_type":
            node.expect("run_type", "oneshot")
        else:
            node.refuse_key(key, f"fp8pipe honours only {_MODIFIER}; remove this key")


# ---------------------------------------------------------------------------------------------- schemes


def _scheme(modifier: _Node) -> dict[str, Any]:
    """weights, activations and targets, from `scheme` or `config_groups`."""
    targets = _names(modifier.take("targets", ["Linear"]))
    groups = _groups(modifier, targets)
    _override_observers(modifier, groups)
    schemes = [_group(group) for group, _ in groups]
    for scheme, (group, _) in zip(schemes, groups, strict=True):
        if scheme != schemes[0]:
            group.refuse(f"differs from {groups[0][0].where}; fp8pipe has one scheme per recipe")
    return schemes[0] | {"targets": list(dict.fromkeys(name for _, names in groups for name in names))}


def _groups(modifier: _Node, targets: list[str]) -> list[tuple[_Node, list[str]]]:
    """Each scheme with its targets."""
    scheme, config_groups = modifier.take("scheme", None), modifier.child("config_groups")
    if (scheme is None) == (config_groups is None):
        modifier.refuse("expected either scheme or config_groups")
    if config_groups is not None:
        groups = [config_groups.required_child(key) for key in list(config_groups.content)]
        if not groups:
            config_groups.refuse("expected at least one group")
        return [(group, _names(group.take("targets", targets))) for group in groups]
    where = modifier.path_of("scheme")
    if isinstance(scheme, str):
        return [(_preset(scheme, where, modifier.file), targets)]
    if not isinstance(scheme, Mapping):
        modifier.refuse_key("scheme", f"expected a preset or a mapping, found {scheme!r}")
    if {"weights", "input_activations"} & set(scheme):
        return [(_Node(scheme, where, modifier.file), targets)]
    return [(_preset(str(name), where, modifier.file), _names(names)) for name, names in scheme.items()]


def _preset(name: str, where: str, file: Path) -> _Node:
    if name.upper() not in _PRESETS:
        raise ConfigError(f"{file}: {where}: preset {name} cannot be honoured; fp8pipe knows {', '.join(_PRESETS)}")
    return _Node(_PRESETS[name.upper()], where, file)


def _override_observers(modifier: _Node, groups: list[tuple[_Node, list[str]]]) -> None:
    """Apply weight_observer, input_observer, and `observer`, which overrides both."""
    both = modifier.child("observer") or _Node({}, modifier.path_of("observer"), modifier.file)
    named = {"weights": modifier.take("weight_observer", None), "input": modifier.take("input_observer", None)}
    chosen = {key: both.take(key, name) for key, name in named.items()}
    modifier.expect("output_observer", None)
    both.done()
    for group, _ in groups:
        group.set_observer("weights", chosen["weights"])
        group.set_observer("input_activations", chosen["input"])


def _group(group: _Node) -> dict[str, Any]:
    """One QuantizationScheme."""
    group.expect("output_activations", None)
    group.expect("format", "float-quantized", "naive-quantized", None)
    weights = _weights(group.required_child("weights"))
    inputs = group.child("input_activations")
    activations = None if inputs is None else _activations(inputs)
    group.done()
    return {"weights": weights, "activations": activations}


def _weights(args: _Node) -> dict[str, Any]:
    strategy = _strategy(args, "tensor", "channel", "block")
    fields: dict[str, Any] = {"strategy": strategy, "observer": _observer(args)}
    block = args.take("block_structure", None)
    if strategy == "block":
        fields["block_shape"] = block or [128, 128]
    elif block is not None:
        args.refuse_key("block_structure", f"has no meaning with strategy {strategy}")
    args.expect("group_size", None, -1)
    args.expect("dynamic", False)
    _fp8(args)
    return fields


def _activations(args: _Node) -> dict[str, Any]:
    dynamic = args.take("dynamic", False)
    if not isinstance(dynamic, bool):
        args.refuse_key("dynamic", f"{dynamic!r} cannot be honoured, expected true or false")
    strategy = _strategy(args, *(("token", "tensor", "group") if dynamic else ("tensor",)))
    args.expect("group_size", *((128,) if strategy == "group" else (None,)))
    args.expect("block_structure", None)
    fields = {"mode": "dynamic" if dynamic else "static", "strategy": strategy, "observer": _observer(args)}
    _fp8(args)
    return fields | ({"observer": "minmax"} if dynamic else {})


def _kv_cache(args: _Node | None) -> dict[str, Any] | None:
    if args is None:
        return None
    strategy = _strategy(args, "tensor", "attn_head")
    args.expect("group_size", None)
    args.expect("block_structure", None)
    args.expect("dynamic", False)
    fields = {"strategy": "head" if strategy == "attn_head" else "tensor", "observer": _observer(args)}
    _fp8(args)
    return fields


def _strategy(args: _Node, *honoured: str) -> str:
    strategy = args.take("strategy", None)
    if strategy is None:
        strategy = {None: "tensor", -1: "channel"}.get(args.content.get("group_size"), "group")
    if strategy not in honoured:
        args.refuse_key("strategy", f"{strategy} cannot be honoured here, expected {' or '.join(honoured)}")
    return strategy


def _observer(args: _Node) -> str:
    name = args.take("observer", "minmax").lower()
    if name not in _OBSERVERS:
        args.refuse_key("observer", f"{name} cannot be honoured, expected one of {', '.join(_OBSERVERS)}")
    args.expect("observer_kwargs", None, {})
    return _OBSERVERS[name]


def _fp8(args: _Node) -> None:
    """Check the rest of QuantizationArgs: symmetric FP8 with float scales."""
    args.expect("num_bits", 8)
    args.expect("type", "float", "FLOAT")
    args.expect("symmetric", True)
    for key in ("actorder", "scale_dtype", "zp_dtype"):
        args.expect(key, None)
    args.done()


def _names(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


# ---------------------------------------------------------------------------------------------- keys


_DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False, "run_type": "oneshot"}
"""llm-compressor's value of an absent key, where it is not None."""


class _Node:
    """A mapping in the file that knows its path and which of its keys have not been read yet."""

    def __init__(self, content: Mapping[str, Any], where: str, file: Path) -> None:
        self.content, self.where, self.file = dict(content), where, file

    def path_of(self, key: str) -> str:
        return f"{self.where}.{key}" if self.where else str(key)

    def take(self, key: str, default: Any) -> Any:
        """Read the value of a key; null means absent."""
        value = self.content.pop(key, None)
        return default if value is None else value

    def child(self, key: str) -> _Node | None:
        """Read the mapping under a key; None when absent."""
        value = self.take(key, None)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.refuse_key(key, f"expected a mapping, found {value!r}")
        return _Node(value, self.path_of(key), self.file)

    def required_child(self, key: str) -> _Node:
        node = self.child(key)
        if node is None:
            self.refuse_key(key, "expected a mapping, found nothing")
        return node

    def expect(self, key: str, *honoured: Any) -> None:
        """Refuse the key unless it has one of these values or is absent and means one of them."""
        value = self.take(key, _DEFAULTS.get(key))
        if value not in honoured and not (value is None and False in honoured):
            wanted = " or ".join("nothing" if one is None else str(one) for one in honoured)
            self.refuse_key(key, f"{value} cannot be honoured, expected {wanted}")

    def set_observer(self, key: str, name: str | None) -> None:
        """Put an observer's name into the arguments under `key`."""
        if name is not None and isinstance(self.content.get(key), Mapping):
            self.content[key] = {**self.content[key], "observer": name}

    def done(self) -> None:
        """Refuse any key that has not been read."""
        for key in self.content:
            self.refuse_key(key, "cannot be honoured; remove it if it does not matter")

    def refuse_key(self, key: str, why: str) -> NoReturn:
        raise ConfigError(f"{self.file}: {self.path_of(key)}: {why}")

    def refuse(self, why: str) -> NoReturn:
        raise ConfigError(f"{self.file}: {self.where or '(file)'}: {why}")
