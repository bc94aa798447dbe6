"""Routers with parameters of their own: another function than a matrix gives the logits.

Choice and weights are those of `topk_softmax` or `softmax_topk`, by the order of the two operations.

Shapes: T tokens, E experts, K top_k, D dim, C width of the latent space.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.routing.common import ParametricRouter, Router, check_top_k
from titan_moe.model.routing.token_choice import softmax_topk, topk_softmax

Order = Literal["softmax_topk", "topk_softmax"]


class CosineLogits(nn.Module):
    """Cosines of the tokens, projected to a latent space, and the experts' vectors in it, over a temperature."""

    def __init__(self, dim: int, num_experts: int, latent_dim: int, temperature: float) -> None:
        super().__init__()
        self.initial_temperature = temperature
        self.project = nn.Linear(dim, latent_dim, bias=False)
        self.vectors = nn.Parameter(torch.empty(num_experts, latent_dim))
        self.temperature = nn.Parameter(torch.empty(1))  # as a multiple of the initial one, so that it begins at 1

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        latent_TC = F.normalize(self.project(x_TD), dim=-1)
        cosines_TE = latent_TC @ F.normalize(self.vectors, dim=-1).t()
        return cosines_TE / (self.initial_temperature * self.temperature)


class MlpLogits(nn.Module):
    """A projection to a latent space, RMSNorm, and three layers with GELU between them."""

    def __init__(self, dim: int, num_experts: int, latent_dim: int) -> None:
        super().__init__()
        self.project = nn.Linear(dim, latent_dim)
        self.norm = nn.RMSNorm(latent_dim, eps=1e-5)
        self.w1 = nn.Linear(latent_dim, latent_dim)
        self.w2 = nn.Linear(latent_dim, latent_dim)
        self.w3 = nn.Linear(latent_dim, num_experts, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        h_TC = F.gelu(self.w1(self.norm(self.project(x_TD))))
        return self.w3(F.gelu(self.w2(h_TC)))


class PrototypeLogits(nn.Module):
    """Cosines of the tokens, encoded in a latent space, and the experts' prototypes in it."""

    def __init__(self, dim: int, num_experts: int, latent_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.encode = nn.Linear(dim, latent_dim)
        self.prototypes = nn.Parameter(torch.empty(num_experts, latent_dim))

    def forward(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E)."""
        latent_TC = self.encode(F.silu(self.norm(x_TD)))
        return F.normalize(latent_TC, dim=-1) @ F.normalize(self.prototypes, dim=-1).t()


def cosine(
    *, top_k: int, latent_dim: int = 16, temperature: float = 0.07, order: Order = "softmax_topk"
) -> ParametricRouter:
    """Choose the experts whose vectors have the largest cosines with the token in a latent space.

    logits_i = cos(W x, e_i) / tau, W (C, D) and e_i (C,), with C = `latent_dim`; tau is learned and begins at
    `temperature`. Choice and weights are those of `order`. Source: X-MoE (Chi et al., 2022), whose code normalises e_i
    alone and has a constant scale. Raises ValueError for a top_k, latent_dim or temperature that is not above 0.
    """
    _check_latent_dim(latent_dim)
    check_top_k(top_k, temperature)
    return ParametricRouter(
        _choice(order, top_k), lambda dim, num_experts: CosineLogits(dim, num_experts, latent_dim, temperature)
    )


def mlp(*, top_k: int, latent_dim: int = 256, order: Order = "softmax_topk") -> ParametricRouter:
    """Score the experts by an MLP of the token.

    logits = W3 gelu(W2 gelu(W1 rmsnorm(W0 x + b0) + b1) + b2), of width C = `latent_dim`. Choice and weights are those
    of `order`. Source: the router of ZAYA1 (Zyphra, 2025) without its average over layers and without its expert that
    skips. Raises ValueError for a top_k or latent_dim that is not above 0.
    """
    _check_latent_dim(latent_dim)
    return ParametricRouter(_choice(order, top_k), lambda dim, num_experts: MlpLogits(dim, num_experts, latent_dim))


def prototype(*, top_k: int, latent_dim: int = 16, temperature: float = 1.0) -> ParametricRouter:
    """Choose the experts whose prototypes have the largest cosines with the token's code in a latent space.

    logits_i = cos(W silu(layernorm(x)) + b, p_i), p_i (C,) with C = `latent_dim`; weights = softmax over the chosen of
    logits / `temperature`. Source: latent prototype routing (Yang, 2025), the forward of its code with similarity
    Cosine, which knows no temperature and goes by the code's mean. Its variance and its three losses are not here.
    Raises ValueError for a top_k, latent_dim or temperature that is not above 0.
    """
    _check_latent_dim(latent_dim)
    route = topk_softmax(top_k=top_k, temperature=temperature)
    return ParametricRouter(route, lambda dim, num_experts: PrototypeLogits(dim, num_experts, latent_dim))


def _choice(order: Order, top_k: int) -> Router:
    return softmax_topk(top_k=top_k) if order == "softmax_topk" else topk_softmax(top_k=top_k)


def _check_latent_dim(latent_dim: int) -> None:
    if latent_dim < 1:
        raise ValueError(f"router.latent_dim ({latent_dim}) must be at least 1")
