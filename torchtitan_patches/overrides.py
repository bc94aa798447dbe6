"""The pieces as torchtitan's overrides, for the command line: --override.imports torchtitan_patches.overrides.NAME ...

Arguments are JSON: 'torchtitan_patches.overrides.optimizers={"balancers": {"aux_loss": {"coeff": 0.01}}}'.
"""

from typing import Any

from torchtitan_patches.version import check_version

check_version()

from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.metrics import MetricsProcessor  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer  # noqa: E402
from torchtitan.config.override import derive, override  # noqa: E402
from torchtitan.models.common.moe import MoE  # noqa: E402

from torchtitan_patches.balancers import CountedCrossEntropyLoss, RunLength  # noqa: E402
from torchtitan_patches.metrics import BalanceMetrics  # noqa: E402
from torchtitan_patches.moe import dispatched  # noqa: E402
from torchtitan_patches.optimizer import with_tables  # noqa: E402


@override(target=OptimizersContainer.Config, description="titan_moe's balancers and optimizers")
def optimizers(
    config: OptimizersContainer.Config,
    *,
    balancers: dict[str, Any] | None = None,
    optimizer: dict[str, Any] | None = None,
) -> OptimizersContainer.Config:
    """Balancers, an optimizer, or both, by the tables that titan_moe's [balancer.NAME] and [optimizer] have."""
    return with_tables(config, balancers or {}, optimizer or {})


@override(target=CrossEntropyLoss.Config, exact=True, description="tells titan_moe's balance losses the tokens")
def loss(config: CrossEntropyLoss.Config) -> CrossEntropyLoss.Config:
    """What balance losses (aux_loss, z_loss, entropy_loss) need beside `optimizers`."""
    return derive(config, CountedCrossEntropyLoss.Config)


@override(target=LRSchedulersContainer.Config, exact=True, description="tells titan_moe's balancers the run's length")
def lr_scheduler(config: LRSchedulersContainer.Config) -> LRSchedulersContainer.Config:
    """What balancers that go by the run's length (loss_free.decay_ratio) need beside `optimizers`."""
    return derive(config, RunLength.Config)


@override(target=MoE.Config, exact=True, description="keeps what each expert gave for titan_moe's balancers")
def moe(config: MoE.Config) -> MoE.Config:
    """What balancers that look at the experts' outputs (orthogonality, specialization) need beside `optimizers`."""
    return dispatched(config)


@override(target=MetricsProcessor.Config, description="MaxVio and other measures of balance")
def metrics(config: MetricsProcessor.Config) -> MetricsProcessor.Config:
    """Measures of balance in torchtitan's metrics."""
    return derive(config, BalanceMetrics.Config)
