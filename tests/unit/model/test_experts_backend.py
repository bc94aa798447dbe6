"""Who computes the experts: a library's kernels (in Triton's interpreter), a function of one's own, and refusals."""

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import VOCAB
from titan_moe.build import build_sharded
from titan_moe.config import load_config
from titan_moe.model import experts_backend
from titan_moe.model.experts_backend import (
    ROWS_OF_TILE,
    check_experts_backend,
    cut_into_tiles,
    liger_experts,
    use_experts_backend,
)
from titan_moe.model.moe import MoE, expert_swiglu

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
calls: list[tuple[int, ...]] = []


def one_by_one(x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, tokens_per_expert_E: Tensor) -> Tensor:
    """Experts in turn, by what everyone knows of SwiGLU."""
    calls.append(tuple(w1.shape))
    parts = x_ND.split(tokens_per_expert_E.tolist())
    return torch.cat(
        [(F.silu(x @ up.t()) * (x @ gate.t())) @ down.t() for x, up, down, gate in zip(parts, w1, w2, w3, strict=True)]
    )


def without_counts(x_ND: Tensor, w1: Tensor, w2: Tensor, w3: Tensor) -> Tensor:
    return x_ND


def config(*words: str) -> Any:
    sizes = {"dim": 16, "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "vocab_size": VOCAB}
    sizes = [word for key, value in sizes.items() for word in (f"--model.{key}", str(value))]
    return load_config([*sizes, "--moe.num_experts", "4", "--moe.expert_dim", "16", *words])


def refusal(*words: str) -> str:
    with pytest.raises(ValueError, match=r"moe\.experts_backend") as caught:
        config(*words)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("counts", [[3, 0, 70, 16], [64, 0, 128, 0], [0, 0], [1] * 9, [640]])
@pytest.mark.parametrize("more_rows", [0, 100])
def test_tiles_hold_each_experts_rows_once(counts: list[int], more_rows: int) -> None:
    start, row, expert = cut_into_tiles(torch.tensor(counts), sum(counts) + more_rows)
    found: list[list[int]] = [[] for _ in counts]
    for first, owner in zip(row.tolist(), expert.tolist(), strict=True):
        found[owner] += range(first, min(first + ROWS_OF_TILE, int(start[owner + 1])))
    ends = torch.tensor(counts).cumsum(0).tolist()
    assert found == [list(range(end - count, end)) for count, end in zip(counts, ends, strict=True)]
    assert {part.dtype for part in (start, row, expert)} == {torch.int32}


def loss_and_norm(*words: str) -> tuple[list[float], Any]:
    made = config(*words, "--training.mixed_precision_param", "float32")
    model = build_sharded(made, None, compile_blocks=False)
    model.to_empty(device="cpu")
    model.init_weights(0)
    tokens = torch.randint(0, VOCAB, (2, 17), generator=torch.Generator().manual_seed(0))
    logits, _ = model(tokens[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    grads = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return [float(loss.detach()), float(torch.stack(grads).norm())], model


def test_a_function_of_ones_own() -> None:
    expected, plain = loss_and_norm()
    calls.clear()
    got, model = loss_and_norm("--moe.experts_backend", f"{__name__}:one_by_one")
    assert calls == [(4, 16, 16)] * 2
    assert got == pytest.approx(expected, rel=1e-5)
    assert {name: p.shape for name, p in model.named_parameters()} == {n: p.shape for n, p in plain.named_parameters()}


def fake_pass(backend: Any) -> tuple[int, list[tuple[torch.Size, torch.dtype]]]:
    with FakeTensorMode(), FlopCounterMode(display=False) as counter:
        x = torch.randn(50, 16, dtype=torch.bfloat16, requires_grad=True)
        weights = [torch.randn(s, dtype=torch.bfloat16, requires_grad=True) for s in ((4, 24, 16), (4, 16, 24))]
        inputs = [x, weights[0], weights[1], weights[0].detach().clone().requires_grad_()]
        backend(*inputs, torch.tensor([10, 0, 20, 20])).sum().backward()
        return counter.get_total_flops(), [(value.grad.shape, value.grad.dtype) for value in inputs]


def test_estimates_need_no_kernels() -> None:
    """On tensors without numbers, as `estimate` and torch.compile have them: the same shapes and operations."""
    assert fake_pass(liger_experts) == fake_pass(expert_swiglu)


def test_every_layer_gets_the_backend() -> None:
    model = build_sharded(config("--moe.experts_backend", "liger"), None, compile_blocks=False)
    assert [layer.experts.backend for layer in model.modules() if isinstance(layer, MoE)] == [liger_experts] * 2
    use_experts_backend(plain := build_sharded(config(), None, compile_blocks=False), expert_swiglu)
    assert {layer.experts.backend for layer in plain.modules() if isinstance(layer, MoE)} == {None}


def test_configurations_that_are_refused() -> None:
    assert "did you mean 'liger'?" in refusal("--moe.experts_backend", "liga")
    assert "cannot be imported" in refusal("--moe.experts_backend", "nowhere:fn")
    assert "it must take (x_ND, w1, w2, w3, tokens_per_expert_E)" in refusal(
        "--moe.experts_backend", f"{__name__}:without_counts"
    )
    float8 = ("--quantize.converters", "quantize.grouped_mm.float8", "--quantize.emulate", "true")
    assert "quantize.grouped_mm.float8" in refusal("--moe.experts_backend", "liger", *float8)
    assert "moe.num_experts is 0" in refusal("--moe.experts_backend", "liger", "--moe.num_experts", "0")


def cannot(**changes: Any) -> str:
    arguments = {"device": CUDA, "param_dtype": torch.bfloat16, "deterministic": False, **changes}
    with pytest.raises(ValueError, match=r"moe\.experts_backend = 'liger'") as caught:
        check_experts_backend("liger", **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_machines_that_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_experts_backend("grouped_mm", device=CPU, param_dtype=torch.float32, deterministic=True)
    with mock.patch("importlib.util.find_spec", return_value=None):
        assert "pip install 'titan_moe[kernels]'" in cannot()
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(name=name))
    for version in ("0.8.4", "0.9.0", "1.0.0.dev1"):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, version=version: version)
        assert f"this is {version}" in cannot()
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.8.5")
    check_experts_backend("liger", device=CUDA, param_dtype=torch.bfloat16, deterministic=False)
    assert "mixed_precision_param = 'bfloat16'" in cannot(param_dtype=torch.float32)
    monkeypatch.setattr(experts_backend, "_is_interpreted", lambda: False)
    monkeypatch.setattr(experts_backend, "_is_tuned", lambda: True)
    assert "this is a CPU" in cannot(device=CPU)
    assert "LIGER_FUSED_MOE_AUTOTUNE=0" in cannot(deterministic=True)


def test_in_the_interpreter() -> None:
    for package in ("triton", "liger_kernel"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed: pip install 'titan_moe[kernels]'")
    file = Path(__file__).with_name("interpreted_liger.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(file)]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "LIGER_FUSED_MOE_AUTOTUNE": "0"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "passed" in ended.stdout
