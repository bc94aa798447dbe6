"""Run titan_moe's commands as a user does: in this process (fast) or in one of their own (signals, exit codes)."""

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import tomli_w
import torch

from titan_moe.runtime.command import run_command

PATIENCE = 240  # seconds that a process may take before the test fails
STARTED: list[BaseProcess] = []  # what a test has started; its end kills what is left

TINY: dict[str, dict[str, Any]] = {
    "model": {"dim": 32, "num_layers": 2, "num_heads": 2, "ffn_dim": 64},
    "moe": {"num_experts": 4, "expert_dim": 32},
    "balancer": {
        "aux_loss": {"coeff": 0.1},
        "z_loss": {"coeff": 0.001},
        "entropy_loss": {"coeff": 0.01},
        "loss_free": {"rate": 0.01},
    },
    "optimizer": {"lr": 5e-3},
    "lr_scheduler": {"warmup_steps": 2},
    "training": {
        "steps": 6,
        "seq_len": 16,
        "local_batch_size": 2,
        "global_batch_size": 4,
        "mixed_precision_param": "float32",
    },
    "data": {"dataset": "text", "tokenizer": "bytes", "validation_fraction": 0.1},
    "validation": {"freq": 3},
    "checkpoint": {"interval": 2, "keep_latest_k": 0},
    "metrics": {"log_freq": 1, "enable_tensorboard": False},
}


class Ended(NamedTuple):
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


def write_text(path: Path, documents: int = 120) -> Path:
    """A small jsonl corpus of sentences with some regularity."""
    draw = random.Random(0)
    words = "the cat sat on a mat while some dog ran far from our big red house ünder blue sky"
    texts = [" ".join(draw.choices(words.split(), k=30)) + "." for _ in range(documents)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def tiny_config(path: Path, changes: Mapping[str, Any] | None = None) -> Path:
    """TINY with `changes` by dotted key (None takes a key or a table away), as a TOML file."""
    document = json.loads(json.dumps(TINY))
    for key, value in (changes or {}).items():
        *tables, last = key.split(".")
        table = document
        for name in tables:
            table = table.setdefault(name, {})
        if value is None:
            table.pop(last, None)
        else:
            table[last] = value
    path.write_text(tomli_w.dumps(document), encoding="utf-8")
    return path


def command(verb: str, args: list[str]) -> Ended:
    """`python -m titan_moe.VERB ARGS` in this process, through `run_command`."""
    module = importlib.import_module(f"titan_moe.{verb}")
    out, err = io.StringIO(), io.StringIO()
    code = None
    with (
        mock.patch.object(sys, "argv", [f"{verb}.py", *args]),
        mock.patch("faulthandler.enable"),  # wants a file with a descriptor, for good
        mock.patch("titan_moe.runtime.command.end_process", sys.exit),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            run_command(module.main)
        except SystemExit as exit_:
            code = exit_.code
    assert isinstance(code, int)
    return Ended(code, out.getvalue(), err.getvalue())


def _process(verb: str, args: list[str], log: str, environment: dict[str, str]) -> None:
    os.setpgrp()  # so that a test can signal it with its children, as a terminal does
    os.environ.update(environment)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that nobody has forked
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log + suffix, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    sys.argv = [f"{verb}.py", *args]
    run_command(importlib.import_module(f"titan_moe.{verb}").main)


class Command:
    """A command in a process of its own, forked from a server that has imported torch already."""

    def __init__(self, verb: str, args: list[str], log: Path, environment: dict[str, str] | None = None) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["titan_moe.train"])
        self.log = str(log)
        for suffix in (".out", ".err"):
            Path(self.log + suffix).unlink(missing_ok=True)
        self.process: BaseProcess = context.Process(target=_process, args=(verb, args, self.log, environment or {}))
        self.process.start()
        STARTED.append(self.process)

    @property
    def pid(self) -> int:
        """Its process id, which is that of its group, too."""
        assert self.process.pid is not None
        return self.process.pid

    def wait_for(self, happened: Callable[[], bool]) -> None:
        """Return as soon as `happened()`; fail when the process ends before."""
        limit = time.monotonic() + PATIENCE
        while not happened():
            assert self.process.is_alive(), f"it ended too early:\n{self.written('.err')}"
            assert time.monotonic() < limit, f"it took too long:\n{self.written('.err')}"
            time.sleep(0.0005)

    def end(self) -> Ended:
        """Wait for its end; the code of one that a signal killed is minus the signal."""
        self.process.join(PATIENCE)
        code = self.process.exitcode
        assert code is not None, f"it did not end:\n{self.written('.err')}"
        return Ended(code, self.written(".out"), self.written(".err"))

    def written(self, suffix: str) -> str:
        """What it has written so far to `.out` or `.err`."""
        path = Path(self.log + suffix)
        return path.read_text(encoding="utf-8") if path.exists() else ""


def free_port() -> str:
    """A port that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def start_two(
    words: list[str],
    log: Path,
    *,
    second: Sequence[str] = (),
    ranks: Sequence[int] = (0, 1),
    verb: str = "train",
    world_size: int = 2,
) -> list[Command]:
    """Start two processes, or some ranks of `world_size`, as torchrun does; all but the first with more arguments."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(world_size)}
    given = [words, *[[*words, *second]] * (world_size - 1)]
    return [
        Command(verb, given[i], log.with_name(f"log-{i}"), {**place, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in ranks
    ]


def end_two(commands: list[Command]) -> list[int]:
    """Wait for both; their exit codes."""
    return [command.end().code for command in commands]


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The lines of a kind in the metrics.jsonl of a run, without the kind and what depends on the clock."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    left_out = {"kind", "tokens_per_second", "step_seconds", "data_seconds", "peak_memory_gib"}
    return [{k: v for k, v in line.items() if k not in left_out} for line in lines if line["kind"] == kind]


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
