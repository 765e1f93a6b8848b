"""Things that go wrong, on purpose: for tests of what a client does then.

A fault names the requests that it means (method and a pattern that is searched in the path), lets the first `after` of
them pass, and then strikes `times` times. Comes in: faults, from Python or by POST /_faults on a Hub that was started
with faults enabled. Goes out: broken answers.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from fp8pipe.rehearsal.localhub.refusals import Refusal

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

Action = Literal["status", "drop-before", "drop-after", "slow", "corrupt"]


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    path: str
    """Regular expression, searched in the decoded path: "/commit/", "^/_lfs/", ..."""
    action: Action
    """status: answer `status`, nothing is done. drop-before: close the connection, nothing is done. drop-after: do what
    was asked, then close the connection without an answer. slow: wait `delay_s` before each piece of the body.
    corrupt: do what was asked, then flip one byte of the blob that the path names."""
    method: str = ""
    """GET, PUT, ...; empty for any."""
    after: int = 0
    """How many matching requests pass first: 2 strikes the third."""
    times: int = 1
    """How many matching requests are struck."""
    status: int = 500
    """What the action status answers."""
    delay_s: float = 0.1
    """What the action slow waits."""


class Faults:
    """The faults of a running Hub and how often each has met its requests. Safe to change while requests run."""

    def __init__(self, faults: Iterable[Fault] = ()) -> None:
        self._lock = threading.Lock()
        self._faults = list(faults)
        self._met = [0] * len(self._faults)

    def set(self, faults: Iterable[Fault]) -> None:
        """Replace all faults; the counts start anew."""
        with self._lock:
            self._faults = list(faults)
            self._met = [0] * len(self._faults)

    def due(self, method: str, path: str) -> Fault | None:
        """The first fault that strikes this request. Every fault that means the request counts it."""
        struck = None
        with self._lock:
            for i, fault in enumerate(self._faults):
                if fault.method not in ("", method) or not re.search(fault.path, path):
                    continue
                self._met[i] += 1
                if struck is None and fault.after < self._met[i] <= fault.after + fault.times:
                    struck = fault
        return struck

    def report(self) -> list[dict[str, object]]:
        """Each fault with `met`, the number of requests that it has matched."""
        with self._lock:
            return [{**asdict(fault), "met": met} for fault, met in zip(self._faults, self._met, strict=True)]


class FaultyServer:
    """ASGI middleware that lets the faults strike. It has to be the outermost."""

    def __init__(self, app: ASGIApp, faults: Faults, blobs: Path) -> None:
        self._app = app
        self._faults = faults
        self._blobs = blobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = None
        if scope["type"] == "http" and scope["path"] != "/_faults":
            fault = self._faults.due(scope["method"], scope["path"])
        match fault:
            case None:
                await self._app(scope, receive, send)
            case Fault(action="status"):
                await drain(receive)
                answer = JSONResponse({"error": "A fault that was asked for"}, fault.status)
                await answer(scope, receive, send)
            case Fault(action="drop-before"):
                await drain(receive)
                await drop(send)
            case Fault(action="drop-after"):
                await self._app(scope, receive, discard)
                await drop(send)
            case Fault(action="slow"):
                await self._app(scope, slowed(receive, fault.delay_s), send)
            case Fault(action="corrupt"):
                await self._app(scope, receive, send)
                flip_a_byte(self._blobs, scope["path"])


async def drain(receive: Receive) -> None:
    """Read the body away, so that the client has sent all of it before the fault strikes."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass


async def drop(send: Send) -> None:
    """Close the connection: a server does so when an announced body does not come."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000")]})


async def discard(message: Message) -> None:
    """The answer that nobody gets."""


def slowed(receive: Receive, delay_s: float) -> Receive:
    """A body that comes slowly."""

    async def later() -> Message:
        await asyncio.sleep(delay_s)
        return await receive()

    return later


def flip_a_byte(blobs: Path, path: str) -> None:
    """Damage the blob whose sha256 is in the path, as a failing disk would: same size, another content."""
    name = re.search(r"[0-9a-f]{64}", path)
    blob = blobs / name[0][:2] / name[0] if name else None
    if blob is None or not blob.is_file():
        return
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


async def set_faults(request: Request) -> Response:
    """POST /_faults with a JSON list of faults: replace those that were set."""
    known = {field.name for field in fields(Fault)}
    try:
        wanted = [Fault(**{key: one[key] for key in one}) for one in json.loads(await request.body())]
    except (ValueError, TypeError) as error:
        raise Refusal(400, f"A fault has {', '.join(sorted(known))}: {error}") from error
    request.app.state.faults.set(wanted)
    return JSONResponse(request.app.state.faults.report())


async def list_faults(request: Request) -> Response:
    """GET /_faults: the faults and how often each was met."""
    return JSONResponse(request.app.state.faults.report())
