"""Finished layers on disk, so that a calibration that was killed resumes behind the last of them.

In: the hidden states after a finished layer, and the ranges so far. Out: the same after a restart, if key and samples
are the same. That is enough only where layers pass nothing but hidden states to one another, which `Handover` decides.
The files are not synced: they survive a killed process, but a power failure may cost a restart. When the disk has no
room for them, calibration continues without a bookmark.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.calibrate.lockstep import Pass
from fp8pipe.calibrate.memory import Batches
from fp8pipe.records import Record
from fp8pipe.records.calibration import Ranges

_log = logging.getLogger(__name__)

_CHEAP_SECONDS = 1.0
"""A bookmark that takes no longer than this is set after every layer; a slower one, only when ten times its cost has
passed since the last."""


class _State(Record):
    key: str
    token_ids_sha256: str
    layers: tuple[str, ...]
    """Finished layers, in order."""
    ranges: Ranges
    hidden: str
    """Name of the file with the hidden states after the last of them."""


class Finished(NamedTuple):
    """What an earlier run has left to resume from."""

    layers: tuple[str, ...]
    """Finished layers, in order; none when calibration begins at the first layer."""
    ranges: Ranges
    hidden: dict[int, Tensor]
    """Index of a sample -> hidden states [tokens, hidden] after the last finished layer."""


class Bookmark:
    """The state after the last finished layer, in one folder."""

    def __init__(self, folder: Path, key: str, token_ids_sha256: str) -> None:
        self._folder, self._key, self._tokens = folder, key, token_ids_sha256
        self._cost = 0.0
        self._last = time.monotonic()

    def find(self) -> Finished:
        """What an earlier run of the same key and samples has finished."""
        nothing = Finished((), Ranges(), {})
        state = _State.load_if_present(self._folder / "state.json")
        if state is None or (state.key, state.token_ids_sha256) != (self._key, self._tokens):
            return nothing
        try:
            hidden = load_file(self._folder / state.hidden)
        except (OSError, SafetensorError) as error:
            _log.warning(
                "calibration starts again from the first layer: cannot read %s (%s)", self._folder / state.hidden, error
            )
            return nothing
        rows = {int(i): row for name, batch in hidden.items() for i, row in zip(name.split(","), batch, strict=True)}
        return Finished(state.layers, state.ranges, rows)

    def set(self, layers: Sequence[str], ranges: Ranges, hidden: Mapping[tuple[int, ...], Tensor]) -> None:
        """Record that `layers` are finished, unless writing would cost more time than it saves.

        hidden: samples of a pass -> their hidden states [samples, tokens, hidden]. A later run may form other passes.
        """
        start = time.monotonic()
        if self._cost > _CHEAP_SECONDS and start - self._last < 10 * self._cost:
            return
        name = f"hidden-{len(layers)}.safetensors"
        states = {",".join(map(str, samples)): batch.contiguous() for samples, batch in hidden.items()}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            save_file(states, self._folder / name)
        except (OSError, SafetensorError) as error:
            _log.warning("a killed calibration would have to repeat finished layers: cannot save them (%s)", error)
            with suppress(OSError):
                (self._folder / name).unlink()
            self._cost = math.inf  # not tried again
            return
        state = _State(key=self._key, token_ids_sha256=self._tokens, layers=tuple(layers), ranges=ranges, hidden=name)
        state.save(self._folder / "state.json")
        for old in self._folder.glob("hidden-*.safetensors"):
            if old.name != name:
                old.unlink()
        self._last = time.monotonic()
        self._cost = self._last - start

    def remove(self) -> None:
        """The calibration record is written: nothing is left to resume."""
        shutil.rmtree(self._folder, ignore_errors=True)


class Handover:
    """Whether a layer gets nothing from the layers before it but hidden states, so that a restart can begin there."""

    def __init__(self, passes: Sequence[Pass]) -> None:
        """passes: parked at the first layer."""
        self._dictionaries = [_dictionaries(one) for one in passes]

    def is_hidden_states(self, passes: Sequence[Pass], batches: Batches, outputs: Sequence[Any]) -> bool:
        """Whether each pass is parked with the last layer's output as it was returned, and nothing else has changed.

        False where layers return more than hidden states, where the model's own code works on them between two layers,
        and where a layer has put keys and values for later ones into a dictionary that all layers are given.
        """
        return all(
            one.hidden is output and len(output) == len(batch) and _dictionaries(one) == before
            for one, batch, output, before in zip(passes, batches, outputs, self._dictionaries, strict=True)
        )


def _dictionaries(one: Pass) -> dict[str, dict[Any, int]]:
    """Contents of the dictionaries among a layer's arguments, by identity."""
    found = {name: value for name, value in one.kwargs.items() if isinstance(value, MutableMapping)}
    return {name: {key: id(value) for key, value in held.items()} for name, held in found.items()}


def restore(one: Pass, batch: Sequence[int], hidden: Mapping[int, Tensor], device: torch.device) -> None:
    """Replace the hidden states of a parked pass by those of an earlier run."""
    one.hidden = torch.stack([hidden[index] for index in batch]).to(device)
