"""Copies between the host and the device that computes, beside the computation.

On a GPU they run on a stream of their own, between pinned memory and the device. All that is CUDA's own is in this
file. On a CPU there is nothing beside the computation, and the same copies are made at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class Moves:
    """The copies of one calibration."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._side = torch.cuda.Stream(device) if self._is_cuda else None

    def free_bytes(self) -> int:
        """Memory of the GPU that nobody has taken, and what torch has cached."""
        free, _ = torch.cuda.mem_get_info(self.device)
        return free + torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)

    def to_device(self, values: Tensor) -> Tensor:
        """`values`, on the CPU, on the device; they are there when this returns."""
        if self._side is None:
            return values
        with torch.cuda.stream(self._side):
            moved = values.pin_memory().to(self.device, non_blocking=True)
        self._side.synchronize()
        moved.record_stream(torch.cuda.default_stream(self.device))  # which may use it until after it is dropped
        return moved

    @torch.inference_mode()
    def take_away(self, states: Tensor, host: Tensor | None) -> Tensor:
        """Copy the storage of `states` to the host, and free it on the device once that is done; the tensor stays.

        host: memory of an earlier call to use again, if it has the right size. Returns the memory, uint8 [bytes]."""
        storage = states.untyped_storage()
        if host is None or len(host) != storage.nbytes():
            host = torch.empty(storage.nbytes(), dtype=torch.uint8, pin_memory=self._is_cuda)
        with self._beside(after_computing=True):
            host.copy_(_bytes_of(states), non_blocking=True)
        if self._side is not None:
            states.record_stream(self._side)
            states.record_stream(torch.cuda.default_stream(self.device))
        storage.resize_(0)
        return host

    @torch.inference_mode()
    def bring_back(self, states: Tensor, host: Tensor) -> torch.cuda.Event | None:
        """Begin to undo `take_away`; the computation must wait for what this returns."""
        with self._beside():
            states.untyped_storage().resize_(len(host))
            _bytes_of(states).copy_(host, non_blocking=True)
        if self._side is None:
            return None
        arrived = torch.cuda.Event()
        arrived.record(self._side)
        return arrived

    def wait(self, arrived: torch.cuda.Event | None) -> None:
        """Let what is computed from now on wait for a copy."""
        if arrived is not None:
            torch.cuda.default_stream(self.device).wait_event(arrived)

    def finish(self) -> None:
        """Return when no copy is under way."""
        if self._side is not None:
            self._side.synchronize()

    @contextmanager
    def _beside(self, *, after_computing: bool = False) -> Iterator[None]:
        """Queue copies on the side stream, behind what is being computed if they are copies of that."""
        if self._side is None:
            yield
            return
        if after_computing:
            self._side.wait_stream(torch.cuda.default_stream(self.device))
        with torch.cuda.stream(self._side):
            yield


def _bytes_of(states: Tensor) -> Tensor:
    """The whole storage behind a tensor, uint8 [bytes]."""
    storage = states.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=states.device).set_(storage, 0, (storage.nbytes(),), (1,))
