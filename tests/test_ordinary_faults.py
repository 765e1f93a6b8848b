"""Paths, names and places that are wrong: one line, exit 2 or 4, and never a defect of fp8pipe."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fp8pipe.cli import app
from fp8pipe.errors import DiskTooSmall, EnvironmentFault, Fp8PipeError, InputError, from_system

COMMANDS = (
    ("plan", "{}"),
    ("plan", "o/m", "--recipe", "{}"),
    ("quantize", "{model}", "--output", "{}/out"),
    ("validate", "{}"),
    ("validate", "{model}", "--source", "{}"),
    ("convert", "{}", "--to", "fp8"),
    ("sensitivity", "{}"),
    ("evaluate", "{}", "--suite", "quick", "--output", "{}"),
    ("plan-eval", "--suite", "{}", "--policy", "quick"),
    ("gate", "{}", "{}", "--policy", "{}"),
    ("approve", "{}", "--by", "ann", "--reason", "fine"),
    ("publish", "{}", "--repo-id", "o/m"),
    ("release", "{}", "--repo-id", "o/m", "--recipe", "{}"),
    ("batch", "{}"),
    ("status", "--work-dir", "{}"),
    ("status", "{}", "--hub"),
    ("reconcile", "{}"),
)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name -> a path that no command can use."""
    root = tmp_path_factory.mktemp("places")
    (root / "file").write_text("not what you think")
    (root / "list.json").write_text("[]")
    (root / "loop").symlink_to(root / "loop")
    (root / "dangling").symlink_to(root / "nowhere")
    (root / "folder").mkdir()
    named = {name: str(root / name) for name in ("file", "list.json", "loop", "dangling", "folder", "missing")}
    more = {"under a file": root / "file" / "under", "too long": root / ("x" * 300), "odd": root / "odd-\udcff"}
    return named | {name: str(path) for name, path in more.items()} | {"a device": "/dev/null", "empty": ""}


PLACES = (
    *("file", "list.json", "loop", "dangling", "folder", "missing"),
    *("under a file", "too long", "odd", "a device", "empty"),
)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join(command[:2]))
def test_what_is_no_model_folder_or_file_is_one_line(
    command: tuple[str, ...], name: str, places: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # the empty path is the current folder
    arguments = [part.replace("{model}", places["file"]).replace("{}", places[name]) for part in command]
    answer = CliRunner().invoke(app, arguments)
    assert "defect" not in answer.output, answer.output
    assert "Traceback" not in answer.output
    expected = (2, 4)
    if command[0] in ("validate", "publish") and name in ("folder", "empty"):
        expected = (1, 2)  # a folder without a model has findings, and no evidence
    elif command[:2] == ("status", "--work-dir") and name in (
        "folder",
        "missing",
        "dangling",
        "odd",
        "too long",
        "empty",
    ):
        expected = (0, 2)  # nothing was released there yet
    assert answer.exit_code in expected, (answer.output, answer.exception)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOENT, "No such file or directory", "a"), InputError),
        (OSError(errno.EACCES, "Permission denied", "a"), EnvironmentFault),
        (OSError(errno.EROFS, "Read-only file system", "a"), EnvironmentFault),
        (OSError(errno.ENOSPC, "No space left on device"), DiskTooSmall),
        (OSError(errno.EIO, "Input/output error"), EnvironmentFault),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), EnvironmentFault),
        (OSError(errno.EBADF, "Bad file descriptor"), None),
        (OSError("no number"), None),
        (FileNotFoundError(), None),
        (KeyError("a"), None),
    ],
)
def test_only_errors_about_places_and_servers_are_ordinary(error: Exception, kind: type[Fp8PipeError] | None) -> None:
    found = from_system(error)
    assert (type(found) if found is not None else None) is kind
