"""The operators of `fused`: kernels under Triton's interpreter, and what a fake tensor learns of their results."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from titan_moe.model import fused
from titan_moe.model.dispatch import sort_choices
from titan_moe.model.routing import topk_softmax

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which torch for CPUs lacks")
def test_kernels_equal_the_formulas() -> None:
    """tests/gpu/test_kernels.py, interpreted; in a process of its own, since Triton asks when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_kernels.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fake_results_are_like_real_ones(dtype: torch.dtype) -> None:
    routing = topk_softmax(top_k=2)(torch.randn(5, 4), None)
    order, row, kept = sort_choices(routing)[0]
    x, y, h13, scores = (torch.randn(shape).to(dtype) for shape in ((5, 8), (10, 8), (10, 12), (5, 2)))
    calls = {
        "swiglu": (h13,),
        "swiglu_backward": (h13[:, :6].contiguous(), h13),
        "gather_rows": (x, order, row, kept),
        "sum_rows": (y, row, kept, scores.float()),
        "weigh_rows_backward": (x, y, scores.float(), order, row, kept),
    }
    for name, arguments in calls.items():
        real = getattr(fused, name)(*arguments)
        with FakeTensorMode() as mode:
            fake = getattr(fused, name)(*(a if a is None else mode.from_tensor(a) for a in arguments))
        pairs = zip(real, fake, strict=True) if isinstance(real, tuple) else [(real, fake)]
        for ours, theirs in pairs:
            assert (ours.shape, ours.dtype, ours.stride()) == (theirs.shape, theirs.dtype, theirs.stride()), name
