"""The worker of an evaluation, but with an engine in which nothing is scored: `looker.py request.json`.

It notes in `started` that it ran, and in `scored` each look that it measures. Then it runs the code in LOOKER, which
knows the number of the `look`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from fp8pipe.evaluate import tasks, worker
from fp8pipe.evaluate.request import EvalRequest
from fp8pipe.records import EvalReport
from support.evaluation import empty_report

FOLDER = Path(sys.argv[1]).parent


class Measurement:
    """In the place of the worker's own."""

    def __init__(self, lm: None, request: EvalRequest, *_: Any) -> None:
        self.request = request

    def up_to(self, look: int) -> EvalReport:
        note("scored", str(look))
        exec(os.environ["LOOKER"], {"look": look, "folder": FOLDER})
        told = {name: getattr(self.request, name) for name in ("role", "fingerprint", "retries")}
        return empty_report().model_copy(update=told | {"table": f"look {look}"})


def note(name: str, text: str) -> None:
    with (FOLDER / name).open("a") as file:
        file.write(text)


if __name__ == "__main__":
    note("started", "x")
    parts: dict[str, Any] = {"need_for": lambda request: None, "prepare_process": lambda: None}
    parts |= {"_start_engine": lambda request, send: None, "Measurement": Measurement}
    for name, value in parts.items():
        setattr(worker, name, value)
    worker.device.require = lambda *_, **__: None
    tasks.load_tasks = lambda *_, **__: []
    worker.main()
