import itertools
import math

import pytest
import torch
from torch import nn

from tests.cases import OPTIMIZER_NAMES
from titan_moe.build import build_model, build_optimizer
from titan_moe.config import load_config
from titan_moe.optimizer.build import OPTIMIZERS, optimizer_of, set_lr
from titan_moe.optimizer.groups import Scale, group_of, parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer, combine
from titan_moe.optimizer.schedule import SCHEDULES
from titan_moe.optimizer.transform import Tick, Transform
from titan_moe.records import log_parameters


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("tok_embeddings.weight", "embedding"),
        ("output.weight", "embedding"),
        ("layers.0.attention.wo.weight", "dense"),
        ("layers.0.attention.q_norm.weight", "norm"),
        ("layers.0.ffn_norm.weight", "norm"),
        ("norm.weight", "norm"),
        ("layers.1.moe.router.weight", "router"),
        ("layers.1.moe.experts.w1", "expert"),
        ("layers.1.moe.shared_experts.w1.weight", "dense"),
        ("layers.1._orig_mod.moe.experts.w2", "expert"),
    ],
)
def test_group_of(name, group):
    assert group_of(name) == group


def named(*names):
    return [(name, nn.Parameter(torch.randn(3, 2))) for name in names]


def test_every_parameter_is_in_one_group_with_its_own_arguments():
    parameters = named("tok_embeddings.weight", "layers.0.moe.experts.w1", "layers.0.norm.weight", "layers.0.wq.weight")
    groups = parameter_groups(parameters, {"expert": {"lr": 5e-4}})
    assert [g["name"] for g in groups] == ["expert", "embedding", "norm", "dense"]
    assert [p for g in groups for p in g["params"]] == [parameters[i][1] for i in (1, 0, 2, 3)]
    assert groups[0]["lr"] == 5e-4


def test_configured_group_without_parameters_is_an_error():
    with pytest.raises(ValueError, match=r"\[optimizer.router\] is set, but the model has no router parameters"):
        parameter_groups(named("layers.0.wq.weight"), {"router": {"lr": 1e-3}})


def test_adamw_equals_torch_with_arguments_per_group():
    ours, theirs = named("layers.0.moe.experts.w1", "norm.weight"), []
    for _, p in ours:
        theirs.append(nn.Parameter(p.detach().clone()))
    groups = parameter_groups(ours, {"expert": {"lr": 1e-2, "beta1": 0.5}, "norm": {"weight_decay": 0.0}})
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-3, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.1)
    reference = torch.optim.AdamW(
        [
            {"params": [theirs[0]], "lr": 1e-2, "betas": (0.5, 0.95), "weight_decay": 0.1},
            {"params": [theirs[1]], "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0},
        ],
        eps=1e-8,
        fused=True,
    )
    for _ in range(5):
        for (_, a), b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for (_, a), b in zip(ours, theirs, strict=True))


SHORT = {"ademamix": {"beta3": 0.99}}  # whose slow average remembers more steps than the test has


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_optimizers_converge(name):
    """With a rate that falls to 0, because Muon's steps do not get smaller by themselves.

    The target has the norms of the weights, because some keep them.
    """
    weight = nn.Parameter(torch.randn(4, 6, 5))
    target = torch.randn(4, 6, 5)
    target *= (torch.linalg.matrix_norm(weight.detach()) / torch.linalg.matrix_norm(target)).view(-1, 1, 1)
    own = SHORT.get(name, {})
    optimizer = OPTIMIZERS[name]([{"name": "expert", "params": [weight]}], lr=0.05, weight_decay=0.0, **own)
    for step in range(1000):
        set_lr(optimizer, [0.05], 1 - step / 1000)
        loss = (weight - target).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 1e-2


def test_set_lr_scales_each_groups_own_rate():
    groups = parameter_groups(named("layers.0.moe.experts.w1", "layers.0.wq.weight"), {"expert": {"lr": 5e-4}})
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-3)
    assert set_lr(optimizer, [5e-4, 1e-3], 0.5) == {"expert": 2.5e-4, "dense": 5e-4}
    assert set_lr(optimizer, [5e-4, 1e-3], 1.0) == {"expert": 5e-4, "dense": 1e-3}


class Noted(torch.optim.SGD):
    """Notes the arguments that it is built with."""

    def __init__(self, params, lr=0.1, own=1, other=2):
        super().__init__(params, lr=lr)
        self.noted = {"lr": lr, "own": own, "other": other}


def test_an_optimizer_of_one_group_gets_that_groups_settings_as_arguments(tmp_path):
    file = tmp_path / "x.toml"
    table = f'name = "{__name__}:Noted"\nown = 3'
    file.write_text(
        f"[optimizer]\nlr = 0.01\n[optimizer.expert]\n{table}\nlr = 0.02\n[optimizer.dense]\n{table}\nother = 5"
    )
    config = load_config(
        [f"--job.config_file={file}", "--model.vocab_size=64", "--model.num_layers=1", "--model.dim=24"]
    )
    rules = build_optimizer(config, build_model(config)).rules
    (noted,) = {rule for rule in rules if isinstance(rule, Noted)}
    assert noted.noted == {"lr": 0.01, "own": 3, "other": 2}  # `other` and lr differ between the groups
    assert {group["name"]: group["lr"] for group in noted.param_groups} == {"expert": 0.02, "dense": 0.01}


class Plain(torch.optim.Optimizer):
    """Knows no weight decay."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(p.grad, alpha=group["lr"])


def test_an_optimizer_without_weight_decay(tmp_path, caplog):
    """It says so in the log, and rates by load whose decay goes on have none to go on with."""
    file = tmp_path / "x.toml"
    table = f'name = "{__name__}:Plain"\nload_lr = "ideal_normalized"\nload_lr_decay = false'
    file.write_text(f"[optimizer.expert]\n{table}")
    config = load_config(
        [f"--job.config_file={file}", "--model.vocab_size=64", "--model.num_layers=1", "--model.dim=24"]
    )
    model = build_model(config)
    model.init_weights(0)
    optimizer = build_optimizer(config, model)
    with caplog.at_level("INFO", logger="titan_moe"):
        log_parameters(config, model, optimizer)
    assert "of the load, weight decay none: Plain" in caplog.text
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".experts." in name}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    load = torch.tensor([[3, 1] + [0] * 6])
    optimizer.step(load=load, grad_norm=torch.tensor(1.0))
    factor_E = (load[0] / load.float().mean()).view(-1, 1, 1)
    for name, old in before.items():
        torch.testing.assert_close(model.get_parameter(name).detach(), old - 1e-3 * factor_E)


def test_a_schedule_may_give_a_factor_for_each_group():
    groups = parameter_groups(named("layers.0.moe.experts.w1", "layers.0.wq.weight"), {})
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-3)
    assert set_lr(optimizer, [1e-3, 1e-3], {"expert": 0.1, "dense": 1.0}) == {"expert": 1e-4, "dense": 1e-3}
    with pytest.raises(ValueError, match=r"^lr_scheduler.name gives no factor for dense: .* expert, dense$"):
        set_lr(optimizer, [1e-3, 1e-3], {"expert": 0.1})


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_warm_up_and_stay_between_0_and_1(name):
    factor = SCHEDULES[name](steps=100, warmup_steps=10)
    values = [factor(step) for step in range(1, 101)]
    assert values[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert all(0 <= v <= 1 for v in values)
    assert all(a >= b for a, b in itertools.pairwise(values[9:]))


def test_schedule_formulas():
    cosine = SCHEDULES["cosine"](steps=100, warmup_steps=20, min_lr_factor=0.1)
    assert cosine(60) == pytest.approx(0.55)
    assert cosine(100) == pytest.approx(0.1)
    assert cosine(40) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    wsd = SCHEDULES["wsd"](steps=100, warmup_steps=0, decay_ratio=0.2)
    assert [wsd(1), wsd(80), wsd(90), wsd(100)] == pytest.approx([1, 1, 0.5, 0])
    linear = SCHEDULES["linear"](steps=100, warmup_steps=20, min_lr_factor=0.5)
    assert [linear(20), linear(60), linear(100)] == pytest.approx([1, 0.75, 0.5])
    steps = SCHEDULES["multi_step"](steps=100, warmup_steps=10)
    assert [steps(5), steps(80), steps(81), steps(90), steps(91), steps(100)] == pytest.approx(
        [0.5, 1, 0.316, 0.316, 0.316**2, 0.316**2]
    )
    for milestones in ((0.9, 0.8), (0.5, 0.5), (0.0,), (1.0,)):
        with pytest.raises(ValueError, match=r"lr_scheduler\.milestones .* must rise, and lie between 0 and 1"):
            SCHEDULES["multi_step"](steps=100, milestones=milestones)
    assert SCHEDULES["constant"](steps=10, warmup_steps=0)(10) == 1
    assert SCHEDULES["cosine"](steps=3, warmup_steps=300)(3) == pytest.approx(0.01)  # a short trial of a long recipe


@pytest.mark.parametrize("max_norm", [0.5, 100.0, 0.0])
@pytest.mark.parametrize("experts", ["adamw", "muon"])
def test_clipping_equals_that_of_torch(max_norm: float, experts: str) -> None:
    """Fused kernels are told a scale, and another optimizer beside them gets gradients that are scaled already."""
    ours = [
        ("layers.0.moe.experts.w1", nn.Parameter(torch.randn(2, 4, 3))),
        *named("layers.0.wq.weight", "norm.weight"),
    ]
    theirs = [(name, nn.Parameter(p.detach().clone())) for name, p in ours]
    built = []
    for parameters in (ours, theirs):
        groups = parameter_groups(parameters, {})
        names = {group["name"]: experts if group["name"] == "expert" else "adamw" for group in groups}
        built.append(combine(groups, names, lambda name, members: OPTIMIZERS[name](members, lr=1e-2)))
    for step in range(3):
        for index, ((_, a), (_, b)) in enumerate(zip(ours, theirs, strict=True)):
            a.grad = torch.randn(a.shape, generator=torch.Generator().manual_seed(10 * step + index))
            b.grad = a.grad.clone()
        norm = torch.nn.utils.get_total_norm([p.grad for _, p in ours])
        if max_norm:
            torch.nn.utils.clip_grad_norm_([p for _, p in theirs], max_norm)
        built[0].step(grad_norm=norm, max_norm=max_norm)
        built[1].step()
    for (name, a), (_, b) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, msg=name)


def test_an_optimizer_from_outside_is_told_for_one_step() -> None:
    """torch's fused ones have the scale and the flag from us; what calls them next finds neither."""
    parameters = named("norm.weight")
    fused = torch.optim.Adam(parameter_groups(parameters, {}), lr=1e-2, fused=True)
    seen = []
    fused.register_step_pre_hook(lambda own, *_: seen.append((own.grad_scale.item(), own.found_inf.item())))
    parameters[0][1].grad = torch.ones_like(parameters[0][1])
    Optimizer.around(fused).step(grad_norm=torch.tensor(1.0), max_norm=0.1)
    assert seen == [(pytest.approx(10.0), 0.0)]
    assert fused.grad_scale is fused.found_inf is None


@pytest.mark.parametrize("name", ["adamw", "muon", "shampoo"])
@pytest.mark.parametrize("by_load", [False, True])
def test_scales_are_settings_of_single_parameters(name: str, by_load: bool) -> None:
    """Two experts' tensors, of which one has scales: as in two groups that are set so."""
    torch.manual_seed(0)
    values, scale = [torch.randn(2, 6, 4) for _ in range(2)], Scale(lr=0.5, weight_decay=2.0, eps=1e6)
    load = torch.tensor([[3, 5]]) if by_load else None
    settings = expand_load_lr({"load_lr": "ideal_normalized"}, top_k=1) if by_load else {}
    scaled, own = ([nn.Parameter(v.clone()) for v in values] for _ in range(2))
    together = [{"name": "expert", "params": scaled, "layers": [0, 0], "scales": [Scale(), scale], **settings}]
    apart = [{"name": "expert", "params": [p], "layers": [0], **settings} for p in own]
    apart[1] |= {"lr": 0.005, "weight_decay": 0.2, "eps": 1e-2}
    second = OPTIMIZERS[name](apart, lr=0.01)
    first = combine(together, {"expert": name}, lambda name, groups: OPTIMIZERS[name](groups, lr=0.01))

    for _ in range(3):
        for one, other in zip(scaled, own, strict=True):
            one.grad = torch.randn(2, 6, 4)
            other.grad = one.grad.clone()
        first.step(load=load)
        second.step(load=load)
    for one, other in zip(scaled, own, strict=True):
        assert torch.equal(one, other)
    assert "scales" not in first.param_groups[0]


def test_scales_do_not_reach_an_optimizer_from_outside() -> None:
    group = {"name": "dense", "params": [nn.Parameter(torch.randn(3, 2))], "scales": [Scale(lr=0.5)]}
    with pytest.raises(ValueError, match=r"\[optimizer.dense\]: rates that differ by parameter do not reach SGD"):
        Optimizer([group], [torch.optim.SGD(group["params"], lr=0.1)])


def onto_sphere() -> Transform:
    """Descent along the gradient that keeps each matrix' norm."""

    def init(weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"radius": weight.new_zeros(weight.shape[0])}

    def update(gradient: torch.Tensor, state: dict[str, torch.Tensor], tick: Tick) -> torch.Tensor:
        if tick.step == 1:
            state["radius"].copy_(torch.linalg.matrix_norm(tick.weight()))
        return gradient

    def retract(weight: torch.Tensor, state: dict[str, torch.Tensor], tick: Tick) -> None:
        weight.mul_((state["radius"] / torch.linalg.matrix_norm(weight)).view(-1, 1, 1))

    return Transform(init, update, retract=retract)


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4)])
def test_a_transform_may_bring_the_weights_back(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(shape))
    radius, before = torch.linalg.matrix_norm(weight.detach()), weight.detach().clone()
    optimizer = optimizer_of(onto_sphere)([{"name": "dense", "params": [weight]}], lr=0.1, weight_decay=0.0)
    for _ in range(3):
        weight.grad = torch.randn(shape)
        stepped = before - 0.1 * weight.grad
        before = stepped * (radius / torch.linalg.matrix_norm(stepped))[..., None, None]
        optimizer.step()
    torch.testing.assert_close(weight.detach(), before)
