"""What a commit on the Hub holds: names and checksums of all its files, and the content of small ones."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fp8pipe.hub.client import cache_folder
from fp8pipe.records import RECORD_DIR

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

MANIFEST = f"{RECORD_DIR}/manifest.json"
YANKED = f"{RECORD_DIR}/yanked.json"
GITATTRIBUTES = ".gitattributes"
"""The Hub's own file, which every repository starts with."""
OF_THE_REPOSITORY = frozenset({GITATTRIBUTES, YANKED})
"""Files that belong to no release. The next one leaves them where they are."""


def files_at(api: HfApi, repo_id: str, revision: str) -> Mapping[str, RepoFile]:
    """Every file of a commit, with the Hub's checksums."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo_id, revision=revision, recursive=True)
    return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}


def read_at(api: HfApi, repo_id: str, commit: str, name: str) -> bytes | None:
    """The content of one small file; None if the commit does not have it."""
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        return Path(api.hf_hub_download(repo_id, name, revision=commit, cache_dir=cache_folder())).read_bytes()
    except RemoteEntryNotFoundError:
        return None


def json_at(api: HfApi, repo_id: str, commit: str, name: str) -> dict[str, object]:
    """A JSON object of the repository; empty if there is none, or the file is something else."""
    try:
        content = json.loads(read_at(api, repo_id, commit, name) or b"")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}
