"""Comparison of a loss of ours with a formula in float64."""

from collections.abc import Sequence

import torch
from torch import Tensor


def assert_gradients(ours: Tensor, formula: Tensor, inputs: Sequence[Tensor], doubles: Sequence[Tensor]) -> None:
    """The same value, and the same gradients, which are not 0, by `inputs` and by their copies in float64."""
    torch.testing.assert_close(ours.double(), formula, rtol=1e-5, atol=1e-7)
    got, want = torch.autograd.grad(ours, inputs), torch.autograd.grad(formula, doubles)
    for one, two in zip(got, want, strict=True):
        assert two.any()
        torch.testing.assert_close(one.double(), two, rtol=1e-4, atol=1e-6)
