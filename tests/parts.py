"""A balancer that asks for everything there is, `tests.parts:everything`: its loss is of no use but to be compared."""

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.balancer import Balancer, keep_bias, share
from titan_moe.model.routing import Routing


def everything(coeff: float = 1.0) -> Balancer:
    """A loss of weights, of what each token's experts gave, and of the layer before; router rows of norm 0.1."""

    def measure(
        routing: Routing,
        x: Tensor,
        router: nn.Module,
        outputs: Tensor,
        w1: Tensor,
        w2: Tensor,
        w3: Tensor,
        expert_ids: Tensor,
        gather_experts: object,
        layer: int,
        positions: Tensor,
        document_ids: Tensor,
    ) -> Mapping[str, Tensor]:
        assert callable(gather_experts)
        of_expert = w1.float().square().mean((1, 2)) + (w2.float() * w3.float().mT).mean((1, 2)) * (expert_ids + 1)
        all_E = gather_experts(of_expert)
        first = next(iter(router.parameters())).float()
        places = 1 + positions.flatten() / 16 + document_ids.flatten() + layer
        tokens_T = (outputs[:, 0] * outputs[:, -1] * x).float().sum(-1) * places
        weights = (all_E * all_E.roll(1)).sum() + first.square().sum() / first.numel()
        return {"weights": weights, "tokens": tokens_T * routing.topk_scores[:, 0]}

    def loss(
        routing: Routing,
        load: Mapping[str, Tensor],
        num_tokens: Tensor | int,
        measure: Mapping[str, Tensor],
        routings: Sequence[Routing],
        index: int,
    ) -> Tensor:
        spread_B1 = load["sequence"].float().var(-1, keepdim=True) / load["global_batch_exact"].float().mean()
        coupling_T = (routing.scores * routings[index - 1].scores).sum(-1)
        tokens = measure["tokens"].sum() + (coupling_T.view(len(spread_B1), -1) * spread_B1).sum()
        return coeff * (measure["weights"] * share(routing, num_tokens) + tokens / num_tokens)

    def project(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: 0.1 * F.normalize(w, dim=-1) if w.dim() > 1 else w for name, w in weights.items()}

    return Balancer(loss, keep_bias, scope=("sequence", "global_batch_exact"), measure=measure, project=project)
