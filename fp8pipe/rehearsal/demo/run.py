"""The demo: a Hub on loopback, a model trained on the spot, and the same flow that releases a real model.

In its folder:

hub         the local Hub's state, which `fp8pipe hub serve --root FOLDER/hub` serves again
base        the base model and its two datasets, as they were pushed
work        the flow's work folder
sabotage    that of a sabotaged run
prefect     the home of the embedded Prefect server
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Protocol

from fp8pipe.config import ReleaseSpec, load_recipe
from fp8pipe.machine import device
from fp8pipe.progress import Progress, ProgressEvent
from fp8pipe.records import Outcome
from fp8pipe.rehearsal.demo import model, task
from fp8pipe.rehearsal.localhub import LocalHub, start
from fp8pipe.release.workspace import Workspace

COLLECTION = f"{task.NAMESPACE}/FP8 demo"
SABOTAGE = 1 / 16
"""The sabotaged run multiplies every calibrated range by this, as if it were calibrated on unsuitable data."""


class Session(Protocol):
    """Runs the flow, and displays the progress of the steps before it."""

    @property
    def display(self) -> Progress: ...

    def release(self, spec: ReleaseSpec) -> Outcome: ...


def recipe_for(machine: device.Machine) -> str:
    """Name of the recipe: with an FP8 KV cache, where nothing on this machine stands in the way of serving one."""
    return "demo-fp8-static" if machine.problems else "demo-fp8-static-kv"


def rehearse(
    workdir: Path, recipe: str, *, sabotage: bool, session: Callable[[Path, str, Path], AbstractContextManager[Session]]
) -> Outcome:
    """Train, push and release the base model by that recipe. A second run reuses what is finished, and publishes
    nothing new."""
    workdir = workdir.resolve()
    with ExitStack() as stack:
        hub = stack.enter_context(start(workdir / "hub", port=_usual_port(workdir)))
        _talk_to(hub, workdir)
        flows = stack.enter_context(session(workdir / "work", "demo", workdir / "prefect"))
        prepare_base(workdir / "base", flows.display)
        spec = _release_spec(workdir, recipe, sabotage)
        if sabotage:
            _spoil_calibration(spec, workdir, flows.display)
        return flows.release(spec)


def _talk_to(hub: LocalHub, workdir: Path) -> None:
    """Point every Hub client of this process and its children to the local Hub and a cache in `workdir`."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ.update(hub.environment() | {"HF_HOME": str(workdir / "hf")})


def _usual_port(workdir: Path) -> int:
    """The port of the last run if it is free, so that addresses in the Hub's pages stay valid; else any free one."""
    import socket

    path = workdir / "port"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", int(path.read_text()) if path.exists() else 0))
        except OSError:
            probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(port))
    return port


def prepare_base(folder: Path, progress: Progress) -> None:
    """Make the base model and its datasets, and push them to the Hub. What exists is not made again."""
    from fp8pipe.hub.client import client, translated

    progress(ProgressEvent("train", 0, None, note=model.BASE_ID))
    model.build_base(folder / "model", progress=progress)
    task.build_calibration_dataset(folder / "calibration")
    task.build_evaluation_dataset(folder / "evaluation")
    progress(ProgressEvent("push base", 0, None, note=model.BASE_ID))
    pushes = (
        (model.BASE_ID, "model", folder / "model"),
        (task.CALIBRATION_ID, "dataset", folder / "calibration"),
        (task.EVALUATION_ID, "dataset", folder / "evaluation"),
    )
    with translated("pushing the demo's base model"):
        for repo_id, kind, path in pushes:
            client().create_repo(repo_id, repo_type=kind, exist_ok=True)
            client().upload_folder(repo_id=repo_id, repo_type=kind, folder_path=path, commit_message="Base of the demo")


def _release_spec(workdir: Path, recipe: str, sabotage: bool) -> ReleaseSpec:
    return ReleaseSpec(
        model=model.BASE_ID,
        recipe=recipe,
        suite="demo",
        policy="demo",
        repo_id=f"{model.BASE_ID}{load_recipe(recipe).repo_suffix}" + ("-sabotaged" if sabotage else ""),
        collection=COLLECTION,
        work_dir=str(workdir / ("sabotage" if sabotage else "work")),
    )


def _spoil_calibration(spec: ReleaseSpec, workdir: Path, progress: Progress) -> None:
    """Put ranges that are 16 times too small where the flow looks for its own, and share the honest run's baseline."""
    from fp8pipe import stages
    from fp8pipe.calibrate import RECORD_NAME, calibration_key

    job, workspace = spec.resolve(), Workspace(Path(spec.work_dir))
    snapshot = stages.pin(spec.model)
    plan = stages.plan(snapshot, job.recipe)
    snapshot = stages.download(snapshot, progress=progress)
    honest = Workspace(workdir / "work")
    ranges = stages.calibrate(snapshot, plan, job.recipe, honest, device=spec.device, progress=progress)
    key = calibration_key(snapshot, job.recipe, device=spec.device)
    ranges.scaled(SABOTAGE).save(workspace.calibration(key) / RECORD_NAME)
    baselines = workspace.root / "baselines"
    if not baselines.exists():
        (honest.root / "baselines").mkdir(parents=True, exist_ok=True)
        baselines.symlink_to(honest.root / "baselines", target_is_directory=True)
