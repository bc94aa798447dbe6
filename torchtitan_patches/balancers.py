"""titan_moe's balancers in torchtitan: their tables, and the loss that tells them the tokens of a step."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torchtitan.components.loss import CrossEntropyLoss

from titan_moe.balancer import OFFERED, SEEN, Balancer
from titan_moe.build import build_balancers
from titan_moe.config import Config, merge_layers
from titan_moe.config.layers import Layer
from titan_moe.model.moe import MEASURED
from titan_moe.model.routing.common import asked_for
from titan_moe.step import Balancers
from torchtitan_patches.monitor import note_tokens

Table = Mapping[str, Any]

# What a balancer may take in titan_moe by name, but not here, and why.
NO_PLACE = {
    "progress": "optimizers do not know the run's length",
    "routings": "layers do not see each other's",
    "index": "layers do not see each other's",
    "outputs": "dispatchers mix experts' outputs at once",
    "positions": "MoE layers are not told them",
    "document_ids": "MoE layers are not told them",
}


def read_tables(*tables: Table) -> Config:
    """titan_moe's checked configuration of tables {"balancer": {...}, "optimizer": {...}}, later ones over earlier."""
    return merge_layers([Layer("torchtitan_patches", dict(table)) for table in tables])


def make_balancers(table: Table) -> Balancers:
    """The balancers of a table as [balancer.NAME] has them, {"aux_loss": {"coeff": 0.01}, ...}.

    Raises ValueError for what titan_moe refuses, and for what has no place in torchtitan: losses on loads of more than
    one micro-batch, which the trainer drops before the next one, rates that fall at the run's end, and `NO_PLACE`.
    """
    # Losses on loads of a global batch need the forward passes of all micro-batches first, which the trainer drops.
    balancers = build_balancers(read_tables({"balancer": dict(table)}))
    for name, (_, balancer) in balancers.items():
        if not {"micro_batch", "sequence"}.issuperset(balancer.scopes):
            raise ValueError(
                f"torchtitan_patches: balancer.{name}.scope = {balancer.scope!r}: torchtitan's layers see one "
                "micro-batch of one rank: use 'micro_batch' or 'sequence'"
            )
        if balancer.schedule(0.0) != 1 or balancer.schedule(1.0) != 1:
            raise ValueError(
                f"torchtitan_patches: balancer.{name}.decay_ratio: torchtitan's optimizers do not know the run's "
                "length: leave it at 0"
            )
        for key in asked_of(name, balancer):
            if key in NO_PLACE:
                raise ValueError(
                    f"torchtitan_patches: balancer.{name} takes {key}: torchtitan's {NO_PLACE[key]}: use a balancer "
                    "without"
                )
    return balancers


def asked_of(name: str, balancer: Balancer) -> list[str]:
    """What a balancer's functions take by name; ValueError for what titan_moe does not offer."""
    try:
        asked = [*asked_for(balancer.post_step, OFFERED), *asked_for(balancer.loss, SEEN, 3)]
        return asked + list(asked_for(balancer.measure, MEASURED, 0) if balancer.measure else ())
    except ValueError as error:
        raise ValueError(f"torchtitan_patches: balancer.{name} {error}") from None


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
