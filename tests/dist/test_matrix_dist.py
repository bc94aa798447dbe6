"""Layouts of four ranks x activation checkpointing x accumulation x compile: equal to one process, step by step."""

import functools
import itertools
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.dist.harness import run_ranks
from tests.dist.layouts import LAYOUTS, apply
from tests.invariance import assert_same, fresh, full, outcome, plain
from tests.tiny import steps

ROUTER = Case("topk_softmax", {})
BALANCERS = [Case("aux_loss", {}), Case("z_loss", {}), Case("loss_free", {"rate": 0.01})]
SIZES = {"num_layers": 3, "first_dense_layers": 1, "num_experts": 8}
MODES = ("none", "selective", "full")
CURVE = 50


def build(layout: str | None, **options: Any) -> Any:
    if layout is None:
        return fresh(ROUTER, **SIZES)
    return fresh(ROUTER, lambda model: apply(model, 4, layout, **options), device="meta", **SIZES)


def skew(model: Any) -> None:
    """Push every token to the experts 0 and 5: the other experts get none, and so do the ranks that hold them."""
    for bias in model.expert_biases():
        bias.zero_()
        bias[[0, 5]] = 100.0


def two_steps(model: Any, micro_batches: int, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """A step, and one in which most experts have no token."""
    run = functools.partial(outcome, model, BALANCERS, micro_batches=micro_batches, rank=rank, world=world)
    first = run()
    skew(model)
    return [first, run()]


def weights(model: Any) -> dict[str, Any]:
    return {plain(name): full(parameter) for name, parameter in model.named_parameters()}


def eager(rank: int, world: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {"weights": {layout: weights(build(layout)) for layout in LAYOUTS[4]}}
    for layout, mode, accumulation in itertools.product(LAYOUTS[4], MODES, (1, 2)):
        model = build(layout, checkpoint_mode=mode)
        results[layout, mode, accumulation] = two_steps(model, accumulation, rank, world)
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_checkpointing_and_accumulation_in_all_layouts() -> None:
    alone = {accumulation: two_steps(build(None), 4 * accumulation) for accumulation in (1, 2)}
    assert (alone[1][1]["load"] > 0).sum() == 2 * 2
    initial = weights(build(None))
    for result in run_ranks(4, eager):
        for layout, own in result.pop("weights").items():
            assert own.keys() == initial.keys()
            assert all(torch.equal(own[name], initial[name]) for name in own), layout  # to the bit
        for (layout, mode, accumulation), both in result.items():
            for step, got in enumerate(both):
                compare(f"{layout}, {mode}, {accumulation}, step {step}", got, alone[accumulation][step])


def compare(name: str, got: Any, want: Any) -> None:
    try:
        assert_same(got, want)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None


# Layout, checkpointing, backend by number of ranks. Inductor's kernels take long to build and know nothing of layouts.
COMPILED = {
    2: [("ep2", "selective", "inductor"), ("fsdp2", "full", "aot_eager")],
    4: [("ep2_fsdp2", "full", "aot_eager"), ("hsdp2_ep2", "none", "aot_eager")],
}
MOE_ONLY = {**SIZES, "num_layers": 2, "first_dense_layers": 0}


def compiled(rank: int, world: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    original = torch.compile
    for layout, mode, backend in COMPILED[world]:
        torch.compiler.reset()
        torch._dynamo.utils.counters.clear()
        torch.compile = functools.partial(original, backend=backend)  # type: ignore[assignment]
        wrap = functools.partial(apply, world=world, layout=layout, checkpoint_mode=mode, compile_blocks=True)
        model = fresh(ROUTER, wrap, device="meta", **MOE_ONLY)
        first = outcome(model, BALANCERS, rank=rank, world=world)
        skew(model)
        with torch.compiler.set_stance("fail_on_recompile"):  # whatever the numbers of tokens
            second = outcome(model, BALANCERS, rank=rank, world=world)
            results[layout, mode] = [first, second]
            if backend == "inductor":
                model.init_weights(0)
                results["curve"] = torch.stack([output.loss for output in steps(model, CURVE, rank=rank, world=world)])
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert graphs == 1, f"{layout}: {graphs} graphs for layers that are alike"
    torch.compile = original
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", COMPILED)
def test_compiled_layers_are_the_same_without_recompilation(world: int) -> None:
    alone = two_steps(fresh(ROUTER, **MOE_ONLY), world)
    model = fresh(ROUTER, **MOE_ONLY)
    model.init_weights(0)
    curve = torch.stack([output.loss for output in steps(model, CURVE, micro_batches=world)])
    assert curve[-1] < 0.8 * curve[0]
    for result in run_ranks(world, compiled):
        torch.testing.assert_close(result.pop("curve", curve), curve, rtol=1e-4, atol=0)
        for (layout, mode), both in result.items():
            for step, got in enumerate(both):
                compare(f"{layout}, {mode}, compiled, step {step}", got, alone[step])
