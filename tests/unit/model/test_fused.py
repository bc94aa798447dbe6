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
from titan_moe.model.routing.token_choice import topk_softmax

ROOT = Path(__file__).parents[3]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="needs Triton, which torch for CPUs lacks"
)
# The arguments of each kernel: X rows, I row numbers, M the mask, W weights and scores; then its constants.
KERNELS = {
    "_swiglu": ("XX", ()),
    "_swiglu_backward": ("XXXX", ()),
    "_gather_rows": ("XIMX", ("TOP_K", "HAS_KEPT")),
    "_sum_rows": ("XIMWX", ("TOP_K", "HAS_KEPT", "HAS_WEIGHTS")),
    "_weigh_rows_backward": ("XXWIMXW", ("TOP_K", "HAS_KEPT")),
}


@needs_triton
@pytest.mark.parametrize("rows", ["bf16", "fp32"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_compile_for_a_gpu(name: str, rows: str) -> None:
    """For an H100, which need not be here; rows are read and written 16 bytes at a time."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    tensors, names = KERNELS[name]
    kernel = getattr(fused.kernels(), name)
    types = {"X": f"*{rows}", "I": "*i64", "M": "*i1", "W": "*fp32"}
    constants = {"TOP_K": 2, "HAS_KEPT": True, "HAS_WEIGHTS": True}
    chosen = {constant: constants[constant] for constant in names} | {"BLOCK": 1024}
    signature = [*(types[kind] for kind in tensors), "i32", *("constexpr" for _ in chosen)]
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(len(tensors) + 1)}
    places = {(kernel.arg_names.index(constant),): value for constant, value in chosen.items()}
    source = ASTSource(kernel, dict(zip(kernel.arg_names, signature, strict=True)), places, aligned)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    assert compiled.asm["cubin"]
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    assert "st.global.v4.b32" in compiled.asm["ptx"]


@needs_triton
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
