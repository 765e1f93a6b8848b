"""HTTP failures on purpose, so that tests can see what a client does about them.

A disruption selects requests by method and by a pattern in the path. It lets the first `after` of them pass, and then
strikes `times` of them. Comes in: disruptions, from Python or by POST /_disruptions on a Hub that was started with them
enabled. Goes out: broken answers.
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
class Disruption:
    """What goes wrong, and for which requests."""

    path: str
    """Regular expression, searched in the decoded path: "/commit/", "^/_lfs/", ..."""
    action: Action
    """status: do nothing and answer `status`. drop-before: do nothing and close the connection. drop-after: do what the
    request asks, then close the connection without an answer. slow: wait `delay_s` before each piece of the body.
    corrupt: do what the request asks, then flip one byte of the blob that the path names."""
    method: str = ""
    """GET, PUT, ...; empty for any."""
    after: int = 0
    """How many matching requests pass first: with 2, the third is struck."""
    times: int = 1
    """How many matching requests are struck."""
    status: int = 500
    """The HTTP status that the action `status` answers."""
    delay_s: float = 0.1
    """How long the action `slow` waits, in seconds."""
    retry_after: str = ""
    """The header Retry-After of the action `status`; none if empty."""
    says: str = "Disrupted on request"
    """The message of the action `status`."""


class Disruptions:
    """The disruptions of a running Hub, and how many requests each has matched. Safe to change while requests run."""

    def __init__(self, disruptions: Iterable[Disruption] = ()) -> None:
        self._lock = threading.Lock()
        self._disruptions = list(disruptions)
        self._met = [0] * len(self._disruptions)

    def set(self, disruptions: Iterable[Disruption]) -> None:
        """Replace all disruptions and count from zero."""
        with self._lock:
            self._disruptions = list(disruptions)
            self._met = [0] * len(self._disruptions)

    def due(self, method: str, path: str) -> Disruption | None:
        """The first disruption that strikes this request. Every disruption that matches the request counts it."""
        striking = None
        with self._lock:
            for i, disruption in enumerate(self._disruptions):
                if disruption.method not in ("", method) or not re.search(disruption.path, path):
                    continue
                self._met[i] += 1
                if striking is None and disruption.after < self._met[i] <= disruption.after + disruption.times:
                    striking = disruption
        return striking

    def report(self) -> list[dict[str, object]]:
        """Each disruption with `met`, the number of requests that it has matched."""
        with self._lock:
            return [{**asdict(one), "met": met} for one, met in zip(self._disruptions, self._met, strict=True)]


class DisruptedServer:
    """ASGI middleware that lets the disruptions strike. It has to be the outermost."""

    def __init__(self, app: ASGIApp, disruptions: Disruptions, blobs: Path) -> None:
        self._app = app
        self._disruptions = disruptions
        self._blobs = blobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        disruption = None
        if scope["type"] == "http" and scope["path"] != "/_disruptions":
            disruption = self._disruptions.due(scope["method"], scope["path"])
        match disruption:
            case None:
                await self._app(scope, receive, send)
            case Disruption(action="status"):
                await drain(receive)
                headers = {"Retry-After": disruption.retry_after} if disruption.retry_after else None
                answer = JSONResponse({"error": disruption.says}, disruption.status, headers)
                await answer(scope, receive, send)
            case Disruption(action="drop-before"):
                await drain(receive)
                await drop(send)
            case Disruption(action="drop-after"):
                await self._app(scope, receive, discard)
                await drop(send)
            case Disruption(action="slow"):
                await self._app(scope, slowed(receive, disruption.delay_s), send)
            case Disruption(action="corrupt"):
                await self._app(scope, receive, send)
                flip_a_byte(self._blobs, scope["path"])


async def drain(receive: Receive) -> None:
    """Read and forget the body: the disruption strikes only after the client has sent all of it."""
    while (message := await receive())["type"] == "http.request" and message.get("more_body"):
        pass


async def drop(send: Send) -> None:
    """Make the server close the connection, by announcing a body that never comes."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"1000000")]})


async def discard(message: Message) -> None:
    """Throw an answer away."""


def slowed(receive: Receive, delay_s: float) -> Receive:
    """The same body, with a pause of `delay_s` seconds before each piece."""

    async def later() -> Message:
        await asyncio.sleep(delay_s)
        return await receive()

    return later


def flip_a_byte(blobs: Path, path: str) -> None:
    """Damage the blob whose sha256 is in the path, as a failing disk would: same size, other content."""
    name = re.search(r"[0-9a-f]{64}", path)
    blob = blobs / name[0][:2] / name[0] if name else None
    if blob is None or not blob.is_file():
        return
    with blob.open("r+b") as file:
        file.seek(blob.stat().st_size // 2)
        byte = file.read(1)
        file.seek(-1, 1)
        file.write(bytes([byte[0] ^ 0xFF]))


async def set_disruptions(request: Request) -> Response:
    """POST /_disruptions with a JSON list of disruptions: replace those that were set."""
    known = {field.name for field in fields(Disruption)}
    try:
        wanted = [Disruption(**{key: one[key] for key in one}) for one in json.loads(await request.body())]
    except (ValueError, TypeError) as error:
        raise Refusal(
            400, f"Expected a JSON list of disruptions with the fields {', '.join(sorted(known))}; found: {error}"
        ) from error
    request.app.state.disruptions.set(wanted)
    return JSONResponse(request.app.state.disruptions.report())


async def list_disruptions(request: Request) -> Response:
    """GET /_disruptions: the disruptions, and how many requests each has matched."""
    return JSONResponse(request.app.state.disruptions.report())
