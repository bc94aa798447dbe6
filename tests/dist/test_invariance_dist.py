"""Every router with every balancer of the registries: a step of 2 and 4 ranks, in all layouts, equals one process."""

from typing import Any

import pytest

from tests.cases import ROUTER_CASES, Case
from tests.dist.harness import run_ranks
from tests.dist.layouts import LAYOUTS, apply
from tests.invariance import NOISE, assert_same, fresh, is_cut_router, outcome, partners
from titan_moe.model.transformer import Transformer

RUNNING = "aux_loss-scope=global_batch"
# In these layouts every router; in the others, which route in the same way, those with a form of their own.
ALL_ROUTERS = ("fsdp2", "ep2", "ep2_fsdp2")
SOME_ROUTERS = ("topk_softmax", "topk_softmax-capacity_factor=0.75", "expert_choice", "base")


def is_row(layout: str, router: Case) -> bool:
    return layout in ALL_ROUTERS or str(router) in SOME_ROUTERS


def rows(world: int) -> list[tuple[Case, list[Case], int]]:
    """Routers, balancers that go with them, and how many micro-batches of one process are the same as the ranks.

    As many as ranks for nearly all, also where a method is of the tokens of one forward pass. The running average of
    the loads sees all ranks at once, but micro-batches one after the other: it equals one micro-batch. Ranks draw
    other noise.
    """
    found = []
    for router in ROUTER_CASES:
        if router.arguments.keys() & NOISE:
            continue
        balancers = partners(router)
        found.append((router, [b for b in balancers if str(b) != RUNNING], world))
        running = [b for b in balancers if str(b) == RUNNING]
        if running and not is_cut_router(router):
            found.append((router, running, 1))
    return found


def on_ranks(rank: int, world: int) -> dict[tuple[str, int], dict[str, Any]]:
    results = {}
    for layout in LAYOUTS[world]:

        def wrap(model: Transformer, layout: str = layout) -> None:
            apply(model, world, layout)

        for i, (router, own, _) in enumerate(rows(world)):
            if is_row(layout, router):
                results[layout, i] = outcome(fresh(router, wrap, device="meta"), own, rank=rank, world=world)
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", LAYOUTS)
def test_ranks_equal_one_process(world: int) -> None:
    cases = rows(world)
    alone = [outcome(fresh(router), own, micro_batches=micro_batches) for router, own, micro_batches in cases]
    for result in run_ranks(world, on_ranks):
        for (layout, i), got in result.items():
            try:
                assert_same(got, alone[i])
            except AssertionError as error:
                router, balancers, _ = cases[i]
                raise AssertionError(f"{layout}, {router} with {[*map(str, balancers)]}: {error}") from None
