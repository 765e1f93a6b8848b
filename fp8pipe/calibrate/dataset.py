"""Rows of a calibration dataset: a local .json, .jsonl, .parquet or .txt file, or one split of a Hub dataset.

In: a CalibrationSpec. Out: rows (mappings from column to value), and the revision that identifies the data. A Hub split
is the set of files that the dataset card assigns to it; if the card lists none, the files named after it
(data/train-*.parquet, main/test.jsonl). Parquet is read one row group at a time, so a large split costs little memory.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from fnmatch import fnmatch
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

from fp8pipe.config import LOCAL_DATA, CalibrationSpec, is_local_data
from fp8pipe.errors import CalibrationDataError, ModelNotFound, RevisionNotFound
from fp8pipe.hub.client import endpoint
from fp8pipe.hub.datasets import DatasetInfo, dataset_file, dataset_info


class Rows(Protocol):
    """Rows by number; a list of dicts will do."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> dict[str, Any]: ...


def pin(spec: CalibrationSpec) -> str:
    """Revision of the data: the commit sha of a Hub dataset, `sha256:...` of a local file.

    Raises CalibrationDataError when there is no such dataset, HubUnreachable.
    """
    if is_local_data(spec.dataset):
        with _local_path(spec).open("rb") as file:
            return "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
    if spec.revision is not None and re.fullmatch("[0-9a-f]{40}", spec.revision):
        return spec.revision
    return _info(spec, spec.revision).commit


def files_of(spec: CalibrationSpec, revision: str) -> list[Path]:
    """The dataset's files at `revision`, downloaded. Raises CalibrationDataError when it has none, HubUnreachable."""
    if is_local_data(spec.dataset):
        return [_local_path(spec)]
    return [dataset_file(spec.dataset, name, revision) for name in _files_of_split(spec, revision)]


def read_rows(files: Sequence[Path]) -> Rows:
    """All rows of the files, one file after the other. Raises CalibrationDataError when one cannot be read."""
    return _Joined([_read(path) for path in files])


# ---------------------------------------------------------------------------------------------- the Hub


def _info(spec: CalibrationSpec, revision: str | None) -> DatasetInfo:
    try:
        return dataset_info(spec.dataset, revision)
    except ModelNotFound as error:
        raise CalibrationDataError(
            f"calibration dataset {spec.dataset}: {endpoint()} shows no such dataset; correct calibration.dataset, or "
            f"name a local {', '.join(LOCAL_DATA)} file"
        ) from error
    except RevisionNotFound as error:
        raise CalibrationDataError(
            f"calibration dataset {spec.dataset} has no revision {revision}; correct calibration.revision"
        ) from error


def _files_of_split(spec: CalibrationSpec, revision: str) -> list[str]:
    info = _info(spec, revision)
    names = [name for name in info.files if name.endswith(LOCAL_DATA)]
    patterns = _patterns_of_card(info.configs, spec)
    if patterns:
        found = [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]
    else:
        found = [name for name in names if _is_named_after_split(name, spec)]
    if not found:
        raise CalibrationDataError(
            f"calibration dataset {spec.dataset}@{revision}: no {', '.join(LOCAL_DATA)} file belongs to split "
            f"{spec.split}{f' of {spec.subset}' if spec.subset else ''}, found "
            f"{', '.join(names[:8]) or 'no data files'}; correct calibration.split or calibration.subset"
        )
    return found


def _patterns_of_card(configs: Sequence[dict[str, Any]], spec: CalibrationSpec) -> list[str]:
    """File patterns that the dataset card gives the split; empty when the card lists no files."""
    chosen = [c for c in configs if c.get("config_name") == spec.subset] if spec.subset else configs[:1]
    patterns: list[str] = []
    for entry in chosen[0].get("data_files") or [] if chosen else []:
        if isinstance(entry, dict) and entry.get("split") == spec.split:
            path = entry["path"]
            patterns += [path] if isinstance(path, str) else path
    return patterns


def _is_named_after_split(name: str, spec: CalibrationSpec) -> bool:
    """data/train_sft-00000-of-00003.parquet belongs to train_sft; main/test.jsonl to test of subset main."""
    in_subset = spec.subset is None or spec.subset in Path(name).parent.parts
    return in_subset and re.search(rf"(^|[/_.-]){re.escape(spec.split)}([/.-]|$)", name) is not None


# ---------------------------------------------------------------------------------------------- files


def _local_path(spec: CalibrationSpec) -> Path:
    path = Path(spec.dataset).expanduser()
    if not path.is_file():
        raise CalibrationDataError(f"{path}: no such file; correct calibration.dataset")
    return path


def _read(path: Path) -> Rows:
    """Rows of one file: a JSON list, one object per line, a parquet table, or one text per line."""
    suffix = path.suffix
    if suffix == ".parquet":
        return _ParquetRows(path)
    try:
        text = path.read_text()
        # Not splitlines: a text may contain other line separators, such as U+2028.
        lines = text.removesuffix("\n").split("\n") if text else []
        if suffix == ".txt":
            return [{"text": line} for line in lines]
        rows = [json.loads(line) for line in lines if line.strip()] if suffix == ".jsonl" else json.loads(text)
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise CalibrationDataError(f"{path}: not valid {suffix.lstrip('.')}: {error}") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CalibrationDataError(f"{path}: expected a list of objects with a `messages` or `text` key")
    return rows


class _Joined:
    """Rows of several files, one file after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self._parts = parts
        self._ends = list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        part = bisect_right(self._ends, index)
        return self._parts[part][index - (self._ends[part - 1] if part else 0)]


class _ParquetRows:
    """Rows of a parquet file; one row group is in memory at a time."""

    def __init__(self, path: Path) -> None:
        from pyarrow import ArrowInvalid, parquet

        try:
            self._file = parquet.ParquetFile(path)
        except ArrowInvalid as error:
            raise CalibrationDataError(f"{path}: not a parquet file: {error}") from error
        groups = range(self._file.metadata.num_row_groups)
        self._ends = list(accumulate(self._file.metadata.row_group(group).num_rows for group in groups))
        self._wanted = [name for name in self._file.schema_arrow.names if name in ("messages", "text")]
        self._group: int | None = None
        self._table: Any = None  # pyarrow has no types

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        group = bisect_right(self._ends, index)
        if group != self._group:
            self._table = self._file.read_row_group(group, columns=self._wanted or None)
            self._group = group
        offset = index - (self._ends[group - 1] if group else 0)
        return self._table.slice(offset, 1).to_pylist()[0]
