"""A router of one's own: `[router] name = "examples.router:softplus"`. T tokens, E experts, K top_k."""

import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.routing import Router, Routing, make_routing


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
