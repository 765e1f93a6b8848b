"""One forward pass over all samples, layer by layer: load a layer, run every sample through it, observe, drop it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fp8pipe.calibrate.experts import ExpertWatch, Place, check_observable
from fp8pipe.calibrate.lockstep import Lane, Lockstep, Step
from fp8pipe.calibrate.observe import LayerWatch, Observers, ObservingCache
from fp8pipe.calibrate.record import Ranges
from fp8pipe.calibrate.resume import Bookmark
from fp8pipe.calibrate.skeleton import Skeleton
from fp8pipe.checkpoint import Headers
from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.progress import Progress, ProgressEvent, quiet

_NO_CACHE = "no keys and values were cached while it ran"
_LATENT = "latent attention (MLA): vLLM has no KV scales for it"


@dataclass(frozen=True, slots=True)
class Targets:
    """What to observe: name on disk -> name in transformers."""

    linears: Mapping[str, str]
    attention: Mapping[str, str]
    experts: Mapping[str, tuple[str, Place]] = field(default_factory=dict)
    """Projection of one expert, on disk -> experts module, and which input of it."""
    latent: Sequence[str] = ()
    """Attention without KV scales in vLLM (MLA); named in the result, not observed."""


def run(
    folder: Path,
    headers: Headers,
    targets: Targets,
    token_ids: Sequence[Sequence[int]],
    observers: Observers,
    bookmark: Bookmark,
    *,
    min_expert_tokens: int = 0,
    device: str = "cpu",
    progress: Progress = quiet,
) -> Ranges:
    """Ranges of `targets` in the model of `folder`.

    token_ids: one sequence per sample, each run as a batch of one. Raises UnsupportedArchitecture when a module
    never ran, so that none is left without a range.
    """
    skeleton = Skeleton(folder, headers, device)
    watches = _Watches(skeleton, observers, targets, samples=len(token_ids), min_expert_tokens=min_expert_tokens)
    skeleton.load_outside()
    with Lockstep(skeleton.layers, [_forward(skeleton, ids) for ids in token_ids]) as steps:
        return watches.completed(_over(steps, skeleton, watches, bookmark, progress))


def _forward(skeleton: Skeleton, ids: Sequence[int]) -> Callable[[], object]:
    def forward() -> object:
        input_ids = torch.tensor([ids], device=skeleton.device)
        cache = ObservingCache(skeleton.model.config)
        return skeleton.decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)

    return forward


def _over(
    steps: Iterable[Step], skeleton: Skeleton, watches: _Watches, bookmark: Bookmark, progress: Progress
) -> Ranges:
    """Compute every layer that the bookmark does not hold."""
    finished, ranges, stored = bookmark.find() or ((), Ranges(), [])
    done: list[str] = []
    outputs: list[Any] = []
    for step in steps:
        if step.layer in done:
            raise UnsupportedArchitecture(f"{step.layer} runs twice in one pass; calibration cannot follow")
        if len(done) == len(finished) and stored:
            for lane, hidden in zip(step.lanes, stored, strict=True):
                lane.hidden = hidden.to(skeleton.device)
            stored = []
        elif outputs and _handed_on(step.lanes, outputs):
            bookmark.set(done, ranges, [lane.hidden for lane in step.lanes])
        if len(done) < len(finished):
            for lane in step.lanes:
                lane.proceed(lane.hidden)  # any tensor of this shape: what it leads to is replaced by what was stored
        else:
            watch = watches.of(step.layer)
            with skeleton.loaded(step.layer), watch:
                outputs = _compute(step, len(done), len(skeleton.layers), progress)
                watch.top_up()
            ranges = ranges.joined(watch.ranges())
        done.append(step.layer)
    return ranges


def _compute(step: Step, done: int, layers: int, progress: Progress) -> list[Any]:
    """Run every sample through the layer, each on to the next layer."""
    outputs = []
    for count, lane in enumerate(step.lanes, start=1):
        outputs.append(output := step.compute(lane))
        lane.proceed(output)
        progress(ProgressEvent("calibrate", done + count / len(step.lanes), layers, "layers", step.layer))
    return outputs


def _handed_on(lanes: Sequence[Lane], outputs: Sequence[Any]) -> bool:
    """Whether all that the coming layer gets from the last one is its output, so that a restart can begin here.

    Not so where layers return more than hidden states, or share keys and values through a dictionary.
    """
    return all(
        lane.hidden is output and not any(isinstance(value, MutableMapping) for value in lane.kwargs.values())
        for lane, output in zip(lanes, outputs, strict=True)
    )


class _Watches:
    """Which modules of each layer to observe, and what they are called on disk."""

    def __init__(
        self, skeleton: Skeleton, observers: Observers, targets: Targets, *, samples: int, min_expert_tokens: int
    ) -> None:
        self._observers, self._targets = observers, targets
        self._samples, self._min_expert_tokens = samples, min_expert_tokens
        self._linears = _by_layer(skeleton, targets.linears)
        self._attention = _by_layer(skeleton, targets.attention)
        self._experts = _by_layer(skeleton, {module: module for module, _ in targets.experts.values()})
        for experts in self._experts.values():
            for name, module in experts.items():
                check_observable(module, name)

    def of(self, layer: str) -> LayerWatch:
        """The watch of one layer."""
        experts = [self._watch_experts(name, module) for name, module in self._experts[layer].items()]
        return LayerWatch(self._observers, self._linears[layer], self._attention[layer], experts)

    def _watch_experts(self, name: str, module: nn.Module) -> ExpertWatch:
        assert self._observers.inputs is not None, "experts are targets only of static activations"
        names: dict[Place, list[str]] = defaultdict(list)
        for on_disk, (owner, place) in self._targets.experts.items():
            if owner == name:
                names[place].append(on_disk)
        scheme, minimum = self._observers.inputs, self._min_expert_tokens
        return ExpertWatch(module, names, scheme, minimum=minimum, samples=self._samples)

    def completed(self, ranges: Ranges) -> Ranges:
        """`ranges` with a reason for every cache that has none; no quantized module may be left without a range."""
        wanted = [*self._targets.linears, *self._targets.experts]
        missing = [name for name in wanted if name not in ranges.inputs]
        if missing and self._observers.inputs is not None:
            raise UnsupportedArchitecture(
                f"{len(missing)} of {len(wanted)} modules never ran on the calibration data, first "
                f"{missing[0]}; give more samples, or add them to the recipe's ignore"
            )
        if self._observers.kv is None:
            return ranges
        absent = dict.fromkeys(self._targets.latent, _LATENT)
        absent |= {name: _NO_CACHE for name in self._targets.attention if name not in ranges.kv}
        return ranges.joined(Ranges(kv_absent=absent))


def _by_layer(skeleton: Skeleton, names: Mapping[str, str]) -> dict[str, dict[str, nn.Module]]:
    """Layer -> name on disk -> module."""
    layers: dict[str, dict[str, nn.Module]] = {layer: {} for layer in skeleton.layers}
    for name, module in names.items():
        layer = skeleton.layer_of(module)
        if layer is None:
            raise UnsupportedArchitecture(f"{name} lies outside the decoder's layers; add it to the recipe's ignore")
        layers[layer][name] = skeleton.model.get_submodule(module)
    return layers
