"""titan_moe's routers in torchtitan's MoE layer: the numbers of our own layer, in fp32, forward and backward."""

import copy
import warnings
from typing import Any

import pytest
import torch

from titan_moe.model.moe import MoE
from titan_moe.model.routing import ROUTERS, Places
from titan_moe.model.transformer import fill

D, F, E, B, S = 32, 16, 8, 2, 24

# Arguments that use what a router can do; each name of the registry once at least.
TABLES: list[tuple[str, int, dict[str, Any]]] = [
    ("topk_softmax", 2, {"temperature": 0.7, "capacity_factor": 1.1}),
    ("topk_softmax", 2, {"jitter": 0.1, "noise_std": 0.1}),
    ("softmax_topk", 2, {"num_groups": 4, "topk_groups": 2}),
    ("switch", 1, {"capacity_factor": 1.0, "drop_policy": "score"}),
    ("sigmoid", 2, {"norm_topk": False, "score_scale": 2.5}),
    ("expert_choice", 2, {}),
    ("base", 1, {}),
    ("sinkhorn", 2, {}),
    ("cosine", 2, {"latent_dim": 8}),
    ("mlp", 2, {"latent_dim": 8, "order": "topk_softmax"}),
    ("prototype", 2, {"latent_dim": 8, "temperature": 0.5}),
    ("threshold", 2, {"max_k": 3}),
    ("token_rounding", 2, {"tile": 4}),
    ("causal_bias", 2, {"rate": 0.05}),
    ("emo", 2, {"min_pool": 3}),
    ("examples.router:nearest", 2, {}),
]
NO_BIAS = ("expert_choice", "base", "sinkhorn")


@pytest.fixture(scope="module")
def side() -> Any:
    """torchtitan's parts; importing it warns of what torch will drop."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.torchtitan import cpu

        cpu._stand_in_for_triton()
        from tests.torchtitan import side
    return side


def their_config(side: Any, top_k: int, *, bias: bool, shared: bool) -> Any:
    from torchtitan.models.common.config_utils import (
        make_ffn_config,
        make_moe_config,
        make_routed_experts_config,
        make_router_config,
    )

    experts = make_routed_experts_config(
        dim=D, hidden_dim=F, num_experts=E, top_k=top_k, param_init={}, comm_backend="standard"
    )
    experts.inner_experts = side.derive(experts.inner_experts, side.Float32Experts.Config)
    router = make_router_config(dim=D, num_experts=E, gate_param_init={}, top_k=top_k)
    ffn = make_ffn_config(dim=D, hidden_dim=F, w1_param_init={}, w2w3_param_init={}) if shared else None
    config = make_moe_config(num_experts=E, router=router, routed_experts=experts, shared_experts=ffn)
    config.load_balance_coeff = 1e-3 if bias else None
    return config


def their_layer(
    side: Any, name: str, top_k: int, arguments: dict[str, Any], *, bias: bool, shared: bool, moe: Any = None
) -> Any:
    """Without a name it has torchtitan's own router."""
    from torchtitan_patches.moe import DispatchedMoE, OwnRouter, add_identity_experts

    config = their_config(side, top_k, bias=bias, shared=shared)
    config = side.derive(config, DispatchedMoE.Config)
    if name:
        table = {"name": name, **arguments}
        config.router = side.derive(config.router, OwnRouter.Config, table=table, layer_name="layers.3.moe")
    if moe:
        add_identity_experts(config, moe["num_identity_experts"])
        experts, dropped = config.routed_experts, side.Float32DroppedExperts.Config
        experts.inner_experts = side.derive(experts.inner_experts, dropped, dropout=moe["expert_dropout"])
    return config.build()


def builder(name: str) -> Any:
    from titan_moe.config import find_component

    return find_component(ROUTERS, name)


RENAMED = {"router.gate.": "router.", "routed_experts.inner_experts.": "experts.", "_EFD": "", "_EDF": ""}


def our_name(name: str) -> str:
    for theirs, ours in RENAMED.items():
        name = name.replace(theirs, ours)
    return name


def pair(side: Any, name: str, top_k: int, arguments: dict[str, Any], moe: Any = None) -> tuple[MoE, Any]:
    """Our layer and torchtitan's with the same router, weights and bias; without a name torchtitan's own."""
    bias, shared = name not in NO_BIAS, name == "sigmoid"
    theirs = their_layer(side, name, top_k, arguments, bias=bias, shared=shared, moe=moe)
    if not name:
        name, arguments = "sigmoid", {"norm_topk": False}
    ours = MoE(
        dim=D,
        num_experts=E,
        expert_dim=F,
        route=builder(name)(top_k=top_k, **arguments),
        layer=3,
        num_shared_experts=int(shared),
        expert_bias=bias,
        **(moe or {}),
    )
    own = dict(ours.named_parameters())
    assert {our_name(key) for key, _ in theirs.named_parameters()} == own.keys()
    with torch.no_grad():
        for key, parameter in theirs.named_parameters():
            fill(parameter, 0.5 if "router" in key else 0.2, key, 0)
            own[our_name(key)].copy_(parameter)
        if bias:
            theirs.expert_bias_E.copy_(torch.linspace(-0.1, 0.1, len(theirs.expert_bias_E)))
            ours.expert_bias.copy_(theirs.expert_bias_E)
    return ours, theirs


def places() -> Places:
    documents = torch.tensor([[0] * 10 + [1] * 14, [0] * 3 + [1] * 9 + [2] * 12])
    return Places(torch.arange(S).expand(B, S), documents)


def test_every_router_is_here() -> None:
    assert {name for name, _, _ in TABLES if ":" not in name} == ROUTERS.keys()


@pytest.mark.parametrize(("name", "top_k", "arguments"), TABLES)
def test_the_layer_is_ours(side: Any, name: str, top_k: int, arguments: dict[str, Any]) -> None:
    ours, theirs = pair(side, name, top_k, arguments)
    theirs.router.places = places()
    check_layers(ours, theirs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize(("name", "top_k"), [("", 2), ("softmax_topk", 4), ("threshold", 2), ("base", 1), ("mlp", 2)])
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_the_layer_with_identity_experts_and_dropout_is_ours(side: Any, name: str, top_k: int, dropout: float) -> None:
    """Evaluation drops nothing."""
    moe = {"num_identity_experts": 3, "expert_dropout": dropout}
    ours, theirs = pair(side, name, top_k, {"latent_dim": 8} if name == "mlp" else {}, moe)
    check_layers(ours, theirs)
    assert theirs.tokens_per_expert_E.shape == (E + 3,)
    assert theirs.tokens_per_expert_E[E:].sum() > 0
    with torch.device("meta"):
        made = their_layer(
            side, name, top_k, {"latent_dim": 8} if name == "mlp" else {}, bias=True, shared=False, moe=moe
        )
    made.to_empty(device="cpu")
    made._init_self_buffers()
    assert torch.equal(made.expert_bias_E, torch.zeros(E + 3))
    assert torch.equal(made.tokens_per_expert_E, torch.zeros(E + 3))


def check_layers(ours: MoE, theirs: Any) -> None:
    x = torch.randn(B, S, D)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    torch.manual_seed(1)  # of noise
    y, routing = ours(inputs[0], places())
    torch.manual_seed(1)
    z = theirs(inputs[1])
    torch.testing.assert_close(z, y, rtol=0, atol=1e-6)
    assert torch.equal(theirs.tokens_per_expert_E, routing.tokens_per_expert.float())

    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=0, atol=1e-5)
    own = dict(ours.named_parameters())
    for key, parameter in theirs.named_parameters():
        expected = own[our_name(key)].grad
        assert (parameter.grad is None) == (expected is None), key
        if expected is not None:
            torch.testing.assert_close(
                parameter.grad, expected, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
            )

    theirs.eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x), ours(x, places())[0], rtol=0, atol=1e-6)
    assert torch.equal(theirs.tokens_per_expert_E, routing.tokens_per_expert.float())


def test_with_torchtitans_router_the_dispatch_changes_nothing(side: Any) -> None:
    from torchtitan_patches.moe import DispatchedMoE

    config = their_config(side, 2, bias=True, shared=True)
    stock, ours = copy.deepcopy(config).build(), side.derive(config, DispatchedMoE.Config).build()
    with torch.no_grad():
        for key, parameter in stock.named_parameters():
            fill(parameter, 0.2, key, 0)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(B, S, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast, on a CPU
        y, z = stock(x), ours(x)
    torch.testing.assert_close(z, y, rtol=0, atol=1e-6)
    assert torch.equal(ours.tokens_per_expert_E, stock.tokens_per_expert_E)
    weights = torch.randn_like(y)
    for result in (y, z):
        (result * weights).sum().backward()
    for (key, expected), (_, found) in zip(stock.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=0, atol=1e-5, msg=lambda t, key=key: f"{key}: {t}")


def test_own_parameters_begin_by_name_and_seed(side: Any) -> None:
    """Made without memory, as torchtitan makes models, and filled as titan_moe fills its own."""
    torch.manual_seed(5)
    with torch.device("meta"):
        layer = their_layer(side, "mlp", 2, {"latent_dim": 8}, bias=True, shared=False)
    layer.to_empty(device="cpu")
    torch.randn(3)  # whatever was drawn before
    with torch.no_grad():
        layer.router.init_states()
    prefix = "layers.3.moe.router.gate."
    for name, parameter in layer.router.gate.named_parameters():
        expected = torch.empty_like(parameter)
        fill(expected, 0.02, prefix + name, 5)
        assert torch.equal(parameter, expected), name
    assert (layer.router.gate.norm.weight == 1).all()
    assert (layer.router.gate.w1.bias == 0).all()


def test_a_router_without_places_says_so(side: Any) -> None:
    layer = their_layer(side, "emo", 2, {}, bias=True, shared=False)
    with pytest.raises(ValueError, match="the router asks for places: turn it on with `enable`"):
        layer(torch.randn(B, S, D))
