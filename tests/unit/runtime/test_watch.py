"""What the watch makes of the flight recorder and of errors; whole processes are in tests/e2e/test_faults.py."""

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from titan_moe.runtime import command, errors, watch, world


def entry(**changes: Any) -> dict[str, Any]:
    given = {"profiling_name": "nccl:_all_gather_base", "collective_seq_id": 7, "process_group": ["3", "ep"]}
    return {**given, "state": "scheduled", "retired": False, "time_created_ns": 10**9, **changes}


def test_the_oldest_that_is_not_done() -> None:
    done = [entry(retired=True), entry(state="completed")]
    assert watch.longest_wait(done, 10**10) is None
    waiting = entry(time_created_ns=3 * 10**9, profiling_name="gloo:all_reduce")
    found = watch.longest_wait([*done, entry(time_created_ns=5 * 10**9), waiting], 10**10)
    assert found == ("all_reduce #7 of group ep", 7.0)


def test_a_wait_beyond_the_limit_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    old = entry(time_created_ns=time.time_ns() - 5 * 10**9)
    monkeypatch.setattr(watch, "recorded", lambda: [old])
    messages: list[str] = []
    with watch.watching(watch.Watch(limit_seconds=0.2, step=9), messages.append):
        limit = time.monotonic() + 20
        while not messages and time.monotonic() < limit:
            time.sleep(0.01)
    assert messages[0].startswith("step 9, rank 0: _all_gather_base #7 of group ep is under way for 5 s")
    messages.clear()
    with watch.watching(watch.Watch(limit_seconds=60), messages.append):
        time.sleep(0.3)
    assert not messages


def test_groups_that_are_not_connected_end_the_process_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "3")
    messages: list[str] = []
    begin = time.monotonic()
    with watch.watching(watch.Watch(0.6), messages.append), watch.connecting("connecting 8 processes"):
        while not messages and time.monotonic() < begin + 20:
            time.sleep(0.001)
    assert messages[0].startswith("before the first step, rank 3: connecting 8 processes is under way for 1 s")
    assert time.monotonic() - begin > 0.6
    messages.clear()
    with watch.watching(watch.Watch(0.1), messages.append):
        time.sleep(0.3)
    assert not messages


def test_groups_that_fail_to_connect() -> None:
    with (
        pytest.raises(errors.CollectiveError, match=r"step, rank 0: connecting the meshes failed: .*peer") as caught,
        watch.watching(watch.Watch(10.0)),
        watch.connecting("connecting the meshes"),
    ):
        raise RuntimeError("[/a/gloo/pair.cc:537] Connection closed by peer [::1]:1")
    assert "collective" not in str(caught.value)
    with pytest.raises(RuntimeError, match="of ours") as ours, watch.connecting("connecting the meshes"):
        raise RuntimeError("a fault of ours")
    assert not isinstance(ours.value, errors.CollectiveError)
    assert watch.connecting_for() is None


def test_errors_of_collectives_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "recorded", lambda: [entry()])
    with (
        pytest.raises(errors.CollectiveError, match=r"step 2, rank 0: _all_gather_base #7 of group ep failed: .*peer"),
        watch.watching(watch.Watch(10.0, step=2)),
    ):
        raise RuntimeError("[/a/gloo/pair.cc:537] Connection closed by peer [::1]:1")
    with pytest.raises(errors.CollectiveError), watch.watching(watch.Watch(10.0)):
        raise dist.DistBackendError("NCCL error: remote process exited")
    with pytest.raises(RuntimeError, match="shape") as caught, watch.watching(watch.Watch(10.0)):
        raise RuntimeError("shape '[2]' is invalid")
    assert not isinstance(caught.value, errors.CollectiveError)


@pytest.mark.parametrize(
    ("shared", "restarts", "warns"), [("True", "3", True), ("False", "3", False), ("True", "0", False)]
)
def test_restarts_on_a_shared_store(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, shared: str, restarts: str, warns: bool
) -> None:
    monkeypatch.setattr(command.logger, "propagate", True)
    for name, value in {
        "TORCHELASTIC_USE_AGENT_STORE": shared,
        "TORCHELASTIC_MAX_RESTARTS": restarts,
        "RANK": "0",
    }.items():
        monkeypatch.setenv(name, value)
    world.caution_restarts()
    assert ("TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in caplog.text) == warns


def test_where_a_thread_is_names_a_file_of_any_folder_of_the_package() -> None:
    names: dict[str, object] = {"line_of": watch.line_of, "thread": threading.current_thread()}
    step = str(Path(watch.__file__).parents[1] / "step.py")
    exec(compile("def train_step():\n    return line_of(thread)", step, "exec"), names)
    assert eval("train_step()", names) == "in step.py:2 train_step"
