"""One GPU: the numbers of a CPU, in fp32, bf16 and float8, eager and compiled, without waiting for the device."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.gpu.harness import DEVICE, build, hopper, numbers, one_gpu, one_process, train
from tests.tiny import adamw, balancers, batch
from titan_moe.model.grouped import float8_grouped_mm, grouped_mm
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.step import train_step

pytestmark = one_gpu
COUNTS = [3, 0, 37, 1, 0, 23]  # nothing that hardware likes
BOTH = ("quantize.linear.float8", "quantize.grouped_mm.float8")


@pytest.fixture(autouse=True)
def _no_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before
    torch.compiler.reset()


def sharded(**options: Any) -> Any:
    """On one process, under FSDP2, as mixed precision has it."""
    return build(build_mesh(device=torch.device(DEVICE), shard=1), **options)


def test_steps_equal_those_of_a_cpu() -> None:
    on_cpu, here = build(None, device="cpu"), build(None)
    here.load_state_dict(on_cpu.state_dict())
    torch.testing.assert_close(numbers(train(here)), numbers(train(on_cpu)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_changes_nothing(mode: str) -> None:
    expected = numbers(train(build(None)))
    torch.testing.assert_close(numbers(train(build(None, checkpoint_mode=mode))), expected, rtol=1e-5, atol=1e-6)


def test_bf16_grouped_products() -> None:
    """Of all three kinds: forward, the gradient of x, and that of the weights."""
    x = torch.randn(64, 32, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(6, 48, 32, device=DEVICE, dtype=torch.bfloat16)
    grad = torch.randn(64, 48, device=DEVICE, dtype=torch.bfloat16)
    offs = torch.tensor(COUNTS, device=DEVICE).cumsum(0, dtype=torch.int32)
    parts, grads = x.float().split(COUNTS), grad.float().split(COUNTS)
    got = grouped_mm(x, w.transpose(1, 2), offs), grouped_mm(grad, w, offs), grouped_mm(grad.t(), x, offs)
    want = (
        torch.cat([part @ m.t() for part, m in zip(parts, w.float(), strict=True)]),
        torch.cat([part @ m for part, m in zip(grads, w.float(), strict=True)]),
        torch.stack([g.t() @ part for g, part in zip(grads, parts, strict=True)]),
    )
    for ours, exact in zip(got, want, strict=True):
        torch.testing.assert_close(ours.float(), exact, rtol=2e-2, atol=5e-2)


def test_mixed_precision_follows_fp32() -> None:
    expected = numbers(train(build(None)))
    with one_process():
        got = numbers(train(sharded(dtype=torch.bfloat16)))
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-2, atol=0)
    torch.testing.assert_close(got["grad_norm"], expected["grad_norm"], rtol=0.1, atol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # torch's note that it is a prototype
def test_a_step_does_not_wait_for_the_device() -> None:
    """torch raises where the host waits for the GPU; bf16, for fp32 grouped products are a loop that does."""
    with one_process():
        model = sharded(dtype=torch.bfloat16)
        train(model, 2)
        torch.cuda.synchronize()
        step_again(model)


def step_again(model: Any) -> None:
    optimizer, made = adamw(model), balancers()
    micro = [tuple(part.to(DEVICE) for part in batch(0))]
    train_step(model, micro, optimizer, made, model.expert_biases(), max_norm=0.1)  # makes the optimizer's state
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_step(model, micro, optimizer, made, model.expert_biases(), max_norm=0.1)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.filterwarnings("ignore")  # of dynamo and inductor
@pytest.mark.parametrize("converters", [(), pytest.param(BOTH, marks=hopper)], ids=["bf16", "float8"])
def test_compiled_steps_do_not_recompile(converters: tuple[str, ...]) -> None:
    with one_process():
        expected = numbers(train(sharded(dtype=torch.bfloat16, converters=converters)))
        model = sharded(dtype=torch.bfloat16, converters=converters, compile_blocks=True)
        got = numbers(train(model))
        with torch.compiler.set_stance("fail_on_recompile"):
            train(model, 3)
    torch.testing.assert_close(got["loss"], expected["loss"], rtol=1e-2, atol=0)


@hopper
def test_float8_products_are_those_of_the_emulation() -> None:
    """Groups of any size, empty ones too."""
    x = torch.randn(64, 64, device=DEVICE, dtype=torch.bfloat16)
    w = torch.randn(6, 48, 64, device=DEVICE, dtype=torch.bfloat16)
    offs = torch.tensor(COUNTS, device=DEVICE).cumsum(0, dtype=torch.int32)
    got = float8_grouped_mm(x, w.transpose(1, 2), offs)
    want = float8_grouped_mm(x, w.transpose(1, 2), offs, emulate=True)
    torch.testing.assert_close(got, want, rtol=1e-2, atol=5e-2)


@hopper
def test_float8_training_is_that_of_the_emulation() -> None:
    pytest.importorskip("torchao")
    with one_process():
        options = {"dtype": torch.bfloat16, "converters": BOTH}
        emulated = numbers(train(sharded(emulate=True, **options)))
        got = numbers(train(sharded(**options)))
    torch.testing.assert_close(got["loss"], emulated["loss"], rtol=1e-2, atol=0)
