"""The child process that builds a model on the meta device and determines the role of each tensor on disk.

    python -m fp8pipe.oracle.transformers_probe REQUEST ANSWER

REQUEST: {"folder": path with config.json, "tensors": {name: shape}, "trust_remote_code": bool}. ANSWER: the fields of
Architecture, or {"unsupported": reason}. Names on disk are mapped to modules as transformers' own loader maps them: all
renamings, then at most one converter, then the base model's prefix.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fp8pipe.oracle.lean import without

# transformers imports these packages if they are installed, which takes seconds. No model needs them.
with without("sklearn", "scipy") if __name__ == "__main__" else nullcontext():
    import torch
    import transformers
    from torch import nn
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key
    from transformers.pytorch_utils import Conv1D

from fp8pipe.model import fused
from fp8pipe.model import names as rules
from fp8pipe.model.architecture import AttentionLayer, ExpertLayout, TensorRole


class Unsupported(Exception):
    """This model cannot be quantized, for the reason in the message."""


def main() -> None:
    request, answer_path = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    try:
        answer = examine(Path(request["folder"]), request["tensors"], request["trust_remote_code"])
    except Unsupported as reason:
        answer = {"unsupported": str(reason)}
    answer_path.write_text(json.dumps(answer))


def examine(folder: Path, shapes: Mapping[str, list[int]], trust_remote_code: bool) -> dict[str, Any]:
    """The fields of `Architecture` for the config.json in `folder` and tensors on disk with these shapes."""
    model, source_quantization = build(folder, trust_remote_code)
    survey = Survey(model)
    targets = follow(model, shapes)
    roles = {name: survey.role(name, shapes[name], targets.get(name)) for name in shapes}
    roles = _with_groups(roles)
    attention = survey.attention(roles)
    text = model.config.get_text_config(decoder=True)
    return {
        "model_class": type(model).__name__,
        "model_type": model.config.model_type,
        "transformers_version": transformers.__version__,
        "tensors": {name: role.model_dump(exclude_defaults=True) for name, role in roles.items()},
        "attention": [layer.model_dump() for layer in attention],
        "num_layers": len(survey.layers),
        "layers_module": survey.layers_name,
        "tied_embeddings": bool(getattr(text, "tie_word_embeddings", False))
        and not any(role.kind == "lm_head" for role in roles.values()),
        "trust_remote_code": trust_remote_code,
        "source_quantization": source_quantization,
        "misfits": survey.misfits(shapes, targets),
    }


# ---------------------------------------------------------------------------------------------- building


def build(folder: Path, trust_remote_code: bool) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The model on the meta device, as its own class, and the quantization_config, which is left out of the model."""
    source_quantization = json.loads((folder / "config.json").read_text()).get("quantization_config")
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
        vars(config).pop("quantization_config", None)
        with torch.device("meta"):
            return _model_class(config, trust_remote_code), source_quantization
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError) as error:
        hint = "" if trust_remote_code else "; if it has code of its own, --trust-remote-code allows it"
        raise Unsupported(f"transformers cannot build it: {error}{hint}") from error


def _model_class(config: Any, trust_remote_code: bool) -> PreTrainedModel:  # Any: config classes share no typed base
    names = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is not None:
        return model_class._from_config(config)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        auto_map = getattr(config, "auto_map", {})
        if type(config) in auto._model_mapping or (trust_remote_code and auto.__name__ in auto_map):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    raise Unsupported(
        f"transformers {transformers.__version__} has no class {names[0] if names else config.model_type}"
    )


# ---------------------------------------------------------------------------------------------- disk -> module


class Target:
    """Where transformers loads a tensor: its parameter, and the converter that splits or changes it, if any."""

    def __init__(self, name: str, converter: WeightConverter | None) -> None:
        self.name = name
        self.converter = converter

    def all_names(self) -> list[str]:
        """All parameters that the tensor fills: `name`, and one per further target pattern of the converter."""
        if self.converter is None:
            return [self.name]
        first, *others = self.converter.target_patterns
        return [self.name, *(self.name.replace(first, other) for other in others)]

    def operations(self) -> list[str]:
        """Class names of the converter's operations."""
        return [type(operation).__name__ for operation in self.converter.operations] if self.converter else []


def follow(model: PreTrainedModel, names: Mapping[str, Any]) -> dict[str, Target]:
    """Every name on disk that transformers would load -> its target in the model."""
    transforms = get_model_conversion_mapping(model)
    renamings = [item for item in transforms if isinstance(item, WeightRenaming)]
    converters = [item for item in transforms if isinstance(item, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    targets = {}
    for name in sorted(names, key=dot_natural_key):  # the loader's order, on which some renamings depend
        place, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if place not in state and name in state:
            place, pattern = rename_source_key(name, [], [], prefix, state)
        if place in state:
            targets[name] = Target(place, by_pattern[pattern] if pattern is not None else None)
    return targets


# ---------------------------------------------------------------------------------------------- the model's parts


class Survey:
    """The built model, which answers for one tensor at a time."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.layers_name, self.layers = _decoder_layers(model)
        self.head = model.get_output_embeddings()
        self.fp32 = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]

    def role(self, name: str, shape: list[int], target: Target | None) -> TensorRole:
        """The role of tensor `name`, which has `shape`."""
        if target is None:
            return TensorRole(
                kind="unused", reason="transformers has no such tensor: multi-token prediction, or unused"
            )
        owner_name, _, attribute = target.name.rpartition(".")
        owner = self.modules[owner_name]
        if isinstance(owner, Conv1D) and len(shape) == 2:
            raise Unsupported(
                f"{name} belongs to GPT-2's transposed Conv1D: vLLM transposes the weight at load but not its scales"
            )
        role = self._role_of_owner(shape, owner_name, owner, attribute, target)
        return role.model_copy(update={"module": owner_name})

    def _role_of_owner(
        self, shape: list[int], owner_name: str, owner: nn.Module, attribute: str, target: Target
    ) -> TensorRole:
        if len(shape) < 2:
            return TensorRole(kind="bias" if attribute == "bias" else "norm", reason="fewer than two dimensions")
        if owner is self.head:
            return TensorRole(kind="lm_head", reason="lm_head: its error goes straight to the logits")
        if isinstance(owner, nn.Embedding):
            return TensorRole(kind="embedding", reason="embedding: looked up, never multiplied")
        if isinstance(owner, nn.modules.conv._ConvNd):
            return TensorRole(kind="conv", reason="convolution: vLLM has no FP8 kernel for it")
        if not owner_name.startswith(f"{self.layers_name}."):
            return TensorRole(
                kind="outside", reason="outside the text decoder's layers (vision, audio, projector, head)"
            )
        if _is_experts(owner):
            return self._expert(shape, owner, attribute, target)
        if isinstance(owner, nn.Linear) and attribute == "weight":
            return self._linear(owner_name, owner, target)
        if owner_name.rpartition(".")[2] in rules.ROUTER_LEAVES or "Router" in type(owner).__name__:
            return TensorRole(kind="router", reason="router: a flipped choice of expert costs more than its bytes")
        return TensorRole(kind="parameter", reason=f"a parameter of {type(owner).__name__}, not a Linear weight")

    def _linear(self, name: str, owner: nn.Linear, target: Target) -> TensorRole:
        pieces = [self.modules.get(piece.rpartition(".")[0]) for piece in target.all_names()]
        if not all(isinstance(piece, nn.Linear) for piece in pieces):
            return TensorRole(kind="parameter", reason="on disk it is fused with something that is not a Linear")
        if any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) for pattern in self.fp32):
            return TensorRole(kind="parameter", reason="the model keeps it in float32")
        parent_name, _, leaf = name.rpartition(".")
        kept = rules.why_kept(
            leaf,
            type(owner).__name__,
            owner.out_features,
            mixer=_mixer(self.modules[parent_name]),
            num_experts=self._experts_beside(parent_name),
        )
        if kept is not None:
            return TensorRole.model_validate({"kind": kept[0], "reason": kept[1]})
        return TensorRole(kind="linear", parts=self._parts(leaf, owner.out_features, self.modules[parent_name]))

    def _parts(self, leaf: str, rows: int, parent: nn.Module) -> tuple[int, ...]:
        if leaf in fused.FUSED_GATE_UP:
            return (rows // 2, rows // 2)
        if leaf not in fused.FUSED_QKV:
            return ()
        heads, head_dim = self._kv_heads(parent)
        keys = heads * head_dim
        return (rows - 2 * keys, keys, keys)

    def _experts_beside(self, parent_name: str) -> int | None:
        experts = getattr(self.modules[parent_name], "experts", None)
        return _num_experts(experts) if isinstance(experts, nn.Module) else None

    def _expert(self, shape: list[int], owner: nn.Module, attribute: str, target: Target) -> TensorRole:
        parameter = getattr(owner, attribute)
        if attribute in rules.PROJECTIONS and getattr(owner, "has_bias", False):
            return TensorRole(
                kind="kept_experts", reason="experts with biases: vLLM serves them unquantized, or in MXFP4"
            )
        if attribute not in rules.PROJECTIONS or parameter.dim() != 3:
            return TensorRole(
                kind="parameter", reason=f"{attribute} of the experts is not a weight that vLLM quantizes"
            )
        if len(shape) == 2:
            return TensorRole(kind="expert", parameter=attribute)
        flipped = "Transpose" in target.operations()
        transposed = bool(getattr(owner, "is_transposed", True)) != flipped
        gate_up = attribute == "gate_up_proj"
        layout = ExpertLayout(
            transposed=transposed,
            interleaved=gate_up and not getattr(owner, "is_concatenated", True),
            projections=rules.PROJECTIONS[attribute],
        )
        return TensorRole(kind="fused_experts", parameter=attribute, layout=layout)

    def misfits(self, shapes: Mapping[str, list[int]], targets: Mapping[str, Target]) -> list[str]:
        """Tensors whose shape differs from their parameter's, and parameters of the layers that no tensor fills."""
        state = self.model.state_dict()
        direct = ((name, list(state[t.name].shape)) for name, t in targets.items() if t.converter is None)
        found = [
            f"{name}: {shapes[name]} on disk, {shape} in the model" for name, shape in direct if shapes[name] != shape
        ]
        filled = {name for target in targets.values() for name in target.all_names()}
        optional = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        for name, _ in self.model.named_parameters():  # a tied parameter is listed once
            wanted = name.startswith(f"{self.layers_name}.") and name not in filled
            if wanted and not any(pattern.search(name) for pattern in optional):
                found.append(f"{name}: not on disk")
        return found

    def attention(self, roles: Mapping[str, TensorRole]) -> list[AttentionLayer]:
        """The attention modules that have a KV cache of their own, in layer order."""
        on_disk = {}
        for name, role in roles.items():
            if role.kind in {"linear", "mixer", "parameter"}:
                parent = role.module.rpartition(".")[0]
                on_disk.setdefault(parent, name.removesuffix(".weight").rpartition(".")[0])
        found = []
        for name, module in self.modules.items():
            if name in on_disk and name.startswith(f"{self.layers_name}.") and _has_cache(module):
                found.append(self._attention_layer(on_disk[name], name, module))
        return sorted(found, key=lambda layer: dot_natural_key(layer.module))

    def _attention_layer(self, disk_name: str, name: str, module: nn.Module) -> AttentionLayer:
        heads, head_dim = self._kv_heads(module)
        mla = any("kv_b_proj" in child or "kv_a_proj" in child for child, _ in module.named_children())
        return AttentionLayer(name=disk_name, module=name, num_kv_heads=heads, head_dim=head_dim, mla=mla)

    def _kv_heads(self, module: nn.Module) -> tuple[int, int]:
        """(KV heads, head size) of an attention module."""
        config = getattr(module, "config", None) or self.model.config.get_text_config(decoder=True)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        key = getattr(module, "k_proj", None)
        if isinstance(key, nn.Linear):  # layers of one model may differ: sliding and full attention
            heads = key.out_features // head_dim
        return int(heads), int(head_dim)


def _mixer(parent: nn.Module) -> tuple[str, ...]:
    """Names of the children of a recurrent mixer, which is a module with a convolution; empty for other modules."""
    children = dict(parent.named_children())
    return tuple(children) if any(isinstance(child, nn.Conv1d) for child in children.values()) else ()


def _decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the text decoder's layers."""
    decoder = model.get_decoder() or model
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return ".".join(part for part in (prefix, name) if part), module
    raise Unsupported(f"{type(model).__name__} has no list of {count} decoder layers")


def _is_experts(module: nn.Module) -> bool:
    return hasattr(module, "is_transposed") or any(
        parameter.dim() == 3 and name in rules.PROJECTIONS for name, parameter in module.named_parameters(recurse=False)
    )


def _num_experts(experts: nn.Module) -> int | None:
    if isinstance(experts, nn.ModuleList):
        return len(experts)
    three = [parameter for parameter in experts.parameters(recurse=False) if parameter.dim() == 3]
    return three[0].shape[0] if three else None


def _has_cache(module: nn.Module) -> bool:
    """Whether the module has a KV cache: it takes a cache, has a layer index, and shares no other layer's cache."""
    if getattr(module, "layer_idx", None) is None or getattr(module, "is_kv_shared_layer", False):
        return False
    names = inspect.signature(module.forward).parameters
    return not names.keys().isdisjoint(("past_key_values", "past_key_value", "layer_past"))


def _with_groups(roles: dict[str, TensorRole]) -> dict[str, TensorRole]:
    """Add fused groups and expert indices, which come from the names on disk."""
    weights = [name.removesuffix(".weight") for name, role in roles.items() if role.kind in {"linear", "expert"}]
    groups = fused.fused_groups(weights)
    changed = dict(roles)
    for name in weights:
        key = f"{name}.weight" if f"{name}.weight" in roles else name
        update: dict[str, Any] = {"group": groups.get(name, "")}
        if roles[key].kind == "expert":
            update["expert"] = int(re.findall(r"\.(\d+)\.", name)[-1])
        changed[key] = roles[key].model_copy(update=update)
    return changed


if __name__ == "__main__":
    main()
