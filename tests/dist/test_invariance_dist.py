"""Every router with every balancer of the registries: two ranks with FSDP2 equal one process."""

from typing import Any

import pytest
import torch

from tests.cases import ROUTER_CASES, Case
from tests.dist.harness import run_ranks
from tests.invariance import NOISE, assert_same, fresh, is_cut_router, outcome, partners
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.parallelize.parallelize import parallelize

RUNNING = "aux_loss-scope=global_batch"


def rows() -> list[tuple[Case, list[Case], int]]:
    """Routers, balancers that go with them, and how many micro-batches of one process are the same as two ranks.

    Two for nearly all, also where a method is of the tokens of one forward pass. The running average of the loads
    sees both ranks at once, but micro-batches one after the other: it equals one micro-batch. Ranks draw other noise.
    """
    found = []
    for router in ROUTER_CASES:
        if router.arguments.keys() & NOISE:
            continue
        balancers = partners(router)
        found.append((router, [b for b in balancers if str(b) != RUNNING], 2))
        running = [b for b in balancers if str(b) == RUNNING]
        if running and not is_cut_router(router):
            found.append((router, running, 1))
    return found


def on_two_ranks(rank: int, world: int) -> list[dict[str, Any]]:
    mesh = build_mesh(device=torch.device("cpu"), shard=world)

    def shard(model: Transformer) -> None:
        parallelize(
            model,
            mesh=mesh,
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            checkpoint_mode="none",
            compile_blocks=False,
        )

    return [outcome(fresh(router, shard, device="meta"), own, rank=rank, world=world) for router, own, _ in rows()]


@pytest.mark.dist
def test_two_ranks_equal_one() -> None:
    results = run_ranks(2, on_two_ranks)
    for i, (router, balancers, micro_batches) in enumerate(rows()):
        alone = outcome(fresh(router), balancers, micro_batches=micro_batches)
        for result in results:
            try:
                assert_same(result[i], alone)
            except AssertionError as error:
                raise AssertionError(f"{router} with {[*map(str, balancers)]}: {error}") from None
