"""Child process: what the FP8 modules of real vLLM models answer to random activations.

    python vllm_modules.py FOLDER...

Loads each checkpoint, generates a token, then calls every quantized Linear and every layer of experts by itself; writes
FOLDER/answers.pt: {module: {"kernel", "x", "y", ...}}, and FOLDER/rotated.pt: {"x", "y", "positions"}.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from fp8pipe.evaluate.environment import CPU_ENGINE_ARGUMENTS, import_architecture, prepare_process

IDS = torch.tensor([[0, 2], [2, 0], [3, 2], [0, 3], [2, 3], [0, 2]], dtype=torch.int32)
"""Experts chosen for each of six tokens: the second expert has nothing to do."""


def main() -> None:
    prepare_process()
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory
    from vllm.inputs import TokensPrompt

    for folder in sys.argv[1:]:
        import_architecture(folder, False)
        options: dict[str, Any] = {"skip_tokenizer_init": True, "max_model_len": 32, "num_gpu_blocks_override": 16}
        llm = LLM(folder, **CPU_ENGINE_ARGUMENTS, **options)
        llm.generate(TokensPrompt(prompt_token_ids=[5, 6, 7]), SamplingParams(max_tokens=2, detokenize=False))
        [answers] = llm.apply_model(ask)
        torch.save(answers, Path(folder) / "answers.pt")
        [rotated] = llm.apply_model(rotate)
        torch.save(rotated, Path(folder) / "rotated.pt")
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def ask(model: torch.nn.Module) -> dict[str, dict[str, Any]]:
    from vllm.model_executor.layers.fused_moe import RoutedExperts
    from vllm.model_executor.layers.linear import LinearBase

    from fp8pipe.evaluate.worker_side import look_at

    answers: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, LinearBase | RoutedExperts) or not look_at(module)["kernels"]:
            continue
        if isinstance(module, LinearBase) and not module.weight.numel():
            continue  # on a CPU with AMX, MLA takes kv_b_proj into a product of its own and frees it
        [kernel] = look_at(module)["kernels"]
        if isinstance(module, RoutedExperts):
            answers[name] = {"kernel": kernel} | ask_experts(module)
        else:
            x = activations(module.input_size)
            y = module(x)
            answers[name] = {"kernel": kernel, "x": x, "y": y[0] if isinstance(y, tuple) else y}
    return answers


def rotate(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The rotary embedding on heads cut out of a wider tensor, as MLA hands them over."""
    from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

    module = next(module for module in model.modules() if isinstance(module, RotaryEmbedding))
    x = torch.randn(5, 4, module.head_size + 32, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0, 1, 2, 9, 17])
    y, _ = module(positions, x.clone()[..., 32:], x.clone()[:, :1, 32:])
    return {"x": x[..., 32:].clone(), "y": y, "positions": positions}


def ask_experts(module: Any) -> dict[str, Any]:
    """Plain; then with one expert a token whose weight is applied to its input; then with biases."""
    weights = torch.rand(IDS.shape, generator=torch.Generator().manual_seed(2)) + 0.1
    x = activations(module.w13_weight.shape[2], rows=len(IDS))
    y = module.quant_method.apply(module, x, weights, IDS, None, None)
    module.apply_router_weight_on_input = True
    first = module.quant_method.apply(module, x, weights[:, :1], IDS[:, :1], None, None)
    module.apply_router_weight_on_input = False
    config = module.quant_method.moe_kernel.fused_experts.quant_config
    config._w1.bias = torch.randn(module.w13_weight.shape[:2], generator=torch.Generator().manual_seed(3))
    config._w2.bias = torch.randn(module.w2_weight.shape[:2], generator=torch.Generator().manual_seed(4))
    biased = module.quant_method.apply(module, x, weights, IDS, None, None)
    biases = {"bias1": config._w1.bias, "bias2": config._w2.bias}
    return {"x": x, "weights": weights, "ids": IDS, "y": y, "first": first, "biased": biased} | biases


def activations(features: int, rows: int = 6) -> torch.Tensor:
    """[rows, features] bf16: rows of very different size, one of them tiny, with outliers in some columns."""
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(rows, features, generator=generator) * torch.tensor([1.0, 0.2, 3.0, 0.05, 1e-7, 0.7])[:rows, None]
    x[:, :: features // 7] *= 6
    return x.bfloat16()


if __name__ == "__main__":
    main()
