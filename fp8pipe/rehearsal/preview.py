"""A card as the Hub would show it: on a Hub on loopback that holds nothing but the card and its pictures."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import copytree

from fp8pipe.records import RECORD_DIR
from fp8pipe.rehearsal.localhub import start


@contextmanager
def preview(folder: Path, card: str, repo_id: str) -> Iterator[str]:
    """Serve `card` and the plots of checkpoint folder `folder` as `repo_id`; yields the page's address."""
    from fp8pipe.hub.client import client, translated

    with tempfile.TemporaryDirectory(prefix="fp8pipe-card-") as root:
        shown, plots = Path(root) / "shown", folder / RECORD_DIR / "plots"
        shown.mkdir()
        (shown / "README.md").write_text(card)
        if plots.is_dir():
            copytree(plots, shown / RECORD_DIR / "plots")
        with start(Path(root) / "hub") as hub:
            os.environ.update(hub.environment())
            with translated(f"the preview of {repo_id}"):
                client().create_repo(repo_id, exist_ok=True)
                client().upload_folder(repo_id=repo_id, folder_path=shown)
            yield f"{hub.endpoint}/{repo_id}"
