"""A parametrization's factors as a part of the weights: for formats whose models have no such factors."""

import dataclasses

import torch
from torch import nn

from titan_moe.checkpoint.lazy import LazyTensors
from titan_moe.config import Config
from titan_moe.config.checks import parametrization_of
from titan_moe.config.sections import Component
from titan_moe.model.multipliers import Multipliers, folded


def without_factors(config: Config) -> Config:
    """The same model in the standard parametrization, for weights that have the factors in them."""
    return dataclasses.replace(config, parametrization=Component("standard"))


def factor_of(config: Config, name: str) -> float:
    """By how much the parameter `name` of a model of `config` is to be multiplied to be one of `without_factors`."""
    multipliers = parametrization_of(config).multipliers
    return folded(name, multipliers, tied=config.model.tie_embeddings, qk_norm=config.model.qk_norm != "none")


def fold_tensors(config: Config, tensors: LazyTensors) -> LazyTensors:
    """The tensors of a model of `config`, by their names in the model, as those of the same one `without_factors`."""
    factors = {name: factor_of(config, name) for name in tensors}
    return {
        name: tensor if factors[name] == 1.0 else tensor.map(lambda weight, by=factors[name]: weight * by)
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def fold_parameters(config: Config, model: nn.Module) -> None:
    """As `fold_tensors`, in place, of a model that was built `without_factors` and has the weights of `config`."""
    for name, parameter in model.named_parameters():
        parameter.mul_(factor_of(config, name))


def check_without_factors(config: Config) -> None:
    """Raise ValueError where the forward of a model of `config` would multiply imported weights by factors."""
    if parametrization_of(config).multipliers != Multipliers():
        raise ValueError(
            f"parametrization.name = {config.parametrization.name!r} multiplies in the forward, and imported weights "
            "are of a model that does not: set it to 'standard'"
        )
