"""A model without weights, whose layers are loaded from the snapshot one at a time.

In: the folder of a snapshot. Out: a transformers model on the meta device, and the weights of one layer for as long as
they are needed. Names and fused tensors are converted by transformers' own rules, so a layer holds exactly what
`from_pretrained` would have put there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel

from fp8pipe.calibrate.moves import Moves
from fp8pipe.calibrate.weights import WeightRanges
from fp8pipe.errors import MalformedCheckpoint, UnsupportedArchitecture
from fp8pipe.model import fp8_source
from fp8pipe.model.headers import Headers
from fp8pipe.model.shards import SourceFiles
from fp8pipe.oracle import transformers_probe as probe
from fp8pipe.oracle.loading import OnDisk, get_tensor, load_into, set_tensor

_OUTSIDE = ""
"""The group of what the decoder needs besides its layers: embeddings, norms, rotary tables."""


class Skeleton:
    """The model of a snapshot on the meta device."""

    def __init__(
        self,
        folder: Path,
        headers: Headers,
        files: SourceFiles,
        device: str,
        *,
        trust_remote_code: bool = False,
        scales: Mapping[str, str] | None = None,
        block: tuple[int, int] | None = None,
        weights: WeightRanges | None = None,
    ) -> None:
        """files: opened here, and read until the last layer has run. scales: weight of an FP8 source -> the tensor with
        its scales; such weights are dequantized when they are loaded. block: shape of their blocks, if they have any.
        weights: what to note of the layers' weights while they are loaded.

        Raises UnsupportedArchitecture for a model that cannot be calibrated layer by layer.
        """
        self.folder = folder
        self.device = torch.device(device)
        self.moves = Moves(self.device)
        self._scales, self._block = scales or {}, block
        self._weights = weights
        self.model = _on_meta(folder, trust_remote_code, quantized=bool(scales))
        self.dtype = cast(torch.dtype, self.model.dtype)
        self.decoder: PreTrainedModel = self.model.get_decoder()
        self.decoder_name = _name_of(self.model, self.decoder)
        name, layers = probe.decoder_layers(self.model)
        self.layers = {f"{name}.{index}": layer for index, layer in enumerate(layers)}
        self._meta = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        self._tied = _tied(self.model)
        self._refuse_shared_layers()
        self._tensors, self._files = headers.tensors, files
        for shard in headers.shards:
            files.open(shard.name)
        self._groups = self._group()
        self._fill_computed_buffers()

    def _refuse_shared_layers(self) -> None:
        """Weights that two layers share would be dropped after the first of them, and observed only there."""
        owners: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            layer = self.layer_of(name)
            first = owners.setdefault(id(parameter), layer) if layer is not None else layer
            if first != layer:
                shared = name.removeprefix(f"{layer}.")
                raise UnsupportedArchitecture(
                    f"{self.folder}: {layer} and {first} share {shared}; calibration runs layer by layer and cannot "
                    "follow: use a data-free recipe such as fp8-dynamic"
                )

    def load_outside(self) -> None:
        """Load embeddings, norms and everything else outside the layers, for good."""
        self._load(_OUTSIDE)

    def load(self, layer: str) -> Mapping[str, float]:
        """Load the layer's weights. Returns their ranges, as `Ranges.weights`."""
        return self._load(layer)

    def drop(self, layer: str) -> None:
        """Free the layer's weights."""
        for name in self._expected(layer):
            set_tensor(self.model, name, self._meta[name])

    def will_load(self, layer: str) -> None:
        """Have the kernel read the layer's bytes into the page cache, beside what is done meanwhile."""
        for key in self._groups[layer]:
            info = self._tensors[key]
            self._files.will_need(info.shard, info.begin, info.end)

    def layer_bytes(self) -> int:
        """Memory of the largest layer, in the model's dtype."""
        width = self.dtype.itemsize
        return max(
            sum(math.prod(self._tensors[key].shape) * width for key in self._groups[layer]) for layer in self.layers
        )

    def hidden_bytes(self, tokens: int) -> int:
        """Memory of the hidden states of so many tokens, and of their embeddings, which the model holds too."""
        return 2 * tokens * self.decoder.config.get_text_config().hidden_size * self.dtype.itemsize

    def _group(self) -> dict[str, list[str]]:
        """Layer name, or _OUTSIDE -> tensors on disk."""
        groups: dict[str, list[str]] = defaultdict(list)
        inside = f"{self.decoder_name}." if self.decoder_name else ""
        for key, target in probe.follow(self.model, self._tensors).items():
            layer = self.layer_of(target.name)
            if layer is not None or target.name.startswith(inside):
                groups[layer or _OUTSIDE].append(key)
        return groups

    def layer_of(self, name: str) -> str | None:
        """The layer that holds a module or parameter; None outside the layers."""
        parts = name.split(".")
        prefixes = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        return next((prefix for prefix in prefixes if prefix in self.layers), None)

    def _load(self, group: str) -> Mapping[str, float]:
        keys, ranges = self._groups[group], dict[str, float]()
        with ExitStack() as stack:
            # Tensors outside the layers are mapped: of the embeddings only the rows of tokens that occur are read.
            tensors = self._read(keys, ranges) if group else self._mapped(keys, stack)
            self._convert(tensors)
        self._tie(group)
        for shard in {self._tensors[key].shard for key in keys}:
            self._files.check_unchanged(shard)
        missing = [name for name in self._expected(group) if get_tensor(self.model, name).is_meta]
        if missing:
            raise MalformedCheckpoint(
                f"{self.folder}: {len(missing)} tensors that {type(self.model).__name__} needs are not in the "
                f"safetensors files, the first is {missing[0]}; download the model again"
            )
        return ranges

    def _tie(self, group: str) -> None:
        """Give parameters that the model ties the tensor of the one on disk: filling one of them parted them."""
        expected = set(self._expected(group))
        for names in self._tied:
            present = [get_tensor(self.model, name) for name in names]
            filled = next((tensor for tensor in present if not tensor.is_meta), None)
            for name, tensor in zip(names, present, strict=True):
                if filled is not None and tensor.is_meta and name in expected:
                    set_tensor(self.model, name, filled)

    def _read(self, keys: Sequence[str], ranges: dict[str, float]) -> dict[str, Any]:
        """Tensors that are read one by one, when the conversion asks for them; `ranges` gets those of weights."""

        def arrived(name: str, values: torch.Tensor) -> torch.Tensor:
            if self._weights is not None:
                ranges.update(self._weights.amax(name, values))
            return self.moves.to_device(values)

        tensors: dict[str, Any] = {key: OnDisk(self._files, self._tensors[key], arrived) for key in keys}
        for key in self._scales.keys() & tensors.keys():
            scale = OnDisk(self._files, self._tensors[self._scales[key]], arrived)
            tensors[key] = self._dequantized(tensors[key][:], scale[:])
        return tensors

    def _mapped(self, keys: Sequence[str], stack: ExitStack) -> dict[str, Any]:
        shards = {self._tensors[key].shard for key in keys}
        files = {shard: stack.enter_context(safe_open(self.folder / shard, framework="pt")) for shard in shards}
        return {key: files[self._tensors[key].shard].get_tensor(key) for key in keys}

    def _dequantized(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """A weight [out, in] of an FP8 source in the model's dtype."""
        grid = fp8_source.grid_of(tuple(codes.shape), tuple(scale.shape), self._block)
        assert grid is not None, "the plan has checked the shapes"
        return fp8_source.dequantize(codes, scale.float().view(grid.shape), grid.unit).to(self.dtype)

    def _convert(self, tensors: dict[str, Any]) -> None:
        problems = load_into(self.model, tensors, self.device, self.dtype)
        if problems:
            raise MalformedCheckpoint(
                f"{self.folder}: weights do not fit the model ({'; '.join(problems[:3])}); download it again"
            )

    def _expected(self, group: str) -> Iterable[str]:
        """Names of one group's parameters and persistent buffers."""
        root = group or self.decoder_name
        names = cast(nn.Module, self.model.get_submodule(root)).state_dict().keys()
        full = (f"{root}.{name}" if root else name for name in names)
        return [name for name in full if (self.layer_of(name) or _OUTSIDE) == group]

    def _fill_computed_buffers(self) -> None:
        """Compute what no checkpoint contains (rotary tables), and nothing else, by the model's own initialisation."""
        for name in self.model.state_dict():
            get_tensor(self.model, name)._is_hf_initialized = True  # type: ignore[attr-defined]  # transformers' own mark
        for name, buffer in list(self.model.named_non_persistent_buffers()):
            set_tensor(self.model, name, torch.empty_like(buffer, device=self.device))
        for module in self.model.modules():
            module._is_hf_initialized = False  # type: ignore[assignment]  # transformers' own mark
        self.model.initialize_weights()


def _on_meta(folder: Path, trust_remote_code: bool, *, quantized: bool) -> PreTrainedModel:
    try:
        model, quantization = probe.build(folder, trust_remote_code)
    except probe.Unsupported as reason:
        raise UnsupportedArchitecture(f"{folder}: {reason}") from reason
    if quantization is not None and not quantized:
        raise UnsupportedArchitecture(
            f"{folder}: the weights are already quantized, but calibration needs the BF16 model; give its repository"
        )
    return model.eval()


def _tied(model: nn.Module) -> tuple[tuple[str, ...], ...]:
    """Names of parameters that are one tensor, together."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    return tuple(tuple(group) for group in names.values() if len(group) > 1)


def _name_of(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)
