"""Runs one contender of the calibration benchmark, in the Python of its environment; the last line is JSON.

    python -m benchmarks.calibrate_contender WHAT SOURCE DATA OUTPUT [DEVICE]

    ours       calibrate, quantize and save
    datafree   the same weights without calibration
    floor      the decoder's plain forward, and nothing else
    peer       llm-compressor's oneshot, FP8 static with FP8 KV
    scales     the peer with static_minmax and without propagated error, traced layer by layer (pipeline sequential);
               prints the scales of activations and cache
    untraced   the same by one plain pass (pipeline basic)

DATA is a .jsonl of texts, each of them a sample. DEVICE, for ours and the floor: cpu (default) or cuda. `inside` is
seconds without imports and without reading the data, `calibrate` the part of them that calibration took, `cpu` the CPU
seconds of all threads in that time; `peak_mb` is the process's largest resident set, `device_mb` the most memory on a
GPU. A module is imported only when its contender needs it."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contender import peak_mb

KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}

Spent = dict[str, float]
"""inside, cpu and (ours) calibrate, in seconds."""


def main() -> None:
    what, source, data, output, device = *sys.argv[1:5], (sys.argv[5:] or ["cpu"])[0]
    paths = Path(source), Path(data), Path(output)
    if what in {"scales", "untraced"}:
        print(json.dumps(scales(*paths, pipeline="sequential" if what == "scales" else "basic")))
        return
    contenders: dict[str, Callable[[], Spent]] = {
        "ours": lambda: ours(*paths, device),
        "datafree": lambda: datafree(*paths),
        "floor": lambda: floor(*paths, device),
        "peer": lambda: peer(*paths),
    }
    print(json.dumps(contenders[what]() | {"peak_mb": peak_mb(), "device_mb": device_mb(device)}))


def clock() -> Callable[[], Spent]:
    """A clock that starts now; calling it returns what was spent since."""
    wall, cpu = time.perf_counter(), time.process_time()
    return lambda: {"inside": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def warm_up(device: str) -> None:
    """Load a GPU's libraries, which happens at first use and is not part of `inside`."""
    if device == "cpu":
        return
    import torch

    some = torch.ones(256, 256, dtype=torch.bfloat16, device=device)
    heads = (some @ some).view(1, 4, 256, 64)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.cuda.synchronize(device)


def device_mb(device: str) -> float:
    """The most memory that tensors took on the GPU, in MB; 0 on a CPU."""
    if device == "cpu":
        return 0.0
    import torch

    return torch.cuda.max_memory_allocated(device) / 1e6


def ours(source: Path, data: Path, output: Path, device: str) -> Spent:
    """Everything from the plan to the fsynced checkpoint."""
    import transformers  # noqa: F401  imports are not part of `inside`

    from fp8pipe import stages
    from fp8pipe.calibrate import calibrate, forward  # noqa: F401
    from fp8pipe.config import load_recipe
    from fp8pipe.quantize import preload, quantize

    recipe = load_recipe("fp8-static-kv")
    changes = {"dataset": str(data), "num_samples": len(_texts(data)), "max_seq_len": 1 << 20}
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update=changes)})
    preload()
    warm_up(device)
    snapshot = stages.pin(str(source))
    spent = clock()
    plan = stages.plan(snapshot, recipe)
    ranges = calibrate(snapshot, plan, recipe, output.parent / "ranges", device=device)
    quantize(snapshot, plan, output, calibration=ranges)
    return spent() | {"calibrate": ranges.seconds}


def datafree(source: Path, data: Path, output: Path) -> Spent:
    """Quantize the same weights, one scale per tensor, with dynamic activations."""
    from fp8pipe import stages
    from fp8pipe.config import load_recipe
    from fp8pipe.quantize import preload, quantize

    preload()
    snapshot, recipe = stages.pin(str(source)), load_recipe("autofp8-dynamic")
    spent = clock()
    quantize(snapshot, stages.plan(snapshot, recipe), output)
    return spent()


def floor(source: Path, data: Path, output: Path, device: str) -> Spent:
    """Run every sample through the decoder, one at a time, with all weights in memory and without lm_head.

    On a CPU without bf16 instructions in float32, which is four times as fast there."""
    import torch
    from transformers import AutoModelForCausalLM

    from fp8pipe.calibrate.cpu_linear import is_emulated

    dtype = torch.float32 if is_emulated(torch.bfloat16, torch.device(device)) else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model = model.to(device)
    samples = _token_ids(source, data)
    warm_up(device)
    with torch.inference_mode():
        spent = clock()
        for ids in samples:
            model.model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    if device != "cpu":
        torch.cuda.synchronize(device)
    return spent()


def peer(source: Path, data: Path, output: Path) -> Spent:
    """oneshot and its save, with loading, since ours reads the weights too."""
    oneshot_on(source, _token_ids(source, data), None)  # imports only
    spent = clock()
    oneshot_on(source, _token_ids(source, data), output)
    return spent()


def oneshot_on(source: Path, token_ids: list[list[int]], output: Path | None, **changes: Any) -> None:
    """Run llm-compressor's FP8 preset with an FP8 cache; without `output`, only import what it needs."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot  # pyright: ignore[reportMissingImports]  the peer's environment
    from llmcompressor.modifiers.quantization import QuantizationModifier  # pyright: ignore[reportMissingImports]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if output is None:
        return
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    observer = {"kv_cache_scheme": KV | {"observer": "static_minmax"}}
    recipe = QuantizationModifier(targets="Linear", scheme="FP8", ignore=["lm_head"], **observer)
    rows = {"input_ids": token_ids, "attention_mask": [[1] * len(ids) for ids in token_ids]}
    with torch.no_grad():
        oneshot(
            model=model,
            tokenizer=AutoTokenizer.from_pretrained(source),
            dataset=Dataset.from_dict(rows),
            recipe=recipe,
            num_calibration_samples=len(token_ids),
            shuffle_calibration_samples=False,
            max_seq_length=max(map(len, token_ids)),
            output_dir=str(output),
            **changes,
        )


def scales(source: Path, data: Path, output: Path, *, pipeline: str) -> dict[str, float]:
    """input_scale, k_scale and v_scale of the peer's checkpoint, by name on disk."""
    from safetensors.torch import load_file

    settings = {"pipeline": pipeline, "propagate_error": False, "moe_calibrate_all_experts": False}
    oneshot_on(source, _token_ids(source, data), output, **settings)
    found = {}
    for path in output.glob("*.safetensors"):
        for name, values in load_file(path).items():
            if name.endswith((".input_scale", ".k_scale", ".v_scale")):
                found[name] = float(values)
    return found


def _texts(data: Path) -> list[str]:
    return [json.loads(line)["text"] for line in data.read_text().splitlines()]


def _token_ids(source: Path, data: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source)
    return [tokenizer(text)["input_ids"] for text in _texts(data)]


if __name__ == "__main__":
    main()
