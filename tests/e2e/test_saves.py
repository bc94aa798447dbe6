"""What a run saves and when: full disks, saves in the background, how many stay, the weights at the end."""

import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.e2e.harness import Ended, contents, records
from titan_moe.checkpoint import CheckpointError, load_model, store
from titan_moe.checkpoint.export import save_weights
from titan_moe.checkpoint.lazy import read_lazily

Train = Callable[..., Ended]


@contextmanager
def full_disk(limit: int) -> Iterator[None]:
    """Let no file grow above `limit` bytes: a write fails as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_full_disk_while_saving(train: Train, tmp_path: Path) -> None:
    """Training goes on with a warning until the last save, which is an error; what was saved before is intact."""
    assert train("whole", training__steps=8).code == 0
    assert train(more="--checkpoint.load_step -1", training__steps=8).code == 0
    folder = tmp_path / "run" / "checkpoint"
    for step in (6, 8):
        shutil.rmtree(folder / f"step-{step}")
    before = contents(folder)
    with full_disk(100_000):
        ended = train(training__steps=8)
    assert ended.code == 2
    *warnings, error = [line for line in ended.err.splitlines() if line.startswith(("warning", "error"))]
    for warning, step in zip(warnings, (6, 7), strict=True):  # the interval's, and again at the next step
        assert f"step-{step}" in warning
        assert "File too large" in warning
        assert "training goes on" in warning
    assert "step-8" in error
    assert "File too large" in error
    assert "earlier checkpoints are intact" in error
    assert "Traceback" not in ended.err
    assert contents(folder) == before

    ended = train(training__steps=8)
    assert ended.code == 0, ended.err
    assert f"resuming from {folder / 'step-4'}" in ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_failed_save_is_tried_again_soon(train: Train, tmp_path: Path, mode: str) -> None:
    """The disk is full for the first two saves: the third does not wait for the next interval, and nothing is lost."""
    few = {"training__steps": 9, "checkpoint__interval": 5, "validation__enable": False}
    assert train("whole", **few).code == 0
    write, tries = store.write_tensors, []

    def fail_twice(*arguments: Any) -> None:
        tries.append(0)
        if len(tries) <= 2:
            raise OSError(28, "No space left on device")
        write(*arguments)

    with mock.patch.object(store, "write_tensors", fail_twice):
        ended = train(checkpoint__async_mode=mode, **few)
    assert ended.code == 0, ended.err
    assert ended.err.count("training goes on, the save is tried again in the next steps") == 2
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    saved = {path.name for path in (tmp_path / "run" / "checkpoint").iterdir()}
    if mode == "disabled":
        assert saved == {"step-8", "step-9"}  # after 5 and 6; the last one is due anyway
    assert "step-9" in saved


def test_weights_in_another_type_at_the_end(train: Train, tmp_path: Path) -> None:
    """export/ has them rounded, beside checkpoints that go on to the bit; a type that cannot hold them is an error."""
    assert train("plain").code == 0
    assert not (tmp_path / "plain" / "export").exists()
    assert train(checkpoint__export_dtype="bfloat16").code == 0
    folder = tmp_path / "run"
    assert records(folder) == records(tmp_path / "plain")
    kept, rounded = load_model(folder)[0].state_dict(), load_model(folder / "export")[0].state_dict()
    for name, value in kept.items():
        expected = value if name.endswith("expert_bias") else value.bfloat16().float()
        assert torch.equal(rounded[name], expected), name
    kinds = {name: tensor.dtype for name, tensor in read_lazily(folder / "export" / "step-6").items()}
    assert {dtype for name, dtype in kinds.items() if not name.endswith("expert_bias")} == {torch.bfloat16}
    assert train(checkpoint__export_dtype="bfloat16", training__steps=8).code == 0
    assert [path.name for path in (folder / "export").iterdir()] == ["step-8"]

    def broken(*arguments: Any) -> Any:
        raise OSError(28, "No space left on device")

    with mock.patch.object(store, "publish", broken):
        ended = train(checkpoint__export_dtype="float16", training__steps=8)
    assert (ended.code, ended.err.count("error: cannot save")) == (2, 1), ended.err
    assert [path.name for path in (folder / "export").iterdir()] == ["step-8"]
    model = torch.nn.Linear(2, 2)
    model.weight.data.fill_(1e6)
    with pytest.raises(
        CheckpointError, match=r"^model\.weight holds values that float16 cannot: set checkpoint\.export"
    ):
        save_weights(tmp_path, 1, model=model, dtype=torch.float16, extra={}, files={})


def test_fewer_files_than_steps(train: Train, tmp_path: Path) -> None:
    """keep_latest_k checkpoints stay, the newest; an earlier one that stays can be gone back to."""
    assert train(checkpoint__keep_latest_k=2).code == 0
    folder = tmp_path / "run" / "checkpoint"
    assert {path.name for path in folder.iterdir()} == {"step-4", "step-6"}
    before = records(tmp_path / "run")
    assert train(checkpoint__keep_latest_k=2, more="--checkpoint.load_step 4").code == 0
    assert records(tmp_path / "run") == before


def test_saving_in_the_background(train: Train, tmp_path: Path) -> None:
    """The same run with the same checkpoints; each save says how long training waited."""
    assert train("plain").code == 0
    ended = train("async", checkpoint__async_mode="async")
    assert ended.code == 0, ended.err
    assert records(tmp_path / "async") == records(tmp_path / "plain")
    assert ended.err.count("of which training waited") == 2
    for step in (2, 4, 6):
        one, other = (load_model(tmp_path / run / "checkpoint" / f"step-{step}")[0] for run in ("plain", "async"))
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    shutil.rmtree(tmp_path / "async" / "checkpoint" / "step-6")
    assert train("async", checkpoint__async_mode="async").code == 0
    assert records(tmp_path / "async") == records(tmp_path / "plain")
