"""Per-expert measures: signal-to-noise against gradients whose own is known, updates against the definition."""

import functools
import json
import math

import pytest
import torch
from torch import nn

from tests.cases import OPTIMIZER_NAMES
from tests.tiny import adamw, balancers, batch, tiny_model
from titan_moe.config import load_config
from titan_moe.metrics import expert_metrics, to_numbers, train_metrics
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.expert_stats import (
    copies,
    expert_parameters,
    expert_stats,
    expert_sums,
    observe_gradients,
)
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer, clip_scale
from titan_moe.sinks.files import jsonl
from titan_moe.sinks.trackers import tensorboard
from titan_moe.step import train_step

SNRS = [0.0, 0.3, 1.0, 5.0]


def experts_of(shape=(4, 30, 40)):
    return {f"layers.0.moe.experts.{name}": nn.Parameter(torch.ones(shape)) for name in ("w1", "w2")}


def measured(experts, optimizer, moments=None):
    return expert_stats(expert_sums(experts, copies(experts), optimizer, moments))


def outside(make, **arguments):
    """What builds an optimizer from outside with the rates of a group."""

    def build(groups, lr):
        return Optimizer.around(make(groups, lr=lr, **arguments))

    return build


BUILDERS = {
    **{name: OPTIMIZERS[name] for name in OPTIMIZER_NAMES},
    "shampoo without grafting": functools.partial(OPTIMIZERS["shampoo"], grafting="none"),
    "in bfloat16": functools.partial(OPTIMIZERS["adamw"], state_dtype="bfloat16"),
    "Adam": outside(torch.optim.Adam, betas=(0.8, 0.9)),
    "SGD": outside(torch.optim.SGD, momentum=0.9),
    "Adafactor": outside(torch.optim.Adafactor),  # its second moments are of rows and of columns
}


@pytest.mark.parametrize("load_lr", [{}, {"load_lr": "ideal_normalized"}], ids=["", "load_lr"])
@pytest.mark.parametrize("steps", [5, 60])
@pytest.mark.parametrize("name", BUILDERS)
def test_signal_to_noise_of_known_gradients(name, steps, load_lr):
    """g = signal + noise of unit variance: SNR = ||signal|| / sqrt(number of elements), from the second step on."""
    torch.manual_seed(0)
    named = experts_of()
    groups = parameter_groups(named.items(), {"expert": expand_load_lr(load_lr, top_k=2)})
    optimizer, moments = BUILDERS[name](groups, lr=1e-12), {}
    experts = expert_parameters(named.items())
    signals = [torch.randn(4, 30, 40) * torch.tensor(SNRS).view(-1, 1, 1) for _ in named]
    for _ in range(steps):  # moments of our own, and SOAP's, begin with the second step
        for parameter, signal in zip(named.values(), signals, strict=True):
            parameter.grad = signal + torch.randn_like(signal)
        load = torch.tensor([[1, 2, 3, 4]])
        observe_gradients(experts, optimizer, moments, torch.tensor(True), load)
        optimizer.step(load=load, finite=torch.tensor(True))
    stats = measured(experts, optimizer, moments)
    keeps_them = name in ("adamw", "adamh", "shampoo", "shampoo_fast", "soap", "in bfloat16", "Adam")
    assert any(moments.values()) == (not keeps_them)
    assert stats.gradient_snr[0, 0] < 0.2  # noise alone: the first moment by itself would say 0.24 or more
    assert stats.gradient_snr[0, 1:].tolist() == pytest.approx(SNRS[1:], rel=0.15)
    assert stats.update_ratio.max() < 1e-9


@pytest.mark.parametrize("load_lr", [{}, {"load_lr": "ideal_normalized"}], ids=["", "load_lr"])
def test_own_moments_are_adams(load_lr):
    """Muon's measure is what AdamW's moments give of the same gradients, dead experts and bad steps included.

    They are those from the second step on, after clipping.
    """
    torch.manual_seed(0)
    results = []
    gradients = [torch.randn(4, 30, 40) + 0.5 for _ in range(12)]
    for name in ("adamw", "muon"):
        named, moments = experts_of(), {}
        groups = parameter_groups(named.items(), {"expert": expand_load_lr(load_lr, top_k=2)})
        optimizer, experts = OPTIMIZERS[name](groups, lr=1e-12), expert_parameters(named.items())
        for step, gradient in list(enumerate(gradients))[name == "adamw" :]:
            finite, load = torch.tensor(step != 5), torch.tensor([[1, int(step != 3), 3, 4]])
            for parameter in named.values():
                parameter.grad = gradient * (1.0 if step != 5 else torch.nan)
            norm = torch.tensor(float(step))
            observe_gradients(experts, optimizer, moments, finite, load, clip_scale(norm, 2.0))
            optimizer.step(load=load, grad_norm=norm, max_norm=2.0, finite=finite)
        results.append(measured(experts, optimizer, moments).gradient_snr)
    assert results[0].isfinite().all()
    torch.testing.assert_close(results[1], results[0], rtol=1e-5, atol=0)


def test_moments_in_rotated_coordinates():
    """SOAP's measure, through three turns of its bases, is AdamW's of the gradients from the second step on."""
    torch.manual_seed(0)
    results = []
    gradients = [torch.randn(4, 30, 40) + 0.5 for _ in range(11)]
    for name, settings in (("adamw", {}), ("soap", {"precondition_frequency": 3, "max_preconditioner_dim": 20})):
        named = experts_of()
        experts = expert_parameters(named.items())
        optimizer = OPTIMIZERS[name](parameter_groups(named.items(), {}), lr=1e-12, beta1=0.9, beta2=0.95, **settings)
        for gradient in gradients[name == "adamw" :]:
            for parameter in named.values():
                parameter.grad = gradient
            optimizer.step()
        results.append(measured(experts, optimizer).gradient_snr)
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=0)


def test_no_measure_before_the_second_step_and_without_moments():
    named = experts_of((4, 2, 2))
    experts = expert_parameters(named.items())
    groups = parameter_groups(named.items(), {})
    for optimizer in (OPTIMIZERS["adamw"](groups), OPTIMIZERS["lion"](groups), torch.optim.SGD(groups, lr=0.1)):
        assert measured(experts, optimizer).gradient_snr.isnan().all()
        for parameter in named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert measured(experts, optimizer).gradient_snr.isnan().all()


def measured_steps(count, every=1, **arguments):
    model = tiny_model(**arguments)
    model.init_weights(0)
    optimizer, outputs, updates = adamw(model), [], []
    for step in range(count):
        old = {name: p.detach().clone() for name, p in model.named_parameters()}
        options = {"max_norm": 0.1, "measure_experts": step % every == 0}
        outputs.append(train_step(model, [batch(step)], optimizer, balancers(), model.expert_biases(), **options))
        updates.append({name: (p.detach() - old[name], old[name]) for name, p in model.named_parameters()})
    return model, outputs, updates


def test_update_ratio_is_what_the_step_did():
    _, outputs, updates = measured_steps(3)
    for output, update in zip(outputs, updates, strict=True):
        for layer in range(2):
            for expert in range(4):
                parts = [update[f"layers.{layer}.moe.experts.{name}"] for name in ("w1", "w2", "w3")]
                change = math.sqrt(sum(delta[expert].square().sum().item() for delta, _ in parts))
                size = math.sqrt(sum(old[expert].square().sum().item() for _, old in parts))
                assert output.expert_stats.update_ratio[layer, expert].item() == pytest.approx(change / size, rel=1e-5)


def test_measuring_changes_nothing():
    plain, some, _ = measured_steps(4, every=100)
    measured, all_of_them, _ = measured_steps(4)
    assert some[1].expert_stats is None
    assert all_of_them[1].expert_stats is not None
    for a, b in zip(plain.parameters(), measured.parameters(), strict=True):
        assert torch.equal(a, b)


def test_dense_layers_are_not_counted_and_dense_models_have_no_measure():
    _, outputs, _ = measured_steps(2, num_layers=3, first_dense_layers=1)
    assert outputs[1].expert_stats.update_ratio.shape == (2, 4)
    model = tiny_model(None, num_experts=0)
    model.init_weights(0)
    output = train_step(model, [batch(0)], adamw_dense(model), {}, [], max_norm=1.0, measure_experts=True)
    assert output.expert_stats is None


def adamw_dense(model):
    return OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), {}))


def test_records(tmp_path):
    _, outputs, _ = measured_steps(3)
    assert expert_metrics(outputs[2]._replace(expert_stats=None)) == {}
    (first, record) = to_numbers([{**train_metrics(o), **expert_metrics(o)} for o in (outputs[0], outputs[2])])
    assert record["gradient_snr"] == pytest.approx(outputs[2].expert_stats.gradient_snr.mean().item())
    sink = jsonl(tmp_path / "metrics.jsonl", 0)
    pictures = tensorboard(tmp_path, 0)
    for step, line in ((1, first), (3, record)):
        for target in (sink, pictures):
            target.write({"step": step, "kind": "train", **line, "load": line["load/experts"]})
    sink.close(), pictures.close()
    start, line = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert start["gradient_snr"] is None  # no measure yet
    assert start["gradient_snr/layer_1/expert_3"] is None
    assert line["load/layer_1/expert_3"] == outputs[2].load[1, 3].item()
    ratio = outputs[2].expert_stats.update_ratio
    assert line["update_ratio/layer_0/expert_2"] == pytest.approx(ratio[0, 2].item())
    assert line["update_ratio/layer_0"] == pytest.approx(ratio[0].mean().item())

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(tmp_path), size_guidance={"images": 0})
    found.Reload()
    names = {"train/load", "train/gradient_snr/experts", "train/update_ratio/experts"}
    assert set(found.Tags()["images"]) == names
    assert "train_per_layer/update_ratio/layer_0" in found.Tags()["scalars"]
    assert not any("expert_2" in tag for tag in found.Tags()["scalars"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--metrics.expert_stats_freq=-1"], "must be greater than or equal to 0"),
        (["--metrics.expert_stats_freq=5", "--moe.num_experts=0"], "metrics.expert_stats_freq = 5 needs experts"),
    ],
)
def test_configuration_refuses(args, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config(args)
    assert message in str(caught.value)
