"""The client of the Hub: how long it waits, and what it does offline."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.sample_folders import write_model

from fp8pipe.errors import HubUnreachable
from fp8pipe.hub import client as hub_client
from fp8pipe.hub.client import client, translated, waits_told_to
from fp8pipe.hub.download import download
from fp8pipe.hub.source import resolve
from fp8pipe.rehearsal.localhub import Disruption, LocalHub

# ---------------------------------------------------------------------------------------------- waiting


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the client waited for, without the time."""
    seconds: list[float] = []
    monkeypatch.setattr(hub_client.time, "sleep", seconds.append)
    return seconds


QUOTA = "You have exceeded the rate limit for repository commits (128 per hour). You can retry this action in {}."


@pytest.mark.parametrize(
    ("says", "header", "wait"),
    [
        ("Too many requests", "7", 8.0),
        (QUOTA.format("43 minutes"), "30", 43 * 60 + 1.0),
        (QUOTA.format("about 1 hour"), "5", 6.0),
        (QUOTA.format("1 hour"), "", 3601.0),
    ],
)
def test_a_hub_that_says_how_long_to_wait_is_waited_for(
    hub: LocalHub, break_hub: Callable[..., None], waited: list[float], says: str, header: str, wait: float
) -> None:
    break_hub(Disruption(path="/whoami", action="status", status=429, says=says, retry_after=header, times=2))
    told: list[float] = []
    with waits_told_to(told.append):
        assert client().whoami()["name"] == "local"
    assert waited == told == [wait, wait]


def test_a_hub_that_asks_for_half_a_day_is_not_waited_for(
    hub: LocalHub, break_hub: Callable[..., None], waited: list[float]
) -> None:
    break_hub(Disruption(path="/whoami", action="status", status=429, retry_after="43200"))
    with pytest.raises(HubUnreachable, match="HTTP 429"), translated("the token"):
        client().whoami()
    assert waited == []


# ---------------------------------------------------------------------------------------------- offline

OFFLINE = """
import os
os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
from fp8pipe.hub.download import download
from fp8pipe.hub.headers import read_headers
from fp8pipe.hub.source import resolve
for name in {names!r}:
    pinned = resolve(name)
    read_headers(pinned)
    print(download(pinned).model_dump_json())
"""


def offline(*names: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    code = OFFLINE.format(names=names)
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_offline_a_model_comes_from_the_cache_with_the_hubs_own_hashes(
    hub: LocalHub, repo_id: str, tmp_path: Path
) -> None:
    client().create_repo(repo_id)
    client().upload_folder(repo_id=repo_id, folder_path=write_model(tmp_path / "model"))
    online = download(resolve(repo_id))
    done = offline(repo_id, f"{repo_id}@{online.commit}")
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        found = type(online).model_validate_json(line)
        assert (found.model_id, found.commit, found.root) == (repo_id, online.commit, online.root)
        assert set(found.files) == set(online.files)
    missing = offline(f"{repo_id}-other")
    assert "HF_HUB_OFFLINE is set, and the cache does not have it" in missing.stderr
