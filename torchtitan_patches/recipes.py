"""For recipes, functions that return a torchtitan configuration: `enable`."""

from collections.abc import Mapping, Sequence
from typing import Any

from torchtitan_patches.version import check_version


def enable(
    config: Any,
    *,
    balancers: Mapping[str, Any] | None = None,
    metrics: bool = False,
    moe: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    router: Mapping[str, Any] | None = None,
) -> Any:
    """Turn pieces of titan_moe on in a torchtitan `Trainer.Config`, in place, and return it.

    `balancers` are the tables [balancer.NAME] of titan_moe by name, {"aux_loss": {"coeff": 0.01}}; `optimizer` is the
    table [optimizer] with its groups, {"expert": {"name": "shampoo", "lr": 3e-4}}, which inherits lr, betas, eps and
    weight_decay from the recipe's AdamW; `metrics` logs MaxVio and the other measures of balance; `moe` is what the
    layers can have of the table [moe], {"num_identity_experts": 4, "expert_dropout": 0.1}; `router` is the table
    [router], {"name": "cosine"}, in place of the settings of the recipe's routers but for their sizes. Raises
    RuntimeError for another torchtitan than the supported one, ValueError for what is wrong in the tables or does not
    fit the recipe. Only nodes that a piece needs are replaced: `optimizer`, `loss`, `lr_scheduler`, `metrics`, the
    model's experts for dropout, and its MoE layers for a router, for identity experts and for balancers that look at
    outputs; `loss_free` also turns the layers' bias on.
    """
    # The version is checked before the imports: another torchtitan may lack what they name.
    check_version()
    from torchtitan.models.common.moe import MoE

    from torchtitan_patches import overrides
    from torchtitan_patches.balancers import make_balancers
    from torchtitan_patches.moe import check_tables, read_moe
    from torchtitan_patches.monitor import asks_length

    layers = [moe for _, moe, _, _ in config.model_spec.model.traverse(MoE.Config)]
    if not layers:
        raise ValueError("torchtitan_patches is for Mixtures of Experts, but the model of this recipe has no MoE layer")
    chosen = [balancer for _, balancer in make_balancers(balancers or {}).values()]
    if balancers or router or moe:
        check_tables(layers[0], router or {}, balancers or {}, optimizer or {}, read_moe(moe or {}))

    # Only these know where the model's tokens are, keep what balancers do between steps, and seed what is drawn in one.
    if balancers or optimizer or router or moe:
        config.optimizer = overrides.optimizers(
            config.optimizer, balancers=dict(balancers or {}), optimizer=dict(optimizer or {})
        )

    # Balance losses are divided by the tokens of the step, as the loss is, and only the loss is told their number. In
    # the same way only the schedule of the rates is told the run's length.
    if any(balancer.has_loss for balancer in chosen):
        _count_tokens(config)
    if any(asks_length(balancer) for balancer in chosen):
        config.lr_scheduler = overrides.lr_scheduler(config.lr_scheduler)

    # Without a coefficient torchtitan's layers have no bias to move.
    if any(balancer.moves_bias for balancer in chosen):
        for layer in layers:
            layer.load_balance_coeff = layer.load_balance_coeff or 1e-3  # makes the bias; the value is not used
    _change_model(config.model_spec, chosen, read_moe(moe or {}), router or {})
    if metrics:
        config.metrics = overrides.metrics(config.metrics)
    return config


def _change_model(spec: Any, balancers: Sequence[Any], moe: Any, router: Mapping[str, Any]) -> None:
    """Replace what these need of a model, in place; `moe` is titan_moe's section."""
    from torchtitan_patches.balancers import asked_of_layer
    from torchtitan_patches.moe import use_dispatch, use_dropout
    from torchtitan_patches.monitor import tell_context_degree

    if moe.expert_dropout:
        use_dropout(spec, moe.expert_dropout)
    looks_at_outputs = any("outputs" in asked_of_layer(balancer) for balancer in balancers)
    if router or moe.num_identity_experts or looks_at_outputs:
        use_dispatch(spec, router, moe.num_identity_experts)

    # The degree of context parallelism may still change on the command line, so that only the job knows it.
    if balancers or router:
        spec.parallelize_fn = tell_context_degree(spec.parallelize_fn)


def _count_tokens(config: Any) -> None:
    """Replace torchtitan's loss by one that notes the tokens of each step."""
    from torchtitan.components.loss import CrossEntropyLoss

    from torchtitan_patches import overrides
    from torchtitan_patches.balancers import CountedCrossEntropyLoss

    # To replace a subclass of it would lose what the subclass does.
    replaceable = CrossEntropyLoss.Config, CountedCrossEntropyLoss.Config
    nodes = [node for node in config.traverse(CrossEntropyLoss.Config) if type(node[1]) in replaceable]
    if not nodes:
        given = type(config.loss).__qualname__
        raise ValueError(f"torchtitan_patches: balance losses need torchtitan's CrossEntropyLoss, found {given}")
    for _, node, parent, name in nodes:
        setattr(parent, name, overrides.loss(node))
