"""The Triton kernels against the formulas they stand for, in float64; on a CPU under Triton's interpreter."""

import os

import pytest
import torch
from torch import Tensor

from titan_moe.model import fused
from titan_moe.model.dispatch import Permutation, sort_choices
from titan_moe.model.routing import Routing
from titan_moe.model.routing.token_choice import topk_softmax

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not (INTERPRETED or torch.cuda.is_available()) or fused.kernels() is None,
    reason="needs a GPU, or TRITON_INTERPRET=1, and Triton",
)
kernels = fused.kernels()
# The largest relative error by one rounding; the interpreter cuts off where a GPU rounds.
DTYPES = {torch.float32: 1e-6, torch.bfloat16: 2**-7 if INTERPRETED else 2**-8}
SIZES = [(7, 16), (3, 200), (2, 1500)]  # rows and widths: within a block, of no power of two, of two blocks


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(DEVICE, dtype)


def assert_rounded(got: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """As near as one rounding of the exact value allows."""
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), exact.double(), rtol=DTYPES[dtype], atol=1e-6 * scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_swiglu(size: tuple[int, int], dtype: torch.dtype) -> None:
    rows, width = size
    h13, grad_h = normal(rows, 2 * width, dtype=dtype), normal(rows, width, dtype=dtype, seed=1)
    exact13 = h13.double().requires_grad_()
    exact = fused._swiglu(exact13)
    exact.backward(grad_h.double())
    h, grad_h13 = kernels.swiglu_backward(grad_h, h13)
    assert exact13.grad is not None
    assert_rounded(kernels.swiglu(h13), exact.detach(), dtype)
    assert_rounded(h, exact.detach(), dtype)
    assert_rounded(grad_h13, exact13.grad, dtype)


def routed(tokens: int, top_k: int, capacity_factor: float) -> tuple[Routing, Permutation]:
    logits = normal(tokens, 6) + torch.tensor([0, 0, 0, 0, 1.0, 2.0], device=DEVICE)
    with torch.enable_grad():
        routing = topk_softmax(top_k=top_k, capacity_factor=capacity_factor)(logits.requires_grad_(), None)
    return routing, sort_choices(routing)[0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capacity_factor", [0.0, 0.6], ids=["all", "capacity"])
@pytest.mark.parametrize("width", [16, 200])
@pytest.mark.parametrize(("tokens", "top_k"), [(11, 2), (5, 1), (9, 4), (0, 2)])
def test_rows(tokens: int, top_k: int, width: int, capacity_factor: float, dtype: torch.dtype) -> None:
    if tokens == 0 and capacity_factor:
        pytest.skip("no token, no capacity")
    routing, (order, row, kept) = routed(tokens, top_k, capacity_factor)
    scores = routing.topk_scores.detach()
    used = order.new_zeros(order.shape[0], dtype=torch.bool)
    used[row if kept is None else row[kept]] = True
    assert kept is None or (0 < kept.sum() < kept.numel() and used.sum() < used.numel())

    # what no choice that is kept has is read by no kernel
    x, y, grad = (normal(n, width, dtype=dtype, seed=i) for i, n in enumerate((tokens, order.shape[0], tokens)))
    y[~used] = torch.nan
    exact_y = y.double().nan_to_num().requires_grad_()
    exact_scores = scores.double().requires_grad_()
    exact = fused._sum_rows(exact_y, row, kept, exact_scores)
    exact.backward(grad.double())
    assert exact_y.grad is not None
    assert exact_scores.grad is not None

    assert torch.equal(kernels.gather_rows(x, order, row, kept)[used], x[order // top_k][used])
    assert_rounded(kernels.sum_rows(y, row, kept, scores), exact.detach(), dtype, width)
    sums = fused._sum_rows(exact_y.detach(), row, kept, None)
    assert_rounded(kernels.sum_rows(y, row, kept, None), sums, dtype, width)
    grad_y, grad_scores = kernels.weigh_rows_backward(grad, y, scores, order, row, kept)
    assert_rounded(grad_y[used], exact_y.grad[used], dtype, width)
    kept = torch.ones_like(row, dtype=torch.bool) if kept is None else kept
    assert_rounded(grad_scores[kept], exact_scores.grad[kept], torch.float32, width)
    assert (grad_scores[~kept] == 0).all()


def test_gradients_that_are_expanded() -> None:
    """A loss that is a sum gives a gradient without memory of its own."""
    routing, (order, row, kept) = routed(11, 2, 0.0)
    y, scores = normal(22, 16), routing.topk_scores.detach()
    grad = normal(1).expand(11, 16)
    got = kernels.weigh_rows_backward(grad, y, scores, order, row, kept)
    want = kernels.weigh_rows_backward(grad.contiguous(), y, scores, order, row, kept)
    torch.testing.assert_close(got, want, rtol=0, atol=0)
