"""Saves in the background: what they hold, what they wait for, what a failure does; the verifying command."""

import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.checkpoint.test_store import Tiny, flip_bit, make, train
from tests.unit.convert.test_commands import _logger_as_before, run  # noqa: F401
from titan_moe.checkpoint import complete_steps, load_checkpoint, load_weights, save_checkpoint, store
from titan_moe.checkpoint.background import Saver, background_saver, foreground_saver
from titan_moe.checkpoint.verify import verify_checkpoint

PATIENCE = 20


def save(saver: Saver, folder: Path, step: int, model: Tiny, optimizer: torch.optim.Optimizer, **changes: Any) -> None:
    arguments = {"extra": {"position": step}, "files": {}, "keep_latest_k": 0, "wait": False} | changes
    saver.save(folder, step, model=model, optimizer=optimizer, **arguments)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """An event that writing waits for."""
    opened, write = threading.Event(), store.write_tensors

    def wait_and_write(*args: Any) -> None:
        assert opened.wait(PATIENCE)
        write(*args)

    monkeypatch.setattr(store, "write_tensors", wait_and_write)
    yield opened
    opened.set()


def test_training_goes_on_and_the_save_is_of_its_step(tmp_path: Path, gate: threading.Event) -> None:
    """Steps taken while the save is under way are not in it: not in weights, moments or random states."""
    model, optimizer = make()
    train(model, optimizer, 2)
    expected_state = {name: value.clone() for name, value in model.state_dict().items()}
    saver = background_saver()
    save(saver, tmp_path, 2, model, optimizer)
    assert not saver.failed()
    expected = train(model, optimizer, 3)
    assert complete_steps(tmp_path) == []
    gate.set()
    saver.finish()
    again, fresh = make(seed=4)
    assert load_checkpoint(tmp_path / "step-2", model=again, optimizer=fresh).extra == {"position": 2}
    assert all(torch.equal(value, expected_state[name]) for name, value in again.state_dict().items())
    assert train(again, fresh, 3) == expected
    save(saver, tmp_path, 5, model, optimizer)  # into the same memory
    saver.finish()
    load_checkpoint(tmp_path / "step-5", model=again)
    assert torch.equal(again.experts, model.experts)
    assert not torch.equal(again.experts, expected_state["experts"])


def test_the_next_save_and_one_that_must_be_there_wait(tmp_path: Path, gate: threading.Event) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    saver = background_saver()
    save(saver, tmp_path, 1, model, optimizer)
    threading.Timer(0.3, gate.set).start()
    save(saver, tmp_path, 2, model, optimizer)
    assert complete_steps(tmp_path)[:1] == [1]
    save(saver, tmp_path, 3, model, optimizer, wait=True, keep_latest_k=2)
    assert complete_steps(tmp_path) == [2, 3]


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("make_saver", "error"),
    [(foreground_saver, FULL), (background_saver, FULL), (background_saver, RuntimeError("a bug"))],
)
def test_a_failed_save_is_a_warning_and_the_next_one_tries_again(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    make_saver: Any,
    error: Exception,
) -> None:
    model, optimizer = make()
    train(model, optimizer, 1)
    saver = make_saver()
    save(saver, tmp_path, 1, model, optimizer)
    saver.finish()

    def fail(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(store, "write_tensors", fail)
        save(saver, tmp_path, 2, model, optimizer)
        saver.finish()
        assert saver.failed()
        assert [record.levelno for record in caplog.records if record.levelno >= logging.WARNING] == [logging.WARNING]
        assert str(error.args[-1]) in caplog.text
        assert "training goes on, the save is tried again in the next steps" in caplog.text
        with pytest.raises(type(error)):
            save(saver, tmp_path, 3, model, optimizer, wait=True)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    save(saver, tmp_path, 4, model, optimizer)
    saver.finish()
    assert not saver.failed()
    assert complete_steps(tmp_path) == [1, 4]


def test_weights_that_only_partly_fit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Strictly an error that lists the differences; else what fits is loaded, and both lists are told."""
    model, _ = make()
    arguments: dict[str, Any] = {"extra": {}, "files": {}, "keep_latest_k": 0}
    path = save_checkpoint(tmp_path, 1, model=model, optimizer=None, **arguments)
    other: Any = Tiny()
    other.output, other.more = torch.nn.Linear(8, 12), torch.nn.Linear(2, 2)
    before = other.output.weight.clone()
    with pytest.raises(ValueError, match=r"only here: model\.more\.weight, model\.more\.bias"):
        load_weights(path, model=other, strict=True)
    load_weights(path, model=other, strict=False)
    assert torch.equal(other.experts, model.experts)
    assert torch.equal(other.output.weight, before)
    assert "keeps its initial more.bias, more.weight, output.bias, output.weight" in caplog.text
    assert "does not use its output.bias, output.weight" in caplog.text


def test_verify_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, optimizer = make()
    arguments: dict[str, Any] = {"extra": {}, "files": {}, "keep_latest_k": 0}
    for step in (2, 10):
        save_checkpoint(tmp_path / "checkpoint", step, model=model, optimizer=optimizer, **arguments)
    assert run(verify_checkpoint, tmp_path) == (0, "")
    lines = capsys.readouterr().out.splitlines()
    assert [line.endswith(" MiB, intact") for line in lines] == [True, True]
    assert ["step-2: 4 files" in lines[0], "step-10: 4 files" in lines[1]] == [True, True]
    flip_bit(tmp_path / "checkpoint" / "step-2" / "__0_0.distcp")
    assert run(verify_checkpoint, tmp_path / "checkpoint") == (2, "error: 1 broken checkpoint\n")
    out = capsys.readouterr().out
    assert "file __0_0.distcp does not have its checksum" in out
    assert "step-10: 4 files" in out
    assert run(verify_checkpoint, tmp_path / "checkpoint" / "step-10")[0] == 0
    assert run(verify_checkpoint, tmp_path / "nowhere") == (2, f"error: {tmp_path / 'nowhere'}: no such folder\n")
    (tmp_path / "empty").mkdir()
    assert "no step-N folder" in run(verify_checkpoint, tmp_path / "empty")[1]
