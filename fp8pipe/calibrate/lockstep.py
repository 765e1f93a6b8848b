"""Many forward passes, advanced together one layer at a time, so that one layer's weights are enough for all of them.

In: the layers of a model by name, and one callable per forward pass. Out: an iterator of steps. At each step every pass
is parked at a call of the same layer, with the arguments that the model's own code passed to it. The caller computes
the layer for each pass and returns the output to it; the pass then runs to its next layer call. Nothing is traced:
whatever the model does between its layers (masks, rotary tables, per-layer inputs) is simply executed.

A pass has a thread only because a parked pass needs a stack. Exactly one thread runs at any time, and layers are
computed on the caller's thread: there is one set of compute threads, no lock is needed, and an error in any pass is
raised in the caller.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn

from fp8pipe.errors import UnsupportedArchitecture


class _Abandoned(BaseException):
    """Unwinds the stack of a parked pass that will not be finished."""


class Pass:
    """One forward pass. Between two steps it is parked at a layer call."""

    def __init__(self, forward: Callable[[], object], parked: Callable[[Pass], None] | None = None) -> None:
        self._forward, self._parked = forward, parked
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._abandoned = False
        self._error: BaseException | None = None
        self._output: Any = None  # layers return tensors, tuples, ...
        self._thread = threading.Thread(target=self._run, name="lockstep", daemon=True)
        self.layer: str | None = None
        """Name of the layer that it has called; None once the pass has ended."""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states that the layer is called with, [samples, tokens, hidden]."""
        return self.args[0] if self.args else self.kwargs["hidden_states"]

    @hidden.setter
    def hidden(self, states: torch.Tensor) -> None:
        if self.args:
            self.args = (states, *self.args[1:])
        else:
            self.kwargs = self.kwargs | {"hidden_states": states}

    def start(self) -> None:
        """Run to the first layer call."""
        self._thread.start()
        self._turn()

    def proceed(self, output: Any) -> None:
        """Return `output` from the layer call, and run to the next one or to the end."""
        self._output, self.args, self.kwargs = output, (), {}
        self._turn()

    def abandon(self) -> None:
        """End the thread wherever it is parked."""
        self._abandoned = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def park(self, layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Stands in for the layer on the pass's own thread: wait for the output and return it."""
        self.layer, self.args, self.kwargs = layer, args, kwargs
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
        output, self._output = self._output, None
        return output

    def _turn(self) -> None:
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error
        if self._parked is not None:
            self._parked(self)

    def _run(self) -> None:
        self._go.acquire()
        _of_thread.running = self
        try:
            with torch.inference_mode():  # thread-local
                self._forward()
        except _Abandoned:
            pass
        except BaseException as error:  # raised again on the caller's thread
            self._error = error
        finally:
            self.layer = None
            self._stopped.release()


_of_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Step:
    """All passes are parked at `layer`."""

    layer: str
    passes: Sequence[Pass]
    _compute: Callable[..., Any]

    def compute(self, one: Pass) -> Any:
        """The layer's output for one pass; the layer's weights must be loaded."""
        with torch.inference_mode():
            return self._compute(*one.args, **one.kwargs)


class Lockstep:
    """While it is entered, calling one of `layers` parks the calling pass. Iterate it for the steps.

    Raises UnsupportedArchitecture when passes call different layers, and whatever a pass itself raises.
    """

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        forwards: Sequence[Callable[[], object]],
        parked: Callable[[Pass], None] | None = None,
    ) -> None:
        """parked: called with each pass that has parked at a layer or has ended."""
        self._layers = layers
        self._computes = {name: layer.forward for name, layer in layers.items()}
        self._passes = [Pass(forward, parked) for forward in forwards]

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            layer.forward = _parking(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._passes:
            one.abandon()
        for layer in self._layers.values():
            del layer.forward  # the instance's attribute, which hid the method of the class

    def __iter__(self) -> Iterator[Step]:
        for one in self._passes:
            one.start()
        while (layer := self._common_layer()) is not None:
            yield Step(layer, self._passes, self._computes[layer])

    def _common_layer(self) -> str | None:
        called = {one.layer for one in self._passes}
        if len(called) > 1:
            names = ", ".join(sorted(str(name) for name in called))
            raise UnsupportedArchitecture(
                f"the order of layers depends on the sample (at the same step, passes call {names}); calibration runs "
                "layer by layer and cannot follow: use a data-free recipe such as fp8-dynamic"
            )
        return called.pop() if called else None


def _parking(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        running: Pass = _of_thread.running
        return running.park(name, args, kwargs)

    return forward
