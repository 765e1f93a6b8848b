"""The Prefect server for runs on this machine: the configured one, else a child process of our own.

Prefect can start such a server itself, but then the errors of its first start (`database is locked`) reach the
terminal, and its time limit for starting is fixed. Nothing here imports prefect: the server is a command and an
address.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fp8pipe.errors import ServerFailed
from fp8pipe.machine.supervise import without_token

_START_LIMIT_S = 180.0
_ANSWER_S = 15.0

_SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
}


def configured_api() -> str | None:
    """The API address from the environment or the active Prefect profile; None if neither names one."""
    env = os.environ
    if env.get("PREFECT_API_URL"):
        return env["PREFECT_API_URL"]
    home = Path(env.get("PREFECT_HOME", "~/.prefect")).expanduser()
    profiles = Path(env.get("PREFECT_PROFILES_PATH", str(home / "profiles.toml"))).expanduser()
    if not profiles.is_file():
        return None
    content = tomllib.loads(profiles.read_text())
    active = env.get("PREFECT_PROFILE", content.get("active"))
    settings = content.get("profiles", {}).get(active, {})
    return settings.get("PREFECT_API_URL")


_DIE_WITH_PARENT = """\
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG; kept over exec
if os.getppid() == int(sys.argv[1]):  # else the parent died before the signal was asked for
    os.execv(sys.argv[2], sys.argv[2:])
"""
"""Run argv[2:] so that it ends with the thread of argv[1], its parent: a killed run leaves no server behind."""


class EmbeddedServer:
    """A Prefect server on loopback, with SQLite under PREFECT_HOME, that lives as long as this process."""

    def __init__(self, log_path: Path, home: Path | None = None) -> None:
        """Start the server without waiting for it, so that other work overlaps; `ready()` waits. Main thread only."""
        self.log_path = log_path
        self.port = _free_port()
        self.api_url = f"http://127.0.0.1:{self.port}/api"
        environment = without_token(os.environ) | _SERVER_ENVIRONMENT | {"PREFECT_API_URL": self.api_url}
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
            environment["PREFECT_HOME"] = str(home.resolve())
        log_path.parent.mkdir(parents=True, exist_ok=True)
        server = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-c", _DIE_WITH_PARENT, str(os.getpid()), sys.executable, *server]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ready(self) -> None:
        """Wait until the API answers. Raises ServerFailed, with the end of the log, if it never does."""
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the embedded Prefect server ended while it started; {self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.api_url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.stop()
        raise ServerFailed(f"the embedded Prefect server did not answer within {_START_LIMIT_S:.0f} s; {self._tail()}")

    def stop(self) -> None:
        """End the server. Its state stays in PREFECT_HOME."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def _tail(self) -> str:
        lines = self.log_path.read_text(errors="replace").splitlines()[-15:]
        return f"log {self.log_path} ends with:\n" + "\n".join(lines)


@contextmanager
def prefect_api(log_path: Path, home: Path | None = None) -> Iterator[EmbeddedServer | None]:
    """Set PREFECT_API_URL inside the context, to the configured server (yields None) or to one started here.

    A server of our own starts in the background: call its `ready()` before the first flow. Import prefect only inside.
    Raises ServerFailed if the configured one does not answer.
    """
    configured = configured_api()
    if configured is not None:
        if (silence := why_silent(configured)) is not None:
            raise ServerFailed(
                f"the Prefect server at {configured} (PREFECT_API_URL or the active profile) does not answer: "
                f"{silence}; start it, correct the address, or configure none: then fp8pipe starts one for the run"
            )
        yield None
        return
    server = EmbeddedServer(log_path, home)
    before = {name: os.environ.get(name) for name in ("PREFECT_API_URL", "PREFECT_HOME")}
    os.environ["PREFECT_API_URL"] = server.api_url
    if home is not None:
        os.environ["PREFECT_HOME"] = str(home.resolve())
    try:
        yield server
    finally:
        server.stop()
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def why_silent(api: str) -> str | None:
    """Why the server at `api` does not answer; None if it does, even with a refusal: Prefect's client reports those."""
    try:
        with urllib.request.urlopen(f"{api.rstrip('/')}/health", timeout=_ANSWER_S):
            return None
    except urllib.error.HTTPError:
        return None
    except (OSError, ValueError) as error:
        return str(error.reason if isinstance(error, urllib.error.URLError) else error)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
