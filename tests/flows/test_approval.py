"""A person's decision on an inconclusive release: by hand, and asked for by a suspended flow on a real server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support import ROOT
from support.gated_folders import ASKING, gated
from support.reports import policy
from typer.testing import CliRunner

from fp8pipe import stages
from fp8pipe.cli import app
from fp8pipe.config import Target
from fp8pipe.errors import InputError, Refused
from fp8pipe.gate.publishable import objections, read_approval
from fp8pipe.hub.client import client
from fp8pipe.rehearsal.localhub import LocalHub


def test_an_approval_says_who_when_why_and_of_which_decision(tmp_path: Path) -> None:
    decision = gated(tmp_path, lost=70, won=35)
    assert decision.verdict == "inconclusive"
    assert not stages.may_publish(tmp_path)
    made = stages.approve(tmp_path, who="R. Lee", reason="known noise of this task")
    assert (made.who, made.reason, made.decision) == ("R. Lee", "known noise of this task", decision.digest())
    assert made.when.endswith("+00:00")
    assert stages.may_publish(tmp_path)


def test_an_approval_of_another_decision_is_none(tmp_path: Path) -> None:
    gated(tmp_path, lost=70, won=35)
    stages.approve(tmp_path, who="R. Lee", reason="noise")
    gated(tmp_path, lost=71, won=35)
    assert any("approval is of another decision" in line for line in objections(tmp_path))
    assert not stages.may_publish(tmp_path)


@pytest.mark.parametrize(
    ("counts", "rules", "words"),
    [
        ({"lost": 20, "won": 20}, ASKING, "the gate accepted it"),
        ({"lost": 200, "won": 20}, ASKING, "the gate rejected it"),
        ({"lost": 70, "won": 35}, policy(), "stops at an inconclusive result"),
    ],
)
def test_only_an_inconclusive_result_of_an_asking_policy_can_be_approved(tmp_path, counts, rules, words) -> None:
    gated(tmp_path, rules, **counts)
    with pytest.raises(Refused, match=words):
        stages.approve(tmp_path, who="R. Lee", reason="noise")


def test_an_approval_without_name_or_reason_is_none(tmp_path: Path) -> None:
    gated(tmp_path, lost=70, won=35)
    with pytest.raises(InputError, match="needs a name"):
        stages.approve(tmp_path, who=" ", reason="noise")
    with pytest.raises(InputError, match="needs a reason"):
        stages.approve(tmp_path, who="R. Lee", reason="")


def test_approved_by_hand_it_is_published_and_card_and_note_say_so(tmp_path: Path, hub: LocalHub, repo_id: str) -> None:
    gated(tmp_path / "checkpoint", lost=70, won=35)
    folder = str(tmp_path / "checkpoint")
    refused = CliRunner().invoke(app, ["publish", folder, "--repo-id", repo_id])
    assert refused.exit_code == 1
    answer = CliRunner().invoke(app, ["approve", folder, "--by", "R. Lee", "--reason", "noise of this task"])
    assert answer.exit_code == 0, answer.output
    release = stages.publish(tmp_path / "checkpoint", Target(repo_id=repo_id, collection="acme/decided"))
    assert release.verdict == "inconclusive"
    card = Path(client().hf_hub_download(repo_id, "README.md")).read_text()
    assert "Inconclusive, released by decision" in card
    assert "R. Lee released it on" in card
    assert release.collection_note is not None
    assert release.collection_note.startswith("Inconclusive, released by decision")


# ---------------------------------------------------------------------------------------------- the flow

PREFECT = str(Path(sys.executable).with_name("prefect"))


@pytest.fixture(scope="module")
def deployed(running_hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a Prefect server with the deployment `approve-release` and a worker that serves it."""
    from fp8pipe.machine.prefect_server import EmbeddedServer

    folder = tmp_path_factory.mktemp("prefect")
    server = EmbeddedServer(folder / "server.log", folder / "home")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "PREFECT_"))}
    environment |= running_hub.environment() | {"HF_HUB_CACHE": str(folder / "cache")}
    environment |= {"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(folder / "home")}
    environment |= {"PREFECT_WORKER_QUERY_SECONDS": "1"}

    def run(*arguments: str) -> None:
        subprocess.run([PREFECT, "--no-prompt", *arguments], check=True, env=environment, cwd=ROOT, capture_output=True)

    with contextlib.ExitStack() as stack:
        stack.callback(server.stop)
        server.ready()
        run("work-pool", "create", "fp8pipe", "--type", "process")
        run("deploy", "--name", "approve-release")
        log = stack.enter_context((folder / "worker.log").open("w"))
        worker = subprocess.Popen(
            [PREFECT, "worker", "start", "--pool", "fp8pipe"],
            env=environment,
            cwd=folder,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        stack.callback(worker.wait)
        stack.callback(os.killpg, worker.pid, signal.SIGKILL)
        yield server.api_url


async def answered(api_url: str, parameters: dict[str, Any], answer: dict[str, Any], waiting: Any) -> Any:
    """Start the flow, wait until it is suspended, look around, answer, and wait for its end: the final state."""
    from prefect.client.orchestration import PrefectClient
    from prefect.client.schemas.responses import SetStateStatus

    async with PrefectClient(api_url) as api:
        deployment = await api.read_deployment_by_name("approve-release/approve-release")
        run = await api.create_flow_run_from_deployment(deployment.id, parameters=parameters)

        async def until(reached: Any) -> Any:
            deadline = time.monotonic() + 240
            while not reached(state := (await api.read_flow_run(run.id)).state):
                assert time.monotonic() < deadline, state
                assert state is None or not state.is_final(), state
                await asyncio.sleep(0.3)
            return state

        await until(lambda state: state is not None and state.is_paused())
        waiting()
        response = await api.resume_flow_run(run.id, run_input=answer)
        assert response.status == SetStateStatus.ACCEPT, response
        return await until(lambda state: state is not None and state.is_final())


@pytest.mark.prefect
@pytest.mark.parametrize("publish", [True, False], ids=["published", "declined"])
def test_a_suspended_flow_waits_for_a_person_and_does_as_answered(
    tmp_path: Path, hub: LocalHub, repo_id: str, deployed: str, publish: bool
) -> None:
    folder = tmp_path / "checkpoint"
    decision = gated(folder, lost=70, won=35)
    parameters = {"folder": str(folder), "target": {"repo_id": repo_id}}
    answer = {"publish": publish, "who": "R. Lee", "reason": "noise of this task"}

    def nothing_yet() -> None:
        assert not client().repo_exists(repo_id)
        assert read_approval(folder) is None

    ended = asyncio.run(answered(deployed, parameters, answer, nothing_yet))
    assert ended.name == ("Released" if publish else "Declined")
    assert "R. Lee: noise of this task" in ended.message
    assert client().repo_exists(repo_id) is publish
    approval = read_approval(folder)
    assert (approval is not None and approval.who == "R. Lee") is publish
    if publish:
        names = client().list_repo_files(repo_id)
        assert "fp8pipe/approval.json" in names
        published = json.loads(Path(client().hf_hub_download(repo_id, "fp8pipe/approval.json")).read_text())
        assert published["decision"] == decision.digest()
