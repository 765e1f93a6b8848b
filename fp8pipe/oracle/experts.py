"""Experts on disk: which expert a matrix is, and how experts lie in one tensor, as transformers' own loader has it.

In: the built model, the shapes on disk, and where each tensor is loaded. Out: their roles. No rule about any model is
repeated here: its converters are run on marks instead of weights, and the marks tell where each element goes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fp8pipe.model import names as rules
from fp8pipe.model.architecture import ExpertLayout, TensorRole
from fp8pipe.oracle.disk import Target, Unsupported, follow

_Stack = dict[str, tuple[str, int]]
"""Matrix on disk -> the parameter that it is stacked into, and its index there."""


class ExpertTensors:
    """The experts of one model."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, list[int]], targets: Mapping[str, Target]) -> None:
        """targets: in the loader's order, on which it depends which expert a matrix becomes."""
        self._model, self._shapes, self._targets = model, shapes, targets
        self._layouts: dict[tuple[Any, ...], ExpertLayout] = {}
        self._stacks: dict[str, _Stack] = {}

    def role(self, name: str, owner: nn.Module, attribute: str) -> TensorRole:
        """The role of tensor `name`, which is loaded into `attribute` of the experts module `owner`."""
        parameter, shape = getattr(owner, attribute), self._shapes[name]
        if attribute in rules.PROJECTIONS and getattr(owner, "has_bias", False):
            return TensorRole(
                kind="kept_experts", reason="experts with biases: vLLM serves them unquantized, or in MXFP4"
            )
        if attribute not in rules.PROJECTIONS or parameter.dim() != 3:
            return TensorRole(
                kind="parameter", reason=f"{attribute} of the experts is not a weight that vLLM quantizes"
            )
        target = self._targets[name]
        if len(shape) == 2 and target.converter is not None:
            place, index = self._stack(target)[name]
            return TensorRole(kind="expert", module=place.rpartition(".")[0], parameter=attribute, expert=index)
        if len(shape) != 3:
            return TensorRole(kind="parameter", reason="not of the shape that the model's experts have")
        if len(target.all_names()) > 1:
            raise Unsupported(f"{name}: transformers shares its experts out to {', '.join(target.all_names())}")
        # The experts of all layers are laid out alike.
        alike = (type(owner), attribute, tuple(shape), tuple(parameter.shape), target.converter, target.pattern)
        if alike not in self._layouts:
            self._layouts[alike] = self._layout(name, owner, attribute)
        return TensorRole(kind="fused_experts", parameter=attribute, layout=self._layouts[alike])

    def _layout(self, name: str, owner: nn.Module, attribute: str) -> ExpertLayout:
        """How experts lie in the 3-D tensor `name`.

        Its elements are followed into the parameter, and from there to the rows of a projection, as the module's own
        class multiplies."""
        projections, columns = rules.PROJECTIONS[attribute], self._shapes[name][2]
        matrix = self._landed(name, getattr(owner, attribute))
        matrix = matrix.T if _is_transposed(owner) else matrix  # [out, in]
        column = matrix[:, np.argwhere(matrix == 0)[0][1]]
        transposed = 1 in column  # two neighbours in a row on disk are two outputs
        places = np.flatnonzero(column >= 0)
        outputs = column[places] if transposed else column[places] // columns
        size, count = len(column) // len(projections), len(projections)
        if getattr(owner, "is_concatenated", True):
            part, index = places // size, places % size
        else:
            part, index = places % count, places // count
        if len(held := set(part.tolist())) == 1:
            projections, interleaved = (projections[held.pop()],), False
        else:
            interleaved = bool((outputs == index * count + part).all())
        if not interleaved and not (outputs == np.arange(len(outputs))).all():
            raise Unsupported(f"{name}: transformers reorders the rows of its experts, as no layout of vLLM's does")
        return ExpertLayout(transposed=transposed, interleaved=interleaved, projections=projections)

    def _landed(self, name: str, parameter: torch.Tensor) -> np.ndarray:
        """One expert of `parameter`, each element with the index that it had in an expert of the tensor `name` on disk;
        -1 if another tensor filled it."""
        target = self._targets[name]
        if target.converter is None:
            return _marks(self._shapes[name], marked=True)[0].numpy()
        together = {pattern: disk for disk, pattern in self._together[target.name]}
        marks = {pattern: _marks(self._shapes[disk], marked=disk == name) for pattern, disk in together.items()}
        filled = _converted(target.converter, marks, target.name, parameter[:1], self._model.config)
        return filled[target.name][0].numpy()

    @functools.cached_property
    def _together(self) -> dict[str, list[tuple[str, str]]]:
        """First parameter of a converter -> (tensor on disk, source pattern) of all that it takes together, in the
        loader's order."""
        found: dict[str, list[tuple[str, str]]] = {}
        for disk, target in self._targets.items():
            if target.pattern is not None:
                found.setdefault(target.name, []).append((disk, target.pattern))
        return found

    def _stack(self, target: Target) -> _Stack:
        """Where the matrices that are loaded together with `target` are stacked."""
        if target.name not in self._stacks:
            parameter = self._model.get_parameter(target.name)
            try:
                stack = _stacked(
                    target.converter, self._together[target.name], target.name, parameter, self._model.config
                )
            except ValueError as error:
                raise Unsupported(f"transformers cannot fill {target.name} from these files: {error}") from error
            self._stacks[target.name] = stack
        return self._stacks[target.name]

    def counts(self, roles: Mapping[str, TensorRole]) -> dict[str, int]:
        """Experts module on disk -> how many experts the model has there, in all the modules that share them out."""
        filled: dict[str, set[str]] = {}
        for name, role in roles.items():
            if role.kind in rules.EXPERT_KINDS:
                places = self._targets[name].all_names()
                filled.setdefault(rules.experts_holder(name, role), set()).update(places)
        counts: dict[str, int] = {}
        for holder, places in filled.items():
            counts[holder] = sum(map(self._count, {place.rpartition(".")[0] for place in places}))
        return counts

    def _count(self, module: str) -> int:
        """How many whole experts a module has. LongCat's first layers have rows to spare, for experts that do nothing
        and have no second layer."""
        own = self._model.get_submodule(module).parameters(recurse=False)
        return min(parameter.shape[0] for parameter in own if parameter.dim() == 3)

    def unread(self, roles: Mapping[str, TensorRole]) -> list[str]:
        """Experts modules on disk whose experts transformers would not read one by one, under the names that vLLM's
        loaders want; and modules that no tensor on disk fills."""
        split = {
            f"{holder}.0.{projection}.weight": holder
            for name, role in roles.items()
            if role.layout is not None and (holder := rules.experts_holder(name, role))
            for projection in role.layout.projections
        }
        read = follow(self._model, split)
        unread = [holder for name, holder in split.items() if name not in read or read[name].converter is None]
        filled = {place for target in self._targets.values() for place in target.all_names()}
        for name, module in self._model.named_modules():
            weights = {leaf for leaf, _ in module.named_parameters(recurse=False)} & rules.PROJECTIONS.keys()
            if is_experts(module) and not filled.issuperset(f"{name}.{leaf}" for leaf in weights):
                unread.append(name)
        return list(dict.fromkeys(unread))

    def misfits(self) -> Iterator[str]:
        """Parameters of experts into which fewer matrices are stacked than there are experts, or more than fit."""
        for stack in self._stacks.values():
            held: dict[str, set[int]] = {}
            for place, index in stack.values():
                held.setdefault(place, set()).add(index)
            for place, indices in held.items():
                wanted, room = self._count(place.rpartition(".")[0]), self._model.get_parameter(place).shape[0]
                if not wanted <= len(indices) <= room:
                    yield f"{place}: {len(indices)} experts on disk, {wanted} in the model"


# ---------------------------------------------------------------------------------------------- modules


def is_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") or any(
        parameter.dim() == 3 and name in rules.PROJECTIONS for name, parameter in module.named_parameters(recurse=False)
    )


def _is_transposed(experts: nn.Module) -> bool:
    """Whether a module multiplies by its experts as [in, out] matrices: by its own word, else by their shapes."""
    if (known := getattr(experts, "is_transposed", None)) is not None:
        return bool(known)
    parameters = dict(experts.named_parameters(recurse=False))
    fused = "gate_up_proj" in parameters
    up = parameters.get("gate_up_proj", parameters.get("up_proj", parameters.get("gate_proj")))
    down = parameters.get("down_proj")
    if up is not None and down is not None:
        width, hidden = up.shape[1] // (2 if fused else 1), up.shape[2]
        plain = (hidden, width) == tuple(down.shape[1:])  # up is [out, in] and so is down
        hidden, width = up.shape[1], up.shape[2] // (2 if fused else 1)
        turned = (width, hidden) == tuple(down.shape[1:])
        if plain != turned:
            return turned
    raise Unsupported(
        f"{type(experts).__name__}: its shapes do not tell whether its experts are [out, in] or [in, out]"
    )


# ---------------------------------------------------------------------------------------------- marks


def _marks(shape: list[int], *, marked: bool) -> torch.Tensor:
    """A tensor on disk, cut to one expert, whose elements are their own indices, or all -1 unless `marked`."""
    count = shape[1] * shape[2]
    marks = torch.arange(count, dtype=torch.int32) if marked else torch.full((count,), -1, dtype=torch.int32)
    return marks.reshape(1, *shape[1:])


def _converted(
    converter: Any,  # transformers' WeightConverter, whose operations share no typed base
    tensors: Mapping[str, Any],
    name: str,
    parameter: Tensor,
    config: Any,
) -> dict[str, Tensor]:
    """The parameters that `converter` fills: name -> content.

    tensors: source pattern -> stand-in, or list of them in the loader's order. name: the first parameter, under which
    the loader collects them. parameter: stands for it where an operation asks for its shape."""
    made = dict(tensors)
    for operation in converter.operations:
        made = operation.convert(
            made,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=_Parameter(parameter),
            config=config,
            missing_keys=None,
        )
    prefix, _, suffix = next(name.partition(pattern) for pattern in made if pattern in name)
    return {f"{prefix}{pattern}{suffix}": tensor for pattern, tensor in made.items()}


def _stacked(converter: Any, members: Sequence[tuple[str, str]], name: str, parameter: Tensor, config: Any) -> _Stack:
    """Where each of the matrices `members` is stacked.

    members: (tensor on disk, source pattern that it matches), in the loader's order. The number in a tensor's name is
    not its place: a loader may deal out one list of experts to several modules. Raises ValueError if the converter
    cannot take them together, as when one of them is missing."""
    marks: dict[str, list[Tensor]] = {}
    for number, (_, pattern) in enumerate(members):
        marks.setdefault(pattern, []).append(torch.full((1, 1), number))
    try:
        filled = _converted(converter, marks, name, parameter[:1], config)
    except (RuntimeError, IndexError, StopIteration) as error:
        raise ValueError(str(error)) from error
    return {
        members[number][0]: (place, index)
        for place, tensor in filled.items()
        for index, matrix in enumerate(tensor)
        for number in matrix.flatten().tolist()
    }


class _Parameter:
    """Stands in for the model when an operation asks for the shape of a parameter."""

    def __init__(self, parameter: Tensor) -> None:
        self._parameter = parameter

    def get_parameter(self, name: str) -> Tensor:
        return self._parameter
