"""One forward pass over all samples, layer by layer: load a layer, run every sample through it, observe, drop it."""

from __future__ import annotations

import gc
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fp8pipe.calibrate.batches import TOKENS, give_back_freed, is_out_of_memory, micro_batches, smaller
from fp8pipe.calibrate.experts import check_observable, is_observable
from fp8pipe.calibrate.held import Alike, Pass, embedding_of
from fp8pipe.calibrate.lockstep import Lane, Lockstep, Step
from fp8pipe.calibrate.observe import LayerModules, LayerWatch, ObservingCache, Schemes
from fp8pipe.calibrate.products import fast_products
from fp8pipe.calibrate.resume import Bookmark
from fp8pipe.calibrate.skeleton import Skeleton
from fp8pipe.calibrate.targets import Place, Targets
from fp8pipe.errors import EnvironmentFault, UnsupportedArchitecture
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records.calibration import Ranges

_LATENT = "latent attention (MLA): vLLM has no KV scales for it"
_BORROWS = "it reads the keys and values that another layer cached"
_NO_ATTENTION = "no attention with keys and values: linear attention or a recurrent mixer"

_log = logging.getLogger(__name__)

Batches = Sequence[tuple[int, ...]]


def run(
    skeleton: Skeleton,
    targets: Targets,
    token_ids: Sequence[Sequence[int]],
    schemes: Schemes,
    bookmark: Bookmark,
    *,
    max_tokens: int | None = None,
    progress: Progress = quiet,
) -> Ranges:
    """Ranges of `targets` in the model of `skeleton`.

    token_ids: one sequence per sample; samples of equal length run together, up to `max_tokens` tokens (default: what
    suits the device). When memory runs out, smaller passes are tried, from the last finished layer on. Raises
    UnsupportedArchitecture when a module never ran, so that none is left without a range; EnvironmentFault when one
    sample alone does not fit.
    """
    give_back_freed()
    watches = _Watches(skeleton, schemes, targets, tokens=sum(map(len, token_ids)))
    skeleton.load_outside()
    max_tokens = max_tokens or TOKENS[skeleton.device.type]
    while True:
        batches = micro_batches(token_ids, max_tokens)
        try:
            return watches.completed(_attempt(skeleton, watches, batches, token_ids, bookmark, progress))
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            max_tokens = _fewer(batches, token_ids, error)
        _free_memory(skeleton)


def _attempt(
    skeleton: Skeleton,
    watches: _Watches,
    batches: Batches,
    token_ids: Sequence[Sequence[int]],
    bookmark: Bookmark,
    progress: Progress,
) -> Ranges:
    embedding, alike = embedding_of(skeleton.decoder), Alike()
    ids = ([token_ids[index] for index in batch] for batch in batches)
    passes = [Pass(_forward(skeleton, some), embedding, alike) for some in ids]
    with Lockstep(skeleton.layers, passes, lambda index, lane: passes[index].arrived(lane)) as steps:
        return _over(steps, passes, skeleton, watches, batches, bookmark, progress)


def _fewer(batches: Batches, token_ids: Sequence[Sequence[int]], error: BaseException) -> int:
    """Tokens of the next attempt's largest pass, said in the log."""
    tokens = smaller(batches, token_ids)
    if tokens is None:
        longest, reason = max(map(len, token_ids)), str(error).partition("\n")[0] or type(error).__name__
        raise EnvironmentFault(
            f"out of memory while one sample of {longest} tokens ran alone ({reason}); "
            "set calibration.max_seq_len or num_samples lower, or use a machine with more memory"
        ) from error
    _log.warning(
        "calibration ran out of memory with %d samples in a pass; trying again with at most %d tokens in a pass",
        max(map(len, batches)),
        tokens,
    )
    return tokens


def _free_memory(skeleton: Skeleton) -> None:
    """What the failed attempt held is garbage now; allocators are to give it back."""
    gc.collect()
    if skeleton.device.type == "cuda":
        torch.cuda.empty_cache()


def _forward(skeleton: Skeleton, ids: Sequence[Sequence[int]]) -> Callable[[], object]:
    def forward() -> object:
        input_ids = torch.tensor(ids, device=skeleton.device)
        cache = ObservingCache(skeleton.model.config)
        return skeleton.decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)

    return forward


def _over(
    steps: Iterable[Step],
    passes: Sequence[Pass],
    skeleton: Skeleton,
    watches: _Watches,
    batches: Batches,
    bookmark: Bookmark,
    progress: Progress,
) -> Ranges:
    """Compute every layer that the bookmark does not hold."""
    finished, ranges, stored = bookmark.find() or ((), Ranges(), {})
    done: list[str] = []
    outputs: list[Any] = []
    begun: list[Any] = []
    for step in steps:
        begun = begun or [_mappings(lane) for lane in step.lanes]
        if step.layer in done:
            raise UnsupportedArchitecture(f"{step.layer} runs twice in one pass; calibration cannot follow")
        if len(done) == len(finished) and stored:
            _restore(step.lanes, batches, stored, skeleton.device)
            stored = {}
        elif outputs and _handed_on(step.lanes, outputs, batches, begun):
            bookmark.set(done, ranges, {batch: lane.hidden for batch, lane in zip(batches, step.lanes, strict=True)})
        if len(done) < len(finished):
            for lane in step.lanes:
                lane.proceed(lane.hidden)  # any tensor of this shape: what it leads to is replaced by what was stored
        else:
            outputs = []  # those of the last layer are in the lanes, each until this layer has replaced it
            watch = watches.of(step.layer)
            with skeleton.loaded(step.layer), watch, fast_products(skeleton.dtype, skeleton.device):
                outputs = _compute(step, passes, len(done), len(skeleton.layers), progress)
                watch.finish()
            ranges = ranges.joined(watch.ranges())
        done.append(step.layer)
    return ranges


def _compute(step: Step, passes: Sequence[Pass], done: int, layers: int, progress: Progress) -> list[Any]:
    """Run every sample through the layer, each on to the next layer."""
    outputs = []
    for count, (lane, one) in enumerate(zip(step.lanes, passes, strict=True), start=1):
        outputs.append(one.advance(step, lane))
        progress(ProgressEvent("calibrate", done + count / len(step.lanes), layers, "layers", step.layer))
    return outputs


def _handed_on(lanes: Sequence[Lane], outputs: Sequence[Any], batches: Batches, begun: Sequence[Any]) -> bool:
    """Whether all that the coming layer gets from the last one is its output, so that a restart can begin here.

    Not so where layers return more than hidden states, or have put keys and values for others into a dictionary.
    """
    return all(
        lane.hidden is output and len(output) == len(batch) and _mappings(lane) == before
        for lane, output, batch, before in zip(lanes, outputs, batches, begun, strict=True)
    )


def _mappings(lane: Lane) -> dict[str, dict[Any, int]]:
    """What is in the dictionaries among a layer's arguments, by identity."""
    found = {name: value for name, value in lane.kwargs.items() if isinstance(value, MutableMapping)}
    return {name: {key: id(value) for key, value in one.items()} for name, one in found.items()}


def _restore(lanes: Sequence[Lane], batches: Batches, stored: Mapping[int, Tensor], device: torch.device) -> None:
    for lane, batch in zip(lanes, batches, strict=True):
        lane.hidden = torch.stack([stored[index] for index in batch]).to(device)


class _Watches:
    """Which modules of each layer to observe, and what they are called on disk."""

    def __init__(self, skeleton: Skeleton, schemes: Schemes, targets: Targets, *, tokens: int) -> None:
        self._skeleton, self._schemes, self._targets, self._tokens = skeleton, schemes, targets, tokens
        self._linears = _by_layer(skeleton, targets.linears)
        self._attention = _by_layer(skeleton, targets.attention)
        holders = {module: skeleton.model.get_submodule(module) for module, _ in targets.experts.values()}
        if schemes.static is not None:
            for name, module in holders.items():
                check_observable(module, name)
        observable = {name: name for name, module in holders.items() if is_observable(module)}
        self._experts = _by_layer(skeleton, observable)

    def of(self, layer: str) -> LayerWatch:
        """The watch of one layer."""
        modules = LayerModules(
            name=layer,
            linears=cast(dict[str, nn.Linear], self._linears[layer]),
            attention=self._attention[layer],
            experts=[(module, self._names_of(owner)) for owner, module in self._experts[layer].items()],
            groups=self._targets.groups,
        )
        return LayerWatch(self._schemes, modules, self._tokens)

    def _names_of(self, owner: str) -> dict[Place, list[str]]:
        """Input of an expert -> names on disk of the projections that read it."""
        names: dict[Place, list[str]] = defaultdict(list)
        for on_disk, (module, place) in self._targets.experts.items():
            if module == owner:
                names[place].append(on_disk)
        return names

    def completed(self, ranges: Ranges) -> Ranges:
        """`ranges` with a reason for every layer without KV ranges; no quantized module may be left without one."""
        wanted = [*self._targets.linears, *self._targets.experts]
        missing = [name for name in wanted if name not in ranges.inputs]
        if missing and self._schemes.static is not None:
            raise UnsupportedArchitecture(
                f"{len(missing)} of {len(wanted)} modules never ran on the calibration data, first "
                f"{missing[0]}; give more samples, or add them to the recipe's ignore"
            )
        return ranges.joined(Ranges(kv_absent=self._absent())) if self._schemes.kv is not None else ranges

    def _absent(self) -> dict[str, str]:
        """Latent attention, and layers that cache no keys and values of their own."""
        latent = {self._skeleton.layer_of(module) for module in self._targets.latent.values()}
        absent = dict.fromkeys(self._targets.latent, _LATENT)
        for name, layer in self._skeleton.layers.items():
            if not self._attention[name] and name not in latent:
                borrows = any(getattr(module, "is_kv_shared_layer", False) for module in layer.modules())
                absent[name] = _BORROWS if borrows else _NO_ATTENTION
        return absent


def _by_layer(skeleton: Skeleton, names: Mapping[str, str]) -> dict[str, dict[str, nn.Module]]:
    """Layer -> name on disk -> module."""
    layers: dict[str, dict[str, nn.Module]] = {layer: {} for layer in skeleton.layers}
    for name, module in names.items():
        layer = skeleton.layer_of(module)
        if layer is None:
            raise UnsupportedArchitecture(f"{name} lies outside the decoder's layers; add it to the recipe's ignore")
        layers[layer][name] = skeleton.model.get_submodule(module)
    return layers
