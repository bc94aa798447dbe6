"""A tiny model, batches and steps that tests share."""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from tests.cases import Case, build_router, takes_bias
from titan_moe.balancer import BALANCERS
from titan_moe.metrics import StepOutput
from titan_moe.model.cross_entropy import Score
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.parallelize.mesh import Degrees
from titan_moe.step import train_step

VOCAB, SEQ = 64, 16


def tiny_model(router: Any = "topk_softmax", *, device: str = "cpu", **arguments: Any) -> Transformer:
    """A model with a router by its name, its Case, or itself; without one for None."""
    case = Case(router, {}) if isinstance(router, str) else router
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 32}
    experts = {"num_experts": 4, "expert_dim": 16, "expert_bias": not isinstance(case, Case) or takes_bias(case.name)}
    route = build_router(case.name, **case.arguments) if isinstance(case, Case) else router
    with torch.device(device):
        model = Transformer(vocab_size=VOCAB, **{**sizes, **experts, "router": route, **arguments})
    model.eot_id = 3
    return model


class WholeLogits(Transformer):
    """The reference for losses: torch's cross-entropy of the logits of all tokens."""

    def forward(self, tokens: Tensor, labels: Tensor | None = None, want: Any = None) -> Any:
        logits, routings = super().forward(tokens)
        if labels is None:
            return logits, routings
        ce_sum = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        return Score(ce_sum, (logits.argmax(-1) == labels).sum()) if want == "score" else ce_sum, routings


def whole_logits(model: Transformer) -> Transformer:
    """The same model, with losses of whole logits."""
    model.__class__ = WholeLogits
    return model


def batch(step: int, sequences: int = 8) -> tuple[Tensor, Tensor]:
    """Tokens and labels (sequences, SEQ) of a step; part of them are learnable repetitions."""
    generator = torch.Generator().manual_seed(step % 4)
    tokens = torch.randint(0, VOCAB, (sequences, SEQ // 2 + 1), generator=generator).repeat(1, 2)[:, : SEQ + 1]
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def own_part(pair: tuple[Tensor, Tensor], rank: int, world: int, degrees: Degrees | None = None) -> list[Tensor]:
    """A rank's part of tokens and labels: some of the sequences, of each some of the positions."""
    degrees = degrees or Degrees(shard=world)
    positions = own_positions(SEQ, rank, degrees)
    own = [part.chunk(degrees.data)[rank // degrees.per_sequence] for part in pair]
    return own if positions is None else [part[:, positions] for part in own]


def balancers(bias: bool = True) -> dict[str, Any]:
    losses = {
        "aux_loss": (0.1, BALANCERS["aux_loss"](coeff=1.0)),
        "z_loss": (0.001, BALANCERS["z_loss"](coeff=1.0)),
    }
    return losses | ({"loss_free": (1.0, BALANCERS["loss_free"](rate=0.01))} if bias else {})


def adamw(model: torch.nn.Module, **arguments: Any) -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), {"norm": {"weight_decay": 0.0}, "expert": {"lr": 5e-3}})
    return OPTIMIZERS["adamw"](groups, lr=1e-2, **arguments)


def steps(
    model: Transformer,
    count: int,
    *,
    micro_batches: int = 1,
    rank: int = 0,
    world: int = 1,
    optimizer: torch.optim.Optimizer | None = None,
    degrees: Degrees | None = None,
    sequence_group: dist.ProcessGroup | None = None,
    max_norm: float = 0.1,
) -> list[StepOutput]:
    """Train for `count` steps on this rank's part of each global batch of 8, cut into micro-batches."""
    optimizer = optimizer or adamw(model)
    outputs = []
    for step in range(count):
        tokens, labels = own_part(batch(step), rank, world, degrees)
        micro = list(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        options = {"max_norm": max_norm, "sequence_group": sequence_group}
        outputs.append(train_step(model, micro, optimizer, balancers(), model.expert_biases(), **options))
    return outputs
