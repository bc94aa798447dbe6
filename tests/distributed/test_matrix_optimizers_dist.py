"""Matrix optimizers on sharded experts and matrices equal those of one process, and their states reshard."""

import functools
import tempfile
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from tests.cases import OPTIMIZER_NAMES
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, apply
from tests.distributed.test_fsdp import full
from tests.distributed.test_load_lr_dist import train
from tests.tiny import tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import combine

BY_LOAD = expand_load_lr({"load_lr": "ideal_normalized", "load_lr_ema": 0.5}, top_k=2)
ROOTS = {"precondition_frequency": 2, "max_preconditioner_dim": 12, "epsilon": 1e-4}
EXACT = {"matmul_dtype": "float32"}
# group -> optimizer, and the arguments of groups. SOAP is compared by itself below, on the same gradients to the bit:
# a first gradient of low rank leaves part of its basis to round-off.


class Setting(NamedTuple):
    names: dict[str, str]
    arguments: dict[str, dict[str, Any]]
    num_experts: int = 4
    expert_degree: int = 1  # of several ranks
    compiled_by: int = 0  # ranks, that many of them with torch.compile


CASES = [
    Setting(
        {"expert": "shampoo", "dense": "muon"},
        {"expert": ROOTS, "dense": EXACT},
        expert_degree=2,
        compiled_by=2,
    ),
    Setting(
        {"expert": "shampoo_fast", "dense": "shampoo"},
        {"expert": {**ROOTS, **EXACT, "statistics_every": 2, **BY_LOAD}, "dense": ROOTS},
        num_experts=3,  # uneven shards
    ),
    Setting(
        {"expert": "muonh", "dense": "normuon", **dict.fromkeys(("router", "embedding", "norm"), "ademamix")},
        {"expert": {**EXACT, **BY_LOAD}, "dense": {**EXACT, "coefficients": "polar_express"}},
        expert_degree=2,
        compiled_by=2,
    ),
    Setting({"expert": "normuon", "dense": "adamh"}, {"expert": EXACT}, num_experts=3),
    # checkpoints hold the averages, and what was trained beside them
    Setting(dict.fromkeys(("expert", "dense"), "schedule_free_adamw"), {"expert": BY_LOAD}, expert_degree=2),
]
if "distributed_shampoo" in OPTIMIZER_NAMES:  # Meta's package is installed
    meta = dict.fromkeys(("expert", "dense"), "distributed_shampoo")
    CASES.append(Setting(meta, dict.fromkeys(("expert", "dense"), ROOTS), expert_degree=2, compiled_by=2))


def build(number: int, world: int) -> tuple[Any, torch.optim.Optimizer]:
    names, arguments, num_experts, degree, compiled_by = CASES[number]
    model = tiny_model(num_experts=num_experts, num_layers=1, device="meta")
    if world > 1:
        by_inductor = torch.compile  # whose kernels take long to build
        with mock.patch("torch.compile", functools.partial(by_inductor, backend="aot_eager")):
            apply(model, world, layout_of(world, degree), compile_blocks=world == compiled_by)
    model.to_empty(device="cpu")
    model.init_weights(0)
    groups = parameter_groups(model.named_parameters(), arguments)
    chosen = {group["name"]: names.get(group["name"], "adamw") for group in groups}
    return model, combine(groups, chosen, lambda name, own: OPTIMIZERS[name](own, lr=1e-2))


def layout_of(world: int, degree: int) -> str:
    return next(
        name
        for name, degrees in LAYOUTS[world].items()
        if degrees.get("expert", 1) == degree and degrees["shard"] == world
    )


def summarize(model: nn.Module, outputs: list[Any]) -> dict[str, Any]:
    return {
        "loss": torch.stack([o.loss for o in outputs]),
        "parameters": {plain_name(name): full(p) for name, p in model.named_parameters()},
    }


def save(folder: Path, model: Any, optimizer: Any) -> None:
    save_checkpoint(folder, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)


def first_half(rank: int, world: int, folder: Path, number: int) -> dict[str, Any]:
    model, optimizer = build(number, world)
    outputs = train(model, optimizer, range(3), rank, world, 4 // world)
    save(folder / f"{number}-at-{world}", model, optimizer)
    outputs += train(model, optimizer, range(3, 6), rank, world, 4 // world)
    return summarize(model, outputs)


def second_half(rank: int, world: int, folder: Path, number: int, saved_at: int) -> dict[str, Any]:
    model, optimizer = build(number, world)
    load_checkpoint(folder / f"{number}-at-{saved_at}" / "step-3", model=model, optimizer=optimizer)
    return summarize(model, train(model, optimizer, range(3, 6), rank, world, 4 // world))


def four_ranks(rank: int, world: int, folder: Path) -> Any:
    return [first_half(rank, world, folder, number) for number in range(len(CASES))], experts_by_two_axes(rank)


def two_ranks(rank: int, world: int, folder: Path) -> Any:
    resharded = [second_half(rank, world, folder, number, 4) for number in range(len(CASES))]
    return resharded, [first_half(rank, world, folder, number) for number in range(len(CASES))]


class Stack(nn.Module):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.experts = nn.Parameter(weight)

    def forward(self, x: Tensor) -> Tensor:
        local = self.experts.to_local() if isinstance(self.experts, DTensor) else self.experts
        return (local @ x).square().sum()


def stack_steps(name: str, weight: Tensor, model: nn.Module, mine: slice) -> Tensor:
    """Four steps on gradients that are each expert's own; the weights of `mine`, this rank's experts."""
    takes_it = "precondition_frequency" in signature(OPTIMIZERS[name]).parameters
    frequent = {"precondition_frequency": 2} if takes_it else {}
    optimizer = OPTIMIZERS[name]([{"name": "expert", "params": list(model.parameters())}], lr=1e-2, **frequent)
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        gradient = torch.randn(weight.shape, generator=generator)[mine]
        (parameter,) = model.parameters()
        if isinstance(parameter, DTensor):
            gradient = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements, run_check=False)
        parameter.grad = gradient
        optimizer.step()
    for value in optimizer.state[parameter].values():
        if isinstance(parameter, DTensor) and value.dim() > 1:
            assert isinstance(value, DTensor)
            assert value.placements == parameter.placements
    return full(parameter)


def experts_by_two_axes(rank: int) -> dict[str, Tensor]:
    """EP 2, EP 2 x FSDP 2, and an error for a shard that cuts experts; each optimizer, 4 experts of 6 x 5."""
    weight = torch.randn(4, 6, 5, generator=torch.Generator().manual_seed(7))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    efsdp, ep = mesh.get_coordinate() or (0, 0)
    results = {}
    for name in OPTIMIZER_NAMES:
        alone = Stack(weight.clone())
        results[f"{name} alone"] = stack_steps(name, weight, alone, slice(0, 4))
        by_ep = Stack(weight)
        by_ep.experts = nn.Parameter(distribute_tensor(weight, mesh["ep"], [Shard(0)]))
        results[f"{name} ep"] = stack_steps(name, weight, by_ep, slice(2 * ep, 2 * ep + 2))
        both = Stack(weight)
        both.experts = nn.Parameter(distribute_tensor(weight, mesh["ep"], [Shard(0)]))
        fully_shard(both, mesh=mesh["efsdp"])
        results[f"{name} ep fsdp"] = stack_steps(name, weight, both, slice(2 * ep + efsdp, 2 * ep + efsdp + 1))
    cut = nn.Parameter(distribute_tensor(weight, mesh["ep"], [Shard(1)]))
    with pytest.raises(ValueError, match=r"\[optimizer.expert\] name = 'muon' needs whole experts .* degrees ep 2 cut"):
        OPTIMIZERS["muon"]([{"name": "expert", "params": [cut]}])
    return results


def assert_equal(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    torch.testing.assert_close(actual["loss"], expected["loss"][-len(actual["loss"]) :], rtol=1e-5, atol=0)
    # gradients differ by round-off, which Muon's iteration enlarges in directions that hardly matter; steps are of 1e-2
    torch.testing.assert_close(actual["parameters"], expected["parameters"], rtol=0, atol=2e-4)


@pytest.mark.dist
def test_sharded_equals_unsharded() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        alone = [first_half(0, 1, folder, number) for number in range(len(CASES))]
        for results, stacks in run_ranks(4, four_ranks, folder):
            for result, expected in zip(results, alone, strict=True):
                assert_equal(result, expected)
            for optimizer_name in OPTIMIZER_NAMES:
                for layout in ("ep", "ep fsdp"):
                    torch.testing.assert_close(
                        stacks[f"{optimizer_name} {layout}"], stacks[f"{optimizer_name} alone"], rtol=0, atol=1e-6
                    )
        for resharded, results in run_ranks(2, two_ranks, folder):
            for own, result, expected in zip(resharded, results, alone, strict=True):
                assert_equal(own, expected)
                assert_equal(result, expected)
        for number, expected in enumerate(alone):
            assert_equal(second_half(0, 1, folder, number, 4), expected)
