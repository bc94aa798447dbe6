"""titan_moe's balancers in torchtitan: their tables, and the loss that tells them the tokens of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import CrossEntropyLoss

from titan_moe.balancer import OFFERED, SEEN
from titan_moe.build import build_balancers
from titan_moe.config import Config, merge_layers
from titan_moe.config.layers import Layer
from titan_moe.model.routing.common import asked_for
from titan_moe.step import Balancers
from torchtitan_patches.monitor import note_tokens

Table = Mapping[str, Any]


def read_tables(*tables: Table) -> Config:
    """titan_moe's checked configuration of tables {"balancer": {...}, "optimizer": {...}}, later ones over earlier."""
    return merge_layers([Layer("torchtitan_patches", dict(table)) for table in tables])


def make_balancers(table: Table) -> Balancers:
    """The balancers of a table as [balancer.NAME] has them, {"aux_loss": {"coeff": 0.01}, ...}.

    Raises ValueError for what titan_moe refuses, and for what torchtitan's trainer cannot do: losses on loads of more
    than one micro-batch, which it drops before the next one, rates that fall at the run's end, and states.
    """
    # Losses on loads of a global batch need the forward passes of all micro-batches first, which the trainer drops; and
    # no optimizer of torchtitan's knows how long the run is.
    config = read_tables({"balancer": dict(table)})
    balancers = build_balancers(config)
    for name, (_, balancer) in balancers.items():
        if not {"micro_batch", "sequence"}.issuperset(balancer.scopes):
            raise ValueError(
                f"torchtitan_patches: balancer.{name}.scope = {balancer.scope!r}: torchtitan's layers see one "
                "micro-batch of one rank: use 'micro_batch' or 'sequence'"
            )
        if config.balancer[name].get("decay_ratio"):
            raise ValueError(
                f"torchtitan_patches: balancer.{name}.decay_ratio: torchtitan's optimizers do not know the run's "
                "length: leave it at 0"
            )
        if balancer.measure is not None or balancer.project is not None or asked_for(balancer.loss, SEEN, 3):
            raise ValueError(
                f"torchtitan_patches: balancer.{name} looks at weights, at outputs or at other layers, which "
                "torchtitan's router does not see: use a balancer of the routing alone"
            )
        if asked := asked_for(balancer.post_step, OFFERED):
            raise ValueError(
                f"torchtitan_patches: balancer.{name}: its post step takes {' and '.join(asked)}, which torchtitan's "
                "layers and checkpoints have no place for: use a balancer without"
            )
    return balancers


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
