"""torchtitan's MoE layer with a router of titan_moe, and with its dispatch, which knows what each expert gave.

torchtitan's own layer computes top_k experts for every token, and its dispatchers add up what they give at once. A
router of titan_moe may leave slots of a token unused or drop choices, some balancers look at the outputs, and identity
experts compute nothing.

Shapes: B sequences, L their length, T = B * L tokens, D dim, F hidden width, E experts, K choices of a token, N rows,
R those of this rank's experts.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import tyro
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from torchtitan.config.override import derive
from torchtitan.distributed.spmd_types import maybe_set_sparse_mesh
from torchtitan.models.common.moe import GroupedExperts, MoE, TokenChoiceTopKRouter
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher, LocalTokenDispatcher
from torchtitan.protocols.module import Module
from torchtitan.tools.logging import logger

from titan_moe.build import build_balancers, build_router
from titan_moe.config import Config, merge_layers
from titan_moe.config.layers import Layer
from titan_moe.config.sections import Moe
from titan_moe.dry_run import check_parts, dry_routing, dry_values
from titan_moe.model.dispatch import combine_choices, computed_choices, local, rows_of_choices
from titan_moe.model.moe import local_weight
from titan_moe.model.routing import ParametricRouter, Places, Routing, make_routing
from titan_moe.model.routing.common import OFFERED, asked_for, with_identity_experts
from titan_moe.model.transformer import fill
from titan_moe.parallelize.expert_parallel import all_to_all
from titan_moe.runtime.dtensor import local as local_part

Table = Mapping[str, Any]


def read_tables(*tables: Table) -> Config:
    """titan_moe's checked configuration of tables {"balancer": {...}, "router": {...}}, later ones over earlier."""
    return merge_layers([Layer("torchtitan_patches", dict(table)) for table in tables])


def layer_number(name: str) -> int:
    """The number of the layer of a module: 3 of layers.3.moe."""
    return int(re.findall(r"\d+", name)[-1])


def read_moe(table: Table) -> Moe:
    """The [moe] table of what torchtitan's layers can have of titan_moe's; ValueError for anything else."""
    moe = read_tables({"moe": dict(table)}).moe
    for key, value in table.items():
        if key not in ("num_identity_experts", "expert_dropout"):
            raise ValueError(
                f"torchtitan_patches: moe.{key} = {value!r} cannot be set here, where num_identity_experts and "
                "expert_dropout can: set it in the recipe's model"
            )
    return moe


def router_tables(router: TokenChoiceTopKRouter.Config, table: Table, **more: Table) -> Config:
    """titan_moe's configuration of a [router] table, and of others, for the sizes of torchtitan's router."""
    sizes = {"num_experts": router.num_experts, "top_k": router.top_k, **more.pop("moe", {})}
    model = {"dim": router.gate.in_features, "num_heads": 1}
    return read_tables({"moe": sizes, "model": model, "router": table, **more})


class Filled(Module):
    """What torchtitan asks of every module, for those of titan_moe's routers: filled as titan_moe does it.

    So their values depend on their names in the model and on the seed, and not on the layout.
    """

    full_name: str
    init_std: float

    def _init_self_parameters(self) -> None:
        for name, parameter in self.named_parameters(recurse=False):
            fill(parameter, self.init_std, f"{self.full_name}.{name}", torch.initial_seed())


@functools.cache
def filled(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of modules that are of this kind and `Filled`."""
    return type(kind.__name__, (Filled, kind), {})


class OwnRouter(TokenChoiceTopKRouter):
    """A router of titan_moe's [router] table; gives a Routing of the T tokens.

    `gate` makes the logits: torchtitan's linear layer, or the module that the router brings along. `places` of the
    tokens are set from outside before each forward pass of the model, where the router asks for them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(TokenChoiceTopKRouter.Config):
        """The table, and the name of the MoE layer in the model, by which own parameters get their first values."""

        table: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        layer_name: str = ""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        debug = {"force_balanced_routing": config._debug_force_load_balance}
        tables = router_tables(config, config.table, debug=debug)
        self.router: ParametricRouter = build_router(tables)
        self.name = tables.router.name
        self.asked = asked_for(self.router.route, OFFERED)
        self.asks_places = self.router.whole_sequences or not {*Places._fields}.isdisjoint(self.asked)
        self.layer = layer_number(config.layer_name)
        self.places: Places | None = None
        if self.router.init is not None:
            self.gate: Any = self.router.init(config.gate.in_features, self.num_experts)
            for name, module in self.gate.named_modules(prefix=f"{config.layer_name}.router.gate"):
                module.__class__ = filled(type(module))
                vars(module).update(full_name=name, init_std=tables.model.init_std)

    def forward(self, x_BLD: Tensor, expert_bias_E: Tensor | None = None) -> Routing:  # pyrefly: ignore
        """(B, L, D) -> the Routing of the T tokens; logits are computed in fp32, as in titan_moe."""
        if isinstance(x_BLD, DTensor):
            raise ValueError("torchtitan_patches: a router of titan_moe does not support tensor parallelism")
        x_TD = x_BLD.flatten(0, 1)  # (B, L, D) -> (T, D)
        parameters = {name: parameter.float() for name, parameter in self.gate.named_parameters()}
        logits_TE = functional_call(self.gate, parameters, (x_TD.float(),))  # (T, D) -> (T, E)

        # What no monitor has told is missing: without one nobody knows where documents begin.
        offered = {"x": x_TD, "router": self.gate, "layer": self.layer}
        if self.asks_places:
            if self.places is None:
                raise ValueError("torchtitan_patches: the router asks for places: turn it on with `enable`")
            offered |= self.places._asdict()
        bias_E = None if expert_bias_E is None else local_part(expert_bias_E)
        return self.router.route(logits_TE, bias_E, **{name: offered[name] for name in self.asked})


class DroppedExperts(GroupedExperts):
    """torchtitan's experts with dropout of their hidden activations, where gradients are recorded.

    The formula is that of titan_moe's `expert_swiglu`. Its products are torchtitan's, which may be replaced.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        """The probability with which each number is dropped."""

        dropout: float = 0.0

    dtype = torch.bfloat16  # in which torchtitan's experts compute

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.dropout = config.dropout

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        """(R, D) rows sorted by expert -> (R, D)."""
        offs_E = num_tokens_per_expert_E.cumsum(0, dtype=torch.int32)
        weights = (local_weight(w).to(self.dtype) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
        w1_EDF, w2_EFD, w3_EDF = (weight.transpose(-2, -1) for weight in weights)
        rows_RD = x_RD.to(self.dtype)

        # A factor of the product: dropping either is dropping both.
        h3_RF = F.dropout(self._grouped_mm(A=rows_RD, B_t=w3_EDF, offs=offs_E), self.dropout, torch.is_grad_enabled())
        h_RF = F.silu(self._grouped_mm(A=rows_RD, B_t=w1_EDF, offs=offs_E)) * h3_RF
        return self._grouped_mm(A=h_RF, B_t=w2_EFD, offs=offs_E).type_as(x_RD)


class DispatchedMoE(MoE):
    """torchtitan's layer with titan_moe's dispatch around torchtitan's experts.

    `on_outputs(y_TD, outputs_TKD)` gives the layer's routed output, seeing what each of a token's experts gave, 0 where
    nothing was computed. It is called where gradients are recorded.

    The last of the router's experts may be identity experts, which have no weights: `num_experts` counts them.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MoE.Config):
        """As torchtitan's, and how many of `num_experts` are identity experts."""

        num_identity_experts: int = 0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.num_identity_experts = config.num_identity_experts
        self.dispatcher = local()
        self.on_outputs: Callable[[Tensor, Tensor], Tensor] | None = None

    def parallelize(self, parallel_dims: Any) -> None:
        """As torchtitan's, which tells its dispatcher the ranks that have the other experts."""
        super().parallelize(parallel_dims)
        mesh = getattr(self.routed_experts.token_dispatcher, "ep_mesh", None)
        if mesh is not None:
            self.dispatcher = all_to_all(mesh)

    def _init_self_buffers(self, *, buffer_device: torch.device | None = None) -> None:
        super()._init_self_buffers(buffer_device=buffer_device)

        # torchtitan makes its buffers of zeros for the experts with weights, and the router counts all.
        self.tokens_per_expert_E = self.tokens_per_expert_E.new_zeros(self.router.num_experts)
        if self.expert_bias_E is not None:
            self.expert_bias_E = self.expert_bias_E.new_zeros(self.router.num_experts)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        # torchtitan's router gives no Routing. For the dispatch its choices are enough.
        routing = self.router(x_BLD, self.expert_bias_E)
        if not isinstance(routing, Routing):
            topk_scores, topk_experts, scores = (tensor.flatten(0, 1) for tensor in routing)  # (B, L, .) -> (T, .)
            routing = make_routing(scores, scores, topk_scores, topk_experts)
        routing = with_identity_experts(routing, self.num_identity_experts)
        if self.training:
            with torch.no_grad():
                self.tokens_per_expert_E.add_(routing.tokens_per_expert)

        x_TD = x_BLD.flatten(0, 1)  # (B, L, D) -> (T, D)
        x_ND, tokens_per_expert_E, permutation, state = self.dispatcher.dispatch(x_TD, routing)
        shared_BLD = None if self.shared_experts is None else self.shared_experts(x_BLD)
        x_ND = self.dispatcher.receive(x_ND, state)
        with maybe_set_sparse_mesh():
            y_ND = self.routed_experts.inner_experts(x_ND, tokens_per_expert_E)
        y_ND = self.dispatcher.send_back(y_ND, state)
        y_TD = combine_choices(y_ND, routing, permutation, x_TD)  # (N, D) -> (T, D)

        if self.on_outputs is not None and torch.is_grad_enabled():
            y_TD = self.on_outputs(y_TD, rows_of_choices(y_ND, permutation, computed_choices(routing)))
        y_BLD = y_TD.view_as(x_BLD)
        return y_BLD if shared_BLD is None else y_BLD + shared_BLD


def check_tables(moe: MoE.Config, router: Table, balancers: Table, optimizer: Table, experts: Moe) -> None:
    """Call router and balancers on a few random tokens, in the sizes of this layer; ValueError for what goes wrong."""
    # An `enable` before may have set them.
    identity = experts.num_identity_experts or getattr(moe, "num_identity_experts", 0)
    sizes = {"num_experts": moe.routed_experts.inner_experts.num_experts, "num_identity_experts": identity}
    tables = router_tables(moe.router, router, moe=sizes, balancer=balancers, optimizer=optimizer)
    try:
        for caution in check_parts(tables):
            logger.warning(f"torchtitan_patches: {caution}")
    except ValueError as error:
        raise ValueError(f"torchtitan_patches: {error}") from error

    # Some routers take no bias, and torchtitan's own rule moves one.
    route, bias_E = build_router(tables), torch.zeros(tables.moe.router_width)
    own_rule = moe.load_balance_coeff is not None and router
    if own_rule and not any(balancer.moves_bias for _, balancer in build_balancers(tables).values()):
        values = dry_values(route, tables.model.dim, tables.moe.num_experts, len(bias_E))
        try:
            dry_routing(route, bias_E, values, len(bias_E))
        except ValueError:
            raise ValueError(
                f"torchtitan_patches: router {tables.router.name} takes no bias, and torchtitan's own rule moves one: "
                "set load_balance_coeff of each MoE.Config to None"
            ) from None


def dispatched(moe: MoE.Config) -> DispatchedMoE.Config:
    """The layer with titan_moe's dispatch; ValueError for one with other parts than torchtitan's standard ones."""
    what = "torchtitan_patches: own routers and outputs of experts need torchtitan's"
    if type(moe) not in (MoE.Config, DispatchedMoE.Config):
        raise ValueError(f"{what} MoE, found {type(moe).__qualname__}: use another model")
    dispatcher = type(moe.routed_experts.token_dispatcher)
    if dispatcher not in (LocalTokenDispatcher.Config, AllToAllTokenDispatcher.Config):
        raise ValueError(
            f"{what} dispatcher 'standard', found {dispatcher.__qualname__}: set moe_comm_backend of the recipe's model"
        )
    return derive(moe, DispatchedMoE.Config)


def use_dropout(spec: Any, dropout: float) -> None:
    """Replace the experts of a model by `DroppedExperts`, in place; ValueError for other experts than torchtitan's."""
    for _, experts, parent, key in spec.model.traverse(GroupedExperts.Config):
        if type(experts) not in (GroupedExperts.Config, DroppedExperts.Config):
            raise ValueError(
                f"torchtitan_patches: moe.expert_dropout = {dropout} needs torchtitan's GroupedExperts, found "
                f"{type(experts).__qualname__}: set it to 0, or use another model"
            )
        setattr(parent, key, derive(experts, DroppedExperts.Config, dropout=dropout))


def add_identity_experts(moe: DispatchedMoE.Config, number: int) -> None:
    """Let the router of a layer choose among so many identity experts more, in place."""
    if moe.router.num_expert_groups is not None and not isinstance(moe.router, OwnRouter.Config):
        raise ValueError(
            f"torchtitan_patches: moe.num_identity_experts = {number} does not go with groups of experts that sit side "
            "by side, identity experts sit nowhere: set num_expert_groups of each router to None"
        )
    width = moe.routed_experts.inner_experts.num_experts + number
    gate = dataclasses.replace(moe.router.gate, out_features=width)
    moe.router = dataclasses.replace(moe.router, num_experts=width, gate=gate)
    moe.num_experts, moe.num_identity_experts = width, number


def use_dispatch(spec: Any, router: Table, num_identity_experts: int = 0) -> None:
    """Replace the MoE layers of a model by `DispatchedMoE`, in place, and their routers where there is a table."""
    for name, moe, parent, key in spec.model.traverse(MoE.Config):
        layer = dispatched(moe)
        if router:
            layer.router = derive(moe.router, OwnRouter.Config, table=dict(router), layer_name=name)
        if num_identity_experts:
            add_identity_experts(layer, num_identity_experts)
        setattr(parent, key, layer)

        # torchtitan's converters know neither own parameters, which some would leave out of what they write, nor
        # experts without weights, which they would look for.
        own_parameters = router and build_router(router_tables(moe.router, router)).init is not None
        if own_parameters or layer.num_identity_experts:
            spec.state_dict_adapter = None
