"""Liger's kernels in Triton's interpreter, on a CPU; test_experts_backend.py runs this in a process of its own.

The interpreter is chosen when Triton is imported. It can't multiply bf16 (tests/gpu does); fp16 takes the same way.
"""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime import interpreter

from tests.cases import Case
from tests.tiny import steps, tiny_model
from titan_moe.model.experts_backend import check_experts_backend, liger_experts, use_experts_backend
from titan_moe.model.moe import expert_swiglu
from titan_moe.parallelize.activation_checkpoint import checkpoint_block

DIM, HIDDEN = 24, 40
COUNTS = {
    "odd": [3, 0, 70, 16],
    "whole tiles": [64, 0, 128, 0],
    "one expert": [0, 0, 0, 130],
    "nothing": [0, 0, 0, 0],
}


def take_scalars(patch: Any = interpreter._patch_lang_tensor) -> None:
    """Mend Triton 3.6, whose loops take a number out of an array of one, which numpy refuses since 2.4."""

    def patched(tensor: Any, *scope: Any) -> None:
        patch(tensor, *scope)
        tensor.__index__ = lambda self: int(np.squeeze(self.handle.data))

    interpreter._patch_lang_tensor = patched


take_scalars()


def test_is_not_refused_here() -> None:
    options = {"param_dtype": torch.float32, "deterministic": True}  # one configuration of each kernel: repeatable
    check_experts_backend("liger", device=torch.device("cpu"), **options)


def leaves(counts: list[int], dtype: torch.dtype, more_rows: int = 0) -> list[Tensor]:
    """x, w1, w2, w3, all rounded to `dtype`, in fp32."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(sum(counts) + more_rows, DIM), (4, HIDDEN, DIM), (4, DIM, HIDDEN), (4, HIDDEN, DIM)]
    made = [torch.randn(shape, generator=generator) for shape in shapes]
    return [(x if x.dim() == 2 else x / x.shape[-1] ** 0.5).to(dtype).float() for x in made]


def outcome(backend: Any, counts: list[int], values: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """y and the gradients of x, w1, w2, w3, of the rows that are computed."""
    rows, inputs = sum(counts), [value.to(dtype).clone().requires_grad_() for value in values]
    y = backend(*inputs, torch.tensor(counts))
    upstream = torch.randn(300, DIM, generator=torch.Generator().manual_seed(2))[: len(y)]
    y.backward(upstream.to(torch.float16).to(dtype))
    grad_x, *grads = (value.grad for value in inputs)
    assert all(part is not None and part.dtype == dtype for part in (y, grad_x, *grads))
    return [y.detach()[:rows], grad_x[:rows], *grads]


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_equals_grouped_products(name: str, dtype: torch.dtype, error: float) -> None:
    counts = COUNTS[name]
    values = leaves(counts, dtype)
    got = outcome(liger_experts, counts, values, dtype)
    want = outcome(expert_swiglu, counts, values, torch.float32)
    for ours, exact in zip(got, want, strict=True):
        assert (ours.float() - exact).norm() <= error * exact.norm()
    for expert, count in enumerate(counts):
        if count == 0:
            assert all((weight[expert] == 0).all() for weight in got[2:])


def test_rows_after_the_last_experts_are_read_by_nobody() -> None:
    counts = COUNTS["odd"]
    values = leaves(counts, torch.float32, more_rows=9)
    want = outcome(expert_swiglu, counts, [values[0][:-9], *values[1:]], torch.float32)
    values[0][-9:] = torch.nan
    got = outcome(liger_experts, counts, values, torch.float32)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_takes_any_strides() -> None:
    counts = COUNTS["odd"]
    x, *weights = leaves(counts, torch.float32)
    results = []
    for backend, rows in ((liger_experts, x.clone().t().contiguous().t()), (expert_swiglu, x.clone())):
        inputs = [rows.requires_grad_(), *(w.clone().requires_grad_() for w in weights)]
        backend(*inputs, torch.tensor(counts)).sum().backward()  # its gradient has strides of 0
        results.append([value.grad for value in inputs])
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("mode", "capacity_factor"), [("none", 0.75), ("selective", 0.0), ("full", 0.75)])
def test_training_equals_that_of_grouped_products(mode: str, capacity_factor: float) -> None:
    """Choices that are not kept leave rows behind the last expert's."""
    losses = []
    for backend in (liger_experts, expert_swiglu):
        case = Case("topk_softmax", {"capacity_factor": capacity_factor} if capacity_factor else {})
        model = tiny_model(case, num_layers=1)
        model.init_weights(0)
        use_experts_backend(model, backend)
        for name, block in list(model.layers.named_children()):
            model.layers.register_module(name, checkpoint_block(block, mode))
        losses.append([float(output.total_loss) for output in steps(model, 2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own doing
def test_compiles_to_one_graph() -> None:
    layer = tiny_model(num_layers=1).layers[0].moe
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(2, 8, 16)
    expected = layer(x)[0]
    layer.experts.backend = liger_experts
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)[0]
    got.sum().backward()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert layer.experts.w1.grad.abs().sum() > 0
