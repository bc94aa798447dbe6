import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.metrics import (
    EvalOutput,
    StepOutput,
    active_parameters,
    avgvio,
    dead_experts,
    eval_metrics,
    flops_per_token,
    load_cv,
    load_entropy,
    maxvio,
    minvio,
    to_numbers,
    train_metrics,
)


@pytest.mark.parametrize(
    ("load", "expected"),
    [([6, 6, 6, 6], 0.0), ([24, 0, 0, 0], 3.0), ([12, 4, 4, 4], 1.0), ([0, 0, 0, 0], 0.0), ([3, 1], 0.5)],
)
def test_maxvio(load, expected):
    assert maxvio(torch.tensor(load)).item() == expected


def test_maxvio_is_per_layer():
    assert torch.equal(maxvio(torch.tensor([[2, 2], [4, 0]])), torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_load_entropy_and_dead_experts():
    load = torch.tensor([[5, 5, 5, 5], [20, 0, 0, 0]])
    assert load_entropy(load).tolist() == pytest.approx([1.0, 0.0])
    assert dead_experts(load).item() == 3
    half = torch.tensor([1, 1, 0, 0])
    assert load_entropy(half).item() == pytest.approx(math.log(2) / math.log(4))


@pytest.mark.parametrize(
    ("load", "smallest", "average", "variation"),
    [
        ([6, 6, 6, 6], 0.0, 0.0, 0.0),
        ([24, 0, 0, 0], -1.0, 1.5, math.sqrt(3)),
        ([12, 4, 4, 4], -1 / 3, 0.5, math.sqrt(1 / 3)),
        ([0, 0, 0, 0], 0.0, 0.0, 0.0),
    ],
)
def test_other_violations(load, smallest, average, variation):
    load = torch.tensor(load)
    assert (minvio(load).item(), avgvio(load).item()) == pytest.approx((smallest, average))
    assert load_cv(load).item() == pytest.approx(variation)
    assert load_cv(torch.stack([load, load])).shape == (2,)


def step_output(load):
    one = torch.tensor(1.0)
    return StepOutput(one, {"aux_loss": torch.tensor(0.25)}, 2 * one, 3 * one, load, torch.tensor(24), {})


def test_train_metrics_have_the_names_of_the_contract():
    (record,) = to_numbers([train_metrics(step_output(torch.tensor([[2, 2], [3, 1]])))])
    assert record == {
        "loss": 1.0,
        "aux_loss": 0.25,
        "total_loss": 2.0,
        "grad_norm": 3.0,
        "maxvio_batch": 0.25,
        "maxvio_batch/layer_0": 0.0,
        "maxvio_batch/layer_1": 0.5,
        "minvio_batch": -0.25,
        "avgvio_batch": 0.25,
        "load_cv": 0.25,
        "load_entropy": pytest.approx((1 + load_entropy(torch.tensor([3, 1])).item()) / 2),
        "dead_experts": 0,
        "expert_batch_mean": 2.0,
        "expert_batch_min": 1,
    }


def test_dense_model_has_no_balance_metrics():
    assert "maxvio_batch" not in train_metrics(step_output(torch.zeros(0, dtype=torch.int64)))


def test_eval_metrics_of_the_whole_set():
    output = EvalOutput(
        loss_sum=torch.tensor(20 * math.log(8), dtype=torch.float64),
        num_correct=torch.tensor(5),
        num_tokens=torch.tensor(20),
        num_routed=torch.tensor(20),
        num_bytes=torch.tensor(60),
        load=torch.tensor([[30, 10]]),
        identity_load=torch.zeros(1, 0, dtype=torch.int64),
        scores_sum=torch.tensor([[15.0, 5.0]]),
        z_loss_sum=torch.tensor([40.0]),
        entropy_sum=torch.tensor([10.0]),
    )
    (record,) = to_numbers([eval_metrics(output)])
    assert record["loss"] == pytest.approx(math.log(8))
    assert record["perplexity"] == pytest.approx(8)
    assert record["accuracy"] == 0.25
    assert record["bits_per_byte"] == pytest.approx(1.0)
    assert record["aux_loss"] == pytest.approx(1.5 * 0.75 + 0.5 * 0.25)
    assert (record["z_loss"], record["entropy_loss"]) == (2.0, 0.5)
    assert (record["maxvio_global"], record["maxvio_global/layer_0"]) == (0.5, 0.5)


def test_to_numbers_keeps_float32_exact_and_types():
    value = torch.tensor(0.1)
    (record,) = to_numbers([{"a": value, "n": torch.tensor(2**40), "k": "train", "load": torch.ones(1, 2)}])
    assert record["a"] == value.item()
    assert record["n"] == 2**40
    assert isinstance(record["n"], int)
    assert record["load"].shape == (1, 2)
    assert to_numbers([]) == []


def test_to_numbers_takes_few_operators_however_many_numbers() -> None:
    values = [torch.tensor(float(i)) if i % 3 else torch.tensor(i) for i in range(300)]

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls += not func.is_view and "detach" not in str(func)
            return func(*args, **(kwargs or {}))

    with Count() as count:
        records = to_numbers([{str(i): value for i, value in enumerate(values)} for _ in range(2)])
    assert records == [{str(i): i for i in range(300)}] * 2
    assert count.calls <= 8


def test_flops_count_active_parameters_only():
    named = [("layers.0.moe.experts.w1", torch.zeros(8, 3, 5)), ("layers.0.attention.wq.weight", torch.zeros(4, 4))]
    active = active_parameters(named, num_experts=8, top_k=2)
    assert active == 2 * 15 + 16
    assert flops_per_token(active, num_layers=2, attention_dim=4, seq_len=10) == 6 * active + 6 * 2 * 4 * 10
