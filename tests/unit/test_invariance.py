"""Every router with every balancer of the registries: a step is the same however it is cut and run.

The pairs come from the registries, so that a new component is in the matrix by existing.
"""

from functools import cache
from typing import Any

import pytest
import torch

from tests.cases import Case, draws_noise
from tests.invariance import (
    ALL_ROUTERS,
    BALANCER_CASES,
    CUT_BALANCERS,
    EVERYTHING,
    OWN_BALANCER,
    OWN_ROUTER,
    PAIRS,
    assert_same,
    fresh,
    is_cut_router,
    outcome,
    partners,
)
from titan_moe.balancer import BALANCERS
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.parallelize import parallelize

BY_NAME = {str(case): case for case in (*ALL_ROUTERS, *BALANCER_CASES)}
# What does not depend on how a step is cut, by its definition.
UNCUT = [(r, b) for r, b in PAIRS if not is_cut_router(r) and str(b) not in CUT_BALANCERS]


@cache
def whole(router: str, *balancers: str) -> dict[str, Any]:
    """The outcome of a step in one micro-batch, nothing wrapped."""
    return outcome(fresh(BY_NAME[router]), [BY_NAME[name] for name in balancers])


@pytest.mark.parametrize(("router", "balancer"), UNCUT, ids=str)
def test_four_micro_batches_equal_one(router: Case, balancer: Case) -> None:
    assert_same(outcome(fresh(router), [balancer], micro_batches=4), whole(str(router), str(balancer)))


@pytest.mark.parametrize("mode", ["full", "selective"])
@pytest.mark.parametrize("router", ALL_ROUTERS, ids=str)
def test_activation_checkpointing_changes_nothing(router: Case, mode: str) -> None:
    def checkpointed(model: Transformer) -> None:
        parallelize(
            model,
            mesh=None,
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            checkpoint_mode=mode,
            compile_blocks=False,
        )

    balancers = partners(router)
    got = outcome(fresh(router, checkpointed), balancers, micro_batches=2)
    assert_same(got, outcome(fresh(router), balancers, micro_batches=2))


def second_compiled(model: Transformer) -> None:
    """The second layer alone, which sees what the first gave: to make code for both takes longer and tests no more."""
    replacement: Any = torch.compile(model.layers.get_submodule("1"), fullgraph=True, backend="inductor")
    model.layers.register_module("1", replacement)


# By inductor, whose fusions have got wrong what a graph says right. SciPy's solver is no part of a graph.
FIRST = {case.name: case for case in reversed(ALL_ROUTERS)}
COMPILED = [*FIRST.values(), BY_NAME["topk_softmax-capacity_factor=0.75"], BY_NAME["topk_softmax-noise_std=0.5"]]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # as well
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")  # as well, in inductor
@pytest.mark.parametrize("router", COMPILED, ids=str)
def test_compiling_changes_nothing(router: Case) -> None:
    """With every balancer that goes with the router; noise is drawn as eager code draws it, so that it is the same."""
    torch.compiler.reset()
    with torch._inductor.config.patch(fallback_random=True):
        got = outcome(fresh(router, second_compiled), partners(router))
    assert_same(got, outcome(fresh(router), partners(router)))


def test_every_component_is_in_the_matrix() -> None:
    """And what is left out is left out by name, for a reason that holds: its outcome does depend on the cut."""
    assert {router.name for router, _ in PAIRS} == {*ROUTERS, OWN_ROUTER.name}
    assert {balancer.name for _, balancer in PAIRS} == {*BALANCERS, OWN_BALANCER.name, EVERYTHING.name}
    plain, z_loss = BY_NAME["topk_softmax"], BY_NAME["z_loss"]
    excluded = [(plain, BY_NAME[name]) for name in CUT_BALANCERS]
    excluded += [(case, z_loss) for case in ALL_ROUTERS if is_cut_router(case) and not draws_noise(case)]
    for router, balancer in excluded:
        with pytest.raises(AssertionError):
            assert_same(outcome(fresh(router), [balancer], micro_batches=4), whole(str(router), str(balancer)))
