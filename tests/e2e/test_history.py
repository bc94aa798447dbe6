"""A dump folder that is used again: it goes on with its own history, and what was there before is not lost."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Ended, contents, end_two, records, start_two
from titan_moe.checkpoint import folder as checkpoint_folder
from titan_moe.checkpoint import store
from titan_moe.runtime.command import StopRequest

Train = Callable[..., Ended]


def steps_of(path: Path, kind: str = "train") -> list[int]:
    return [line["step"] for line in map(json.loads, path.read_text().splitlines()) if line["kind"] == kind]


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextmanager
def stopped_after(steps: int) -> Iterator[None]:
    """SIGTERM comes during the `steps`-th step that a run takes."""
    ask, asked = StopRequest.on_any_rank, []

    def on_any_rank(self: StopRequest, other: bool = False) -> tuple[int, bool]:
        asked.append(0)
        if len(asked) == steps:
            self.signal = signal.SIGTERM
        return ask(self, other)

    with mock.patch.object(StopRequest, "on_any_rank", on_any_rank):
        yield


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_run_that_goes_back_stays_on_its_branch(train: Train, tmp_path: Path, mode: str) -> None:
    """Steps 2, 4, 6 are there, it goes back to 2 and is stopped at 3: the next start goes on from 3, not from 6."""
    options: dict[str, Any] = {"checkpoint__async_mode": mode, "checkpoint__keep_latest_k": 3}
    run, folder = tmp_path / "run", tmp_path / "run" / "checkpoint"
    assert train(**options, metrics__enable_tensorboard=True).code == 0
    whole, branch = (run / "metrics.jsonl").read_bytes(), contents(folder / "step-6")
    kept = {kind: records(run, kind) for kind in ("train", "validation")}
    with stopped_after(1):
        ended = train(more="--checkpoint.load_step 2", **options, metrics__enable_tensorboard=True)
    assert ended.code == 128 + signal.SIGTERM, ended.err
    assert "SIGTERM: the same command without checkpoint.load_step goes on from here" in ended.err
    assert f"from step 2: step-4, step-6 moved to {folder / 'aside-1'}, which keeps" in ended.err
    assert names(folder) == {"step-2", "step-3", "aside-1"}
    assert steps_of(run / "metrics.jsonl") == [1, 2, 3]

    ended = train(**options, metrics__enable_tensorboard=True)
    assert ended.code == 0, ended.err
    assert f"resuming from {folder / 'step-3'}" in ended.err
    assert " moved to " not in ended.err
    assert {kind: records(run, kind) for kind in kept} == kept
    assert names(folder) == {"step-3", "step-4", "step-6", "aside-1"}  # three are kept, and no more of the branch
    assert (run / "metrics.aside-1.jsonl").read_bytes() == whole
    assert contents(folder / "aside-1" / "step-6") == branch
    shown = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    assert [event.step for event in shown.Scalars("train/loss")] == steps_of(run / "metrics.jsonl")


def test_back_to_a_step_twice(train: Train, tmp_path: Path) -> None:
    """A finished run goes back, and once more: each branch has its place."""
    run = tmp_path / "run"
    assert train().code == 0
    for branch in (1, 2):
        ended = train(more="--checkpoint.load_step 4 --checkpoint.export_dtype bfloat16")
        assert ended.code == 0, ended.err
        assert names(run / "checkpoint" / f"aside-{branch}") == {"step-6"}
        assert steps_of(run / f"metrics.aside-{branch}.jsonl") == [1, 2, 3, 4, 5, 6]
    assert names(run / "export") == {"aside-2", "step-6"}
    assert train(more="--checkpoint.load_step 6").code == 0
    assert names(run / "checkpoint") == {"step-2", "step-4", "step-6", "aside-1", "aside-2"}


def test_a_run_without_checkpoints_in_a_used_folder(train: Train, tmp_path: Path) -> None:
    """Its metrics are its own; the run with checkpoints goes on where it was, and not with numbers of the other."""
    run = tmp_path / "run"
    assert train().code == 0
    before, saved = (run / "metrics.jsonl").read_bytes(), contents(run / "checkpoint")
    changed = "--checkpoint.enable false --job.allow_config_change"
    ended = train(more=changed, training__steps=3, optimizer__lr=1e-3)
    assert ended.code == 0, ended.err
    assert (run / "metrics.aside-1.jsonl").read_bytes() == before
    assert str(run / "metrics.aside-1.jsonl") in ended.err
    assert f"this run begins at step 1, and step-6 stays in {run / 'checkpoint'}" in ended.err
    assert contents(run / "checkpoint") == saved
    assert steps_of(run / "metrics.jsonl") == [1, 2, 3]

    ended = train(training__steps=8)
    assert ended.code == 0, ended.err
    assert f"resuming from {run / 'checkpoint' / 'step-6'}" in ended.err
    assert steps_of(run / "metrics.aside-2.jsonl") == [1, 2, 3]
    assert steps_of(run / "metrics.jsonl") == [7, 8]


def test_no_checkpoint_can_be_read(train: Train, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train().code == 0
    for step in (2, 4, 6):
        with open(run / "checkpoint" / f"step-{step}" / "common.pt", "r+b") as file:
            file.write(b"\0")
    before = contents(run)
    ended = train(optimizer__lr=1e-3)
    assert ended.code == 2
    assert "step-6 is broken: file common.pt does not have its checksum. Put one that is whole there" in ended.err
    assert contents(run) == before


@pytest.mark.dist
def test_the_newest_is_damaged(arguments: Arguments, train: Train, tmp_path: Path) -> None:
    """It is set aside, not written over, also by two processes; the run ends as before."""
    run = tmp_path / "run"
    assert train().code == 0
    before = records(run)
    damaged = run / "checkpoint" / "step-6" / "common.pt"
    with open(damaged, "r+b") as file:
        file.write(b"\0")
    evidence = damaged.read_bytes()
    assert end_two(start_two(arguments(), tmp_path / "log")) == [0, 0]
    err = (tmp_path / "log-0.err").read_text()
    assert "step-6 is broken: file common.pt does not have its checksum (on rank " in err
    assert err.count("from step 4: step-6 moved to") == 1
    assert (run / "checkpoint" / "aside-1" / "step-6" / "common.pt").read_bytes() == evidence
    for now, then in zip(records(run), before, strict=True):
        assert now == pytest.approx(then, rel=1e-4)


def test_metrics_that_lack_steps(train: Train, tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    assert train(training__steps=4).code == 0
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    assert f"warning: {path}: no line of 1 of the 4 steps that the run goes on from: 1\n" in train().err
    path.unlink()
    ended = train(training__steps=7)
    assert f"warning: {path}: no line of 6 of the 6 steps that the run goes on from: 1 to 6" in ended.err
    assert steps_of(path) == [7]


def test_the_summary_is_of_this_run(train: Train, tmp_path: Path) -> None:
    """Whatever metrics.jsonl says: of a run that has validated the last one, else none."""
    path = tmp_path / "run" / "metrics.jsonl"
    ended = train(training__steps=4)
    assert "(step 4)" in next(line for line in ended.out.splitlines() if line.startswith("validation "))
    lie = {"step": 4, "kind": "validation", "loss": 0.125, "perplexity": 1.0}
    path.write_text(path.read_text() + json.dumps(lie) + "\n")
    assert "validation" not in train(training__steps=4).out
    ended = train(validation__enable=False)
    assert ended.code == 0, ended.err
    assert "validation" not in ended.out


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_lines_are_on_the_disk_before_a_checkpoint_has_its_name(train: Train, tmp_path: Path, mode: str) -> None:
    """A power cut never leaves a checkpoint of a step whose line it takes."""
    synced: dict[int, int] = {}  # bytes on the disk, by the file's number
    found: list[tuple[int, int]] = []
    fsync, publish = os.fsync, checkpoint_folder.publish
    path = tmp_path / "run" / "metrics.jsonl"

    def note_sync(descriptor: int) -> None:
        fsync(descriptor)
        facts = os.fstat(descriptor)
        synced[facts.st_ino] = facts.st_size

    def note_publish(staging: Path, final: Path, body: dict[str, Any]) -> None:
        on_disk = path.read_bytes()[: synced.get(path.stat().st_ino, 0)]
        lines = [json.loads(line) for line in on_disk.splitlines()]
        found.append((body["step"], max([line["step"] for line in lines if line["kind"] == "train"], default=0)))
        publish(staging, final, body)

    with mock.patch.object(os, "fsync", note_sync), mock.patch.object(store, "publish", note_publish):
        ended = train(checkpoint__async_mode=mode)
    assert ended.code == 0, ended.err
    assert [step for step, _ in found] == [2, 4, 6]
    assert all(line >= step for step, line in found), found
