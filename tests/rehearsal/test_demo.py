"""The whole pipeline once, with real parts: the tests examine what `fp8pipe demo` leaves behind.

They share one run. They look at the Hub, run the demo again, sabotage it, release through a worker and by hand, and
measure the published folder with lm-eval's own command line.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT
from support.cards import commands
from support.demo import CACHE, RECIPE, RELEASED, SABOTAGED, Demo, hub_of, on_the_hub, run_demo
from support.processes import FP8PIPE

from benchmarks import damages
from fp8pipe.config import ReleaseSpec, load_policy
from fp8pipe.gate import decide
from fp8pipe.records import RECORD_FILES, EvalReport, GateDecision, Outcome
from fp8pipe.rehearsal.demo.model import BASE_ID
from fp8pipe.release.workspace import Workspace

pytestmark = [pytest.mark.vllm, pytest.mark.prefect]


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """A demo for this file alone, as its tests run it again and change it."""
    made = run_demo(tmp_path_factory.mktemp("demo") / "demo")
    assert made.code == 0, made.screen
    return made


LOOK = f"""
info = api.model_info({RELEASED!r}, files_metadata=True)
refs = api.list_repo_refs({RELEASED!r})
seen["private"], seen["sha"] = info.private, info.sha
seen["tags"] = {{tag.name: tag.target_commit for tag in refs.tags}}
seen["files"] = [f.rfilename for f in info.siblings]
seen["commits"] = [c.title for c in api.list_repo_commits({RELEASED!r})]
seen["items"] = [
    (item.item_id, item.note)
    for head in api.list_collections(owner={BASE_ID.partition("/")[0]!r})
    for item in api.get_collection(head.slug).items
]
"""


def test_demo_ends_with_a_table_and_without_noise(demo):
    for word in ("ACCEPTED", RELEASED, "commit", "tag", "collection", "interval", "margin"):
        assert word in demo.screen, demo.screen
    for noise in ("Traceback", "Warning", "INFO", "Error"):
        assert noise not in demo.screen, demo.screen
    assert demo.outcome.verdict == "accepted"


def test_baseline_accuracy_is_what_the_task_allows_and_the_engine_did_fp8(demo):
    task = demo.outcome.decision.tasks[0]
    assert 0.85 <= task.baseline <= 0.99
    assert task.n >= 2000
    report = EvalReport.load(demo.workspace.releases()[0].evaluation / "report.json")
    assert report.engine.kv_cache_dtype.startswith("fp8") == (RECIPE.kv_cache is not None)
    assert any("FP8" in kernel.upper() for kernel in report.engine.linear_kernels)


def test_release_on_the_hub_is_public_tagged_listed_and_carries_its_evidence(demo):
    with hub_of(demo) as environment:
        seen = on_the_hub(environment, LOOK)
    release = demo.outcome.release
    assert seen["private"] is False
    assert seen["tags"] == {release.tag: release.commit}
    assert seen["sha"] == release.commit
    for name in ("gate", "validation", "plan", "calibration", "checkpoint", "baseline", "candidate", "manifest"):
        assert f"fp8pipe/{RECORD_FILES[name]}" in seen["files"]
    assert "README.md" in seen["files"]
    ((_, note),) = [pair for pair in seen["items"] if pair[0] == RELEASED]
    assert note
    assert "accept" in note.lower() or "drop" in note.lower()


def test_second_run_reuses_everything_and_publishes_nothing(demo):
    with hub_of(demo) as environment:
        before = on_the_hub(environment, LOOK)
    logs = {path: path.stat().st_mtime_ns for path in demo.folder.rglob("worker.log")}
    again = run_demo(demo.folder)
    assert again.code == 0, again.screen
    with hub_of(demo) as environment:
        after = on_the_hub(environment, LOOK)
    assert after == before
    assert {path: path.stat().st_mtime_ns for path in demo.folder.rglob("worker.log")} == logs, "an engine was started"


def test_sabotaged_run_is_sound_rejected_and_leaves_nothing_on_the_hub(demo):
    spoiled = run_demo(demo.folder, "--sabotage")
    assert spoiled.code == 1, spoiled.screen
    assert "REJECTED" in spoiled.screen
    (release,) = Workspace(demo.folder / "sabotage").releases()
    outcome = Outcome.load(release.outcome)
    assert outcome.verdict == "rejected"
    assert outcome.decision.vetoed == ()
    assert outcome.decision.tasks[0].drop_lower > outcome.decision.tasks[0].margin
    validation = json.loads((release.checkpoint / "fp8pipe" / "validation.json").read_text())
    assert not [finding for finding in validation["findings"] if finding["severity"] == "error"]
    with hub_of(demo) as environment:
        seen = on_the_hub(environment, LOOK + f"seen['exists'] = api.repo_exists({SABOTAGED!r})")
        again = subprocess.run(
            [str(FP8PIPE), "publish", str(release.checkpoint), "--repo-id", SABOTAGED],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        still = on_the_hub(environment, f"seen['exists'] = api.repo_exists({SABOTAGED!r})")
    assert seen["exists"] is False
    assert SABOTAGED not in [item for item, _ in seen["items"]]
    assert again.returncode == 1, again.stderr
    assert still["exists"] is False


@pytest.mark.long
@pytest.mark.parametrize("damage", damages.DAMAGES, ids=lambda damage: damage.name)
def test_known_damage_is_judged_as_it_should_be(demo, tmp_path, damage):
    spoilt, measured = damages.spoilt(demo.checkpoint, damage, tmp_path / "checkpoint"), tmp_path / "candidate"
    (baseline,) = (demo.workspace.root / "baselines").iterdir()
    with hub_of(demo) as environment:
        run = functools.partial(subprocess.run, capture_output=True, text=True, env=environment, check=False)
        command = [FP8PIPE, "evaluate", spoilt, "--suite", "demo", *CACHE, "--output", measured]
        assert run([*map(str, command)]).returncode == 0
        verdict = run([str(FP8PIPE), "gate", str(baseline), str(measured), "--policy", "demo", "--json"])
    in_a_linear = damage.name in {"one weight scale x1.5", "one weight scale x4", "the codes of one Linear shuffled"}
    found = GateDecision.model_validate_json(verdict.stdout)
    assert ("modules" in found.vetoed) == in_a_linear, verdict.stdout + verdict.stderr
    sides = (damages.text_alone(EvalReport.load(side / "report.json")) for side in (baseline, measured))
    decision = decide(*sides, load_policy("demo"))
    known = next(case for case in damages.Cases.load(damages.COUNTS).cases if case.damage == damage.name)
    seen = {"verdict": decision.verdict, "vetoed": decision.vetoed, "task": decision.tasks[0]}
    assert damages.is_right(known.model_copy(update=seen)), verdict.stdout + verdict.stderr


def test_by_hand_the_commands_make_the_same_release(demo, tmp_path):
    folder, measured = tmp_path / "checkpoint", tmp_path / "candidate"
    (baseline,) = (demo.workspace.root / "baselines").iterdir()
    repo_id = f"{RELEASED}-by-hand"

    def by_hand(*arguments: object) -> str:
        answer = subprocess.run(
            [str(FP8PIPE), *map(str, arguments)], capture_output=True, text=True, env=environment, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    with hub_of(demo) as environment:
        assert "q" in by_hand("plan", BASE_ID, "--recipe", RECIPE.name)
        by_hand("quantize", BASE_ID, "--recipe", RECIPE.name, "--output", folder)
        by_hand("validate", folder, "--source", BASE_ID)
        by_hand("evaluate", folder, "--suite", "demo", *CACHE, "--output", measured)
        by_hand("gate", baseline, measured, "--policy", "demo", "--checkpoint", folder)
        by_hand("publish", folder, "--repo-id", repo_id, "--collection", f"{BASE_ID.partition('/')[0]}/FP8 demo")
        seen = on_the_hub(environment, LOOK + f"seen['hand'] = api.list_repo_files({repo_id!r})")
    for path in [*sorted(demo.checkpoint.glob("*.safetensors*")), demo.checkpoint / "config.json"]:
        assert (folder / path.name).read_bytes() == path.read_bytes(), path.name
    assert sorted(seen["hand"]) == sorted(seen["files"])
    assert repo_id in [item for item, _ in seen["items"]]


def test_deployed_flow_releases_through_a_worker(demo, tmp_path):
    repo_id = f"{RELEASED}-deployed"
    spec = ReleaseSpec(
        model=BASE_ID,
        recipe=RECIPE.name,
        suite="demo",
        policy="demo",
        repo_id=repo_id,
        work_dir=str(demo.workspace.root),
    )
    prefect = str(Path(sys.executable).with_name("prefect"))
    from fp8pipe.machine.prefect_server import EmbeddedServer

    server = EmbeddedServer(tmp_path / "server.log", tmp_path / "prefect")
    with hub_of(demo) as environment:
        environment |= {"PREFECT_API_URL": server.api_url, "PREFECT_HOME": str(tmp_path / "prefect")}

        def run(*arguments: str, cwd: Path) -> str:
            answer = subprocess.run(
                [prefect, "--no-prompt", *arguments],
                capture_output=True,
                text=True,
                env=environment,
                cwd=cwd,
                check=False,
            )
            assert answer.returncode == 0, answer.stdout + answer.stderr
            return answer.stdout

        try:
            server.ready()
            run("work-pool", "create", "fp8pipe", "--type", "process", cwd=ROOT)
            run("deploy", "--all", cwd=ROOT)
            with (tmp_path / "worker.log").open("w") as log:
                worker = subprocess.Popen(
                    [prefect, "worker", "start", "--pool", "fp8pipe"],
                    env=environment,
                    cwd=tmp_path,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            try:
                parameters = json.dumps({"spec": spec.model_dump(mode="json")})
                name = "release-model/release-model"
                shown = run("deployment", "run", name, "--params", parameters, "--watch", cwd=tmp_path)
            finally:
                # SIGKILL to the whole group: after SIGTERM, a worker waits for its server, whose SQLite may be busy
                os.killpg(worker.pid, signal.SIGKILL)
                worker.wait()
        finally:
            server.stop()
        seen = on_the_hub(environment, f"seen['files'] = api.list_repo_files({repo_id!r})")
    assert "fp8pipe/gate.json" in seen["files"], shown


@pytest.fixture(scope="session")
def published(demo, tmp_path_factory) -> Path:
    """The release, downloaded again from the Hub at its tag."""
    folder = tmp_path_factory.mktemp("published")
    release = demo.outcome.release
    with hub_of(demo) as environment:
        on_the_hub(
            environment, f"hf.snapshot_download({RELEASED!r}, revision={release.tag!r}, local_dir={str(folder)!r})"
        )
    return folder


def test_lm_eval_as_the_card_says_states_the_same_accuracy(demo, published, tmp_path):
    """The card's own command, on the downloaded folder, for a task that lm-eval does not ship."""
    from fp8pipe.config import load_suite

    (command,) = (line for line in commands((published / "README.md").read_text()) if line[0] == "python")
    named = {f"pretrained={RELEASED}": f"pretrained={published}", f"revision={demo.outcome.release.tag}": None}
    command = [sys.executable, *(word for one in command[1:] if (word := named.get(one, one)) is not None)]
    command += ["--include_path", load_suite("demo").task_dir, "--output_path", str(tmp_path)]
    with hub_of(demo) as environment:
        answer = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert answer.returncode == 0, answer.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    metric = demo.outcome.decision.tasks[0]
    stated = json.loads(results.read_text())["results"][metric.task]
    assert stated[f"{metric.metric},{metric.filter}"] == pytest.approx(metric.candidate, abs=1e-9)


def test_transformers_loads_the_published_folder_within_half_an_fp8_step(demo, published):
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM
    from transformers.utils.quantization_config import CompressedTensorsConfig

    model = AutoModelForCausalLM.from_pretrained(
        published, quantization_config=CompressedTensorsConfig(run_compressed=False), dtype=torch.float32
    )
    loaded = dict(model.named_parameters())
    stored = {k: v for path in sorted(published.glob("*.safetensors")) for k, v in load_file(path).items()}
    base = {
        k: v
        for path in sorted((demo.folder / "base" / "model").glob("*.safetensors"))
        for k, v in load_file(path).items()
    }
    scales = {name.removesuffix("_scale"): value for name, value in stored.items() if name.endswith(".weight_scale")}
    assert scales
    for name, scale in scales.items():
        units = base[name].float() / scale
        exponent = torch.floor(torch.log2(units.abs().clamp(min=2.0**-6))).clamp(max=8)
        half_step = torch.exp2(exponent - 3) / 2
        # float32 products of a code and a scale round once more: two units in the last place of what is compared
        slack = units.abs() * 2.0**-22
        assert bool(((loaded[name].float() / scale - units).abs() <= half_step + slack).all()), name


def test_status_shows_what_is_released(demo):
    answer = subprocess.run(
        [str(FP8PIPE), "status", "--work-dir", str(demo.workspace.root), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    (row,) = json.loads(answer.stdout)["releases"]
    assert row["state"] == "published"
    assert RELEASED in row["detail"]
