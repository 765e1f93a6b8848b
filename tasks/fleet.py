"""What a worker does before a run: find the code where this worker has it installed, not where it was deployed from."""

from __future__ import annotations

from pathlib import Path


def package_root() -> dict[str, str]:
    """Pull step of prefect.yaml. Prefect changes into `directory`, where the deployment's entrypoint must exist.

    Without an explicit step Prefect stores the deploying machine's working directory, also when `pull` is empty.
    """
    return {"directory": str(Path(__file__).resolve().parent.parent)}
