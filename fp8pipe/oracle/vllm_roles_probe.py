"""The child process that takes the role of each tensor from vLLM's model and loader.

    python -m fp8pipe.oracle.vllm_roles_probe REQUEST ANSWER

REQUEST: [{"folder": path with config.json, "tensors": {name: [dtype, shape]}, "trust_remote_code": bool}, ...]. ANSWER:
for each the fields of Architecture, or {"unsupported": reason}.

The model is built with a quantization that does nothing, so that its layers ask for a method. Then vLLM's loader runs
on stand-ins without data: a tensor that lands whole in the weight of such a layer, or in one expert of such a layer's
experts, can be quantized, and tensors that share the weight are fused. All others are kept.
"""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fp8pipe.model import names as rules
from fp8pipe.model.architecture import QUANTIZABLE, TensorRole
from fp8pipe.model.untrusted import clip
from fp8pipe.oracle import vllm_probe

if TYPE_CHECKING:
    from torch import nn
    from vllm.model_executor.layers.quantization import QuantizationConfig

    from fp8pipe.oracle.asked import Asked
    from fp8pipe.oracle.landing import Box, Write

Tensors = dict[str, tuple[str, list[int]]]
"""Dtype and shape of each tensor on disk."""


class Unsupported(Exception):
    """The model cannot be quantized, for the reason in the message."""


def main() -> None:
    requests, answer = json.loads(Path(sys.argv[1]).read_bytes()), Path(sys.argv[2])
    vllm_probe.prepare(answer.parent / "store")
    answer.write_text(json.dumps([_attend(request) for request in requests]))


def _attend(request: dict[str, Any]) -> dict[str, Any]:
    try:
        return examine(Path(request["folder"]), request["tensors"], request["trust_remote_code"])
    except Exception as error:  # vLLM raises whatever it stumbles on
        return {"unsupported": f"vLLM cannot build it: {clip(str(error) or type(error).__name__, 400)}"}


def examine(folder: Path, tensors: Tensors, trust_remote_code: bool) -> dict[str, Any]:
    """The fields of `Architecture` for the config.json in `folder`, which loses its quantization_config. Raises
    Unsupported, or whatever vLLM does."""
    from fp8pipe.oracle.landing import Follower

    plain = json.loads((folder / "config.json").read_bytes())
    quantization = plain.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(plain))
    read = {name: entry for name, entry in tensors.items() if not _is_spent(name, quantization)}
    layers: Asked = {}
    how = {"tensors": len(tensors), "trust_remote_code": trust_remote_code}
    with vllm_probe.built(folder, layers, quant_config=_nothing(), **how) as model:
        follower = Follower(dict(model.named_buffers()) | dict(model.named_parameters()))
        refused = vllm_probe.run_loader(model, follower, read, vllm_probe.MAX_REFUSALS)
        survey = Survey(model, layers, read, follower.writes)
        spent = TensorRole(kind="unused", reason="scale of the FP8 source")
        roles = survey.with_groups({name: survey.role(name) if name in read else spent for name in tensors})
        return {
            "model_class": type(model).__name__,
            "model_type": str(plain.get("model_type", "")),
            "transformers_version": version("transformers"),
            "answered_by": "vLLM",
            "tensors": {name: role.model_dump(exclude_defaults=True) for name, role in roles.items()},
            "attention": [],
            "num_layers": survey.num_layers,
            "layers_module": survey.layers_name,
            "tied_embeddings": survey.is_tied and not any(role.kind == "lm_head" for role in roles.values()),
            "trust_remote_code": trust_remote_code,
            "source_quantization": quantization,
            "misfits": [*_refusals(refused), *survey.unfilled()],
        }


def _is_spent(name: str, quantization: dict[str, Any] | None) -> bool:
    """Whether a tensor is a scale of a quantized source, for which an unquantized model has no place."""
    return quantization is not None and name.rpartition(".")[2] in rules.SPENT_NAMES


def _refusals(refused: Mapping[str, list[Any]]) -> Iterator[str]:
    for name, row in refused.items():
        yield f"{name or 'the weights'}: vLLM's loader refuses it: {row[-1]}"


def _nothing() -> QuantizationConfig:
    """A quantization that quantizes nothing, so that layers ask for a method."""
    import torch
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import QuantizationConfig

    class Nothing(QuantizationConfig):
        def get_name(self) -> Any:
            return "compressed-tensors"

        def get_supported_act_dtypes(self) -> list[torch.dtype]:
            return [torch.bfloat16, torch.float16, torch.float32]

        @classmethod
        def get_min_capability(cls) -> int:
            return 0

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            return cls()

        def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    return Nothing()


# ---------------------------------------------------------------------------------------------- roles


class Survey:
    """The built model, and what its loader wrote, which answer for one tensor at a time."""

    def __init__(self, model: nn.Module, asked: Asked, tensors: Tensors, writes: list[Write]) -> None:
        self._model, self._asked, self._tensors, self._all_writes = model, asked, tensors, writes
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._parameters = dict(model.named_parameters(remove_duplicate=False))
        self._writes: dict[str, list[tuple[Write, Box | None]]] = defaultdict(list)
        """By tensor: each write of its elements alone, and which of them."""
        self._places: dict[str, set[str]] = defaultdict(set)
        for write in writes:
            pieces = {piece.tensor: piece.region.box for piece in write.origins}
            for name, box in pieces.items():
                self._places[name].add(write.place)
                self._writes[name].append((write, box if len(write.origins) == 1 else None))
        self.layers_name, self.num_layers = self._decoder_layers()
        self._experts = {name: module for name, module in self._modules.items() if _is_experts(module)}

    @property
    def is_tied(self) -> bool:
        """Whether the config says that head and embedding are one."""
        text = getattr(getattr(self._model, "config", None), "get_text_config", lambda: None)()
        return bool(getattr(text, "tie_word_embeddings", False))

    def _decoder_layers(self) -> tuple[str, int]:
        """Name and length of the list of layers with most attention or recurrent layers: those with a cache in vLLM."""
        from torch import nn
        from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase

        lists = {name: module for name, module in self._modules.items() if isinstance(module, nn.ModuleList)}
        counts = dict.fromkeys(lists, 0)
        for name, module in self._modules.items():
            if isinstance(module, AttentionLayerBase):
                around = [held for held in lists if name.startswith(f"{held}.")]
                if around:
                    counts[min(around, key=len)] += 1
        best = max(counts, key=lambda name: counts[name], default="")
        if not counts or not counts[best]:
            raise Unsupported("vLLM's model has no list of decoder layers with attention")
        return best, len(lists[best])

    def role(self, name: str) -> TensorRole:
        """The role of the tensor `name` on disk."""
        places = self._places.get(name, set())
        if not places:
            return TensorRole(kind="unused", reason="vLLM has no such tensor: multi-token prediction, or unused")
        owner_name, _, attribute = min(places).rpartition(".")
        owner = self._modules[owner_name]
        role = self._role_of_owner(name, owner_name, owner, attribute)
        return role.model_copy(update={"module": self._asked.get(owner, owner_name)})

    def _role_of_owner(self, name: str, owner_name: str, owner: nn.Module, attribute: str) -> TensorRole:
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

        if len(self._tensors[name][1]) < 2:
            return TensorRole(kind="bias" if attribute == "bias" else "norm", reason="fewer than two dimensions")
        if isinstance(owner, ParallelLMHead):
            return TensorRole(kind="lm_head", reason="lm_head: its error goes straight to the logits")
        if isinstance(owner, VocabParallelEmbedding):
            return TensorRole(kind="embedding", reason="embedding: looked up, never multiplied")
        if not owner_name.startswith(f"{self.layers_name}."):
            reason = "outside the text decoder's layers (vision, audio, projector, head)"
            return TensorRole(kind="outside", reason=reason)
        if owner_name in self._experts:
            return self._expert(name, owner_name, self._places[name])
        return self._linear(name, owner_name, self._places[name])

    def _linear(self, name: str, owner_name: str, places: set[str]) -> TensorRole:
        from vllm.model_executor.layers.linear import LinearBase

        owner, shape = self._modules[owner_name], self._tensors[name][1]
        if not isinstance(owner, LinearBase):
            return TensorRole(kind="parameter", reason=f"a parameter of {type(owner).__name__}, not a Linear weight")
        if self._is_router(owner_name):
            return TensorRole(kind="router", reason=rules.ROUTER_REASON)
        if owner not in self._asked:
            return TensorRole(kind="parameter", reason="vLLM serves this Linear unquantized")
        if shape[0] == 1:
            return TensorRole(kind="gate", reason="a gate with one output has nothing to gain")
        if len(shape) != 2 or places != {f"{owner_name}.weight"} or not name.endswith(".weight"):
            return TensorRole(kind="parameter", reason="not the weight of one Linear in vLLM")
        if not self._lands_by_rows(name, lead=0):
            return TensorRole(kind="parameter", reason="vLLM's loader reorders it, and would not reorder its scales")
        return TensorRole(kind="linear", parts=self._parts(owner, shape[0]))

    def _parts(self, owner: Any, rows: int) -> tuple[int, ...]:
        """Rows of each shard of a fused weight that is one tensor on disk."""
        sizes = tuple(int(size) for size in getattr(owner, "output_sizes", None) or ())
        return sizes if len(sizes) > 1 and sum(sizes) == rows else ()

    def _expert(self, name: str, owner_name: str, places: set[str]) -> TensorRole:
        holder = self._modules[owner_name]
        reason = "experts in a form that vLLM's loader for this model reads only unquantized"
        kept = TensorRole(kind="kept_experts", reason=reason)
        if holder not in self._asked or len(places) != 1 or len(self._tensors[name][1]) != 2:
            return kept
        places_of = [write.region.box for write, _ in self._writes[name]]
        indices = {box[0] if box is not None and len(box) == 3 else None for box in places_of}
        (first,) = indices if len(indices) == 1 else (None,)
        if first is None or first[1] - first[0] != 1 or not re.search(rf"\.{first[0]}\.[^.]+\.weight$", name):
            return kept
        if not self._lands_by_rows(name, lead=1):
            return kept
        parameter = "down_proj" if min(places).rpartition(".")[2].startswith("w2") else "gate_up_proj"
        return TensorRole(kind="expert", expert=first[0], parameter=parameter)

    def _lands_by_rows(self, name: str, *, lead: int) -> bool:
        """Whether all of a matrix is written, each part as whole rows into whole rows of the parameter.

        `lead`: dimensions of the parameter before the matrix."""
        shape, rows = self._tensors[name][1], 0
        for write, taken in self._writes[name]:
            box, columns = write.region.box, self._parameters[write.place].shape[-1]
            if box is None or taken is None or len(box) != lead + 2 or len(taken) != 2:
                return False
            whole = taken[1] == (0, shape[1]) and box[-1] == (0, columns) and columns == shape[1]
            height = taken[0][1] - taken[0][0]
            if not whole or height != box[-2][1] - box[-2][0]:
                return False
            rows += height
        return rows == shape[0]

    def _is_router(self, name: str) -> bool:
        """Whether a Linear computes expert weights: it stands beside experts, or a module with experts in it, and is
        called a router or puts out one number for each."""
        parent, _, leaf = name.rpartition(".")
        beside = [module for experts, module in self._experts.items() if experts.startswith(f"{parent}.")]
        rows = self._parameters[f"{name}.weight"].shape[0] if f"{name}.weight" in self._parameters else 0
        return bool(beside) and (rules.is_router_leaf(leaf) or any(rows == m.global_num_experts for m in beside))

    # ------------------------------------------------------------------------------------------ fused weights

    def with_groups(self, roles: dict[str, TensorRole]) -> dict[str, TensorRole]:
        """Add the group of tensors that share a weight. If one of them is kept, all are."""
        together: dict[tuple[str, int | None], list[str]] = defaultdict(list)
        for name, role in roles.items():
            if len(self._tensors.get(name, ("", []))[1]) >= 2:
                for place in self._places.get(name, ()):
                    together[place, role.expert].append(name)
        changed = dict(roles)
        for members in together.values():
            if len(members) < 2:
                continue
            ordered = sorted(members, key=self._first_row)
            kept = [name for name in ordered if roles[name].kind not in QUANTIZABLE]
            for name in ordered:
                if not kept:
                    changed[name] = roles[name].model_copy(update={"group": _group(ordered)})
                elif roles[name].kind in QUANTIZABLE:
                    kind = "kept_experts" if roles[name].kind == "expert" else "parameter"
                    update = {"kind": kind, "reason": f"vLLM fuses it with {kept[0]}, which stays", "parts": ()}
                    changed[name] = roles[name].model_copy(update=update)
        return changed

    def _first_row(self, name: str) -> tuple[int, ...]:
        boxes = [write.region.box for write, _ in self._writes[name]]
        return min((tuple(start for start, _ in box) for box in boxes if box is not None), default=())

    def unfilled(self) -> Iterator[str]:
        """Parameters of the decoder layers that no tensor fills."""
        for kind, _, parameter, _, found in vllm_probe.parameters_not_whole(self._model, self._all_writes):
            if kind == "unfilled" and parameter.startswith(f"{self.layers_name}."):
                yield f"{parameter}: a parameter of vLLM's model that the files do not fill ({found})"


def _is_experts(module: nn.Module) -> bool:
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    return isinstance(module, RoutedExperts)


def _group(members: list[str]) -> str:
    """The name of a group of weights, `model.layers.0.self_attn.(q_proj+k_proj+v_proj)`."""
    modules = [name.removesuffix(".weight") for name in members]
    leaves = "+".join(module.rpartition(".")[2] for module in modules)
    return f"{modules[0].rpartition('.')[0]}.({leaves})"


if __name__ == "__main__":
    main()
