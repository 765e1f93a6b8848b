"""Proves checkpoints in vLLM against their sources, and says how far each kind of layer is off and what is vetoed.

    python -m benchmarks.modules FOLDER [--proofs FILE]

FOLDER has the folders NAME/source and NAME/RECIPE of each model. Proofs are kept in FILE (default:
FOLDER/proofs.jsonl), so that a run in parts makes one table; a model that ends vLLM's process is left out.
Exit status 1 if a checkpoint is vetoed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fp8pipe.gate.modules import Compared, compare_modules
from fp8pipe.records import ModuleProof


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--proofs", type=Path)
    options = parser.parse_args()
    kept = options.proofs or options.folder / "proofs.jsonl"
    folders = sorted(str(config.parent) for config in options.folder.glob("*/*/config.json"))
    while missing := [folder for folder in folders if folder not in read(kept)]:
        _prove(missing, kept)
    vetoed = False
    kinds: dict[str, list[Compared]] = {}
    for name, compared, lacking in pairs(read(kept)):
        wrong = [
            one for one in compared if not (one.error <= one.bound and (one.stored_error or 0) <= one.stored_bound)
        ]
        vetoed |= bool(wrong or lacking)
        if wrong or lacking:
            print(f"VETO {name}: {', '.join([*lacking, *(one.place for one in wrong)][:3])}")
        for one in () if wrong or lacking else compared:
            kinds.setdefault(_kind(one), []).append(one)
    for kind, found in sorted(kinds.items()):
        errors = sorted(one.error for one in found)
        stored = max((one.stored_error or 0 for one in found), default=0.0)
        middle, largest = errors[len(errors) // 2], errors[-1]
        print(f"{kind}: {len(found)} layers, median {middle:.4f}, largest {largest:.4f}, from the loaded {stored:.4f}")
    sys.exit(vetoed)


def _prove(folders: Sequence[str], kept: Path) -> None:
    """In one child; the folder at which it ends without an answer gets one."""
    with kept.open("a") as file:
        ended = subprocess.run([sys.executable, "-m", "benchmarks.modules.load", *folders], stdout=file)
    left = [folder for folder in folders if folder not in read(kept)]
    if left:
        line = {"folder": left[0], "proof": None, "seconds": 0.0, "error": f"vLLM ended: {ended.returncode}"}
        with kept.open("a") as file:
            file.write(json.dumps(line) + "\n")


def read(kept: Path) -> dict[str, dict[str, Any]]:
    """The answers by folder."""
    lines = kept.read_text().splitlines() if kept.exists() else []
    return {answer["folder"]: answer for answer in map(json.loads, lines)}


def pairs(answers: dict[str, dict[str, Any]]) -> Iterator[tuple[str, tuple[Compared, ...], list[str]]]:
    """For each checkpoint that vLLM loads, as it does the source: its folder, its layers on both sides, and the names
    of those that are on one side only or cannot be relied on."""
    for folder, answer in answers.items():
        source = answers.get(str(Path(folder).with_name("source")))
        if source is None or source is answer or not source["proof"] or not answer["proof"]:
            continue
        ours, theirs = (ModuleProof.model_validate(side["proof"]) for side in (source, answer))
        one_sided = {one.name for one in ours.modules} ^ {one.name for one in theirs.modules}
        faults = {one.name for side in (ours, theirs) for one in side.modules if one.fault}
        yield folder, compare_modules(ours, theirs), sorted(one_sided | faults)


def _kind(one: Compared) -> str:
    if not one.candidate.scheme:
        return "not quantized"
    return f"{one.candidate.kind}{', static' if one.candidate.static else ''}"


if __name__ == "__main__":
    main()
