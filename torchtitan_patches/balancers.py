"""titan_moe's balancers in torchtitan: their tables, and what tells them the tokens of a step and a run's length."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer

from titan_moe.balancer import OFFERED, SEEN, Balancer
from titan_moe.build import build_balancers
from titan_moe.model.moe import MEASURED
from titan_moe.model.routing.common import asked_for
from titan_moe.step import Balancers
from torchtitan_patches.moe import Table, read_tables
from torchtitan_patches.monitor import monitor_of, note_tokens


def make_balancers(table: Table) -> Balancers:
    """The balancers of a table as [balancer.NAME] has them, {"aux_loss": {"coeff": 0.01}, ...}.

    Raises ValueError for what titan_moe refuses, and for what has no place in torchtitan: losses on loads of more than
    one micro-batch, which the trainer drops before the next one.
    """
    # Losses on loads of a global batch need the forward passes of all micro-batches first, which the trainer drops.
    balancers = build_balancers(read_tables({"balancer": dict(table)}))
    for name, (_, balancer) in balancers.items():
        if not {"micro_batch", "sequence"}.issuperset(balancer.scopes):
            raise ValueError(
                f"torchtitan_patches: balancer.{name}.scope = {balancer.scope!r}: torchtitan's layers see one "
                "micro-batch of one rank: use 'micro_batch' or 'sequence'"
            )
        check_asked(name, balancer)
    return balancers


def check_asked(name: str, balancer: Balancer) -> None:
    """Raise ValueError where a balancer's functions take what titan_moe does not offer."""
    try:
        asked_for(balancer.post_step, OFFERED)
        asked_for(balancer.loss, SEEN, 3)
        asked_of_layer(balancer)
    except ValueError as error:
        raise ValueError(f"torchtitan_patches: balancer.{name} {error}") from None


def asked_of_layer(balancer: Balancer) -> tuple[str, ...]:
    """What a balancer's measure takes by name."""
    return () if balancer.measure is None else asked_for(balancer.measure, MEASURED, 0)


class CountedCrossEntropyLoss(CrossEntropyLoss):
    """torchtitan's loss, unchanged, which tells the monitor by how many tokens it is divided."""

    @dataclass(kw_only=True, slots=True)
    class Config(CrossEntropyLoss.Config):
        """As torchtitan's."""

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The cross-entropy of a micro-batch, or of a part of one; without a number of tokens it is validation."""
        if global_valid_tokens is not None:
            note_tokens(global_valid_tokens)
        return super().__call__(pred, labels, global_valid_tokens, **kwargs)


class RunLength(LRSchedulersContainer):
    """torchtitan's schedule, unchanged, which tells the monitor how many steps the run has."""

    @dataclass(kw_only=True, slots=True)
    class Config(LRSchedulersContainer.Config):
        """As torchtitan's."""

        def build(self, *, optimizers: Any, training_steps: int) -> LRSchedulersContainer:
            """As torchtitan's."""
            monitor_of(optimizers).num_steps = training_steps
            return LRSchedulersContainer.Config.build(self, optimizers=optimizers, training_steps=training_steps)
