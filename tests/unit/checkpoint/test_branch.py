"""Steps that a run leaves behind are set aside whole, and no run starts over or falls back where work is to be lost."""

import json
import logging
import os
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from tests.unit.checkpoint.test_store import Tiny, flip_bit, make, save
from titan_moe.checkpoint import (
    CheckpointError,
    complete_steps,
    latest_complete,
    load_checkpoint,
    resolve_checkpoint,
    step_to_resume,
)
from titan_moe.checkpoint.branch import leave_branch
from titan_moe.checkpoint.verify import verify_checkpoint

MODEL, OPTIMIZER = make()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A dump folder with steps 1 to 4 and a line of metrics for each."""
    for step in (1, 2, 3, 4):
        save(tmp_path / "checkpoint", step, MODEL, OPTIMIZER)
    lines = [json.dumps({"step": step, "kind": "train"}) + "\n" for step in range(1, 5)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    return tmp_path


def leave(run: Path, step: int, *, same_run: bool = True) -> None:
    leave_branch(run / "metrics.jsonl", [run / "checkpoint", run / "export"], step, same_run=same_run)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_later_steps_are_set_aside(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They are out of the run, no save prunes them, and each is a checkpoint to whoever names it."""
    caplog.set_level(logging.INFO)
    before = (run / "metrics.jsonl").read_bytes()
    folder = run / "checkpoint"
    leave(run, 2)
    assert names(folder) == ["aside-1", "step-1", "step-2"]
    assert names(folder / "aside-1") == ["step-3", "step-4"]
    assert step_to_resume(folder) == folder / "step-2"
    assert steps_of(run / "metrics.jsonl") == [1, 2]
    assert (run / "metrics.aside-1.jsonl").read_bytes() == before
    metrics_line, steps_line = [record.getMessage() for record in caplog.records]
    assert str(run / "metrics.aside-1.jsonl") in metrics_line
    size = sum(file.stat().st_size for file in (folder / "aside-1").rglob("*") if file.is_file()) / 2**20
    assert f"from step 2: step-3, step-4 moved to {folder / 'aside-1'}, which keeps {size:.1f} MiB" in steps_line

    for step in (3, 5):
        save(folder, step, MODEL, OPTIMIZER, keep_latest_k=1)
    assert names(folder) == ["aside-1", "step-5"]
    assert complete_steps(folder) == [5]
    assert verify_checkpoint([str(run)]) == 0
    assert resolve_checkpoint(run) == folder / "step-5"
    assert resolve_checkpoint(folder / "aside-1") == folder / "aside-1" / "step-4"
    assert load_checkpoint(folder / "aside-1" / "step-3", model=Tiny()).step == 3
    leave(run, 1)
    assert names(folder) == ["aside-1", "aside-2"]
    assert names(folder / "aside-2") == ["step-5"]
    assert steps_of(run / "metrics.aside-2.jsonl") == [1, 2]


def test_what_a_kill_leaves_is_no_branch(run: Path) -> None:
    before = (run / "metrics.jsonl").read_text()
    (run / "checkpoint" / "step-5.tmp").mkdir()
    leave(run, 4)
    shutil.rmtree(run / "checkpoint")
    leave(run, 0)
    assert (run / "metrics.jsonl").read_text() == before
    assert names(run) == ["metrics.jsonl"]


def test_metrics_of_another_run(run: Path) -> None:
    """All lines are set aside, also those up to the step that the run goes on from; of none there is nothing to do."""
    leave(run, 4, same_run=False)
    assert steps_of(run / "metrics.jsonl") == []
    assert steps_of(run / "metrics.aside-1.jsonl") == [1, 2, 3, 4]
    leave(run, 4, same_run=False)
    assert names(run) == ["checkpoint", "metrics.aside-1.jsonl", "metrics.jsonl"]
    assert complete_steps(run / "checkpoint") == [1, 2, 3, 4]


@pytest.mark.parametrize("moves", [0, 1, 2])
def test_killed_while_steps_are_set_aside(run: Path, monkeypatch: pytest.MonkeyPatch, moves: int) -> None:
    """The newest step stays until all others have gone: the run is as it was, or as it shall be."""
    rename, done = os.rename, []

    def die(source: Path, target: Path) -> None:
        if len(done) == moves:
            raise KeyboardInterrupt
        rename(source, target)
        done.append(target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", die)
        if moves < 2:
            with pytest.raises(KeyboardInterrupt):
                leave(run, 2)
        else:
            leave(run, 2)
    assert latest_complete(run / "checkpoint") == run / "checkpoint" / ("step-2" if moves == 2 else "step-4")
    assert steps_of(run / "metrics.jsonl") == [1, 2] + [3, 4] * (moves < 2)
    leave(run, 2)
    assert step_to_resume(run / "checkpoint") == run / "checkpoint" / "step-2"
    aside = [path.name for path in (run / "checkpoint").glob("aside-*/step-*")]
    assert sorted(aside) == ["step-3", "step-4"]


def test_odd_steps_are_set_aside_too(run: Path, tmp_path: Path) -> None:
    """Links, broken ones, one that a crash left between two renames, what was exported."""
    folder, elsewhere = run / "checkpoint", run / "elsewhere"
    elsewhere.mkdir()
    (folder / "step-4").rename(elsewhere / "step-4")
    (folder / "step-4").symlink_to(os.path.join("..", "elsewhere", "step-4"))
    (folder / "step-5").symlink_to(elsewhere / "nowhere")
    (folder / "step-3").rename(folder / "step-3.old")
    shutil.copytree(elsewhere / "step-4", folder / "step-6")
    (folder / "step-6" / "manifest.json").unlink()
    shutil.copytree(elsewhere / "step-4", folder / "step-6.old")
    shutil.copytree(elsewhere / "step-4", run / "export" / "step-4")
    leave(run, 2)
    aside = folder / "aside-1"
    assert names(aside) == ["step-3", "step-4", "step-5", "step-6", "step-6.old"]
    assert load_checkpoint(aside / "step-4", model=Tiny()).step == 4
    assert load_checkpoint(elsewhere / "step-4", model=Tiny()).step == 4
    assert names(run / "export") == ["aside-1"]
    save(folder, 7, MODEL, OPTIMIZER)  # cleans up what saves that died have left
    assert names(folder) == ["aside-1", "step-1", "step-2", "step-7"]


def newer(step: Path) -> None:
    """Make it a checkpoint of the next format."""
    sealed = json.loads((step / "manifest.json").read_text())
    sealed["body"]["format"] += 1
    sealed["crc32"] = f"{zlib.crc32(json.dumps(sealed['body'], sort_keys=True).encode()):08x}"
    (step / "manifest.json").write_text(json.dumps(sealed))


BREAK: dict[str, tuple[Any, str]] = {
    "flipped": (lambda step: flip_bit(step / "common.pt"), "step-4 is broken: file common.pt does not have its checks"),
    "truncated": (lambda step: (step / "__0_0.distcp").write_bytes(b"?"), "step-4 is broken: file __0_0.distcp has 1"),
    "newer": (newer, "step-4 has checkpoint format 2 and this titan_moe reads 1: a newer one has saved it"),
    "empty": (lambda step: [path.unlink() for path in step.iterdir()], "step-4 is broken: it has no manifest.json"),
    "unmounted": (
        lambda step: (shutil.rmtree(step), step.symlink_to("/nowhere/step")),
        "step-4 links to /nowhere/step, which is not there",
    ),
}


@pytest.mark.parametrize("how", BREAK)
def test_no_run_starts_over_where_no_step_loads(run: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    break_it, why = BREAK[how]
    for step in (1, 2, 3, 4):
        break_it(run / "checkpoint" / f"step-{step}")
    with pytest.raises(CheckpointError) as error:
        step_to_resume(run / "checkpoint")
    assert why in str(error.value)
    assert f"no checkpoint in {run / 'checkpoint'} can be loaded, and nothing was changed" in str(error.value)
    assert "\n" not in str(error.value)
    assert caplog.text == ""
    assert latest_complete(run / "checkpoint") is None


@pytest.mark.parametrize("how", BREAK)
def test_the_newest_does_not_load(run: Path, caplog: pytest.LogCaptureFixture, how: str) -> None:
    """A damaged one is skipped with a warning; one of a newer version is whole, so that it is an error."""
    break_it, why = BREAK[how]
    folder = run / "checkpoint"
    break_it(folder / "step-4")
    if how == "newer":
        with pytest.raises(CheckpointError, match=r"step-4 has checkpoint format 2.*checkpoint\.load_step$"):
            step_to_resume(folder)
        return
    assert step_to_resume(folder) == folder / "step-3"
    (record,) = caplog.records
    assert why in record.getMessage()
    assert f"using {folder / 'step-3'}" in record.getMessage()


def test_a_checkpoint_folder_that_is_not_there(tmp_path: Path) -> None:
    """None where nothing was saved; a link to a disk that is not mounted, or a file, is an error."""
    folder = tmp_path / "checkpoint"
    assert step_to_resume(folder) is None
    folder.mkdir()
    (folder / "step-2.tmp").mkdir()
    assert step_to_resume(folder) is None
    (tmp_path / "link").symlink_to("/nowhere/checkpoint")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "link", tmp_path / "file"):
        with pytest.raises(CheckpointError, match=f"{path} is no folder: mount"):
            step_to_resume(path)
