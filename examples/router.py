"""Routers of one's own: `[router] name = "examples.router:softplus"`, and `nearest`, which has parameters.

T tokens, E experts, K top_k, D dim, C width of the latent space.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.routing import ROUTERS, ParametricRouter, Router, Routing, make_routing


def softplus(*, top_k: int, power: float = 0.5) -> Router:
    """Score an expert by softplus(logit)^power, keep the top_k largest, weights that sum to 1."""
    if power <= 0:
        raise ValueError(f"router.power ({power}) must be above 0")

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        scores_TE = F.softplus(router_logits_TE) ** power
        # The bias of a loss-free balancer decides who is chosen; the weights never see it.
        biased_TE = scores_TE.detach() if expert_bias_E is None else scores_TE.detach() + expert_bias_E
        experts_TK = biased_TE.topk(top_k).indices
        weights_TK = F.normalize(scores_TE.gather(-1, experts_TK), p=1, dim=-1)
        return make_routing(router_logits_TE, F.normalize(scores_TE, p=1, dim=-1), weights_TK, experts_TK, scores_TE)

    return route


class DistanceLogits(nn.Module):
    """Minus the squared distances of tokens, projected to a latent space, to the experts' vectors in it, scaled."""

    def __init__(self, dim: int, num_experts: int, latent_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, latent_dim, bias=False)
        self.vectors = nn.Parameter(torch.empty(num_experts, latent_dim))
        self.scale = nn.Parameter(torch.empty(1))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        # |z - v|^2 = |z|^2 - 2 z v + |v|^2, of which the first is alike for all experts and changes no choice.
        latent_TC = self.project(x_TD)
        return self.scale * (2 * latent_TC @ self.vectors.t() - self.vectors.square().sum(-1))


def nearest(*, top_k: int, latent_dim: int = 16, temperature: float = 0.07) -> ParametricRouter:
    """Choose the experts whose vectors are nearest to the token, with the choice and the weights of `topk_softmax`."""
    route = ROUTERS["topk_softmax"](top_k=top_k, temperature=temperature)
    return ParametricRouter(route, lambda dim, num_experts: DistanceLogits(dim, num_experts, latent_dim))
