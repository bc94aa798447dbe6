"""titan_moe's optimizers in torchtitan's container: groups with their own rates, rates by load, Shampoo per expert."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro
from torch import Tensor, nn
from torch.optim import Optimizer
from torchtitan.components.checkpointer.utils import canonical_fqn
from torchtitan.components.optimizer import OptimizersContainer
from torchtitan.tools.logging import logger

from titan_moe.build import build_optimizer
from titan_moe.optimizer import optimizer as ours
from titan_moe.optimizer.optimizer import averaging, describe_group
from torchtitan_patches.balancers import make_balancers
from torchtitan_patches.moe import Table, read_tables
from torchtitan_patches.monitor import Monitor, attach

# torchtitan's names of the groups that titan_moe.optimizer.groups has; shared experts are `dense`, as there.
GROUP_PATTERNS = {
    "expert": r"\.inner_experts\.",
    "router": r"\.router\.",
    "embedding": r"^(tok_embeddings|lm_head)\.",
    "norm": r"norm\.",
    "dense": r"",
}


class BalancedOptimizers(OptimizersContainer):
    """torchtitan's container with titan_moe's balancers, optimizers, or both; with neither it is torchtitan's.

    Before each step the loads of all ranks are summed and the balancers set the experts' bias. With an `optimizer`
    table titan_moe's optimizer is built in place of the recipe's `param_groups`.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """Tables of titan_moe: [balancer.NAME] by name, and [optimizer] with its groups."""

        balancers: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)
        optimizer: Annotated[dict[str, Any], tyro.conf.Suppress] = field(default_factory=dict)

    monitor: Monitor
    rates: dict[str, float]  # of the last step, by group
    load_factors: dict[str, Tensor]  # (l, E) of the last step, of each group whose rates go by the experts' loads

    def __init__(self, config: Config, *, model_parts: list[nn.Module]) -> None:
        self.rates, self.load_factors = {}, {}
        if not config.optimizer:
            super().__init__(config, model_parts=model_parts)
            attach(self, make_balancers(config.balancers))
            return

        # torchtitan's constructor would build the recipe's optimizers, so it is left out. `_build` asks the monitor for
        # the sizes of the MoE layers, so that is attached first.
        self.model_parts = model_parts
        parameters = [p for part in model_parts for p in part.parameters() if p.requires_grad]
        Optimizer.__init__(self, parameters, {})  # the hooks; the parameters are those of the optimizer below
        attach(self, make_balancers(config.balancers))
        (model,) = model_parts
        self.optimizers = [_build(config, model, self.monitor)]

    def step(self, closure: None = None) -> None:
        """Take the optimizer's step, with the loads of the step where rates depend on them."""
        for optimizer in self.optimizers:
            self.rates = {group["name"]: group["lr"] for group in optimizer.param_groups if "name" in group}
            if isinstance(optimizer, ours.Optimizer):
                optimizer.step(load=self.monitor.load)
                self.load_factors = optimizer.load_factors()
            else:  # the recipe's own
                optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """torchtitan's, flat, and with it what the balancers keep."""
        return {**super().state_dict(), **self.monitor.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from there; the optimizers take from it what is theirs."""
        super().load_state_dict(state_dict)
        self.monitor.load_state_dict(state_dict)


def base_table(config: OptimizersContainer.Config) -> Table:
    """What [optimizer] inherits: the settings of the recipe's AdamW, where that updates everything."""
    if len(config.param_groups) != 1 or config.param_groups[0].optimizer_name != "AdamW":
        return {}
    given = dict(config.param_groups[0].optimizer_kwargs)
    beta1, beta2 = given.get("betas", (0.9, 0.999))
    taken = {key: float(given[key]) for key in ("lr", "eps", "weight_decay") if key in given}
    return {"optimizer": {**taken, "beta1": beta1, "beta2": beta2}}


def _build(config: BalancedOptimizers.Config, model: nn.Module, monitor: Monitor) -> Optimizer:
    layer = monitor.layers[0]
    experts = {"num_experts": layer.num_experts, "num_identity_experts": layer.num_identity_experts}
    sizes = {"moe": {**experts, "top_k": int(monitor.top_k)}}
    tables = read_tables(sizes, base_table(config), {"optimizer": config.optimizer})
    optimizer = build_optimizer(tables, model, patterns=GROUP_PATTERNS)
    for group, rule in zip(optimizer.param_groups, optimizer.rules, strict=True):
        if averaging(rule, group) is not None:
            raise ValueError(
                f"[optimizer] {describe_group(optimizer, group)} averages weights over steps, which torchtitan's "
                "validation and checkpoints do not know of: choose another optimizer"
            )
    names = {parameter: canonical_fqn(name) for name, parameter in model.named_parameters()}
    for group in optimizer.param_groups:
        group["param_names"] = [names[parameter] for parameter in group["params"]]  # keys of torchtitan's checkpoints
        logger.info(f"Optimizer of {group['name']}: {describe_group(optimizer, group)}, lr {group['lr']}")
    return optimizer


def with_tables(config: OptimizersContainer.Config, balancers: Table, optimizer: Table) -> BalancedOptimizers.Config:
    """The container's configuration with these tables beside those it has; ValueError for what is wrong in them."""
    if isinstance(config, BalancedOptimizers.Config):
        balancers, optimizer = {**config.balancers, **balancers}, {**config.optimizer, **optimizer}
    make_balancers(balancers)
    read_tables(base_table(config), {"optimizer": dict(optimizer)})
    given = {f.name: getattr(config, f.name) for f in dataclasses.fields(OptimizersContainer.Config)}
    return BalancedOptimizers.Config(**given, balancers=dict(balancers), optimizer=dict(optimizer))
