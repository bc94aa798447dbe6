"""What is due after a step, and how far a checkpoint says that a run had come."""

import io
import itertools
from typing import Any

import pytest
import torch

from titan_moe.config import load_config
from titan_moe.divergence import SkippedSteps
from titan_moe.resume import Progress, from_extra, to_extra
from titan_moe.train import Due, Retry, Timetable, due, timetable_of

STEPS = 12


def walk(timetable: Timetable, **changes: Any) -> list[Due]:
    """What is due after each step of a run that nothing stops and whose saves succeed."""
    arguments: dict[str, Any] = {"signal": False, "save_failed": False} | changes
    return [due(step, timetable, Retry(), **arguments) for step in range(1, timetable.last_step + 1)]


def steps_of(found: list[Due], name: str) -> list[int]:
    return [step for step, now in enumerate(found, start=1) if getattr(now, name)]


@pytest.mark.parametrize("freq", [1, 3, 5, 12, 100])
def test_each_thing_has_its_steps(freq: int) -> None:
    """Every so many steps, and after the last; never where it is off."""
    regular = [step for step in range(1, STEPS + 1) if step % freq == 0]
    with_last = sorted({*regular, STEPS})
    others = Timetable(STEPS, flush_freq=100, validation_freq=0, save_freq=0)
    for field, name in (("flush_freq", "flush"), ("validation_freq", "validate"), ("save_freq", "save")):
        found = walk(others._replace(**{field: freq}))
        assert steps_of(found, name) == with_last
        assert steps_of(found, "stop") == [STEPS]
        for other in {"validate", "save"} - {name}:
            assert steps_of(found, other) == []


@pytest.mark.parametrize(
    ("flush_freq", "validation_freq", "save_freq", "signal", "save_failed"),
    list(itertools.product([1, 4], [0, 1, 3], [0, 1, 5], [False, True], [False, True])),
)
def test_what_holds_of_every_step(
    flush_freq: int, validation_freq: int, save_freq: int, signal: bool, save_failed: bool
) -> None:
    """Numbers are written before the step is saved or validated; an end leaves a checkpoint to go on from."""
    timetable = Timetable(STEPS, flush_freq, validation_freq, save_freq)
    for step, now in enumerate(walk(timetable, signal=signal, save_failed=save_failed), start=1):
        last = step == STEPS
        assert now.flush >= max(now.validate, now.save, now.stop, step % flush_freq == 0)
        assert now.stop == (last or signal)
        assert now.save >= (now.stop and save_freq > 0)
        assert now.save <= (save_freq > 0)
        # a scheduler that waits for the end of the process gives no time for a validation that is not due
        assert now.validate == (validation_freq > 0 and (last or step % validation_freq == 0))
        quiet = due(step, timetable, Retry(), signal=False, save_failed=save_failed)
        assert now.retry == quiet.retry


def test_numbers_of_a_gpu_wait_for_a_line_that_somebody_reads() -> None:
    """On a CPU they are written at every step, for they cost nothing there."""
    config = load_config(
        [f"--training.steps={STEPS}", "--metrics.log_freq=5", "--validation.freq=4", "--checkpoint.interval=6"]
    )
    on_gpu = timetable_of(config, torch.device("cuda"))
    assert steps_of(walk(on_gpu), "flush") == [4, 5, 6, 8, 10, 12]
    assert steps_of(walk(timetable_of(config, torch.device("cpu"))), "flush") == list(range(1, STEPS + 1))


def test_what_is_off_is_never_due() -> None:
    off = load_config([f"--training.steps={STEPS}", "--validation.enable=false", "--checkpoint.enable=false"])
    found = walk(timetable_of(off, torch.device("cpu")), save_failed=True)
    assert steps_of(found, "validate") == steps_of(found, "save") == []


@pytest.mark.parametrize(
    ("disk_full", "told_after", "want"),
    [
        (range(0), 1, [10, 20, 30]),
        (range(10, 11), 1, [10, 11, 20, 30]),
        (range(10, 14), 1, [10, 11, 13, 17, 20, 30]),
        (range(10, 31), 1, [10, 11, 13, 17, 20, 21, 23, 27, 30]),
        (range(10, 14), 3, [10, 13, 17, 20, 30]),  # a thread says so later
    ],
)
def test_times_of_saves(disk_full: range, told_after: int, want: list[int]) -> None:
    """Every interval; after failures soon, then less and less often, and the interval begins anew."""
    timetable, retry, tried = Timetable(31, 1, 0, 10), Retry(), [0]
    for step in range(1, 31):
        save_failed = tried[-1] in disk_full and step >= tried[-1] + told_after
        now = due(step, timetable, retry, signal=False, save_failed=save_failed)
        retry = now.retry
        if now.save:
            tried.append(step)
    assert tried[1:] == want


def through_a_file(extra: dict[str, Any]) -> dict[str, Any]:
    """As a checkpoint is read: without running code from it, so without classes of ours."""
    buffer = io.BytesIO()
    torch.save(extra, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_progress_comes_back_from_a_checkpoint() -> None:
    choices = torch.arange(6, dtype=torch.int16).view(1, 3, 2)
    progress = Progress(9, 900, choices, validation_due=True, skipped=SkippedSteps(total=3, in_a_row=2))
    again = from_extra(9, through_a_file(to_extra(progress)))
    assert again.choices is not None
    assert torch.equal(again.choices, choices)
    assert again._replace(choices=None) == progress._replace(choices=None)
    assert isinstance(again.skipped, SkippedSteps)


def test_progress_of_checkpoints_of_before() -> None:
    """Their names and forms are these; what a version did not save yet is as in a new run."""
    saved = {"num_tokens": 64, "choices": None, "validates": True, "skipped": (4, 1), "data": {"sequences": 4}}
    whole = Progress(5, 64, None, validation_due=True, skipped=SkippedSteps(total=4, in_a_row=1))
    assert from_extra(5, through_a_file(saved)) == whole
    assert to_extra(whole) == {name: saved[name] for name in saved if name != "data"}
    assert from_extra(5, {"num_tokens": 64}) == Progress(5, 64)
    assert from_extra(5, {}) == Progress(5)
