"""Which router, balancers and switches make sense together, and what the user should know of those that do."""

import torch

from titan_moe.balancer import BALANCERS
from titan_moe.config.sections import Config
from titan_moe.model.routing import ROUTERS
from titan_moe.optimizer.schedule import SCHEDULES

EVEN = ("expert_choice", "base")  # the load of a forward pass is even whatever the logits


def check_combinations(config: Config) -> None:
    """Refuse what would fail later or do nothing; each error says what to change."""
    router, arguments = config.router.name, config.router.arguments
    biased = [
        name for name in config.balancer if name in BALANCERS and BALANCERS[name](**config.balancer[name]).moves_bias
    ]
    if router in ROUTERS:
        route = ROUTERS[router](top_k=config.moe.top_k, **arguments)
        with torch.random.fork_rng(devices=[]):  # a router refuses what does not fit it
            route(torch.zeros(2, config.moe.num_experts), torch.zeros(config.moe.num_experts) if biased else None)
    aux = config.balancer.get("aux_loss")
    if aux and router in EVEN:
        raise ValueError(
            f"balancer.aux_loss has no effect with router.name = {router!r}, whose load is even by construction: "
            "set aux_loss = false under [balancer]"
        )
    if aux and aux["scope"] == "global_batch_exact" and (arguments.get("jitter") or arguments.get("noise_std")):
        raise ValueError(
            'balancer.aux_loss.scope = "global_batch_exact" routes every token twice, but with router.jitter or '
            'router.noise_std the second time differs: switch the noise off, or take scope = "global_batch"'
        )
    if config.balancer.get("loss_free", {}).get("rule") == "quantile" and arguments.get("num_groups", 1) > 1:
        raise ValueError(
            'balancer.loss_free.rule = "quantile" compares each expert with the top_k of all experts, but '
            f'router.num_groups ({arguments["num_groups"]}) limits the choice: take rule = "sign" or num_groups = 1'
        )
    if config.debug.force_balanced_routing and router in EVEN:
        raise ValueError(
            f"debug.force_balanced_routing = true deals experts out in turn, but router.name = {router!r} is even by "
            "construction: switch one of them off"
        )


def cautions(config: Config) -> list[str]:
    """What to say once at the start of a run: choices that are sound only for some uses."""
    found = []
    steps, warmup = config.training.steps, config.lr_scheduler.arguments.get("warmup_steps", 0)
    if config.lr_scheduler.name in SCHEDULES and warmup >= steps:
        found.append(
            f"lr_scheduler.warmup_steps ({warmup}) is not below training.steps ({steps}): learning rates rise until "
            f"the run ends, to {steps / warmup:.2g} of what is set, and do not fall again"
        )
    if config.moe.num_experts == 0:
        return found
    name = config.router.name
    if name == "expert_choice":
        found.append(
            "router.name = 'expert_choice' compares each token with later ones: a causal model sees the future, in "
            "training and in evaluation, so its losses are too good and it cannot generate as it was trained"
        )
    if name in ("base", "sinkhorn"):
        found.append(
            f"router.name = {name!r} assigns tokens with an eye on later ones in training: a causal model sees the "
            "future there; evaluation takes each token's best experts"
        )
    if config.router.arguments.get("capacity_factor") and config.router.arguments.get("drop_policy") == "score":
        found.append(
            "router.drop_policy = 'score' drops a token in favour of later ones in training: a causal model sees the "
            "future there; drop_policy = 'position' does not"
        )
    return found
