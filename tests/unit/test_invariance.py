"""Every router with every balancer of the registries: a step is the same however it is cut and run.

The pairs come from the registries, so that a new component is in the matrix by existing.
"""

from functools import cache, partial
from typing import Any

import pytest
import torch

from tests.cases import Case, draws_noise
from tests.invariance import (
    ALL_ROUTERS,
    BALANCER_CASES,
    CUT_BALANCERS,
    EVERYTHING,
    NOISY_BALANCERS,
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


def compiled(model: Transformer, backend: str) -> None:
    """As parallelize does, with a choice of backend."""
    for name, block in model.layers.named_children():
        replacement: Any = torch.compile(block, fullgraph=True, backend=backend)
        model.layers.register_module(name, replacement)


# aot_eager makes the same graphs as inductor and is quick to start. Inductor itself is for where choices are dropped:
# its fusions have got that wrong. Compiled code draws other noise; SciPy's solver is no part of a graph.
FIRST = {case.name: case for case in reversed(ALL_ROUTERS) if not draws_noise(case)}
COMPILED = [(case, "aot_eager") for case in FIRST.values()]
COMPILED += [
    (BY_NAME["topk_softmax-capacity_factor=0.75"], "inductor"),
    *((FIRST[name], "inductor") for name in ("threshold", "token_rounding", "causal_bias", "emo")),
]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # as well
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")  # as well, in inductor
@pytest.mark.parametrize(("router", "backend"), COMPILED, ids=str)
def test_compiling_changes_nothing(router: Case, backend: str) -> None:
    torch.compiler.reset()
    balancers = [balancer for balancer in partners(router) if str(balancer) not in NOISY_BALANCERS]
    got = outcome(fresh(router, partial(compiled, backend=backend)), balancers)
    assert_same(got, outcome(fresh(router), balancers))


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
