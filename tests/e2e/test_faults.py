"""Processes that die, hang or differ: the others end with one line, and torchrun's restart costs nothing but time."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Arguments
from tests.e2e.harness import PATIENCE, Command, free_port, records, start_two

ROOT = Path(__file__).parents[2]
STEPS, FORWARDS = 8, 2  # calls of the router in a step: one for each layer
OPTIONS = {"training__steps": STEPS, "validation__enable": False, "checkpoint__interval": 2}


def faulty(how: str, step: int, marker: Path) -> dict[str, Any]:
    """Changes to the configuration that take rank 1 down in the middle of a step."""
    call = FORWARDS * (step - 1) + 2
    return {"router": {"name": "tests.e2e.faults:router", "how": how, "at_call": call, "marker": str(marker)}}


def error_line(command: Command) -> str:
    """The one line of its error, with nothing after it and no stack."""
    ended = command.end()
    assert ended.code == 1, ended.err
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, ended.err
    assert "Traceback" not in ended.err
    return errors[0]


@pytest.mark.dist
def test_a_process_that_dies(arguments: Arguments, tmp_path: Path) -> None:
    words = arguments(**OPTIONS, **faulty("dies", 4, tmp_path / "marker"))
    commands = start_two(words, tmp_path / "log")
    line = error_line(commands[0])
    assert commands[1].end().code == -signal.SIGKILL
    assert line.startswith("error: step 4, rank 0: ")
    assert "failed: another process died" in line
    assert "all_gather" in line or "all_reduce" in line or "reduce_scatter" in line
    assert [record["step"] for record in records(tmp_path / "run")] == [1, 2, 3]


@pytest.mark.dist
def test_a_process_that_hangs(arguments: Arguments, tmp_path: Path) -> None:
    limit = {"comm.train_timeout_seconds": 3}
    words = arguments(**OPTIONS, **faulty("hangs", 3, tmp_path / "marker"), **limit)
    commands = start_two(words, tmp_path / "log")
    line = error_line(commands[0])
    commands[1].process.kill()
    assert line.startswith("error: step 3, rank 0: ")
    assert "is under way for" in line
    assert "limit of 3 s" in line
    assert "of group" in line
    assert "step.py" in line


@pytest.mark.dist
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_dies_before_it_is_connected(arguments: Arguments, tmp_path: Path, rank: int) -> None:
    """The other one, which has the store or looks for it, ends at the limit and not when torch gives up."""
    words = arguments(**OPTIONS, **{"comm.init_timeout_seconds": 3})
    command = start_two(words, tmp_path / "log", ranks=[rank])[0]
    begin = time.monotonic()
    line = error_line(command)
    assert time.monotonic() - begin < 40  # 3 of them for the limit; torch's own is 63
    assert line.startswith(f"error: before the first step, rank {rank}: connecting 2 processes is under way for 3 s")
    assert "job.py" in line or "world.py" in line


@pytest.mark.dist
def test_a_process_that_dies_before_a_later_group_is_connected(arguments: Arguments, tmp_path: Path) -> None:
    """Rank 1 builds no model, so that rank 0 waits for it to make the group of background saves."""
    limit = {"comm.init_timeout_seconds": 3, "checkpoint.async_mode": "async"}
    router = {"name": "tests.e2e.faults:router", "how": "dies", "at_call": 0, "marker": str(tmp_path / "marker")}
    commands = start_two(arguments(**OPTIONS, router=router, **limit), tmp_path / "log")
    assert commands[1].end().code == -signal.SIGKILL
    begin = time.monotonic()
    line = error_line(commands[0])
    assert time.monotonic() - begin < 40
    assert line.startswith("error: before the first step, rank 0: connecting the group that saves is under way for 3 s")


@pytest.mark.dist
def test_processes_with_different_configurations(arguments: Arguments, tmp_path: Path) -> None:
    commands = start_two(arguments(**OPTIONS), tmp_path / "log", second=["--optimizer.lr", "1e-4"])
    ended = [command.end() for command in commands]
    assert [end.code for end in ended] == [2, 2]
    assert "error: ranks have different configurations: optimizer.lr is 0.005 on rank 0" in ended[0].err
    assert "0.0001 on rank 1" in ended[0].err
    assert not (tmp_path / "run").exists()


def start_node(node: int, endpoint: str, words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """One torchrun of two, as on two machines."""
    launcher = f"--nnodes 2 --nproc_per_node 1 --node_rank {node} --max_restarts 2 --rdzv_backend c10d --rdzv_id faults"
    command = [sys.executable, "-m", "torch.distributed.run", *launcher.split(), "--rdzv_endpoint", endpoint]
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with open(log, "wb") as file:
        return subprocess.Popen(
            [*command, "--local_addr", "127.0.0.1", "-m", "titan_moe.train", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, **here},
            start_new_session=True,
        )


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_worker_costs_the_steps_since_the_last_checkpoint(
    arguments: Arguments, train: Any, tmp_path: Path
) -> None:
    """Two nodes; one worker is killed with -9 in step 6, the last checkpoint is of step 4."""
    words = arguments(**OPTIONS, **faulty("dies", 6, tmp_path / "marker"))
    endpoint = f"127.0.0.1:{free_port()}"
    nodes = [start_node(node, endpoint, words, tmp_path / f"node-{node}") for node in (0, 1)]
    try:
        codes = [node.wait(2 * PATIENCE) for node in nodes]
    finally:
        for node in nodes:
            if node.poll() is None:
                os.killpg(node.pid, signal.SIGKILL)
    logs = [(tmp_path / f"node-{node}").read_text() for node in (0, 1)]
    assert codes == [0, 0], logs
    assert (tmp_path / "marker").exists()
    assert any(f"resuming from {tmp_path / 'run' / 'checkpoint' / 'step-4'}" in log for log in logs)
    assert any("error: step 6, rank " in log for log in logs)
    assert not any("warning: torchrun" in log for log in logs)

    assert train("whole", **OPTIONS).code == 0
    for after, undisturbed in zip(records(tmp_path / "run"), records(tmp_path / "whole"), strict=True):
        assert after == pytest.approx(undisturbed, rel=1e-5)
