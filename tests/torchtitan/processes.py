"""Start tests.torchtitan.side on one or several processes."""

import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]


def start(cases: dict[str, Any], folder: Path, world_size: int) -> dict[str, Any]:
    """Run the cases on `world_size` ranks; their results."""
    # The store is kept here, as torchrun keeps it: no process has to find a free port for each case.
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    given, result = folder / "cases.pt", folder / "results.pt"
    torch.save(cases, given)
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1"}
    address = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(store.port)}
    base = {**os.environ, **agent, **address}
    with ExitStack() as stack:
        logs = [stack.enter_context(open(folder / f"log-{rank}", "w+")) for rank in range(world_size)]
        ranks = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.torchtitan.side", str(given), str(result)],
                env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
                cwd=ROOT,
            )
            for rank, log in enumerate(logs)
        ]
        try:
            codes = [rank.wait(timeout=540) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        texts = [Path(log.name).read_text()[-3000:] for log in logs]
    assert codes == [0] * world_size, "\n".join(texts)
    return torch.load(result, weights_only=False)
