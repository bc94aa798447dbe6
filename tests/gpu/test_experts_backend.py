"""Liger's kernels on a GPU, in bf16: as exact as torch's grouped products, eager and compiled, without a wait."""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.gpu.harness import DEVICE, build, numbers, one_gpu, one_process, train
from titan_moe.model.experts_backend import liger_experts, use_experts_backend
from titan_moe.model.moe import expert_swiglu
from titan_moe.parallelize.mesh import build_mesh

pytestmark = [
    one_gpu,
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None,
        reason="liger_kernel is not installed: pip install 'titan_moe[kernels]'",
    ),
    pytest.mark.filterwarnings("ignore"),  # of Triton, dynamo and inductor
]
os.environ.setdefault("LIGER_FUSED_MOE_AUTOTUNE", "0")  # read at import: tuning compiles 160 kernels, for minutes
COUNTS = [3, 0, 370, 1, 0, 128]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def inputs(dim: int, hidden: int, dtype: torch.dtype, more_rows: int = 0) -> list[Tensor]:
    """x, w1, w2, w3: the same bf16 numbers in every dtype."""
    generator = torch.Generator().manual_seed(0)
    experts = len(COUNTS)
    shapes = [(sum(COUNTS) + more_rows, dim), (experts, hidden, dim), (experts, dim, hidden), (experts, hidden, dim)]
    values = [
        torch.randn(shape, generator=generator) / (1 if len(shape) == 2 else shape[-1] ** 0.5) for shape in shapes
    ]
    return [value.to(torch.bfloat16).to(DEVICE, dtype).requires_grad_() for value in values]


def outcome(backend: Any, leaves: list[Tensor]) -> list[Tensor]:
    rows = sum(COUNTS)
    y = backend(*leaves, torch.tensor(COUNTS, device=DEVICE))
    upstream = torch.randn(1000, y.shape[1], generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    y.backward(upstream[: len(y)].to(y))
    grad_x, *grads = (leaf.grad for leaf in leaves)
    return [part.double() for part in (y.detach()[:rows], grad_x[:rows], *grads)]


def one_by_one(x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts_E: Tensor) -> Tensor:
    parts = x_ND[: int(counts_E.sum())].split(counts_E.tolist())
    silu = torch.nn.functional.silu
    done = [(silu(x @ a.t()) * (x @ c.t())) @ b.t() for x, a, b, c in zip(parts, w1, w2, w3, strict=True)]
    return torch.cat([*done, x_ND[int(counts_E.sum()) :] * 0])


@pytest.mark.parametrize("more_rows", [0, 40])
@pytest.mark.parametrize(("dim", "hidden"), [(64, 96), (768, 2048)])
def test_is_as_exact_as_grouped_products(dim: int, hidden: int, more_rows: int) -> None:
    """Against float64, with empty experts and rows that no expert has."""
    exact = outcome(one_by_one, inputs(dim, hidden, torch.float64, more_rows))
    ours = outcome(expert_swiglu, inputs(dim, hidden, torch.bfloat16, more_rows))
    theirs = outcome(liger_experts, inputs(dim, hidden, torch.bfloat16, more_rows))
    for name, want, plain, got in zip(("y", "x", "w1", "w2", "w3"), exact, ours, theirs, strict=True):
        error, usual = (got - want).norm() / want.norm(), (plain - want).norm() / want.norm()
        assert error <= 1.5 * usual + 1e-4, f"{name}: {error:.2e}, grouped_mm {usual:.2e}"


def test_no_rows_at_all() -> None:
    x, *weights = inputs(64, 96, torch.bfloat16)
    x = x.detach()[:0].requires_grad_()
    y = liger_experts(x, *weights, torch.zeros(len(COUNTS), dtype=torch.int64, device=DEVICE))
    y.sum().backward()
    assert y.shape == x.grad.shape == (0, 64)
    assert all((weight.grad == 0).all() for weight in weights)


def test_does_not_wait_for_the_device() -> None:
    leaves, counts = inputs(64, 96, torch.bfloat16), torch.tensor(COUNTS, device=DEVICE)
    liger_experts(*leaves, counts).sum().backward()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        liger_experts(*leaves, counts).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def sharded(backend: Any, **options: Any) -> Any:
    model = build(build_mesh(device=torch.device(DEVICE), shard=1), dtype=torch.bfloat16, **options)
    use_experts_backend(model, backend)
    return model


def test_training_follows_that_of_grouped_products() -> None:
    with one_process():
        expected = numbers(train(sharded(expert_swiglu)))
        got = numbers(train(sharded(liger_experts)))
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-2, atol=0)
    torch.testing.assert_close(got["grad_norm"], expected["grad_norm"], rtol=0.1, atol=0)


def test_compiled_steps_do_not_recompile() -> None:
    with one_process():
        expected = numbers(train(sharded(liger_experts)))
        model = sharded(liger_experts, compile_blocks=True)
        got = numbers(train(model))
        with torch.compiler.set_stance("fail_on_recompile"):
            train(model, 3)
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-2, atol=0)
