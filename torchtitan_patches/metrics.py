"""Measures of balance in torchtitan's own metrics, under the names that they have in titan_moe's metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.tools.logging import logger

from titan_moe.metrics import expert_lr_range, identity_means, load_metrics, maxvio, per_layer, to_numbers
from torchtitan_patches.monitor import Monitor, monitor_of


def by_layer(values_L: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`per_layer` of several measures, (L,) each."""
    return {key: value for name, of_layers in values_L.items() for key, value in per_layer(name, of_layers).items()}


class BalanceMetrics(MetricsProcessor):
    """torchtitan's metrics, with maxvio_batch and the other measures of the load for each step that is logged.

    Validations log maxvio_global, the MaxVio of the whole validation set. Values by layer are `NAME/layer_I`, I
    counting MoE layers from 0.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        """As torchtitan's."""

    monitor: Monitor

    @property
    def model_parts(self) -> list[torch.nn.Module] | None:
        """The model; the trainer sets it once it has optimizers."""
        return self._model_parts

    @model_parts.setter
    def model_parts(self, parts: list[torch.nn.Module] | None) -> None:
        self._model_parts = parts
        if parts is not None:
            self.monitor = monitor_of(self.optimizers)

    def log(
        self,
        step: int,
        global_avg_loss: float,
        global_max_loss: float,
        grad_norm: float,
        extra_metrics: dict[str, Any] | None = None,
    ) -> None:
        """Log a training step; all ranks take part."""
        monitor = self.monitor
        identity = identity_means(monitor.load, monitor.identity_load, monitor.num_tokens)
        losses = monitor.balance_losses()
        (numbers,) = to_numbers([{**load_metrics(monitor.load), **by_layer(identity), **losses, **self.rates()}])
        extra = {**(extra_metrics or {}), **numbers}
        super().log(step, global_avg_loss, global_max_loss, grad_norm, extra_metrics=extra)
        logger.info(f"step: {step:2}  maxvio_batch: {numbers['maxvio_batch']:.4f}")

    def rates(self) -> dict[str, Any]:
        """Learning rates that the groups of titan_moe's optimizer had in the step, and the range of the experts'."""
        rates = {f"lr/{name}": rate for name, rate in getattr(self.optimizers, "rates", {}).items()}
        return {**rates, **expert_lr_range(self.optimizers.rates, self.optimizers.load_factors)} if rates else {}

    def log_validation(self, loss: float, step: int, extra_metrics: dict[str, Any] | None = None) -> None:
        """Log a validation; all ranks take part."""
        load, identity_load, num_tokens = self.monitor.take_eval_loads()
        means_L = {"maxvio_global": maxvio(load), **identity_means(load, identity_load, num_tokens)}
        (numbers,) = to_numbers([by_layer(means_L)])
        super().log_validation(loss, step, extra_metrics={**(extra_metrics or {}), **numbers})
        logger.info(f"validate step: {step:2}  maxvio_global: {numbers['maxvio_global']:.4f}")
