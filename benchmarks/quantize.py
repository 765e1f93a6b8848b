"""Quantizing against its floor: reading the source's bytes and writing the checkpoint's, with fsync.

    python -m benchmarks.quantize [--layers 16] [--rounds 3] [--folder DIR]

A synthetic Llama (hidden 2048, ffn 8192, vocabulary 32000, bf16, 5 shards; 2.0 GB at 16 layers) is quantized with every
data-free recipe. Floor and ours alternate, each in a process of its own; inside time runs from the plan to the fsynced
checkpoint with the architecture record present, whole time is the process. Printed are medians and ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = ("fp8-dynamic", "fp8-block", "autofp8-dynamic")
CHUNK = 8 << 20


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the model and the outputs go")
    parser.add_argument("--child", nargs=3, metavar=("WHAT", "SOURCE", "OUTPUT"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        _child(*options.child)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        source = make_llama(Path(scratch) / "source", options.layers)
        _measure(source, Path(scratch) / "out", options.rounds)


def make_llama(folder: Path, num_layers: int) -> Path:
    """Random weights of the shape of a real model, in five shards."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, words = 2048, 8192, 32000
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": num_layers,
        "vocab_size": words,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (words, hidden)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (words, hidden)}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names, generator = list(shapes), torch.Generator().manual_seed(0)
    weight_map = {}
    for shard in range(5):
        file = f"model-{shard + 1:05d}-of-00005.safetensors"
        mine = names[shard * len(names) // 5 : (shard + 1) * len(names) // 5]
        tensors = {name: (torch.randn(shapes[name], generator=generator) * 0.02).bfloat16() for name in mine}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _measure(source: Path, output: Path, rounds: int) -> None:
    source_bytes = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    print(f"source {source_bytes / 1e9:.2f} GB, {os.cpu_count()} cores, {rounds} rounds after a warm-up, medians")
    print(f"{'recipe':<16} {'floor s':>8} {'inside s':>9} {'ratio':>6} {'whole s':>8} {'GB/s in':>8} {'peak MB':>8}")
    for recipe in RECIPES:
        _run(recipe, source, output)  # warm-up: page cache, architecture record
        floors, ours = [], []
        for _ in range(rounds):
            ours.append(_run(recipe, source, output, keep=True))
            floors.append(_run("floor", source, output))
        floor = statistics.median(one["inside"] for one in floors)
        inside = statistics.median(one["inside"] for one in ours)
        ratio = statistics.median(a["inside"] / b["inside"] for a, b in zip(ours, floors, strict=True))
        whole = statistics.median(one["whole"] for one in ours)
        peak = max(one["peak_mb"] for one in ours)
        rate = source_bytes / 1e9 / inside
        print(f"{recipe:<16} {floor:8.2f} {inside:9.2f} {ratio:6.2f} {whole:8.2f} {rate:8.2f} {peak:8.0f}", flush=True)


def _run(what: str, source: Path, output: Path, *, keep: bool = False) -> dict[str, Any]:
    """One child process; its output folder stays for the floor to know the bytes to write, then goes."""
    command = [sys.executable, "-m", "benchmarks.quantize", "--child", what, str(source), str(output)]
    began = time.perf_counter()
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    whole = time.perf_counter() - began
    if not keep:
        shutil.rmtree(output, ignore_errors=True)
    return json.loads(answer.stdout.splitlines()[-1]) | {"whole": whole}


def _child(what: str, source: str, output: str) -> None:
    seconds = _floor(Path(source), Path(output)) if what == "floor" else _ours(what, source, Path(output))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps({"inside": seconds, "peak_mb": peak}))


def _ours(recipe: str, source: str, output: Path) -> float:
    """Plan to fsynced checkpoint; imports are the whole process's time, not the inside."""
    import torch  # noqa: F401

    from fp8pipe import stages
    from fp8pipe.config import load_recipe
    from fp8pipe.quantize import quantize, run  # noqa: F401

    snapshot = stages.pin(source)
    began = time.perf_counter()
    plan = stages.plan_snapshot(snapshot, load_recipe(recipe))
    quantize(snapshot, plan, output)
    return time.perf_counter() - began


def _floor(source: Path, output: Path) -> float:
    """Read every source byte, write as many bytes as the checkpoint beside it holds, fsync."""
    sizes = [path.stat().st_size for path in sorted(output.glob("*.safetensors"))]
    buffer = bytearray(CHUNK)
    began = time.perf_counter()
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    for number, size in enumerate(sizes):
        with (output / f"floor-{number}").open("wb", buffering=0) as file:
            for start in range(0, size, CHUNK):
                file.write(memoryview(buffer)[: min(CHUNK, size - start)])
            os.fsync(file.fileno())
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
