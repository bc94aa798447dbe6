"""What killed processes leave: gone at the next use of the folder, and never taken from a process that lives."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from titan_moe.convert.new_folder import new_folder
from titan_moe.runtime import files
from titan_moe.runtime.files import new_file, temporary_path, write_atomic

WRITER = """
import sys, time
from pathlib import Path
from titan_moe.convert.new_folder import new_folder
from titan_moe.runtime.files import new_file
folder = Path(sys.argv[1])
with new_file(folder / "notes.txt") as file, new_folder(folder / "model") as made:
    (made / "weights").write_text("half")
    file.write(b"half")
    print("ready", flush=True)
    time.sleep(100)
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_killed_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "ready\n"
            being_made = names(tmp_path)
            assert len(being_made) == 2
            write_atomic(tmp_path / "notes.txt", "whole")
            assert names(tmp_path) == [*being_made, "notes.txt"]
        finally:
            process.send_signal(signal.SIGKILL)
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but a zombie still
        write_atomic(tmp_path / "other.txt", "whole")
        assert names(tmp_path) == ["notes.txt", "other.txt"]


def test_a_conversion_clears_what_another_left(tmp_path: Path) -> None:
    left = Path(str(temporary_path(tmp_path / "model")).replace(f"-{os.getpid()}-", "-4194305-"))  # beyond any process
    (left / "checkpoint").mkdir(parents=True)
    with new_folder(tmp_path / "other") as made:
        assert names(tmp_path) == [made.name]
    assert names(tmp_path) == ["other"]


def test_a_process_id_that_another_process_has_by_now(tmp_path: Path) -> None:
    own = temporary_path(tmp_path / "a")
    start = own.name.rpartition("-")[2].removesuffix(".tmp")
    if start == "0":
        pytest.skip("this system does not tell when a process started")
    earlier = own.with_name(own.name.replace(f"-{start}.", f"-{int(start) - 1}."))
    unknown = own.with_name(own.name.replace(f"-{start}.", "-0."))
    for path in (own, earlier, unknown):
        path.touch()
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([own.name, unknown.name])


def test_of_another_machine_what_nobody_has_written_to_for_a_day(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_machine", lambda: "0123abcd")
    fresh, old, folder, busy = (temporary_path(tmp_path / name) for name in ("fresh", "old", "folder", "busy"))
    monkeypatch.undo()
    for path in (folder, busy):
        path.mkdir()
        (path / "part").touch()
    for path in (fresh, old):
        path.touch()
    long_ago = time.time() - 25 * 3600
    for path in (old, folder / "part", folder, busy):
        os.utime(path, (long_ago, long_ago))
    files.remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted([fresh.name, busy.name])


def test_files_of_others_stay(tmp_path: Path) -> None:
    for name in (".notes.txt.99999999.tmp", "x.tmp", ".tmp", ".swp"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 0))
    before = names(tmp_path)
    write_atomic(tmp_path / "notes.txt", "")
    assert names(tmp_path) == sorted([*before, "notes.txt"])


def test_a_block_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(TypeError), new_file(tmp_path / "a") as file:
        file.writelines([b"new", None])  # pyrefly: ignore
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]
