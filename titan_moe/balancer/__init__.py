"""Load balancing: the balancers, by their names in [balancer.NAME], and what those of one's own are made of."""

from collections.abc import Callable

from titan_moe.balancer.bias import loss_free, margin_counts, pid, quantile_shift, smebu
from titan_moe.balancer.common import OFFERED, SEEN, Balancer, Scope, State, keep_bias, no_loss, share
from titan_moe.balancer.losses import (
    aux_loss,
    coupling,
    entropy_loss,
    score_variance,
    token_entropy,
    token_z_loss,
    z_loss,
)
from titan_moe.balancer.outputs import orthogonality, specialization
from titan_moe.balancer.weights import erc, router_orthogonality, row_norm, simbal

__all__ = [
    "BALANCERS",
    "OFFERED",
    "SEEN",
    "Balancer",
    "Scope",
    "State",
    "keep_bias",
    "margin_counts",
    "no_loss",
    "quantile_shift",
    "share",
    "token_entropy",
    "token_z_loss",
]

BALANCERS: dict[str, Callable[..., Balancer]] = {
    "aux_loss": aux_loss,
    "z_loss": z_loss,
    "entropy_loss": entropy_loss,
    "score_variance": score_variance,
    "coupling": coupling,
    "loss_free": loss_free,
    "smebu": smebu,
    "pid": pid,
    "simbal": simbal,
    "router_orthogonality": router_orthogonality,
    "erc": erc,
    "row_norm": row_norm,
    "orthogonality": orthogonality,
    "specialization": specialization,
}
