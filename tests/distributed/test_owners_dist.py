"""Sharded matrices are updated by their owners as one process updates them, to the bit, and resume anywhere."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.distributed.harness import run_ranks
from titan_moe.checkpoint import load_checkpoint
from titan_moe.checkpoint.background import background_saver
from titan_moe.optimizer.build import optimizer_of
from titan_moe.optimizer.muon import muon
from titan_moe.optimizer.normuon import normuon
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.optimizer.shampoo import shampoo
from titan_moe.optimizer.soap import soap
from titan_moe.optimizer.transform import State, Tick, Transform
from titan_moe.runtime.dtensor import gathered, local, own_part

SHAPES = ((8, 6), (4, 10), (12, 12), (2, 4), (6, 2), (8, 6))  # tensor parallelism halves them, FSDP2 unevenly
STEPS = 6


def toward_weight() -> Transform:
    """A direction that depends on the weight."""

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        state["sum"].add_(gradient)
        return state["sum"] * tick.weight().norm() + tick.weight()

    return Transform(lambda weight: {"sum": torch.zeros_like(weight)}, update)


def on_sphere() -> Transform:
    """Plain descent that keeps the norm that a matrix had first."""

    def init(weight: Tensor) -> State:
        return {"radius": weight.new_zeros(len(weight), 1, 1)}

    def update(gradient: Tensor, state: State, tick: Tick) -> Tensor:
        if tick.step == 1:
            state["radius"].copy_(torch.linalg.matrix_norm(tick.weight(), keepdim=True))
        return gradient.clone()

    def retract(weight: Tensor, state: State, tick: Tick) -> None:
        weight.mul_(state["radius"] / torch.linalg.matrix_norm(weight, keepdim=True))

    return Transform(init, update, retract=retract)


# optimizer -> what makes it, and the group's own arguments
RULES: dict[str, tuple[Callable[..., Transform], dict[str, Any]]] = {
    "muon": (muon, {"matmul_dtype": "float32"}),
    "normuon": (normuon, {"matmul_dtype": "float32"}),
    "shampoo": (shampoo, {"precondition_frequency": 2, "max_preconditioner_dim": 8}),
    "soap": (soap, {"precondition_frequency": 2}),
    "toward_weight": (toward_weight, {}),
    "on_sphere": (on_sphere, {}),
}


class Matrices(nn.Module):
    """Some matrices."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weights = nn.ParameterList(torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES)


def by_fsdp(mesh: DeviceMesh, dtype: torch.dtype = torch.float32) -> Matrices:
    model = Matrices(dtype)
    fully_shard(model, mesh=mesh)
    return model


def by_placements(mesh: DeviceMesh, *placements: Any) -> Matrices:
    model = Matrices()
    for index, weight in enumerate(model.weights):
        model.weights[index] = nn.Parameter(distribute_tensor(weight.detach(), mesh, placements, src_data_rank=None))
    return model


def by_fsdp_and_tp(mesh: DeviceMesh, dim: int) -> Matrices:
    model = by_placements(mesh["tp"], Shard(dim))
    fully_shard(model, mesh=mesh["fsdp"])
    return model


def build(model: nn.Module, name: str) -> Optimizer:
    make, arguments = RULES[name]
    group = {"name": "dense", "params": list(model.parameters()), **arguments}
    return optimizer_of(make, name)([group], lr=3e-2)


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    """Steps on gradients of which each rank takes its part; one is clipped, one is refused, one has gaps."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for index, parameter in enumerate(model.parameters()):
            gradient = own_part(torch.randn(parameter.shape, generator=generator), parameter).to(parameter.dtype)
            if isinstance(parameter, DTensor):
                layout = {"shape": parameter.shape, "stride": parameter.stride(), "run_check": False}
                gradient = DTensor.from_local(gradient, parameter.device_mesh, parameter.placements, **layout)
            parameter.grad = None if step == 2 and index in (1, 2) else gradient
        if step == 3:
            optimizer.step(finite=torch.tensor(False))
        optimizer.step(grad_norm=torch.tensor(5.0), max_norm=1.0 if step == 1 else 0.0)


def weights(model: nn.Module) -> list[Tensor]:
    return [gathered(parameter).detach().clone() for parameter in model.parameters()]


def alone(name: str, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    model = Matrices(dtype)
    train(model, build(model, name), range(STEPS))
    return weights(model)


def check_states(model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Elements of the states of matrices that this rank has, by parameter and state; all of one, or none."""
    held = {}
    for index, parameter in enumerate(model.parameters()):
        for name, value in optimizer.state[parameter].items():
            if name in ("clock", "step"):
                continue
            assert isinstance(value, DTensor)
            assert local(value).numel() in (0, value.numel())
            held[f"{index}.{name}"] = local(value).numel()
    return held


def run(models: dict[str, Callable[[], Matrices]]) -> dict[str, Any]:
    results = {}
    for layout, sharded in models.items():
        for name in RULES:
            model = sharded()
            optimizer = build(model, name)
            train(model, optimizer, range(STEPS))
            results[layout, name] = weights(model), check_states(model, optimizer)
    return results


def on_two(rank: int, world: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    return run(
        {
            "fsdp2": lambda: by_fsdp(mesh),
            "fsdp2 in bfloat16": lambda: by_fsdp(mesh, torch.bfloat16),
            "tp2 columns": lambda: by_placements(mesh, Shard(0)),
            "tp2 rows": lambda: by_placements(mesh, Shard(1)),
            "replicas": lambda: by_placements(mesh, Replicate()),
        }
    )


def on_four(rank: int, world: int) -> dict[str, Any]:
    hsdp = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp_replicate", "dp_shard"))
    parts = init_device_mesh("cpu", (2, 2), mesh_dim_names=("fsdp", "tp"))
    stages = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "dp_replicate", "dp_shard"))
    models: dict[str, Callable[[], Matrices]] = {
        "fsdp4": lambda: by_fsdp(init_device_mesh("cpu", (4,))),
        "hsdp2x2": lambda: by_fsdp(hsdp),
        "fsdp2 tp2 columns": lambda: by_fsdp_and_tp(parts, 0),
        "fsdp2 tp2 rows": lambda: by_fsdp_and_tp(parts, 1),
        "two stages": lambda: by_fsdp(stages["dp_replicate", "dp_shard"]),  # not of all ranks
    }
    three = DeviceMesh("cpu", [0, 1, 2])
    if rank < 3:
        models["fsdp3"] = lambda: by_fsdp(three)  # uneven
    return run(models)


def check(results: list[dict[str, Any]], ranks_of: dict[str, list[list[int]]]) -> None:
    types = torch.float32, torch.bfloat16
    expected = {(name, dtype): alone(name, dtype) for name in RULES for dtype in types}
    for result in results:
        for (layout, name), (own, _) in result.items():
            one_process = expected[name, own[0].dtype]
            torch.testing.assert_close(own, one_process, rtol=0, atol=0, msg=lambda t, at=(layout, name): f"{at}: {t}")

    # each state is on one rank of those that hold parts of its matrix, and several ranks own something
    for layout, groups in ranks_of.items():
        for group in groups:
            held = [results[rank][layout, "soap"][1] for rank in group]
            for name in held[0]:
                assert sum(states[name] > 0 for states in held) == 1, (layout, name)
            assert all(any(states.values()) for states in held)


@pytest.mark.dist
def test_owners_update_as_one_process_does() -> None:
    check(run_ranks(2, on_two), {name: [[0, 1]] for name in ("fsdp2", "fsdp2 in bfloat16", "tp2 rows", "replicas")})
    everyone = {name: [[0, 1, 2, 3]] for name in ("fsdp4", "hsdp2x2", "fsdp2 tp2 columns", "fsdp2 tp2 rows")}
    check(run_ranks(4, on_four), {**everyone, "two stages": [[0, 1], [2, 3]]})


def resumed(rank: int, world: int, folder: Path, saved_at: int, steps: range) -> list[list[Tensor]]:
    """Train on from what another number of ranks has saved (0: from the start), and save, in a thread if there are."""
    results = []
    for name in RULES:
        model = by_fsdp(init_device_mesh("cpu", (world,))) if world > 1 else Matrices()
        optimizer = build(model, name)
        if saved_at:
            load_checkpoint(folder / name / f"step-{steps.start}", model=model, optimizer=optimizer)
            if world > 1:
                check_states(model, optimizer)
        train(model, optimizer, steps)
        saver, content = background_saver(), {"extra": {}, "files": {}, "keep_latest_k": 0}
        saver.save(folder / name, steps.stop, model=model, optimizer=optimizer, wait=world == 1, **content)
        saver.finish()
        assert not saver.failed()
        results.append(weights(model))
    return results


@pytest.mark.dist
def test_states_of_owners_are_resumed_by_any_number_of_ranks() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_ranks(2, resumed, folder, 0, range(2))
        resumed(0, 1, folder, 2, range(2, 4))
        for results in run_ranks(4, resumed, folder, 1, range(4, STEPS)):
            for own, rule in zip(results, RULES, strict=True):
                torch.testing.assert_close(own, alone(rule), rtol=0, atol=0, msg=lambda t, at=rule: f"{at}: {t}")
