"""The Prefect server for runs that are started here and now: the configured one, else our own child process.

Prefect can start such a server itself, but then its first-start noise (`database is locked`) lands on the terminal and
its start-up limit is fixed. Nothing here imports prefect: the server is a command and an address.
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

_START_LIMIT_S = 180.0

_SERVER_ENVIRONMENT = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_SERVICES_CANCELLATION_CLEANUP_ENABLED": "false",
    "PREFECT_CLI_PROMPT": "false",
}


def configured_api(environment: dict[str, str] | None = None) -> str | None:
    """The API address that the user has configured, by environment or active Prefect profile; None for none."""
    env = dict(os.environ) if environment is None else environment
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
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Run argv[1:] so that it ends when the thread that started it does: a killed run leaves no server behind."""


class EmbeddedServer:
    """A Prefect server on loopback, SQLite under PREFECT_HOME, living as long as this process."""

    def __init__(self, log_path: Path, home: Path | None = None) -> None:
        """Start it at once, from the main thread, so that its start-up overlaps other work; `ready()` waits for it."""
        self.log_path = log_path
        self.port = _free_port()
        self.api_url = f"http://127.0.0.1:{self.port}/api"
        environment = os.environ | _SERVER_ENVIRONMENT | {"PREFECT_API_URL": self.api_url}
        if home is not None:
            home.mkdir(parents=True, exist_ok=True)
            environment["PREFECT_HOME"] = str(home.resolve())
        log_path.parent.mkdir(parents=True, exist_ok=True)
        server = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        command = [sys.executable, "-c", _DIE_WITH_PARENT, sys.executable, *server]
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
            )

    def ready(self) -> None:
        """Return when the API answers; ServerFailed with the log's tail when it does not."""
        deadline = time.monotonic() + _START_LIMIT_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise ServerFailed(f"the embedded Prefect server ended at once; {self._tail()}")
            try:
                with urllib.request.urlopen(f"{self.api_url}/health", timeout=2):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.stop()
        raise ServerFailed(f"the embedded Prefect server did not answer within {_START_LIMIT_S:.0f} s; {self._tail()}")

    def stop(self) -> None:
        """End it; its state stays in its home."""
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
    """Inside, PREFECT_API_URL names a server: the configured one (yields None) or our own. Import prefect after this.

    The server starts in the background: call `ready()` on what is yielded before the first flow.
    """
    if configured_api() is not None:
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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
