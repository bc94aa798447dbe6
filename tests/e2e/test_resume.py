"""A run that was stopped, at any moment and in any way, goes on to the bit as one that was not."""

import itertools
import json
import os
import random
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Command, Ended, contents, end_two, records, start_two
from titan_moe.balancer import BALANCERS, Balancer, no_loss
from titan_moe.checkpoint import load_model

Train = Callable[..., Ended]
STEPS = 16
OPTIONS = {"training__steps": STEPS, "validation__freq": 5, "validation__steps": 2, "checkpoint__interval": 4}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the run that others are compared with lies, once it was run."""
    return {"folder": tmp_path_factory.mktemp("uninterrupted") / "run"}


@pytest.fixture
def whole(uninterrupted: dict[str, Path], arguments: Arguments, tmp_path: Path) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = uninterrupted["folder"]
    if not folder.exists():
        log = tmp_path / "whole-log"
        ended = Command("train", [*arguments(**OPTIONS), "--job.dump_folder", str(folder)], log).end()
        assert ended.code == 0, ended.err
    return folder


def assert_same(run: Path, whole: Path) -> None:
    """Every number of every step equal to the bit, each step there once, and so are the final weights."""
    for kind in ("train", "validation"):
        assert records(run, kind) == records(whole, kind)
    assert [record["step"] for record in records(run)] == list(range(1, STEPS + 1))
    for path in (whole / "checkpoint" / f"step-{STEPS}").glob("*.distcp"):
        assert (run / "checkpoint" / f"step-{STEPS}" / path.name).read_bytes() == path.read_bytes()


def step_of(command: Command) -> int:
    """The last step that a command has shown (log_freq is 1)."""
    lines = [line for line in command.written(".out").splitlines() if line.startswith("step ")]
    return int(lines[-1].split()[1].partition("/")[0]) if lines else 0


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 0), (signal.SIGTERM, 2)])
def test_signals_save_first(
    arguments: Arguments, train: Train, whole: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """The whole process group gets the signal, as from a terminal's Ctrl-C, and twice, as through torchrun."""
    command = Command("train", arguments(**OPTIONS, data__num_workers=workers), tmp_path / "log")
    command.wait_for(lambda: step_of(command) >= 5)
    os.killpg(command.pid, number)
    os.kill(command.pid, number)
    ended = command.end()
    assert ended.code == 128 + number, ended.err
    assert f"stopped by {number.name}: the same command goes on from here" in ended.err
    assert "Traceback" not in ended.err
    last = max(record["step"] for record in records(tmp_path / "run"))
    assert 5 <= last < STEPS
    assert (tmp_path / "run" / "checkpoint" / f"step-{last}").is_dir()

    again = train(**OPTIONS, data__num_workers=workers)
    assert again.code == 0, again.err
    assert f"resuming from {tmp_path / 'run' / 'checkpoint' / f'step-{last}'}" in again.err
    assert_same(tmp_path / "run", whole)


def test_kill_9_at_random_moments(arguments: Arguments, train: Train, whole: Path, tmp_path: Path) -> None:
    """Killed without a word three times, somewhere in training, then run to the end."""
    draw, words = random.Random(), arguments(**OPTIONS)
    for kill in range(3):
        command = Command("train", words, tmp_path / "log")
        target = draw.randint(4 * kill, 4 * kill + 3)
        command.wait_for(lambda command=command, target=target: step_of(command) >= target)
        os.kill(command.pid, signal.SIGKILL)
        ended = command.end()
        assert ended.code == -signal.SIGKILL, ended.err
    assert train(**OPTIONS).code == 0
    assert_same(tmp_path / "run", whole)


def test_noise_of_a_router_is_drawn_again(train: Train, tmp_path: Path) -> None:
    """Steps after a resume draw the noise that an uninterrupted run draws there, and it does change the run."""
    noise = {"router__noise_std": 0.5, "router__jitter": 0.1}
    assert train(**noise).code == 0
    before = records(tmp_path / "run")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "run" / "checkpoint" / f"step-{step}")
    again = train(**noise)
    assert "step-2" in again.err, again.err
    assert records(tmp_path / "run") == before
    cut = (tmp_path / "run" / "metrics.cut.jsonl").read_text().splitlines()
    assert [line["step"] for line in map(json.loads, cut) if line["kind"] == "train"] == [3, 4, 5, 6]
    quiet = train("quiet")
    assert quiet.code == 0, quiet.err
    assert records(tmp_path / "quiet") != before


def test_kill_9_during_a_save(arguments: Arguments, train: Train, whole: Path, tmp_path: Path) -> None:
    """Killed while the folder of a save is not whole yet: the next run takes the one before and cleans up."""
    folder = tmp_path / "run" / "checkpoint"
    command = Command("train", arguments(**OPTIONS), tmp_path / "log")
    command.wait_for((folder / "step-8.tmp").exists)
    os.kill(command.pid, signal.SIGKILL)
    assert command.end().code == -signal.SIGKILL
    left = {path.name for path in folder.iterdir()}
    again = train(**OPTIONS)
    assert again.code == 0, again.err
    assert f"resuming from {folder / ('step-4' if 'step-8.tmp' in left else 'step-8')}" in again.err
    assert {path.name for path in folder.iterdir()} == {f"step-{step}" for step in (4, 8, 12, 16)}
    assert_same(tmp_path / "run", whole)


@pytest.mark.dist
def test_two_processes_stop_together(arguments: Arguments, whole: Path, tmp_path: Path) -> None:
    """A signal to one of two stops both after the same step; the same two then go on to the bit."""
    assert end_two(start_two(arguments("whole", **OPTIONS), tmp_path / "log")) == [0, 0]
    commands = start_two(arguments(**OPTIONS), tmp_path / "log")
    commands[0].wait_for(lambda: step_of(commands[0]) >= 5)
    os.kill(commands[1].pid, signal.SIGTERM)
    assert end_two(commands) == [128 + signal.SIGTERM] * 2, commands[0].written(".err")
    assert [command.written(".err").count("stopped by SIGTERM") for command in commands] == [1, 0]
    assert end_two(start_two(arguments(**OPTIONS), tmp_path / "log")) == [0, 0]
    assert_same(tmp_path / "run", tmp_path / "whole")
    for two, one in zip(records(tmp_path / "run"), records(whole), strict=True):
        assert two == pytest.approx(one, rel=1e-5)


def test_a_finished_run_does_nothing_but_tell(train: Train, tmp_path: Path) -> None:
    """Also where it is shorter now; a changed configuration is refused, though there is nothing to do with it."""
    assert train().code == 0
    before = contents(tmp_path / "run")
    for steps, more in ((6, ""), (6, "--validation.freq 2 --data.num_workers 1"), (5, "")):
        again = train(more=more, training__steps=steps)
        assert (again.code, again.out) == (0, f"nothing to do: 6 of {steps} steps in {tmp_path / 'run'}\n")
        assert "warning" not in again.err
    other = train(more="--optimizer.lr 3e-2")
    assert (other.code, other.out) == (2, "")
    assert "optimizer.lr: 0.005, now 0.03" in other.err
    assert contents(tmp_path / "run") == before


def test_what_is_left_of_a_finished_run_is_done(train: Train, tmp_path: Path) -> None:
    """A kill may come after the last save and before the last validation; an export may be wanted later."""
    assert train().code == 0
    metrics = tmp_path / "run" / "metrics.jsonl"
    whole = metrics.read_text()
    metrics.write_text(whole[: whole.rindex("\n", 0, -1) + 1])
    assert [record["step"] for record in records(tmp_path / "run", "validation")] == [3]
    assert train().code == 0
    before, after = (json.loads(text.splitlines()[-1]) for text in (whole, metrics.read_text()))
    assert after == before

    changed = metrics.read_bytes()
    assert train(more="--checkpoint.export_dtype bfloat16").code == 0
    assert (tmp_path / "run" / "export" / "step-6").is_dir()
    assert metrics.read_bytes() == changed
    assert train(more="--checkpoint.export_dtype bfloat16").out.startswith("nothing to do: 6 of 6 steps")
    assert train(more="--checkpoint.export_dtype float16").code == 0
    assert 'export_dtype = "float16"' in (tmp_path / "run" / "export" / "step-6" / "config.toml").read_text()


def test_more_steps_than_before(train: Train, tmp_path: Path) -> None:
    """A finished run goes on when training.steps grows; with a constant rate it is the longer run to the bit."""
    options = {"lr_scheduler__name": "constant", "lr_scheduler__warmup_steps": 2, "validation__freq": 3}
    assert train("long", **options, training__steps=9).code == 0
    assert train("short", **options, training__steps=6).code == 0
    ended = train("short", **options, training__steps=9)
    assert ended.code == 0, ended.err
    assert "step 7/9" in ended.out
    for kind in ("train", "validation"):
        assert records(tmp_path / "short", kind) == records(tmp_path / "long", kind)


def test_states_of_balancers_on_two_ranks(arguments: Arguments, tmp_path: Path) -> None:
    """Every balancer of ours that keeps one: a run that stops in the middle is the whole run, weights and states."""
    keeping = [name for name, builder in BALANCERS.items() if builder().init is not None]
    assert keeping == ["smebu", "pid"]
    on = {"balancer": {name: {"rate": 0.05} for name in keeping}, "parallelism__expert_parallel_degree": 2}
    for name, steps in (("whole", 6), ("cut", 3), ("cut", 6)):
        (tmp_path / name).mkdir(exist_ok=True)
        words = arguments(name, training__steps=steps, lr_scheduler__name="constant", **on)
        assert end_two(start_two(words, tmp_path / f"log-{name}-{steps}")) == [0, 0]
    assert records(tmp_path / "cut") == records(tmp_path / "whole")

    one, two = (load_model(tmp_path / name)[0] for name in ("whole", "cut"))
    assert_close(two.state_dict(), one.state_dict(), rtol=0, atol=0)
    states = one.balancer_states()
    assert [*states] == keeping
    assert all(layer.any() for name in keeping for layers in states[name].values() for layer in layers)


def test_broken_checkpoints_are_skipped_in_one_line(train: Train, tmp_path: Path) -> None:
    """A truncated checkpoint and one without its metadata: resume takes the last complete one and says so."""
    assert train().code == 0
    expected = records(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoint"
    with open(folder / "step-6" / "__0_0.distcp", "r+b") as file:
        file.truncate(1000)
    (folder / "step-4" / ".metadata").unlink()
    ended = train()
    assert ended.code == 0, ended.err
    (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: ")]
    assert "step-6 is broken: file __0_0.distcp has 1000 bytes" in warning
    assert "step-4 is broken: file .metadata is missing" in warning
    assert f"using {folder / 'step-2'}" in warning
    assert f"resuming from {folder / 'step-2'}" in ended.err
    assert records(tmp_path / "run") == expected


def test_weights_of_another_run(train: Train, tmp_path: Path) -> None:
    """initial_load_path takes the weights alone: step 1 begins where the other run ended."""
    assert train("first").code == 0
    ended = train("second", checkpoint__initial_load_path=str(tmp_path / "first"))
    assert ended.code == 0, ended.err
    assert f"starting from the weights of {tmp_path / 'first' / 'checkpoint' / 'step-6'}" in ended.err
    first, second = (records(tmp_path / name) for name in ("first", "second"))
    assert [record["step"] for record in second] == [1, 2, 3, 4, 5, 6]
    assert second[0]["loss"] < first[0]["loss"] - 0.3
    assert not any(a == b for a, b in itertools.product(first, second))


def test_weights_of_a_model_that_partly_fits(train: Train, tmp_path: Path) -> None:
    assert train("first").code == 0
    changes = {"moe__num_shared_experts": 1, "checkpoint__initial_load_path": str(tmp_path / "first")}
    refused = train("second", **changes).err
    assert "another model: only here: model.layers.0.moe.shared_experts" in refused
    assert "checkpoint.initial_load_strict = false takes what fits" in refused
    ended = train("second", checkpoint__initial_load_strict=False, **changes)
    assert ended.code == 0, ended.err
    assert "this run keeps its initial layers.0.moe.shared_experts.w1.weight" in ended.err
    assert records(tmp_path / "second")[0]["loss"] < records(tmp_path / "first")[0]["loss"] - 0.1


def test_weights_beside_a_state_of_another_size(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a balancer whose code has changed since: refused in a line that says how to take the weights alone."""

    def keeping(size: int) -> Callable[[], Balancer]:
        def init(num_experts: int) -> dict[str, torch.Tensor]:
            return {"mean": torch.zeros(num_experts, size)}

        return lambda: Balancer(no_loss, lambda load, bias, state: (bias, {"mean": state["mean"] + 1}), init=init)

    module = ModuleType("my_moe")
    monkeypatch.setitem(sys.modules, "my_moe", module)
    module.keeps = keeping(1)  # pyrefly: ignore
    on = {"balancer": {"my_moe:keeps": {}}, "training__steps": 2}
    assert train("first", **on).code == 0

    module.keeps = keeping(2)  # pyrefly: ignore
    on["checkpoint__initial_load_path"] = str(tmp_path / "first")
    ended = train("second", **on)
    assert ended.code == 2, ended.err
    (line,) = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert "balancer_state.my_moe:keeps/mean is (4, 1) there, (4, 2) here" in line
    assert line.endswith(
        ": checkpoint.initial_load_strict = false takes what fits, and leaves the rest as in a new run"
    )
    ended = train("second", **on, checkpoint__initial_load_strict=False)
    assert ended.code == 0, ended.err
    assert "this run keeps its initial layers.0.moe.balancer_state.my_moe:keeps/mean" in ended.err


def test_another_optimizer_on_the_way(train: Train, tmp_path: Path) -> None:
    """Refused in one line that says how; then the weights and the data go on, with a new optimizer."""
    few = {"validation__enable": False, "checkpoint__interval": 2}
    assert train(**few, training__steps=2).code == 0
    other = "--optimizer.expert.name shampoo --optimizer.expert.precondition_frequency 2"
    ended = train(more=f"{other} --job.allow_config_change", **few, training__steps=4)
    assert ended.code == 2, ended.err
    assert "AdamW there, shampoo (expert) + AdamW (router, embedding, norm, dense) here" in ended.err
    assert 'set checkpoint.exclude = ["optimizer"]' in ended.err
    ended = train(more=f"{other} --checkpoint.exclude optimizer", **few, training__steps=4)
    assert ended.code == 0, ended.err
    assert "with a new optimizer, as checkpoint.exclude says" in ended.err
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3, 4]
