"""Mixture of experts: transformers runs a layer's experts as one module with 3-D weights, so no Linear can be hooked.

In: the experts module of one layer and the names of its quantized projections. Out: what their inputs were, and how
many tokens each expert saw. The module is run by a forward of ours, registered in ALL_EXPERTS_FUNCTIONS, which
computes what the eager one computes and shows each expert's inputs on the way. Llama 4 hands all experts their tokens
in one tensor, with zeros for what is not theirs; that forward is replaced on the module itself. Experts that the
router gave fewer tokens than the minimum are then shown other tokens of the same layer; their outputs go nowhere.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from fp8pipe.calibrate.noise import Matrix, spread
from fp8pipe.calibrate.targets import Place
from fp8pipe.calibrate.watched import WatchedInput
from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.records.calibration import ExpertTokens

IMPLEMENTATION = "fp8pipe_observed"


class ExpertWatch:
    """Observes the experts of one module while it is entered."""

    def __init__(
        self,
        module: nn.Module,
        inputs: Mapping[Place, WatchedInput],
        names: Mapping[Place, Sequence[str]],
        *,
        minimum: int,
        total: int,
    ) -> None:
        """names: place -> names on disk of the modules that read this input. minimum: tokens that every expert is to
        see. total: tokens that will run; each pass gives its share of the tokens for experts that saw too few."""
        self._module = module
        self._names = names
        self._inputs = inputs
        self._minimum = minimum
        self._total = total
        self._routed: dict[int, int] = dict.fromkeys(sorted({expert for _, expert in names}), 0)
        self._added: dict[int, int] = {}
        self._reserve: list[Tensor] = []

    def __enter__(self) -> Self:
        _watches[id(self._module)] = self
        if _takes_blocks(self._module):
            self._module.forward = partial(_observed_blocks, self._module)
        else:
            config: Any = self._module.config  # transformers' configs share no typed base
            config._experts_implementation = IMPLEMENTATION
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del _watches[id(self._module)]
        if _takes_blocks(self._module):
            del self._module.forward  # the instance attribute: the class's method is back
        self._reserve.clear()

    def saw(self, parameter: str, expert: int, values: Tensor) -> None:
        """values: [tokens, features], the input of one expert's projection."""
        watched = self._inputs.get((parameter, expert))
        if watched is not None and values.numel():
            watched.saw(values)

    def routed(self, expert: int, tokens: int) -> None:
        """The router gave `expert` so many tokens."""
        if expert in self._routed:
            self._routed[expert] += tokens

    def reserve(self, hidden: Tensor) -> None:
        """Set aside a few tokens of one pass [tokens, hidden], drawn at random: a sample's first token is like no
        other."""
        if share := math.ceil(self._minimum * len(hidden) / self._total):
            self._reserve.append(hidden[spread(len(hidden), share, len(self._reserve)).to(hidden.device)])

    @torch.inference_mode()
    def top_up(self) -> None:
        """Show the experts below the minimum tokens from the reserve; the layer's weights must still be there."""
        if not self._reserve:
            return
        reserve = torch.cat(self._reserve)
        for expert, routed in self._routed.items():
            if routed < self._minimum:
                tokens = reserve[: self._minimum - routed]
                _expert_output(self._module, expert, tokens)
                self._added[expert] = len(tokens)

    def tokens(self) -> dict[str, ExpertTokens]:
        """Name on disk of each expert -> tokens that it saw."""
        experts = {expert: names[0].rpartition(".")[0] for (_, expert), names in self._names.items()}
        return {
            experts[expert]: ExpertTokens(routed=routed, added=self._added.get(expert, 0))
            for expert, routed in self._routed.items()
        }


def expert_matrix(module: nn.Module, place: Place, names: Sequence[str], group: str) -> Matrix:
    """One expert's weight as [out, in]; gate and up are one above the other, as vLLM has them."""
    parameter, expert = place
    return Matrix(tuple(names), _weight(module, parameter, expert), group)


def is_observable(module: nn.Module) -> bool:
    """Whether the experts can be run by an implementation of ours."""
    return hasattr(module, "is_transposed") or _takes_blocks(module)  # the former is set by use_experts_implementation


def _takes_blocks(module: nn.Module) -> bool:
    """Whether the module is given one block of tokens per expert, as Llama 4's is, instead of a choice of experts."""
    takes = list(inspect.signature(type(module).forward).parameters)
    gate_up = getattr(module, "gate_up_proj", None)
    return takes == ["self", "hidden_states"] and isinstance(gate_up, nn.Parameter) and gate_up.dim() == 3


def check_observable(module: nn.Module, name: str) -> None:
    """UnsupportedArchitecture unless the experts can be observed."""
    if not is_observable(module):
        raise UnsupportedArchitecture(
            f"{name}: {type(module).__name__} runs its experts in a way that cannot be observed one by one; "
            "use a recipe with dynamic activations, or add the experts to its ignore"
        )


_watches: dict[int, ExpertWatch] = {}


def _observed_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The eager forward of any experts module. hidden_states: [tokens, hidden]; top_k_*: [tokens, k]."""
    watch = _watches.get(id(self))
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= self.num_experts:  # a masked slot
            continue
        token, slot = torch.where(top_k_index == expert)
        if watch is not None:
            watch.routed(expert, len(token))
        result = _expert_output(self, expert, hidden_states[token])
        output.index_add_(0, token, (result * top_k_weights[token, slot, None]).to(output.dtype))
    if watch is not None:
        watch.reserve(hidden_states)
    return output


def _observed_blocks(experts: Any, hidden_states: Tensor) -> Tensor:
    """Llama 4's forward. hidden_states: [experts * tokens, hidden], zero where a token is not an expert's: zeros lead
    to zeros, so only the others are computed."""
    watch = _watches[id(experts)]
    blocks = hidden_states.view(experts.num_experts, -1, hidden_states.shape[-1])
    output = torch.zeros_like(blocks)
    for expert, block in enumerate(blocks):
        own = block.any(dim=1)
        watch.routed(expert, int(own.sum()))
        output[expert, own] = _expert_output(experts, expert, block[own])
    watch.reserve(hidden_states[hidden_states.any(dim=1)])
    return output.view_as(hidden_states)


def _expert_output(experts: Any, expert: int, hidden: Tensor) -> Tensor:
    """One expert on its tokens [tokens, hidden], its inputs shown to the watch."""
    watch = _watches.get(id(experts))
    has_gate = getattr(experts, "has_gate", True)
    up = "gate_up_proj" if has_gate else "up_proj"
    if watch is not None:
        watch.saw(up, expert, hidden)
    inner = _linear(experts, up, expert, hidden)
    inner = _gated(experts, inner) if has_gate else experts.act_fn(inner)
    if watch is not None:
        watch.saw("down_proj", expert, inner)
    return _linear(experts, "down_proj", expert, inner)


def _gated(experts: Any, inner: Tensor) -> Tensor:
    if hasattr(experts, "_apply_gate"):
        return experts._apply_gate(inner)
    gate, up = inner.chunk(2, dim=-1)
    return up * experts.act_fn(gate)


def _linear(experts: Any, parameter: str, expert: int, values: Tensor) -> Tensor:
    bias = getattr(experts, f"{parameter}_bias")[expert] if getattr(experts, "has_bias", False) else None
    return nn.functional.linear(values, _weight(experts, parameter, expert), bias)


def _weight(experts: nn.Module, parameter: str, expert: int) -> Tensor:
    """One expert's weight [out, in]."""
    weight = getattr(experts, parameter)[expert]
    return weight.T if getattr(experts, "is_transposed", True) else weight


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _observed_forward)
