"""Layouts x activation checkpointing x compile x accumulation: equal to one process, step by step and for 50 steps."""

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.cases import Case
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, apply
from tests.invariance import assert_same, fresh, full, outcome, start
from tests.tiny import steps
from titan_moe.model.wrappers import plain_name

ROUTER = Case("topk_softmax", {})
BALANCERS = [Case("aux_loss", {}), Case("z_loss", {}), Case("loss_free", {"rate": 0.01})]
SIZES: dict[str, Any] = {"num_layers": 3, "first_dense_layers": 1, "num_experts": 8, "measures": {}}
MOE_ONLY = {**SIZES, "num_layers": 2, "first_dense_layers": 0}  # layers that are alike: one graph
MODES = ("none", "selective", "full")
ACCUMULATIONS = (1, 4)
SEQUENCES = 2  # of a micro-batch of a rank, always: another number would be another graph
CURVE = 50

# The product is compiled by aot_eager: inductor's kernels take long to build and know nothing of layouts. A row of it
# is there all the same. HSDP comes after FSDP2, whose graph it shares; HSDP with expert parallelism is eager only. Rows
# have a graph each otherwise, as the process group of the all-to-alls is in it.
COMPILED = {2: [["fsdp2", "hsdp2x1"], ["ep2"]], 4: [["ep4"], ["ep2_fsdp2"]]}
INDUCTOR = ("ep2", "selective")
# Parts of sequences (tensor and context parallelism) are tests/distributed/test_parts_dist.py's.
WHOLE = {
    world: [name for name, degrees in LAYOUTS[world].items() if not {"tensor", "context"} & set(degrees)]
    for world in COMPILED
}
# Curves of 50 steps: layout and checkpointing, in eager mode and compiled.
CURVES = {
    "eager": [("fsdp2", "full"), ("hsdp2x1", "none")],
    "compiled": [INDUCTOR, ("ep4", "none"), ("ep2_fsdp2", "full")],
}


def build(world: int, layout: str, sizes: dict[str, Any], **options: Any) -> Any:
    return fresh(ROUTER, lambda model: apply(model, world, layout, **options), device="meta", **sizes)


def skew(model: Any) -> None:
    """Push every token to the experts 0 and 5: the other experts get none, and so do the ranks that hold them."""
    for bias in model.expert_biases():
        bias.zero_()
        bias[[0, 5]] = 100.0


def some_steps(model: Any, rank: int = 0, world: int = 1, ranks: int = 1) -> dict[Any, Any]:
    """A step by accumulation, and one in which most experts have no token; of `world`, or of one for `ranks`."""
    results: dict[Any, Any] = {}
    for accumulation in ACCUMULATIONS:
        start(model)
        cut = {"micro_batches": accumulation * ranks, "sequences": SEQUENCES * accumulation * ranks * world}
        run = functools.partial(outcome, model, BALANCERS, rank=rank, world=world, **cut)
        results[accumulation] = run()
        if accumulation == 1:
            skew(model)
            results["skewed"] = run()
    return results


def fifty_steps(model: Any, rank: int = 0, world: int = 1) -> Tensor:
    model.init_weights(0)
    micro_batches = 8 // SEQUENCES // world
    return torch.stack([o.loss for o in steps(model, CURVE, micro_batches=micro_batches, rank=rank, world=world)])


def weights(model: Any) -> dict[str, Any]:
    return {plain_name(name): full(parameter) for name, parameter in model.named_parameters()}


def eager(rank: int, world: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for layout, mode in itertools.product(WHOLE[world], MODES):
        model = build(world, layout, SIZES, checkpoint_mode=mode)
        results[layout, mode] = {"weights": weights(model), **some_steps(model, rank, world)}
        if (layout, mode) in CURVES["eager"]:
            results[layout, mode]["curve"] = fifty_steps(model, rank, world)
    return results


@contextmanager
def backend(name: str) -> Iterator[None]:
    original = torch.compile
    torch.compile = functools.partial(original, backend=name)  # type: ignore[assignment]
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    try:
        yield
    finally:
        torch.compile = original


def compiled(rank: int, world: int) -> dict[Any, Any]:
    results: dict[Any, Any] = {}
    for mode, layouts in itertools.product(MODES, COMPILED[world]):
        with backend("inductor" if (layouts[0], mode) == INDUCTOR else "aot_eager"):
            for layout in layouts:
                results[layout, mode] = compiled_row(rank, world, layout, mode)
            graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
            assert graphs == 2, f"{layouts}, {mode}: {graphs} graphs for layers that are alike, and the loss's softmax"
    return results


def compiled_row(rank: int, world: int, layout: str, mode: str) -> dict[Any, Any]:
    model = build(world, layout, MOE_ONLY, checkpoint_mode=mode, compile_blocks=True)
    outcome(model, BALANCERS, rank=rank, world=world, sequences=SEQUENCES * world)  # compiles
    with torch.compiler.set_stance("fail_on_recompile"):  # whatever the numbers of tokens
        row = some_steps(model, rank, world)
        if (layout, mode) in CURVES["compiled"]:
            row["curve"] = fifty_steps(model, rank, world)
    return row


def on_ranks(rank: int, world: int) -> tuple[dict[Any, Any], dict[Any, Any]]:
    return eager(rank, world), compiled(rank, world)


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", WHOLE)
def test_ranks_equal_one_process_however_layers_are_run(world: int) -> None:
    alone = [reference(sizes, world) for sizes in (SIZES, MOE_ONLY)]
    for result in run_ranks(world, on_ranks):
        for how, got, want in zip(("eager", "compiled"), result, alone, strict=True):
            for (layout, mode), row in got.items():
                for what, values in row.items():
                    compare(f"{layout}, {mode}, {how}, {what}", values, want[what])
    assert all(want["curve"][-1] < 0.8 * want["curve"][0] for want in alone)
    assert all((want["skewed"]["load"] > 0).sum() == 2 * 2 for want in alone)  # layers x experts


def reference(sizes: dict[str, Any], ranks: int) -> dict[Any, Any]:
    """What one process makes of the same."""
    model = fresh(ROUTER, **sizes)
    initial = weights(model)
    return {"weights": initial, **some_steps(model, ranks=ranks), "curve": fifty_steps(model)}


def compare(row: str, got: Any, want: Any) -> None:
    try:
        if isinstance(got, Tensor):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=0)  # AdamW enlarges round-off
        elif "weights" in row:
            assert got.keys() == want.keys()
            assert all(torch.equal(got[name], want[name]) for name in got)  # to the bit
        else:
            assert_same(got, want)
    except AssertionError as error:
        raise AssertionError(f"{row}: {error}") from None
