"""Read a checkpoint and its source into a Subject: files, headers, configs, records, architecture."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from fp8pipe.errors import InputError
from fp8pipe.model.headers import Headers
from fp8pipe.records import RECORD_DIR, RECORD_FILES, Snapshot, SourceFile
from fp8pipe.validate.asking import ask_vllm
from fp8pipe.validate.meaning.config import CONFIG, HF_QUANT_CONFIG, quantization_config, read_scheme
from fp8pipe.validate.meaning.layout import Layout, layout_from_architecture, layout_from_names, unquantized_names
from fp8pipe.validate.reading.checkpoint import CheckpointFiles, open_checkpoint
from fp8pipe.validate.reading.place import HubPlace, Place, place_of
from fp8pipe.validate.reading.records import read_records
from fp8pipe.validate.subject import Subject

if TYPE_CHECKING:
    from fp8pipe.model.architecture import Architecture

log = logging.getLogger(__name__)

SOURCE_CONFIG = f"{RECORD_DIR}/{RECORD_FILES['source_config']}"


def read_subject(
    place: Place, source: Snapshot | None, architecture: Architecture | None, *, oracles: bool | None
) -> Subject:
    """Headers and configs of both sides. `oracles`: True asks vLLM, and if there is no architecture transformers; None
    asks vLLM where it is installed."""
    files = open_checkpoint(place)
    theirs = open_checkpoint(place_of(source)) if source else None
    if architecture is None and source is not None:
        architecture = _inspect(source, None)
    elif architecture is None and oracles:
        architecture = _inspect(_as_snapshot(place), Headers((), unquantized_names(files.tensors)))
    config, problem = files.json_object(CONFIG)
    records = read_records(place)
    source_config = (
        theirs.json_object(CONFIG)[0] if theirs else files.json_object(SOURCE_CONFIG)[0] if records else None
    )
    quantization, file = _quantization(files, config)
    scheme = read_scheme(quantization)
    layout = _layout(theirs or files, source_config or config, architecture)
    if scheme is not None:
        scheme.match_all(layout.modules)
    subject = Subject(
        files=files,
        config=config or {},
        config_problem=problem,
        quantization=quantization or {},
        quantization_file=file,
        scheme_or_none=scheme,
        layout=layout,
        source_or_none=theirs,
        source_config=source_config,
        source_commit=source.commit if source else None,
        records_or_none=records,
    )
    if oracles is not False:
        subject.vllm = ask_vllm(files, theirs, config=config or {}, config_problem=problem, must=oracles is True)
    return subject


def _layout(files: CheckpointFiles, config: dict[str, Any] | None, architecture: Architecture | None) -> Layout:
    """From the source's files and config if there is a source; empty if no config can be read."""
    if config is None:
        return layout_from_names({}, {})
    if architecture is not None:
        return layout_from_architecture(architecture, files.tensors, config)
    return layout_from_names(files.tensors, config)


def _inspect(model: Snapshot, headers: Headers | None) -> Architecture | None:
    """The model's record; None if transformers cannot build it, and the report says `known_from: names`."""
    from fp8pipe.oracle.transformers import inspect

    try:
        return inspect(model, headers=headers)
    except InputError as error:
        log.warning("no architecture record, names and shapes decide: %s", error)
        return None


def _as_snapshot(place: Place) -> Snapshot:
    """A snapshot of just config.json, which is all that is read through it."""
    if isinstance(place, HubPlace):
        return place.snapshot
    files = (SourceFile(name=CONFIG, size=place.sizes.get(CONFIG, 0)),)
    return Snapshot(model_id="checkpoint", commit="local-checkpoint", files=files, root=str(place.root))


def _quantization(files: CheckpointFiles, config: dict[str, Any] | None) -> tuple[dict[str, Any] | None, str]:
    """The quantization_config and its file: config.json, else the one that older ModelOpt writes beside it.

    As in vLLM the latter counts if config.json has none at its top."""
    known = quantization_config(config) if config is not None else None
    if config is not None and config.get("quantization_config") is None:
        legacy, _ = files.json_object(HF_QUANT_CONFIG)
        if legacy is not None:
            return {"quant_method": "modelopt"} | legacy, HF_QUANT_CONFIG
    return known, CONFIG
