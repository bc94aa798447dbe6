"""Observe the MoE layers of a torchtitan model by hooks on their routers, without a change of their code.

torchtitan's layers return no routing. A forward hook on each router makes one, and an operator in its backward counts:
backward runs once for each micro-batch, while forward runs again under activation checkpointing. The gradient of the
balance losses enters there, too, at the scale of the step's loss.

Shapes: B sequences, T tokens, E experts, K top_k, L MoE layers.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_moe.balancer import Scope
from titan_moe.model.routing import Routing
from titan_moe.model.routing.common import make_routing, normalized
from titan_moe.runtime.dtensor import local
from titan_moe.runtime.world import all_reduce_sum
from titan_moe.step import Balancers, all_reduce_sums, sequence_load, update_balancers

# Layers by number: an operator takes tensors and numbers, but no objects.
_LAYERS: weakref.WeakValueDictionary[int, "Layer"] = weakref.WeakValueDictionary()

# The number of tokens of the current step. The loss is told it, the routers' backward needs it, and torchtitan has no
# place that both see. One for the process, which has one trainer.
_step_tokens: list[Tensor] = []


def note_tokens(global_valid_tokens: Tensor) -> None:
    """Keep the number of tokens by which this step's loss is divided, a scalar on the device."""
    _step_tokens[:] = [global_valid_tokens]


class Layer:
    """Hooks on one MoE layer, and the sums that they have made since the last optimizer step or validation."""

    def __init__(self, moe: Any, balancers: Balancers) -> None:
        # Sums are tensors that are made once and changed in place: a CUDA graph replays nothing else.
        router, device = moe.router, local(moe.router.gate.weight).device
        self.moe, self.router, self.balancers = moe, router, balancers
        self.losses = {name: pair for name, pair in balancers.items() if pair[1].has_loss}
        self.load = torch.zeros(router.num_experts, dtype=torch.int64, device=device)
        self.eval_load = torch.zeros_like(self.load)
        self.values = torch.zeros(len(self.losses), device=device)  # sums over tokens, at coefficient 1
        self.observed: dict[str, Tensor] = {}
        self.num_layers = 0  # of the model
        self.logits: Any = None  # between the gate and the end of its router
        self.number = max(_LAYERS, default=-1) + 1
        _LAYERS[self.number] = self
        router.gate.register_forward_hook(self.on_logits)
        router.register_forward_hook(self.on_routing)

    @property
    def bias(self) -> Tensor:
        """The bias (E,) that takes part in the choice of experts; it shares the layer's memory."""
        return local(self.moe.expert_bias_E)

    def on_logits(self, gate: nn.Module, inputs: Any, logits: Tensor) -> None:
        """Keep the router logits until the router is done."""
        self.logits = logits

    def on_routing(self, router: nn.Module, inputs: Any, output: Any) -> Any:
        """Count in validation; in training put the losses and the counting into the backward of `topk_scores`."""
        logits, self.logits = self.logits, None
        topk_scores, topk_experts, scores = output
        if isinstance(topk_scores, DTensor):
            raise ValueError("torchtitan_patches does not support tensor parallelism with a sharded router")

        # Losses of a sigmoid router are on scores that sum to 1 over the experts, as in titan_moe.
        scores_TE = scores.flatten(0, -2)  # (B, S, E) -> (T, E)
        if self.router.score_func == "sigmoid":
            probabilities_TE = normalized(scores_TE)
        else:
            probabilities_TE = scores_TE
        routing = make_routing(
            logits.flatten(0, -2).float(),
            probabilities_TE,
            topk_scores.flatten(0, -2),
            topk_experts.flatten(0, -2),
            scores_TE,
        )

        # A validation has no backward, and is counted at once. A training pass without gradients has none, either, and
        # is no micro-batch of a step.
        if not router.training:
            self.eval_load += routing.tokens_per_expert
            return output
        if not torch.is_grad_enabled():
            return output

        # Backward passes the weights of the chosen experts in every layer, so what it has to count is saved with them.
        loss, values = self.loss(routing, sequences=topk_experts.shape[0])
        with torch.no_grad():
            observed = [b.observe(routing, self.bias) for _, b in self.balancers.values() if b.observe is not None]
        topk_scores = _Inject.apply(topk_scores, loss, values, routing.tokens_per_expert, self.number, *observed)
        return topk_scores, topk_experts, scores

    def loss(self, routing: Routing, *, sequences: int) -> tuple[Tensor | None, Tensor]:
        """The sum of the losses to train on, times their coefficients, and each loss by itself, (n,); over tokens."""
        # Losses that are only measured take no gradient, and cost no backward.
        loads: dict[Scope, Tensor] = {"micro_batch": routing.tokens_per_expert}
        if any("sequence" in balancer.scopes for _, balancer in self.losses.values()):
            loads["sequence"] = sequence_load(routing, sequences)
        trained, values = None, []
        for name, (coeff, balancer) in self.losses.items():
            with torch.set_grad_enabled(balancer.train):
                value = balancer.loss_of([routing], 0, loads, 1, name)
            values.append(value.detach().float())
            if balancer.train:
                trained = coeff * value if trained is None else trained + coeff * value
        return trained, torch.stack(values) if values else routing.scores.new_zeros(0)

    @torch.no_grad()
    def arrive(self, values: Tensor, load: Tensor, observed: Sequence[Tensor]) -> Tensor:
        """Add up one micro-batch; the factor of the gradients of its losses, a scalar."""
        # In place: a CUDA graph replays nothing else.
        self.load += load
        self.values += values
        names = [name for name, (_, balancer) in self.balancers.items() if balancer.observe is not None]
        for name, value in zip(names, observed, strict=True):
            if name in self.observed:
                self.observed[name] += value
            else:
                self.observed[name] = value.clone()

        # Losses are sums over tokens and layers; the step's loss is a mean over all its tokens, and so are they.
        if not self.losses:
            return values.new_zeros(())
        if not _step_tokens:
            raise ValueError(
                "torchtitan_patches: the balance losses do not know the tokens of the step: give "
                "torchtitan_patches.overrides.loss to --override.imports, too, and use torchtitan's CrossEntropyLoss"
            )
        return 1 / (_step_tokens[0].to(values.dtype) * self.num_layers)


torch.library.define(
    "torchtitan_patches::arrive",
    "(Tensor grad, Tensor values, Tensor load, Tensor[] observed, SymInt layer) -> (Tensor, Tensor)",
)


@torch.library.impl("torchtitan_patches::arrive", ("cpu", "cuda"))
def _(grad: Tensor, values: Tensor, load: Tensor, observed: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return grad.clone(), _LAYERS[layer].arrive(values, load, observed)


@torch.library.register_fake("torchtitan_patches::arrive")
def _(grad: Tensor, values: Tensor, load: Tensor, observed: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(grad), values.new_empty(())


class _Inject(torch.autograd.Function):
    """The identity on the weights of the chosen experts, whose backward counts, and gives the losses their gradient.

    In a compiled layer only an operator can do that. Its result is used, or the compiler would remove it.
    """

    @staticmethod
    def forward(
        ctx: Any, topk_scores: Tensor, loss: Tensor | None, values: Tensor, load: Tensor, layer: int, *observed: Tensor
    ) -> Tensor:
        ctx.layer, ctx.has_loss = layer, loss is not None
        ctx.save_for_backward(values, load, *observed)
        return topk_scores.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyrefly: ignore
        values, load, *observed = ctx.saved_tensors
        grad, scale = torch.ops.torchtitan_patches.arrive(grad, values, load, observed, ctx.layer)
        return grad, scale if ctx.has_loss else None, *[None] * (3 + len(observed))


class Monitor:
    """All MoE layers of a model, and their loads and losses in the last optimizer step.

    `load` (L, E) is over all ranks. Raises ValueError for a model without MoE layers, and for one under pipeline or
    tensor parallelism: there no rank sees the loads of all layers and tokens.
    """

    def __init__(self, model_parts: Sequence[nn.Module], balancers: Balancers) -> None:
        from torchtitan.models.common.moe import MoE

        # A stage of a pipeline lacks the embedding or the head.
        ends = [getattr(part, end, None) for part in model_parts for end in ("tok_embeddings", "lm_head")]
        if len(model_parts) != 1 or None in ends:
            raise ValueError("torchtitan_patches does not support pipeline parallelism: set its degree to 1")
        self.balancers = balancers
        self.layers = [Layer(m, balancers) for part in model_parts for m in part.modules() if isinstance(m, MoE)]
        if not self.layers:
            raise ValueError("torchtitan_patches is for Mixtures of Experts, but this model has no MoE layer")
        for layer in self.layers:
            layer.num_layers = len(self.layers)

        # torchtitan's layers have a bias only with a coefficient.
        self.own_bias_rule = any(b.moves_bias for _, b in balancers.values())
        if self.own_bias_rule and any(layer.moe.load_balance_coeff is None for layer in self.layers):
            raise ValueError(
                "torchtitan_patches: loss_free needs a bias: set load_balance_coeff of each MoE.Config, to 1e-3"
            )
        self.load = torch.zeros(0)
        self._values, self._tokens = torch.zeros(0), torch.ones(())

    @property
    def top_k(self) -> int:
        """How many experts a token has."""
        return self.layers[0].router.top_k

    @torch.no_grad()
    def finish_step(self) -> None:
        """Take the counts of this optimizer step, and set the bias for the next one; before torchtitan's own rule."""
        # One collective a dtype for all sums. The metrics ask later, when the layers' own have begun anew.
        sums = {"load": torch.stack([layer.load for layer in self.layers])}  # (L, E)
        if self.own_bias_rule:
            for name in self.layers[0].observed:
                sums[f"observed/{name}"] = torch.stack([layer.observed[name] for layer in self.layers])
        sums = all_reduce_sums(sums)
        self.load = sums["load"]
        self._values = torch.stack([layer.values for layer in self.layers]).sum(0)
        if _step_tokens:
            self._tokens = _step_tokens.pop()

        if self.own_bias_rule:
            update_balancers(self.balancers, [layer.bias for layer in self.layers], sums)

        # torchtitan's own rule runs after this, and re-centres the bias: without counts it has nothing to move.
        for layer in self.layers:
            layer.load.zero_()
            layer.values.zero_()
            for observed in layer.observed.values():
                observed.zero_()
            if self.own_bias_rule:
                layer.moe.tokens_per_expert_E.zero_()

    def balance_losses(self) -> dict[str, Tensor]:
        """The losses of the last step by name, before their coefficients, mean over layers; all ranks take part."""
        values = all_reduce_sum(self._values.clone()) / self._tokens / len(self.layers)
        return dict(zip(self.layers[0].losses, values.unbind(), strict=True))

    def take_eval_load(self) -> Tensor:
        """The load (L, E) of the last validation over all ranks, which is then zero again."""
        load = all_reduce_sum(torch.stack([layer.eval_load for layer in self.layers]))
        for layer in self.layers:
            layer.eval_load.zero_()
        return load


def monitor_of(optimizers: Any) -> Monitor:
    """The monitor of the model that these optimizers train; one without balancers if there is none yet."""
    if not hasattr(optimizers, "monitor"):
        attach(optimizers, {})
    return optimizers.monitor


def attach(optimizers: Any, balancers: Balancers) -> None:
    """Make a monitor for a container of optimizers, and close each step before torchtitan's own hooks do."""
    optimizers.monitor = Monitor(optimizers.model_parts, balancers)
    optimizers.register_step_pre_hook(lambda *_: optimizers.monitor.finish_step())
