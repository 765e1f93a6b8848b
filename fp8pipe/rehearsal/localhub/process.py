"""The Hub as a process: served in the foreground, or started as a child that dies with its parent.

Comes in: a root folder, a port (0 for any free one), tokens. Goes out: a running server and its address, or
`ServerFailed` with the tail of the log if the server does not start. Tokens reach the child through a pipe, never
through the command line or the environment.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import os
import secrets
import selectors
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

from fp8pipe.errors import ServerFailed
from fp8pipe.machine.loopback import ADDRESS, proxy_exemption

if TYPE_CHECKING:
    from fp8pipe.rehearsal.localhub.access import TokenOwner, Tokens
    from fp8pipe.rehearsal.localhub.disruptions import Disruptions

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 5.0
PR_SET_PDEATHSIG = 1
LOG_TAIL_LINES = 20


def local_token(root: Path) -> str:
    """The token of this Hub's only user, made on first use and kept in ROOT/token, which its owner alone can read."""
    path = root / "token"
    if not path.exists():
        root.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(f"hf_{secrets.token_hex(17)}\n")
    return path.read_text().strip()


def local_tokens(root: Path) -> dict[str, TokenOwner]:
    """The tokens of a Hub for one person: `local_token`, which may write in every namespace."""
    from fp8pipe.hub.account import ANY_NAMESPACE
    from fp8pipe.rehearsal.localhub.access import TokenOwner

    return {local_token(root): TokenOwner("local", (ANY_NAMESPACE,))}


def serve(
    root: Path,
    port: int,
    *,
    tokens: Tokens | None = None,
    disruptions: Disruptions | None = None,
    on_ready: Callable[[str], None] | None = None,
) -> None:
    """Serve `root` until SIGINT or SIGTERM, and call `on_ready` with the address once the server answers requests.

    Without `tokens`, the token of `local_token` may do everything. Raises ServerFailed if the port is taken or if
    another process serves the same folder.
    """
    import uvicorn

    from fp8pipe.rehearsal.localhub.app import create_app

    class Server(uvicorn.Server):
        """A server that calls `on_ready`."""

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if on_ready is not None and not self.should_exit:
                on_ready(endpoint)

    listener = listen(port)
    endpoint = f"http://{ADDRESS}:{listener.getsockname()[1]}"
    with listener, only_server_of(root):
        app = create_app(root, local_tokens(root) if tokens is None else tokens, disruptions)
        config = uvicorn.Config(
            app,
            log_config=log_to_stderr(),
            lifespan="off",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=30,
            server_header=False,
        )
        Server(config).run(sockets=[listener])


def log_to_stderr() -> dict[str, Any]:
    """uvicorn's log, with requests and times, on stderr: the stdout of a child carries only its address."""
    line = {"format": "%(asctime)s %(message)s"}
    stream = {"class": "logging.StreamHandler", "formatter": "line", "stream": "ext://sys.stderr"}
    loggers = {"uvicorn": {"handlers": ["stderr"], "level": "INFO", "propagate": False}}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": line},
        "handlers": {"stderr": stream},
        "loggers": loggers,
    }


def listen(port: int) -> socket.socket:
    """A listening socket. Raises ServerFailed if the port is taken."""
    try:
        return socket.create_server((ADDRESS, port), backlog=128)
    except OSError as error:
        raise ServerFailed(
            f"The local Hub cannot listen on {ADDRESS}:{port}: {error.strerror}. "
            "Choose another port, or 0 for a free one."
        ) from error


def only_server_of(root: Path) -> IO[str]:
    """Lock the folder while the returned file is open, as two servers would overwrite each other's refs.

    Raises ServerFailed if another process holds the lock.
    """
    root.mkdir(parents=True, exist_ok=True)
    file = (root / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise ServerFailed(
            f"Another process serves the local Hub in {root}. Stop it, or choose another folder."
        ) from error
    return file


@dataclass(frozen=True)
class LocalHub:
    """A Hub that runs as a child process. A context manager: leaving it stops the Hub."""

    endpoint: str
    """http://127.0.0.1:PORT"""
    token: str
    """The first of the Hub's tokens."""
    root: Path
    log: Path
    """The server's log, one line per request."""
    process: subprocess.Popen[str]

    def environment(self) -> dict[str, str]:
        """The variables that point a process to this Hub, if they are set before it imports huggingface_hub.

        Xet is off because this Hub speaks only LFS, and a client with Xet does not fall back to LFS.
        """
        wanted = {"HF_ENDPOINT": self.endpoint, "HF_TOKEN": self.token, "HF_HUB_DISABLE_XET": "1"}
        return wanted | proxy_exemption()

    def stop(self) -> None:
        """End the server. Its state stays on disk. Calling this twice is fine."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()

    def __enter__(self) -> LocalHub:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(
    root: Path, *, port: int = 0, tokens: Tokens | None = None, disruptions: bool = False, log: Path | None = None
) -> LocalHub:
    """Start the Hub in `root` on loopback as a child process, and wait until it answers.

    `tokens` are as for `serve`, `disruptions` opens /_disruptions, and `log` is ROOT/server.log by default. The child
    ends when this process ends, even if it is killed. Raises ServerFailed with the tail of the log if the Hub does not
    start.
    """
    root = root.resolve()
    root.mkdir(parents=True, exist_ok=True)
    log = root / "server.log" if log is None else log
    known = local_tokens(root) if tokens is None else dict(tokens)
    order = {
        "root": str(root),
        "port": port,
        "parent": os.getpid(),
        "disruptions": disruptions,
        "tokens": {token: asdict(owner) for token, owner in known.items()},
    }
    with log.open("a") as log_file:
        process = subprocess.Popen(
            [sys.executable, "-m", "fp8pipe.rehearsal.localhub", "--child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log_file,
            text=True,
            start_new_session=True,  # a Ctrl-C at the terminal is the parent's to handle
        )
    assert process.stdin is not None
    with process.stdin:
        process.stdin.write(json.dumps(order))
    endpoint = first_line(process)
    hub = LocalHub(endpoint, next(iter(known), ""), root, log, process)
    if not endpoint.startswith("http://"):
        hub.stop()
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:])
        raise ServerFailed(
            f"The local Hub in {root} did not start (it has {START_TIMEOUT_S:.0f} s). Its log {log} ends with:\n{tail}"
        )
    return hub


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line that the child prints; empty if it ends or takes longer than START_TIMEOUT_S."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline().strip() if selector.select(START_TIMEOUT_S) else ""


def serve_as_child() -> None:
    """The child's side of `start`: read the order from stdin, and print the address as the only line on stdout."""
    from fp8pipe.rehearsal.localhub.access import TokenOwner
    from fp8pipe.rehearsal.localhub.disruptions import Disruptions

    order = json.loads(sys.stdin.read())
    die_with_parent(order["parent"])
    tokens = {
        token: TokenOwner(owner["name"], tuple(owner["orgs"]), owner["role"], owner["scopes"])
        for token, owner in order["tokens"].items()
    }
    disruptions = Disruptions() if order["disruptions"] else None
    serve(
        Path(order["root"]),
        order["port"],
        tokens=tokens,
        disruptions=disruptions,
        on_ready=lambda at: print(at, flush=True),
    )


def die_with_parent(parent: int) -> None:
    """End this process when process `parent` ends.

    Linux sends the signal when the *thread* that started the child ends, so the handler checks that the whole process
    has ended.
    """

    def look(*_: object) -> None:
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)

    signal.signal(signal.SIGUSR1, look)
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGUSR1)
    look()  # the parent may have ended before the line above
