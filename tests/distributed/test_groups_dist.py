"""Groups by pattern, heads as matrices and rates by load of some matrices: layouts equal one process, and reshard."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import apply, place
from tests.distributed.test_fsdp import full
from tests.tiny import batch, own_part, tiny_model
from titan_moe.balancer import BALANCERS
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.model.attention import attention_heads
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer, combine
from titan_moe.step import train_step

MATCHES = {
    "queries": ["layers.*.attention.wq.weight", "layers.*.attention.wk.weight"],
    "outputs": ["layers.*.attention.wo.weight"],
    "up": ["layers.*.moe.experts.w[13]"],
    "last": ["layers.1.moe.experts.w2"],
    "embedded": ["tok_embeddings.weight"],
}
NAMES = {"queries": "muon", "outputs": "shampoo", "last": "soap", "embedded": "muon"}
ROOTS = {"precondition_frequency": 2, "max_preconditioner_dim": 12}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "queries": {"per_head": True, "matmul_dtype": "float32"},
    "outputs": {"per_head": True, **ROOTS, "epsilon": 1e-4},
    "up": {"lr": 2e-3, "beta1": 0.5, **expand_load_lr({"load_lr": "ideal_normalized", "load_lr_ema": 0.5}, top_k=2)},
    "last": {"lr": 3e-3, **expand_load_lr({"load_lr": "batch_fraction"}, top_k=2)},
    "embedded": {"matmul_dtype": "float32"},
}
LAYOUTS = ("fsdp2", "ep2", "tp2")


def build(layout: str | None) -> tuple[Any, Optimizer]:
    model = tiny_model(num_heads=4, num_kv_heads=2, device="meta")
    apply(model, 2, layout)
    model.to_empty(device="cpu")
    model.init_weights(0)
    groups = parameter_groups(model.named_parameters(), ARGUMENTS, matches=MATCHES, heads=attention_heads(model))
    chosen = {group["name"]: NAMES.get(group["name"], "adamw") for group in groups}
    return model, combine(groups, chosen, lambda name, own: OPTIMIZERS[name](own, lr=1e-2, beta1=0.9, beta2=0.95))


def train(model: Any, optimizer: Optimizer, steps: range, **where: Any) -> dict[str, Any]:
    """z_loss alone: aux_loss is of a micro-batch, by definition."""
    group, outputs = where.pop("sequence_group", None), []
    place_of = where or {"rank": 0, "world": 1}
    for step in steps:
        options = {"max_norm": 0.1, "measure_experts": True, "sequence_group": group}
        own = {"z_loss": (0.01, BALANCERS["z_loss"](coeff=1.0)), "loss_free": (1.0, BALANCERS["loss_free"](rate=0.01))}
        micro = [tuple(own_part(batch(step), **place_of))]
        outputs.append(train_step(model, micro, optimizer, own, model.expert_biases(), **options))
    return {
        "loss": torch.stack([output.loss for output in outputs]),
        "factors": torch.stack([output.load_factors for output in outputs]),
        "last": torch.stack([output.group_factors["last"] for output in outputs]),
        "stats": tuple(outputs[-1].expert_stats),
        "parameters": {plain_name(name): full(parameter) for name, parameter in model.named_parameters()},
    }


def save(folder: Path, model: nn.Module, optimizer: Optimizer) -> None:
    save_checkpoint(folder, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)


def two_ranks(rank: int, world: int, folder: Path) -> list[dict[str, Any]]:
    results = []
    for layout in LAYOUTS:
        where = place(rank, world, layout)
        model, optimizer = build(layout)
        first = train(model, optimizer, range(3), **where)
        save(folder / layout, model, optimizer)
        second = train(model, optimizer, range(3, 5), **where)

        # saved by one process, and loaded here
        again, fresh = build(layout)
        load_checkpoint(folder / "one" / "step-3", model=again, optimizer=fresh)
        results += [first, second, train(again, fresh, range(3, 5), **where)]
    return results


def assert_close(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-5, atol=0)
    torch.testing.assert_close(actual["factors"], expected["factors"], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual["last"], expected["last"], rtol=1e-6, atol=0)
    torch.testing.assert_close(actual["stats"], expected["stats"], rtol=1e-3, atol=1e-4, equal_nan=True)
    # gradients differ by round-off, which matrix optimizers enlarge in directions that hardly matter
    torch.testing.assert_close(actual["parameters"], expected["parameters"], rtol=0, atol=2e-4)


@pytest.mark.dist
def test_layouts_equal_one_process() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, optimizer = build(None)
        first = train(model, optimizer, range(3))
        save(folder / "one", model, optimizer)
        second = train(model, optimizer, range(3, 5))
        assert first["factors"].unique().numel() > 10
        assert not torch.equal(first["factors"][:, 1:], first["last"])  # `up` is the first group of this layer
        for results in run_ranks(2, two_ranks, folder):
            for result, expected in zip(results, [first, second, second] * len(LAYOUTS), strict=True):
                assert_close(result, expected)

        # and the other way round: saved by two processes, loaded by one
        for layout in LAYOUTS:
            again, fresh = build(None)
            load_checkpoint(folder / layout / "step-3", model=again, optimizer=fresh)
            assert_close(train(again, fresh, range(3, 5)), second)
