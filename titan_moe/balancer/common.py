"""What a balancer is: a few pure functions of a layer's routing and of its load.

Shapes: T tokens, E experts, L layers, D dim.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from titan_moe.model.routing import Routing
from titan_moe.model.routing.common import asked_for

State = Mapping[str, Tensor]  # what a balancer keeps, by name
OFFERED = ("state", "step", "progress", "num_identity_experts")  # to a post step, after load and bias
SEEN = ("measure", "routings", "index")  # by a loss, after routing, load and num_tokens
Scope = Literal["micro_batch", "sequence", "global_batch", "global_batch_exact"]


def constant(progress: float) -> float:
    """Leave the rate as it is."""
    return 1.0


class Balancer(NamedTuple):
    """How a layer's load is kept even: by a loss on its routing, by a bias on its selection, or both.

    `loss(routing, load, num_tokens)` is this micro-batch's share of the step's loss, a scalar: a mean over the
    tokens of the micro-batch times (its tokens / `num_tokens`, the tokens of the whole step), so that the shares of
    micro-batches and ranks add up. `load` is tokens per expert, counted over the tokens that `scope` says: (E,), or
    (B, E) with scope `sequence`; of several scopes, in a tuple, it is a dict. With `train` false the loss is evaluated
    and reported, but not trained on.

    A loss that takes more by name gets it: `routings`, those of all MoE layers, of which `index` is this layer's, and
    `measure`, what `measure(...)` gave in the layer's forward. That is where weights are whole, and where the layer's
    input and the experts' outputs are: `titan_moe.model.moe.Measure` says what it may take. A loss of weights alone is
    the same on all ranks and micro-batches: times `share(routing, num_tokens)` it counts once in a step.

    `post_step(load, expert_bias)` gives the bias after an optimizer step; the load (..., E) is of the whole step and
    all ranks. A balancer that needs to know more than tokens per expert counts it by `observe(routing, expert_bias)`:
    integers, whose sum over micro-batches and ranks `post_step` gets in place of the load. The step multiplies the
    change of the bias by `schedule(progress)`; progress goes from 0 to 1, the end of the run.

    A post step that takes more by name gets it: `step`, the step's number from 1, `progress`, `num_identity_experts`,
    how many of the E give the token back as it is (the last ones), and `state`, tensors of its own. `init(num_experts)`
    makes those of one layer, fp32, alike on all ranks; the post step has them with the layers in front, (L, ...), and
    gives (bias, new state), new tensors all. They are in checkpoints, and a skipped step changes none.

    `project(weights)` gives a layer's router weights, by their names, as they are to be after an optimizer step: a
    projection or a normalisation. They come whole and in fp32; those of a linear router are `weight` (E, D).
    """

    loss: Callable[..., Tensor]
    post_step: Callable[..., Tensor | tuple[Tensor, State]]
    scope: Scope | tuple[Scope, ...] = "micro_batch"
    train: bool = True
    observe: Callable[[Routing, Tensor], Tensor] | None = None
    schedule: Callable[[float], float] = constant
    init: Callable[[int], State] | None = None
    measure: Callable[..., Any] | None = None
    project: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] | None = None

    @property
    def has_loss(self) -> bool:
        """Whether it has a loss; the step skips one that has none."""
        return self.loss is not no_loss

    @property
    def moves_bias(self) -> bool:
        """Whether its post step may change the bias."""
        return self.post_step is not keep_bias

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """The scopes of the loads that the loss is given; none where it has no loss."""
        if not self.has_loss:
            return ()
        return self.scope if isinstance(self.scope, tuple) else (self.scope,)

    def loss_of(
        self,
        routings: Sequence[Routing],
        index: int,
        loads: Mapping[Scope, Tensor],
        num_tokens: Tensor | int,
        name: str,
    ) -> Tensor:
        """The loss of layer `index`, of its loads by scope; the balancer's measures stand under its `name`."""
        routing = routings[index]
        values = {"measure": (routing.measures or {}).get(name), "routings": routings, "index": index}
        asked = {key: values[key] for key in asked_for(self.loss, SEEN, 3)}
        load = dict(loads) if isinstance(self.scope, tuple) else loads[self.scope]
        return self.loss(routing, load, num_tokens, **asked)

    def asked(self, state: State, step: int, progress: float, num_identity_experts: int = 0) -> dict[str, Any]:
        """What of these its post step takes, by name."""
        offered = dict(zip(OFFERED, (state, step, progress, num_identity_experts), strict=True))
        return {name: offered[name] for name in asked_for(self.post_step, OFFERED)}

    def after_step(
        self,
        load: Tensor,
        expert_bias: Tensor,
        state: State,
        *,
        step: int,
        progress: float,
        num_identity_experts: int = 0,
    ) -> tuple[Tensor, State]:
        """Bias and state after an optimizer step: what the post step gives, and of the bias its schedule's part."""
        asked = self.asked(dict(state), step, progress, num_identity_experts)  # it may put others into its dict
        result = self.post_step(load, expert_bias, **asked)
        moved, new_state = result if isinstance(result, tuple) else (result, state)
        factor = self.schedule(progress)
        return moved if factor == 1 else torch.lerp(expert_bias, moved, factor), new_state


def compiled(balancer: Balancer) -> Balancer:
    """The same balancer, its loss compiled: some thirty small kernels a layer become a few.

    One that asks for other layers or for its layer's number stays as it is: it would be compiled once for each layer.
    """
    if not balancer.has_loss or asked_for(balancer.loss, SEEN, 3):
        return balancer
    return balancer._replace(loss=torch.compile(balancer.loss, dynamic=False))


def keep_bias(load: Tensor, expert_bias: Tensor) -> Tensor:
    """Post step of a balancer that has no bias."""
    return expert_bias


def no_loss(routing: Routing, load: Tensor, num_tokens: Tensor | int) -> Tensor:
    """Loss of a balancer that has none."""
    return routing.router_logits.new_zeros(())


def share(routing: Routing, num_tokens: Tensor | int) -> Tensor | float:
    """The part of the step's tokens that this routing is of."""
    return routing.scores.shape[0] / num_tokens
