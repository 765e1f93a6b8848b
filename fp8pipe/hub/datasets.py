"""A dataset repository on the Hub: its commit, the names of its files, their subsets and splits, and the files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fp8pipe.hub.client import cache_folder, client, translated


@dataclass(frozen=True, slots=True)
class DatasetInfo:
    """A dataset at one commit."""

    commit: str
    files: tuple[str, ...]
    """Names of all files, sorted."""
    configs: tuple[dict[str, Any], ...]
    """`configs` of the dataset card, as YAML that nobody has checked: the subsets, and the files of their splits."""


def dataset_info(repo_id: str, revision: str | None) -> DatasetInfo:
    """The dataset at `revision` (None: the default branch).

    Raises ModelNotFound if the Hub shows no such dataset; RevisionNotFound, HubUnreachable.
    """
    with translated(f"dataset {repo_id}"):
        info = client().dataset_info(repo_id, revision=revision)
    assert info.sha is not None, f"the Hub gave no commit for dataset {repo_id}"
    files = tuple(sorted(file.rfilename for file in info.siblings or ()))
    return DatasetInfo(info.sha, files, tuple((info.card_data or {}).get("configs") or ()))


def dataset_file(repo_id: str, name: str, revision: str) -> Path:
    """The path of one file in the cache, downloaded if it is not there. Raises HubUnreachable, InputError."""
    with translated(f"{name} of dataset {repo_id}@{revision}"):
        return Path(
            client().hf_hub_download(repo_id, name, repo_type="dataset", revision=revision, cache_dir=cache_folder())
        )
