"""Load-based rates on two processes equal those of one: FSDP2 with even and uneven shards of experts, and resharding.

So do the measures of each expert.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from tests.distributed.test_fsdp import full
from tests.tiny import balancers, batch, tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.diagnostics import balance_tax, routing_choices, routing_drift
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.step import train_step

OPTIONS = {"load_lr": "ideal_normalized", "load_lr_ema": 0.5, "load_lr_power": 2.0, "load_lr_decay": False}
CASES = [(4, "adamw"), (3, "adamw"), (3, "muon"), (3, "nadam")]  # 3 experts on 2 ranks: uneven shards


def build(num_experts: int, name: str, world: int) -> tuple[Any, torch.optim.Optimizer]:
    model = tiny_model(num_experts=num_experts, device="meta")
    if world > 1:
        parallelize(
            model,
            mesh=build_mesh(device=torch.device("cpu"), shard=world),
            param_dtype=torch.float32,
            reduce_dtype=torch.float32,
            checkpoint_mode="none",
            compile_blocks=False,
        )
    model.to_empty(device="cpu")
    model.init_weights(0)
    groups = parameter_groups(model.named_parameters(), {"expert": expand_load_lr(OPTIONS, top_k=2)})
    if name == "adamw":
        optimizer = OPTIMIZERS[name](groups, lr=1e-2)
    elif name == "muon":  # whose measures are of moments beside it
        optimizer = OPTIMIZERS[name](groups, lr=1e-3, matmul_dtype="float32")
    else:  # one that knows nothing of loads
        optimizer = torch.optim.NAdam(groups, lr=1e-2, weight_decay=0.1, decoupled_weight_decay=True)
    return model, Optimizer.around(optimizer)


def train(model: Any, optimizer: Any, steps: range, rank: int, world: int, micro_batches: int) -> list[Any]:
    outputs, moments = [], {}
    for step in steps:
        tokens, labels = (part.chunk(world)[rank] for part in batch(step))
        micro = list(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        options = {"max_norm": 0.1, "measure_experts": True, "gradient_moments": moments}
        outputs.append(train_step(model, micro, optimizer, balancers(), model.expert_biases(), **options))
    return outputs


def summarize(model: nn.Module, outputs: list[Any]) -> dict[str, Any]:
    return {
        "factors": torch.stack([o.load_factors for o in outputs]),
        "loss": torch.stack([o.loss for o in outputs]),
        "stats": tuple(outputs[-1].expert_stats),
        "parameters": {name: full(p) for name, p in model.named_parameters()},
    }


def second_half(summary: dict[str, Any]) -> dict[str, Any]:
    return {**summary, "factors": summary["factors"][2:], "loss": summary["loss"][2:]}


def save(folder: Path, model: Any, optimizer: Any) -> None:
    save_checkpoint(folder, 2, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)


def train_sharded(rank: int, world: int, folder: Path) -> list[dict[str, Any]]:
    results = []
    for number, (num_experts, name) in enumerate(CASES):
        model, optimizer = build(num_experts, name, world)
        outputs = train(model, optimizer, range(2), rank, world, 2)
        save(folder / f"two-{number}", model, optimizer)
        tokens, labels = (part.chunk(world)[rank] for part in batch(9))  # measured beside training, which goes on alike
        choices = routing_choices(model, tokens, labels)
        assert balance_tax(model, tokens, labels, repeats=1) > 0
        assert routing_drift(choices, routing_choices(model, tokens, labels)) == 0
        outputs += train(model, optimizer, range(2, 5), rank, world, 2)
        results.append(summarize(model, outputs))

        again, fresh = build(num_experts, name, world)  # saved by one process, loaded by two
        load_checkpoint(folder / f"one-{number}" / "step-2", model=again, optimizer=fresh)
        results[-1]["resharded"] = summarize(again, train(again, fresh, range(2, 5), rank, world, 2))
    return results


@pytest.mark.dist
def test_two_ranks_equal_one() -> None:
    def close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
        torch.testing.assert_close(actual["factors"], expected["factors"], rtol=1e-6, atol=0)
        torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=0)
        torch.testing.assert_close(actual["stats"], expected["stats"], rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(actual["parameters"], expected["parameters"], rtol=1e-4, atol=1e-5)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = []
        for number, (num_experts, optimizer_name) in enumerate(CASES):
            model, optimizer = build(num_experts, optimizer_name, 1)
            outputs = train(model, optimizer, range(2), 0, 1, 4)
            save(folder / f"one-{number}", model, optimizer)
            outputs += train(model, optimizer, range(2, 5), 0, 1, 4)
            alone.append(summarize(model, outputs))
        for results in run_ranks(2, train_sharded, folder):
            for result, expected in zip(results, alone, strict=True):
                assert expected["factors"].unique().numel() > 10
                close(result, expected)
                close(result["resharded"], second_half(expected))
        for number, (num_experts, optimizer_name) in enumerate(CASES):  # saved by two, loaded by one
            model, optimizer = build(num_experts, optimizer_name, 1)
            load_checkpoint(folder / f"two-{number}" / "step-2", model=model, optimizer=optimizer)
            outputs = train(model, optimizer, range(2, 5), 0, 1, 4)
            close(summarize(model, outputs), second_half(alone[number]))
