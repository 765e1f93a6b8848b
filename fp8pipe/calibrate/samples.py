"""Which rows of the dataset are run, as token ids under the model's own tokenizer.

Rows are visited in a seeded permutation (numpy's, which `datasets.Dataset.shuffle` uses too); blank rows are skipped.
Each chosen row is truncated to max_seq_len and never padded. Unfit data is an error here, before any weight is read.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.calibrate.dataset import Rows
from fp8pipe.calibrate.tokenization import encoder_for
from fp8pipe.config import CalibrationSpec
from fp8pipe.errors import CalibrationDataError


@dataclass(frozen=True, slots=True)
class Samples:
    """What is run through the model."""

    indices: tuple[int, ...]
    """Row numbers in the dataset, in the order in which they were chosen."""
    token_ids: tuple[tuple[int, ...], ...]

    @property
    def tokens(self) -> int:
        """Number of tokens over all samples."""
        return sum(map(len, self.token_ids))

    def sha256(self) -> str:
        """Hash of the token ids, sample by sample."""
        return hashlib.sha256(json.dumps(self.token_ids, separators=(",", ":")).encode()).hexdigest()


def context_of(folder: Path, *, trust_remote_code: bool = False) -> int | None:
    """The longest sequence that the model takes, in tokens; None when its config does not say."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def choose_samples(spec: CalibrationSpec, rows: Rows, tokenizer: Any, context: int | None) -> Samples:
    """Token ids of `spec.num_samples` rows.

    context: the longest sequence that the model takes, None when unknown. Raises CalibrationDataError when the data is
    empty, too short for num_samples, longer than the context, or has no usable column.
    """
    encode = encoder_for(spec, rows, tokenizer)
    indices, token_ids = [], []
    for index in _permutation(len(rows), spec.seed):
        ids = encode(rows[index])[: spec.max_seq_len]
        if ids:
            indices.append(index)
            token_ids.append(tuple(ids))
        if len(indices) == spec.num_samples:
            break
    samples = Samples(tuple(indices), tuple(token_ids))
    _check(spec, samples, len(rows), context)
    return samples


def _permutation(rows: int, seed: int) -> list[int]:
    import numpy

    return numpy.random.default_rng(seed).permutation(rows).tolist()


def _check(spec: CalibrationSpec, samples: Samples, rows: int, context: int | None) -> None:
    if len(samples.indices) < spec.num_samples:
        raise CalibrationDataError(
            f"{spec.dataset}: expected {spec.num_samples} samples, found {len(samples.indices)} that are not blank "
            f"among {rows} rows; lower num_samples or give more data"
        )
    longest = max(map(len, samples.token_ids))
    if context is not None and longest > context:
        index = samples.indices[[len(ids) for ids in samples.token_ids].index(longest)]
        raise CalibrationDataError(
            f"{spec.dataset}: row {index} has {longest} tokens, the model's context is {context}; "
            f"set max_seq_len to {context} or less"
        )
