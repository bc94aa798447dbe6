"""Balancers that look at weights: of the router and of the experts, taken in the layer's forward, where they are whole.

They depend on no token. A layer's value is the same in every micro-batch and on every rank, and counts once in a step.

Shapes: E experts, E' those of this rank, D dim, F hidden width.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.balancer.common import Balancer, keep_bias, no_loss, share
from titan_moe.model.routing import Routing


def _of_weights(coeff: float, measure: Callable[..., Tensor]) -> Balancer:
    """Build a balancer whose loss is what `measure` gives in a layer's forward, a scalar of weights alone."""

    def loss(routing: Routing, load: Tensor, num_tokens: Tensor | int, measure: Tensor) -> Tensor:
        return coeff * measure * share(routing, num_tokens)

    return Balancer(loss, keep_bias, measure=measure)


ROWS = "a router with a matrix `weight` (E, D), one row for each expert"


def router_rows(balancer: str, routing: Routing, router: nn.Module) -> Tensor:
    """The router's matrix (E, D), fp32, one row for each expert; ValueError for a router that has none."""
    weight = getattr(router, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != routing.scores.shape[-1]:
        raise ValueError(f"balancer.{balancer} needs {ROWS}, which the {type(router).__name__} of this one has not")
    return weight.float()


def simbal(coeff: float = 0.1) -> Balancer:
    """Make the router's rows orthonormal: sum over all entries of |R R^T - I| (SimBal, arXiv 2506.14038).

    R (E, D) as it is: rows are pulled to norm 1, too. The paper adds it over layers, where we take the mean.
    """

    def measure(routing: Routing, router: nn.Module) -> Tensor:
        rows_ED = router_rows("simbal", routing, router)
        return off_identity(rows_ED).abs().sum()

    return _of_weights(coeff, measure)


def router_orthogonality(coeff: float = 0.1) -> Balancer:
    """Make the directions of the router's rows orthogonal: mean over all entries of (R R^T - I)^2, rows of norm 1.

    Source: the code of ERNIE 4.5 (2025), which steps by its gradient beside the optimizer, where here it is a loss.
    """

    def measure(routing: Routing, router: nn.Module) -> Tensor:
        rows_ED = F.normalize(router_rows("router_orthogonality", routing, router), dim=-1)
        return off_identity(rows_ED).square().mean()

    return _of_weights(coeff, measure)


def off_identity(rows_ED: Tensor) -> Tensor:
    """R R^T - I, (E, E)."""
    return rows_ED @ rows_ED.t() - torch.eye(len(rows_ED), device=rows_ED.device)


def erc(coeff: float = 1.0, alpha: float = 1.0, noise: bool = True) -> Balancer:
    """Couple experts and router: each router row, as a token, is to excite its own expert most (arXiv 2512.23447).

    L = 1/E^2 sum_ij, i != j, of max(M_ij - alpha M_ii, 0) + max(M_ji - alpha M_ii, 0), with M_ij = |w1_j r_i|, the norm
    of what w1 of expert j gives for row r_i. With `noise` each element of r_i is multiplied by a number from 1 - eps_i
    to 1 + eps_i, eps_i = min_j |r_i - r_j| / (2 |r_i|) without a gradient: r_i stays nearest to its own row. Costs what
    E more tokens would cost in w1 of every expert. The paper adds it over layers, where we take the mean.
    """

    def measure(routing: Routing, router: nn.Module, w1: Tensor, gather_experts: Callable[[Tensor], Tensor]) -> Tensor:
        num_experts = routing.scores.shape[-1] - routing.num_identity_experts  # those have no w1 to be excited
        rows_ED = router_rows("erc", routing, router)[:num_experts]
        if len(rows_ED) < 2:
            raise ValueError("balancer.erc compares experts: it needs moe.num_experts of 2 or more")
        if noise:
            rows_ED = rows_ED * bounded_noise(rows_ED.detach(), len(w1), gather_experts)

        # In the experts' own precision, as their products are, but for the sums of squares.
        gates = w1 @ rows_ED.t().to(w1.dtype)  # (E', F, D) x (D, E) -> (E', F, E)
        norms = torch.linalg.vector_norm(gates, dim=1, dtype=torch.float32)  # (E', E)
        excited_EE = gather_experts(norms).t()  # row i, expert j

        # What an expert's own row gives bounds both its row and its column.
        bound_E = alpha * excited_EE.diagonal()
        excess_EE = F.relu(excited_EE - bound_E.unsqueeze(1)) + F.relu(excited_EE - bound_E.unsqueeze(0))
        is_own = torch.eye(len(rows_ED), dtype=torch.bool, device=rows_ED.device)
        return excess_EE.masked_fill(is_own, 0).mean()

    return _of_weights(coeff, measure)


@torch.no_grad()
def bounded_noise(rows_ED: Tensor, num_local: int, gather_experts: Callable[[Tensor], Tensor]) -> Tensor:
    """Factors (E, D) around 1, by which rows may be multiplied and stay nearest to what they were."""
    # Noise that is largest in all elements moves a row by half the distance to the nearest other one.
    distance_EE = torch.cdist(rows_ED, rows_ED, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    largest_E = distance_EE.amin(-1) / (2 * rows_ED.norm(dim=-1)).clamp(min=1e-12)

    # Each rank draws for its own experts, as ranks draw other numbers: so all meet the same rows.
    drawn_ED = gather_experts(torch.rand(num_local, rows_ED.shape[1], device=rows_ED.device))
    return 1 + largest_E.unsqueeze(1) * (2 * drawn_ED - 1)


def row_norm(norm: float = 1.0) -> Balancer:
    """After each step scale every row of the router's matrix to this norm, so that no expert is favoured by its length.

    X-MoE does it before each forward pass, with norm 1.5 (Chi et al., 2022, their code). Begins with the first step.
    """

    def project(weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if "weight" not in weights or weights["weight"].dim() != 2:
            raise ValueError(f"balancer.row_norm needs {ROWS}, this one has {[*weights]}")
        return {**weights, "weight": norm * F.normalize(weights["weight"], dim=-1)}

    return Balancer(no_loss, keep_bias, project=project)
