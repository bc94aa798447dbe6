"""Balancers that look at what the chosen experts gave for a token, so that experts become different functions.

Shapes: T tokens, K top_k, D dim.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from titan_moe.balancer.common import Balancer, keep_bias
from titan_moe.model.routing import Routing


def _of_pairs(name: str, coeff: float, pairs: Callable[[Tensor], Tensor]) -> Balancer:
    """Build a balancer from a matrix (T, K, K) of the outputs (T, K, D) of a token's experts, fp32.

    Its loss is the mean over tokens and over ordered pairs of two experts; where a choice is not computed its are 0.
    """

    def measure(outputs: Tensor) -> Tensor:
        if outputs.shape[1] < 2:
            raise ValueError(f"balancer.{name} compares the experts of a token: it needs moe.top_k of 2 or more")
        pairs_TKK = pairs(outputs.float())
        return pairs_TKK.sum() - pairs_TKK.diagonal(dim1=1, dim2=2).sum()

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int, measure: Tensor) -> Tensor:
        K = routing.topk_experts.shape[1]
        return coeff * measure / (K * (K - 1)) / num_tokens

    return Balancer(loss, keep_bias, measure=measure)


def orthogonality(coeff: float = 0.001) -> Balancer:
    """Make what a token's experts give orthogonal: <y_j, y_k>^2 / (2 |y_k|^2), mean over pairs j != k and tokens.

    y_j is what expert j gives, before its weight, so that the loss trains experts and not the router's choice. Half the
    squared norm of y_j's projection on y_k, with y_k held constant. This is our reading of L_o in arXiv 2505.22323 (Guo
    et al., 2025), which prints a sum of vectors there: its gradient is the one that they print, up to the mean, which
    is a sum there.
    """

    def projections(outputs_TKD: Tensor) -> Tensor:
        held_TKD = outputs_TKD.detach()
        products_TKK = outputs_TKD @ held_TKD.mT  # of each expert with each other one, which is held
        return products_TKK.square() / (2 * (held_TKD.square().sum(-1) + EPS).unsqueeze(1))

    return _of_pairs("orthogonality", coeff, projections)


EPS = 1e-12  # an output that was not computed is 0: no division by it


def specialization(coeff: float = 0.002) -> Balancer:
    """Make a token's experts give different things: squared cosine of their outputs, mean over pairs and tokens.

    arXiv 2602.14159 (R_sp, as descriptions of it give it) takes the cosine of what is inside of the experts, before w2;
    ours is of what they give, which any kernel shows.
    """

    def cosines(outputs_TKD: Tensor) -> Tensor:
        directions_TKD = F.normalize(outputs_TKD, dim=-1)
        return (directions_TKD @ directions_TKD.mT).square()

    return _of_pairs("specialization", coeff, cosines)
