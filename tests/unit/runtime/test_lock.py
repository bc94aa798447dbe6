"""One process at a time: who comes second is told whose turn it is, and no dead process is in anybody's way."""

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from titan_moe.runtime import lock
from titan_moe.runtime.lock import is_locked, sole_process

HOLD = """
import os, sys, time
from pathlib import Path
from titan_moe.runtime.lock import sole_process
with sole_process(Path(sys.argv[1]), "the folder"):
    if sys.argv[2] == "with a worker" and os.fork() == 0:
        time.sleep(5)
        os._exit(0)
    time.sleep(0.1)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 0.05)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / "run" / ".run.lock"


@pytest.fixture
def holder(path: Path) -> Iterator[Callable[[str], "subprocess.Popen[str]"]]:
    """Start a process that holds the lock, and read its lines up to `held`."""
    started: list[subprocess.Popen[str]] = []

    def start(how: str = "alone") -> "subprocess.Popen[str]":
        process = subprocess.Popen([sys.executable, "-c", HOLD, str(path), how], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        while process.stdout.readline() != "held\n":
            assert process.poll() is None
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout is not None
        process.stdout.close()


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match=r"^[^\n]*$") as error, sole_process(path, "job.dump_folder outputs/run"):
        pass
    return str(error.value)


def seconds_to_take(path: Path) -> float:
    begin = time.monotonic()
    with sole_process(path, "the folder"):
        return time.monotonic() - begin


def test_the_second_is_refused_and_told_who_holds_it(path: Path, holder: Callable[..., Any]) -> None:
    process = holder()
    line = refused(path)
    assert re.match(rf"job\.dump_folder outputs/run is in use by process {process.pid} on host ", line)
    assert socket.gethostname() in line
    assert str(path) in line
    assert is_locked(path)


@pytest.mark.parametrize("how", ["alone", "with a worker"])
def test_a_killed_process_lets_go_at_once(path: Path, holder: Callable[..., Any], how: str) -> None:
    """Also where a worker that it has forked lives on."""
    process = holder(how)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert path.exists()
    assert not is_locked(path)
    assert seconds_to_take(path) < 3 * lock.HEARTBEAT_SECONDS
    assert not path.exists()


def test_what_was_made_for_it_goes_with_it(path: Path, tmp_path: Path) -> None:
    with sole_process(path, "the folder"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())
    with sole_process(path, "the folder"):
        (path.parent / "metrics.jsonl").touch()
    assert [file.name for file in path.parent.iterdir()] == ["metrics.jsonl"]


def of_another_machine(path: Path) -> None:
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"pid": 1, "host": "node7", "boot": "another", "since": "2026-11-27"}))


def test_a_file_of_another_machine_is_taken_over_when_nobody_renews_it(path: Path) -> None:
    """Locks may be of one node alone."""
    of_another_machine(path)
    assert seconds_to_take(path) >= 3 * lock.HEARTBEAT_SECONDS


def test_a_file_of_another_machine_that_is_renewed_is_in_use(path: Path) -> None:
    of_another_machine(path)
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        assert "in use by process 1 on host node7, since 2026-11-27" in refused(path)
    finally:
        ended.set()
        thread.join()


def test_without_file_locks_signs_of_life_count(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with sole_process(path, "the folder"):
        assert f"process {os.getpid()}" in refused(path)
    assert not path.exists()  # it was let go of, not left
    of_another_machine(path)
    assert seconds_to_take(path) >= 3 * lock.HEARTBEAT_SECONDS


@pytest.mark.parametrize("left", ["", "no JSON", "[1]"])
def test_a_file_that_says_nothing_is_taken_over(path: Path, left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "HEARTBEAT_SECONDS", 20.0)  # longer than a busy machine may take without waiting
    path.parent.mkdir(parents=True)
    path.write_text(left)
    assert seconds_to_take(path) < lock.HEARTBEAT_SECONDS


def test_many_that_come_and_go_are_never_two_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that lets go removes the file, which others have opened by then."""
    monkeypatch.setattr(lock, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(time, "sleep", lambda _: os.sched_yield())
    inside, most, turns = [0], [0], [0]

    def come_and_go() -> None:
        for _ in range(10):
            with sole_process(path, "the folder"):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                os.sched_yield()
                turns[0] += 1
                inside[0] -= 1

    threads = [threading.Thread(target=come_and_go) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (turns[0], most[0]) == (40, 1)
