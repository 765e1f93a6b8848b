"""Many forward passes, advanced together one layer at a time, so that one layer's weights are enough for all of them.

In: the layers of a model by name, and one callable per forward pass. Out: an iterator of steps. At each step every pass
stands before the same layer with the arguments that the model's own code gave it; the caller computes the layer for
each and hands the output back, and that pass runs on to its next layer call. No tracing: whatever the model does
between its layers (masks, rotary tables, per-layer inputs) is simply executed.

Each pass has a thread only because it needs a stack to be parked on. Exactly one thread runs at any time, and layers
are computed on the caller's thread: one set of compute threads, no locks, and an error anywhere surfaces at the caller.
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
    """Unwinds a parked pass that will not be finished."""


class Lane:
    """One forward pass, parked at a layer call between two turns."""

    def __init__(self, forward: Callable[[], object]) -> None:
        self._forward = forward
        self._go = threading.Semaphore(0)
        self._stopped = threading.Semaphore(0)
        self._abandoned = False
        self._error: BaseException | None = None
        self._output: Any = None  # whatever the layer returns
        self._thread = threading.Thread(target=self._run, name="lockstep", daemon=True)
        self.layer: str | None = None
        """Name of the layer that it waits for; None once the pass is over."""
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states that the layer is called with."""
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
        """Give the layer's output; run to the next layer call, or to the end."""
        self._output, self.args, self.kwargs = output, (), {}
        self._turn()

    def abandon(self) -> None:
        """End the thread wherever it is parked."""
        self._abandoned = True
        self._go.release()
        if self._thread.ident is not None:
            self._thread.join()

    def park(self, layer: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called on the pass's own thread in place of the layer: wait for its output."""
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

    def _run(self) -> None:
        self._go.acquire()
        _of_thread.lane = self
        try:
            if not self._abandoned:
                with torch.inference_mode():  # thread-local
                    self._forward()
        except _Abandoned:
            pass
        except BaseException as error:  # carried to the caller's thread, which raises it
            self._error = error
        finally:
            self.layer = None
            self._stopped.release()


_of_thread = threading.local()


@dataclass(frozen=True, slots=True)
class Step:
    """All passes stand before `layer`."""

    layer: str
    lanes: Sequence[Lane]
    _compute: Callable[..., Any]

    def compute(self, lane: Lane) -> Any:
        """The layer's output for one lane; its weights must be there."""
        with torch.inference_mode():
            return self._compute(*lane.args, **lane.kwargs)


class Lockstep:
    """Context in which calling one of `layers` parks the calling pass; iterate it for the steps."""

    def __init__(
        self,
        layers: Mapping[str, nn.Module],
        forwards: Sequence[Callable[[], object]],
        started: Callable[[int, Lane], object] = lambda index, lane: None,
    ) -> None:
        """started: told of each pass, by index, as soon as it stands before its first layer."""
        self._layers, self._started = layers, started
        self._computes = {name: layer.forward for name, layer in layers.items()}
        self._lanes = [Lane(forward) for forward in forwards]

    def __enter__(self) -> Self:
        for name, layer in self._layers.items():
            layer.forward = _parking(name)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for lane in self._lanes:
            lane.abandon()
        for layer in self._layers.values():
            del layer.forward  # the instance attribute: the class's method is back

    def __iter__(self) -> Iterator[Step]:
        for index, lane in enumerate(self._lanes):
            lane.start()
            if lane.layer is not None:
                self._started(index, lane)
        while (layer := self._common_layer()) is not None:
            yield Step(layer, self._lanes, self._computes[layer])

    def _common_layer(self) -> str | None:
        waiting = {lane.layer for lane in self._lanes}
        if len(waiting) > 1:
            names = ", ".join(sorted(str(name) for name in waiting))
            raise UnsupportedArchitecture(
                f"the order of layers depends on the sample (passes stand before {names} at once); "
                "calibration runs layer by layer and cannot follow: use a data-free recipe such as fp8-dynamic"
            )
        return waiting.pop() if waiting else None


def _parking(name: str) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        lane: Lane = _of_thread.lane
        return lane.park(name, args, kwargs)

    return forward
