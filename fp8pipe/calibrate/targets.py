"""What to observe: the modules that a plan needs measured, layer by layer, and the schemes that say how.

In: a plan, the architecture, a recipe. Out: modules of transformers by the names that they have on disk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from torch import nn

from fp8pipe.calibrate.experts import Place, check_observable, is_observable
from fp8pipe.calibrate.observers import Observer, observer_for
from fp8pipe.config import ActivationScheme, KVCacheScheme, Recipe, WeightScheme
from fp8pipe.errors import UnsupportedArchitecture
from fp8pipe.records.calibration import Ranges

if TYPE_CHECKING:
    from fp8pipe.calibrate.skeleton import Skeleton
    from fp8pipe.model.architecture import Architecture
    from fp8pipe.quantize.plan import Plan

_LATENT = "latent attention (MLA): vLLM has no KV scales for it"
_BORROWS = "it reads the keys and values that another layer cached"
_NO_ATTENTION = "no attention with keys and values: linear attention or a recurrent mixer"


@dataclass(frozen=True, slots=True)
class Schemes:
    """The part of a recipe that decides how modules are observed."""

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
        """The activation scheme if it needs ranges."""
        return self.activations if self.activations is not None and self.activations.mode == "static" else None

    def input_observer(self) -> Observer:
        """A new observer for one input."""
        if self.static is None:
            return observer_for("minmax", 1)
        return observer_for(self.static.observer, 1, self.static.percentile)


@dataclass(frozen=True, slots=True)
class Targets:
    """What to observe: name on disk -> name in transformers."""

    linears: Mapping[str, str]
    attention: Mapping[str, str]
    experts: Mapping[str, tuple[str, Place]] = field(default_factory=dict)
    """Projection of one expert, on disk -> experts module, and which of its inputs."""
    latent: Mapping[str, str] = field(default_factory=dict)
    """Attention without KV scales in vLLM (MLA); named in the record, not observed."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Module on disk -> the group that vLLM fuses it into, which shares one per-tensor weight scale."""


def targets_of(plan: Plan, architecture: Architecture) -> Targets:
    """Every quantized Linear, and every attention that gets KV scales."""
    linears: dict[str, str] = {}
    experts: dict[str, tuple[str, Place]] = {}
    weights = [output for output in plan.outputs if output.role == "weight"]
    for output in weights:
        role = architecture.tensors[output.source]
        expert = role.expert if output.slice is None else output.slice.expert
        if expert is None:
            linears[output.module] = role.module
        else:
            experts[output.module] = role.module, (role.parameter, expert)
    wanted = set(plan.calibrated_attention())
    return Targets(
        linears=linears,
        experts=experts,
        attention={layer.name: layer.module for layer in architecture.attention if layer.name in wanted},
        latent={layer.name: layer.module for layer in architecture.attention if not layer.has_kv_scales},
        groups={output.module: output.group for output in weights if output.group},
    )


# ---------------------------------------------------------------------------------------------- layer by layer


@dataclass(frozen=True, slots=True)
class LayerModules:
    """What is observed in one layer: name on disk -> module."""

    name: str
    linears: Mapping[str, nn.Linear] = field(default_factory=dict)
    attention: Mapping[str, nn.Module] = field(default_factory=dict)
    experts: Sequence[tuple[nn.Module, Mapping[Place, Sequence[str]]]] = ()
    """Experts modules, each with the names on disk of the projections that read each of its inputs."""
    groups: Mapping[str, str] = field(default_factory=dict)


def modules_by_layer(skeleton: Skeleton, targets: Targets, *, static: bool) -> dict[str, LayerModules]:
    """Layer -> what to observe in it.

    static: inputs need ranges. Raises UnsupportedArchitecture for a module outside the decoder's layers and, if static,
    for experts that cannot be observed; otherwise these experts are left out.
    """
    linears, attention = _by_layer(skeleton, targets.linears), _by_layer(skeleton, targets.attention)
    names: dict[str, dict[Place, list[str]]] = {}
    for on_disk, (holder, place) in targets.experts.items():
        names.setdefault(holder, {}).setdefault(place, []).append(on_disk)
    holders = {holder: skeleton.model.get_submodule(holder) for holder in names}
    if static:
        for holder, module in holders.items():
            check_observable(module, holder)
    experts = _by_layer(skeleton, {holder: holder for holder, module in holders.items() if is_observable(module)})
    return {
        layer: LayerModules(
            name=layer,
            linears=cast(dict[str, nn.Linear], linears[layer]),
            attention=attention[layer],
            experts=[(module, names[holder]) for holder, module in experts[layer].items()],
            groups=targets.groups,
        )
        for layer in skeleton.layers
    }


def _by_layer(skeleton: Skeleton, names: Mapping[str, str]) -> dict[str, dict[str, nn.Module]]:
    """Layer -> name on disk -> module."""
    layers: dict[str, dict[str, nn.Module]] = {layer: {} for layer in skeleton.layers}
    for name, module in names.items():
        layer = skeleton.layer_of(module)
        if layer is None:
            raise UnsupportedArchitecture(f"{name} is outside the decoder's layers; add it to the recipe's ignore")
        layers[layer][name] = skeleton.model.get_submodule(module)
    return layers


# ---------------------------------------------------------------------------------------------- afterwards


def check_observed(targets: Targets, ranges: Ranges) -> None:
    """Raise UnsupportedArchitecture unless every quantized module has a range for its input."""
    wanted = [*targets.linears, *targets.experts]
    missing = [name for name in wanted if name not in ranges.inputs]
    if missing:
        shown = "calibration.min_expert_tokens: 1 or more shows them tokens of their layer; "
        raise UnsupportedArchitecture(
            f"{len(missing)} of {len(wanted)} modules never ran on the calibration data, the first is {missing[0]}; "
            f"{shown if missing[0] in targets.experts else ''}give more samples, or add them to the recipe's ignore"
        )


def kv_absent(skeleton: Skeleton, targets: Targets, modules: Mapping[str, LayerModules]) -> dict[str, str]:
    """Latent attention, and layers that cache no keys and values of their own -> why they get no KV ranges."""
    latent = {skeleton.layer_of(module) for module in targets.latent.values()}
    absent = dict.fromkeys(targets.latent, _LATENT)
    for name, layer in skeleton.layers.items():
        if not modules[name].attention and name not in latent:
            borrows = any(getattr(module, "is_kv_shared_layer", False) for module in layer.modules())
            absent[name] = _BORROWS if borrows else _NO_ATTENTION
    return absent
