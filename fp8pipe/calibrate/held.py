"""What the frame of a pass holds beside its hidden states, kept small.

A model's forward keeps what it began with in local variables until its last layer has run: embeddings, which over all
samples are as much memory as the hidden states, masks and rotary tables, which are the same for every pass of one
shape. The former are given up behind the first layer, and computed again should the model's own code read them; the
latter are held once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import TracebackType
from typing import Any, Self
from weakref import ref

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from fp8pipe.calibrate.lockstep import Lane, Step

_ALIKE = ("attention_mask", "position_embeddings")
"""Arguments of layers that follow from the shape of a pass alone, since nothing is padded."""
_KINDS = 8
"""Different ones of one shape that are known: sliding and global, with their rotary tables."""


class Pass(TorchFunctionMode):
    """One forward pass in lockstep: called, it runs `forward`.

    What `embedding` gives to its thread, and what its first layer is called with, is freed in between. Whatever
    `forward` does with them passes through here, so that they can be filled again in time.
    """

    def __init__(self, forward: Callable[[], object], embedding: nn.Module | None, alike: Alike) -> None:
        """alike: of all passes that run together."""
        super().__init__()
        self._forward, self._embedding, self._alike = forward, embedding, alike
        self._hook: Any = None  # torch.utils.hooks.RemovableHandle, untyped
        self._held: dict[str, ref[Any]] = {}
        self._given_up: dict[str, Tensor] = {}

    def __call__(self) -> object:
        with self:
            return self._forward()

    def __enter__(self) -> Self:
        thread = threading.get_ident()

        def given(_module: nn.Module, _args: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                self._hook.remove()
                self._hold("embeddings", output)

        if self._embedding is not None:
            self._hook = self._embedding.register_forward_hook(given)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)
        if self._hook is not None:
            self._hook.remove()

    def arrived(self, lane: Lane) -> None:
        """`lane`, which runs this, stands before its first layer."""
        self._alike.unite(lane)
        self._hold("hidden", lane.hidden)
        self._release(lane)

    def advance(self, step: Step, lane: Lane) -> Any:
        """Compute the layer and go on to the next; its output."""
        self._alike.unite(lane)
        self._recall(lane.args, lane.kwargs)
        output = step.compute(lane)
        lane.proceed(output)
        self._release(lane)
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._recall(args, kwargs)
        return func(*args, **(kwargs or {}))

    @torch.inference_mode()
    def _release(self, lane: Lane) -> None:
        """Free what neither is among the arguments of the layer that `lane` stands before nor was changed in place."""
        needed = {_address(value) for value in _within((lane.args, lane.kwargs)) if isinstance(value, Tensor)}
        held = {what: value for what, known in self._held.items() if (value := known()) is not None}
        free = [what for what, value in held.items() if _address(value) not in needed]
        if not free:
            return
        again = self._computed_again()
        for what in free:
            del self._held[what]
            if what in again and again[what] is not held[what] and torch.equal(held[what], again[what]):
                held[what].data = held[what].new_empty(0)  # for every variable that refers to it
                self._given_up[what] = held[what]

    @torch.inference_mode()
    def _recall(self, *values: Any) -> None:
        """Fill those again, and for good, that are among `values` or in what these contain."""
        if not self._given_up:
            return
        wanted = {id(value) for value in _within(values)}
        if asked := [what for what, value in self._given_up.items() if id(value) in wanted]:
            again = self._computed_again()
            for what in asked:
                self._given_up.pop(what).data = again[what]

    def _hold(self, what: str, value: Any) -> None:
        """Not so as to keep it alive."""
        if isinstance(value, Tensor) and all(known() is not value for known in self._held.values()):
            self._held[what] = ref(value)

    def _computed_again(self) -> dict[str, Tensor]:
        """By a second run to the first layer."""
        other = Pass(self._forward, self._embedding, self._alike)
        lane = Lane(other)
        try:
            lane.start()
            other._hold("hidden", lane.hidden)
            return {what: value for what, known in other._held.items() if (value := known()) is not None}
        finally:
            lane.abandon()


class Alike:
    """Masks and rotary tables of all passes: equal ones are kept once."""

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], list[Tensor]] = {}

    def unite(self, lane: Lane) -> None:
        """Let the arguments of the layer before which `lane` stands share the memory of equal ones."""
        for name in _ALIKE:
            for place, value in enumerate(_within([lane.kwargs.get(name)])):
                if isinstance(value, Tensor):
                    self._share(value, self._known.setdefault((name, place, value.shape, value.dtype), []))

    def _share(self, value: Tensor, known: list[Tensor]) -> None:
        if any(one.data_ptr() == value.data_ptr() for one in known):
            return
        equal = next((one for one in known if torch.equal(one, value)), None)
        if equal is not None:
            value.data = equal
        elif len(known) < _KINDS:
            known.append(value)


def embedding_of(decoder: nn.Module) -> nn.Module | None:
    """The module that looks up what the decoder begins with; None if it does not say."""
    if not isinstance(decoder, PreTrainedModel):  # a plain module of a model's own code
        return None
    try:
        return decoder.get_input_embeddings()
    except NotImplementedError:
        return None


def _address(value: Tensor) -> int:
    """Where its memory lies, which views share."""
    return value.untyped_storage().data_ptr()


def _within(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, Mapping):
            yield from _within(value.values())
        elif isinstance(value, list | tuple):
            yield from _within(value)
        else:
            yield value
