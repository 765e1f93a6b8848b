"""Where the elements of tensors go while a loader copies them, followed operation by operation without data.

In: places (parameters, by name) and stand-ins for tensors on disk. Out: every write to a place, with the part of the
place that it filled and the parts of tensors that it came from. This needs no knowledge of the loader: copies, slices,
transposes and concatenations are observed below it, at torch's dispatcher, so that it works for every model in vLLM.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ITEM = torch.ops.aten._local_scalar_dense.default
_EQUAL = torch.ops.aten.equal.default
_COPY = torch.ops.aten.copy_.default

Box = tuple[tuple[int, int], ...]
"""Start and stop along each dimension."""


@dataclass(frozen=True, slots=True)
class Region:
    """A part of a tensor."""

    box: Box | None
    """None for a part that is not a box (every second row, a diagonal), of which only the size is known."""
    count: int
    """Number of elements."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor on disk."""

    tensor: str
    region: Region


@dataclass(frozen=True, slots=True)
class Write:
    """One write to a place. It has no origins if it wrote a constant."""

    place: str
    region: Region
    origins: frozenset[Piece]


class Follower(TorchDispatchMode):
    """Records in `writes` every write to `places` while it is active."""

    def __init__(self, places: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.writes: list[Write] = []
        self._places = {_storage(tensor): (name, tuple(tensor.shape)) for name, tensor in places.items()}
        self._disk: dict[int, tuple[str, tuple[int, ...]]] = {}
        self._origins: dict[int, frozenset[Piece]] = {}
        self._numbers: dict[float, frozenset[Piece]] = {}
        self._alive: list[Any] = [tensor.untyped_storage() for tensor in places.values()]

    def stand_in(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor without data that stands for tensor `name` on disk. Cheaper while the follower is not active."""
        tensor = torch.empty(shape, dtype=dtype, device="meta")
        self._disk[_storage(tensor)] = (name, shape)
        self._alive.append(tensor.untyped_storage())
        return tensor

    def settle(self, places: Mapping[str, Tensor]) -> None:
        """Record a write for each place that was given new storage (`parameter.data = ...`), with its origins."""
        for name, tensor in places.items():
            origins = self.origins_of(tensor)
            if _storage(tensor) not in self._places and origins:
                self.writes.append(Write(name, _whole(tuple(tensor.shape)), origins))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it would take half of the time

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # torch's own types
        kwargs = kwargs or {}
        uses = _uses_of(func)
        if uses.only_views:
            return func(*args, **kwargs)
        if func is _EQUAL:
            return True
        if func is _ITEM and args[0].device.type == "meta":
            return self._number(args[0])
        if func is _COPY and args[0].device.type != "meta" and args[1].device.type == "meta":
            result = args[0]  # the place has memory although it should have none, and there are no data to copy
        else:
            result = func(*args, **kwargs)
        self._record(uses, args, kwargs, result)
        return result

    def origins_of(self, tensor: Tensor) -> frozenset[Piece]:
        """The parts of tensors on disk that `tensor` was computed from."""
        storage = _storage(tensor)
        if storage in self._disk:
            name, shape = self._disk[storage]
            return frozenset((Piece(name, region_of(tensor, shape)),))
        return self._origins.get(storage, frozenset())

    def _number(self, tensor: Tensor) -> bool | int | float:
        """A stand-in for the value of a tensor without data: comparisons are false, and floats are distinguishable."""
        if tensor.dtype == torch.bool:
            return False
        if not tensor.is_floating_point():
            return 0
        number = 1.0 + (len(self._numbers) + 1) * 2.0**-40
        self._numbers[number] = self.origins_of(tensor)
        return number

    def _record(self, uses: _Uses, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        written, read = uses.split(args, kwargs)
        origins = frozenset(itertools.chain.from_iterable(map(self._origins_of_value, read)))
        for tensor in written:
            storage = _storage(tensor)
            if storage in self._places:
                name, shape = self._places[storage]
                self.writes.append(Write(name, region_of(tensor, shape), origins))
            elif origins and storage not in self._disk:
                self._derive(tensor, origins | self._origins.get(storage, frozenset()))
        for tensor in tree_leaves(result):
            if origins and isinstance(tensor, Tensor) and not self._knows(tensor):
                self._derive(tensor, origins)

    def _origins_of_value(self, value: Any) -> frozenset[Piece]:
        if isinstance(value, Tensor):
            return self.origins_of(value)
        return self._numbers.get(value, frozenset()) if isinstance(value, float) else frozenset()

    def _knows(self, tensor: Tensor) -> bool:
        storage = _storage(tensor)
        return storage in self._places or storage in self._disk or storage in self._origins

    def _derive(self, tensor: Tensor, origins: frozenset[Piece]) -> None:
        self._origins[_storage(tensor)] = origins
        self._alive.append(tensor.untyped_storage())  # so that no other storage is given its address


@dataclass(frozen=True, slots=True)
class _Uses:
    """What an operation does with its arguments."""

    only_views: bool
    """It writes nothing and returns only views of its arguments, like slicing and transposing."""
    writes: tuple[bool, ...]
    """For each argument, whether it is written to."""
    places: dict[str, int]
    """Positions of the arguments by name."""

    def split(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Any]]:
        """The tensors that are written to, and the values that are read."""
        written: list[Tensor] = []
        read: list[Any] = []
        named = ((self.places[name], value) for name, value in kwargs.items())
        for place, value in itertools.chain(enumerate(args), named):
            leaves = tree_leaves(value) if isinstance(value, list | tuple) else (value,)
            if self.writes[place]:
                written += [leaf for leaf in leaves if isinstance(leaf, Tensor)]
            else:
                read += leaves
        return written, read


@functools.cache
def _uses_of(func: Any) -> _Uses:
    schema = func._schema
    writes = tuple(one.alias_info is not None and one.alias_info.is_write for one in schema.arguments)
    only_views = not any(writes) and all(value.alias_info is not None for value in schema.returns)
    return _Uses(only_views, writes, {one.name: place for place, one in enumerate(schema.arguments)})


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


# ---------------------------------------------------------------------------------------------- regions


def region_of(view: Tensor, shape: tuple[int, ...]) -> Region:
    """The part of a contiguous tensor of `shape` that `view`, on the same storage, covers."""
    count = view.numel()
    covers_all = 0 < count == math.prod(shape) and view.storage_offset() == 0 and view.is_contiguous()
    return _whole(shape) if covers_all else Region(_box_of(view, shape), count)


@functools.cache
def _whole(shape: tuple[int, ...]) -> Region:
    return Region(tuple((0, size) for size in shape), math.prod(shape))


def _box_of(view: Tensor, shape: tuple[int, ...]) -> Box | None:
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    starts, rest = [], view.storage_offset()
    for stride in strides:
        starts.append(rest // stride if stride else 0)
        rest -= starts[-1] * stride
    sizes = [1] * len(shape)
    if view.numel() == 0 or not all(_extend(sizes, starts, strides, shape, *run) for run in _runs(view)):
        return None
    return tuple((start, start + size) for start, size in zip(starts, sizes, strict=True))


def _runs(view: Tensor) -> list[tuple[int, int]]:
    """The view's dimensions as (size, stride), innermost first, with contiguous ones merged."""
    runs: list[tuple[int, int]] = []
    for stride, size in sorted((stride, size) for size, stride in zip(view.shape, view.stride(), strict=True)):
        if size == 1:
            continue
        if runs and runs[-1][0] * runs[-1][1] == stride:
            runs[-1] = (runs[-1][0] * size, runs[-1][1])
        else:
            runs.append((size, stride))
    return runs


def _extend(
    sizes: list[int], starts: list[int], strides: list[int], shape: tuple[int, ...], size: int, stride: int
) -> bool:
    """Add a run of a view to the box, which may take up several whole dimensions; False if it is not a box."""
    inner = [dim for dim in range(len(shape)) if strides[dim] == stride and shape[dim] > 1]
    for dim in range(inner[0], -1, -1) if inner else ():
        if starts[dim] + size <= shape[dim]:
            sizes[dim] *= size
            return sizes[dim] == size
        if starts[dim] or size % shape[dim]:
            return False
        sizes[dim] *= shape[dim]
        size //= shape[dim]
    return False


def covered(shape: tuple[int, ...], regions: Iterable[Region]) -> int:
    """Number of elements of a tensor of `shape` in at least one region. Regions that are not boxes are assumed to lie
    outside the others."""
    regions = list(regions)
    if regions and _whole(shape) in regions:
        return math.prod(shape)
    loose = sum(region.count for region in regions if region.box is None)
    counts, cells = _grid(shape, _boxes(regions))
    return min(math.prod(shape), int(cells[counts > 0].sum()) + loose)


def overlapping(shape: tuple[int, ...], regions: Iterable[Region]) -> int:
    """Number of elements in more than one of the distinct boxes: filled once, then overwritten."""
    counts, cells = _grid(shape, _boxes(regions))
    return int(cells[counts > 1].sum())


def first_gap(shape: tuple[int, ...], regions: Iterable[Region]) -> str:
    """The first part of a tensor of `shape` that no box covers, as a slice: `[0:256, 0:1]`."""
    boxes = _boxes(regions)
    empty = np.argwhere(_grid(shape, boxes)[0] == 0)
    spans = (f"{along[at]}:{along[at + 1]}" for along, at in zip(_edges(shape, boxes), empty[0], strict=True))
    return f"[{', '.join(spans)}]"


def _boxes(regions: Iterable[Region]) -> set[Box]:
    return {region.box for region in regions if region.box is not None}


def _edges(shape: tuple[int, ...], boxes: set[Box]) -> list[list[int]]:
    """The positions at which boxes begin and end, along each dimension."""
    return [sorted({0, size, *(edge for box in boxes for edge in box[dim])}) for dim, size in enumerate(shape)]


def _grid(shape: tuple[int, ...], boxes: set[Box]) -> tuple[np.ndarray, np.ndarray]:
    """The boxes' edges cut the tensor into cells: how many boxes cover each cell, and how many elements it has."""
    edges = _edges(shape, boxes)
    places = [{edge: index for index, edge in enumerate(along)} for along in edges]
    counts = np.zeros([len(along) - 1 for along in edges], dtype=np.int32)
    for box in boxes:
        counts[tuple(slice(places[dim][start], places[dim][stop]) for dim, (start, stop) in enumerate(box))] += 1
    cells = np.ones((), dtype=np.int64)
    for along in edges:
        cells = np.multiply.outer(cells, np.diff(along))
    return counts, cells
