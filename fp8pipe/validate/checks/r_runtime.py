"""R1: what vLLM's own model and loader make of the tensors. Asked only on request: importing vLLM takes 17 s."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.model.untrusted import clip
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.names import is_in_predictor
from fp8pipe.validate.subject import Subject

CONSEQUENCES = {
    "refused": "vLLM stops with this message",
    "unread": "vLLM silently drops the tensor",
    "unfilled": "vLLM silently leaves (part of) the parameter uninitialised",
    "dtype": "vLLM silently casts one dtype into the other",
    "truncated": "vLLM silently cuts off what is too long",
    "overlap": "vLLM silently lets one tensor overwrite another",
}


@check(
    "R1",
    "Each tensor lands whole in a parameter of vLLM's own model, and each parameter is filled.",
    needs=("vllm",),
    consequence="vLLM stops, or serves other weights than these",
    remedy="quantize again; if the source has the same fault, vLLM does not serve this architecture as it is on disk",
)
def vllm_reads_every_tensor(subject: Subject) -> Iterator[Fault]:
    for mismatch in subject.vllm or ():
        if mismatch.kind == "unread" and is_in_predictor(mismatch.tensor.rpartition(".")[0], subject.layout.num_layers):
            continue  # vLLM builds these layers as a separate model, for speculative decoding only
        entry = subject.files.tensors.get(mismatch.tensor)
        yield Fault(
            mismatch.expected,
            clip(mismatch.found, 300),
            file=entry.shard if entry is not None else None,
            tensor=mismatch.tensor or mismatch.parameter or None,
            consequence=CONSEQUENCES[mismatch.kind],
        )
