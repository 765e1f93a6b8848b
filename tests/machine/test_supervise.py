"""A supervised command: how its end is reported, and that no process of it survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from support.processes import all_gone, running

from fp8pipe.machine.supervise import CHANNEL, Ending, supervise

FAMILY = """
import os, pathlib, signal, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-IS", "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(f"{os.getpid()} {child.pid}")

def ready():
    os.write(int(os.environ["SUPERVISE_CHANNEL"]), b"{}\\n")
"""
"""A command that starts a process of its own and writes both pids to the file it is given."""


def family(folder: Path, then: str) -> tuple[list[str], Path]:
    """FAMILY continued by `then`, as a command, and the file that gets its pids."""
    script = folder / "family.py"
    script.write_text(FAMILY + textwrap.dedent(then))
    return [sys.executable, "-IS", str(script), str(folder / "pids")], folder / "pids"


def pids_in(path: Path) -> list[int]:
    deadline = time.monotonic() + 60
    while not (path.exists() and len(path.read_text().split()) == 2):
        assert time.monotonic() < deadline, f"{path} was never written"
        time.sleep(0.02)
    return [int(pid) for pid in path.read_text().split()]


def interrupt_when_ready(command: list[str], log: Path) -> None:
    """Supervise the command, interrupted as by Ctrl-C as soon as it sends a message."""

    def interrupt(message: dict[str, Any]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        supervise(command, log=log, on_message=interrupt)


# ---------------------------------------------------------------------------------------------- reports


def test_supervise_reports_exit_status_log_and_messages(tmp_path: Path) -> None:
    script = tmp_path / "talker.py"
    script.write_text(
        "from fp8pipe.machine.supervise import take_channel\n"
        "send = take_channel()\nsend({'n': 1})\nprint('hello', flush=True)\n"
        "send({'n': 2, 'pad': 'x' * 200_000})\nexit(3)"
    )
    messages: list[dict[str, Any]] = []
    ending = supervise([sys.executable, str(script)], log=tmp_path / "log", on_message=messages.append)
    assert (ending.reason, ending.returncode, ending.succeeded) == ("exited", 3, False)
    assert [message["n"] for message in messages] == [1, 2]
    assert ending.tail() == "hello"


def test_the_end_of_a_log_has_a_progress_bar_in_its_last_state_only(tmp_path: Path) -> None:
    bar = "print(*(f'\\r{part}% ' for part in range(100)), sep='', end='\\r\\n')"
    ending = supervise([sys.executable, "-c", f"print('before')\n{bar}\nprint('after\\n')"], log=tmp_path / "log")
    assert ending.tail() == "before\n99%\nafter"


ASKING = """
from fp8pipe.machine.supervise import take_channel
channel = take_channel()
channel({"n": 1})
print(channel.ask({"n": 2}), channel.ask({"n": 3, "pad": "x" * 500_000})["pad"] == "y" * 500_000, flush=True)
channel.ask({"n": 4})
"""


def test_supervise_answers_a_message_that_asks(tmp_path: Path) -> None:
    def answer(message: dict[str, Any]) -> dict[str, Any] | None:
        return {2: {"good": True}, 3: {"pad": "y" * 500_000}}.get(message["n"])

    ending = supervise([sys.executable, "-c", ASKING], log=tmp_path / "log", on_message=answer, stall_s=3.0)
    assert ending.tail() == "{'good': True} True"
    assert ending.reason == "stalled", "its last question was left without an answer"


def test_without_a_supervisor_nobody_answers(tmp_path: Path) -> None:
    code = "from fp8pipe.machine.supervise import take_channel; print(take_channel().ask({}))"
    environment = {name: value for name, value in os.environ.items() if name != CHANNEL}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert run.stdout == "None\n"


def test_supervise_reports_the_signal_that_killed_the_command(tmp_path: Path) -> None:
    ending = supervise([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], log=tmp_path / "log")
    assert (ending.reason, ending.returncode) == ("exited", 137)


def test_supervise_gives_the_command_its_environment_and_no_input(tmp_path: Path) -> None:
    code = "import os, sys; print(os.environ['WORD'], repr(sys.stdin.read()))"
    ending = supervise([sys.executable, "-c", code], log=tmp_path / "log", env={"WORD": "given"})
    assert ending.tail() == "given ''"


@pytest.mark.parametrize("token", [True, False])
def test_a_command_has_the_hubs_token_and_login_only_if_it_asks_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, token: bool
) -> None:
    (tmp_path / "token").write_text("hf_stored")
    monkeypatch.setenv("HF_TOKEN_PATH", str(tmp_path / "token"))
    code = "import os; from huggingface_hub import get_token; print(get_token(), os.environ.get('HF_TOKEN'))"
    for given, said in (("hf_given", "hf_given hf_given"), ("", "hf_stored ")):
        monkeypatch.setenv("HF_TOKEN", given)
        ending = supervise([sys.executable, "-c", code], log=tmp_path / "log", token=token)
        assert ending.tail(1) == (said.strip() if token else "None None")


def test_tail_is_the_end_of_the_log_without_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("a\n\nb\rc\n" + "d" * 1000 + "\n")
    tail = Ending("exited", 0, 1.0, tmp_path / "log").tail(lines=2)
    assert tail == "c\n" + "d" * 400


# ---------------------------------------------------------------------------------------------- limits


@pytest.mark.parametrize(("limit", "reason"), [("timeout_s", "timeout"), ("stall_s", "stalled")])
def test_supervise_ends_the_whole_group_at_its_limit(tmp_path: Path, limit: str, reason: str) -> None:
    command, pids = family(tmp_path, "time.sleep(600)")
    ending = supervise(command, log=tmp_path / "log", **{limit: 1.5})  # pyright: ignore[reportArgumentType]
    assert ending.reason == reason
    assert all_gone(pids_in(pids))


def test_supervise_does_not_count_the_time_that_others_had_the_processor(tmp_path: Path) -> None:
    """A child of a busy machine was ended at its limit, and the model it read was blamed for it."""
    processor = min(os.sched_getaffinity(0))
    pinned = f"import os, time\nos.sched_setaffinity(0, [{processor}])\n"
    spin = [sys.executable, "-IS", "-c", pinned + "while True: pass"]
    others = [subprocess.Popen(spin, start_new_session=True) for _ in range(6)]
    try:
        code = pinned + "while time.process_time() < 0.7: pass"
        ending = supervise([sys.executable, "-IS", "-c", code], log=tmp_path / "log", timeout_s=1.5)
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert ending.succeeded
    assert ending.seconds > 1.5


def test_supervise_does_not_call_a_command_that_logs_stalled(tmp_path: Path) -> None:
    code = "import time\nfor i in range(12): print(i, flush=True); time.sleep(0.25)"
    ending = supervise([sys.executable, "-c", code], log=tmp_path / "log", stall_s=2.0)
    assert ending.succeeded


def test_supervise_ends_a_command_that_only_logs_as_stalled(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "[(print(i, flush=True), time.sleep(0.1)) for i in range(6000)]")
    ending = supervise(command, log=tmp_path / "log", stall_s=0.6)
    assert ending.reason == "stalled"
    assert all_gone(pids_in(pids))


STOP_ALL = """
os.kill(child.pid, signal.SIGSTOP)
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_supervise_ends_a_stopped_group_as_stalled(tmp_path: Path) -> None:
    command, pids = family(tmp_path, STOP_ALL)
    # long enough for three interpreters to start beside other work: until then there is no group to stop
    ending = supervise(command, log=tmp_path / "log", stall_s=10)
    assert ending.reason == "stalled"
    assert all_gone(pids_in(pids))


# ---------------------------------------------------------------------------------------------- nothing survives


def test_supervise_ends_the_group_when_the_caller_is_interrupted(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "ready(); time.sleep(600)")
    interrupt_when_ready(command, tmp_path / "log")
    assert all_gone(pids_in(pids))


def test_supervise_kills_a_command_that_ignores_term(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fp8pipe.machine.supervise.GRACE_S", 0.5)
    command, pids = family(tmp_path, "signal.signal(signal.SIGTERM, signal.SIG_IGN); ready(); time.sleep(600)")
    interrupt_when_ready(command, tmp_path / "log")
    assert all_gone(pids_in(pids))


def test_supervise_lets_a_command_clean_up_on_term(tmp_path: Path) -> None:
    code = """
        signal.signal(signal.SIGTERM, lambda *a: (print('cleaned up', flush=True), os._exit(0)))
        ready()
        time.sleep(600)
    """
    command, _ = family(tmp_path, code)
    interrupt_when_ready(command, tmp_path / "log")
    assert (tmp_path / "log").read_text() == "cleaned up\n"


SHARE = """
from multiprocessing import resource_tracker, shared_memory
block = shared_memory.SharedMemory(create=True, size=4096)
print(block.name, flush=True)
"""


@pytest.mark.parametrize(
    "then",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "time.sleep(600)",
        "signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)",
        "os.kill(resource_tracker._resource_tracker._pid, signal.SIGSTOP); os.kill(os.getpid(), signal.SIGSTOP)",
    ],
    ids=["killed", "asleep", "deaf", "stopped"],
)
def test_supervise_leaves_no_shared_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: str) -> None:
    monkeypatch.setattr("fp8pipe.machine.supervise.GRACE_S", 0.5)
    command, _ = family(tmp_path, SHARE + then)
    ending = supervise(command, log=tmp_path / "log", timeout_s=2.0)
    block = Path("/dev/shm", ending.log.read_text().split()[0])
    assert "psm" in block.name
    assert not block.exists()


def test_supervise_leaves_nothing_of_a_command_that_succeeded(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "")
    assert supervise(command, log=tmp_path / "log").succeeded
    assert all_gone(pids_in(pids))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_supervised_group_ends_when_its_parent_is_killed(tmp_path: Path, number: signal.Signals) -> None:
    command, pids = family(tmp_path, "time.sleep(600)")
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys; from pathlib import Path; from fp8pipe.machine.supervise import supervise\n"
            "supervise(sys.argv[2:], log=Path(sys.argv[1]))",
            str(tmp_path / "log"),
            *command,
        ]
    )
    members = pids_in(pids)
    assert all(running(pid) for pid in members)
    parent.send_signal(number)
    parent.wait()
    assert all_gone(members)


def test_supervised_command_dies_with_its_guard(tmp_path: Path) -> None:
    command, pids = family(tmp_path, "os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)")
    ending = supervise(command, log=tmp_path / "log")
    assert ending.returncode == -signal.SIGKILL
    assert all_gone(pids_in(pids))
