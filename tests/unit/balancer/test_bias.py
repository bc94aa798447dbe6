"""Rules that move the bias: each is its formula, worked in float64, over several steps."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.models import configure
from tests.unit.balancer.states import after_a_restart, whole_run
from titan_moe.balancer import BALANCERS
from titan_moe.dry_run import check_parts

LOADS = torch.tensor([[[10, 2, 6, 6], [0, 0, 0, 24]], [[9, 3, 6, 6], [24, 0, 0, 0]], [[4, 6, 8, 6], [6, 6, 6, 6]]])


def bias_after(name: str, loads: Tensor = LOADS, **arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """The bias (L, E) and the state that a balancer has after these steps' loads (steps, L, E)."""
    balancer = BALANCERS[name](**arguments)
    assert balancer.init is not None
    L, E = loads.shape[1:]
    bias, state = torch.zeros(L, E), {key: value.expand(L, -1) for key, value in balancer.init(E).items()}
    for step, load in enumerate(loads, start=1):
        bias, state = balancer.after_step(load, bias, state, step=step, progress=0.0)
    return bias, dict(state)


def test_smebu_is_its_formula() -> None:
    """With the names of Trinity's report: v, s, d, m, b of one expert after the other."""
    lam, kappa, beta = 0.5, 2.0, 0.75
    bias, state = bias_after("smebu", rate=lam, kappa=kappa, momentum=beta)
    for layer in range(2):
        m, b = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
        for n in LOADS[:, layer].double():
            v = (n.mean() - n) / n.mean()
            d = lam * torch.tanh(kappa * v)
            d = d - d.mean()
            m = beta * m + (1 - beta) * d
            b = b + m
        torch.testing.assert_close(bias[layer].double(), b, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(lam * state["momentum"][layer].double(), m, rtol=1e-6, atol=1e-7)


def test_smebu_begins_as_published() -> None:
    published = {"rate": 5e-4, "kappa": 2.0, "momentum": 0.5}
    assert torch.equal(bias_after("smebu")[0], bias_after("smebu", **published)[0])


def test_pid_is_longcats_formula_in_its_proportional_part() -> None:
    """db_i = mu (K_e/K 1/N - T_i/(K T)) for the N experts that compute, 0 for those that do not."""
    mu, K_e, K, N, Z = 0.3, 1.5, 2, 3, 1
    rate = mu * (K_e / K) / N
    post_step = BALANCERS["pid"](rate=rate, integral=0.0, real_share=K_e / K).post_step
    bias, state = torch.zeros(2, N + Z), {"sum": torch.zeros(2, N + Z), "error": torch.zeros(2, N + Z)}
    for load in LOADS:
        bias, state = post_step(load, bias, state, num_identity_experts=Z)
    expected = torch.zeros(2, N + Z, dtype=torch.float64)
    for load in LOADS.double():
        T = load.sum(-1, keepdim=True) / K
        expected[:, :N] += mu * (K_e / K / N - load[:, :N] / (K * T))
    torch.testing.assert_close(bias.double(), expected, rtol=1e-6, atol=1e-7)
    assert not bias[:, N:].any()


def test_pid_is_a_discrete_pid_controller() -> None:
    """u(n) = K_p e(n) + K_i sum_m e(m) + K_d (e(n) - e(n - 1)), and the bias moves by u."""
    rate, integral, derivative = 0.2, 0.25, 0.5
    bias, _ = bias_after("pid", rate=rate, integral=integral, derivative=derivative)
    errors = [1 - load / load.mean(-1, keepdim=True) for load in LOADS.double()]
    expected = torch.zeros(2, 4, dtype=torch.float64)
    for n, e in enumerate(errors):
        before = errors[n - 1] if n else torch.zeros_like(e)
        total = torch.stack(errors[: n + 1]).sum(0)
        expected += rate * e + rate * integral * total + rate * derivative * (e - before)
    torch.testing.assert_close(bias.double(), expected, rtol=1e-6, atol=1e-7)


def test_pid_without_its_other_parts_is_the_proportional_rule() -> None:
    bias, _ = bias_after("pid", rate=0.3, integral=0.0)
    rule = BALANCERS["loss_free"](rate=0.3, rule="proportional")
    other = torch.zeros(2, 4)
    for load in LOADS:
        other = rule.post_step(load, other)
    torch.testing.assert_close(bias, other)


@pytest.mark.parametrize("name", ["smebu", "pid"])
def test_no_token_moves_nothing(name: str) -> None:
    """As of a layer that is not reached: no division by 0."""
    bias, _ = bias_after(name, torch.zeros(2, 2, 4, dtype=torch.int64))
    assert bias.isfinite().all()


@pytest.mark.parametrize("name", [name for name, builder in BALANCERS.items() if builder().init is not None])
def test_a_run_that_stops_in_the_middle_is_the_whole_run(name: str, tmp_path: Any) -> None:
    """To the bit, with the state from the checkpoint."""
    whole, again = whole_run(name), after_a_restart(name, tmp_path)
    for a, b in zip(whole, again, strict=True):
        assert torch.equal(a, b)
    assert all(tensor.any() for tensor in whole)


BAD = [
    ({"balancer.smebu.kappa": 0.0}, "balancer.smebu.kappa = 0.0: must be greater than 0"),
    ({"balancer.smebu.momentum": 1.0}, "balancer.smebu.momentum = 1.0: must be less than 1"),
    ({"balancer.pid.integral": -0.1}, "balancer.pid.integral = -0.1: must be greater than or equal to 0"),
    ({"balancer.pid.real_share": 1.5}, "balancer.pid.real_share = 1.5: must be"),
    ({"balancer.pid.real_share": 0.5}, r"balancer.pid.real_share \(0.5\) must be 1 without identity experts"),
    ({"balancer.smebu.rate": 0.1, "router.name": "expert_choice"}, "expert_choice"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_arguments_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_parts(configure(**{"moe.num_experts": 4, **words}))
