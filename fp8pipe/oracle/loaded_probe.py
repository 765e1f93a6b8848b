"""The child process that loads a checkpoint and its source into transformers' model and compares every parameter.

    python -m fp8pipe.oracle.loaded_probe REQUEST ANSWER

REQUEST: {"checkpoint": folder, "source": folder}. ANSWER: {"loaded": the fields of `loaded.Loaded`, for each
parameter of transformers' model and each tensor that cannot be compared}, or {"unsupported": reason}, or if memory ran
out {"memory": the allocator's words}. The checkpoint is dequantized by its own quantization_config and scales, and
transformers maps the names of both sides. What the plan believed about names, layouts and experts plays no part, so a
belief that is wrong shows as an error. One layer of each side is in memory at a time.

Experts: a checkpoint may hold one matrix for each where transformers knows no such name. Those are stacked as vLLM's
per-expert names mean them, gate above up, each [out, in], into the parameter of the module that they stand in.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fp8pipe.model.fp8_source import Block, as_block, dequantize, grid_of, holds_codes, scale_of
from fp8pipe.model.headers import Headers, TensorInfo, read_folder_headers
from fp8pipe.model.names import FP8, SPENT_NAMES
from fp8pipe.model.shards import SourceFiles
from fp8pipe.oracle import transformers_probe as probe
from fp8pipe.oracle.loaded import Loaded, group_of
from fp8pipe.oracle.loading import OnDisk, get_tensor, is_out_of_memory, load_into, set_tensor

_TINY = 1e-12
"""Below this magnitude weights may be coarser than FP8's error: scales do not become smaller than that of 1e-12."""
_EXPERT = re.compile(r"(.+)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")
_STACKED: Mapping[str, tuple[str, ...]] = {
    "gate_up_proj": ("gate_proj", "up_proj"),
    "gate_proj": ("gate_proj",),
    "up_proj": ("up_proj",),
    "down_proj": ("down_proj",),
}
"""3-D parameter of transformers' experts -> the per-expert weights that fill it."""


def main() -> None:
    request, answer_path = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    folders = Path(request["checkpoint"]), Path(request["source"])
    answer: dict[str, Any] = {}
    try:
        answer["loaded"] = [astuple(one) for one in compare_folders(*folders)]
    except probe.Unsupported as reason:
        answer["unsupported"] = str(reason)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        answer["memory"] = str(error).partition("\n")[0] or type(error).__name__
    answer_path.write_text(json.dumps(answer))


def compare_folders(checkpoint: Path, source: Path) -> list[Loaded]:
    """Every parameter that transformers loads from the two folders. Raises probe.Unsupported."""
    with ExitStack() as stack:
        ours, theirs = (Side(folder, read_folder_headers(folder), stack) for folder in (checkpoint, source))
        return list(compare_loaded(ours, theirs))


class Side:
    """A checkpoint or its source: transformers' model without weights, and the tensors that fill it."""

    def __init__(self, folder: Path, headers: Headers, stack: ExitStack) -> None:
        """Raises probe.Unsupported if transformers cannot build the model."""
        self.model, quantization = probe.build(folder, trust_remote_code=False, tensors=len(headers.tensors))
        self.tensors = headers.tensors
        self._block = _block(quantization)
        self._files = SourceFiles(folder, stack)
        for shard in headers.shards:
            self._files.open(shard.name)
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        every = parameters | dict(self.model.named_buffers(remove_duplicate=False))
        self._meta = {name: every[name] for name in self.model.state_dict()}
        spent = {name for name in self.tensors if name.rpartition(".")[2] in SPENT_NAMES}
        weights = {name: info for name, info in self.tensors.items() if name not in spent}
        self.targets = probe.follow(self.model, weights)
        self.unread: dict[str, str] = dict.fromkeys(weights.keys() - self.targets, "transformers has no such tensor")
        self.stacks = dict(self._stacks())
        self.groups = self._groups()

    @property
    def names(self) -> list[str]:
        """Parameters and persistent buffers, in the model's order."""
        return list(self._meta)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a parameter."""
        return tuple(self._meta[name].shape)

    def _groups(self) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = defaultdict(list)
        for name, target in self.targets.items():
            groups[group_of(target.name)].append(name)
        return groups

    def load(self, group: str) -> tuple[dict[str, Tensor], set[str], dict[str, str]]:
        """(parameters of the group, those that FP8 codes went into, tensors that could not be read -> why)."""
        tensors: dict[str, Any] = {}
        quantized: set[str] = set()
        unreadable: dict[str, str] = {}
        for name in self.groups.get(group, ()):
            read = self._read(self.tensors[name])
            if isinstance(read, str):
                unreadable[name] = read
                continue
            tensors[name] = read
            if holds_codes(self.tensors[name]):
                quantized |= set(self.targets[name].all_names())
        problems = load_into(self.model, tensors, torch.device("cpu"), self.model.dtype) if tensors else []
        unreadable |= {name: "; ".join(problems[:1]) for name in tensors if problems}
        found = {name: get_tensor(self.model, name) for name in self._meta if group_of(name) == group}
        filled = {name: tensor for name, tensor in found.items() if not tensor.is_meta}
        for name in filled:
            set_tensor(self.model, name, self._meta[name])
        for place, members in self.stacks.items():
            if group_of(place) == group and place not in filled:
                filled[place] = self._stack(place, members)
                quantized |= {place} if any(holds_codes(self.tensors[name]) for name in members) else set()
        return filled, quantized, unreadable

    def _read(self, info: TensorInfo) -> Tensor | OnDisk | str:
        """The tensor, dequantized if it holds FP8 codes; why it cannot be read."""
        stored = OnDisk(self._files, info)
        if not holds_codes(info):
            return stored if info.dtype in ("F64", "F32", "F16", "BF16") else f"{info.dtype} is no weight's dtype"
        scale = scale_of(info.name, self.tensors)
        if info.dtype != FP8 or len(info.shape) != 2 or scale is None:
            return f"{info.dtype} {list(info.shape)} {'without a scale' if scale is None else 'is no FP8 matrix'}"
        values = OnDisk(self._files, scale)[...].float()
        grid = grid_of(info.shape, scale.shape, self._block)
        if grid is None:
            return f"the scale's shape {list(scale.shape)} fits no layout of {list(info.shape)}"
        return dequantize(stored[...], values.view(grid.shape), grid.unit)

    # -------------------------------------------------------------------------------------- experts

    def _stacks(self) -> Iterator[tuple[str, list[str]]]:
        """3-D parameter -> the matrices that fill it, expert by expert, where transformers knows no such names."""
        members: dict[str, dict[tuple[int, str], str]] = defaultdict(dict)
        for name in self.unread:
            if match := _EXPERT.fullmatch(name):
                members[match[1]][int(match[2]), match[3]] = name
        for holder, found in members.items():
            places = probe.follow(self.model, {f"{holder}.{leaf}": None for leaf in _STACKED})
            for disk, target in places.items():
                projections = _STACKED[disk.rpartition(".")[2]]
                count = self._meta[target.name].shape[0]
                wanted = [found.get((index, leaf)) for index in range(count) for leaf in projections]
                if self._meta[target.name].dim() == 3 and all(wanted):
                    yield target.name, [name for name in wanted if name is not None]
                    for name in wanted:
                        self.unread.pop(str(name), None)

    def _stack(self, place: str, members: Sequence[str]) -> Tensor:
        """The parameter `place` [experts, ...]: matrices [out, in], gate above up, as its module lays them out."""
        shape = tuple(self._meta[place].shape)
        module = self.model.get_submodule(place.rpartition(".")[0])
        per_expert = len(members) // shape[0]
        matrices = [self._matrix(name) for name in members]
        experts = [
            _joined(matrices[start : start + per_expert], alternating=not getattr(module, "is_concatenated", True))
            for start in range(0, len(matrices), per_expert)
        ]
        stacked = torch.stack(experts)
        turned = stacked.transpose(1, 2)
        ambiguous = tuple(stacked.shape) == tuple(turned.shape)
        if tuple(turned.shape) == shape and (not ambiguous or getattr(module, "is_transposed", False)):
            return turned
        return stacked

    def _matrix(self, name: str) -> Tensor:
        read = self._read(self.tensors[name])
        return torch.full(self.tensors[name].shape, torch.nan) if isinstance(read, str) else read[...].float()


def compare_loaded(ours: Side, theirs: Side) -> Iterator[Loaded]:
    """Every parameter of the model, checkpoint beside source; then tensors that transformers does not read."""
    names = list(dict.fromkeys([*theirs.names, *ours.names]))
    for group in dict.fromkeys(map(group_of, names)):
        mine, quantized, unreadable = ours.load(group)
        source, _, unreadable_there = theirs.load(group)
        for name, reason in (unreadable | unreadable_there).items():
            yield Loaded(name, name in unreadable, 0.0, incomparable=reason)
        gone = {place for name in unreadable for place in ours.targets[name].all_names()}
        gone |= {place for name in unreadable_there for place in theirs.targets[name].all_names()}
        for name in (name for name in names if group_of(name) == group and name not in gone):
            if name in mine or name in source:
                yield _compared(name, mine.get(name), source.get(name), quantized=name in quantized)
    for name, reason in ours.unread.items():
        if holds_codes(ours.tensors[name]) or name not in theirs.unread:
            yield Loaded(name, holds_codes(ours.tensors[name]), 0.0, incomparable=reason)


@torch.no_grad()
def _compared(name: str, mine: Tensor | None, source: Tensor | None, *, quantized: bool) -> Loaded:
    if mine is None or source is None:
        lacking = "the checkpoint" if mine is None else "the source"
        return Loaded(name, quantized, 0.0, fault=f"{lacking} does not fill it, transformers would make it up")
    if mine.shape != source.shape:
        return Loaded(name, quantized, 0.0, fault=f"{list(mine.shape)}, the source's is {list(source.shape)}")
    rows = max(1, mine.shape[0]) if mine.dim() == 3 else 1  # each expert by itself
    ours, theirs = (tensor.float().reshape(rows, -1) for tensor in (mine, source))
    difference, size = (ours - theirs).norm(dim=1), theirs.norm(dim=1)
    errors = torch.where(difference == 0, 0.0, difference / size)  # NaN, on either side, stays NaN
    if quantized and errors.numel():
        tiny = torch.maximum(ours.abs().amax(dim=1), theirs.abs().amax(dim=1)) < _TINY
        errors = torch.where(tiny, 0.0, errors)
    return Loaded(
        name, quantized, float(errors.nan_to_num(nan=torch.inf, posinf=torch.inf).max()) if errors.numel() else 0.0
    )


def _joined(matrices: Sequence[Tensor], *, alternating: bool) -> Tensor:
    if len(matrices) == 1:
        return matrices[0]
    return torch.stack(list(matrices), dim=1).flatten(0, 1) if alternating else torch.cat(list(matrices))


def _block(quantization: Mapping[str, Any] | None) -> Block | None:
    """Rows and columns under one scale, from a quantization_config; None if it names no blocks."""
    found = dict(quantization or {})
    schemes = [group.get("weights") or {} for group in (found.get("config_groups") or {}).values()]
    blocks = [found.get("weight_block_size"), *(scheme.get("block_structure") for scheme in schemes)]
    return next((block for value in blocks if (block := as_block(value)) is not None), None)


if __name__ == "__main__":
    main()
