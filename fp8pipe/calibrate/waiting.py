"""The hidden states of passes that are parked: on the device where they fit, else in pinned memory of the host.

A pass that runs has its hidden states on the device; a pass that is parked may have none there. Its tensors stay where
the model's own code holds them, and only their storage is freed and filled again, so the code need not know. The next
pass is brought back while one is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fp8pipe.calibrate.lockstep import Pass
from fp8pipe.calibrate.moves import Moves


class HiddenStates:
    """Those of all passes. `on_host`: they wait on the host."""

    def __init__(self, moves: Moves, *, on_host: bool) -> None:
        self._moves, self._on_host = moves, on_host
        self._waiting: dict[Pass, list[tuple[Tensor, Tensor]]] = {}
        """What a pass has on the host: a tensor without storage, and the bytes that belong into it. The first is the
        embeddings, which models hold until their last layer has run."""

    def park(self, one: Pass) -> None:
        """A pass has parked: take its hidden states away."""
        before = self._waiting.pop(one, [])
        if not self._on_host or one.layer is None:
            return
        tensors = [before[0][0]] if before else []
        if not tensors or not _is_same_storage(tensors[0], one.hidden):
            tensors.append(one.hidden)
        memory = [host for _, host in before] + [None]
        self._waiting[one] = [(t, self._moves.take_away(t, host)) for t, host in zip(tensors, memory, strict=False)]

    def each(self, passes: Sequence[Pass]) -> Iterator[Pass]:
        """The passes in turn, each with its hidden states on the device, the next one's on their way."""
        arriving = self._fetch(passes[0])
        for one, following in zip(passes, [*passes[1:], None], strict=True):
            arrived, arriving = arriving, self._fetch(following) if following is not None else []
            for event in arrived:
                self._moves.wait(event)
            yield one

    def read(self, one: Pass) -> Tensor:
        """The hidden states of a parked pass, wherever they are, to be read on the host."""
        hidden = one.hidden
        for states, host in self._waiting.get(one, ()):
            if _is_same_storage(states, hidden):
                self._moves.finish()
                return host.view(hidden.dtype).as_strided(hidden.shape, hidden.stride(), hidden.storage_offset())
        return hidden

    def _fetch(self, one: Pass) -> list[torch.cuda.Event | None]:
        return [self._moves.bring_back(states, host) for states, host in self._waiting.get(one, ())]


def _is_same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage() is other.untyped_storage()
