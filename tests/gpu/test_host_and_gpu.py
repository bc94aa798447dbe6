"""Between the host and one GPU: batches that nobody waits for, times of steps, what is known of collectives."""

import itertools
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.gpu.harness import DEVICE, build, no_waits, one_gpu, one_process
from tests.tiny import adamw, balancers, batch
from titan_moe.data.cache import TokenFile
from titan_moe.data.loader import CPU, TrainLoader, WindowBatches, window_loader
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.runtime.profiling import start_timer
from titan_moe.runtime.watch import longest_wait, recorded
from titan_moe.step import train_step

pytestmark = one_gpu
HERE = torch.device(DEVICE)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_those_of_a_cpu(tmp_path: Path, workers: int) -> None:
    """Also from worker processes, which start while CUDA is in use; the host never waits for the device."""
    tokens = np.random.default_rng(0).integers(0, 999, 20_000, dtype=np.uint16)
    tokens.tofile(tmp_path / "train.bin")
    file = TokenFile(str(tmp_path / "train.bin"), "uint16", len(tokens))
    torch.ones(1, device=DEVICE)

    def loader(device: torch.device) -> TrainLoader:
        batches = WindowBatches(file, seq_len=64, seed=1, local_batch_size=8, dp_rank=0, dp_degree=1)
        return TrainLoader(lambda state: window_loader(batches, workers, device, state), "data", device=device)

    expected = list(itertools.islice(loader(CPU), 20))
    here = loader(HERE)
    batches = iter(here)
    with no_waits():
        found = [next(batches) for _ in expected]
    assert here.state_dict()["sequences"] == 20 * 8
    for ours, exact in zip(found, expected, strict=True):
        for part, want in zip(ours, exact, strict=True):
            assert part.device.type == DEVICE
            assert torch.equal(part.cpu(), want)


def test_times_of_steps_are_those_of_a_clock() -> None:
    """Ten steps without a wait in between, their times added up, against the host's clock around them."""
    with one_process():
        model = build(build_mesh(device=HERE, shard=1), dtype=torch.bfloat16)
        optimizer, own = adamw(model), balancers()
        micro = [tuple(part.to(DEVICE) for part in batch(0))]
        for count in (2, 10):  # two to warm up
            wait()
            begin, times = time.perf_counter(), []
            for _ in range(count):
                stop = start_timer(HERE)
                train_step(model, micro, optimizer, own, model.expert_biases(), max_norm=0.1)
                times.append(stop())
            wait()
            spent = time.perf_counter() - begin
    assert sum(seconds() for seconds in times) == pytest.approx(spent, rel=0.2)


def test_the_recorder_tells_collectives_that_wait_from_those_that_are_done() -> None:
    """One is under way while the GPU is busy with what comes before it, and done when the GPU is."""
    begin = time.time_ns()

    def waiting() -> tuple[str, float] | None:
        own = [entry for entry in recorded() if entry["time_created_ns"] >= begin]  # not of other tests' groups
        assert own
        return longest_wait(own, time.time_ns())

    with one_process():
        value = torch.ones(4, device=DEVICE)
        dist.all_reduce(value)
        wait()
        assert waiting() is None
        if DEVICE == "cuda":
            torch.cuda._sleep(2_000_000_000)  # cycles, a second or so
            dist.all_reduce(value)
            found = waiting()
            assert found is not None
            assert found[0].startswith("all_reduce #")
            assert 0 <= found[1] < 60
            wait()
            assert waiting() is None
