"""Load-based learning rates against a plain loop in which every expert is a parameter of its own."""

import copy
import functools
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.cases import AVERAGING, OPTIMIZER_NAMES
from tests.tiny import SEQ, balancers, batch, tiny_model
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.config import help_text, load_config
from titan_moe.metrics import expert_lr_range
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import layer_indices, parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr, load_lr, rate_factors
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.step import train_step

TOP_K, STEPS, E, L = 2, 10, 4, 2
LOADS = torch.tensor([[8, 4, 3, 1], [4, 0, 6, 6]])  # of two layers; one expert is dead
OPTIONS: list[dict[str, Any]] = [
    {"load_lr": "batch_fraction"},
    {"load_lr": "ideal_normalized"},
    {"load_lr": "ideal_normalized", "load_lr_power": 0.5, "load_lr_floor": 0.6, "load_lr_ceiling": 1.2},
    {"load_lr": "ideal_normalized", "load_lr_decay": False},
    {"load_lr": "batch_fraction", "load_lr_ema": 0.7, "load_lr_power": 2.0, "load_lr_decay": False},
    {"load_lr": "batch_fraction", "load_lr_floor": 0.3, "load_lr_ema": 0.5},
]


def settings(**options: Any) -> dict[str, Any]:
    return expand_load_lr(options, top_k=TOP_K)


def loads_of(step: int) -> Tensor:
    """Loads that change from step to step; expert 1 of layer 1 is dead in every second one."""
    return LOADS if step % 2 else LOADS.roll(1, dims=1) + LOADS[:, :1]


def by_hand(options: dict[str, Any], load: list[int], average: list[float]) -> list[float]:
    """Factors of one layer's experts in plain Python; `average` is updated."""
    tokens, mean = sum(load) / TOP_K, sum(load) / len(load)
    factors = []
    for i, tokens_i in enumerate(load):
        keep = options.get("load_lr_ema", 0.0)
        average[i] = keep * average[i] + (1 - keep) * tokens_i / mean
        ratio = average[i] * mean / tokens if options["load_lr"] == "batch_fraction" else average[i]
        factor = ratio ** options.get("load_lr_power", 1.0)
        factor = min(max(factor, options.get("load_lr_floor", 0.0)), options.get("load_lr_ceiling", 1e9))
        factors.append(factor if tokens_i else 0.0)
    return factors


def stacked() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"layers.{3 + layer}.moe.experts.{name}": nn.Parameter(torch.randn(E, 3, 5, generator=generator))
        for layer in range(L)
        for name in ("w1", "w2")
    }


def gradient(shape: tuple[int, ...], step: int, number: int, load: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(100 * step + number)
    return torch.randn(shape, generator=generator) * (load > 0).view(-1, 1, 1)  # no token, no gradient


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
@pytest.mark.parametrize("name", [name for name in OPTIMIZER_NAMES if name != "distributed_shampoo"])
def test_equals_a_parameter_for_each_expert(name, options):
    """10 steps; the reference skips an expert without tokens and gives each of the others its own lr and decay.

    Meta's optimizer cannot leave out an expert.
    """
    if name in AVERAGING and not options.get("load_lr_decay", True):
        pytest.skip("refused: decay is a part of what is averaged")
    on_sphere = name in ("muonh", "adamh")  # whose radius is that of weights which no decay has seen
    weights, arguments = stacked(), {"lr": 0.01, "weight_decay": 0.0 if on_sphere else 0.1}
    (group,) = parameter_groups(weights.items(), {"expert": settings(**options)})
    optimizer = OPTIMIZERS[name]([group], **arguments)

    experts = {key: [nn.Parameter(w.detach().clone()) for w in value] for key, value in weights.items()}
    loops = {
        key: [OPTIMIZERS[name]([{"name": "x", "params": [p]}], **arguments) for p in experts[key]] for key in experts
    }
    averages = [[1.0] * E for _ in range(L)]
    for step in range(STEPS):
        load_LE = loads_of(step)
        factors = [by_hand(options, load.tolist(), average) for load, average in zip(load_LE, averages, strict=True)]
        for number, (key, weight) in enumerate(weights.items()):
            layer = int(key[7]) - 3
            weight.grad = gradient(weight.shape, step, number, load_LE[layer])
            for expert, loop, row, factor in zip(experts[key], loops[key], weight.grad, factors[layer], strict=True):
                lr = loop.param_groups[0]["lr"] = 0.01 * factor
                if options.get("load_lr_decay", True):
                    loop.param_groups[0]["weight_decay"] = arguments["weight_decay"]
                else:
                    loop.param_groups[0]["weight_decay"] = 0.0
                    expert.data.mul_(1 - 0.01 * arguments["weight_decay"])
                expert.grad = row.clone()
                if lr > 0:
                    loop.step()
        applied = optimizer.step(load=load_LE)
        torch.testing.assert_close(applied, torch.tensor(factors), rtol=1e-6, atol=0)
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight.detach(), torch.stack([p.detach() for p in experts[key]]), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_any_optimizer_can_be_scaled(options):
    """SGD with momentum knows nothing of loads: equal to a parameter for each expert, as long as none is dead."""
    weights = stacked()
    (group,) = parameter_groups(weights.items(), {"expert": settings(**options)})
    optimizer = Optimizer.around(torch.optim.SGD([{**group, "weight_decay": 0.0}], lr=0.1, momentum=0.9))
    experts = {key: [nn.Parameter(w.detach().clone()) for w in value] for key, value in weights.items()}
    loops = {key: [torch.optim.SGD([p], lr=0.1, momentum=0.9) for p in experts[key]] for key in experts}
    averages = [[1.0] * E for _ in range(L)]
    for step in range(STEPS):
        load_LE = loads_of(0) + step
        factors = [by_hand(options, load.tolist(), average) for load, average in zip(load_LE, averages, strict=True)]
        for number, (key, weight) in enumerate(weights.items()):
            weight.grad = gradient(weight.shape, step, number, load_LE[0])
            for expert, loop, row, factor in zip(
                experts[key], loops[key], weight.grad, factors[int(key[7]) - 3], strict=True
            ):
                loop.param_groups[0]["lr"] = 0.1 * factor
                expert.grad = row.clone()
                loop.step()
        optimizer.step(load=load_LE)
        for key, weight in weights.items():
            torch.testing.assert_close(
                weight.detach(), torch.stack([p.detach() for p in experts[key]]), rtol=0, atol=1e-5
            )


def test_scaled_steps_equal_adamws_own():
    """The wrapper for any optimizer around torch's AdamW and our AdamW agree, decay scaled or not."""
    for options in OPTIONS:
        ours, theirs = stacked(), stacked()
        (group,) = parameter_groups(ours.items(), {"expert": settings(**options)})
        (other,) = parameter_groups(theirs.items(), {"expert": settings(**options)})
        own = OPTIMIZERS["adamw"]([group], lr=0.01, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
        adamw = torch.optim.AdamW([other], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        wrapped = Optimizer.around(adamw)
        for step in range(4):
            for number, (a, b) in enumerate(zip(ours.values(), theirs.values(), strict=True)):
                a.grad = gradient(a.shape, step, number, torch.ones(E))
                b.grad = a.grad.clone()
            for optimizer in (own, wrapped):
                optimizer.step(load=LOADS + 1 + step)
        for key, a in ours.items():
            torch.testing.assert_close(a, theirs[key], rtol=0, atol=1e-6)


OUTSIDE = {
    "AdamW, fused": functools.partial(torch.optim.AdamW, fused=True),
    "NAdam": torch.optim.NAdam,
    "RMSprop": functools.partial(torch.optim.RMSprop, momentum=0.9),
    "SGD": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
}
SOON = {"precondition_frequency": 2, "statistics_every": 1}  # roots and bases are made while the expert is dead


@pytest.mark.parametrize("name", [*OPTIMIZER_NAMES, *OUTSIDE])
def test_a_dead_expert_is_left_alone(name: str) -> None:
    """Whatever the floor: its weights and all that is kept of it, so that it wakes as it fell asleep.

    One count of steps for all experts, which optimizers from outside have, goes on.
    """
    builder = OUTSIDE.get(name) or OPTIMIZERS[name]
    weight = nn.Parameter(torch.randn(E, 3, 5))
    soon = {key: value for key, value in SOON.items() if key in inspect.signature(builder).parameters}
    by_load = settings(load_lr="ideal_normalized", load_lr_floor=0.5)
    groups = parameter_groups([("layers.0.moe.experts.w1", weight)], {"expert": by_load})
    optimizer = Optimizer.around(builder(groups, **soon))
    of_all = {"clock", "load_ema", "load_factor"} | ({"step", "mu_product"} if name in OUTSIDE else set())

    def kept() -> dict[str, Tensor]:
        state = {key: value for key, value in optimizer.state[weight].items() if key not in of_all}
        return copy.deepcopy({"weight": weight.detach(), **{k: v for k, v in state.items() if v is not None}})

    for _ in range(2):
        weight.grad = torch.randn_like(weight)
        optimizer.step(load=torch.tensor([[3, 3, 1, 1]]))
    before = kept()
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        weight.grad[2] = 0
        factors = optimizer.step(load=torch.tensor([[4, 3, 0, 1]]))
    assert factors is not None
    assert factors[0].tolist() == [2.0, 1.5, 0.0, 0.5]
    after = kept()
    assert before.keys() == after.keys()
    assert len(after) > 1
    for key, value in after.items():
        assert torch.equal(value[2], before[key][2]), key
        if key not in ("lr_max", "radius"):  # a largest rate may stay, a radius always does
            assert (value[[0, 1, 3]] != before[key][[0, 1, 3]]).view(3, -1).any(-1).all(), key
    if name not in OUTSIDE:
        assert after["step"].tolist() == [5, 5, 2, 5]


def test_decay_that_is_not_scaled_goes_on_for_a_dead_expert():
    weight = nn.Parameter(torch.ones(2, 1, 1))
    options = settings(load_lr="batch_fraction", load_lr_decay=False)
    groups = parameter_groups([("layers.0.moe.experts.w1", weight)], {"expert": options})
    optimizer = OPTIMIZERS["adamw"](groups, lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step(load=torch.tensor([[2, 0]]))
    assert weight.flatten().tolist() == pytest.approx([0.95, 0.95])


def test_ratios_are_the_papers():
    """Section 3.4.1: the ratios of a layer sum to top_k, or have mean 1; nothing routed, no rate."""
    ones = torch.ones(1, E)
    fraction, _ = rate_factors(LOADS[:1], ones, settings(load_lr="batch_fraction"))
    assert fraction.tolist() == [[8 / 8, 4 / 8, 3 / 8, 1 / 8]]  # of T = 8 tokens, each with two experts
    ideal, _ = rate_factors(LOADS[:1], ones, settings(load_lr="ideal_normalized"))
    assert ideal.tolist() == [[2.0, 1.0, 0.75, 0.25]]
    nothing, average = rate_factors(torch.zeros(1, E), ones, settings(load_lr="ideal_normalized", load_lr_ema=0.5))
    assert nothing.tolist() == [[0.0] * E]
    assert torch.equal(average, ones)
    assert {k: v.item() for k, v in expert_lr_range(0.1, ideal).items()} == {
        "lr/expert_min": pytest.approx(0.025),
        "lr/expert_max": pytest.approx(0.2),
    }


def test_layers_are_counted_by_occurrence():
    names = ["layers.10._orig_mod.moe.experts.w1", "layers.2.moe.experts.w1", "layers.10.moe.experts.w2"]
    assert layer_indices(names) == [1, 0, 1]


def test_wrong_settings():
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"\[optimizer.dense\] load_lr: only experts have a load"):
        parameter_groups([("layers.0.wq.weight", weight)], {"dense": settings(load_lr="batch_fraction")})
    with pytest.raises(ValueError, match=r"load_lr_floor \(2.0\) must be at most load_lr_ceiling \(1.0\)"):
        load_lr(load_lr="batch_fraction", load_lr_floor=2.0, load_lr_ceiling=1.0)
    assert settings(load_lr="none", load_lr_power=3.0, lr=0.1) == {"lr": 0.1}


ON = "--optimizer.expert.load_lr=batch_fraction"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--optimizer.expert.load_lr=loads"], "must be 'none', 'batch_fraction' or 'ideal_normalized'"),
        (["--optimizer.router.load_lr=none"], "optimizer.router.load_lr = none: only experts have a load"),
        (["--optimizer.load_lr_power=2"], "optimizer.load_lr_power = 2: only experts have a load"),
        (["--optimizer.expert.load_lr_power=2"], "load_lr_power is set, but optimizer.expert.load_lr is not"),
        ([ON, "--optimizer.expert.load_lr_pow=2"], "did you mean optimizer.expert.load_lr_power?"),
        ([ON, "--optimizer.expert.load_lr_ema=1.0"], "load_lr_ema = 1.0: must be less than 1"),
        ([ON, "--optimizer.expert.load_lr_power=inf"], "must be a finite number"),
        ([ON, "--optimizer.expert.load_lr_ceiling=0"], "must be greater than 0"),
        ([ON, "--optimizer.expert.load_lr_floor=2", "--optimizer.expert.load_lr_ceiling=1"], "must be at most"),
        ([ON, "--moe.num_experts=0"], "is a dense model, but [optimizer.expert] is set"),
    ],
)
def test_configuration_refuses(args, message):
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_config(args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


SMALL = """
[model]
dim = 16
num_layers = 3
num_heads = 2
vocab_size = 64
ffn_dim = 16
[moe]
num_experts = 4
expert_dim = 8
first_dense_layers = 1
[optimizer.expert]
load_lr = "ideal_normalized"
load_lr_ema = 0.5
lr = 5e-4
"""


def configured(tmp_path: Path, *args: str) -> Any:
    file = tmp_path / "x.toml"
    file.write_text(SMALL)
    config = load_config([f"--job.config_file={file}", *args])
    torch.manual_seed(0)
    model = build_model(config)
    model.init_weights(0)
    return model, build_optimizer(config, model)


def test_built_from_the_configuration(tmp_path):
    _, optimizer = configured(tmp_path)
    expert = next(group for group in optimizer.param_groups if group["name"] == "expert")
    assert (expert["load_lr"], expert["load_lr_ema"], expert["load_lr_power"], expert["lr"]) == (
        "ideal_normalized",
        0.5,
        1.0,
        5e-4,
    )
    assert expert["layers"] == [0, 0, 0, 1, 1, 1]  # the first of three layers is dense
    assert expert["load_lr_top_k"] == 2
    _, plain = configured(tmp_path, "--optimizer.expert.load_lr=none")
    assert all("load_lr" not in key for group in plain.param_groups for key in group)
    _, outside = configured(tmp_path, "--optimizer.name=torch.optim:NAdam", "--optimizer.decoupled_weight_decay=true")
    assert {type(rule) for rule in outside.rules} == {torch.optim.NAdam}
    assert "load_lr_floor = 0.0" in help_text()


def run(model: Any, optimizer: Any, steps: range, micro_batches: int = 1) -> list[Any]:
    own = {"z_loss": balancers()["z_loss"]}  # aux_loss is of a micro-batch, by definition
    outputs = []
    for step in steps:
        tokens, labels = batch(step)
        micro = list(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        outputs.append(train_step(model, micro, optimizer, own, model.expert_biases(), max_norm=1.0))
    return outputs


def expert_optimizer(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    options = {"load_lr": "batch_fraction", "load_lr_ema": 0.5, **options}
    groups = parameter_groups(model.named_parameters(), {"expert": settings(**options)})
    return OPTIMIZERS["adamw"](groups, lr=1e-2)


def test_accumulation_changes_nothing():
    whole, parts = tiny_model(), tiny_model()
    for model in (whole, parts):
        model.init_weights(0)
    a = run(whole, expert_optimizer(whole), range(4))
    b = run(parts, expert_optimizer(parts), range(4), micro_batches=4)
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.load_factors, y.load_factors)
    assert a[-1].load_factors.unique().numel() > 4  # the test has something to test
    for x, y in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_name", ["adamw", "torch.optim:NAdam"])
def test_resume_is_bit_for_bit(tmp_path, optimizer_name):
    args = [f"--optimizer.name={optimizer_name}"]
    model, optimizer = configured(tmp_path, *args)
    run(model, optimizer, range(3))
    save_checkpoint(tmp_path, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    expected = run(model, optimizer, range(3, 6))
    again, fresh = configured(tmp_path, *args)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=fresh)
    expert = next(group for group in fresh.param_groups if group["name"] == "expert")
    assert not torch.equal(fresh.state[expert["params"][0]]["load_ema"], torch.ones(4))
    for x, y in zip(expected, run(again, fresh, range(3, 6)), strict=True):
        assert torch.equal(x.load_factors, y.load_factors)
        assert torch.equal(x.loss, y.loss)
    for x, y in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(x, y)


def test_a_checkpoint_without_load_based_rates_is_refused(tmp_path):
    model, optimizer = configured(tmp_path, "--optimizer.expert.load_lr=none")
    run(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    model, optimizer = configured(tmp_path)
    with pytest.raises(ValueError, match=r"holds another optimizer: .*load_"):
        load_checkpoint(tmp_path / "step-1", model=model, optimizer=optimizer)


def test_no_host_synchronisation():
    with FakeTensorMode(), torch.device("cpu"):
        model = tiny_model()
        tokens = torch.zeros(4, SEQ, dtype=torch.int64)
        output = train_step(model, [(tokens, tokens)], expert_optimizer(model), {}, [], max_norm=1.0)
        assert output.load_factors is not None
        assert output.load_factors.shape == (2, 4)
