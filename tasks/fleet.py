"""The pull step of a worker: run the code that this worker has installed, wherever it was deployed from."""

from __future__ import annotations

from pathlib import Path


def package_root() -> dict[str, str]:
    """Pull step of prefect.yaml: Prefect changes into `directory`, in which it looks for the deployment's entrypoint.

    Without an explicit step Prefect stores the deploying machine's working directory, even when `pull` is empty.
    """
    return {"directory": str(Path(__file__).resolve().parent.parent)}
