"""Observe the MoE layers of a torchtitan model by hooks on their routers, without a change of their code.

torchtitan's layers return no routing. A forward hook on each router makes one, and an operator in its backward counts:
backward runs once for each micro-batch, while forward runs again under activation checkpointing. The gradient of the
balance losses enters there, too, at the scale of the step's loss.

Losses that look at several layers are computed in the last one, where all routings are known, and those that look at
the experts' outputs behind the experts: of layers that are `DispatchedMoE`.

Shapes: B sequences, S their length, T tokens, D dim, E experts, Z identity experts, K top_k, L MoE layers.
"""

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.checkpointer.utils import canonical_fqn

from titan_moe.balancer import OFFERED, SEEN, Balancer, Scope
from titan_moe.model.moe import MEASURED, all_experts_here, local_weight
from titan_moe.model.routing import Places, Routing
from titan_moe.model.routing.common import asked_for, make_routing, normalized, with_identity_experts
from titan_moe.parallelize.expert_parallel import gather_over
from titan_moe.runtime.dtensor import local
from titan_moe.runtime.world import all_reduce_sum, rank, seed_step, world_size
from titan_moe.step import (
    Balancers,
    States,
    all_reduce_sums,
    project_routers,
    sequence_load,
    sum_tensors,
    update_balancers,
)
from torchtitan_patches.moe import DispatchedMoE, DroppedExperts, OwnRouter, layer_number

# Layers by number: an operator takes tensors and numbers, but no objects.
_LAYERS: weakref.WeakValueDictionary[int, "Layer"] = weakref.WeakValueDictionary()

# The experts' weights by their names in titan_moe and in torchtitan.
WEIGHTS = {"w1": "w1_EFD", "w2": "w2_EDF", "w3": "w3_EFD"}

# The number of tokens of the current step. The loss is told it, the routers' backward needs it, and torchtitan has no
# place that both see. One for the process, which has one trainer.
_step_tokens: list[Tensor] = []

# On how many ranks each sequence of the job is, for the same reason; empty where no recipe of `enable` has told it.
_context_degree: list[int] = []


def note_tokens(global_valid_tokens: Tensor) -> None:
    """Keep the number of tokens by which this step's loss is divided, a scalar on the device."""
    _step_tokens[:] = [global_valid_tokens]


def tell_context_degree(parallelize: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """torchtitan's function that parallelizes a model, which tells the monitor on how many ranks a sequence is."""

    @functools.wraps(parallelize)
    def parallelize_and_tell(model: nn.Module, *, parallel_dims: Any, **settings: Any) -> nn.Module:
        _context_degree[:] = [parallel_dims.cp]
        return parallelize(model, parallel_dims=parallel_dims, **settings)

    return parallelize_and_tell


class Layer:
    """Hooks on one MoE layer, and the sums that they have made since the last optimizer step or validation.

    `layers` are all of the model in order, this one among them once all are made.
    """

    def __init__(self, moe: Any, balancers: Balancers, name: str, layers: Sequence["Layer"] = ()) -> None:
        # Sums are tensors that are made once and changed in place: a CUDA graph replays nothing else.
        router, device = moe.router, local(moe.tokens_per_expert_E).device
        self.moe, self.router, self.balancers = moe, router, balancers
        self.losses = {name: pair for name, pair in balancers.items() if pair[1].has_loss}
        self.load = torch.zeros(router.num_experts, dtype=torch.int64, device=device)
        self.eval_load = torch.zeros_like(self.load)
        self.tokens, self.eval_tokens = torch.zeros_like(self.load[0]), torch.zeros_like(self.load[0])
        self.values = torch.zeros(len(self.losses), device=device)  # sums over tokens, at coefficient 1
        self.observed: dict[str, Tensor] = {}
        self.layers, self.name, self.layer = layers, name, layer_number(name)  # as in torchtitan's checkpoints
        self.states = {
            key: {part: value.to(device, copy=True) for part, value in b.init(router.num_experts).items()}
            for key, (_, b) in balancers.items()
            if b.init is not None
        }

        # The experts of this rank; with expert parallelism all ranks have as many.
        mesh = getattr(moe.routed_experts.token_dispatcher, "ep_mesh", None)
        place, size = (0, 1) if mesh is None else (mesh.get_local_rank(), mesh.size())
        self.gather_experts = all_experts_here if mesh is None else gather_over(mesh)
        self.num_identity_experts: int = getattr(moe, "num_identity_experts", 0)  # the last of `load`
        self.num_experts: int = router.num_experts - self.num_identity_experts
        self.expert_ids = torch.arange(self.num_experts, device=device).chunk(size)[place]
        self.measures = {
            key: (b.measure, asked_for(b.measure, MEASURED, 0))
            for key, (_, b) in balancers.items()
            if b.measure is not None
        }
        self.measured_names = {part for _, asked in self.measures.values() for part in asked}
        self.check_measures()
        self.of_all_layers = {
            key for key, (_, b) in self.losses.items() if {"routings", "index"} & {*asked_for(b.loss, SEEN, 3)}
        }

        # What one hook tells the next ones of the same forward pass.
        self.places: Places | None = None
        self.logits: Any = None
        self.routed: tuple[Routing, Tensor, int] | None = None  # until the experts are done: with x and sequences
        self.passed: tuple[Routing, dict[Scope, Tensor]] | None = None  # until the last layer is
        self.number = max(_LAYERS, default=-1) + 1
        _LAYERS[self.number] = self
        router.gate.register_forward_hook(self.on_logits)
        router.register_forward_hook(self.on_routing)
        self.after_experts = "outputs" in self.measured_names
        if self.after_experts:
            moe.on_outputs = self.on_outputs

    def check_measures(self) -> None:
        """Raise ValueError for a measure of what this layer does not have."""
        experts = self.moe.routed_experts.inner_experts
        for key, (_, asked) in self.measures.items():
            if missing := [weight for weight in WEIGHTS if weight in asked and not hasattr(experts, WEIGHTS[weight])]:
                raise ValueError(
                    f"torchtitan_patches: balancer.{key} measures {missing[0]}, which this model's "
                    f"{type(experts).__name__} has not: use a balancer without"
                )
            if "outputs" in asked and not isinstance(self.moe, DispatchedMoE):
                raise ValueError(
                    f"torchtitan_patches: balancer.{key} measures outputs, which torchtitan's layers add up at once: "
                    "give torchtitan_patches.overrides.moe to --override.imports, too"
                )

    @property
    def asks_places(self) -> bool:
        """Whether the router or a measure wants to know where tokens are."""
        of_router = isinstance(self.router, OwnRouter) and self.router.asks_places
        return of_router or not self.measured_names.isdisjoint(Places._fields)

    @property
    def draws(self) -> bool:
        """Whether the layer may draw random numbers in training."""
        is_ours = isinstance(self.router, OwnRouter)
        return is_ours or bool(self.measures) or isinstance(self.moe.routed_experts.inner_experts, DroppedExperts)

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
        routing = output if isinstance(output, Routing) else self.routing(logits, *output)
        routing = with_identity_experts(routing, self.num_identity_experts)

        # A validation has no backward, and is counted at once. A training pass without gradients has none, either, and
        # is no micro-batch of a step.
        if not router.training:
            self.eval_load += routing.tokens_per_expert
            self.eval_tokens += routing.scores.shape[0]
            return output
        if not torch.is_grad_enabled():
            return output

        # Backward passes the weights of the chosen experts in every layer, so what it has to count is saved with them.
        # It passes the output as well, for measures that have to wait for it.
        x_BSD = inputs[0]
        self.routed = routing, x_BSD.flatten(0, 1), x_BSD.shape[0]  # (B, S, D) -> (T, D)
        if self.after_experts:
            return output
        if isinstance(output, Routing):
            return output._replace(topk_scores=self.injected(output.topk_scores))
        return self.injected(output[0]), *output[1:]

    def on_outputs(self, y_TD: Tensor, outputs_TKD: Tensor) -> Tensor:
        """As the end of `on_routing`, where measures look at what the experts gave."""
        return self.injected(y_TD, outputs=outputs_TKD) if self.router.training else y_TD

    def routing(self, logits: Any, topk_scores: Tensor, topk_experts: Tensor, scores: Tensor) -> Routing:
        """The Routing of what torchtitan's router gives, (B, S, ...) each."""
        if isinstance(topk_scores, DTensor):
            raise ValueError("torchtitan_patches does not support tensor parallelism with a sharded router")

        # Losses of a sigmoid router are on scores that sum to 1 over the experts, as in titan_moe.
        scores_TE = scores.flatten(0, -2)  # (B, S, E) -> (T, E)
        return make_routing(
            logits.flatten(0, -2).float(),
            normalized(scores_TE) if self.router.score_func == "sigmoid" else scores_TE,
            topk_scores.flatten(0, -2),
            topk_experts.flatten(0, -2),
            scores_TE,
        )

    def injected(self, tensor: Tensor, **measurable: Tensor) -> Tensor:
        """The tensor, whose backward counts this micro-batch and gives the losses their gradient."""
        assert self.routed is not None
        (routing, x_TD, sequences), self.routed = self.routed, None
        if self.measures:
            routing = self.measured(routing, {"x": x_TD, **measurable})
        loss, values = self.loss(routing, sequences=sequences)
        with torch.no_grad():
            observed = [b.observe(routing, self.bias) for _, b in self.balancers.values() if b.observe is not None]
        return _Inject.apply(tensor, loss, values, routing.tokens_per_expert, self.number, *observed)

    def measured(self, routing: Routing, values: Mapping[str, Any]) -> Routing:
        """The routing with what the balancers measure of the layer; the block's weights are whole in its forward."""
        values = {
            **values,
            **(self.places._asdict() if self.places is not None else {}),
            "routing": routing,
            "layer": self.layer,
            "router": self.router.gate,
            "expert_ids": self.expert_ids,
            "gather_experts": self.gather_experts,
        }
        experts = self.moe.routed_experts.inner_experts
        for key in sorted(WEIGHTS.keys() & self.measured_names):
            values[key] = local_weight(getattr(experts, WEIGHTS[key]))
        measures = {key: take(**{name: values[name] for name in asked}) for key, (take, asked) in self.measures.items()}
        return Routing(*routing[:-1], measures)

    def loss(self, routing: Routing, *, sequences: int) -> tuple[Tensor | None, Tensor]:
        """The sum of the losses to train on, times their coefficients, and each loss by itself, (n,); over tokens."""
        # Losses that are only measured take no gradient, and cost no backward.
        loads: dict[Scope, Tensor] = {"micro_batch": routing.tokens_per_expert}
        if any("sequence" in balancer.scopes for _, balancer in self.losses.values()):
            loads["sequence"] = sequence_load(routing, sequences)
        if self.of_all_layers:
            self.passed = routing, loads
        trained, values = None, []
        for name, (coeff, balancer) in self.losses.items():
            with torch.set_grad_enabled(balancer.train):
                if name in self.of_all_layers:
                    value = self.loss_of_all(name, balancer)
                else:
                    value = balancer.loss_of([routing], 0, loads, 1, name)
            values.append(value.detach().float())
            if balancer.train:
                trained = coeff * value if trained is None else trained + coeff * value
        return trained, torch.stack(values) if values else routing.scores.new_zeros(0)

    def loss_of_all(self, name: str, balancer: Balancer) -> Tensor:
        """The sum over layers of a loss that looks at several, in the last layer; 0 in the others."""
        passed = [layer.passed for layer in self.layers if layer.passed is not None]
        if self is not self.layers[-1]:
            return passed[0][0].scores.new_zeros(())
        routings = [routing for routing, _ in passed]
        return sum_tensors([balancer.loss_of(routings, i, loads, 1, name) for i, (_, loads) in enumerate(passed)])

    @torch.no_grad()
    def arrive(self, num_tokens: int, values: Tensor, load: Tensor, observed: Sequence[Tensor]) -> Tensor:
        """Add up one micro-batch; the factor of the gradients of its losses, a scalar."""
        # In place: a CUDA graph replays nothing else.
        self.load += load
        self.tokens += num_tokens
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
        return 1 / (_step_tokens[0].to(values.dtype) * len(self.layers))


torch.library.define(
    "torchtitan_patches::arrive",
    "(Tensor grad, Tensor values, Tensor load, Tensor[] observed, SymInt layer) -> (Tensor, Tensor)",
)


@torch.library.impl("torchtitan_patches::arrive", ("cpu", "cuda"))
def _(grad: Tensor, values: Tensor, load: Tensor, observed: Sequence[Tensor], layer: int) -> tuple[Tensor, Tensor]:
    num_tokens = grad.numel() // grad.shape[-1]
    return grad.clone(), _LAYERS[layer].arrive(num_tokens, values, load, observed)


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

    `load` (L, E), `identity_load` (L, Z) and `num_tokens` (L,) are over all ranks. Raises ValueError for a model
    without MoE layers, for one under pipeline or tensor parallelism, where no rank sees the loads of all layers and
    tokens, and where something looks at whole sequences and ranks have parts of them.
    """

    def __init__(self, model_parts: Sequence[nn.Module], balancers: Balancers) -> None:
        from torchtitan.models.common.moe import MoE

        # A stage of a pipeline lacks the embedding or the head.
        ends = [getattr(part, end, None) for part in model_parts for end in ("tok_embeddings", "lm_head")]
        if len(model_parts) != 1 or None in ends:
            raise ValueError("torchtitan_patches does not support pipeline parallelism: set its degree to 1")
        self.balancers = balancers
        (model,) = model_parts
        self.layers: list[Layer] = []
        for name, moe in model.named_modules():
            if isinstance(moe, MoE):
                self.layers.append(Layer(moe, balancers, canonical_fqn(name), self.layers))
        if not self.layers:
            raise ValueError("torchtitan_patches is for Mixtures of Experts, but this model has no MoE layer")
        self.check_whole_sequences(model)
        if any(layer.asks_places for layer in self.layers):
            model.register_forward_pre_hook(self.on_tokens, with_kwargs=True)

        # torchtitan's layers have a bias only with a coefficient.
        self.own_bias_rule = any(b.moves_bias for _, b in balancers.values())
        if self.own_bias_rule and any(layer.moe.load_balance_coeff is None for layer in self.layers):
            raise ValueError(
                "torchtitan_patches: a balancer moves the bias, and there is none: set load_balance_coeff of each "
                "MoE.Config, to 1e-3"
            )
        asked = {name for _, b in balancers.values() for name in asked_for(b.post_step, OFFERED)}
        self.asks_length = next((name for name, (_, b) in balancers.items() if asks_length(b)), None)
        self.draws, self.seed = any(layer.draws for layer in self.layers), torch.initial_seed()
        self.asks_step = "step" in asked or self.asks_length is not None or self.draws
        self.step = 0  # optimizer steps that are done
        self.seed_next_step()
        self.num_steps: int | None = None  # of the run, where torchtitan has told it
        self.load = self.identity_load = self.num_tokens = torch.zeros(0)
        self._values, self._tokens = torch.zeros(0), torch.ones(())

    @property
    def top_k(self) -> int:
        """How many experts a token has."""
        return self.layers[0].router.top_k

    def check_whole_sequences(self, model: nn.Module) -> None:
        """Raise ValueError where something looks at whole sequences, and ranks have parts of them or may have."""
        router, measures = self.layers[0].router, self.layers[0].measures
        at_places = [f"balancer.{key}" for key, (_, asked) in measures.items() if {*asked} & {*Places._fields}]
        if isinstance(router, OwnRouter) and router.asks_places:
            at_places.insert(0, f"router {router.name}")
        at_loads = [f"balancer.{key}" for key, (_, b) in self.layers[0].losses.items() if "sequence" in b.scopes]
        asking = [f"{what} looks at whole sequences" for what in (*at_places, *at_loads)]

        # What was told is of this job alone.
        degree = _context_degree.pop() if _context_degree else None
        if asking and degree is not None and degree > 1:
            raise ValueError(
                f"torchtitan_patches: {asking[0]}, of which ranks have parts with "
                f"parallelism.context_parallel_degree = {degree}: set it to 1"
            )
        if at_places and degree is None and world_size() > 1:
            raise ValueError(
                f"torchtitan_patches: {asking[0]}, and only recipes are told whether ranks have them: turn it on with "
                "`enable`"
            )

        # Overrides of the command line learn it from the first tokens.
        def check_length(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tokens_BS = args[0] if args else kwargs["tokens"]
            if model.training and tokens_BS.shape[1] != model.config.max_seq_len:
                raise ValueError(
                    f"torchtitan_patches: {asking[0]}, of which ranks have parts: set "
                    "parallelism.context_parallel_degree to 1"
                )

        if asking and degree is None:
            model.register_forward_pre_hook(check_length, with_kwargs=True)

    @torch.no_grad()
    def on_tokens(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the layers where the tokens of this forward pass are.

        torchtitan's positions begin anew with each document; without them a sequence is one.
        """
        tokens_BS = args[0] if args else kwargs["tokens"]
        positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
        given = args[1] if len(args) > 1 else kwargs.get("positions")
        starts_BS = (positions_BS if given is None else given) == 0
        places = Places(positions_BS, starts_BS.cumsum(1) - starts_BS[:, :1].long())
        for layer in self.layers:
            layer.places = layer.router.places = places

    @torch.no_grad()
    def finish_step(self) -> None:
        """Take the counts of this optimizer step, and set the bias for the next one; before torchtitan's own rule."""
        # One collective a dtype for all sums. The metrics ask later, when the layers' own have begun anew.
        sums = {
            "router_load": torch.stack([layer.load for layer in self.layers]),  # (L, E + Z)
            "tokens": torch.stack([layer.tokens for layer in self.layers]),
        }
        if self.own_bias_rule:
            for name in self.layers[0].observed:
                sums[f"observed/{name}"] = torch.stack([layer.observed[name] for layer in self.layers])
        sums = all_reduce_sums(sums)
        sums |= self.split_load(sums.pop("router_load"))
        self.load, self.identity_load, self.num_tokens = sums["load"], sums["identity_load"], sums["tokens"]
        self._values = torch.stack([layer.values for layer in self.layers]).sum(0)
        if _step_tokens:
            self._tokens = _step_tokens.pop()

        self.step += 1
        self.seed_next_step()
        if self.own_bias_rule:
            biases = [layer.bias for layer in self.layers]
            update_balancers(self.balancers, biases, sums, self.states(), step=self.step, progress=self.progress())

        # torchtitan's own rule runs after this, and re-centres the bias: without counts it has nothing to move.
        for layer in self.layers:
            layer.load.zero_()
            layer.tokens.zero_()
            layer.values.zero_()
            for observed in layer.observed.values():
                observed.zero_()
            if self.own_bias_rule:
                layer.moe.tokens_per_expert_E.zero_()

    def split_load(self, router_load: Tensor) -> dict[str, Tensor]:
        """(L, E + Z) -> the `load` (L, E) of experts with weights and the `identity_load` (L, Z)."""
        num_experts = self.layers[0].num_experts
        return {"load": router_load[:, :num_experts], "identity_load": router_load[:, num_experts:]}

    def seed_next_step(self) -> None:
        """Seed what layers draw in the next step by the run's seed, the step and the rank, as titan_moe does.

        torchtitan seeds its ranks alike and at the start alone: they would draw the same, and a resumed run others.
        """
        if self.draws:
            seed_step(self.seed, self.step + 1, rank())

    def progress(self) -> float:
        """The part of the run that is done with this step; 0 where no balancer goes by it."""
        if self.asks_length is None:
            return 0.0
        if self.num_steps is None:
            raise ValueError(
                f"torchtitan_patches: balancer.{self.asks_length} goes by the run's length: give "
                "torchtitan_patches.overrides.lr_scheduler to --override.imports, too"
            )
        return self.step / self.num_steps

    def states(self) -> States:
        """What balancers keep: name of the balancer -> name of the tensor -> that of each layer, in order."""
        return {
            name: {key: [layer.states[name][key] for layer in self.layers] for key in tensors}
            for name, tensors in self.layers[0].states.items()
        }

    def moe_layers(self) -> list[Any]:
        """The layers as `project_routers` knows them: `router` is the module that makes the logits."""
        return [SimpleNamespace(router=layer.router.gate) for layer in self.layers]

    def state_dict(self) -> dict[str, Any]:
        """What balancers keep, the tensors themselves, and the number of steps if one asks for it; flat."""
        # Not buffers of the model: some of torchtitan's converters to Hugging Face fail on names that they don't know.
        tensors = {
            f"balancers.{layer.name}.{name}.{key}": tensor
            for layer in self.layers
            for name, state in layer.states.items()
            for key, tensor in state.items()
        }
        return {**tensors, "balancers.step": self.step} if self.asks_step else tensors

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take what `state_dict` gave, from among other entries."""
        if self.asks_step:
            self.step = state_dict["balancers.step"]
            self.seed_next_step()
        for key, value in self.state_dict().items():
            if isinstance(value, Tensor):
                value.copy_(state_dict[key])

    def balance_losses(self) -> dict[str, Tensor]:
        """The losses of the last step by name, before their coefficients, mean over layers; all ranks take part."""
        values = all_reduce_sum(self._values.clone()) / self._tokens / len(self.layers)
        return dict(zip(self.layers[0].losses, values.unbind(), strict=True))

    def take_eval_loads(self) -> tuple[Tensor, Tensor, Tensor]:
        """`load`, `identity_load` and `num_tokens` of the last validation, of which nothing is kept."""
        router_load = all_reduce_sum(torch.stack([layer.eval_load for layer in self.layers]))
        num_tokens = all_reduce_sum(torch.stack([layer.eval_tokens for layer in self.layers]))
        for layer in self.layers:
            layer.eval_load.zero_()
            layer.eval_tokens.zero_()
        loads = self.split_load(router_load)
        return loads["load"], loads["identity_load"], num_tokens


def asks_length(balancer: Balancer) -> bool:
    """Whether what a balancer does after a step goes by the run's length."""
    schedules = balancer.schedule is not Balancer._field_defaults["schedule"]
    return schedules or "progress" in asked_for(balancer.post_step, OFFERED)


def monitor_of(optimizers: Any) -> Monitor:
    """The monitor of the model that these optimizers train; one without balancers if there is none yet."""
    if not hasattr(optimizers, "monitor"):
        attach(optimizers, {})
    return optimizers.monitor


def attach(optimizers: Any, balancers: Balancers) -> None:
    """Make a monitor for a container of optimizers, and close each step before torchtitan's own hooks do."""
    optimizers.monitor = monitor = Monitor(optimizers.model_parts, balancers)
    optimizers.register_step_pre_hook(lambda *_: monitor.finish_step())
    always = torch.ones((), dtype=torch.bool, device=monitor.layers[0].load.device)  # torchtitan skips no step
    optimizers.register_step_post_hook(lambda *_: project_routers(balancers, monitor, always))
