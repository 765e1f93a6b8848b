"""Publishing against plain PUTs of as many bytes to the same server.

    python -m benchmarks.upload [--shards 100] [--megabytes 10] [--rounds 3] [--folder DIR]

A local Hub, in a process of its own, receives three sets of shards of random bytes: one published by fp8pipe, the
others by plain PUTs to addresses that were asked for beforehand, one after the other and several at a time. All read
the shards from disk and have their hashes already. Timed is from the first byte to the commit. Printed are medians,
and ratios within a round.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.page import machine, prose, put, table
from benchmarks.quantize import PAGE
from benchmarks.support import of_the_tests
from fp8pipe.hub.upload import UPLOADS
from fp8pipe.progress import ProgressEvent
from fp8pipe.rehearsal import localhub

if TYPE_CHECKING:
    import httpx2

FLOORS = ("PUTs, one after the other", f"PUTs, {UPLOADS} at a time")
ASKED = "at most 1.2"


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=100)
    parser.add_argument("--megabytes", type=int, default=10, help="size of a shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the shards and the Hub go")
    parser.add_argument("--page", type=Path, nargs="?", const=PAGE, default=None, help="page to write the section into")
    options = parser.parse_args(arguments)
    size = options.megabytes * 1_000_000
    rounds = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
            rounds.append(_round(Path(scratch), options.shards, size))
        print(f"round {number + 1}:", {name: round(seconds, 2) for name, seconds in rounds[-1].items()}, flush=True)
    text = _report(rounds, options.shards, options.megabytes)
    if options.page:
        put(options.page, "Publishing", text)
    print(text)


def _round(scratch: Path, shards: int, size: int) -> dict[str, float]:
    """Seconds of each way to send `shards` files of `size` bytes."""
    ours, single, several = (_checkpoint(scratch / name, shards, size) for name in ("ours", "single", "several"))
    with localhub.start(scratch / "hub") as hub:
        os.environ.update(hub.environment())
        return {
            FLOORS[0]: _put(hub, single, at_a_time=1),
            FLOORS[1]: _put(hub, several, at_a_time=UPLOADS),
            "fp8pipe": _published(ours),
        }


def _checkpoint(folder: Path, shards: int, size: int) -> Path:
    """A folder that may be published, with shards of random bytes."""
    samples = of_the_tests("sample_folders")
    samples.write_model(folder, shards=shards)
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(samples.safetensors(weight=os.urandom(size)))
    return samples.add_evidence(folder)


def _published(folder: Path) -> float:
    """From the first byte of the shards to the commit."""
    at: dict[str, float] = {}

    def look(event: ProgressEvent) -> None:
        at[event.note] = time.perf_counter()

    of_the_tests("releases").release(folder, f"acme/{folder.parent.name}", progress=look)
    return at["commit"] - at["upload weights"]


def _put(hub: localhub.LocalHub, folder: Path, *, at_a_time: int) -> float:
    """Seconds to PUT every shard."""
    import httpx2

    files = sorted(folder.glob("*.safetensors"))
    with httpx2.Client(headers={"Authorization": f"Bearer {hub.token}"}, timeout=60, trust_env=False) as session:
        addresses = _addresses(session, hub.endpoint, files)

        def send(path: Path) -> None:
            with path.open("rb") as file:
                size = str(path.stat().st_size)
                session.put(addresses[path], content=file, headers={"Content-Length": size}).raise_for_status()

        began = time.perf_counter()
        with ThreadPoolExecutor(at_a_time) as pool:
            list(pool.map(send, files))
        return time.perf_counter() - began


def _addresses(session: httpx2.Client, endpoint: str, files: Sequence[Path]) -> dict[Path, str]:
    """Where the Hub wants each file."""
    session.post(f"{endpoint}/api/repos/create", json={"name": "plain", "organization": "acme", "type": "model"})
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
    objects = [{"oid": oid, "size": path.stat().st_size} for path, oid in hashes.items()]
    body = {"operation": "upload", "transfers": ["basic"], "objects": objects, "hash_algo": "sha256"}
    answer = session.post(f"{endpoint}/acme/plain.git/info/lfs/objects/batch", json=body).raise_for_status()
    where = {one["oid"]: one["actions"]["upload"]["href"] for one in answer.json()["objects"]}
    return {path: where[oid] for path, oid in hashes.items()}


def _report(rounds: Sequence[dict[str, float]], shards: int, megabytes: int) -> str:
    """The section of the page."""

    def shown(values: Sequence[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    seconds = [shown([one[name] for one in rounds]) for name in (*FLOORS, "fp8pipe")]
    ratios = [(f"fp8pipe / {name}", shown([one["fp8pipe"] / one[name] for one in rounds]), ASKED) for name in FLOORS]
    setting = (
        f"{shards} shards of {megabytes} MB to a local Hub; {machine()}; {len(rounds)} rounds; medians, smallest to "
        "largest in brackets; a ratio is taken within its round. Made by `python -m benchmarks.upload`."
    )
    return "\n\n".join(
        (
            prose(setting),
            table(("seconds", *FLOORS, "fp8pipe"), [("upload", *seconds)]).strip(),
            table(("ratio", "measured", "asked"), ratios),
        )
    )
