"""Runs whose data and checkpoints are behind URLs: the same numbers as on a disk, and one line for what fails."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from tests.e2e.harness import Ended, command, records
from titan_moe.checkpoint import complete_steps
from titan_moe.checkpoint import remote as steps
from titan_moe.runtime import remote

Train = Callable[..., Ended]
URL = "memory://bucket/run"


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, shared: Path) -> Iterator[None]:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    MemoryFileSystem.store.clear()
    fsspec.filesystem("memory").pipe_file("/bucket/text.jsonl", (shared / "text.jsonl").read_bytes())
    yield
    MemoryFileSystem.store.clear()


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_goes_on_from_a_url(train: Train, tmp_path: Path, mode: str) -> None:
    """Data and checkpoints behind URLs: the records of a local run, also on a machine that lost its disk."""
    flat = {"lr_scheduler__name": "constant"}  # whatever the length
    assert train("whole", **flat).code == 0
    there = {"checkpoint__folder": URL, "data__path": "memory://bucket/*.jsonl", "checkpoint__async_mode": mode, **flat}
    ended = train(training__steps=4, checkpoint__keep_latest_k=1, **there)
    assert ended.code == 0, ended.err
    assert complete_steps(URL) == [4]
    assert not (tmp_path / "run" / "checkpoint").exists()
    shutil.rmtree(tmp_path / "run")
    ended = train(training__steps=6, **there)
    assert ended.code == 0, ended.err
    assert "step-4" in ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")[4:]
    assert complete_steps(URL) == [4, 6]


def test_the_same_numbers_and_every_command(train: Train, tmp_path: Path, shared: Path) -> None:
    assert train("whole").code == 0
    there = {"checkpoint__folder": URL, "data__path": "memory://bucket/text.jsonl"}
    ended = train(**there)
    assert ended.code == 0, ended.err
    assert f"checkpoint   {URL}\n" in ended.out
    for kind in ("train", "validation"):
        assert records(tmp_path / "run", kind) == records(tmp_path / "whole", kind)

    # Data are compared by content, so that the local run's folder goes on with those behind the URL.
    ended = train("whole", data__path="memory://bucket/text.jsonl", training__steps=8)
    assert ended.code == 0, ended.err
    ended = train(training__steps=8, **there)
    assert ended.code == 0, ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    words = ["--data.path", str(shared / "text.jsonl"), "--data.cache_folder", str(tmp_path / "cache")]
    local, distant = (command("evaluate", ["--checkpoint", str(place), *words]) for place in (tmp_path / "whole", URL))
    assert (distant.code, distant.out) == (0, local.out), distant.err
    ended = command("generate", ["--checkpoint", f"{URL}/step-8", "--prompt", "the", "--max_new_tokens", "3"])
    assert ended.code == 0, ended.err
    ended = train("next", checkpoint__initial_load_path=URL, training__steps=3)
    assert ended.code == 0, ended.err
    assert "starting from the weights of" in ended.err

    # Back to an earlier step: what came after it is set aside there.
    ended = train(more="--checkpoint.load_step 4", training__steps=5, **there)
    assert ended.code == 0, ended.err
    assert complete_steps(URL) == [2, 4, 5]
    assert complete_steps(f"{URL}/aside-1") == [6, 8]


def test_a_store_that_fails_while_a_run_saves(train: Train, tmp_path: Path) -> None:
    """As with a full disk: a warning, again at the next step, and an error at the last; earlier steps are intact."""
    assert train(training__steps=3, checkpoint__folder=URL).code == 0
    write, fails = steps.write_files, []

    def fail(url: str, files: Any) -> Any:
        if not url.endswith("step-3"):
            fails.append(url)
            raise remote.RemoteError(f"{url}: ClientError: SlowDown (tried 8 times)")
        return write(url, files)

    with mock.patch.object(steps, "write_files", fail):
        ended = train(training__steps=6, checkpoint__folder=URL)
    assert ended.code == 2
    assert len(fails) == 3
    *warnings, error = [line for line in ended.err.splitlines() if line.startswith(("warning: cannot", "error"))]
    assert [f"step-{step}" in line for line, step in zip(warnings, (4, 5), strict=True)] == [True, True]
    assert error == (
        f"error: cannot save {URL}/step-6: {URL}/step-6: ClientError: SlowDown (tried 8 times) "
        "(earlier checkpoints are intact)"
    )
    assert complete_steps(URL) == [2, 3]
    assert train(training__steps=6, checkpoint__folder=URL).code == 0
    assert complete_steps(URL) == [2, 3, 4, 6]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"job__dump_folder": "s3://bucket/run"}, "job.dump_folder (s3://bucket/run): must be a folder on a disk"),
        ({"data__cache_folder": "s3://b/c"}, "data.cache_folder (s3://b/c): must be a folder on a disk"),
        ({"checkpoint__folder": "ftp://b/c"}, "checkpoint.folder ftp://b/c: no protocol that is read here"),
        ({"checkpoint__folder": "s3://k:secret@b/c"}, "checkpoint.folder s3://b/c: the URL holds a user or a secret"),
        (
            {"checkpoint__initial_load_path": "memory://none/x"},
            "checkpoint.initial_load_path memory://none/x: no such f",
        ),
        ({"data__path": "memory://none/a.txt"}, "data.path memory://none/a.txt: no such file, folder or bucket"),
    ],
)
def test_mistakes_are_one_line(arguments: Any, tmp_path: Path, changes: dict[str, Any], text: str) -> None:
    words = arguments(**changes)
    if "job__dump_folder" in changes:
        words = [*words[:2], "--job.dump_folder", changes["job__dump_folder"]]
    ended = command("train", words)
    assert ended.code == 2
    assert ended.err.count("error: ") == 1
    assert f"error: {text}" in ended.err
    assert "secret@" not in ended.err
    assert not (tmp_path / "run" / "config.toml").exists()
