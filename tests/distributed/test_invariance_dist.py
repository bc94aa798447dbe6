"""Every router with every balancer of the registries: a step of 2 and 4 ranks, in all layouts, equals one process."""

from functools import partial
from typing import Any
from unittest.mock import ANY

import pytest
import torch

from tests.cases import OF_SEQUENCES, Case, draws_noise
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, apply, degrees_of, place
from tests.invariance import (
    ALL_ROUTERS,
    EVERYTHING,
    NOISY_BALANCERS,
    OWN_ROUTER,
    assert_same,
    fresh,
    is_cut_router,
    outcome,
    partners,
)
from titan_moe.model.transformer import Transformer

RUNNING = "aux_loss-scope=global_batch"
OF_A_PASS = {"entropy_loss-form=batch", "score_variance"}
# In these layouts every router; in the others, which route in the same way, those with a form of their own.
LAYOUTS_OF_ALL = ("fsdp2", "ep2", "ep2_fsdp2")
SOME_ROUTERS = (
    *("topk_softmax", "topk_softmax-capacity_factor=0.75", "expert_choice", "base", "mlp", "threshold"),
    *("token_rounding-tile=4-rounding=nearest", "causal_bias", "emo-min_pool=3-max_pool=3", str(OWN_ROUTER)),
)


def is_row(layout: str, router: Case) -> bool:
    return layout in LAYOUTS_OF_ALL or str(router) in SOME_ROUTERS


def rows(world: int, layout: str) -> list[tuple[Case, list[Case], int]]:
    """Routers, balancers that go with them, and how many micro-batches of one process are the same as the ranks.

    As many as ranks have different sequences for nearly all, also where a method is of the tokens of one forward pass;
    unless it has parts of sequences there. The running average of the loads sees all ranks at once, but micro-batches
    one after the other: it equals one micro-batch. Ranks draw other noise.
    """
    degrees, found = degrees_of(world, layout), []
    cuts_sequences = degrees.per_sequence > 1
    for router in ALL_ROUTERS:
        needs_whole = is_cut_router(router) or router.name in OF_SEQUENCES
        if draws_noise(router) or not is_row(layout, router) or (cuts_sequences and needs_whole):
            continue
        balancers = [b for b in partners(router) if not (cuts_sequences and str(b) in OF_A_PASS)]
        balancers = [b for b in balancers if str(b) not in NOISY_BALANCERS]
        found.append((router, [b for b in balancers if str(b) != RUNNING], degrees.data))
        running = [b for b in balancers if str(b) == RUNNING]
        if running and not is_cut_router(router):
            found.append((router, running, 1))
    return found


def on_ranks(rank: int, world: int) -> dict[tuple[str, int], dict[str, Any]]:
    results = {}
    for layout in LAYOUTS[world]:

        def wrap(model: Transformer, layout: str = layout) -> None:
            apply(model, world, layout)

        for i, (router, own, _) in enumerate(rows(world, layout)):
            results[layout, i] = outcome(fresh(router, wrap, device="meta"), own, **place(rank, world, layout))
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    alone: dict[str, dict[str, Any]] = {}
    for result in run_ranks(world, on_ranks):
        for (layout, i), got in result.items():
            router, balancers, micro_batches = rows(world, layout)[i]
            name = f"{router} with {[*map(str, balancers)]}, {micro_batches} micro-batches"
            if name not in alone:
                alone[name] = outcome(fresh(router), balancers, micro_batches=micro_batches)
            try:
                assert_same(got, alone[name])
            except AssertionError as error:
                raise AssertionError(f"{layout}, {name}: {error}") from None


# Layers in which a part of the choices costs nothing. With the second bias a token's first choice is an identity
# expert's, with the third both are: no rank has a row for any expert.
IDENTITY, BIASES = 2, {"none": 0.0, "half": (0, 0, 0, 0, -9.0, 9.0), "all": (0, 0, 0, 0, 9.0, 9.0)}
WITH_BIAS = [Case("aux_loss", {"scope": "global_batch_exact"}), Case("aux_loss", {"scope": "sequence"})]
WITH_BIAS += [Case("z_loss", {}), Case("loss_free", {"rule": "quantile"}), EVERYTHING]


def with_identity_experts(bias: str, **own: Any) -> dict[str, Any]:
    model = fresh(Case("softmax_topk", {}), num_identity_experts=IDENTITY, num_shared_experts=1, **own.pop("fresh", {}))
    for buffer in model.expert_biases():
        buffer.copy_(torch.tensor(BIASES[bias]))
    return outcome(model, WITH_BIAS, **own)


def identity_on_ranks(rank: int, world: int) -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (layout, bias): with_identity_experts(
            bias,
            fresh={"wrap": partial(apply, world=world, layout=layout), "device": "meta"},
            **place(rank, world, layout),
        )
        for layout in LAYOUTS[world]
        for bias in BIASES
    }


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_with_identity_experts_equal_one_process(world: int) -> None:
    alone = {bias: with_identity_experts(bias) for bias in BIASES}
    loads = {bias: one["load"].sum(-1).tolist() for bias, one in alone.items()}  # of two layers
    assert loads == {"none": ANY, "half": [128, 128], "all": [0, 0]}
    for result in run_ranks(world, identity_on_ranks):
        for (layout, bias), got in result.items():
            try:
                assert_same(got, alone[bias])
            except AssertionError as error:
                raise AssertionError(f"{layout}, bias {bias}: {error}") from None
