"""The embeddings of a pass, given up behind its first layer and looked up again if the model's own code wants them.

A model's forward keeps them in a local variable until its last layer has run. Over all samples that is as much memory
as the hidden states themselves, and hardly any model reads them again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class Embeddings(TorchFunctionMode):
    """What `module` gives to the thread that enters this context around a forward pass.

    Whatever the model does with that tensor on this thread passes through here, so it can be filled again in time.
    """

    def __init__(self, module: nn.Module | None) -> None:
        super().__init__()
        self._module = module
        self._hook: Any = None  # torch.utils.hooks.RemovableHandle, untyped
        self._given: Tensor | None = None
        self._look_up: Callable[[], Any] = lambda: None
        self._released = False

    def __enter__(self) -> Self:
        thread = threading.get_ident()

        def given(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if threading.get_ident() == thread and isinstance(output, Tensor):
                self._hook.remove()
                self._given, self._look_up = output, lambda: module(*args, **kwargs)

        if self._module is not None:
            self._hook = self._module.register_forward_hook(given, with_kwargs=True)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._hook is not None:
            self._hook.remove()

    @torch.inference_mode()
    def release(self) -> None:
        """Free them, unless the model has changed them in place: then a second look would not give the same."""
        if self._given is None or self._released:
            return
        if torch.equal(self._given, self._look_up()):
            self._given.data = self._given.new_empty(0)  # for every variable that refers to it
            self._released = True
        else:
            self._given = None

    @torch.inference_mode()
    def recall(self, *values: Any) -> None:
        """Fill them again, and for good, if they are among `values` or what those contain."""
        if self._released and self._given is not None and any(one is self._given for one in _within(values)):
            self._given.data = self._look_up()
            self._given, self._released = None, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.recall(args, kwargs)
        return func(*args, **(kwargs or {}))


def embedding_of(decoder: Any) -> nn.Module | None:
    """The module that looks up what the decoder begins with; None if it does not say."""
    try:
        return decoder.get_input_embeddings()
    except NotImplementedError:
        return None


def _within(values: Iterable[Any]) -> Iterable[Any]:
    for value in values:
        if isinstance(value, Mapping):
            yield from _within(value.values())
        elif isinstance(value, list | tuple):
            yield from _within(value)
        else:
            yield value
