"""The child process that builds a model on the meta device and determines the role of each tensor on disk.

    python -m fp8pipe.oracle.transformers_probe REQUEST ANSWER

REQUEST: {"folder": path with config.json, "tensors": {name: shape}, "trust_remote_code": bool}. ANSWER: the fields of
Architecture, or {"unsupported": reason, "unknown": whether transformers has no such model}. Names on disk are mapped to
modules as transformers' own loader maps them: all renamings, then at most one converter, then the base model's prefix.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fp8pipe.oracle.lean import without

# transformers imports these packages if they are installed, which takes seconds. No model needs them.
with without("sklearn", "scipy") if __name__ == "__main__" else nullcontext():
    import torch
    import transformers
    from torch import nn
    from transformers import (
        CONFIG_MAPPING,
        AutoConfig,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        PreTrainedModel,
    )
    from transformers.core_model_loading import dot_natural_key
    from transformers.pytorch_utils import Conv1D

from fp8pipe.model import fused
from fp8pipe.model import names as rules
from fp8pipe.model.architecture import AttentionLayer, TensorRole
from fp8pipe.oracle import bounds
from fp8pipe.oracle.disk import Target, Unsupported, follow
from fp8pipe.oracle.experts import ExpertTensors, is_experts

_CACHES = frozenset(("past_key_values", "past_key_value", "layer_past"))
"""Names of the cache among the arguments of an attention module."""


class Unknown(Unsupported):
    """transformers has no class for this model; another library may."""


def main() -> None:
    request, answer_path = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    try:
        answer = examine(Path(request["folder"]), request["tensors"], request["trust_remote_code"])
    except Unsupported as reason:
        answer = {"unsupported": str(reason), "unknown": isinstance(reason, Unknown)}
    answer_path.write_text(json.dumps(answer))


def examine(folder: Path, shapes: Mapping[str, list[int]], trust_remote_code: bool) -> dict[str, Any]:
    """The fields of `Architecture` for the config.json in `folder` and tensors on disk with these shapes."""
    model, source_quantization = build(folder, trust_remote_code, tensors=len(shapes))
    survey = Survey(model, shapes, follow(model, shapes))
    roles = {name: survey.role(name) for name in shapes}
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
        "head": survey.head_name(),
        "backend_compatible": is_backend_compatible(type(model)),
        "trust_remote_code": trust_remote_code,
        "source_quantization": source_quantization,
        "experts": survey.experts.counts(roles),
        "unread_experts": survey.experts.unread(roles),
        "misfits": survey.misfits(),
    }


# ---------------------------------------------------------------------------------------------- building


def build(
    folder: Path, trust_remote_code: bool, *, tensors: int = bounds.UNKNOWN_TENSORS
) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The model on the meta device, as its own class, and the quantization_config, which is left out of the model.

    tensors: how many lie on disk, which bounds the model's parts."""
    plain = json.loads((folder / "config.json").read_text())
    source_quantization = plain.get("quantization_config")
    try:
        with bounds.building(tensors):
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
            vars(config).pop("quantization_config", None)
            with torch.device("meta"):
                return _model_class(config, trust_remote_code), source_quantization
    except bounds.TooLarge as error:
        raise Unsupported(str(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError, ImportError, OSError, RuntimeError) as error:
        hint = "" if trust_remote_code else "; if it has code of its own, --trust-remote-code allows it"
        kind = Unsupported if str(plain.get("model_type")) in CONFIG_MAPPING else Unknown
        words = " ".join(str(error).partition("\n\n")[0].split())  # behind it, advice on installing
        raise kind(f"transformers cannot build it: {words}{hint}") from error


def _model_class(config: Any, trust_remote_code: bool) -> PreTrainedModel:  # Any: config classes share no typed base
    names = getattr(config, "architectures", None) or []
    model_class = getattr(transformers, names[0], None) if names else None
    if model_class is not None:
        return model_class._from_config(config)
    for auto in (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModel):
        auto_map = getattr(config, "auto_map", {})
        if type(config) in auto._model_mapping or (trust_remote_code and auto.__name__ in auto_map):
            return auto.from_config(config, trust_remote_code=trust_remote_code)
    raise Unknown(f"transformers {transformers.__version__} has no class {names[0] if names else config.model_type}")


def is_backend_compatible(model_class: type[PreTrainedModel]) -> bool:
    """Whether vLLM's Transformers backend takes the class: vLLM 0.32, `_ModelRegistry._try_resolve_transformers`."""
    return model_class.is_backend_compatible() or model_class._can_set_attn_implementation()


# ---------------------------------------------------------------------------------------------- the model's parts


class Survey:
    """The built model, which answers for one tensor at a time."""

    def __init__(self, model: PreTrainedModel, shapes: Mapping[str, list[int]], targets: Mapping[str, Target]) -> None:
        self.model = model
        self.shapes = shapes
        self.targets = targets
        self.experts = ExpertTensors(model, shapes, targets)
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.layers_name, self.layers = decoder_layers(model)
        self.head = model.get_output_embeddings()
        self.fp32 = [*(model._keep_in_fp32_modules or []), *(model._keep_in_fp32_modules_strict or [])]

    def role(self, name: str) -> TensorRole:
        """The role of the tensor `name` on disk."""
        shape, target = self.shapes[name], self.targets.get(name)
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
        role = self._role_of_owner(name, owner_name, owner, attribute)
        return role if role.module else role.model_copy(update={"module": owner_name})

    def _role_of_owner(self, name: str, owner_name: str, owner: nn.Module, attribute: str) -> TensorRole:
        if len(self.shapes[name]) < 2:
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
        if is_experts(owner):
            return self.experts.role(name, owner, attribute)
        if self.is_in_router(owner_name):
            return TensorRole(kind="router", reason=rules.ROUTER_REASON)
        if isinstance(owner, nn.Linear) and attribute == "weight":
            return self._linear(owner_name, owner, self.targets[name])
        return TensorRole(kind="parameter", reason=f"a parameter of {type(owner).__name__}, not a Linear weight")

    def _linear(self, name: str, owner: nn.Linear, target: Target) -> TensorRole:
        pieces = [self.modules.get(piece.rpartition(".")[0]) for piece in target.all_names()]
        if not all(isinstance(piece, nn.Linear) for piece in pieces):
            return TensorRole(kind="parameter", reason="on disk it is fused with something that is not a Linear")
        if any(re.search(rf"(^|\.){re.escape(pattern)}(\.|$)", name) for pattern in self.fp32):
            return TensorRole(kind="parameter", reason="the model keeps it in float32")
        parent_name, _, leaf = name.rpartition(".")
        kept = rules.why_kept(leaf, owner.out_features, mixer=_mixer(self.modules[parent_name]))
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

    def is_in_router(self, name: str) -> bool:
        """Whether the module computes expert weights, or is part of one that does, however deep in the layer."""
        parts = name.split(".")
        first = len(self.layers_name.split(".")) + 1  # the layer itself is none
        return any(".".join(parts[:end]) in self._routers for end in range(first + 1, len(parts) + 1))

    @functools.cached_property
    def _routers(self) -> frozenset[str]:
        """The modules that compute expert weights.

        They stand beside experts, or beside a module with experts in it. A router is known by its name, by its class,
        or by what it does: it puts out one number for each expert, and nothing that goes back into the hidden states.
        """
        hidden = getattr(self.model.config.get_text_config(decoder=True), "hidden_size", None)
        found: set[str] = set()
        inside = (name for name in self.modules if name.startswith(f"{self.layers_name}."))
        for name in inside:
            if rules.is_router_leaf(name.rpartition(".")[2]) or "Router" in type(self.modules[name]).__name__:
                found.add(name)
            elif (count := _num_experts(name, self.modules[name])) is not None:
                found |= {beside for beside, module in self._beside(name) if _puts_out(module, count, hidden)}
        return frozenset(found)

    def _beside(self, name: str) -> Iterator[tuple[str, nn.Module]]:
        """The modules beside `name`, and beside each module around it, up to the decoder layer."""
        while (parent := name.rpartition(".")[0]) != self.layers_name:
            for child, module in self.modules[parent].named_children():
                if f"{parent}.{child}" != name:
                    yield f"{parent}.{child}", module
            name = parent

    def head_name(self) -> str:
        """Name of the output head's Linear; empty if it has none."""
        is_linear = isinstance(self.head, nn.Linear)
        return next((name for name, module in self.modules.items() if is_linear and module is self.head), "")

    def misfits(self) -> list[str]:
        """What does not fit between the files and config.json: tensors of another shape than their parameter's, decoder
        layers that the config does not count, and parameters of the layers or the head that no tensor fills."""
        shapes, targets, state = self.shapes, self.targets, self.model.state_dict()
        direct = ((name, list(state[t.name].shape)) for name, t in targets.items() if t.converter is None)
        found = [
            f"{name}: {shapes[name]} on disk, {shape} in the model" for name, shape in direct if shapes[name] != shape
        ]
        found += (
            f"{name}: a decoder layer on disk, beyond the {len(self.layers)} of config.json" for name in self._extra()
        )
        found += self.experts.misfits()
        filled = {name for target in targets.values() for name in target.all_names()}
        every = self.model.named_parameters(remove_duplicate=False)
        held = {
            id(parameter) for name, parameter in every if name in filled
        }  # under any of its names, where it is tied
        optional = [re.compile(pattern) for pattern in self.model._keys_to_ignore_on_load_missing or ()]
        for name, parameter in self.model.named_parameters():  # a tied parameter is listed once
            is_head = isinstance(self.head, nn.Linear) and parameter is self.head.weight
            wanted = (name.startswith(f"{self.layers_name}.") or is_head) and id(parameter) not in held
            if wanted and not any(pattern.search(name) for pattern in optional):
                found.append(f"{name}: not on disk")
        return found

    def _extra(self) -> Iterator[str]:
        """Layers on disk with the tensors of a decoder layer and a number that the model does not have.

        Layers that predict a second token have such numbers too, and tensors of their own besides."""
        held: dict[tuple[str, int], set[str]] = {}
        for name in self.shapes:
            if match := re.match(r"(.+?)\.(\d+)\.(.+)", name):
                held.setdefault((match[1], int(match[2])), set()).add(match[3])
        used = {name for name in self.targets if self.targets[name].name.startswith(f"{self.layers_name}.")}
        prefixes = {prefix for prefix, _ in held if any(name.startswith(f"{prefix}.0.") for name in used)}
        decoders = [
            tensors for (prefix, index), tensors in held.items() if prefix in prefixes and index < len(self.layers)
        ]
        for (prefix, index), tensors in held.items():
            if prefix in prefixes and index >= len(self.layers) and tensors in decoders:
                yield f"{prefix}.{index}"

    def attention(self, roles: Mapping[str, TensorRole]) -> list[AttentionLayer]:
        """The attention modules that read a KV cache, their own or another layer's, in layer order."""
        on_disk = {}
        for name, role in roles.items():
            if role.kind in {"linear", "mixer", "parameter"}:
                parent = role.module.rpartition(".")[0]
                on_disk.setdefault(parent, name.removesuffix(".weight").rpartition(".")[0])
        inside = {name: module for name, module in self.modules.items() if name.startswith(f"{self.layers_name}.")}
        found = {
            name: self._attention_layer(on_disk[name], name, module)
            for name, module in inside.items()
            if name in on_disk and _has_cache(module)
        }
        for name, module in inside.items():
            if name in on_disk and getattr(module, "is_kv_shared_layer", False):
                lender = found[_lender(module, {name: self.modules[name] for name in found if not found[name].lender})]
                update = {"name": on_disk[name], "module": name, "lender": lender.name}
                found[name] = lender.model_copy(update=update)
        return sorted(found.values(), key=lambda layer: dot_natural_key(layer.module))

    def _attention_layer(self, disk_name: str, name: str, module: nn.Module) -> AttentionLayer:
        heads, head_dim = self._kv_heads(module)
        mla = any("kv_b_proj" in child or "kv_a_proj" in child for child, _ in module.named_children())
        return AttentionLayer(name=disk_name, module=name, num_kv_heads=heads, head_dim=head_dim, mla=mla)

    def _kv_heads(self, module: nn.Module) -> tuple[int, int]:
        """(KV heads, head size) of an attention module."""
        config = getattr(module, "config", None) or self.model.config.get_text_config(decoder=True)
        if getattr(config, "per_layer_config", None):  # layers of one model may differ
            config = config.per_layer_config[_layer_index(module)]
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(module, "head_dim", None) or getattr(config, "head_dim", None)
        head_dim = head_dim or config.hidden_size // config.num_attention_heads
        key = getattr(module, "k_proj", None)
        if isinstance(key, nn.Linear):  # layers of one model may differ: sliding and full attention
            heads = key.out_features // head_dim
        return int(heads), int(head_dim)


def _mixer(parent: nn.Module) -> rules.Mixer | None:
    """The recurrent mixer that a module is, if there is a convolution among its children."""
    children = dict(parent.named_children())
    if not any(isinstance(child, nn.Conv1d) for child in children.values()):
        return None
    decays = (parameter for name, parameter in parent.named_parameters() if name.rpartition(".")[2] == "A_log")
    return rules.Mixer(next((tuple(size for size in decay.shape if size > 1) for decay in decays), ()))


def decoder_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Name and ModuleList of the text decoder's layers: the largest list with a place in the cache, which layers of
    towers have not. The config may count something else, such as the attention modules of layers that hold two each.

    Raises Unsupported for layers in several lists."""
    decoder = model.get_decoder() or model
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    lists = {name: module for name, module in decoder.named_modules() if isinstance(module, nn.ModuleList)}
    if not lists:
        raise Unsupported(f"{type(model).__name__} has no list of decoder layers")
    cached = [name for name, module in lists.items() if any(map(_has_place_in_cache, module.modules()))]
    name = max(cached or lists, key=lambda name: sum(parameter.numel() for parameter in lists[name].parameters()))
    kinds = {type(layer) for layer in lists[name]}
    apart = [other for other, module in lists.items() if other != name and kinds & {type(layer) for layer in module}]
    if apart:
        raise Unsupported(f"{type(model).__name__} has decoder layers in several lists: {', '.join([name, *apart])}")
    return ".".join(part for part in (prefix, name) if part), lists[name]


def _has_place_in_cache(module: nn.Module) -> bool:
    return getattr(module, "layer_idx", None) is not None


def _num_experts(name: str, module: nn.Module) -> int | None:
    """How many experts the module holds; None if it holds none."""
    if isinstance(module, nn.ModuleList):
        return len(module) if name.endswith(".experts") else None
    three = [parameter for parameter in module.parameters(recurse=False) if parameter.dim() == 3]
    return three[0].shape[0] if three and is_experts(module) else None


def _puts_out(module: nn.Module, count: int, hidden: int | None) -> bool:
    """Whether a Linear in the module puts out `count` features, and none puts out the hidden size."""
    outputs = {part.out_features for part in module.modules() if isinstance(part, nn.Linear)}
    return count in outputs and hidden not in outputs


def _lender(module: nn.Module, owners: Mapping[str, nn.Module]) -> str:
    """Name of the attention whose keys and values `module` reads: the one that it names, else the last before it of its
    own type."""
    index, named = _layer_index(module), getattr(module, "kv_shared_layer_index", None)
    if named is not None:
        lenders = [name for name, owner in owners.items() if _layer_index(owner) == named]
    else:
        before = {name: owner for name, owner in owners.items() if _layer_index(owner) < index}
        lenders = [name for name, owner in before.items() if _attention_type(owner) == _attention_type(module)]
    if not lenders:
        raise Unsupported(f"layer {index} reads another layer's keys and values, and the model does not say whose")
    return max(lenders, key=lambda name: _layer_index(owners[name]))


def _layer_index(attention: nn.Module) -> int:
    return vars(attention)["layer_idx"]


def _attention_type(module: nn.Module) -> object:
    """What tells sliding from full attention in a model that has both."""
    return getattr(module, "layer_type", None) or getattr(module, "is_sliding", None)


def _has_cache(module: nn.Module) -> bool:
    """Whether the module keeps keys and values: its own code passes them to a cache's `update`.

    A signature does not tell. Convolutions, linear attention and the indexers of sparse attention take the same cache,
    and keep other states in it by other methods; a decoder layer only hands it on.
    """
    if not _has_place_in_cache(module) or getattr(module, "is_kv_shared_layer", False):
        return False
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "update" in code.co_names and not _CACHES.isdisjoint(code.co_varnames)


def _with_groups(roles: dict[str, TensorRole]) -> dict[str, TensorRole]:
    """Add fused groups, which come from the names on disk. A projection of a recurrent mixer that would stay by itself
    goes with the Linears that vLLM fuses it with."""
    kinds = {"linear", "expert", "mixer"}
    weights = {name.removesuffix(".weight"): name for name, role in roles.items() if role.kind in kinds}
    groups = fused.fused_groups(weights, roles)
    quantized = {group for module, group in groups.items() if roles[weights[module]].kind != "mixer"}
    changed = dict(roles)
    for module, group in groups.items():
        role = roles[weights[module]]
        role = TensorRole(kind="linear", module=role.module) if role.kind == "mixer" and group in quantized else role
        changed[weights[module]] = role.model_copy(update={"group": group})
    return changed


if __name__ == "__main__":
    main()
