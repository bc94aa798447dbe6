"""The norm of tensors of any layout is that of the whole tensors."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.harness import run_ranks
from titan_moe.parallelize.grad import total_norm

SHAPE = (1025, 2048)  # 2 M elements, of which the ranks have different numbers of rows
DTYPES = (torch.float32, torch.bfloat16)


def whole(dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)


def norms_of_layouts(rank: int, world: int) -> list[float]:
    mesh = init_device_mesh("cpu", (world,))
    found = []
    for dtype in DTYPES:
        x = whole(dtype)
        sharded: list[torch.Tensor] = [distribute_tensor(x, mesh, [p]) for p in (Shard(0), Shard(1), Replicate())]
        assert all(isinstance(tensor, DTensor) for tensor in sharded)
        found += [total_norm([tensor]).item() for tensor in (*sharded, x)]
        found.append(total_norm([*sharded, x]).item() / 2)  # four times the same
    return found


@pytest.mark.dist
def test_norms_of_all_layouts_are_the_whole_ones() -> None:
    want = [whole(dtype).double().square().sum().sqrt().item() for dtype in DTYPES for _ in range(5)]
    for found in run_ranks(2, norms_of_layouts):
        assert found == pytest.approx(want, rel=1e-6)
