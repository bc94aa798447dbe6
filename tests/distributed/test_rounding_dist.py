"""States in bfloat16 are the same to the bit in every layout, where the gradients are; and they reshard."""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import apply
from tests.distributed.test_fsdp import full
from tests.tiny import tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import combine
from titan_moe.runtime.dtensor import own_part

BY_LOAD = expand_load_lr({"load_lr": "ideal_normalized"}, top_k=2)
LAYOUTS = ["fsdp2", "ep2", "tp2"]
MUON = {"matmul_dtype": "float32"}
# the optimizers of experts and of dense matrices, and the experts' settings
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("adamw", "adamw", {}),
    ("adamw", "adamw", BY_LOAD),
    ("muon", "muon", MUON),
    ("soap", "adamw", BY_LOAD),
]


def build(case: int, world: int, layout: str = "") -> tuple[Any, torch.optim.Optimizer]:
    experts, dense, settings = CASES[case]
    model = tiny_model(num_layers=1, device="meta")
    if world > 1:
        apply(model, world, layout)
    model.to_empty(device="cpu")
    model.init_weights(0)
    arguments = {"expert": settings, "dense": MUON if dense == "muon" else {}}
    groups = parameter_groups(model.named_parameters(), arguments)
    names = {group["name"]: {"expert": experts, "dense": dense}.get(group["name"], "adamw") for group in groups}
    return model, combine(groups, names, lambda name, own: OPTIMIZERS[name](own, lr=1e-2, state_dtype="bfloat16"))


def update(model: nn.Module, optimizer: Any, steps: range) -> dict[str, Tensor]:
    """Steps on gradients that depend on the step and the parameter's name alone; weights and states, whole."""
    for step in steps:
        for number, (_, parameter) in enumerate(model.named_parameters()):
            random = torch.Generator().manual_seed(100 * step + number)
            gradient: Any = torch.randn(parameter.shape, generator=random)
            if isinstance(parameter, DTensor):
                mesh, placements = parameter.device_mesh, parameter.placements
                part = own_part(gradient, parameter).contiguous()
                gradient = DTensor.from_local(
                    part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride()
                )
            parameter.grad = gradient
        optimizer.step(load=torch.tensor([[3, 0, 2, step]]), finite=torch.tensor(True))
    result = {}
    for name, parameter in model.named_parameters():
        states = {
            key: full(value) for key, value in optimizer.state[parameter].items() if value.dim() and is_here(value)
        }
        result |= {plain_name(name): full(parameter)}
        result |= {f"{plain_name(name)}.{key}": value for key, value in states.items()}
    return result


def is_here(value: Tensor) -> bool:
    """Whether this rank has a part: the state of a dense matrix of Muon is its owner's."""
    return not isinstance(value, DTensor) or value.device_mesh.get_coordinate() is not None


def save(folder: Path, model: Any, optimizer: Any) -> None:
    save_checkpoint(folder, 2, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)


def of_layouts(rank: int, world: int, folder: Path) -> dict[Any, dict[str, Tensor]]:
    results = {}
    for case in range(len(CASES)):
        for layout in LAYOUTS:
            model, optimizer = build(case, world, layout)
            update(model, optimizer, range(2))
            save(folder / f"{case}-{layout}", model, optimizer)
            results[case, layout] = update(model, optimizer, range(2, 4))
    return results


@pytest.mark.dist
def test_every_layout_rounds_alike_and_reshards() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for results in run_ranks(2, of_layouts, folder):
            for case in range(len(CASES)):
                model, optimizer = build(case, 1)
                expected = update(model, optimizer, range(4))
                assert sum(value.dtype == torch.bfloat16 for value in expected.values()) > 10
                for layout in LAYOUTS:
                    same(results[case, layout], expected)

                    # saved by two, loaded by one
                    again, resumed = build(case, 1)
                    load_checkpoint(folder / f"{case}-{layout}" / "step-2", model=again, optimizer=resumed)
                    same(update(again, resumed, range(2, 4)), expected)


def same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() <= expected.keys()
    for key, value in actual.items():
        assert value.dtype == expected[key].dtype, key
        assert torch.equal(value, expected[key]), key
