"""Observes one layer while it runs: the inputs of its quantized Linears, and the keys and values that it caches.

In: the modules of one layer, and the recipe's schemes. Out: `Ranges` by the names that modules have on disk. Inputs are
observed by forward pre-hooks. Keys and values are observed by the cache that the model itself fills, so keys come
after rotary embedding in every architecture; they belong to the attention that is running.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from fp8pipe.calibrate.experts import ExpertWatch, Place, expert_matrix
from fp8pipe.calibrate.observers import Observer, observer_for
from fp8pipe.calibrate.ranges import input_ranges, kv_ranges
from fp8pipe.calibrate.sensitivity import figures, sampling
from fp8pipe.calibrate.sensitivity.sampling import Matrix, RowSample, Seen, TokenSample, WatchedInput
from fp8pipe.calibrate.targets import LayerModules, Schemes
from fp8pipe.errors import NonFiniteActivation, UnsupportedArchitecture
from fp8pipe.records.calibration import ExpertTokens, Ranges, Sensitivity

_log = logging.getLogger(__name__)

_EXPERT_WEIGHTS, _EXPERT_TOKENS = 1 << 15, 32
"""How much is sampled of each expert: less than of a Linear, because there are many."""


class LayerWatch:
    """Observes one layer while it is entered, the layer's weights loaded; afterwards call `ranges()`."""

    def __init__(self, schemes: Schemes, layer: LayerModules, tokens: int) -> None:
        """tokens: how many will run, over all samples."""
        self._schemes, self._layer, self._tokens = schemes, layer, tokens
        self._inputs: dict[tuple[str, ...], WatchedInput] = {}
        for name in layer.linears:
            self._inputs[name,] = WatchedInput(schemes.input_observer(), TokenSample(tokens))
        self._experts = [self._watch_experts(module, names, tokens) for module, names in layer.experts]
        self._kv: dict[str, tuple[Observer, Observer]] = {}
        self._rows: dict[tuple[str, ...], RowSample] = {}
        self._running: list[str] = []
        self._entered = ExitStack()

    def _watch_experts(self, module: nn.Module, names: Mapping[Place, Sequence[str]], tokens: int) -> ExpertWatch:
        schemes = self._schemes
        inputs: dict[Place, WatchedInput] = {}
        for place, on_disk in names.items():
            watched = WatchedInput(schemes.input_observer(), TokenSample(tokens, _EXPERT_TOKENS))
            inputs[place] = self._inputs[tuple(on_disk)] = watched
        return ExpertWatch(module, inputs, names, minimum=schemes.min_expert_tokens, total=tokens)

    def __enter__(self) -> Self:
        self._sample_weights()
        with ExitStack() as entering:
            _current.append(self)
            entering.callback(_current.remove, self)
            for watch in self._experts:
                entering.enter_context(watch)
            for name, module in self._layer.linears.items():
                hook = _input_hook(self._inputs[name,])
                entering.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            for name, module in self._layer.attention.items():
                runs = module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
                entering.callback(runs.remove)
                entering.callback(module.register_forward_hook(lambda *_: self._running.clear()).remove)
            self._entered = entering.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()

    @torch.inference_mode()
    def _sample_weights(self) -> None:
        """Sample every weight before the first token runs, and round it if the recipe asks for that."""
        groups = self._layer.groups
        linears = [Matrix((n,), module.weight, groups.get(n, "")) for n, module in self._layer.linears.items()]
        experts = [
            expert_matrix(module, place, on_disk, groups.get(on_disk[0], ""))
            for module, names in self._layer.experts
            for place, on_disk in names.items()
        ]
        for matrices, weights in ((linears, sampling.WEIGHTS), (experts, _EXPERT_WEIGHTS)):
            in_place = self._schemes.quantized_weights
            rows = sampling.sample_rows(matrices, self._schemes.weights, in_place=in_place, weights=weights)
            self._rows |= {matrix.names: sample for matrix, sample in zip(matrices, rows, strict=True)}

    def finish(self) -> None:
        """After the last sample, while the weights are still loaded: give rarely used experts their minimum."""
        for watch in self._experts:
            watch.top_up([tokens for other in self._experts for tokens in other.reserved])

    def observe_kv(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [batch, kv_heads, tokens, head_dim], as cached."""
        if (scheme := self._schemes.kv) is None or not self._running:
            return
        (name,) = self._running
        units = keys.shape[1] if scheme.strategy == "head" else 1
        if name not in self._kv:
            self._kv[name] = (
                observer_for(scheme.observer, units, scheme.percentile),
                observer_for(scheme.observer, units, scheme.percentile),
            )
        for observer, cached in zip(self._kv[name], (keys, values), strict=True):
            observer.update(cached.transpose(0, 1) if units > 1 else cached)

    # ------------------------------------------------------------------------------------------ what was observed

    def ranges(self) -> Ranges:
        """What was observed.

        Raises NonFiniteActivation, naming the first module that saw NaN or Inf; UnsupportedArchitecture for attention
        that cached nothing; CalibrationDataError for a range of 0, unless it is an expert's or a cache's in which every
        value was 0.
        """
        self._check_finite()
        self._check_cached()
        seen = {names: watched.seen() for names, watched in self._inputs.items() if watched.observer.updates}
        inputs, unmeasured = input_ranges(seen, self._layer) if self._schemes.static is not None else ({}, {})
        kv, blank = kv_ranges(self._kv)
        sensitivity = figures.shared_out({names: self._sensitivity(names, one) for names, one in seen.items()})
        return Ranges(
            inputs=inputs,
            kv=kv,
            assumed=unmeasured | blank,
            sensitivity=sensitivity,
            layers={self._layer.name: figures.of_layer(sensitivity.values())} if sensitivity else {},
            expert_tokens=self._expert_tokens(),
        )

    @torch.inference_mode()
    def _sensitivity(self, names: tuple[str, ...], seen: Seen) -> Sensitivity:
        schemes = self._schemes
        group = schemes.weights.block_shape[1]
        return figures.sensitivity_of(self._layer.name, self._rows[names], seen, schemes.activations, group=group)

    def _expert_tokens(self) -> dict[str, ExpertTokens]:
        """Tokens of each expert. Modules whose Linears saw only some tokens count as experts too: a model's own code
        may run experts one by one."""
        found = {name: tokens for watch in self._experts for name, tokens in watch.tokens().items()}
        for name in self._layer.linears:
            tokens = self._inputs[name,].tokens
            if tokens < self._tokens:
                found[name.rpartition(".")[0]] = ExpertTokens(routed=tokens, added=0)
        for name, tokens in found.items():
            if tokens.routed + tokens.added < min(self._schemes.min_expert_tokens, self._tokens):
                _log.warning("%s saw %d of %d tokens; its ranges may be too small", name, tokens.routed, self._tokens)
        return found

    def _check_finite(self) -> None:
        for names, watched in self._inputs.items():
            _check_finite(f"{names[0]}: its input", watched.observer)
        for name, (keys, values) in self._kv.items():
            _check_finite(f"{name}: its keys", keys)
            _check_finite(f"{name}: its values", values)

    def _check_cached(self) -> None:
        silent = [name for name in self._layer.attention if name not in self._kv]
        if silent and self._schemes.kv is not None:
            raise UnsupportedArchitecture(
                f"{silent[0]}: {type(self._layer.attention[silent[0]]).__name__} cached no keys and values while it "
                "ran, so its KV scales cannot be calibrated; use a recipe without kv_cache"
            )


class ObservingCache(DynamicCache):
    """A cache that shows keys and values to the current watch, and stores nothing."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention, returned unchanged: each sample is one whole sequence."""
        if _current:
            _current[-1].observe_kv(key_states, value_states)
        return key_states, value_states

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The state after a layer of linear attention. Only later tokens would need it, and there are none."""
        return recurrent_states


_current: list[LayerWatch] = []
"""The watch that is entered. Layers are computed on one thread, one at a time."""


def _input_hook(watched: WatchedInput) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel():  # some models also run experts that were given no token
            watched.saw(values)

    return hook


def _check_finite(what: str, observer: Observer) -> None:
    if not observer.finite:
        raise NonFiniteActivation(
            f"{what} contained NaN or Inf during calibration (largest value {max(observer.amax())}); the model or its "
            "dtype overflows on this data: check that the BF16 model gives sensible answers, or use a recipe without "
            "calibration"
        )
