"""Our MoE layer and torchtitan's, imported, at the same weights: outputs to 1e-6, gradients to 1e-5, in fp32."""

from typing import Any

import pytest
import torch

from titan_moe.model.moe import MoE
from titan_moe.model.routing import ROUTERS

D, F, E, T = 32, 16, 8, 48


@pytest.fixture(scope="module")
def side() -> Any:
    """torchtitan's parts; importing it warns of what torch will drop."""
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.torchtitan import cpu

        cpu._stand_in_for_triton()
        from tests.torchtitan import side
    return side


# our router and its arguments; torchtitan's; top_k; whether there is a bias, a shared expert
LAYERS = [
    ("sigmoid", {}, {"score_func": "sigmoid", "route_norm": True}, 2, False, False),
    ("sigmoid", {"norm_topk": False, "score_scale": 2.5}, {"score_func": "sigmoid", "route_scale": 2.5}, 2, True, True),
    (
        "sigmoid",
        {"num_groups": 4, "topk_groups": 2},
        {"score_func": "sigmoid", "route_norm": True, "num_expert_groups": 4, "num_limited_groups": 2},
        4,  # torchtitan rates a group by its 2 best experts, we by K / topk_groups
        True,
        False,
    ),
    ("topk_softmax", {}, {"score_func": "softmax", "route_norm": True}, 2, False, True),
    ("softmax_topk", {}, {"score_func": "softmax"}, 1, False, False),
]


@pytest.mark.parametrize(("name", "ours", "theirs", "top_k", "has_bias", "shared"), LAYERS)
@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_layers_agree(
    side: Any, name: str, ours: dict[str, Any], theirs: dict[str, Any], top_k: int, has_bias: bool, shared: bool
) -> None:
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
    router = make_router_config(dim=D, num_experts=E, gate_param_init={}, top_k=top_k, **theirs)
    ffn = make_ffn_config(dim=D, hidden_dim=F, w1_param_init={}, w2w3_param_init={}) if shared else None
    their = make_moe_config(num_experts=E, router=router, routed_experts=experts, shared_experts=ffn).build()
    our = MoE(
        dim=D,
        num_experts=E,
        expert_dim=F,
        route=ROUTERS[name](top_k=top_k, **ours),
        num_shared_experts=int(shared),
        expert_bias=has_bias,
    )
    pairs = {
        "router.weight": their.router.gate.weight,
        **{f"experts.{w[:2]}": getattr(their.routed_experts.inner_experts, w) for w in ("w1_EFD", "w2_EDF", "w3_EFD")},
    }
    if shared:
        pairs |= {f"shared_experts.{w}.weight": getattr(their.shared_experts, w).weight for w in ("w1", "w2", "w3")}
    own = dict(our.named_parameters())
    assert own.keys() == pairs.keys()
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(torch.randn(parameter.shape) * (0.5 if "router" in key else 0.2))
            pairs[key].copy_(parameter)
        if has_bias:
            our.expert_bias.copy_(torch.linspace(-0.3, 0.3, E))
            their.expert_bias_E.copy_(our.expert_bias)
    x = torch.randn(2, T // 2, D)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    (y, routing), z = our(inputs[0]), their(inputs[1])
    torch.testing.assert_close(y, z, rtol=0, atol=1e-6)
    assert torch.equal(routing.tokens_per_expert.float(), their.tokens_per_expert_E)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (z * weights).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=0, atol=1e-5)
    for key, parameter in own.items():
        torch.testing.assert_close(
            parameter.grad, pairs[key].grad, rtol=0, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}"
        )
