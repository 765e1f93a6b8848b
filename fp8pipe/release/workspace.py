"""The layout of a work folder. A restart finds finished work by its path.

WORK/releases/<model>--<recipe>--<fingerprint>/checkpoint/    the publishable folder with its records
                                              /evaluation/    the candidate's report, request and log
                                              /release.json   how the release ended
WORK/baselines/<key>/                                         one BF16 measurement, shared by all recipes
WORK/flip-rates/                                              the engine's own noise, shared by baselines of all suites
WORK/suites/<key>/                                            how many documents the tasks of a suite have
WORK/calibrations/<key>/                                      ranges, shared by recipes that need the same ones
WORK/logs/                                                    full logs of runs started here
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ReleaseFolder:
    """The folder of one model with one recipe."""

    path: Path

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoint"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation"

    @property
    def outcome(self) -> Path:
        return self.path / "release.json"


@dataclass(frozen=True, slots=True)
class Workspace:
    """A work folder, and the path of everything in it."""

    root: Path

    def release(self, model_id: str, recipe: str, fingerprint: str) -> ReleaseFolder:
        return ReleaseFolder(self.root / "releases" / f"{slug(model_id)}--{recipe}--{fingerprint[:16]}")

    def releases(self) -> tuple[ReleaseFolder, ...]:
        """Every release folder, finished or not."""
        return tuple(ReleaseFolder(path) for path in sorted((self.root / "releases").glob("*")) if path.is_dir())

    def baseline(self, key: str) -> Path:
        return self.root / "baselines" / key[:32]

    @property
    def flip_rates(self) -> Path:
        """What baselines share of their second runs."""
        return self.root / "flip-rates"

    def suite(self, key: str) -> Path:
        return self.root / "suites" / key[:32]

    def calibration(self, key: str) -> Path:
        return self.root / "calibrations" / key[:32]

    def log(self, name: str) -> Path:
        return self.root / "logs" / f"{name}.log"


def slug(text: str) -> str:
    """A Hub id as one path component: `org/Model 1` -> `org--Model-1`."""
    return re.sub(r"[^\w.-]+", "-", text.strip("/").replace("/", "--"))
