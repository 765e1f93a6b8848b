"""Child process: the module proofs of real vLLM models, as they are and with one thing wrong in each.

    python module_cases.py LLAMA TWIN MOE FP8_MOE TOWER FP8_TOWER PROOFS

Folders of checkpoints: tiny Llama and its FP8 twin, whose q, k and v have scales of their own; experts and their FP8
form; a model with a vision tower, and an FP8 checkpoint of it that vLLM reads wrongly. PROOFS: {name: ModuleProof}.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.modules.load import enter_world, loaded, proof_of

GATE_UP, DOWN = "model.layers.1.mlp.gate_up_proj", "model.layers.1.mlp.down_proj"
EXPERTS = "model.layers.1.mlp.experts.routed_experts"


def main() -> None:
    enter_world()
    llama, twin, moe, fp8_moe, tower, fp8_tower = map(Path, sys.argv[1:-1])
    proofs: dict[str, Any] = {}
    plain = {"llama": llama, "moe": moe, "tower": tower, "unfilled": fp8_tower}
    for name, folder in plain.items():
        with loaded(folder) as model:
            proofs[name] = proof_of(model).model_dump(mode="json")
    for folder, cases in ((twin, LINEAR_CASES), (fp8_moe, EXPERT_CASES)):
        with loaded(folder) as model:
            for name, change in cases.items():
                proofs[name] = _changed(model, change)
    Path(sys.argv[-1]).write_text(json.dumps(proofs))


def _changed(model: nn.Module, change: Callable[[nn.Module], Any]) -> Any:
    """The proof with a change, which is undone: all of it is in the parameters of two layers."""
    names = {GATE_UP, DOWN, EXPERTS} & dict(model.named_modules()).keys()
    layers: list[Any] = [model.get_submodule(name) for name in sorted(names)]
    before = [(layer, layer.quant_method, {n: p.data.clone() for n, p in layer.named_parameters()}) for layer in layers]
    with torch.inference_mode():
        change(model)
        proof = proof_of(model).model_dump(mode="json")
        for layer, method, parameters in before:
            layer.quant_method = method
            for name, data in parameters.items():
                layer.get_parameter(name).data = data
    return proof


def _swapped_halves(tensor: Tensor, dim: int) -> None:
    first, second = tensor.chunk(2, dim=dim)
    tensor.copy_(torch.cat([second, first], dim=dim).clone())


def exchange_gate_and_up(model: nn.Module) -> None:
    _swapped_halves(model.get_submodule(GATE_UP).get_parameter("weight").data, 1)  # stored as [inputs, outputs]


def serve_in_16_bits(model: nn.Module) -> None:
    """The layer's method is the one without quantization, on dequantized weights."""
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    layer: Any = model.get_submodule(DOWN)
    weight = (layer.weight.float().T * layer.weight_scale).bfloat16()
    layer.cpu_linear = lambda x, _, bias: nn.functional.linear(x, weight, bias)
    layer.quant_method = UnquantizedLinearMethod()
    layer.scheme = None


def exchange_experts_gate_and_up(model: nn.Module) -> None:
    experts = model.get_submodule(EXPERTS)
    for leaf in ("w13_weight", "w13_weight_scale"):
        _swapped_halves(experts.get_parameter(leaf).data[2], 0)


def transpose_experts(model: nn.Module) -> None:
    """The numbers of the transposed matrices, in the shape of the matrices."""
    weights = model.get_submodule(EXPERTS).get_parameter("w13_weight").data
    weights.copy_(weights.transpose(1, 2).reshape(weights.shape).clone())


def give_an_expert_anothers_scale(model: nn.Module) -> None:
    scales = model.get_submodule(EXPERTS).get_parameter("w2_weight_scale").data
    scales[1] = scales[2]


LINEAR_CASES: dict[str, Callable[[nn.Module], Any]] = {
    "twin": lambda model: None,
    "gate and up": exchange_gate_and_up,
    "16 bits": serve_in_16_bits,
}
EXPERT_CASES: dict[str, Callable[[nn.Module], Any]] = {
    "fp8 moe": lambda model: None,
    "experts' gate and up": exchange_experts_gate_and_up,
    "transposed": transpose_experts,
    "another's scale": give_an_expert_anothers_scale,
}


if __name__ == "__main__":
    main()
