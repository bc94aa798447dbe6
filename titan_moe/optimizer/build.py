"""Optimizers by name: `OPTIMIZERS[name](param_groups, **arguments)` gives a torch.optim.Optimizer."""

import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import torch

from titan_moe.optimizer.ademamix import ademamix
from titan_moe.optimizer.hyperball import adamh, muonh
from titan_moe.optimizer.lion import lion
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.meta_shampoo import distributed_shampoo
from titan_moe.optimizer.muon import muon
from titan_moe.optimizer.normuon import normuon
from titan_moe.optimizer.optimizer import Optimizer, Rule
from titan_moe.optimizer.schedule import Factor, factors_of
from titan_moe.optimizer.schedule_free import schedule_free_adamw
from titan_moe.optimizer.shampoo import shampoo
from titan_moe.optimizer.soap import soap
from titan_moe.optimizer.transform import StateDtype, Transform, adamw


def common(
    *,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.95,
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    state_dtype: Annotated[StateDtype, "of moments between steps; bfloat16 is rounded stochastically"] = "float32",
) -> None:
    """What every optimizer takes: AdamW needs it for what is no matrix. With a kernel there is no such rest."""


def optimizer_of(
    make: Callable[..., Transform], name: str = "", about: str = "", without: Sequence[str] = (), **preset: Any
) -> Callable[..., Optimizer]:
    """Make the function that builds an optimizer from parameter groups, for a registry or a configuration.

    Its keyword arguments are those of `common`, but for the ones in `without`, and of `make`, the transform's maker;
    `preset` replaces defaults. A group may have its own value of each. `name` is what checkpoints and logs say, by
    default the maker's.
    """
    # The signature is the schema of the configuration, so it is composed here: what all optimizers take, then what this
    # one takes, whose defaults win.
    arguments = {**inspect.signature(common).parameters, **inspect.signature(make, eval_str=True).parameters}
    groups = inspect.Parameter("param_groups", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=list[Group])
    arguments = {key: argument for key, argument in arguments.items() if key not in without}
    changed = [argument.replace(default=preset.get(argument.name, argument.default)) for argument in arguments.values()]
    signature = inspect.Signature([groups, *changed], return_annotation=Optimizer)
    rule = Rule(name or make.__name__, make)

    def build(*args: Any, **kwargs: Any) -> Optimizer:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        param_groups, defaults = given.arguments.pop("param_groups"), given.arguments
        groups = with_betas(param_groups, defaults.pop("beta1"), defaults.pop("beta2"))
        groups = with_state_dtype(groups, defaults.pop("state_dtype"))
        return Optimizer(groups, [rule] * len(groups), defaults)

    build.__signature__ = signature  # pyrefly: ignore[missing-attribute]
    build.__doc__ = about or inspect.getdoc(make)
    return build


def with_betas(param_groups: Sequence[Group], beta1: float, beta2: float) -> list[Group]:
    """The groups with `betas`, torch's name, from their own beta1 and beta2 or the given ones."""
    groups = []
    for group in param_groups:
        rest = {k: v for k, v in group.items() if k not in ("beta1", "beta2")}
        groups.append({"betas": (group.get("beta1", beta1), group.get("beta2", beta2)), **rest})
    return groups


def with_state_dtype(param_groups: Sequence[Group], state_dtype: StateDtype) -> list[Group]:
    """The groups with `state_dtype`, their own or the given one, where it is not float32.

    Checkpoints of before there was a choice have no such setting, and are of float32.
    """
    groups = []
    for group in param_groups:
        chosen = group.get("state_dtype", state_dtype)
        rest = {k: v for k, v in group.items() if k != "state_dtype"}
        groups.append(rest if chosen == "float32" else {**rest, "state_dtype": chosen})
    return groups


def set_lr(optimizer: torch.optim.Optimizer, base_lrs: Sequence[float], factor: Factor) -> dict[str, float]:
    """Set each group's lr to its configured one, `base_lrs`, times the schedule's `factor`; return them by group."""
    factors = factors_of(factor, [group["name"] for group in optimizer.param_groups])
    for group, base_lr in zip(optimizer.param_groups, base_lrs, strict=True):
        group["lr"] = base_lr * factors[group["name"]]
    return {group["name"]: group["lr"] for group in optimizer.param_groups}


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": optimizer_of(adamw, "AdamW"),
    "shampoo": optimizer_of(shampoo),
    "shampoo_fast": optimizer_of(
        shampoo,
        "shampoo_fast",
        "The preset of shampoo that we recommend: shared factors of 128, statistics every 10 steps, roots staggered, "
        "products in bfloat16 where that is fast.",
        statistics_every=10,
        max_preconditioner_dim=128,
        share_factors=True,
        stagger_roots=True,
        matmul_dtype="auto",
    ),
    "distributed_shampoo": optimizer_of(distributed_shampoo),
    "soap": optimizer_of(soap),
    "muon": optimizer_of(muon),
    "normuon": optimizer_of(normuon),
    "muonh": optimizer_of(muonh, weight_decay=0.0),
    "adamh": optimizer_of(adamh, weight_decay=0.0),
    "ademamix": optimizer_of(ademamix),
    "lion": optimizer_of(lion, without=["eps"], lr=1e-4, weight_decay=1.0),
    "schedule_free_adamw": optimizer_of(schedule_free_adamw),
}
# Of these, what treats each element by itself, and so takes parameters of any shape; the others leave some to AdamW.
BY_ELEMENT = ("adamw", "ademamix", "lion", "schedule_free_adamw")
