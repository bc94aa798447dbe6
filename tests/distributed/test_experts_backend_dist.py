"""A backend of one's own under FSDP2 and expert parallelism: plain tensors of this process's experts."""

from typing import Any

import pytest

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import on_meta, place
from tests.tiny import steps, tiny_model
from tests.unit.model.test_experts_backend import calls, one_by_one
from titan_moe.model.experts_backend import use_experts_backend

LAYOUTS = {"fsdp2": 4, "ep2": 2}  # experts that a process computes


def train_through(rank: int, world: int) -> dict[str, Any]:
    results = {}
    for layout in LAYOUTS:
        model = tiny_model(device="meta")
        use_experts_backend(model, one_by_one)
        on_meta(model, world, layout)
        calls.clear()
        losses = [float(output.loss) for output in steps(model, 2, **place(rank, world, layout))]
        results[layout] = losses, set(calls)
    return results


@pytest.mark.dist
def test_two_ranks() -> None:
    model = tiny_model()
    model.init_weights(0)
    expected = [float(output.loss) for output in steps(model, 2, micro_batches=2)]  # one of each rank
    for results in run_ranks(2, train_through):
        for layout, experts in LAYOUTS.items():
            losses, shapes = results[layout]
            assert losses == pytest.approx(expected, rel=1e-5)
            assert shapes == {(experts, 16, 16)}
