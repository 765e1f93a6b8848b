"""Says before anything is measured what will serve a checkpoint, on which device, on how many GPUs, and as what.

In: config.json, the scheme that its quantization_config means, names and shapes of the tensors. Out: a `Serving`
record. Pure: rules from the code of vLLM 0.32 and transformers 5.19, which the tests hold against vLLM's own classes.

    facts      the matrices as vLLM builds them
    shards     what cannot be cut over the GPUs
    kernels    what vLLM computes with
    loaders    transformers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fp8pipe.model.headers import TensorInfo
from fp8pipe.records.serving import DEVICES, RANKS, DeviceClass, Engine, Serves, Serving
from fp8pipe.validate.meaning.scheme import Scheme
from fp8pipe.validate.serving.facts import Facts, read_facts
from fp8pipe.validate.serving.kernels import effect, partial_group, serves_block
from fp8pipe.validate.serving.loaders import transformers_serves
from fp8pipe.validate.serving.shards import objections

__all__ = ["what_serves", "why_unloadable"]

RULES: dict[Engine, str] = {"vLLM": "0.32", "transformers": "5.19"}


def what_serves(config: Mapping[str, Any], scheme: Scheme | None, tensors: Mapping[str, TensorInfo]) -> Serving | None:
    """The answers for one checkpoint; None for a scheme that is not understood or whose kernels are not known here.

    tensors: those of the checkpoint, planned or written.
    """
    facts = read_facts(config, scheme, tensors) if scheme is not None else None
    return None if facts is None else Serving(answers=tuple(_answers(facts)), rules=RULES)


def why_unloadable(config: Mapping[str, Any], scheme: Scheme | None, tensors: Mapping[str, TensorInfo]) -> str:
    """Why vLLM does not load the checkpoint on any device, not even on one GPU, such as fused shards that do not end
    with a block; empty if no reason is known. Arguments as in `what_serves`."""
    facts = read_facts(config, scheme, tensors) if scheme is not None else None
    return next(objections(facts, 1), "") if facts is not None else ""


def _answers(facts: Facts) -> Iterator[Serves]:
    for device in DEVICES:
        for ranks in RANKS:
            yield _vllm(facts, device, ranks)
        for ranks in RANKS[1:] if facts.experts else ():
            yield _vllm(facts, device, ranks, expert_parallel=True)
    for device in DEVICES:
        for ranks in RANKS:
            verdict, word, reason = transformers_serves(facts, ranks)
            yield Serves(engine="transformers", device=device, ranks=ranks, verdict=verdict, word=word, reason=reason)


def _vllm(facts: Facts, device: DeviceClass, ranks: int, *, expert_parallel: bool = False) -> Serves:
    case: dict[str, Any] = {
        "engine": "vLLM",
        "device": device,
        "ranks": ranks,
        "expert_parallel": expert_parallel,
    }
    if not serves_block(facts.spec.block):
        block = "{}x{}".format(*facts.spec.block or ())
        return Serves(**case, verdict="no", word="no", counts=False, reason=f"vLLM has no kernel for blocks of {block}")
    if why := "; ".join(list(objections(facts, ranks, expert_parallel=expert_parallel))[:2]):
        return Serves(**case, verdict="no", word="no", counts=False, reason=why)
    if facts.kv == "attn_head" and device == "ada" and not facts.mla:
        return Serves(**case, verdict="no", word="no", counts=False, reason=_HEADS)
    if why := partial_group(facts, device):
        return Serves(**case, verdict="no", word="no", counts=False, reason=f"it loads, and stops at a token: {why}")
    changed = effect(facts, device, ranks)
    if changed is not None:
        return Serves(**case, verdict="otherwise", word=changed.word, counts=changed.counts, reason=changed.reason)
    return Serves(**case, verdict="w8a8", word="W8A8")


_HEADS = "only FlashAttention 3 and 4, which Ada does not run, read KV scales per head"
"""vllm/v1/attention/backends/flash_attn.py: `supports_per_head_quant_scales`."""
