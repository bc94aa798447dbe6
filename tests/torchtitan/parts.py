"""Balancers that take what torchtitan has a place for; of no use but to be compared."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.balancer import Balancer, State, keep_bias, no_loss, share
from titan_moe.model.routing import Routing


def of_router(coeff: float = 1.0) -> Balancer:
    """|R R^T - I|^2 of the router's rows, and what each token's input has of the row of its first expert."""

    def measure(routing: Routing, x: Tensor, router: nn.Module, layer: int) -> tuple[Tensor, Tensor]:
        rows = next(iter(router.parameters())).float()
        gram = rows @ rows.mT - torch.eye(len(rows), device=rows.device)
        return gram.square().sum() * (layer + 1), (x * F.embedding(routing.topk_experts[:, 0], rows)).sum(-1).square()

    def loss(routing: Routing, load: Tensor, num_tokens: Any, measure: tuple[Tensor, Tensor]) -> Tensor:
        return coeff * (measure[0] * share(routing, num_tokens) + measure[1].sum() / num_tokens)

    return Balancer(loss, keep_bias, measure=measure)


def of_experts(coeff: float = 1.0) -> Balancer:
    """Products of what adjacent experts' weights are, over all experts, wherever they lie, and loads of both scopes."""

    def measure(
        w1: Tensor, w2: Tensor, w3: Tensor, expert_ids: Tensor, gather_experts: Callable[[Tensor], Tensor]
    ) -> Tensor:
        own = w1.float().square().mean((1, 2)) + (w2.float() * w3.float().mT).mean((1, 2)) * (expert_ids + 1)
        all_E = gather_experts(own)
        return (all_E * all_E.roll(1)).sum()

    def loss(routing: Routing, load: Mapping[str, Tensor], num_tokens: Any, measure: Tensor) -> Tensor:
        even = load["sequence"].sum() / load["micro_batch"].sum()  # 1
        return coeff * measure * share(routing, num_tokens) * even

    return Balancer(loss, keep_bias, scope=("micro_batch", "sequence"), measure=measure)


def paced(rate: float = 0.001) -> Balancer:
    """A bias that follows the mean of all loads so far, each less as steps go by; keeps that mean and a count."""

    def init(num_experts: int) -> State:
        return {"mean": torch.zeros(num_experts), "steps": torch.zeros(())}

    def post_step(load: Tensor, expert_bias: Tensor, state: State, step: int) -> tuple[Tensor, State]:
        assert (state["steps"] == step - 1).all()
        part = load / load.sum(-1, keepdim=True) * load.shape[-1] - 1
        mean = state["mean"] + (part - state["mean"]) / step
        return expert_bias - rate / step * mean, {"mean": mean, "steps": state["steps"] + 1}

    return Balancer(no_loss, post_step, init=init)


def even_rows() -> Balancer:
    """Router rows of one norm."""

    def project(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {name: 0.3 * F.normalize(weight, dim=-1) for name, weight in weights.items()}

    return Balancer(no_loss, keep_bias, project=project)


def late(rate: float = 0.1) -> Balancer:
    """A bias that goes by the run's length, and rests at its beginning and its end."""

    def post_step(load: Tensor, expert_bias: Tensor, progress: float) -> Tensor:
        return expert_bias + rate * progress * torch.linspace(-1, 1, load.shape[-1])

    return Balancer(no_loss, post_step, schedule=lambda progress: 1.0 if 0.3 < progress < 0.8 else 0.0)


def coupled(coeff: float = 1.0) -> Balancer:
    """A loss of all layers, and of each one's load and measure."""

    def measure(x: Tensor) -> Tensor:
        return x.square().mean()

    def loss(routing: Routing, load: Tensor, num_tokens: Any, routings: Any, index: int, measure: Tensor) -> Tensor:
        others = sum(other.scores * (number + 1) for number, other in enumerate(routings) if number != index)
        return coeff * measure * (routing.scores * others * load / load.sum()).sum() / num_tokens

    return Balancer(loss, keep_bias, measure=measure)


def of_places(coeff: float = 1.0) -> Balancer:
    """The first probability of each token, times its place and the number of its document."""

    def measure(routing: Routing, positions: Tensor, document_ids: Tensor) -> Tensor:
        return (routing.scores[:, 0] * (positions + 1).flatten() * (document_ids + 1).flatten()).sum()

    def loss(routing: Routing, load: Tensor, num_tokens: Any, measure: Tensor) -> Tensor:
        return coeff * measure / num_tokens

    return Balancer(loss, keep_bias, measure=measure)


def spike() -> Balancer:
    """A loss with a schedule, which is of post steps."""
    return of_places()._replace(schedule=lambda progress: 1.0 if progress == 0.5 else 0.0)


def no_routing(top_k: int) -> Any:
    """A router that gives the scores alone."""
    return lambda logits, bias: logits.softmax(-1)


def of_thoughts() -> Balancer:
    """A measure of what nobody has."""

    def measure(thoughts: Tensor) -> Tensor:
        return thoughts

    return Balancer(of_places().loss, keep_bias, measure=measure)
