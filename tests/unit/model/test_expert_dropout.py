"""Dropout inside experts: its formula, when it acts, and that the numbers are those of the step."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import Case
from tests.interop.models import configure
from tests.invariance import assert_same, fresh, outcome
from tests.tiny import batch, tiny_model
from titan_moe.model.moe import expert_swiglu, swiglu_of_both
from titan_moe.parallelize.parallelize import parallelize

RATE = 0.4  # Switch's, in fine-tuning
COUNTS = torch.tensor([5, 0, 9])


def as_on_a_gpu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, counts: Tensor, *, dropout: float) -> Tensor:
    return swiglu_of_both(x, w1, w2, w3, counts.cumsum(0, dtype=torch.int32), "high", dropout)


@pytest.mark.parametrize("ours", [expert_swiglu, as_on_a_gpu])
def test_it_is_its_formula(ours: Any) -> None:
    """w2 (m * silu(w1 x) * (w3 x)) / (1 - p), m of zeros and ones, with every gradient; worked in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(14, 16), (3, 24, 16), (3, 16, 24), (3, 24, 16)]
    inputs = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    torch.manual_seed(3)
    mask_NF = F.dropout(torch.ones(14, 24), RATE) > 0  # what the generator draws
    assert 0 < mask_NF.sum() < mask_NF.numel()
    torch.manual_seed(3)
    y = ours(*inputs, COUNTS, dropout=RATE)

    exact = [one.detach().double().requires_grad_() for one in inputs]
    x, w1, w2, w3 = exact
    rows = x.split(COUNTS.tolist())
    hidden = torch.cat([F.silu(x_e @ w1[e].T) * (x_e @ w3[e].T) for e, x_e in enumerate(rows)])
    dropped = (hidden * mask_NF / (1 - RATE)).split(COUNTS.tolist())
    want = torch.cat([h_e @ w2[e].T for e, h_e in enumerate(dropped)])
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-4)
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    gradients = torch.autograd.grad(y, inputs, weights), torch.autograd.grad(want, exact, weights.double())
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)


def test_evaluation_is_without_and_zero_draws_nothing() -> None:
    tokens, labels = batch(0)
    plain, dropping = tiny_model(), tiny_model(expert_dropout=RATE)
    for model in (plain, dropping):
        model.init_weights(0)
        for moe in model.moe_layers():
            moe.experts.w2.data *= 100  # so that experts matter
    with torch.no_grad():
        assert torch.equal(plain(tokens)[0], dropping(tokens)[0])
    state = torch.get_rng_state()
    want = plain(tokens, labels)[0]
    assert torch.equal(state, torch.get_rng_state())
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(dropping(tokens, labels)[0])
    assert draws[0] == draws[1] != draws[2]
    assert want not in draws


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_recomputed_activations_drop_the_same(mode: str) -> None:
    options: dict[str, Any] = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "compile_blocks": False}
    wrap = partial(parallelize, mesh=None, checkpoint_mode=mode, **options)
    case, sizes = Case("topk_softmax", {}), {"num_identity_experts": 2, "num_layers": 2}
    balancers = [Case("z_loss", {})]
    got = outcome(fresh(case, wrap, expert_dropout=RATE, **sizes), balancers, micro_batches=2)  # pyrefly: ignore
    want = outcome(fresh(case, expert_dropout=RATE, **sizes), balancers, micro_batches=2)  # pyrefly: ignore
    assert_same(got, want)
    with pytest.raises(AssertionError):
        assert_same(got, outcome(fresh(case, **sizes), balancers, micro_batches=2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # torch's, in dynamo
def test_a_compiled_layer_drops_as_many() -> None:
    """Compiled code draws other numbers: the mean over many is that without."""
    model = tiny_model(expert_dropout=RATE, num_layers=1)
    model.init_weights(0)
    moe, x = model.moe_layers()[0], torch.randn(1, 1, 16).expand(1, 4096, 16).contiguous()
    with torch.no_grad():
        want = moe(x)[0][0, 0]
    y = torch.compile(moe, fullgraph=True, backend="aot_eager")(x)[0][0]
    assert (y.mean(0) - want).norm() < 0.1 * want.norm()
    assert (y - want).norm(dim=-1).min() > 0.01 * want.norm()
    y.sum().backward()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"moe.expert_dropout": 1.0}, "moe.expert_dropout"),
        ({"moe.expert_dropout": -0.1}, "moe.expert_dropout"),
        ({"moe.expert_dropout": 0.1, "moe.num_experts": 0}, "needs experts, but moe.num_experts is 0"),
        (
            {"moe.expert_dropout": 0.1, "balancer.aux_loss.scope": "global_batch_exact"},
            "moe.expert_dropout the second time differs",
        ),
        (
            {"moe.expert_dropout": 0.1, "moe.experts_backend": "titan_moe.model.moe:expert_swiglu"},
            "moe.expert_dropout = 0.1 is inside the experts",
        ),
    ],
)
def test_what_does_not_go_with_it_is_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(**words)
