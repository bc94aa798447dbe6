"""What must not depend on how a step is cut or run: every router with every balancer of the registries.

`is_cut_router` and `CUT_BALANCERS` name what by its definition depends on the tokens of one forward pass on one rank;
it is left out of comparisons of other cuts, and of those alone.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.cases import ROUTER_CASES, WHOLE_BATCH, Case, build, cases, draws_noise, takes_bias, top_k_of
from tests.tiny import batch, own_part, tiny_model
from titan_moe.balancer import BALANCERS
from titan_moe.config.checks import check_combinations
from titan_moe.config.sections import Component, Config, Moe
from titan_moe.dry_run import check_parts
from titan_moe.metrics import maxvio
from titan_moe.model.transformer import Transformer
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer.load_lr import expand_load_lr, rate_factors
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.mesh import Degrees
from titan_moe.runtime.dtensor import gathered
from titan_moe.step import train_step

# Of the examples one with parameters of its own, and one that keeps a state.
OWN_ROUTER, OWN_BALANCER = Case("examples.router:nearest", {"latent_dim": 8}), Case("examples.balancer:rprop", {})
ALL_ROUTERS = [*ROUTER_CASES, OWN_ROUTER]
# And a balancer that sees everything that a balancer may see.
EVERYTHING = Case("tests.parts:everything", {})
BALANCER_CASES = [*cases(BALANCERS), OWN_BALANCER, EVERYTHING]
BUILT = {str(case): build(BALANCERS, case.name, **case.arguments) for case in BALANCER_CASES}
INITS = {name: balancer.init for name, balancer in BUILT.items() if balancer.init is not None}
MEASURES = {name: balancer.measure for name, balancer in BUILT.items() if balancer.measure is not None}
NOISY_BALANCERS = {"erc": "ranks and micro-batches draw other noise"}
RATES = expand_load_lr({"load_lr": "ideal_normalized"}, top_k=1)


def is_cut_router(case: Case) -> bool:
    """It looks at all tokens of a forward pass, or has a capacity for them, or draws noise for them."""
    return case.name in WHOLE_BATCH or "capacity_factor" in case.arguments or draws_noise(case)


CUT_BALANCERS = {
    **NOISY_BALANCERS,
    "aux_loss": "scope micro_batch is of the tokens of one forward pass on one rank",
    "aux_loss-scope=global_batch": "the running average is of the micro-batches so far",
    "entropy_loss-form=batch": "the mean is over the tokens of one forward pass on one rank",
    "score_variance": "the mean is over the tokens of one forward pass on one rank",
}


def fits(router: Case, balancer: Case) -> bool:
    """Whether the configuration lets them together; what it refuses has its own tests, as has the dry run."""
    if balancer == OWN_BALANCER and not takes_bias(router.name):
        return False
    arguments = {"scope": "micro_batch", **balancer.arguments} if balancer.name == "aux_loss" else balancer.arguments
    config = Config(
        moe=Moe(top_k=top_k_of(router.name), num_experts=4),
        router=Component(router.name, router.arguments),
        balancer={balancer.name: arguments},
    )
    try:
        check_combinations(config)
        if balancer != EVERYTHING and (str(balancer) in MEASURES or BUILT[str(balancer)].project is not None):
            check_parts(config)  # which routers and experts it can look at
    except ValueError:
        return False
    return True


PAIRS = [(router, balancer) for router in ALL_ROUTERS for balancer in BALANCER_CASES if fits(router, balancer)]


def partners(router: Case) -> list[Case]:
    """The balancers that go with a router."""
    return [balancer for other, balancer in PAIRS if other == router]


def measures_of(router: Case) -> dict[str, Any]:
    """What those balancers measure that go with a router."""
    return {str(case): MEASURES[str(case)] for case in partners(router) if str(case) in MEASURES}


def fresh(
    router: Case, wrap: Callable[[Transformer], None] | None = None, device: str = "cpu", **sizes: int
) -> Transformer:
    """A model, of two layers unless `sizes` say otherwise, with selection biases and states that are not 0."""
    more = {"num_kv_heads": 2, "balancer_inits": INITS, "measures": measures_of(router), **sizes}
    model = tiny_model(router, device=device, **more)
    if wrap is not None:
        wrap(model)
        model.to_empty(device="cpu")
    start(model)
    return model


def start(model: Any) -> None:
    """Initial weights, and selection biases and states that are not 0."""
    model.init_weights(0)
    states = [layer for of in model.balancer_states().values() for layers in of.values() for layer in layers]
    for bias in [*model.expert_biases(), *states]:
        bias.copy_(torch.linspace(-0.05, 0.05, bias.numel()))


def outcome(
    model: Any,
    balancers: Sequence[Case],
    *,
    micro_batches: int = 1,
    rank: int = 0,
    world: int = 1,
    sequences: int = 8,
    degrees: Degrees | None = None,
    sequence_group: dist.ProcessGroup | None = None,
) -> dict[str, Any]:
    """Everything that a step of plain SGD makes: losses, norm, loads, MaxVio, biases, gradients by the new weights."""
    torch.manual_seed(0)
    built = {str(case): build(BALANCERS, case.name, **case.arguments) for case in balancers}
    projected = any(balancer.project is not None for balancer in built.values())
    weighed = {name: (1.0 if balancer.moves_bias else 0.5, balancer) for name, balancer in built.items()}
    tokens, labels = own_part(batch(0, sequences), rank, world, degrees)
    micro = list(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
    sgd = Optimizer.around(torch.optim.SGD(model.parameters(), lr=1.0))
    gradients: dict[str, Tensor] = {}
    names = {p: plain_name(name) for name, p in model.named_parameters()}
    sgd.register_step_pre_hook(lambda *_: gradients.update({n: full(p.grad) for p, n in names.items()}))
    options = {"max_norm": 0.0, "sequence_group": sequence_group, "balancer_states": model.balancer_states()}
    output = train_step(model, micro, sgd, weighed, model.expert_biases(), **options)
    return {
        "loss": output.loss,
        "total_loss": output.total_loss,
        "balance": dict(output.balance_losses),
        "grad_norm": output.grad_norm,
        "load": output.load,
        "maxvio": maxvio(output.load),
        "rates": rate_factors(output.load, torch.ones(output.load.shape), RATES)[0],
        "routing": output.routing_means,
        "nonfinite": output.nonfinite,
        "state": {
            name: {key: [layer.clone() for layer in layers] for key, layers in state.items()}
            for name, state in model.balancer_states().items()
        },
        "bias": [bias.clone() for bias in model.expert_biases()],
        "routers": {name: full(p) for p, name in names.items() if ".router." in name and projected},
        "gradients": gradients,
    }


def full(parameter: Tensor) -> Tensor:
    return gathered(parameter).detach().clone()


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """Integers alike, numbers to 1e-5, every parameter's gradient to 1e-5 of its norm."""
    numbers = [{key: value for key, value in one.items() if key != "gradients"} for one in (got, want)]
    torch.testing.assert_close(*numbers, rtol=1e-5, atol=1e-6)
    assert got["gradients"].keys() == want["gradients"].keys()
    for name, gradient in want["gradients"].items():
        error = torch.linalg.vector_norm(got["gradients"][name] - gradient) / torch.linalg.vector_norm(gradient)
        assert error <= 1e-5, f"gradient of {name}: off by {error:.1e} of its norm"
