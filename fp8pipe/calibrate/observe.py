"""What a layer does to its quantized inputs and its cache, seen through hooks while the layer runs.

In: the modules of one layer, and the recipe's observers. Out: `Ranges` under the names that modules have on disk.
Inputs are seen by forward pre-hooks. Keys and values are seen by the cache that the model itself fills, so keys come
after rotary embedding, whatever the architecture; they belong to the attention that is running.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import DynamicCache, PretrainedConfig

from fp8pipe.calibrate.experts import ExpertWatch
from fp8pipe.calibrate.ranges import Observer, observer_for
from fp8pipe.calibrate.record import InputStatistics, KVRange, Ranges
from fp8pipe.config import ActivationScheme, KVCacheScheme
from fp8pipe.errors import NonFiniteActivation


@dataclass(frozen=True, slots=True)
class Observers:
    """What the recipe wants to be observed. None: nothing of this kind."""

    inputs: ActivationScheme | None
    kv: KVCacheScheme | None


class LayerWatch:
    """Observes one layer while it is entered; `ranges()` afterwards."""

    def __init__(
        self,
        observers: Observers,
        linears: Mapping[str, nn.Module],
        attention: Mapping[str, nn.Module],
        experts: Sequence[ExpertWatch] = (),
    ) -> None:
        """linears, attention: name on disk -> module of this layer."""
        self._observers = observers
        self._linears, self._attention, self._experts = linears, attention, experts
        self._inputs: dict[str, Observer] = {}
        self._kv: dict[str, tuple[Observer, Observer]] = {}
        self._running: list[str] = []
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        _current.append(self)
        for watch in self._experts:
            self._entered.enter_context(watch)
        if (scheme := self._observers.inputs) is not None:
            for name, module in self._linears.items():
                self._inputs[name] = observer_for(scheme.observer, 1, scheme.percentile)
                self._hook(module.register_forward_pre_hook(_input_hook(self._inputs[name]), with_kwargs=True))
        for name, module in self._attention.items():
            self._hook(module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name)))
            self._hook(module.register_forward_hook(lambda *_: self._running.clear()))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._entered.close()
        _current.remove(self)

    def top_up(self) -> None:
        """After the last sample, while the weights are still there: give rarely used experts their minimum."""
        for watch in self._experts:
            watch.top_up()

    def ranges(self) -> Ranges:
        """What was seen; NonFiniteActivation names the first module that saw NaN or Inf."""
        inputs, expert_tokens = dict(self._inputs), {}
        for watch in self._experts:
            inputs |= watch.observers()
            expert_tokens |= watch.tokens()
        for name, observer in inputs.items():
            _check_finite(f"{name}: its input", observer)
        for name, (keys, values) in self._kv.items():
            _check_finite(f"{name}: its keys", keys)
            _check_finite(f"{name}: its values", values)
        seen = {name: observer for name, observer in inputs.items() if observer.updates}
        return Ranges(
            inputs={name: observer.ranges()[0] for name, observer in seen.items()},
            statistics={name: _statistics(observer) for name, observer in seen.items()},
            kv={n: KVRange(k_amax=k.ranges(), v_amax=v.ranges()) for n, (k, v) in self._kv.items()},
            expert_tokens=expert_tokens,
        )

    def observe_kv(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [batch, kv_heads, tokens, head_dim], as cached."""
        if (scheme := self._observers.kv) is None or not self._running:
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

    def _hook(self, handle: Any) -> None:  # torch.utils.hooks.RemovableHandle, untyped
        self._entered.callback(handle.remove)


class ObservingCache(DynamicCache):
    """A cache that shows what would be stored to the layer's watch, and stores nothing."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config=config)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values of one attention; returned as given, since each sample is one whole sequence."""
        if _current:
            _current[-1].observe_kv(key_states, value_states)
        return key_states, value_states


_current: list[LayerWatch] = []
"""The watch that is entered. Layers are computed on one thread, one at a time."""


def _input_hook(observer: Observer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        values = args[0] if args else kwargs["input"]
        if values.numel():  # an expert that was given no token is run by some models all the same
            observer.update(values)

    return hook


def _check_finite(what: str, observer: Observer) -> None:
    if not observer.finite:
        raise NonFiniteActivation(
            f"{what} held NaN or Inf during calibration (largest value {max(observer.amax())}); the model or its dtype "
            "overflows on this data: check that the BF16 model answers sensibly, or use a recipe without calibration"
        )


def _statistics(observer: Observer) -> InputStatistics:
    return InputStatistics(amax=observer.amax()[0], mean_amax=observer.mean_amax()[0])
