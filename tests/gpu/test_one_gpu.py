"""One GPU: the numbers of a CPU, in fp32, bf16 and float8, eager and compiled, without waiting for the device."""

import importlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.e2e.conftest import Arguments, _process_as_before, arguments, shared  # noqa: F401 (fixtures)
from tests.e2e.harness import command
from tests.gpu.harness import DEVICE, build, hopper, no_waits, numbers, one_gpu, one_process, train
from tests.tiny import adamw, balancers, batch, tiny_model
from titan_moe.cuda_graph import GraphedGradients
from titan_moe.model.documents import attend_in_documents, documents_of, places_of
from titan_moe.model.experts import float8_grouped_mm, grouped_mm
from titan_moe.model.moe import MoE, expert_swiglu
from titan_moe.model.routing import ROUTERS
from titan_moe.optimizer.optimizer import divide
from titan_moe.parallelize.grad import total_norm
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.step import compute_gradients, evaluate, train_step

pytestmark = one_gpu
COUNTS = [3, 0, 37, 1, 0, 23]  # nothing that hardware likes
BOTH = ("quantize.linear.float8", "quantize.grouped_mm.float8")


# Importing inductor makes torch warn of its own deprecated parts; here first, so that no test fails by it.
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    importlib.import_module("torch._inductor.cudagraph_trees")


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_and_clipping_are_right_to_a_millionth(dtype: torch.dtype) -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 1024, 4096, device=DEVICE, dtype=dtype))
    weight.grad = torch.randn(weight.shape, device=DEVICE).to(dtype)
    exact = weight.grad.double()
    norm = total_norm([weight.grad])
    assert norm.item() == pytest.approx(exact.square().sum().sqrt().item(), rel=1e-6)
    divide([weight.grad], ((norm + 1e-6) / 0.7).clamp(min=1.0))
    want = (exact / (norm.double() / 0.7)).to(dtype)  # each rounded to bf16 once, by a scale that is not
    assert total_norm([weight.grad]).item() == pytest.approx(want.double().square().sum().sqrt().item(), rel=1e-6)


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


def test_gradients_of_experts_without_a_row_are_zero() -> None:
    """Of some experts among others, the first and the last too."""
    counts = torch.tensor([0, 5, 0, 7, 0], device=DEVICE)
    shapes = [(12, 32), (5, 48, 32), (5, 32, 48), (5, 48, 32)]
    inputs = [torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    expert_swiglu(*inputs, counts).square().sum().backward()
    for weight in inputs[1:]:
        assert weight.grad is not None
        assert torch.equal((weight.grad == 0).flatten(1).all(1), counts == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("ends", [0, 1, 7, 200])
@pytest.mark.parametrize(("start", "stop"), [(0, 320), (160, 240)])
def test_attention_in_documents_is_that_of_a_cpu(dtype: torch.dtype, ends: int, start: int, stop: int) -> None:
    """Outputs and gradients, in whole sequences and in a run of them, of documents down to a single token."""
    generator = torch.Generator().manual_seed(ends)
    shapes = [(2, stop - start, 4, 32), (2, stop, 2, 32), (2, stop, 2, 32), (2, stop - start, 4, 32)]
    inputs = [torch.randn(shape, generator=generator).to(dtype).transpose(1, 2) for shape in shapes]
    tokens = torch.ones(2, 320, dtype=torch.int64)
    tokens.view(-1)[torch.randperm(640, generator=generator)[:ends]] = 0
    results = []
    for device in ("cpu", DEVICE):
        ids = places_of(tokens.to(device), 0).document_ids
        found = documents_of(ids, start, stop, limited=False)
        q, k, v, grad = (x.to(device, torch.float32 if device == "cpu" else dtype).detach() for x in inputs)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        y = attend_in_documents(*leaves, found)
        gradients = torch.autograd.grad(y, leaves, grad)
        results.append([x.detach().float().cpu() for x in (y, *gradients)])
    for got, want in zip(results[1], results[0], strict=True):
        assert (got - want).norm() <= (0.01 if dtype == torch.bfloat16 else 1e-5) * want.norm()


@pytest.mark.parametrize("checkpoint_mode", ["none", "selective", "full"])
@pytest.mark.parametrize("compile_blocks", [False, True])
@pytest.mark.filterwarnings("ignore")  # of dynamo and inductor
def test_steps_in_documents(compile_blocks: bool, checkpoint_mode: str) -> None:
    """They follow fp32, wait for nothing, and are the same when a graph is replayed with other documents."""
    expected = numbers(train(build(None, document_mask=True), 8))
    options = {"document_mask": True, "checkpoint_mode": checkpoint_mode, "compile_blocks": compile_blocks}
    results = []
    for gradients in (compute_gradients, GraphedGradients()) if DEVICE == "cuda" else (compute_gradients,):
        model = build(None, dtype=torch.bfloat16, **options)
        results.append(numbers(train(model, 8, gradients=gradients)))
    torch.testing.assert_close(results[0]["loss"], expected["loss"], rtol=1e-2, atol=0)
    torch.testing.assert_close(results[-1], results[0], rtol=0, atol=0)
    step_again(model)


def layer_outcome(moe: MoE, x: torch.Tensor) -> dict[str, torch.Tensor]:
    moe.zero_grad()
    x = x.detach().requires_grad_()
    y, _ = moe(x)
    (y.float() * torch.linspace(-1, 1, y.numel(), device=y.device).view_as(y)).sum().backward()
    grads = {name: p.grad.float().cpu().clone() for name, p in moe.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach().float().cpu(), "x": x.grad.float().cpu(), **grads}


def test_layer_in_bf16_is_that_of_a_cpu_and_the_same_in_every_run() -> None:
    """Eager, by the Triton kernels, with a capacity and without: near fp32 on a CPU, and twice the same bits."""
    for capacity_factor in (0.0, 0.75):
        route = ROUTERS["topk_softmax"](top_k=2, capacity_factor=capacity_factor)
        moe = MoE(dim=64, num_experts=6, expert_dim=48, route=route, num_shared_experts=1)
        for parameter in moe.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
            parameter.data = parameter.data.bfloat16().float()  # so that both route alike
        x = torch.randn(2, 40, 64).bfloat16().float()
        want = layer_outcome(moe, x)
        moe.to(DEVICE, torch.bfloat16)
        got, again = (layer_outcome(moe, x.to(DEVICE, torch.bfloat16)) for _ in range(2))
        for name, value in got.items():
            assert torch.equal(value, again[name]), name
            assert (value - want[name]).norm() <= 0.02 * want[name].norm(), name


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
    with no_waits():
        train_step(model, micro, optimizer, made, model.expert_biases(), max_norm=0.1)


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


@pytest.mark.parametrize("experts", [0, 4], ids=["dense", "moe"])
def test_evaluation_equals_that_of_a_cpu(experts: int) -> None:
    router = None if experts == 0 else "topk_softmax"
    model = tiny_model(router, num_experts=experts, ffn_dim=64)
    model.init_weights(0)
    want = evaluate(model, [batch(9)], torch.ones(64))
    tokens, labels = (part.to(DEVICE) for part in batch(9))
    got = evaluate(model.to(DEVICE), [(tokens, labels)], torch.ones(64, device=DEVICE))
    for name, value in want._asdict().items():
        torch.testing.assert_close(getattr(got, name).cpu(), value, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("policy", ["default", "always", "never"])
def test_accumulation_changes_nothing(policy: str) -> None:
    """Four micro-batches under FSDP2, gathered and reduced once or each time; the loss by micro-batch stays out."""
    with one_process():
        plain = numbers(train(build(None), micro_batches=4))
        got = numbers(train(sharded(reshard_after_forward=policy), micro_batches=4))
    torch.testing.assert_close(got, plain, rtol=1e-4, atol=1e-6)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
@pytest.mark.parametrize("checkpoint_mode", ["none", "full"])
@pytest.mark.parametrize("compile_blocks", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 4])
@pytest.mark.filterwarnings("ignore")  # of dynamo and inductor
def test_replayed_steps_are_the_same_steps(micro_batches: int, compile_blocks: bool, checkpoint_mode: str) -> None:
    """Of eight steps the last five are replayed; the router's noise is that of the step."""
    route = Case("topk_softmax", {"noise_std": 0.1})
    options = {"dtype": torch.bfloat16, "compile_blocks": compile_blocks, "checkpoint_mode": checkpoint_mode}
    results = []
    for gradients in (compute_gradients, GraphedGradients()):
        model = build(None, router=route, **options)
        results.append(numbers(train(model, 8, micro_batches=micro_batches, gradients=gradients)))
        assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert isinstance(gradients, GraphedGradients)
    assert gradients.graph is not None
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.skipif(DEVICE != "cuda", reason="graphs are CUDA's")
def test_a_step_that_reads_a_value_on_the_host_is_no_graph() -> None:
    """And what was computed before goes on."""

    def reading(model: Any, micro_batches: Any, *rest: Any, **options: Any) -> Any:
        sums, *others = compute_gradients(model, micro_batches, *rest, **options)
        sums["loss"].item()
        return sums, *others

    told = r"compile.cuda_graph: this step can't be recorded \(.*set compile.cuda_graph = false"
    with pytest.raises(ValueError, match=told):
        train(build(None, dtype=torch.bfloat16), 8, gradients=GraphedGradients(reading))
    assert numbers(train(build(None, dtype=torch.bfloat16), 2))["loss"].isfinite().all()


@pytest.mark.parametrize("policy", ["position", "score"])
def test_capacity_equals_that_of_a_cpu(policy: str) -> None:
    route = ROUTERS["topk_softmax"](top_k=2, capacity_factor=0.75, drop_policy=policy)
    results = []
    for device in ("cpu", DEVICE):
        generator = torch.Generator().manual_seed(0)
        layer = MoE(dim=64, num_experts=6, expert_dim=64, route=route)
        for parameter in layer.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        x = torch.randn(4, 16, 64, generator=generator).to(device).requires_grad_()
        y, routing = layer.to(device)(x)
        y.square().sum().backward()
        assert routing.kept is not None
        assert not routing.kept.all()
        results.append([t.cpu() for t in (y, routing.kept, x.grad, layer.experts.w2.grad, layer.router.weight.grad)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


def on_the_device(job: Arguments, **changes: object) -> list[str]:
    sizes = {"model__dim": 64, "moe__expert_dim": 64, "training__mixed_precision_param": "bfloat16"}
    return job(**{**sizes, "compile__enable": False, **changes})


def losses(folder: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "train"}


@pytest.mark.parametrize("async_mode", ["disabled", "async"])
def test_a_run_that_goes_on_from_a_save_is_the_same_run(
    arguments: Arguments,  # noqa: F811
    tmp_path: Path,
    async_mode: str,
) -> None:
    """Saved in the background or not, ended after four of six steps, and gone on; then evaluated and asked for text."""
    options = {"lr_scheduler__name": "constant", "checkpoint__async_mode": async_mode}
    assert command("train", on_the_device(arguments, name="whole", **options)).code == 0
    assert command("train", [*on_the_device(arguments, name="part", **options), "--training.steps=4"]).code == 0
    assert command("train", on_the_device(arguments, name="part", **options)).code == 0
    assert losses(tmp_path / "part") == losses(tmp_path / "whole")
    evaluated = command("evaluate", ["--checkpoint", str(tmp_path / "part")])
    assert evaluated.code == 0, evaluated.err
    assert "perplexity" in evaluated.out
    text = command("generate", ["--checkpoint", str(tmp_path / "part"), "--prompt", "the ", "--max_new_tokens", "20"])
    assert text.code == 0, text.err
    assert text.out.startswith("the ")
