"""A local Hub with several users, for the tests of the Hub itself."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import httpx
import pytest
from support.local_hub import TOKENS, http_client

from fp8pipe.rehearsal.localhub import Disruption, LocalHub, start


@pytest.fixture(scope="module")
def local_hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    """One server for all tests of a file, with the users of TOKENS. Each test uses repository names of its own."""
    with start(tmp_path_factory.mktemp("hub"), tokens=TOKENS, disruptions=True) as running:
        yield running


@pytest.fixture
def http(local_hub: LocalHub) -> Iterator[httpx.Client]:
    """Bare HTTP as ann."""
    with http_client(local_hub) as client:
        yield client


@pytest.fixture
def anonymous(local_hub: LocalHub) -> Iterator[httpx.Client]:
    """Bare HTTP as nobody."""
    with http_client(local_hub, token=None) as client:
        yield client


@pytest.fixture
def broken(http: httpx.Client) -> Iterator[Any]:
    """`broken(Disruption(...), ...)` disrupts the Hub until the test ends."""

    def set_disruptions(*disruptions: Disruption) -> None:
        http.post("/_disruptions", json=[asdict(one) for one in disruptions]).raise_for_status()

    yield set_disruptions
    set_disruptions()
