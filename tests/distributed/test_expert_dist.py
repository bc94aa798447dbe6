"""Expert parallelism: the dispatcher against the local one, collectives, and configurations that differ."""

import dataclasses
import re
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, mesh_of, on_meta, place
from tests.tiny import adamw, steps, tiny_model
from titan_moe.config import load_config
from titan_moe.config.sections import Config, Training
from titan_moe.job import check_same_on_all_ranks
from titan_moe.model.dispatch import Dispatcher, combine_rows, local
from titan_moe.model.experts import Precision
from titan_moe.model.moe import MoE, expert_swiglu, swiglu_of_both
from titan_moe.model.routing import ROUTERS, Routing
from titan_moe.parallelize.expert_parallel import all_to_all, apply_ep

E, D = 8, 3
DOCS = Path(__file__).parents[2] / "docs" / "parallelism.md"


def logits(name: str, rank: int) -> Tensor:
    """Router logits (T, E) of a rank: any, all of one expert, none at all on some ranks."""
    generator = torch.Generator().manual_seed(rank)
    tokens = {"some ranks have no tokens": 0 if rank % 2 else 3, "one token": 1}.get(name, 5 + rank)
    values = torch.randn(tokens, E, generator=generator)
    return values + 100 * (torch.arange(E) == 6) if name == "one expert" else values


CASES: dict[str, dict[str, Any]] = {
    "uneven": {},
    "one expert": {"top_k": 1},
    "one token": {},
    "some ranks have no tokens": {},
    "capacity": {"capacity_factor": 0.75},
    "expert_choice": {"name": "expert_choice"},
}


def route(name: str, rank: int) -> Routing:
    arguments = {"name": "topk_softmax", "top_k": 2, **CASES[name]}
    return ROUTERS[arguments.pop("name")](**arguments)(logits(name, rank), None)


def through(dispatcher: Dispatcher, weight: Tensor, name: str, rank: int) -> tuple[Tensor, ...]:
    """Experts that multiply by a number: the output, and gradients of input, scores and the experts here."""
    routing = route(name, rank)
    tokens = routing.scores.shape[0]
    x = torch.randn(tokens, D, generator=torch.Generator().manual_seed(10 + rank)).requires_grad_()
    scores = routing.topk_scores.detach().requires_grad_()
    rows, tokens_per_expert, permutation, state = dispatcher.dispatch(x, routing)
    rows = dispatcher.receive(rows, state)
    factor = weight.repeat_interleave(tokens_per_expert)
    factor = torch.cat([factor, factor.new_zeros(len(rows) - len(factor))])  # rows that nobody computes
    y = combine_rows(dispatcher.send_back(rows * factor.unsqueeze(-1), state), scores, permutation)
    upstream = torch.randn(tokens, D, generator=torch.Generator().manual_seed(20 + rank))
    return y.detach(), *torch.autograd.grad(y, (x, scores, weight), upstream)


# Checkpointing, resharding, and micro-batches of a step.
COUNTED = [
    ("none", "default", 1),
    ("none", "default", 2),
    ("selective", "default", 1),
    ("full", "default", 1),
    ("none", "always", 1),
    ("none", "never", 1),
    ("none", "never", 2),
]


def weights() -> Tensor:
    return torch.linspace(0.5, 2.0, E)


class Counted(TorchDispatchMode):
    """Counts collectives by name; torch's CommDebugMode takes one forward pass only."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (
            func.namespace in ("c10d", "_c10d_functional")
            and "wait_tensor" not in func.__name__
            and "_wrap" not in func.__name__
        ):
            self.counts[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def count_collectives(world: int, layout: str, mode: str, policy: str, micro: int, rank: int) -> dict[str, int]:
    """Collectives of one optimizer step of a model of two MoE layers."""
    meta = tiny_model(device="meta", num_kv_heads=2)
    model = on_meta(meta, world, layout, checkpoint_mode=mode, reshard_after_forward=policy)
    optimizer = adamw(model)
    with Counted() as counter:
        steps(model, 1, **place(rank, world, layout), optimizer=optimizer, micro_batches=micro)
    names = {
        "_allgather_base_": "all-gather",
        "_reduce_scatter_base_": "reduce-scatter",
        "allreduce_": "all-reduce",
        "all_gather_into_tensor": "gathered activations",
        "reduce_scatter_tensor": "scattered activations",
    }
    return {names.get(op, op.replace("all_to_all_single", "all-to-all")): count for op, count in counter.counts.items()}


class Order(TorchDispatchMode):
    """The names of operators in the order in which they are issued."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def whole_layer(mesh: DeviceMesh | None = None) -> MoE:
    """A MoE layer with shared experts, the same everywhere, its experts sharded over `mesh`."""
    route = ROUTERS["topk_softmax"](top_k=2)
    moe = MoE(route=route, dim=16, num_experts=E, expert_dim=24, num_shared_experts=1, expert_bias=True)
    generator = torch.Generator().manual_seed(0)
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    if mesh is not None:
        apply_ep(moe, mesh)
    return moe


def all_to_one_rank(moe: MoE, rank: int) -> dict[str, Tensor]:
    """Output and gradients where every token goes to experts 0 and 1: other ranks of the group receive no row."""
    assert moe.expert_bias is not None
    moe.expert_bias[:2] = 100.0
    x = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    y, routing = moe(x)
    assert set(routing.topk_experts.unique().tolist()) == {0, 1}
    y.square().sum().backward()
    assert x.grad is not None
    grads = {name: p.grad for name, p in moe.named_parameters() if p.grad is not None}
    local_grads = {name: g.to_local() if isinstance(g, DTensor) else g for name, g in grads.items()}
    return {"y": y.detach(), "x": x.grad, **local_grads}


def order_of_a_layer(moe: MoE) -> list[str]:
    with Order() as order:
        moe(torch.randn(1, 5, 16))
    return order.names


def experts_as_on_a_gpu(
    x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: Tensor, precision: Precision, dropout: float
) -> Tensor:
    return swiglu_of_both(x, w1, w2, w3, counts.cumsum(0, dtype=torch.int32), precision, dropout)


def refusals(rank: int) -> list[str]:
    check_same_on_all_ranks(Config())
    texts = []
    for arguments in ("--training.seed=7", "--optimizer.lr=0.5", "--optimizer.expert.lr=0.5"):
        with pytest.raises(ValueError, match="different") as error:
            check_same_on_all_ranks(load_config([arguments] if rank == 1 else []))
        texts.append(str(error.value).partition(": ")[2].partition(":")[0])
    return texts


def on_ranks(rank: int, world: int) -> dict[str, Any]:
    results: dict[str, Any] = {"refusals": refusals(rank)}
    for layout in ("ep4", "ep2_fsdp2"):
        mesh = mesh_of(world, layout).ep
        assert mesh is not None
        own = weights().chunk(mesh.size())[mesh.get_local_rank()].clone().requires_grad_()
        dispatcher = all_to_all(mesh)
        results[layout] = {name: through(dispatcher, own, name, rank) for name in CASES}
        results[layout]["rank"] = mesh.get_local_rank()
        results[layout]["order"] = order_of_a_layer(whole_layer(mesh))
        for how in (expert_swiglu, experts_as_on_a_gpu):
            with mock.patch("titan_moe.model.moe.expert_swiglu", how):
                results[layout][how.__name__] = all_to_one_rank(whole_layer(mesh), rank)
    model = on_meta(tiny_model(device="meta"), world, "ep2_fsdp2", param_dtype=torch.bfloat16)
    results["bfloat16"] = steps(model, 1, rank=rank, world=world)[0].loss
    results["counts"] = {
        (layout, *case): count_collectives(world, layout, *case, rank)
        for layout in LAYOUTS[world]
        for case in COUNTED
        if case == COUNTED[0] or layout in ("fsdp4", "hsdp2x2", "ep2_fsdp2")
    }
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_four_ranks() -> None:
    model = tiny_model()
    model.init_weights(0)
    (exact,) = steps(model, 1, micro_batches=4)
    results = run_ranks(4, on_ranks)
    for layout, degree in (("ep4", 4), ("ep2_fsdp2", 2)):
        check_dispatcher([result[layout] for result in results], degree)
        check_ranks_without_rows([result[layout] for result in results], degree)
        for result in results:
            check_order(result[layout]["order"])
    for result in results:
        check_counts(result["counts"])
        torch.testing.assert_close(result["bfloat16"], exact.loss, rtol=1e-2, atol=0)
        assert result["refusals"] == [
            "training.seed is 42 on rank 0 and 7 on rank 1",
            "optimizer.lr is 0.001 on rank 0 and 0.5 on rank 1",
            "optimizer.expert.lr is not set on rank 0 and 0.5 on rank 1",
        ]


def check_dispatcher(results: list[dict[str, Any]], degree: int) -> None:
    """What each rank got is what it gets where all experts are; an expert's gradient is of the tokens of its group."""
    for name in CASES:
        alone = [through(local(), weights().requires_grad_(), name, rank) for rank in range(4)]
        for rank, result in enumerate(results):
            torch.testing.assert_close(result[name][:3], alone[rank][:3], msg=lambda text: f"{name}: {text}")  # noqa: B023
            group = [other for other in range(4) if other // degree == rank // degree]
            want = sum(alone[other][3] for other in group).chunk(degree)[result["rank"]]
            torch.testing.assert_close(result[name][3], want, msg=lambda text: f"{name}: {text}")  # noqa: B023


def check_ranks_without_rows(results: list[dict[str, Any]], degree: int) -> None:
    """Everything is as where all experts are; the experts of ranks that received no row have gradients of zero."""
    alone = [all_to_one_rank(whole_layer(), rank) for rank in range(4)]
    for rank, result in enumerate(results):
        group = [other for other in range(4) if other // degree == rank // degree]
        for how in (expert_swiglu, experts_as_on_a_gpu):
            for name, got in result[how.__name__].items():
                want = alone[rank][name]
                if name.startswith("experts."):
                    want = sum(alone[other][name] for other in group).chunk(degree)[result["rank"]]
                    assert (got == 0).all() == (result["rank"] > 0)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5, msg=lambda text: f"{name}: {text}")  # noqa: B023


def check_order(names: list[str]) -> None:
    """The shared experts' three products come between the rows' all-to-all and the wait for it."""
    sent = [i for i, name in enumerate(names) if name == "all_to_all_single"][1]  # the first brings the counts
    wait = next(i for i, name in enumerate(names) if i > sent and name == "wait_tensor")
    assert names[sent:wait].count("mm") == 3


def check_counts(counts: dict[tuple[str, str, str, int], dict[str, int]]) -> None:
    """The table of docs/parallelism.md: formulas in L layers, M of them MoE layers, for one micro-batch."""
    kept = (
        "all-gather",
        "reduce-scatter",
    )  # what a second micro-batch does not do again where parameters stay gathered
    table = counts_table()
    names = {
        **{"fsdp4": "FSDP2", "hsdp2x2": "HSDP", "ep4": "EP", "ep2_fsdp2": "EP x FSDP2", "hsdp2_ep2": "HSDP x EP"},
        **{"fsdp2_tp2": "FSDP2 x TP", "fsdp2_cp2": "FSDP2 x CP", "ep2_tp2": "EP x FSDP2 x TP"},
        **{"cp2_tp2_ep4": "CP x TP x EP", "hsdp2_tp2": "HSDP x TP"},
    }
    for (layout, mode, policy, micro), got in counts.items():
        row = table[names[layout]]
        want = {axis: eval(formula, {"L": 2, "M": 2, "F": 0}) for axis, formula in row.items()}
        if mode == "full" and want["all-to-all"]:
            want["all-to-all"] += 3 * 2  # the forward once more
        # all units but the root's are gathered twice by default
        want["all-gather"] += {"default": 0, "always": 1, "never": -(want["all-gather"] // 2)}[policy]
        if policy == "default":
            # the root keeps its parameters until backward only
            want |= {axis: micro * count for axis, count in want.items() if axis in kept}
        want |= {axis: micro * count for axis, count in want.items() if axis not in (*kept, "all-reduce")}
        assert got == {axis: count for axis, count in want.items() if count}, (layout, mode, policy, micro)


def counts_table() -> dict[str, dict[str, str]]:
    """Rows of the table by layout: collective -> formula as Python has it (3 L + 1 -> 3 * L + 1)."""
    lines = [line for line in DOCS.read_text().splitlines() if line.startswith("|")]
    start = next(i for i, line in enumerate(lines) if "reduce-scatter" in line)
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    header, rows = cells[0], cells[2:]
    return {
        row[0]: {a: re.sub(r"(\d) ([LMF])", r"\1 * \2", f) for a, f in zip(header[1:], row[1:], strict=True)}
        for row in rows
    }


def test_one_process_has_nothing_to_compare() -> None:
    check_same_on_all_ranks(dataclasses.replace(Config(), training=Training(seed=3)))
