"""Norms against sums in float64, for every size and type, and whatever the tensors are cut into."""

import pytest
import torch

from titan_moe.norms import ELEMENTS_PER_COPY, ROW, matrix_norms, norms
from titan_moe.optimizer.expert_stats import copies, expert_sums
from titan_moe.optimizer.kronecker import block_layout, init_root
from titan_moe.optimizer.muon import orthogonalize
from titan_moe.parallelize.grad import total_norm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def exact(tensor: torch.Tensor) -> float:
    squares = [part.double().square().sum() for part in tensor.reshape(-1).split(1 << 20)]
    return float(torch.stack(squares).sum().sqrt())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_right_to_a_millionth(dtype):
    torch.manual_seed(0)
    sizes = [(0,), (), (1,), (ROW - 1,), (ROW,), (ROW + 1,), (3, 5, 700), (ELEMENTS_PER_COPY + 3,), (4096, 4096)]
    tensors = [torch.randn(size).to(dtype) for size in sizes]
    tensors += [torch.full((1 << 21,), 0.0123, dtype=dtype)]  # every addition of a row is rounded the same way
    tensors += [torch.randn(300, 500).to(dtype).t()]
    got = norms(tensors)
    assert got.dtype == torch.float64
    assert got.tolist() == pytest.approx([exact(tensor) for tensor in tensors], rel=1e-6)
    assert total_norm(tensors).item() == pytest.approx(exact(torch.cat([t.flatten() for t in tensors])), rel=1e-6)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_shows(value):
    for dtype in DTYPES:
        for place in (0, ROW, 2 * ROW + 3):
            x = torch.ones(2 * ROW + 4, dtype=dtype)
            x[place] = value
            assert not norms([x]).isfinite()


def test_squares_of_large_experts():
    """A row of a million elements: what vector_norm makes of it is 1e-5 off."""
    torch.manual_seed(0)
    old, parameter = torch.randn(2, 1024, 1024), torch.nn.Parameter(torch.randn(2, 1024, 1024))
    sums = expert_sums({parameter: 0}, [old], torch.optim.SGD([parameter]))
    update, size = ([exact(row) ** 2 for row in rows] for rows in (parameter.detach() - old, old))
    assert sums[0, 0].tolist() == pytest.approx(update, rel=1e-6)
    assert sums[1, 0].tolist() == pytest.approx(size, rel=1e-6)


def test_a_rank_without_experts_has_no_squares():
    parameter = torch.nn.Parameter(torch.ones(0, 4, 4))
    assert expert_sums({parameter: 0}, copies([parameter]), torch.optim.SGD([parameter])).shape == (6, 1, 0)


def test_a_grafted_step_has_the_norm_of_its_direction():
    torch.manual_seed(0)
    layout = block_layout(1024, 0.95, one_sided=False)
    direction = torch.randn(1, 1024, 1024)
    state = {}
    for factor in layout.factors(direction.shape[1:]):
        state |= {name: 3 * root for name, root in init_root(factor, direction, torch.float32).items()}
    step = layout.precondition(direction.clone(), direction.clone(), state, True)
    assert exact(step) == pytest.approx(exact(direction), rel=1e-6)


def test_matrices_are_scaled_by_their_own_norms():
    torch.manual_seed(0)
    matrices = torch.randn(2, 512, 8192)
    want = [exact(matrix) for matrix in matrices]
    assert matrix_norms(matrices).tolist() == pytest.approx(want, rel=1e-6)
    scaled = orthogonalize(matrices, 0, torch.float32)
    assert [exact(matrix) for matrix in scaled] == pytest.approx([1.0, 1.0], rel=1e-6)
