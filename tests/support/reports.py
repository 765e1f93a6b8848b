"""Small, complete EvalReports, checkpoints, policies and recipes for tests of what comes after the evaluation.

`report(...)` is one model's report with all that the gate's rules need; `change_task` and `change_engine` alter it.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import numpy as np

from fp8pipe.config import EvalSuite, GatePolicy, Recipe, TaskPolicy, TaskSpec
from fp8pipe.records import (
    PROOF_VERSION,
    Checkpoint,
    EngineFacts,
    EvalReport,
    MetricSamples,
    ModuleOutput,
    ModuleProof,
    ServingFigures,
    TaskResult,
)

SOURCE_COMMIT = "5" * 40
FINGERPRINT = "f" * 64
KERNEL = "ReferenceFp8W8A8LinearKernel"


def values(right: int, n: int) -> tuple[float, ...]:
    """`n` 0/1 outcomes, the first `right` of them 1."""
    return tuple([1.0] * right + [0.0] * (n - right))


def flipped(outcomes: Sequence[float], *, lost: int, won: int) -> tuple[float, ...]:
    """The same outcomes, with the first `lost` ones turned to 0 and the first `won` zeros turned to 1."""
    result = np.array(outcomes)
    result[np.flatnonzero(np.array(outcomes) == 1)[:lost]] = 0
    result[np.flatnonzero(np.array(outcomes) == 0)[:won]] = 1
    return tuple(result.tolist())


def metric(
    outcomes: Sequence[float], *, name: str = "exact_match", filter: str = "none", **fields: Any
) -> MetricSamples:
    """One metric whose mean is that of its samples."""
    known = {
        "metric": name,
        "filter": filter,
        "higher_is_better": True,
        "mean": float(np.mean(outcomes)) if len(outcomes) else 0.0,
        "stderr": None,
        "values": tuple(outcomes),
    }
    return MetricSamples(**(known | fields))


def task(outcomes: Sequence[float], *, name: str = "qa", **fields: Any) -> TaskResult:
    """One task with one metric; documents numbered and hashed by position."""
    ids = range(len(outcomes))
    known = {
        "task": name,
        "version": "1.0",
        "num_fewshot": 0,
        "doc_ids": tuple(ids),
        "doc_hashes": tuple(f"doc{i}" for i in ids),
        "prompt_hashes": tuple(f"prompt{i}" for i in ids),
        "target_hashes": tuple(f"target{i}" for i in ids),
        "metrics": (metric(outcomes),),
    }
    return TaskResult(**(known | fields))


def engine(*, candidate: bool, **fields: Any) -> EngineFacts:
    """A baseline in BF16, or a candidate with FP8 Linears and an FP8 KV cache."""
    known = {
        "linear_kernels": (KERNEL,) if candidate else (),
        "attention_backend": "FLASH_ATTN",
        "kv_cache_dtype": "fp8" if candidate else "auto",
        "quantization": "compressed-tensors" if candidate else None,
        "dtype": "bfloat16",
        "max_model_len": 512,
        "arguments": {"max_model_len": 512, "dtype": "bfloat16"},
        "device_class": "hopper",
        "device_name": "NVIDIA H100",
        "plugin": None,
    }
    return EngineFacts(**(known | fields))


MODULES = ("model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.experts", "lm_head")


def module(name: str, *, off: float = 0.0, experts: int = 0, seed: int = 0, **fields: Any) -> ModuleOutput:
    """A layer whose outputs are `off` from those of the same name and 0, relative to their norm."""
    shape = (max(experts, 1), 2 if experts else 1, 512)
    one, other = (np.random.default_rng([len(name), draw]).normal(size=shape) for draw in (seed, seed + 1))
    numbers = (one + off * other).astype(np.float32)
    halves = ((numbers.view(np.uint32) + 0x8000) >> 16).astype("<u2")
    kind = "experts" if experts else "linear"
    known = {"rank": 0, "kind": kind, "scheme": "", "shape": shape}
    return ModuleOutput(name=name, outputs=base64.b64encode(halves.tobytes()).decode(), **(known | fields))


def proof(*, candidate: bool = False, **changed: ModuleOutput) -> ModuleProof:
    """Of a small model, with quantized layers 2.6 and 5 % off on the candidate's side. `changed`: by last part of the
    name."""
    fp8: dict[str, Any] = {"scheme": f"CompressedTensorsW8A8Fp8, {KERNEL}"} if candidate else {}
    linear, experts = (fp8 | {"off": off * candidate} for off in (0.026, 0.05))
    stored = {"stored_error": 0.002} if candidate else {}
    modules = [
        module(MODULES[0], **linear, **stored),
        module(MODULES[1], **linear, **stored),
        module(MODULES[2], **experts, experts=3),
        module(MODULES[3]),
    ]
    kept = (changed.get(one.name.rpartition(".")[2], one) for one in modules)
    return ModuleProof(version=PROOF_VERSION, modules=tuple(kept))


def report(*tasks: TaskResult, candidate: bool = False, **fields: Any) -> EvalReport:
    """A complete report on `tasks`, which leaves no rule unchecked."""
    known = {
        "role": "candidate" if candidate else "baseline",
        "model_id": "acme/tiny",
        "fingerprint": FINGERPRINT if candidate else SOURCE_COMMIT,
        "suite": "unit",
        "suite_digest": "d" * 64,
        "engine": engine(candidate=candidate),
        "tasks": tasks,
        "add_bos_token": True,
        "chat_template_hash": None,
        "tokenizer_hash": "c" * 64,
        "seeds": {"random": 0, "fewshot": 1234},
        "versions": {
            "vllm": "0.32.0",
            "lm_eval": "0.4.13",
            "transformers": "5.19.0",
            "torch": "2.13.0",
            "fp8pipe": "0.1.0",
        },
        "table": "|Task|\n",
        "proof": proof(candidate=candidate),
        "seconds": {"total": 1.0},
    }
    return EvalReport(**(known | fields))


def pair(n: int = 2000, *, right: int = 1820, lost: int = 0, won: int = 0) -> tuple[EvalReport, EvalReport]:
    """Baseline and candidate on one 0/1 task of `n` samples."""
    ours = values(right, n)
    return report(task(ours)), report(task(flipped(ours, lost=lost, won=won)), candidate=True)


def timed(side: EvalReport, tokens_per_second: float, model_bytes: int | None = 2_000_000, **fields: Any) -> EvalReport:
    """The report with serving figures of a GPU."""
    times = {f"{kind}_{name}_ms": 10.0 for kind in ("mean", "median", "p99") for name in ("ttft", "itl")}
    known = {
        "workload": {"num_prompts": 64, "input_len": 1024, "output_len": 128, "max_concurrency": 16, "seed": 1234},
        "request_throughput": tokens_per_second / 128,
        "output_throughput": tokens_per_second,
        "total_token_throughput": 9 * tokens_per_second,
        "comparable": True,
    }
    figures = ServingFigures(**(known | times | fields))
    return change_engine(side, model_bytes=model_bytes).model_copy(update={"serving": figures})


def policy(*tasks: str, margin: float = 0.02, **fields: Any) -> GatePolicy:
    """A policy for 0/1 tasks (default: `qa`), one attempt."""
    known = {
        "name": "unit",
        "tasks": {name: TaskPolicy(metric="exact_match", margin=margin, min_baseline=0.3) for name in tasks or ("qa",)},
        "max_attempts": 1,
    }
    return GatePolicy(**(known | fields))


def suite(samples: int | None = None, *tasks: str) -> EvalSuite:
    """A suite that asks for `samples` of each task."""
    return EvalSuite(name="unit", tasks={name: TaskSpec(samples=samples) for name in tasks or ("qa",)})


def checkpoint(**fields: Any) -> Checkpoint:
    """The checkpoint that the candidate's report is about."""
    known = {
        "fingerprint": FINGERPRINT,
        "model_id": "acme/tiny",
        "source_commit": SOURCE_COMMIT,
        "recipe": "fp8-static-kv",
        "recipe_digest": "e" * 64,
        "engine_version": 1,
        "calibration_digest": "a" * 64,
        "source_bytes": 2_000_000,
        "output_bytes": 1_100_000,
        "quantized_tensors": 28,
        "kept_tensors": 9,
        "seconds": 1.5,
    }
    return Checkpoint(**(known | fields))


def recipe(**fields: Any) -> Recipe:
    """fp8-static-kv, as shipped."""
    known = {
        "name": "fp8-static-kv",
        "weights": {"strategy": "tensor"},
        "activations": {"mode": "static", "strategy": "tensor"},
        "kv_cache": {"strategy": "tensor"},
    }
    return Recipe.model_validate(known | fields)


def change_task(side: EvalReport, index: int = 0, **fields: Any) -> EvalReport:
    """The report with fields of one of its tasks replaced."""
    tasks = list(side.tasks)
    tasks[index] = tasks[index].model_copy(update=fields)
    return side.model_copy(update={"tasks": tuple(tasks)})


def change_engine(side: EvalReport, **fields: Any) -> EvalReport:
    """The report with facts of its engine replaced."""
    return side.model_copy(update={"engine": side.engine.model_copy(update=fields)})
