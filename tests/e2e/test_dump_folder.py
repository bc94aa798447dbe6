"""A dump folder is one run's: another configuration and a second run are refused, on all ranks, and no file changes."""

import json
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Command, Ended, contents, end_two, records, start_two

Train = Callable[..., Ended]
FEW = {"training__steps": 2, "validation__enable": False}


@pytest.mark.parametrize("saves", [True, False])
def test_a_sweep_by_hand_into_one_folder(train: Train, tmp_path: Path, saves: bool) -> None:
    """Each rate would go on from the last one's end, or write over its numbers."""
    options = {**FEW, "checkpoint__enable": saves}
    assert train(**options).code == 0
    before = contents(tmp_path / "run")
    ended = train(**options, optimizer__lr=1e-2)
    assert ended.code == 2
    assert ended.err.splitlines()[-1].startswith(f"error: {tmp_path / 'run'}")
    assert "optimizer.lr: 0.005, now 0.01" in ended.err
    assert contents(tmp_path / "run") == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.toml"}


def test_a_change_that_is_wanted_is_kept_on_record(train: Train, tmp_path: Path) -> None:
    assert train(**FEW).code == 0
    options = {**FEW, "training__steps": 4, "optimizer__lr": 1e-2}
    ended = train(**options, more="--job.allow_config_change")
    assert ended.code == 0, ended.err
    warnings = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2, "no hyperparameter comes from the checkpoint"
    assert "optimizer.lr: 0.005, now 0.01" in warnings[0]
    assert "training.steps was 2, is 4: learning rates are those of a cosine schedule" in warnings[1]
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
    assert train(**options).out.startswith("nothing to do: 4 of 4 steps")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoint" / "step-4"):
        first, second = json.loads((folder / "run.json").read_text())["history"]
        assert (first["step"], first["changes"], first["host"]) == (0, {}, socket.gethostname())
        assert (second["step"], second["changes"]["optimizer.lr"]) == (2, [0.005, 0.01])


def test_rates_by_load_that_are_switched_on(train: Train) -> None:
    """The states do not fit: the line names the key and how to go on."""
    assert train(**FEW).code == 0
    changed = {**FEW, "optimizer__expert__load_lr": "batch_fraction", "training__steps": 4}
    ended = train(**changed)
    assert ended.code == 2
    assert "optimizer.expert.load_lr: unset, now 'batch_fraction'" in ended.err
    assert '(or checkpoint.exclude = ["optimizer"] to start the optimizer anew)' in ended.err
    ended = train(**changed, more="--job.allow_config_change")
    assert ended.code == 2
    line = ended.err.splitlines()[-1]
    assert "holds another optimizer: only here: load_lr, " in line
    assert 'set checkpoint.exclude = ["optimizer"]' in line
    ended = train(**changed, more="--checkpoint.exclude optimizer")
    assert ended.code == 0, ended.err


def test_a_second_run_in_the_folder(arguments: Arguments, train: Train, tmp_path: Path) -> None:
    """Refused while the first one lives, whatever it has written; free once that was killed."""
    options = {"training__steps": 10_000, "validation__enable": False, "checkpoint__interval": 10_000}
    first = Command("train", arguments(**options), tmp_path / "log")
    first.wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    second = train(**options)
    assert (second.code, second.out) == (2, "")
    line = second.err.splitlines()[-1]
    assert line.startswith(f"error: job.dump_folder {tmp_path / 'run'} is in use by process {first.pid} on host ")
    os.kill(first.pid, signal.SIGKILL)
    assert first.end().code == -signal.SIGKILL
    assert (tmp_path / "run" / ".run.lock").exists()
    third = train(**{**options, "training__steps": 2})
    assert third.code == 0, third.err
    assert not (tmp_path / "run" / ".run.lock").exists()


@pytest.mark.dist
def test_all_ranks_refuse_alike(arguments: Arguments, tmp_path: Path) -> None:
    """Another configuration, and a folder that another run is in."""
    assert end_two(start_two(arguments(**FEW), tmp_path / "log")) == [0, 0]
    before = contents(tmp_path / "run")
    commands = start_two(arguments(**FEW, training__seed=7), tmp_path / "log")
    assert end_two(commands) == [2, 2]
    assert "training.seed: 42, now 7" in commands[0].written(".err")
    assert contents(tmp_path / "run") == before

    endless = {**FEW, "training__steps": 10_000}
    (tmp_path / "first").mkdir()
    first = start_two(arguments(**endless), tmp_path / "first" / "log")
    first[0].wait_for((tmp_path / "run" / ".run.lock").exists)
    commands = start_two(arguments(**endless), tmp_path / "log")
    assert end_two(commands) == [2, 2]
    assert f"is in use by process {first[0].pid} on host" in commands[0].written(".err")
    os.kill(first[1].pid, signal.SIGTERM)
    assert end_two(first) == [128 + signal.SIGTERM] * 2
