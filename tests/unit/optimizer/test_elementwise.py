"""Optimizers that treat each element by itself: against their definitions, and what their kernel does for all."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import OPTIMIZER_NAMES
from titan_moe.optimizer import kernels
from titan_moe.optimizer.ademamix import ademamix, warmed
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS, optimizer_of
from titan_moe.optimizer.lion import lion
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import describe_group
from titan_moe.optimizer.transform import Tick, Transform

MADE = {"lion": lion, "ademamix": ademamix}  # of a formula; AdamW's kernel is torch's


def lion_loop(weight: Tensor, gradients: list[Tensor], lr: float, decay: float, b1: float, b2: float) -> Tensor:
    """Chen et al. (2023), algorithm 2, in float64."""
    weight, m = weight.double(), torch.zeros_like(weight).double()
    for g in (gradient.double() for gradient in gradients):
        weight = weight * (1 - lr * decay) - lr * (b1 * m + (1 - b1) * g).sign()
        m = b2 * m + (1 - b2) * g
    return weight


def ademamix_loop(
    weight: Tensor, gradients: list[Tensor], lr: float, decay: float, warmups: tuple[int, int], alpha: float = 8.0
) -> Tensor:
    """Pagliardini et al. (2024), algorithm 1 with its two schedules as in the authors' code, in float64."""
    b1, b2, b3 = 0.9, 0.999, 0.9999
    weight, m1 = weight.double(), torch.zeros_like(weight).double()
    m2, v = m1.clone(), m1.clone()
    for t, g in enumerate((gradient.double() for gradient in gradients), 1):
        part = [min(1.0, t / warmup) if warmup else 1.0 for warmup in warmups]
        half_lives = [math.log(0.5) / math.log(b) - 1 for b in (b1, b3)]
        beta = 0.5 ** (1 / ((1 - part[1]) * half_lives[0] + part[1] * half_lives[1] + 1))
        m1 = b1 * m1 + (1 - b1) * g
        m2 = beta * m2 + (1 - beta) * g
        v = b2 * v + (1 - b2) * g**2
        mixed = m1 / (1 - b1**t) + part[0] * alpha * m2
        weight = weight - lr * (mixed / ((v / (1 - b2**t)).sqrt() + 1e-8) + decay * weight)
    return weight


LOOPS: dict[str, Any] = {
    "lion": ("lion", lion_loop, {"b1": 0.9, "b2": 0.99}, {}),
    "ademamix": ("ademamix", ademamix_loop, {"warmups": (0, 0)}, {}),
    "ademamix, over 10 steps": (
        *("ademamix", ademamix_loop, {"warmups": (10, 10), "alpha": 5.0}),
        {"alpha": 5.0, "alpha_warmup": 10, "beta3_warmup": 10},
    ),
    "ademamix, over more steps": (
        *("ademamix", ademamix_loop, {"warmups": (30, 45)}),
        {"alpha_warmup": 30, "beta3_warmup": 45},
    ),
}


@pytest.mark.parametrize("case", LOOPS)
def test_equals_the_plain_loop(case: str) -> None:
    """A stack of experts, a matrix, a vector and a scalar."""
    name, loop, arguments, own = LOOPS[case]
    starts = [torch.randn(shape) for shape in ((3, 6, 4), (5, 7), (9,), ())]
    weights = [nn.Parameter(start.clone()) for start in starts]
    optimizer = OPTIMIZERS[name]([{"name": "expert", "params": weights}], lr=1e-2, weight_decay=0.1, **own)
    steps = [[torch.randn_like(start) for start in starts] for _ in range(20)]
    for gradients in steps:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient.clone()
        optimizer.step()
    for weight, start, gradients in zip(weights, starts, zip(*steps, strict=True), strict=True):
        expected = loop(start, gradients, lr=1e-2, decay=0.1, **arguments)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


def stepped(name: str, weights: list[Tensor], finite: list[bool] | None = None, max_norm: float = 0.0) -> Any:
    """Copies of weights after three steps and the optimizer's states; `finite` tells of each step."""
    parameters = [nn.Parameter(weight.clone(memory_format=torch.preserve_format)) for weight in weights]
    optimizer = OPTIMIZERS[name]([{"name": "dense", "params": parameters}], lr=1e-2, weight_decay=0.1)
    number = 0
    for is_finite in finite or [True] * 3:
        for index, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(10 * number + index)
            gradient = torch.randn(p.shape, generator=generator).bfloat16().to(p.dtype)
            p.grad = torch.empty_like(p).copy_(gradient) if is_finite else torch.full_like(p, torch.nan)
        norm = torch.tensor(4.0 if is_finite else torch.nan)
        optimizer.step(grad_norm=norm, max_norm=max_norm) if max_norm else optimizer.step(finite=norm.isfinite())
        number += is_finite
    return [p.detach() for p in parameters], [dict(optimizer.state[p]) for p in parameters]


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("elements", [1, 7, 24, 1000])
def test_however_many_elements_at_a_time(name: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = [torch.randn(shape) for shape in ((3, 6, 4), (5, 7), (9,), (), (0, 4), (8, 3))]
    weights.append(torch.randn(4, 6).mT)
    whole = stepped(name, weights)
    monkeypatch.setattr(kernels, "CPU_ELEMENTS", elements)
    largest = max(
        sum(tensor.numel() for tensor in part[0]) for part, _ in kernels.chunks([weights], [torch.ones(())] * 7)
    )
    assert largest <= max(elements, 1)
    torch.testing.assert_close(stepped(name, weights), whole, rtol=0, atol=0)


@pytest.mark.parametrize("name", MADE)
def test_steps_that_are_not_finite_leave_no_trace(name: str) -> None:
    """Also the first one; weights, states and counts are those of a run without them."""
    weights = [torch.randn(3, 4), torch.randn(5).bfloat16()]
    with_bad = stepped(name, weights, [False, True, True, False, True])
    torch.testing.assert_close(with_bad, stepped(name, weights), rtol=0, atol=0)


@pytest.mark.parametrize("name", MADE)
def test_gradients_are_clipped(name: str) -> None:
    """To a quarter, in fp32 and in bf16: as gradients that are so small, which a power of two does not round."""
    weights = [torch.randn(3, 4), torch.randn(5).bfloat16()]
    clipped, states = stepped(name, weights, max_norm=1.0)
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    optimizer = OPTIMIZERS[name]([{"name": "dense", "params": parameters}], lr=1e-2, weight_decay=0.1)
    for number in range(3):
        for index, p in enumerate(parameters):
            generator = torch.Generator().manual_seed(10 * number + index)
            p.grad = (torch.randn(p.shape, generator=generator).bfloat16() / 4).to(p.dtype)
        optimizer.step()
    for p, state, ours in zip(parameters, states, clipped, strict=True):
        torch.testing.assert_close(ours, p.detach(), rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(state, dict(optimizer.state[p]), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MADE)
def test_bf16_weights_are_rounded_once(name: str) -> None:
    """After one step: the fp32 result, rounded."""
    start = torch.randn(50).bfloat16()
    exact, rounded = nn.Parameter(start.float()), nn.Parameter(start.clone())
    for p in (exact, rounded):
        p.grad = torch.linspace(-1, 1, 50).bfloat16().to(p.dtype)
        OPTIMIZERS[name]([{"name": "dense", "params": [p]}], lr=0.3, weight_decay=0.1).step()
    assert torch.equal(rounded, exact.bfloat16())


@pytest.mark.parametrize("name", MADE)
def test_the_direction_is_that_of_the_kernel(name: str) -> None:
    """For a transform around it: rows with counts of their own, of which one is not alive."""
    transform, gradient = MADE[name](), torch.randn(3, 4, 5)
    state = transform.init(gradient)
    for value in state.values():
        value.copy_(torch.rand(3, 4, 5))
    before, steps, alive = copy.deepcopy(state), torch.tensor([3.0, 5.0, 2.0]), torch.tensor([True, True, False])
    tick = Tick(step=5, steps=steps, spare=torch.empty_like, weight=lambda: gradient, alive=alive)
    direction = transform.update(gradient, state, tick)

    assert transform.kernel is not None
    for row in range(2):
        weight = torch.zeros(4, 5)
        states = [before[key][row].clone() for key in transform.kernel.states]
        lists = [[weight], [gradient[row].clone()], *([value] for value in states)]
        transform.kernel.step(lists, [steps[row]], -1.0, 0.0)
        torch.testing.assert_close(direction[row], weight)
        torch.testing.assert_close([state[key][row] for key in transform.kernel.states], states)
    assert all(torch.equal(state[key][2], before[key][2]) for key in state)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_what_takes_parameters_of_any_shape(name: str) -> None:
    optimizer = OPTIMIZERS[name]([{"name": "norm", "params": [nn.Parameter(torch.ones(3))]}])
    takes_it = describe_group(optimizer, optimizer.param_groups[0]) in ("AdamW", name)
    assert takes_it == (name in BY_ELEMENT)


def test_lion_stands_still_without_gradient_and_momentum() -> None:
    """And an expert that loses its tokens goes on in full steps, unless `load_lr` tells of it."""
    for by_load in ({}, {"layers": [0], **expand_load_lr({"load_lr": "ideal_normalized"}, top_k=1)}):
        weight = nn.Parameter(torch.zeros(2, 3, 4))
        optimizer = OPTIMIZERS["lion"]([{"name": "expert", "params": [weight], **by_load}], lr=0.5, weight_decay=0.0)
        for tokens in ([1, 0], [0, 0], [0, 1]):
            weight.grad = torch.tensor(tokens).view(2, 1, 1).expand(2, 3, 4).float()
            optimizer.step(load=torch.tensor([tokens]))
        moved = [-1.0, -1.0] if by_load else [-1.5, -0.5]
        assert weight[:, 0, 0].tolist() == moved


def test_the_half_life_grows_evenly() -> None:
    betas = warmed(0.9, 0.9999, torch.tensor([0.0, 500.0, 1000.0, 2000.0]).double(), 1000)
    lives = betas.log().reciprocal() * math.log(0.5)
    expected = [math.log(0.5) / math.log(beta) for beta in (0.9, 0.9999)]
    assert lives.tolist() == pytest.approx([expected[0], sum(expected) / 2, expected[1], expected[1]], rel=1e-3)


FORMULAS: dict[str, Any] = {
    "no states": lambda gradients, states, steps: gradients,
    "too few directions": lambda gradients, states, steps: (gradients[:1], states),
    "a tensor for the list of them": lambda gradients, states, steps: (gradients, [states[0][:1]]),
    "a state more": lambda gradients, states, steps: (gradients, [*states, *states]),
}


@pytest.mark.parametrize("formula", FORMULAS.values(), ids=FORMULAS)
def test_a_formula_that_gives_something_else_is_named(formula: Any) -> None:
    parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
    make = optimizer_of(lambda: kernels.elementwise(("mean",), formula), "mine")
    optimizer = make([{"params": parameters}])
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(ValueError, match=r"<lambda> must return \(directions, new_states\): 2 directions.* 1 lists"):
        optimizer.step()


def test_a_direction_of_another_shape_is_named() -> None:
    """It would be broadcast: every expert would move as the first one."""
    weight = nn.Parameter(torch.ones(3, 2, 2))
    make = optimizer_of(lambda: Transform(lambda weight: {}, lambda gradient, state, tick: gradient[0]), "first")
    optimizer = make([{"params": [weight], "name": "expert"}])
    weight.grad = torch.ones_like(weight)
    with pytest.raises(ValueError, match=r"<lambda> must return a direction .* \(3, 2, 2\), gave \(2, 2\)"):
        optimizer.step()
