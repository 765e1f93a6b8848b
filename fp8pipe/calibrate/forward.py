"""One forward pass over all samples, layer by layer: load a layer, run every sample through it, observe, drop it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fp8pipe.calibrate.cpu_linear import fast_products
from fp8pipe.calibrate.hooks import LayerWatch, ObservingCache
from fp8pipe.calibrate.layers import LayerLoader
from fp8pipe.calibrate.lockstep import Lockstep, Step
from fp8pipe.calibrate.memory import Batches, placement, return_freed_memory, with_smaller_batches
from fp8pipe.calibrate.resume import Bookmark, Handover, restore
from fp8pipe.calibrate.skeleton import Skeleton
from fp8pipe.calibrate.targets import LayerModules, Schemes, Targets, check_observed, kv_absent, modules_by_layer
from fp8pipe.calibrate.waiting import HiddenStates
from fp8pipe.errors import Fp8PipeError, UnsupportedArchitecture
from fp8pipe.oracle.loading import is_out_of_memory
from fp8pipe.progress import Progress, ProgressEvent, quiet
from fp8pipe.records.calibration import Ranges


def run(
    skeleton: Skeleton,
    targets: Targets,
    token_ids: Sequence[Sequence[int]],
    schemes: Schemes,
    bookmark: Bookmark,
    *,
    progress: Progress = quiet,
) -> Ranges:
    """Ranges of `targets` in the model of `skeleton`.

    token_ids: one sequence per sample. When memory runs out, smaller passes are tried, from the last bookmark on.
    Raises UnsupportedArchitecture when a module never ran, so that none is left without a range, and when the model's
    own code fails; EnvironmentFault when a single sample does not fit into memory.
    """
    return_freed_memory()
    modules = modules_by_layer(skeleton, targets, static=schemes.static is not None)
    skeleton.load_outside()

    def attempt(batches: Batches) -> Ranges:
        forwards = [_forward(skeleton, [token_ids[index] for index in batch]) for batch in batches]
        tokens = sum(map(len, token_ids))
        place = placement(skeleton.moves, layer=skeleton.layer_bytes(), hidden=skeleton.hidden_bytes(tokens))
        hidden = HiddenStates(skeleton.moves, on_host=place.hidden_on_host)
        with (
            _errors_of(skeleton.model),
            LayerLoader(skeleton, ahead=place.load_ahead) as loader,
            Lockstep(skeleton.layers, forwards, hidden.park) as steps,
        ):
            loop = _Loop(skeleton, loader, hidden, modules, schemes, bookmark, batches, tokens, progress)
            return loop.run(steps)

    ranges = with_smaller_batches(attempt, token_ids, skeleton.device)
    if schemes.static is not None:
        check_observed(targets, ranges)
    return ranges if schemes.kv is None else ranges.joined(Ranges(kv_absent=kv_absent(skeleton, targets, modules)))


@contextmanager
def _errors_of(model: nn.Module) -> Iterator[None]:
    """What the model's own code raises is a refusal: transformers cannot run this model as its config.json has it."""
    try:
        yield
    except Fp8PipeError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        raise UnsupportedArchitecture(
            f"{type(model).__name__} fails on the calibration data ({type(error).__name__}: {reason}); correct "
            "config.json if transformers does not run this model either, or use a data-free recipe such as fp8-dynamic"
        ) from error


def _forward(skeleton: Skeleton, ids: Sequence[Sequence[int]]) -> Callable[[], object]:
    def forward() -> object:
        input_ids = torch.tensor(ids, device=skeleton.device)
        cache = ObservingCache(skeleton.model.config)
        return skeleton.decoder(input_ids=input_ids, past_key_values=cache, use_cache=True)

    return forward


@dataclass(frozen=True, slots=True)
class _Loop:
    """One attempt at running all layers."""

    skeleton: Skeleton
    loader: LayerLoader
    hidden: HiddenStates
    modules: Mapping[str, LayerModules]
    schemes: Schemes
    bookmark: Bookmark
    batches: Batches
    tokens: int
    progress: Progress

    def run(self, steps: Iterable[Step]) -> Ranges:
        """Compute every layer that an earlier run has not finished."""
        finished, ranges, stored = self.bookmark.find()
        done: list[str] = []
        outputs: list[Any] = []
        handover: Handover | None = None
        for step in steps:
            handover = handover or Handover(step.passes)
            if step.layer in done:
                raise UnsupportedArchitecture(f"{step.layer} runs twice in one pass; calibration cannot follow")
            if len(done) == len(finished) and stored:
                for one, batch in zip(self.hidden.each(step.passes), self.batches, strict=True):
                    restore(one, batch, stored, self.skeleton.device)
                    self.hidden.park(one)
                stored = {}
            elif outputs and handover.is_hidden_states(step.passes, self.batches, outputs):
                self._set_bookmark(step, done, ranges)
            if len(done) < len(finished):
                for one in self.hidden.each(step.passes):
                    one.proceed(one.hidden)  # any tensor of this shape: the stored ones replace what comes of it
            else:
                outputs = []  # the passes hold them, each until this layer has replaced it
                watch = LayerWatch(self.schemes, self.modules[step.layer], self.tokens)
                fast = fast_products(self.skeleton.dtype, self.skeleton.device)
                with self.loader.loaded(step.layer) as weights, watch, fast:
                    outputs = self._compute(step, len(done))
                    watch.finish()
                ranges = ranges.joined(watch.ranges()).joined(Ranges(weights=dict(weights)))
            done.append(step.layer)
        return ranges

    def _set_bookmark(self, step: Step, done: Sequence[str], ranges: Ranges) -> None:
        hidden = {batch: self.hidden.read(one) for batch, one in zip(self.batches, step.passes, strict=True)}
        self.bookmark.set(done, ranges, hidden)

    def _compute(self, step: Step, done: int) -> list[Any]:
        """Outputs of the layer for every pass; each pass runs on to its next layer call, or to its end."""
        outputs = []
        for count, one in enumerate(self.hidden.each(step.passes), start=1):
            output = step.compute(one)
            one.proceed(output)
            if one.layer is not None:  # nothing asks for the outputs of the last layer
                outputs.append(output)
            share, layers = count / len(step.passes), len(self.skeleton.layers)
            self.progress(ProgressEvent("calibrate", done + share, layers, "layers", step.layer))
        return outputs
