"""F1 to F9: the files of the folder, their headers and their index."""

from __future__ import annotations

from collections.abc import Iterator

from fp8pipe.model.headers import INDEX_NAME
from fp8pipe.model.untrusted import clip
from fp8pipe.validate.checks.check import check
from fp8pipe.validate.faults import Fault
from fp8pipe.validate.meaning.config import HF_QUANT_CONFIG
from fp8pipe.validate.reading.checkpoint import MISTRAL
from fp8pipe.validate.subject import Subject


def _met(check_id: str, subject: Subject) -> list[Fault]:
    """Faults that reading the files met."""
    return subject.files.faults.get(check_id, [])


@check(
    "F1",
    "Every safetensors header parses, offsets are contiguous, the file has exactly the size they add up to.",
    consequence="vLLM stops while loading, or reads bytes of another tensor",
    remedy="write or download the file again",
)
def headers_are_exact(subject: Subject) -> list[Fault]:
    return _met("F1", subject)


@check(
    "F2",
    "Several weight files have an index, and every file it names exists.",
    consequence="with an index vLLM stops (FileNotFoundError); without one it loads what is there and silently leaves "
    "the rest of the weights uninitialised",
    remedy="download the missing files, or rebuild the index",
)
def index_names_existing_files(subject: Subject) -> list[Fault]:
    return _met("F2", subject)


@check(
    "F3",
    "The index lists exactly the tensors of the files, each in the file that holds it.",
    consequence="vLLM loads by file and does not notice; transformers and other readers miss the tensor",
    remedy="rebuild the index from the headers",
)
def index_lists_the_tensors(subject: Subject) -> list[Fault]:
    return _met("F3", subject)


@check(
    "F4",
    "No tensor lies in two files.",
    consequence="vLLM silently loads both, and the last one read wins",
    remedy="remove the stale copy",
)
def tensors_are_unique(subject: Subject) -> list[Fault]:
    return _met("F4", subject)


@check(
    "F5",
    "metadata.total_size of the index is the sum of the tensors' bytes.",
    severity="warning",
    consequence="none in vLLM; download tools and the Hub's size display are wrong",
    remedy="rebuild the index",
)
def total_size_adds_up(subject: Subject) -> Iterator[Fault]:
    files = subject.files
    if files.index is None or files.lost or files.faults.get("F1"):
        return
    total = sum(entry.nbytes for entry in files.tensors.values())
    if files.total_size != total:
        yield Fault(f"total_size {total}", clip(repr(files.total_size)), file=INDEX_NAME)


@check(
    "F6",
    "No weight file lies beside those that the index names.",
    consequence="readers that do not use the index load it too, and its tensors overwrite the right ones",
    remedy="delete the stale file",
)
def no_stale_shards(subject: Subject) -> list[Fault]:
    return _met("F6", subject)


@check(
    "F7",
    "No file that makes loaders take another path: Mistral's consolidated weights, adapters, pickles, stale configs.",
    consequence="vLLM switches to its Mistral loader, or stops",
    remedy="delete the file",
)
def no_files_of_other_loaders(subject: Subject) -> Iterator[Fault]:
    for name in subject.files.sizes:
        if MISTRAL.match(name):
            yield Fault("Hugging Face layout only", "a file of Mistral's own layout", file=name)
        elif name in {"adapter_model.safetensors", "adapter_config.json"}:
            yield Fault("a full model", "an adapter", file=name, consequence="vLLM reads the folder as an adapter")
        elif "/" not in name and name.endswith((".bin", ".pt", ".pth")) and name != "training_args.bin":
            yield _harmless(name, "pickled weights beside safetensors", "none while safetensors are preferred")
        elif name == HF_QUANT_CONFIG and subject.quantization and subject.quantization_file != name:
            yield _harmless(name, "a second quantization config", "ignored while config.json has its own")


def _harmless(name: str, found: str, consequence: str) -> Fault:
    return Fault("safetensors and config.json only", found, name, severity="warning", consequence=consequence)


@check(
    "F8",
    'Every safetensors header has metadata {"format": "pt"}.',
    severity="warning",
    consequence="none in vLLM; some versions of transformers refuse the file",
    remedy="write the metadata",
)
def metadata_names_the_format(subject: Subject) -> list[Fault]:
    return _met("F8", subject)


@check(
    "F9",
    "Weight files are weights: no Git LFS pointer, no empty file, no link or name that leaves the folder.",
    consequence="vLLM stops on the header; a name that leaves the folder reads somebody else's file",
    remedy="download the file itself (git lfs pull, hf download)",
)
def files_are_real(subject: Subject) -> list[Fault]:
    return _met("F9", subject)
