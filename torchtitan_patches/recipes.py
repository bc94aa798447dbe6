"""For recipes, functions that return a torchtitan configuration: `enable`."""

from collections.abc import Mapping
from typing import Any

from torchtitan_patches.version import check_version


def enable(
    config: Any,
    *,
    balancers: Mapping[str, Any] | None = None,
    metrics: bool = False,
    optimizer: Mapping[str, Any] | None = None,
) -> Any:
    """Turn pieces of titan_moe on in a torchtitan `Trainer.Config`, in place, and return it.

    `balancers` are the tables [balancer.NAME] of titan_moe by name, {"aux_loss": {"coeff": 0.01}}; `optimizer` is the
    table [optimizer] with its groups, {"expert": {"name": "shampoo", "lr": 3e-4}}, which inherits lr, betas, eps and
    weight_decay from the recipe's AdamW; `metrics` logs MaxVio and the other measures of balance. Raises RuntimeError
    for another torchtitan than the supported one, ValueError for what is wrong in the tables or does not fit the
    recipe. Nothing but the three nodes `optimizer`, `loss` and `metrics` of the configuration is replaced; `loss_free`
    also turns the layers' bias on.
    """
    # The version is checked before the imports: another torchtitan may lack what they name.
    check_version()
    from torchtitan.components.loss import CrossEntropyLoss
    from torchtitan.models.common.moe import MoE

    from torchtitan_patches import overrides
    from torchtitan_patches.balancers import CountedCrossEntropyLoss, make_balancers

    if not any(config.model_spec.model.traverse(MoE.Config)):
        raise ValueError("torchtitan_patches is for Mixtures of Experts, but the model of this recipe has no MoE layer")
    if balancers or optimizer:
        config.optimizer = overrides.optimizers(
            config.optimizer, balancers=dict(balancers or {}), optimizer=dict(optimizer or {})
        )

    # Balance losses are divided by the tokens of the step, as the loss is, and only the loss is told their number. To
    # replace a subclass of it would lose what the subclass does.
    chosen = [balancer for _, balancer in make_balancers(balancers or {}).values()]
    if any(balancer.has_loss for balancer in chosen):
        replaceable = CrossEntropyLoss.Config, CountedCrossEntropyLoss.Config
        nodes = [node for node in config.traverse(CrossEntropyLoss.Config) if type(node[1]) in replaceable]
        if not nodes:
            given = type(config.loss).__qualname__
            raise ValueError(f"torchtitan_patches: balance losses need torchtitan's CrossEntropyLoss, found {given}")
        for _, node, parent, name in nodes:
            setattr(parent, name, overrides.loss(node))

    # Without a coefficient torchtitan's layers have no bias to move.
    if any(balancer.moves_bias for balancer in chosen):
        for _, moe, _, _ in config.model_spec.model.traverse(MoE.Config):
            moe.load_balance_coeff = moe.load_balance_coeff or 1e-3  # makes the bias; the value is not used
    if metrics:
        config.metrics = overrides.metrics(config.metrics)
    return config
