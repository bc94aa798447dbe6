"""Schedule-free AdamW against its authors' package, and the average that evaluation and checkpoints take."""

import contextlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import balancers, batch, tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.checkpoint.lazy import read_lazily
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.optimizer import Optimizer, averaged_weights
from titan_moe.step import train_step


def one_parameter(weight: Tensor, **arguments: Any) -> tuple[nn.Parameter, Optimizer]:
    parameter = nn.Parameter(weight.clone())
    groups = [{"name": "expert", "params": [parameter]}]
    return parameter, OPTIMIZERS["schedule_free_adamw"](groups, lr=1e-2, weight_decay=0.1, **arguments)


@pytest.mark.parametrize("arguments", [{}, {"weight_lr_power": 1.0, "r": 2.0}, {"beta1": 0.98, "beta2": 0.999}])
def test_equals_its_authors_package(arguments: dict[str, float]) -> None:
    """20 steps with a warmup of 7, which is the package's own there and [lr_scheduler]'s here."""
    schedulefree = pytest.importorskip("schedulefree")
    torch.manual_seed(0)
    first = torch.randn(3, 6, 4)
    weight, optimizer = one_parameter(first, **arguments)
    other = nn.Parameter(first.clone())
    betas = arguments.get("beta1", 0.9), arguments.get("beta2", 0.95)
    shares = {key: value for key, value in arguments.items() if not key.startswith("beta")}
    reference = schedulefree.AdamWScheduleFreeReference(
        [other], lr=1e-2, betas=betas, weight_decay=0.1, warmup_steps=7, **shares
    )
    reference.train()
    for step in range(20):
        weight.grad = torch.randn(3, 6, 4)
        other.grad = weight.grad.clone()
        optimizer.param_groups[0]["lr"] = 1e-2 * min(1, (step + 1) / 7)
        optimizer.step()
        reference.step()
    torch.testing.assert_close(weight, other, rtol=0, atol=1e-5)

    reference.eval()
    ((averaged, average),) = averaged_weights(optimizer)
    assert averaged is weight
    torch.testing.assert_close(average, other.detach(), rtol=0, atol=1e-5)
    assert (average - weight).abs().max() > 1e-3


def test_the_average_is_the_mean_of_z_at_a_constant_rate() -> None:
    """x after n steps, in float64 by its definition."""
    torch.manual_seed(0)
    weight, optimizer = one_parameter(torch.randn(5))
    points = []
    for _ in range(8):
        weight.grad = torch.randn(5)
        optimizer.step()
        points.append(optimizer.state[weight]["z"].double())
    ((_, average),) = averaged_weights(optimizer)
    torch.testing.assert_close(average.double(), torch.stack(points).mean(0), rtol=0, atol=1e-5)


def test_evaluation_sees_the_average_and_training_goes_on_to_the_bit() -> None:
    torch.manual_seed(0)
    weight, optimizer = one_parameter(torch.randn(4, 3))
    with optimizer.evaluating():
        pass  # no step yet: nothing is averaged
    weight.grad = torch.randn(4, 3)
    for _ in range(3):
        optimizer.step()
    trained, ((_, average),) = weight.detach().clone(), averaged_weights(optimizer)
    with contextlib.suppress(RuntimeError), optimizer.evaluating():
        assert torch.equal(weight, average)
        raise RuntimeError("evaluation failed")
    assert torch.equal(weight, trained)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for size in (1 << 16, 7):
        monkeypatch.setattr("titan_moe.optimizer.kernels.CPU_ELEMENTS", size)
        torch.manual_seed(0)
        weight, optimizer = one_parameter(torch.randn(3, 6, 4))
        for _ in range(3):
            weight.grad = torch.randn(3, 6, 4)
            optimizer.step()
        results.append(weight.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-7)


def build(model: Any, **names: str) -> Optimizer:
    """schedule_free_adamw for all groups."""
    return OPTIMIZERS["schedule_free_adamw"](parameter_groups(model.named_parameters(), {}), lr=1e-2)


def train(model: Any, optimizer: Optimizer, steps: range) -> None:
    for number in steps:
        train_step(model, [batch(number)], optimizer, balancers(), model.expert_biases(), max_norm=1.0)


def test_a_checkpoint_holds_the_average_and_resumes_to_the_bit(tmp_path: Path) -> None:
    """`model.NAME` is what `load_model` and exports read; a run goes on from the weights that were trained."""
    model = tiny_model()
    model.init_weights(0)
    optimizer = build(model)
    save_checkpoint(tmp_path, 0, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    train(model, optimizer, range(3))
    save_checkpoint(tmp_path, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    saved = read_lazily(tmp_path / "step-3")
    names = {parameter: name for name, parameter in model.named_parameters()}
    averages = {names[parameter]: average for parameter, average in averaged_weights(optimizer)}
    assert averages.keys() == set(names.values())
    for name, average in averages.items():
        assert torch.equal(saved[f"model.{name}"].load(), average), name

    # the model alone has the average, with the optimizer what was trained
    alone, again = tiny_model(), tiny_model()
    load_checkpoint(tmp_path / "step-3", model=alone)
    assert all(torch.equal(parameter, averages[name]) for name, parameter in alone.named_parameters())
    fresh = build(again)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=fresh)
    train(model, optimizer, range(3, 6))
    train(again, fresh, range(3, 6))
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
        assert optimizer.state[one].keys() == fresh.state[other].keys()

    # before the first step there is no average
    load_checkpoint(tmp_path / "step-0", model=again, optimizer=build(again))
    train(again, build(again), range(1))


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer.beta1 = 0.0: .* must be above 0"):
        one_parameter(torch.zeros(3), beta1=0.0)
    with pytest.raises(ValueError, match=r"schedule_free_adamw averages weights .* training.dtype = 'float32'"):
        one_parameter(torch.zeros(3, dtype=torch.bfloat16))
    group = {"name": "expert", "params": [nn.Parameter(torch.zeros(2, 3, 4))], "load_lr_decay": False}
    with pytest.raises(ValueError, match="does not go with load_lr_decay = false"):
        OPTIMIZERS["schedule_free_adamw"]([group])
