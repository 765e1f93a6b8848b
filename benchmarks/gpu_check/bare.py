"""Stand-in for pydantic where it is not installed: records and configs hold values and check nothing.

The library's models are built here by this check alone, from values of the right types. What reads or writes JSON is
left out, so a stage that needs a record on disk fails loudly.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, ClassVar

_UNSET: Any = object()


def provide_pydantic() -> bool:
    """Make `import pydantic` work. Returns whether the real one is there."""
    if importlib.util.find_spec("pydantic") is not None:
        return True
    module = ModuleType("pydantic")
    vars(module).update(
        BaseModel=_Model,
        ConfigDict=dict,
        Field=_Default,
        ValidationError=type("ValidationError", (ValueError,), {}),
        __getattr__=_validator_named,
    )
    sys.modules["pydantic"] = module
    return False


class _Default:
    def __init__(self, default: Any = _UNSET, *, default_factory: Callable[[], Any] | None = None, **_: Any) -> None:
        self.make = default_factory or (lambda: default)


class _Model:
    model_fields: ClassVar[dict[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        own = [name for name in inspect.get_annotations(cls) if not name.startswith(("_", "model_config"))]
        cls.model_fields = cls.model_fields | {name: cls.__dict__.get(name, _UNSET) for name in own}

    def __init__(self, **given: Any) -> None:
        unknown = given.keys() - self.model_fields.keys()
        values = {name: _made(default) for name, default in self.model_fields.items() if name not in given} | given
        missing = [name for name, value in values.items() if value is _UNSET]
        if unknown or missing:
            raise TypeError(f"{type(self).__name__}: unknown {sorted(unknown)}, missing {missing}")
        vars(self).update(values)

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        return iter(vars(self).items())

    def model_copy(self, *, update: dict[str, Any]) -> Any:
        return type(self)(**vars(self) | update)


def _made(default: Any) -> Any:
    return default.make() if isinstance(default, _Default) else default


def _validator_named(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)
    return _no_validator


def _no_validator(*_: Any, **__: Any) -> Callable[[Any], Any]:
    return lambda function: function
