"""Observes a mixture of experts, and tops up the experts that saw too few tokens.

In: the experts module of one layer and the names of its quantized projections. Out: what their inputs were, and how
many tokens each expert saw. Transformers runs a layer's experts as one module with 3-D weights, so there is no Linear
to hook. Instead the module runs a forward of ours, registered in ALL_EXPERTS_FUNCTIONS, which computes what the eager
one computes and shows each expert's inputs to the watch. Llama 4 gives all experts their tokens in one tensor, zero
where a token is not theirs; there the forward is replaced on the module itself. Experts that the router gave fewer
tokens than the minimum are then shown other tokens of the same layer, and their outputs are discarded.
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

from fp8pipe.calibrate.sensitivity.sampling import Matrix, WatchedInput, spread
from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.records.calibration import ExpertTokens

IMPLEMENTATION = "fp8pipe_observed"

Place = tuple[str, int]
"""One input of an experts module: the parameter that reads it (gate_up_proj, up_proj, down_proj) and the expert."""


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
        """names: place -> names on disk of the modules that read this input. minimum: tokens that every expert must
        see. total: tokens that will run, over all samples."""
        self._module = module
        self._names = names
        self._inputs = inputs
        self._minimum = minimum
        self._total = total
        self._routed: dict[int, int] = dict.fromkeys(sorted({expert for _, expert in names}), 0)
        self._added: dict[int, int] = {}
        self._reserve: list[Tensor] = []

    def __enter__(self) -> Self:
        if _takes_blocks(self._module):
            self._module.forward = partial(_observed_blocks, self._module)
        else:
            config: Any = self._module.config  # transformers' configs share no typed base
            config._experts_implementation = IMPLEMENTATION
        _watches[id(self._module)] = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del _watches[id(self._module)]
        if _takes_blocks(self._module):
            del self._module.forward  # the instance's attribute, which hid the method of the class
        self._reserve.clear()

    def saw(self, parameter: str, expert: int, values: Tensor) -> None:
        """values: [tokens, features], the input of one expert's projection."""
        watched = self._inputs.get((parameter, expert))
        if watched is not None and values.numel():
            watched.saw(values)

    def routed(self, expert: int, tokens: int) -> None:
        """Count tokens that the router gave `expert`."""
        if expert in self._routed:
            self._routed[expert] += tokens

    @property
    def reserved(self) -> Sequence[Tensor]:
        """Tokens of the layer that were set aside, [tokens, hidden] each."""
        return self._reserve

    def reserve(self, hidden: Tensor) -> None:
        """Set aside some of a pass's tokens [tokens, hidden] for experts that will have seen too few.

        Each pass gives its share of the minimum. They are drawn at random, because a sample's first token is atypical.
        """
        if share := math.ceil(self._minimum * len(hidden) / self._total):
            self._reserve.append(hidden[spread(len(hidden), share, len(self._reserve)).to(hidden.device)])

    @torch.inference_mode()
    def top_up(self, others: Sequence[Tensor] = ()) -> None:
        """Show reserved tokens to the experts below the minimum; the layer's weights must still be loaded.

        others: tokens of the layer's other experts modules, for a module that no token reached: that of experts for
        images, when the samples are texts."""
        if not (parts := self._reserve or list(others)):
            return
        reserve = torch.cat(parts)
        for expert, routed in self._routed.items():
            if routed < self._minimum:
                tokens = reserve[: self._minimum - routed]
                _expert_output(self._module, expert, tokens)
                self._added[expert] = len(tokens)

    def tokens(self) -> dict[str, ExpertTokens]:
        """Name on disk of each expert -> how many tokens it saw."""
        experts = {expert: names[0].rpartition(".")[0] for (_, expert), names in self._names.items()}
        return {
            experts[expert]: ExpertTokens(routed=routed, added=self._added.get(expert, 0))
            for expert, routed in self._routed.items()
        }


def expert_matrix(module: nn.Module, place: Place, names: Sequence[str], group: str) -> Matrix:
    """One expert's weight as [out, in]; gate is stacked on up, as in vLLM."""
    parameter, expert = place
    return Matrix(tuple(names), _weight(module, parameter, expert), group)


def is_observable(module: nn.Module) -> bool:
    """Whether the experts can be run by a forward of ours."""
    return hasattr(module, "is_transposed") or _takes_blocks(module)  # use_experts_implementation sets is_transposed


def _takes_blocks(module: nn.Module) -> bool:
    """Whether the module is called with one block of tokens per expert, as in Llama 4, rather than with each token's
    experts."""
    takes = list(inspect.signature(type(module).forward).parameters)
    gate_up = getattr(module, "gate_up_proj", None)
    return takes == ["self", "hidden_states"] and isinstance(gate_up, nn.Parameter) and gate_up.dim() == 3


def check_observable(module: nn.Module, name: str) -> None:
    """Raise UnsupportedArchitecture unless the experts can be observed."""
    if not is_observable(module):
        raise UnsupportedArchitecture(
            f"{name}: {type(module).__name__} runs its experts in a way that does not let us observe each of them; "
            "use a recipe with dynamic activations, or add the experts to the recipe's ignore"
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
    """Llama 4's forward. hidden_states: [experts * tokens, hidden], zero where the router did not give the token to the
    expert. Only the other rows are computed: zeros would give zeros."""
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
    """Run one expert on its tokens [tokens, hidden], and show its inputs to the watch."""
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
