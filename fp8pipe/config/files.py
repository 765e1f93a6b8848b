"""Reads configuration files: from a name or path to a validated object. Every message names the file and the key."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from fp8pipe.config.base import Config
from fp8pipe.errors import ConfigError

_PACKAGE = Path(__file__).parent.parent
CONFIG_DIR = next(path for path in (_PACKAGE / "configs", _PACKAGE.parent / "configs") if path.is_dir())
"""The shipped configurations: inside the installed package, or beside it in a checkout."""
Kind = Literal["recipes", "suites", "gates", "collections"]
C = TypeVar("C", bound=Config)


def load(kind_class: type[C], kind: Kind, name: str) -> C:
    """Read one YAML file into `kind_class`. Raises ConfigError, which names file and key."""
    return load_file(kind_class, find(kind, name))


def load_file(kind_class: type[C], path: Path) -> C:
    """The same for a file that has no kind of its own."""
    return validated(kind_class, _read(path), str(path))


def _read(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, found {type(content).__name__}")
    return content


def validated(kind_class: type[C], content: dict[str, Any], where: str) -> C:
    """`content` as `kind_class`. Raises ConfigError with one line per problem."""
    try:
        return kind_class.model_validate(content)
    except ValidationError as error:
        lines = [f"  {'.'.join(map(str, e['loc'])) or '(file)'}: {_explain(e)}" for e in error.errors()]
        raise ConfigError(f"{where}: not a valid {kind_class.__name__}:\n" + "\n".join(lines)) from error


def _explain(problem: Any) -> str:
    if problem["type"] == "extra_forbidden":
        return f"unknown key (value {problem['input']!r}); remove it or correct its spelling"
    return f"{problem['msg']} (found {problem['input']!r})"


def find(kind: Kind, name: str) -> Path:
    """The file that a name or path means."""
    as_path = Path(name).expanduser()
    if "/" in name or as_path.suffix in {".yaml", ".yml"}:
        if not as_path.is_file():
            raise ConfigError(f"{name}: no such file; give a path, or one of: {', '.join(shipped(kind))}")
        return as_path
    path = CONFIG_DIR / kind / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(
            f"no {kind.rstrip('s')} named {name!r}; there are: {', '.join(shipped(kind))}; or give a path"
        )
    return path


def shipped(kind: Kind) -> list[str]:
    """Names of the shipped configurations of one kind."""
    return sorted(path.stem for path in (CONFIG_DIR / kind).glob("*.yaml"))
