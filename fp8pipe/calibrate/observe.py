"""What a layer does to its quantized inputs and its cache, seen through hooks while the layer runs.

In: the modules of one layer, and the recipe's schemes. Out: `Ranges` under the names that modules have on disk.
Inputs are seen by forward pre-hooks. Keys and values are seen by the cache that the model itself fills, so keys come
after rotary embedding, whatever the architecture; they belong to the attention that is running.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from fp8pipe.calibrate import noise
from fp8pipe.calibrate.experts import ExpertWatch, expert_matrix
from fp8pipe.calibrate.noise import Matrix, RowSample, TokenSample
from fp8pipe.calibrate.ranges import Observer, observer_for
from fp8pipe.calibrate.targets import Place
from fp8pipe.calibrate.watched import WatchedInput
from fp8pipe.config import ActivationScheme, KVCacheScheme, Recipe, WeightScheme
from fp8pipe.errors import CalibrationDataError, NonFiniteActivation, UnsupportedArchitecture
from fp8pipe.records.calibration import ExpertTokens, KVRange, Ranges

_log = logging.getLogger(__name__)

_EXPERT_WEIGHTS, _EXPERT_TOKENS = 1 << 15, 32
"""What is looked at of one expert among many."""


@dataclass(frozen=True, slots=True)
class Schemes:
    """The recipe, as far as it decides what is observed."""

    weights: WeightScheme
    activations: ActivationScheme | None
    kv: KVCacheScheme | None
    quantized_weights: bool = False
    """Run the samples through weights that are rounded to FP8."""
    min_expert_tokens: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> Schemes:
        """Those of `recipe`."""
        data = recipe.calibration
        return cls(recipe.weights, recipe.activations, recipe.kv_cache, data.quantized_weights, data.min_expert_tokens)

    @property
    def static(self) -> ActivationScheme | None:
        """How inputs are observed, where their ranges are needed."""
        return self.activations if self.activations is not None and self.activations.mode == "static" else None

    def input_observer(self) -> Observer:
        """What finds the range of one input."""
        return (
            observer_for(self.static.observer, 1, self.static.percentile) if self.static else observer_for("minmax", 1)
        )


@dataclass(frozen=True, slots=True)
class LayerModules:
    """What is watched in one layer: name on disk -> module."""

    name: str
    linears: Mapping[str, nn.Linear] = field(default_factory=dict)
    attention: Mapping[str, nn.Module] = field(default_factory=dict)
    experts: Sequence[tuple[nn.Module, Mapping[Place, Sequence[str]]]] = ()
    """Experts modules, and the names on disk of the projections that read each input."""
    groups: Mapping[str, str] = field(default_factory=dict)


class LayerWatch:
    """Observes one layer while it is entered, its weights loaded; `ranges()` afterwards."""

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
        self._look_at_weights()
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
    def _look_at_weights(self) -> None:
        """Sample every weight before the first token runs, and round it where the recipe wants that."""
        groups = self._layer.groups
        linears = [Matrix((n,), module.weight, groups.get(n, "")) for n, module in self._layer.linears.items()]
        experts = [
            expert_matrix(module, place, on_disk, groups.get(on_disk[0], ""))
            for module, names in self._layer.experts
            for place, on_disk in names.items()
        ]
        for matrices, weights in ((linears, noise.WEIGHTS), (experts, _EXPERT_WEIGHTS)):
            in_place = self._schemes.quantized_weights
            rows = noise.sample_rows(matrices, self._schemes.weights, in_place=in_place, weights=weights)
            self._rows |= {matrix.names: sample for matrix, sample in zip(matrices, rows, strict=True)}

    def finish(self) -> None:
        """After the last sample, while the weights are still there: give rarely used experts their minimum."""
        for watch in self._experts:
            watch.top_up()

    def ranges(self) -> Ranges:
        """What was seen. NonFiniteActivation names the first module that saw NaN or Inf, UnsupportedArchitecture an
        attention that cached nothing."""
        for names, watched in self._inputs.items():
            _check_finite(f"{names[0]}: its input", watched.observer)
        for name, (keys, values) in self._kv.items():
            _check_finite(f"{name}: its keys", keys)
            _check_finite(f"{name}: its values", values)
        self._check_cached()
        seen = {names: watched.seen() for names, watched in self._inputs.items() if watched.observer.updates}
        kv = {n: KVRange(k_amax=k.ranges(), v_amax=v.ranges()) for n, (k, v) in self._kv.items()}
        static = self._schemes.static is not None
        if static:
            for names, one in seen.items():
                _check_used(f"{names[0]}: its input", (one.amax_to_cover,), (one.amax,))
        for name, found in kv.items():
            keys, values = self._kv[name]
            _check_used(f"{name}: its keys", found.k_amax, keys.amax())
            _check_used(f"{name}: its values", found.v_amax, values.amax())
        sensitivity = noise.shared_out({names: self._sensitivity(names, one) for names, one in seen.items()})
        return Ranges(
            inputs={name: one.amax_to_cover for names, one in seen.items() for name in names} if static else {},
            kv=kv,
            sensitivity=sensitivity,
            layers={self._layer.name: noise.of_layer(sensitivity.values())} if sensitivity else {},
            expert_tokens=self._expert_tokens(),
        )

    def _expert_tokens(self) -> dict[str, ExpertTokens]:
        """Tokens of each expert, and of modules with Linears that saw only some: experts that a model's own code runs
        one by one."""
        found = {name: tokens for watch in self._experts for name, tokens in watch.tokens().items()}
        for name in self._layer.linears:
            tokens = self._inputs[name,].tokens
            if tokens < self._tokens:
                found[name.rpartition(".")[0]] = ExpertTokens(routed=tokens, added=0)
        for name, tokens in found.items():
            if tokens.routed + tokens.added < min(self._schemes.min_expert_tokens, self._tokens):
                _log.warning("%s saw %d of %d tokens; its ranges rest on few", name, tokens.routed, self._tokens)
        return found

    @torch.inference_mode()
    def _sensitivity(self, names: tuple[str, ...], seen: noise.Seen) -> noise.Sensitivity:
        schemes = self._schemes
        group = schemes.weights.block_shape[1]
        return noise.sensitivity_of(self._layer.name, self._rows[names], seen, schemes.activations, group=group)

    def _check_cached(self) -> None:
        silent = [name for name in self._layer.attention if name not in self._kv]
        if silent and self._schemes.kv is not None:
            raise UnsupportedArchitecture(
                f"{silent[0]}: {type(self._layer.attention[silent[0]]).__name__} cached no keys and values while it "
                "ran, so there is nothing to find KV scales from; use a recipe without kv_cache"
            )

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


class ObservingCache(DynamicCache):
    """A cache that shows what would be stored to the layer's watch, and stores nothing."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention; returned as given, since each sample is one whole sequence."""
        if _current:
            _current[-1].observe_kv(key_states, value_states)
        return key_states, value_states

    def update_recurrent_state(self, recurrent_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The state behind a layer of linear attention: of use to later tokens only, and there are none."""
        return recurrent_states


_current: list[LayerWatch] = []
"""The watch that is entered. Layers are computed on one thread, one at a time."""


def _input_hook(watched: WatchedInput) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel():  # an expert that was given no token is run by some models all the same
            watched.saw(values)

    return hook


def _check_used(what: str, ranges: Sequence[float], amax: Sequence[float]) -> None:
    """A range of 0 has no scale: whatever came instead would be made up, and clip all that is served later."""
    if all(ranges):
        return
    unit = f" (head {ranges.index(0.0)})" if len(ranges) > 1 else ""
    reason = "most of its values are 0" if amax[ranges.index(0.0)] else "every value was 0 on the calibration data"
    raise CalibrationDataError(
        f"{what}{unit} has a range of 0: {reason}; add the module to the recipe's ignore, give other data, or use the "
        "minmax observer"
    )


def _check_finite(what: str, observer: Observer) -> None:
    if not observer.finite:
        raise NonFiniteActivation(
            f"{what} held NaN or Inf during calibration (largest value {max(observer.amax())}); the model or its dtype "
            "overflows on this data: check that the BF16 model answers sensibly, or use a recipe without calibration"
        )
