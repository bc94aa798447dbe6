"""Kill runs at random moments and see that nothing is lost: `python -m tests.soak.kills [--kills N] [--seed S]`.

Runs of one and of two processes, with saves in turn and in the background, are killed by SIGKILL (one in four by
SIGTERM) anywhere between their start and their end, and started again, until each is through; then everything that it
left must be to the bit what an uninterrupted run left. After every kill, every step that counts as complete must have
its checksums, and no completed step may be gone that the run was to keep.
"""

import argparse
import collections
import random
import shutil
import signal
import sys
import tempfile
import time
from os import kill
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from tests.e2e.harness import Command, contents, records, start_two, tiny_config, write_text
from titan_moe.checkpoint.folder import CheckpointError, scan, verify

STEPS = 24
OPTIONS = {
    "training.steps": STEPS,
    "training.global_batch_size": 4,
    "validation.freq": 5,
    "validation.steps": 2,
    "checkpoint.interval": 4,
    "data.num_workers": 0,
    "comm.init_timeout_seconds": 20,  # one that is left alone while it connects waits as long
}


class Layout(NamedTuple):
    """How a run is started."""

    ranks: int
    changes: dict[str, object]


LAYOUTS = {
    "one process": Layout(1, {}),
    "one process, async": Layout(1, {"checkpoint.async_mode": "async", "checkpoint.interval": 1}),
    "one process, workers": Layout(1, {"data.num_workers": 2}),
    "two processes": Layout(2, {}),
    "two processes, ep, async": Layout(
        2, {"checkpoint.async_mode": "async", "parallelism.expert_parallel_degree": 2, "optimizer.name": "muon"}
    ),
}


def start(layout: Layout, words: list[str], log: Path) -> list[Command]:
    """Start the processes of a run."""
    return start_two(words, log) if layout.ranks == 2 else [Command("train", words, log)]


def finish(commands: list[Command], number: int) -> list[int]:
    """Wait for the processes of a run, killing those that are left of a killed one; their exit codes."""
    if number == signal.SIGKILL:
        for command in commands:
            command.process.kill()
    return [command.end().code for command in commands]


def steps_of(folder: Path) -> set[int]:
    """The steps that are complete; CheckpointError where one of them is not what its checksums say."""
    complete, _ = scan(folder / "checkpoint")
    for path in complete.values():
        verify(path)
    return set(complete)


def one_kill(layout: Layout, words: list[str], folder: Path, draw: random.Random, seconds: float) -> tuple[bool, str]:
    """Start the run and kill it at a random moment of its `seconds`: whether it is through, and a fault or ''."""
    before = steps_of(folder)
    commands, limit = start(layout, words, folder.with_name("log")), time.monotonic() + draw.uniform(0, seconds)
    number = signal.SIGTERM if draw.random() < 0.25 else signal.SIGKILL
    while time.monotonic() < limit and any(command.process.is_alive() for command in commands):
        time.sleep(0.001)
    victim = draw.choice(commands)
    killed = victim.process.is_alive()
    if killed:
        assert victim.pid
        kill(victim.pid, number)
    codes = finish(commands, number if killed else 0)

    err = "\n".join(command.written(".err") for command in commands)
    expected = {0, 128 + number, -number} if killed else {0}
    expected |= {1} if killed and len(codes) > 1 else set()  # one that is left alone ends with a line
    noisy = killed and number == signal.SIGKILL  # whoever talked to the victim may complain
    if not set(codes) <= expected or ("Traceback" in err and not noisy):
        return False, f"exit codes {codes} after {number if killed else 'no signal'}: {err.strip()[-600:]}"
    after = steps_of(folder)
    if before and max(before) not in after and max(after, default=0) < max(before):
        return False, f"step {max(before)} was complete before the kill, and is not after it: {sorted(after)}"
    return codes == [0] * len(codes), ""


def difference(run: Path, whole: Path) -> str:
    """What a run left that an uninterrupted one did not; '' where nothing."""
    for kind in ("train", "validation"):
        mine, theirs = records(run, kind), records(whole, kind)
        if mine != theirs:
            return f"{kind} records differ: steps {[r['step'] for r in mine]} and {[r['step'] for r in theirs]}"
    last = Path("checkpoint") / f"step-{STEPS}"
    mine, theirs = ({n: b for n, b in contents(f / last).items() if n.endswith(".distcp")} for f in (run, whole))
    return "" if mine == theirs else f"the files of {last.name} differ"


def main() -> int:
    """Kill runs of all layouts in turn; exit 1 where there were faults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw, counts = random.Random(options.seed), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as made, tqdm(total=options.kills) as bar:
        root = Path(made)
        text = write_text(root / "text.jsonl")
        while bar.n < options.kills:
            for name, layout in LAYOUTS.items():
                run_to_the_end(name, layout, root, text, draw, counts, bar)
    print(f"{bar.n} kills: {dict(counts)}")
    return int(counts["faults"] > 0)


def run_to_the_end(
    name: str, layout: Layout, root: Path, text: Path, draw: random.Random, counts: collections.Counter[str], bar: tqdm
) -> None:
    """One run of a layout, killed until it is through, and compared with an uninterrupted one."""
    where = {"data.path": [str(text)], "data.cache_folder": str(root / "cache")}
    config = ["--job.config_file", str(tiny_config(root / "run.toml", {**where, **OPTIONS, **layout.changes}))]
    whole, run = root / f"whole {name}", root / "run"
    if not whole.exists():
        began = time.monotonic()
        codes = finish(start(layout, [*config, "--job.dump_folder", str(whole)], root / "log"), 0)
        assert codes == [0] * layout.ranks, (root / "log.err").read_text()
        (root / f"seconds {name}").write_text(str(time.monotonic() - began))
    seconds = float((root / f"seconds {name}").read_text())

    shutil.rmtree(run, ignore_errors=True)
    through = False
    while not through:
        try:
            through, fault = one_kill(layout, [*config, "--job.dump_folder", str(run)], run, draw, 1.5 * seconds)
        except CheckpointError as error:
            through, fault = False, str(error)
        if not through:
            counts[f"kills of {name}"] += 1
            bar.update()
        if fault:
            break
    fault = fault or difference(run, whole)
    counts["runs through"] += not fault
    if fault:
        counts["faults"] += 1
        tqdm.write(f"FAULT {name}: {fault}", file=sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
