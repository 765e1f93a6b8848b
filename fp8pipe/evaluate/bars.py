"""A progress bar for vLLM that reports."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from tqdm import tqdm


def reporting_bar(report: Callable[[float, float | None], None]) -> type[tqdm[Any]]:
    """A progress bar for `LLM.generate` that also reports each step: requests done, and of how many."""

    class Bar(tqdm):
        _quiet: ClassVar[dict[str, Any]] = {"mininterval": 10.0}

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **(options | self._quiet))

        def update(self, n: float | None = 1) -> bool | None:
            shown = super().update(n)
            if self.desc.startswith("Processed"):
                report(self.n, self.total)
            return shown

    return Bar
