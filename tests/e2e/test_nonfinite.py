"""Runs with steps that are not finite, and with validations that fail: what is saved, said, and gone on from."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.harness import Ended, records
from titan_moe import train as train_module
from titan_moe import validate as validate_module

Train = Callable[..., Ended]
OPTIONS = {"training__steps": 6, "checkpoint__interval": 2, "validation__freq": 2, "validation__steps": 1}
DENSE = {"moe__num_experts": 0, "balancer": None}


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> dict[int, Callable[[Any], Any]]:
    """By step what is done to the model before it, once."""
    step, todo = train_module.train_step, {}

    def faulty(model: Any, *args: Any, progress: float, **options: Any) -> Any:
        handle = todo.pop(round(progress * OPTIONS["training__steps"]), lambda _: None)(model)
        output = step(model, *args, progress=progress, **options)
        if handle is not None:
            handle.remove()
        return output

    monkeypatch.setattr(train_module, "train_step", faulty)
    return todo


def poison(model: Any) -> Any:
    return model.layers[1].attention.wq.weight.register_hook(lambda gradient: gradient * torch.nan)


def poison_and_stop(model: Any) -> Any:
    os.kill(os.getpid(), signal.SIGTERM)
    return poison(model)


def last_line(ended: Ended, code: int = 2) -> str:
    assert ended.code == code, ended.err
    return ended.err.splitlines()[-1]


def assert_same(run: Path, whole: Path) -> None:
    for kind in ("train", "validation"):
        assert records(run, kind) == records(whole, kind)


@pytest.mark.parametrize("changes", [{}, DENSE, {"optimizer__name": "muon"}], ids=["moe", "dense", "muon"])
def test_the_last_good_step_is_named_and_gone_on_from(
    train: Train, faults: dict[int, Any], tmp_path: Path, changes: dict[str, Any]
) -> None:
    faults[5] = poison
    line = last_line(train(**OPTIONS, **changes))
    folder = tmp_path / "run" / "checkpoint"
    assert line.startswith(
        "error: step 5: grad_norm nan, NaN or infinite gradient of layers.1.attention.wq.weight: the step was skipped"
    )
    assert f"the last checkpoint is step 4 at {folder}/step-4 (job.allow_config_change = true" in line
    assert [path.name for path in sorted(folder.iterdir())] == ["step-2", "step-4"]
    assert records(tmp_path / "run")[-1]["step"] == 5
    assert records(tmp_path / "run")[-1]["grad_norm"] is None

    assert train(**OPTIONS, **changes).code == 0
    assert train("whole", **OPTIONS, **changes).code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(("step", "last"), [(1, "no checkpoint was saved"), (6, "is step 4 at ")])
def test_the_first_and_the_last_step(
    train: Train, faults: dict[int, Any], tmp_path: Path, step: int, last: str
) -> None:
    faults[step] = poison
    line = last_line(train(**OPTIONS, checkpoint__async_mode="async"))
    assert line.startswith(f"error: step {step}: grad_norm nan")
    assert last in line
    assert not (tmp_path / "run" / "checkpoint" / f"step-{step}").exists()


def test_skipped_steps_are_counted_across_a_resume(train: Train, faults: dict[int, Any], tmp_path: Path) -> None:
    """The data of a skipped step is used up, the schedule goes on, and a run that was stopped after one counts on."""
    options = {**OPTIONS, "training__skip_nonfinite_steps": 2}
    faults.update({2: poison, 3: poison_and_stop, 6: poison})
    assert train(**options).code == 128 + signal.SIGTERM
    assert train(**options).code == 0
    run = records(tmp_path / "run")
    assert [line["skipped_steps"] for line in run] == [0, 1, 2, 2, 2, 3]
    assert [line["step"] for line in run if line["grad_norm"] is None] == [2, 3, 6]
    assert [line["num_tokens"] for line in run] == [64 * step for step in range(1, 7)]
    assert run[0]["param_norm"] == run[1]["param_norm"] == run[2]["param_norm"] != run[3]["param_norm"]

    faults.update({2: poison, 3: poison, 6: poison})
    assert train("whole", **options).code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")

    faults.update({2: poison, 3: poison_and_stop, 4: poison})
    assert train("three", **options).code == 128 + signal.SIGTERM
    line = last_line(train("three", **options))
    assert "as 3 in a row were, and training.skip_nonfinite_steps allows 2" in line
    assert f"the last checkpoint is step 3 at {tmp_path / 'three'}" in line


class ValidationError(RuntimeError):
    """What a compiler or a device may say."""


@pytest.mark.parametrize("mode", ["disabled", "async"])
@pytest.mark.parametrize("function", ["probe", "evaluate"])
def test_a_fault_in_validation_costs_nothing(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, mode: str
) -> None:
    """The step is saved before; a resume makes up for the validation, and drifts are as if nothing had been."""
    options = {**OPTIONS, "checkpoint__async_mode": mode}
    calls, real = [], getattr(validate_module, function)

    def failing(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise ValidationError
        return real(*args)

    with monkeypatch.context() as patched:
        patched.setattr(validate_module, function, failing)
        with pytest.raises(ValidationError):
            train(**options)
    assert (tmp_path / "run" / "checkpoint" / "step-4").is_dir()
    assert [line["step"] for line in records(tmp_path / "run", "validation")] == [2]
    ended = train(**options)
    assert "step-4" in ended.err
    assert train("whole", **OPTIONS).code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_was_stopped_at_a_validation_goes_on_without_it(
    train: Train, faults: dict[int, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was validated is not validated again, and the next drift is measured from it.

    A compiled model sees training's shape before that of the validation, as in a run that nothing stopped.
    """
    rehearsed, rehearse = [], validate_module.rehearse
    monkeypatch.setattr(validate_module, "compiles", lambda *_: True)
    monkeypatch.setattr(
        validate_module, "rehearse", lambda model, *pair: rehearsed.append(pair[0].shape) or rehearse(model, *pair)
    )
    faults[4] = lambda _: os.kill(os.getpid(), signal.SIGTERM)
    assert train(**OPTIONS).code == 128 + signal.SIGTERM
    assert [line["step"] for line in records(tmp_path / "run", "validation")] == [2, 4]
    assert train(**OPTIONS).code == 0
    assert rehearsed == [(2, 16)]
    assert train("whole", **OPTIONS).code == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    assert "routing_drift" in records(tmp_path / "run", "validation")[-1]


def test_a_validation_that_is_not_finite_names_the_checkpoint_before(
    train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own step is saved: the weights are finite, and which of both is at fault is the user's to find out."""
    real, calls = validate_module.evaluate, []

    def diverging(*args: Any) -> Any:
        calls.append(args)
        output = real(*args)
        return output._replace(loss_sum=output.loss_sum * (torch.nan if len(calls) == 2 else 1))

    monkeypatch.setattr(validate_module, "evaluate", diverging)
    line = last_line(train(**OPTIONS))
    assert line.startswith("error: step 4: validation loss nan: the run has diverged and stops")
    assert (
        f"the last checkpoint before it is step 2 at {tmp_path / 'run' / 'checkpoint' / 'step-2'}: "
        "go back with checkpoint.load_step = 2"
    ) in line
    assert (tmp_path / "run" / "checkpoint" / "step-4").is_dir()
