"""The feed-forward networks: dense SwiGLU, stacked experts, and the Mixture-of-Experts layer of both.

Shapes: B batch, S sequence, T = B * S tokens, D dim, F hidden width, E experts, K top_k, N = T * K rows.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from titan_moe.model import fused
from titan_moe.model.dispatch import (
    Dispatcher,
    Permutation,
    combine_choices,
    computed_choices,
    local,
    rows_of_choices,
)
from titan_moe.model.experts import PRODUCTS, Precision, grouped_mm
from titan_moe.model.multipliers import times
from titan_moe.model.routing import ParametricRouter, Places, Router, Routing
from titan_moe.model.routing.common import OFFERED, asked_for, parametric, with_identity_experts

# num_experts -> tensors that a balancer keeps of a layer, by name
InitState = Callable[[int], Mapping[str, Tensor]]

# What a balancer measures in a layer's forward, where weights are whole: a tensor, or several in a tuple or a dict. It
# takes by name what it needs of
#
# - routing; x, the layer's input (T, D); layer, the layer's number; positions and document_ids of its tokens, (B, S);
# - router, the module that makes the logits;
# - outputs (T, K, D), what the chosen experts gave for each token, before their weights; 0 where none was computed;
# - w1, w3 (E', F, D) and w2 (E', D, F), the experts of this rank; expert_ids (E',), which of all they are;
# - gather_experts, which makes (E, ...) of all experts of (E', ...) of this rank's; differentiable.
Measure = Callable[..., Any]
MEASURED = ("routing", "outputs", "w1", "w2", "w3", "expert_ids", "gather_experts", *OFFERED)
WEIGHTS = ("w1", "w2", "w3")
# (x_ND, w1, w2, w3, tokens_per_expert_E) -> y_ND: see `experts_backend`
ExpertsBackend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]

# The experts' gradients are written by hand, which saves memory and passes over it. What w2's function saved is freed
# before the gradients of w1 and w3 are computed; h is computed again instead of saved; and the gradient of x is one
# product with w1 and w3 together instead of a sum of two. Putting w1 and w3 side by side is a copy, and so is taking
# their gradients apart: they cost a GPU less than they save.


class _Up(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, w1: Tensor, w3: Tensor, offs_E: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(x_ND, w1, w3, offs_E)
        ctx.precision = precision
        return PRODUCTS[precision](x_ND, torch.cat([w1, w3], dim=1).transpose(1, 2), offs_E)  # (N, D) -> (N, 2 F)

    @staticmethod
    def backward(ctx: Any, grad_h13_N2F: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyrefly: ignore
        x_ND, w1, w3, offs_E = ctx.saved_tensors
        grad_x_ND = PRODUCTS[ctx.precision](grad_h13_N2F, torch.cat([w1, w3], dim=1), offs_E)  # (N, 2 F) -> (N, D)

        # Also one product: reading the halves of each row on their own takes longer than copying the two gradients.
        grad_w1, grad_w3 = grouped_mm(grad_h13_N2F.t(), x_ND, offs_E).chunk(2, dim=1)  # (E, 2 F, D) -> 2 x (E, F, D)
        return grad_x_ND, grad_w1, grad_w3, None, None


class _GatedDown(Function):
    @staticmethod
    def forward(ctx: Any, h13_N2F: Tensor, w2: Tensor, offs_E: Tensor, precision: Precision) -> Tensor:
        ctx.save_for_backward(h13_N2F, w2, offs_E)
        ctx.precision = precision
        return PRODUCTS[precision](fused.swiglu(h13_N2F), w2.transpose(1, 2), offs_E)  # (N, 2 F) -> (N, D)

    @staticmethod
    def backward(ctx: Any, grad_y_ND: Tensor) -> tuple[Tensor, Tensor, None, None]:  # pyrefly: ignore
        h13_N2F, w2, offs_E = ctx.saved_tensors
        grad_y_ND = grad_y_ND.contiguous()  # grouped_mm refuses expanded (zero-stride) tensors
        grad_h_NF = PRODUCTS[ctx.precision](grad_y_ND, w2, offs_E)  # (N, D) -> (N, F)
        h_NF, grad_h13_N2F = fused.swiglu_backward(grad_h_NF, h13_N2F)
        return grad_h13_N2F, grouped_mm(grad_y_ND.t(), h_NF, offs_E), None, None


# On a CPU new memory costs more than arithmetic. So w1 and w3, or h1 and h3, are not put side by side: there are two
# products, silu(h1) is saved, and backward writes into buffers that are not needed any more.


class _UpOnCpu(Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight: Tensor, offs_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_ND, weight, offs_E)
        return grouped_mm(x_ND, weight.transpose(1, 2), offs_E)

    @staticmethod
    def backward(ctx: Any, grad_NF: Tensor) -> tuple[Tensor, Tensor, None]:  # pyrefly: ignore
        x_ND, weight, offs_E = ctx.saved_tensors
        return grouped_mm(grad_NF, weight, offs_E), grouped_mm(grad_NF.t(), x_ND, offs_E), None


class _GatedDownOnCpu(Function):
    @staticmethod
    def forward(ctx: Any, h1_NF: Tensor, h3_NF: Tensor, w2: Tensor, offs_E: Tensor) -> Tensor:
        silu_NF = F.silu(h1_NF)
        ctx.save_for_backward(h1_NF, h3_NF, silu_NF, w2, offs_E)
        return grouped_mm(silu_NF * h3_NF, w2.transpose(1, 2), offs_E)

    @staticmethod
    def backward(ctx: Any, grad_y_ND: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # pyrefly: ignore
        h1_NF, h3_NF, silu_NF, w2, offs_E = ctx.saved_tensors
        grad_y_ND = grad_y_ND.contiguous()  # grouped_mm refuses expanded (zero-stride) tensors
        h_NF = silu_NF * h3_NF
        grad_w2 = grouped_mm(grad_y_ND.t(), h_NF, offs_E)  # (E, D, F)
        grad_h_NF = grouped_mm(grad_y_ND, w2, offs_E)  # (N, D) -> (N, F)

        # h is not needed any more: the gradient of h3 is written over it, and that of h1 over the gradient of h.
        grad_h3_NF = torch.mul(grad_h_NF, silu_NF, out=h_NF)
        grad_h1_NF = torch.ops.aten.silu_backward.grad_input(grad_h_NF.mul_(h3_NF), h1_NF, grad_input=grad_h_NF)
        return grad_h1_NF, grad_h3_NF, grad_w2, None


def expert_swiglu(
    x_ND: Tensor,
    w1: Tensor,
    w2: Tensor,
    w3: Tensor,
    tokens_per_expert_E: Tensor,
    precision: Precision = "high",
    dropout: float = 0.0,
) -> Tensor:
    """w2 @ (silu(w1 @ x) * (w3 @ x)) with the weights of each row's expert; rows come sorted by expert.

    (N, D) -> (N, D); w1, w3 are (E, F, D), w2 is (E, D, F). tokens_per_expert_E sums to at most N: rows after the sum
    are not computed and hold anything. A `precision` of float8 is that of the products of forward and of the gradient
    of x; the weights' gradients are computed in the tensors' own. Source: Shazeer (2020), SwiGLU.

    `dropout` is the probability with which each number of silu(w1 @ x) * (w3 @ x) is 0; others are divided by
    1 - dropout. Source: "expert dropout", Switch (Fedus et al., 2021), section 2.4.
    """
    offs_E = tokens_per_expert_E.cumsum(0, dtype=torch.int32)

    # Fake tensors outside of torch.compile are those of an estimate, and stand for a GPU's.
    is_estimate = isinstance(x_ND, FakeTensor) and not torch.compiler.is_compiling()
    if x_ND.device.type == "cpu" and precision == "high" and not is_estimate:
        h1_NF, h3_NF = (_UpOnCpu.apply(x_ND, w, offs_E) for w in (w1, w3))
        h3_NF = F.dropout(h3_NF, dropout) if dropout else h3_NF  # a factor of the product: either may be dropped
        return _GatedDownOnCpu.apply(h1_NF, h3_NF, w2, offs_E)
    return swiglu_of_both(x_ND, w1, w2, w3, offs_E, precision, dropout)


def swiglu_of_both(
    x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, offs_E: Tensor, precision: Precision, dropout: float = 0.0
) -> Tensor:
    """`expert_swiglu` with w1 and w3 in one product, offs_E being the cumulative counts."""
    h13_N2F = _Up.apply(x_ND, w1, w3, offs_E, precision)
    if dropout:
        h1_NF, h3_NF = h13_N2F.chunk(2, dim=-1)  # (N, 2 F) -> 2 x (N, F)
        h13_N2F = torch.cat([h1_NF, F.dropout(h3_NF, dropout)], dim=-1)
    return _GatedDown.apply(h13_N2F, w2, offs_E, precision)


class FeedForward(nn.Module):
    """Dense SwiGLU: w2(silu(w1 x) * w3 x), (B, S, D) -> (B, S, D)."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """Apply to every token."""
        return self.w2(F.silu(self.w1(x_BSD)) * self.w3(x_BSD))


def local_weight(weight: Tensor) -> Tensor:
    """The part of a weight that this rank computes with; its gradient is the weight's."""
    return weight.to_local() if isinstance(weight, DTensor) else weight


def all_experts_here(of_experts: Tensor) -> Tensor:
    """`gather_experts` of a rank that has all experts."""
    return of_experts


class Experts(nn.Module):
    """E SwiGLU networks as one tensor per matrix, the expert first: w1, w3 (E, F, D), w2 (E, D, F).

    With expert parallelism the tensors are DTensors, sharded on dim 0, and this rank computes its own experts.
    `dropout` acts where gradients are recorded. Its numbers come from the device's generator, as a router's noise does.
    """

    def __init__(self, num_experts: int, dim: int, expert_dim: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dropout = dropout
        self.precision: Precision = "high"
        self.backend: ExpertsBackend | None = None  # in place of `expert_swiglu`
        self.w1 = nn.Parameter(torch.empty(num_experts, expert_dim, dim))
        self.w2 = nn.Parameter(torch.empty(num_experts, dim, expert_dim))
        self.w3 = nn.Parameter(torch.empty(num_experts, expert_dim, dim))

    def forward(self, x_ND: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
        """(N, D) rows sorted by expert -> (N, D)."""
        w1, w2, w3 = map(local_weight, (self.w1, self.w2, self.w3))
        if self.backend is not None:
            return self.backend(x_ND, w1, w2, w3, tokens_per_expert_E)
        dropout = self.dropout if torch.is_grad_enabled() else 0.0
        return expert_swiglu(x_ND, w1, w2, w3, tokens_per_expert_E, self.precision, dropout)


def initial_state(balancer_inits: Mapping[str, InitState], num_experts: int) -> dict[str, Tensor]:
    """What balancers keep of a layer at the start of a run, by the names of its buffers: `NAME/KEY`.

    A buffer's name can have no dots: those of NAME are slashes here.
    """
    return {
        f"{balancer}/{key}".replace(".", "/"): value.clone()  # the layer's own, whatever the balancer gives
        for balancer, init in balancer_inits.items()
        for key, value in init(num_experts).items()
    }


def linear_router(dim: int, num_experts: int) -> nn.Module:
    """The module whose logits nearly all routers go by."""
    return nn.Linear(dim, num_experts, bias=False)


class MoE(nn.Module):
    """Mixture of Experts: each token goes to the experts its router chose, and to the shared experts if there are any.

    `route` and `dispatcher` are functions given from outside. The shared experts, each of width `shared_expert_dim` (0:
    expert_dim), are one SwiGLU of their joint width, which is the same function as their sum; with `shared_expert_gate`
    it is multiplied by the sigmoid of a linear function of the token (Qwen1.5-MoE). `expert_bias` is an fp32 buffer
    (E,) that balancers write between steps, and `balancer_state` holds those that they keep for themselves, made by
    `balancer_inits`. `measures` are taken, by the names of their balancers, where gradients are recorded, and returned
    with the routing.

    The router chooses among `num_identity_experts` more, which have the last ids: their output is the token itself,
    times its weight like any other, and costs no rows. Source: LongCat-Flash (2025, arXiv 2509.01322), 2.1, its
    zero-computation experts. E counts them wherever routing, bias and balancers are concerned.

    `router_logits_multiplier` and `output_multiplier` are factors of the logits and of what the routed experts give,
    which a parametrization replaces.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_experts: int,
        expert_dim: int,
        route: Router | ParametricRouter,
        layer: int = 0,
        num_identity_experts: int = 0,
        num_shared_experts: int = 0,
        shared_expert_dim: int = 0,
        shared_expert_gate: bool = False,
        expert_dropout: float = 0.0,
        expert_bias: bool = False,
        balancer_inits: Mapping[str, InitState] | None = None,
        measures: Mapping[str, Measure] | None = None,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        super().__init__()
        self.router_logits_multiplier = self.output_multiplier = 1.0
        # What makes the logits is called `router` in any case: the parameter group goes by that name.
        self.num_experts, self.num_identity_experts, self.layer = num_experts, num_identity_experts, layer
        self.router_width = num_experts + num_identity_experts
        router = parametric(route)
        self.has_own_router, self.route = router.init is not None, router.route
        self.asked = asked_for(self.route, OFFERED)
        self.measures = {name: (take, asked_for(take, MEASURED, 0)) for name, take in (measures or {}).items()}
        self.dispatcher = local() if dispatcher is None else dispatcher
        self.first_expert = 0  # both are others where ranks have a part of the experts
        self.gather_experts: Callable[[Tensor], Tensor] = all_experts_here
        self.router = (router.init or linear_router)(dim, self.router_width)
        self.experts = Experts(num_experts, dim, expert_dim, expert_dropout)
        shared_dim = num_shared_experts * (shared_expert_dim or expert_dim)
        self.shared_experts = FeedForward(dim, shared_dim) if shared_dim else None
        self.shared_expert_gate = nn.Linear(dim, 1, bias=False) if shared_dim and shared_expert_gate else None
        self.expert_bias: Tensor | None
        bias_E = torch.zeros(self.router_width, dtype=torch.float32) if expert_bias else None
        self.register_buffer("expert_bias", bias_E)
        self.balancer_inits = balancer_inits or {}
        self.balancer_state = nn.Module() if self.balancer_inits else None
        for name, value in initial_state(self.balancer_inits, self.router_width).items():
            assert self.balancer_state is not None
            self.balancer_state.register_buffer(name, value)

    def forward(self, x_BSD: Tensor, places: Places | None = None) -> tuple[Tensor, Routing]:
        """(B, S, D) -> (B, S, D) and what the router decided for the T = B * S tokens; `places` where it is asked."""
        x_TD = x_BSD.flatten(0, 1)  # (B, S, D) -> (T, D)
        values = {"x": x_TD} | ({} if places is None else places._asdict())
        routing = self.route(self.router_logits(x_TD), self.expert_bias, **self.take(self.asked, values))
        routing = with_identity_experts(routing, self.num_identity_experts)
        x_ND, tokens_per_expert_E, permutation, state = self.dispatcher.dispatch(x_TD, routing)  # (T, D) -> (N, D)

        # The shared experts need no rows from elsewhere: they are computed while these travel.
        shared_BSD = self.shared(x_BSD)
        y_ND = self.experts(self.dispatcher.receive(x_ND, state), tokens_per_expert_E)
        y_ND = self.dispatcher.send_back(y_ND, state)
        y_BSD = combine_choices(y_ND, routing, permutation, x_TD).view_as(x_BSD)  # (N, D) -> (B, S, D)
        y_BSD = times(y_BSD, self.output_multiplier)

        # Evaluation has no losses to measure for.
        if self.measures and torch.is_grad_enabled():
            routing = self.measured(routing, y_ND, permutation, values)
        return (y_BSD if shared_BSD is None else y_BSD + shared_BSD), routing

    def shared(self, x_BSD: Tensor) -> Tensor | None:
        """What the shared experts give, (B, S, D), or None where there are none."""
        if self.shared_experts is None:
            return None
        y_BSD = self.shared_experts(x_BSD)
        return y_BSD if self.shared_expert_gate is None else y_BSD * self.shared_expert_gate(x_BSD).sigmoid()

    def take(self, names: tuple[str, ...], values: Mapping[str, Any]) -> dict[str, Any]:
        """What a function asks for by name: of `values`, else of the layer.

        Nothing else is read: torch.compile makes a graph for each layer whose number is.
        """
        return {name: values[name] if name in values else getattr(self, name) for name in names}

    def measured(self, routing: Routing, y_ND: Tensor, permutation: Permutation, values: Mapping[str, Any]) -> Routing:
        """The routing with what the balancers measure of the layer."""
        names = {name for _, asked in self.measures.values() for name in asked}
        values = {**values, "routing": routing}
        if "outputs" in names:
            values["outputs"] = rows_of_choices(y_ND, permutation, computed_choices(routing))  # (T, K, D)
        for name in names & set(WEIGHTS):
            values[name] = local_weight(getattr(self.experts, name))
        measures = {name: take(**self.take(asked, values)) for name, (take, asked) in self.measures.items()}
        return Routing(*routing[:-1], measures)  # not _replace, which torch.compile can't give out in torch 2.11

    @property
    def asks_places(self) -> bool:
        """Whether the router or a measure wants to know where tokens are."""
        names = [*self.asked, *(name for _, asked in self.measures.values() for name in asked)]
        return bool(set(names) & set(Places._fields))

    @property
    def expert_ids(self) -> Tensor:
        """Which experts this rank has, (E',) int64."""
        num_local = local_weight(self.experts.w1).shape[0]
        return torch.arange(self.first_expert, self.first_expert + num_local, device=self.experts.w1.device)

    def router_logits(self, x_TD: Tensor) -> Tensor:
        """(T, D) -> (T, E), in fp32: in bf16 near-ties between experts would be decided by rounding."""
        if isinstance(self.router, nn.Linear) and not self.has_own_router:
            logits_TE = F.linear(x_TD.float(), self.router.weight.float())
        else:
            parameters = {name: parameter.float() for name, parameter in self.router.named_parameters()}
            logits_TE = functional_call(self.router, parameters, (x_TD.float(),))
        return times(logits_TE, self.router_logits_multiplier)
