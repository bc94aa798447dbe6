"""Tensor and context parallelism equal one process: every kind of layer, all modes, 50 steps, and other layouts.

The invariance of routers and balancers in these layouts is in `test_invariance_dist`, the table of collectives in
`test_expert_dist`.
"""

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.dist.harness import run_ranks
from tests.dist.layouts import degrees_of, on_meta, place
from tests.invariance import assert_same, outcome, start
from tests.tiny import adamw, steps, tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.combined import combine
from titan_moe.optimizer.groups import parameter_groups

# Dense and MoE layers, shared experts, grouped heads with their norms, an output head of its own.
KINDS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "qk_norm": True,
    "first_dense_layers": 1,
    "num_shared_experts": 1,
    "tie_embeddings": False,
}
BALANCED = [Case("aux_loss", {}), Case("aux_loss", {"scope": "sequence"}), Case("z_loss", {}), Case("loss_free", {})]
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"checkpoint_mode": "selective"},
    "full": {"checkpoint_mode": "full"},
    "traced": {"compile_blocks": True},
    "traced, selective": {"compile_blocks": True, "checkpoint_mode": "selective"},
}
CURVES = ("fsdp2", "ep2", "tp2", "cp2")
MATRICES = {"dense": "muon", "expert": "shampoo"}


def one(model: Transformer, **own: Any) -> dict[str, Any]:
    """A step of all balancers with two micro-batches of every different sequence."""
    start(model)
    return outcome(model, BALANCED, micro_batches=2, **own)


def alone(data: int) -> dict[str, Any]:
    model = tiny_model(**KINDS)
    start(model)
    return outcome(model, BALANCED, micro_batches=2 * data)


def curve(model: Transformer, optimizer: torch.optim.Optimizer, count: int, **own: Any) -> torch.Tensor:
    outputs = steps(model, count, optimizer=optimizer, **own)
    return torch.stack([torch.stack([o.loss, o.total_loss, o.grad_norm]) for o in outputs])


def of_matrices(model: Transformer) -> torch.optim.Optimizer:
    groups = parameter_groups(model.named_parameters(), {"dense": {"matmul_dtype": "float32"}})
    chosen = {group["name"]: MATRICES.get(group["name"], "adamw") for group in groups}
    return combine(groups, chosen, lambda name, own: OPTIMIZERS[name](own, lr=1e-2))


def two_ranks(rank: int, world: int, folder: Path) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # whole graphs, without minutes of a compiler
    results: dict[str, Any] = {}
    for layout in ("tp2", "cp2"):
        own = place(rank, world, layout)
        for mode, options in MODES.items():
            model = on_meta(tiny_model(device="meta", **KINDS), world, layout, **options)
            results[f"{layout}, {mode}"] = one(model, **own)
    for layout in CURVES:
        model = on_meta(tiny_model(device="meta", num_kv_heads=2), world, layout)
        results[f"curve of {layout}"] = curve(model, adamw(model), 50, **place(rank, world, layout))
    own = place(rank, world, "tp2")
    model = on_meta(tiny_model(device="meta", **KINDS), world, "tp2")
    optimizer = of_matrices(model)
    results["matrices"] = curve(model, optimizer, 3, **own)
    save_checkpoint(folder, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    results["matrices on"] = curve(model, optimizer, 2, **own)
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_two_ranks_equal_one() -> None:
    with tempfile.TemporaryDirectory() as name:
        results = run_ranks(2, two_ranks, Path(name))
        model = tiny_model(**KINDS)
        model.init_weights(0)
        optimizer = of_matrices(model)
        matrices = curve(model, optimizer, 3)
        again = tiny_model(**KINDS)
        fresh = of_matrices(again)
        load_checkpoint(Path(name) / "step-3", model=again, optimizer=fresh)
    resharded, matrices_on = curve(again, fresh, 2), curve(model, optimizer, 2)
    torch.testing.assert_close(resharded, matrices_on, rtol=1e-4, atol=0)
    want = alone(1)
    curves = {}
    for micro_batches in (1, 2):
        model = tiny_model(num_kv_heads=2)
        model.init_weights(0)
        curves[micro_batches] = curve(model, adamw(model), 50, micro_batches=micro_batches)
    for result in results:
        torch.testing.assert_close(result["matrices"], matrices, rtol=1e-5, atol=0)
        torch.testing.assert_close(result["matrices on"], matrices_on, rtol=1e-4, atol=0)
        for layout in CURVES:
            expected = curves[degrees_of(2, layout).data]
            torch.testing.assert_close(result[f"curve of {layout}"], expected, rtol=1e-3, atol=0, msg=lambda t: t)
        for layout in ("tp2", "cp2"):
            for mode in MODES:
                check(f"{layout}, {mode}", result[f"{layout}, {mode}"], want)


def eight_ranks(rank: int, world: int) -> dict[str, Any]:
    (layout,) = ("fsdp2_cp2_tp2_ep4",)
    model = on_meta(tiny_model(device="meta", **KINDS, num_experts=8), world, layout, checkpoint_mode="selective")
    return one(model, **place(rank, world, layout))


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_eight_ranks_equal_one() -> None:
    """2 x 2 x 2, and experts over 4 of these."""
    model = tiny_model(**KINDS, num_experts=8)
    start(model)
    want = outcome(model, BALANCED, micro_batches=4)
    for result in run_ranks(8, eight_ranks):
        check("2 x 2 x 2", result, want)


def check(name: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    try:
        assert_same(got, want)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
