"""A NaN on one rank only: no rank takes the step, and all name the same parameters."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, apply, degrees_of, mesh_of
from tests.tiny import balancers, batch, own_part, tiny_model
from tests.unit.test_nonfinite import CASES as OPTIMIZERS
from tests.unit.test_nonfinite import all_state
from titan_moe.metrics import StepOutput
from titan_moe.runtime.dtensor import local
from titan_moe.step import train_step

CASES = [
    *((layout, "adamw, by load") for layout in LAYOUTS[2]),
    *(("ep2", name) for name in OPTIMIZERS if "torch" not in name),
]


def in_backward(output: Tensor) -> Tensor:
    output.register_hook(lambda gradient: gradient * torch.nan)
    return output


def in_forward(output: Tensor) -> Tensor:
    return output * torch.nan


def local_state(model: Any, optimizer: torch.optim.Optimizer) -> list[Any]:
    weights, states = all_state(model, optimizer)
    return [[local(weight) for weight in weights], [{k: local(v) for k, v in own.items()} for own in states]]


def poisoned_step(rank: int, model: Any, step: Callable[[], StepOutput], poison: Any) -> StepOutput:
    """A step in which rank 1's second micro-batch gets a NaN, if there is a `poison`."""
    calls = []

    def at_the_second_call(module: Any, inputs: Any, output: Any) -> Any:
        calls.append(module)
        return poison(output) if poison and rank == 1 and len(calls) == 2 else output

    handle = model.layers[1].attention.wo.register_forward_hook(at_the_second_call)
    output = step()
    handle.remove()
    return output


def one_rank_poisoned(rank: int, world: int) -> dict[str, Any]:
    """Of each case's steps whether they were skipped, what they named, and whether the loss was finite."""
    results = {}
    for layout, name in CASES:
        model = tiny_model(device="meta", num_kv_heads=2)
        apply(model, world, layout)
        model.to_empty(device="cpu")
        model.init_weights(0)
        optimizer = OPTIMIZERS[name](model)
        own = own_part(batch(0), rank, world, degrees_of(world, layout))
        micro = list(zip(*(part.chunk(2) for part in own), strict=True))
        options = {"max_norm": 0.1, "sequence_group": mesh_of(world, layout).sequence_group}
        step = functools.partial(train_step, model, micro, optimizer, balancers(), model.expert_biases(), **options)
        for number, poison in enumerate((None, in_backward, in_forward, None)):
            before = local_state(model, optimizer)
            output = poisoned_step(rank, model, step, poison)
            text = f"{layout}, {name}, {number}"
            names = output.nonfinite_gradients()
            results[text] = (bool(output.skipped), output.loss.isfinite().item(), names[-1:], len(names) > 1)
            if poison:
                torch.testing.assert_close(local_state(model, optimizer), before, rtol=0, atol=0, msg=text)
    return results


@pytest.mark.dist
def test_a_nan_on_one_rank_only() -> None:
    first, second = run_ranks(2, one_rank_poisoned)
    assert first == second
    nearest_to_the_loss = ["layers.1.attention.wo.weight"], ["norm.weight"]
    want = [
        (False, True, [], False),
        (True, True, nearest_to_the_loss[0], True),
        (True, False, nearest_to_the_loss[1], True),
        (False, True, [], False),
    ]
    assert first == {f"{layout}, {name}, {n}": outcome for layout, name in CASES for n, outcome in enumerate(want)}
