"""2-norms that are right to 1e-6, whatever a tensor's size and type."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

# A CPU's vector_norm adds up one element after the other, at least in each lane of its vectors, and in fp32: 1e-3 of
# a norm is lost at 16 M elements. Rows this long are right to 4e-7 even where every addition is rounded the same way.
ROW = 256
ELEMENTS_PER_COPY = 1 << 18  # of other types, which are made fp32: not all at once, so that the copy stays in the cache


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """The 2-norm of each of some tensors, one at least, over all its elements: (len(tensors),) float64.

    Nothing is read on the host.
    """
    # Fake tensors are those of an estimate, and stand for a GPU's.
    if tensors[0].device.type == "cpu" and not isinstance(tensors[0], FakeTensor):
        return torch.stack([_norm_on_cpu(tensor.detach().reshape(-1)) for tensor in tensors])
    # a GPU's threads add up few elements each, and then in pairs
    return torch.stack(torch._foreach_norm(list(tensors), 2, torch.float32)).double()


def matrix_norms(matrices: Tensor) -> Tensor:
    """The Frobenius norm of each matrix of (..., M, N): (...) fp32, from the norms of its rows."""
    row_norms = torch.linalg.vector_norm(matrices, dim=-1, dtype=torch.float32)
    return torch.linalg.vector_norm(row_norms, dim=-1)


def _norm_on_cpu(elements: Tensor) -> Tensor:
    row_norms = torch.cat(list(_row_norms(elements)))
    return torch.linalg.vector_norm(row_norms, dtype=torch.float64)


def _row_norms(elements: Tensor) -> Iterator[Tensor]:
    """The fp32 norms of rows that together are all elements of (N,), as tensors (rows,)."""
    if elements.dtype != torch.float32:
        copy = torch.empty(min(len(elements), ELEMENTS_PER_COPY))  # one for all: the results would lie between many
        for part in elements.split(ELEMENTS_PER_COPY):
            yield from _row_norms(copy[: len(part)].copy_(part))
        return
    whole_rows = len(elements) // ROW
    rows, rest = elements.split([whole_rows * ROW, len(elements) - whole_rows * ROW])
    yield torch.linalg.vector_norm(rows.view(whole_rows, ROW), dim=1)
    if len(rest):
        yield torch.linalg.vector_norm(rest, dim=0, keepdim=True)
