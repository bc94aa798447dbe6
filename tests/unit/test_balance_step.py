"""What a training step does with balancers: scopes, losses that are only evaluated, schedules, quantiles."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.tiny import batch, tiny_model
from titan_moe.balancer import BALANCERS
from titan_moe.build import build_sharded
from titan_moe.checkpoint import load_model, save_checkpoint
from titan_moe.config import load_config, to_toml
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.step import train_step


def fresh(**arguments: Any) -> Transformer:
    model = tiny_model(**arguments)
    model.init_weights(0)
    return model


def step(model: Transformer, balancers: dict[str, Any], micro_batches: int = 4, **arguments: Any) -> Any:
    """One step of plain SGD with learning rate 1, so that parameters move by their gradients."""
    micro = list(zip(*(part.chunk(micro_batches) for part in batch(0)), strict=True))
    sgd = Optimizer.around(torch.optim.SGD(model.parameters(), lr=1.0))
    return train_step(model, micro, sgd, balancers, model.expert_biases(), **{"max_norm": 0.0, **arguments})


def moved_by(before: Transformer, after: Transformer) -> list[torch.Tensor]:
    return [(a - b).detach() for a, b in zip(before.parameters(), after.parameters(), strict=True)]


def gradients(model: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def by_definition(model: Transformer, micro_batches: int, loads_of: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy and L_B of the step written out; `loads_of(loads, i)` is what micro-batch i's m_j counts."""
    tokens, labels = (part.chunk(micro_batches) for part in batch(0))
    outputs = [model(part) for part in tokens]
    ce = torch.stack([F.cross_entropy(o.flatten(0, 1), y.flatten()) for (o, _), y in zip(outputs, labels, strict=True)])
    loads = torch.stack([torch.stack([r.tokens_per_expert for r in routings]) for _, routings in outputs])
    values = []
    for i, (_, routings) in enumerate(outputs):
        m = loads_of(loads, i)  # (L, E), a share of tokens
        values += [(m[layer] * r.scores.mean(0)).sum() for layer, r in enumerate(routings)]
    return ce.mean(), torch.stack(values).mean()


TOKENS = 8 * 16  # of the whole step

DEFINITIONS = {
    "micro_batch": lambda loads, i: loads[i] / (TOKENS / 4),
    "global_batch": lambda loads, i: loads[: i + 1].float().mean(0) / (TOKENS / 4),  # Megatron's running average
    "global_batch_exact": lambda loads, i: loads.sum(0) / TOKENS,
}


@pytest.mark.parametrize("scope", DEFINITIONS)
def test_aux_loss_scopes_are_their_definitions(scope: str) -> None:
    model, start = fresh(), fresh()
    output = step(model, {"aux_loss": (0.5, BALANCERS["aux_loss"](coeff=1.0, scope=scope))})
    ce, aux = by_definition(start, 4, DEFINITIONS[scope])
    torch.testing.assert_close(output.balance_losses["aux_loss"], aux.detach())
    torch.testing.assert_close(moved_by(start, model), gradients(start, ce + 0.5 * aux), rtol=1e-4, atol=1e-6)


def test_sequence_scope_is_one_sequence_at_a_time() -> None:
    model, start = fresh(), fresh()
    output = step(model, {"aux_loss": (0.5, BALANCERS["aux_loss"](coeff=1.0, scope="sequence"))}, micro_batches=2)
    ce, aux = by_definition(start, 8, lambda loads, i: loads[i] / 16)
    torch.testing.assert_close(output.balance_losses["aux_loss"], aux.detach())
    torch.testing.assert_close(moved_by(start, model), gradients(start, ce + 0.5 * aux), rtol=1e-4, atol=1e-6)


def test_running_average_without_accumulation_is_exact() -> None:
    outputs = []
    for scope in ("global_batch", "global_batch_exact", "micro_batch"):
        model = fresh()
        balancers = {"aux_loss": (0.5, BALANCERS["aux_loss"](coeff=1.0, scope=scope))}
        outputs.append((step(model, balancers, micro_batches=1).total_loss, list(model.parameters())))
    assert all(torch.equal(outputs[0][0], other[0]) for other in outputs)
    assert all(torch.equal(a, b) for other in outputs for a, b in zip(outputs[0][1], other[1], strict=True))


def test_a_loss_that_is_only_evaluated_trains_nothing() -> None:
    plain, watched = fresh(), fresh()
    alone = step(plain, {})
    output = step(watched, {"entropy_loss": (0.5, BALANCERS["entropy_loss"](coeff=1.0, train=False))})
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert torch.equal(alone.total_loss, output.total_loss)
    assert 0 < output.balance_losses["entropy_loss"] < 1.4


def test_schedule_scales_the_change_of_the_bias() -> None:
    balancers = {"loss_free": (1.0, BALANCERS["loss_free"](rate=0.25, decay_ratio=0.5))}
    biases = []
    for progress in (0.5, 0.75, 1.0):
        model = fresh()
        output = step(model, balancers, progress=progress)
        biases.append(torch.stack(model.expert_biases()))
    load = output.load.float()
    expected = 0.25 * torch.sign(load.mean(-1, keepdim=True) - load)
    assert torch.equal(torch.stack(biases), torch.stack([expected, expected / 2, expected * 0]))


def test_quantile_rule_sees_all_micro_batches() -> None:
    results = []
    for micro_batches in (1, 4):
        model = fresh()
        step(model, {"loss_free": (1.0, BALANCERS["loss_free"](rule="quantile"))}, micro_batches)
        results.append(torch.stack(model.expert_biases()))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5)
    assert results[0].abs().max() > 0


def test_two_rules_compose() -> None:
    model = fresh()
    balancers = {
        "loss_free": (1.0, BALANCERS["loss_free"](rate=0.25)),
        "other": (1.0, BALANCERS["loss_free"](rate=0.5, rule="proportional")),
    }
    load = step(model, balancers).load.float()
    error = load.mean(-1, keepdim=True) - load
    expected = 0.25 * error.sign() + 0.5 * error / load.mean(-1, keepdim=True)
    torch.testing.assert_close(torch.stack(model.expert_biases()), expected)


def test_selection_biases_of_a_bf16_model_keep_their_small_steps(tmp_path: Path) -> None:
    """Near 0.5 a step of 0.001 is less than half of what bf16 can tell apart."""
    sizes = ("--model.dim=16", "--model.num_layers=2", "--model.num_heads=2", "--model.vocab_size=64", "--moe.top_k=1")
    experts = ("--moe.num_experts=4", "--moe.expert_dim=16", "--balancer.loss_free.rate=0.001")
    config = load_config([*sizes, *experts, "--training.dtype=bfloat16"])
    model = build_sharded(config, None, compile_blocks=False)
    model.to_empty(device="cpu")
    model.init_weights(0)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    for bias in model.expert_biases():
        bias.fill_(0.5)
    output = step(model, {"loss_free": (1.0, BALANCERS["loss_free"](rate=0.001))})
    want = 0.5 + 0.001 * torch.sign(output.load.float().mean(-1, keepdim=True) - output.load)
    got = torch.stack(model.expert_biases())
    torch.testing.assert_close(got, want, rtol=0, atol=1e-7)

    # and a checkpoint has them as they are
    files = {"config.toml": to_toml(config)}
    step_folder = save_checkpoint(tmp_path, 1, model=model, optimizer=None, extra={}, files=files, keep_latest_k=1)
    assert torch.equal(torch.stack(load_model(step_folder)[0].expert_biases()), got)
