"""Finished layers on disk, so that a run that was killed goes on where it was.

In: the hidden states behind a finished layer, and the ranges so far. Out: the same after a restart, if key and samples
are the same. Only a model whose layers hand nothing but hidden states to one another can be resumed this way; the
caller sees to that. The bytes are not synced: a killed process keeps them, a power failure costs a restart. A disk
that has no room for them costs no more than the bookmark.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fp8pipe.records import Record
from fp8pipe.records.calibration import Ranges

_log = logging.getLogger(__name__)

_CHEAP_SECONDS = 1.0
"""A bookmark that takes less than this is set after every layer, a dearer one when it costs a tenth of the time."""


class _State(Record):
    key: str
    token_ids_sha256: str
    layers: tuple[str, ...]
    """Finished layers, in order."""
    ranges: Ranges
    hidden: str
    """File with the hidden states behind the last of them."""


class Bookmark:
    """The state behind the last finished layer, in one folder."""

    def __init__(self, folder: Path, key: str, token_ids_sha256: str) -> None:
        self._folder, self._key, self._tokens = folder, key, token_ids_sha256
        self._cost = 0.0
        self._last = time.monotonic()

    def find(self) -> tuple[tuple[str, ...], Ranges, dict[int, Tensor]] | None:
        """Finished layers, their ranges and the hidden states [tokens, hidden] of every sample behind the last; None:
        start at the top."""
        state = _State.load_if_present(self._folder / "state.json")
        if state is None or (state.key, state.token_ids_sha256) != (self._key, self._tokens):
            return None
        try:
            hidden = load_file(self._folder / state.hidden)
        except (OSError, SafetensorError) as error:
            _log.warning("calibration begins anew: %s cannot be read (%s)", self._folder / state.hidden, error)
            return None
        rows = {int(i): row for name, batch in hidden.items() for i, row in zip(name.split(","), batch, strict=True)}
        return state.layers, state.ranges, rows

    def set(self, layers: Sequence[str], ranges: Ranges, hidden: Mapping[tuple[int, ...], Tensor]) -> None:
        """Note that `layers` are finished, unless writing it down would cost more than it saves.

        hidden: samples of a pass -> their hidden states [samples, tokens, hidden]; a later run may form other passes.
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
            _log.warning("a killed calibration would go on from an earlier layer: %s", error)
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
        """The record is written; nothing is left to resume."""
        shutil.rmtree(self._folder, ignore_errors=True)
