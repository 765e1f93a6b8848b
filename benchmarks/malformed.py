"""Every malformed checkpoint, on every architecture: what vLLM does with it, and what validate says.

    python -m benchmarks.malformed [--check]

Fills the tables of docs/validate.md between their marks; `--check` fails when the page is not what it would be. The
cases are tests/support/malformed.py, the checks are the validator's own table.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.page import table
from benchmarks.support import of_the_tests
from fp8pipe.hub.source import resolve
from fp8pipe.records import Finding
from fp8pipe.validate import all_checks, validate

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "validate.md"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail when the page is stale")
    check = parser.parse_args(arguments).check
    page = PAGE.read_text()
    made = page
    for name, text in (("checks", checks()), ("cases", cases())):
        made = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda m, text=text: m[1] + text + m[2], made, flags=re.DOTALL
        )
    if check and made != page:
        sys.exit(f"{PAGE.name} is stale; run python -m benchmarks.malformed")
    PAGE.write_text(made)


def checks() -> str:
    """The validator's own table."""
    rows = [[c.id, c.depth, c.severity, c.demand, c.consequence] for c in all_checks()]
    return table(["check", "depth", "severity", "what must hold", "what vLLM does otherwise"], rows)


def cases() -> str:
    """One row per case, and how many of the seventy were found as they should be, with nothing else."""
    malformed = of_the_tests("malformed")
    with tempfile.TemporaryDirectory() as name:
        models = _models(Path(name))
        rows, right = [], dict[int, bool]()
        for case in malformed.CASES:
            found = {model: _findings(case, model, models[model], Path(name)) for model in case.models}
            is_right = all(_is_as_expected(case, findings) for findings in found.values())
            number = int(re.sub(r"\D", "", case.number))
            right[number] = right.get(number, True) and is_right
            first = next(iter(found.values()))
            said = _told(first, case.findings) if is_right else "**not as expected**"
            answer = malformed.VLLM[number] if case.number.isdecimal() else ""
            rows.append([case.number, case.name.replace("_", " "), ", ".join(case.models), answer, said])
    missing = sorted(malformed.VLLM.keys() - right.keys())
    summary = f"{sum(right.values())} of {len(malformed.VLLM)} cases are found on every architecture they exist for"
    assert not missing, f"no case for {missing}"
    return f"{summary}.\n\n" + table(["case", "what is wrong", "architectures", "vLLM 0.32", "validate says"], rows)


def _models(root: Path) -> dict[str, Path]:
    reference = of_the_tests("reference_checkpoints")
    return {
        "dense": reference.llama(root / "dense"),
        "tied": reference.llama(root / "tied", tied=True),
        "moe": reference.moe(root / "moe"),
    }


def _findings(case: Any, model: str, source: Path, root: Path) -> tuple[Finding, ...]:
    malformed = of_the_tests("malformed")
    place = root / f"{model}-{case.number}"
    folder = malformed.quantize(source, place / "checkpoint", case.base)
    (place / "source").write_text(str(source))
    case.spoil(folder)
    return validate(folder, source=resolve((place / "source").read_text())).findings


def _is_as_expected(case: Any, findings: tuple[Finding, ...]) -> bool:
    own = {"C9"} if case.base in ("fp8", "modelopt", "modelopt-nvfp4") else set()
    return {finding.check for finding in findings} - own == case.findings


def _told(findings: tuple[Finding, ...], expected: frozenset[str]) -> str:
    """Ids, and the first finding of the first of them."""
    first = next(finding for finding in findings if finding.check in expected)
    where = (first.tensor or first.file or "").removeprefix("model.")
    sentence = f"{where}: expected {first.expected}, found {first.found}".lstrip(": ")
    shown = sentence if len(sentence) <= 160 else sentence[:157] + "..."
    return f"{' '.join(sorted(expected))}: {shown}".replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    main()
