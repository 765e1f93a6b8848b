"""Loads the weights of one layer at a time, and prepares those of the next while that layer is computed.

If there is memory for two layers, a thread loads the next one. Otherwise the kernel reads the next layer's bytes into
the page cache. On a CPU that is all that helps, since computing keeps every core busy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import pairwise
from types import TracebackType
from typing import Self

from fp8pipe.calibrate.skeleton import Skeleton


class LayerLoader:
    """Loads the layers of a skeleton in their order. `ahead`: there is memory for the next one."""

    def __init__(self, skeleton: Skeleton, *, ahead: bool) -> None:
        self._skeleton = skeleton
        names = list(skeleton.layers)
        self._following = dict(pairwise(names))
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="load-ahead") if ahead else None
        self._coming: dict[str, Future[Mapping[str, float]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown()
            self._drop_coming()

    @contextmanager
    def loaded(self, layer: str) -> Iterator[Mapping[str, float]]:
        """Context in which the layer's weights are in memory; it gives their ranges, as `Ranges.weights`."""
        try:
            coming = self._coming.pop(layer, None)
            self._drop_coming()  # the model has called another layer than the next one
            ranges = self._skeleton.load(layer) if coming is None else coming.result()
            if following := self._following.get(layer):
                self._expect(following)
            yield ranges
        finally:
            self._skeleton.drop(layer)

    def _expect(self, layer: str) -> None:
        if self._pool is None:
            self._skeleton.will_load(layer)
        else:
            self._coming[layer] = self._pool.submit(self._skeleton.load, layer)

    def _drop_coming(self) -> None:
        for layer, coming in self._coming.items():
            coming.exception()  # it has ended; what it raised does not matter any more
            self._skeleton.drop(layer)
        self._coming.clear()
