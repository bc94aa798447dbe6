"""scripts/slurm/train.sbatch against stand-ins for SLURM's commands and torchrun."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "slurm" / "train.sbatch"
TORCHRUN = r"""echo "$@" > "$RECORD/torchrun"; echo "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" >> "$RECORD/torchrun"
trap 'echo saved > "$RECORD/saved"; exit 1' TERM
for _ in $(seq "${LASTS:-600}"); do sleep 0.05; done
exit "${CODE:-0}"
"""
COMMANDS = {
    "bin/srun": 'echo $$ > "$RECORD/pid"; shift; exec "$@"\n',
    "bin/scancel": '[[ "$*" == "--signal=TERM 77" ]] && kill -TERM "$(cat "$RECORD/pid")"\n',
    "bin/scontrol": r"""case "$1 $2" in
"show hostnames") printf 'node1\nnode2\n' ;;
"show job") echo "PreemptEligibleTime=now PreemptTime=${PREEMPT:-None}" ;;
"requeue 77") echo requeued > "$RECORD/requeued" ;;
esac
""",
    "venv/bin/torchrun": TORCHRUN,
}
Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path) -> Start:
    for name, text in COMMANDS.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{text}")
        path.chmod(0o755)

    def run(**environment: str) -> "subprocess.Popen[bytes]":
        job = {"SLURM_JOB_ID": "77", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        here = {"RECORD": str(tmp_path), "VENV": str(tmp_path / "venv"), "SLURM_SUBMIT_DIR": str(tmp_path)}
        path = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        command = ["bash", str(SCRIPT), "--job.config_file", "x.toml"]
        return subprocess.Popen(command, env={**os.environ, **job, **here, **path, **environment})

    return run


def test_start_and_end(start: Start, tmp_path: Path) -> None:
    assert start(LASTS="1", NPROC="4").wait(30) == 0
    words, store = (tmp_path / "torchrun").read_text().splitlines()
    assert "--nnodes 2 --nproc_per_node 4 --max_restarts 3" in words
    assert "--rdzv_endpoint node1:29500 -m titan_moe.train --job.config_file x.toml" in words
    assert store == "1"
    assert not (tmp_path / "requeued").exists()


def test_a_fault_is_not_requeued(start: Start, tmp_path: Path) -> None:
    assert start(LASTS="1", CODE="1").wait(30) == 1
    assert not (tmp_path / "requeued").exists()


def test_preemption_of_the_step_is_requeued(start: Start, tmp_path: Path) -> None:
    assert start(LASTS="1", CODE="1", PREEMPT="2026-01-01T00:00:00").wait(30) == 0
    assert (tmp_path / "requeued").exists()


def test_sigterm_saves_and_requeues(start: Start, tmp_path: Path) -> None:
    job = start()
    limit = time.monotonic() + 30
    while not (tmp_path / "torchrun").exists():
        assert time.monotonic() < limit
        time.sleep(0.02)
    time.sleep(0.1)  # until its trap is set
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 0
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").exists()
