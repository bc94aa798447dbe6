"""Checkpoints behind a URL: whole or no step, whatever a store or a kill does; the same as on a disk."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from titan_moe.checkpoint import (
    CheckpointError,
    complete_steps,
    latest_complete,
    load_checkpoint,
    resolve_checkpoint,
    save_checkpoint,
    step_to_resume,
)
from titan_moe.checkpoint import remote as steps
from titan_moe.checkpoint.folder import manifest_of
from titan_moe.checkpoint.steps import set_aside, steps_after
from titan_moe.checkpoint.verify import verify_checkpoint
from titan_moe.runtime import remote

URL = "memory://bucket/run"


class Killed(BaseException):
    """The process is gone: nothing of its own code runs after this."""


@pytest.fixture(autouse=True)
def _store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty store, short waits, copies in a folder of the test."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


def model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def save(step: int, folder: Any = URL, keep: int = 0) -> Any:
    files = {"config.toml": "# text\n"}
    return save_checkpoint(
        folder, step, model=model(step), optimizer=None, extra={"n": step}, files=files, keep_latest_k=keep
    )


def weights_are_of(step: int, folder: Path) -> bool:
    loaded = model(99)
    assert load_checkpoint(folder, model=loaded).extra == {"n": step}
    return all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model(step).parameters(), strict=True))


def names(below: str = "") -> set[str]:
    return {path.removeprefix(f"/bucket/run/{below}") for path in MemoryFileSystem.store if f"/run/{below}" in path}


def test_a_step_is_what_it_is_on_a_disk(tmp_path: Path) -> None:
    """The same files with the same tensors; a copy of the objects is a step folder."""
    assert save(3) == f"{URL}/step-3"
    local = save(3, tmp_path / "disk")
    assert names("step-3/") == {path.name for path in local.iterdir()}
    fsspec.filesystem("memory").get("/bucket/run/step-3/", str(tmp_path / "copy" / "step-3") + "/", recursive=True)
    for path in (local, tmp_path / "copy" / "step-3"):
        assert weights_are_of(3, path)
        assert verify_checkpoint([str(path)]) == 0
    ours, theirs = (
        json.loads((path / "manifest.json").read_text())["body"] for path in (local, tmp_path / "copy/step-3")
    )
    assert ours["files"].keys() == theirs["files"].keys()
    same = {name for name, entry in ours["files"].items() if entry == theirs["files"][name]}
    assert {"__0_0.distcp", "config.toml"} <= same  # the others hold random states and an id of the save


def test_the_latest_complete_step_is_fetched_once(caplog: pytest.LogCaptureFixture) -> None:
    assert step_to_resume("memory://bucket/none") is None
    for step in (1, 2):
        save(step)
    assert complete_steps(URL) == [1, 2]
    caplog.set_level(logging.INFO)
    path = step_to_resume(URL)
    assert path is not None
    assert weights_are_of(2, path)
    assert [path == resolve_checkpoint(url) for url in (URL, f"{URL}/", f"{URL}/step-2")] == [True] * 3
    assert caplog.text.count("fetched ") == 1
    assert weights_are_of(1, resolve_checkpoint(f"{URL}/step-1"))
    with pytest.raises(
        ValueError, match=r"^checkpoint memory:.*/step-3: no such folder \(.*/run has step-1, step-2\)$"
    ):
        resolve_checkpoint(f"{URL}/step-3")

    # A step that was saved anew is another one, and one whose copy a disk has damaged is fetched again.
    save_checkpoint(URL, 2, model=model(7), optimizer=None, extra={"n": 7}, files={}, keep_latest_k=0)
    path = latest_complete(URL)
    assert path is not None
    assert weights_are_of(7, path)
    data = bytearray((path / "common.pt").read_bytes())
    data[-1] ^= 1
    (path / "common.pt").write_bytes(data)
    assert weights_are_of(7, resolve_checkpoint(URL))


@pytest.mark.parametrize("keep", [0, 1])
def test_killed_at_every_request(keep: int) -> None:
    """Whatever request a save dies at: the last good step is there, the next save works, and no leftover stays."""
    operations = ("pipe_file", "_open", "rm", "rm_file", "cp_file")
    count = 0

    def kill_at(number: int) -> Any:
        def wrap(method: Any) -> Any:
            def call(self: Any, *arguments: Any, **more: Any) -> Any:
                nonlocal count
                count += 1
                if count >= number:  # a dead process asks for nothing more
                    raise Killed
                return method(self, *arguments, **more)

            return call

        return [mock.patch.object(MemoryFileSystem, name, wrap(getattr(MemoryFileSystem, name))) for name in operations]

    number, done = 0, False
    while not done:
        number += 1
        MemoryFileSystem.store.clear()
        save(1)
        count = 0
        patches = kill_at(number)
        for patch in patches:
            patch.start()
        try:
            save(2, keep=keep)
            done = True
        except (Killed, CheckpointError, CheckpointException):
            done = False
        finally:
            for patch in patches:
                patch.stop()
        complete = complete_steps(URL)
        assert complete in ([1], [2], [1, 2]), number
        for step in complete:
            assert weights_are_of(step, resolve_checkpoint(f"{URL}/step-{step}"))
        latest = step_to_resume(URL)
        assert latest is not None

        save(3, keep=keep)
        assert complete_steps(URL) == ([3] if keep else [*complete, 3])
        assert {name.partition("/")[0] for name in names()} == {f"step-{step}" for step in complete_steps(URL)}
        assert not [name for name in names() if name.endswith((".tmp", ".unfinished"))]
    assert number > 15


def test_only_what_a_save_left_is_removed() -> None:
    """Objects that look like steps, and are somebody's, stay; a step without its manifest is told."""
    memory = fsspec.filesystem("memory")
    for name in ("step-9/theirs.txt", "step-x/a", "notes.txt", "deep/step-1/b"):
        memory.pipe_file(f"/bucket/run/{name}", b"x")
    save(1, keep=1)
    save(2, keep=1)
    assert {"step-9/theirs.txt", "step-x/a", "notes.txt", "deep/step-1/b"} <= names()
    assert complete_steps(URL) == [2]
    path = latest_complete(URL)
    assert path is not None
    assert weights_are_of(2, path)


def test_a_broken_step_is_skipped_and_an_outage_is_not(caplog: pytest.LogCaptureFixture) -> None:
    for step in (1, 2, 3):
        save(step)
    memory = fsspec.filesystem("memory")
    memory.rm("/bucket/run/step-3/common.pt")
    data = bytearray(memory.cat_file("/bucket/run/step-2/__0_0.distcp"))
    data[100] ^= 1
    memory.pipe_file("/bucket/run/step-2/__0_0.distcp", bytes(data))
    latest = step_to_resume(URL)
    assert latest is not None
    assert latest.name == "step-1"
    assert "step-3 is broken: file common.pt is missing" in caplog.text
    assert "step-2 is broken: file __0_0.distcp does not have its checksum" in caplog.text
    with pytest.raises(ValueError, match=r"^2 broken checkpoints$"):
        verify_checkpoint([URL])
    memory.rm("/bucket/run/step-3/manifest.json")
    with pytest.raises(CheckpointError, match="it has no manifest"):
        resolve_checkpoint(f"{URL}/step-3")

    # A store that can't be reached says nothing of its steps: no earlier one takes their place.
    save(4)

    def fail(self: Any, path: str, **more: Any) -> bytes:
        if path.endswith(".distcp"):
            raise ConnectionResetError
        return cat(self, path, **more)

    cat = MemoryFileSystem.cat_file
    with (
        mock.patch.object(MemoryFileSystem, "cat_file", fail),
        pytest.raises(ValueError, match=r"^checkpoint memory:.*/step-4/__0_0\.distcp: ConnectionResetError \(tried 8"),
    ):
        step_to_resume(URL)


def test_a_store_that_refuses(caplog: pytest.LogCaptureFixture) -> None:
    """A save that fails is one line, and harms no earlier step."""
    save(1)
    with (
        mock.patch.object(MemoryFileSystem, "pipe_file", side_effect=PermissionError("AccessDenied")),
        pytest.raises(CheckpointError) as caught,
    ):
        save(2)
    assert str(caught.value) == (
        "cannot save memory://bucket/run/step-2: memory://bucket/run/step-2/.unfinished: access denied (AccessDenied) "
        "(earlier checkpoints are intact)"
    )
    opened = MemoryFileSystem._open

    def full(self: Any, path: str, mode: str = "rb", **more: Any) -> Any:
        if "w" in mode and path.endswith(".distcp"):
            raise OSError(28, "No space left on device")
        return opened(self, path, mode, **more)

    with (
        mock.patch.object(MemoryFileSystem, "_open", full),
        pytest.raises(CheckpointError, match=r"cannot save memory:.*No space left on device.*intact\)$"),
    ):
        save(2)
    assert complete_steps(URL) == [1]
    assert weights_are_of(1, resolve_checkpoint(URL))


def test_going_back_sets_later_steps_aside() -> None:
    for step in (1, 2, 3):
        save(step)
    assert steps_after(URL, 1) == [f"{URL}/step-2", f"{URL}/step-3"]
    assert set_aside(URL, 1, "aside-1") == [f"{URL}/aside-1/step-2", f"{URL}/aside-1/step-3"]
    assert complete_steps(URL) == [1]
    assert complete_steps(f"{URL}/aside-1") == [2, 3]
    assert weights_are_of(3, resolve_checkpoint(f"{URL}/aside-1"))
    save(2, keep=1)
    assert complete_steps(URL) == [2]
    assert complete_steps(f"{URL}/aside-1") == [2, 3]


def test_a_manifest_leads_nowhere_else() -> None:
    save(1)
    memory = fsspec.filesystem("memory")
    sealed = json.loads(memory.cat_file("/bucket/run/step-1/manifest.json"))
    sealed["body"]["files"]["../../x"] = {"size": 0, "crc32": "00000000"}
    memory.pipe_file("/bucket/run/step-1/manifest.json", manifest_of(sealed["body"]))
    with pytest.raises(CheckpointError, match=r"names the file '\.\./\.\./x', which is not in its folder"):
        resolve_checkpoint(f"{URL}/step-1")


def test_old_copies_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody has read for a day makes room for the next one."""
    for step in (1, 2):
        save(step)
    first = resolve_checkpoint(f"{URL}/step-1")
    resolve_checkpoint(f"{URL}/step-2")
    assert first.exists()
    monkeypatch.setattr(steps, "ABANDONED_SECONDS", -1)
    resolve_checkpoint(f"{URL}/step-1")
    assert [path.name for path in first.parent.parent.iterdir()] == [first.parent.name]
