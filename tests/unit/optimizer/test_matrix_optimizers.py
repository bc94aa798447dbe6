"""SOAP and Muon against their definitions; what all matrix optimizers do with odd gradients, shapes and groups."""

import copy
import functools
import sys
from inspect import signature
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from tests.tiny import balancers, batch, tiny_model
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.config import load_config, to_toml
from titan_moe.optimizer import kronecker
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.matrix import apply, parts_of
from titan_moe.optimizer.muon import orthogonalize
from titan_moe.optimizer.optimizer import combine, describe_group, kind_of
from titan_moe.optimizer.transform import momentum
from titan_moe.resume import load_run
from titan_moe.step import train_step

MATRIX = [name for name in OPTIMIZERS if name not in (*BY_ELEMENT, "distributed_shampoo")]


def taken(name: str, **arguments: Any) -> dict[str, Any]:
    """Those of some arguments that an optimizer takes."""
    return {key: value for key, value in arguments.items() if key in signature(OPTIMIZERS[name]).parameters}


SPHERES = ("muonh", "adamh")  # which keep a matrix' norm, and so take none of zeros
FULL_STEPS = ("muon", "normuon", *SPHERES)  # whatever the size of their momentum


def start_of(name: str, shape: tuple[int, ...]) -> Tensor:
    """Zeros, or ones where these are refused."""
    return torch.ones(shape) if name in SPHERES else torch.zeros(shape)


SOON: dict[str, dict[str, Any]] = {name: taken(name, precondition_frequency=3) for name in MATRIX}


def optimizer_of(name: str, weight: nn.Parameter, **changes: Any) -> Any:
    return OPTIMIZERS[name]([{"name": "expert", "params": [weight]}], lr=1e-2, **{**SOON[name], **changes})


class Soap:
    """SOAP on one matrix in float64, with factors of full rank from the first gradient on.

    The first moment is in the original coordinates, as in the definition.
    """

    def __init__(self, weight: Tensor, frequency: int, one_sided: bool) -> None:
        self.weight, self.frequency, self.t = weight.double().clone(), frequency, 0
        rows, cols = weight.shape
        self.sides = ["left" if rows <= cols else "right"] if one_sided else ["left", "right"]
        self.factor = {"left": torch.zeros(rows, rows).double(), "right": torch.zeros(cols, cols).double()}
        self.q = {"left": torch.eye(rows).double(), "right": torch.eye(cols).double()}
        self.m, self.v = torch.zeros(rows, cols).double(), torch.zeros(rows, cols).double()

    def step(self, g: Tensor, lr: float, b1: float, b2: float, decay: float) -> None:
        g, self.t = g.double(), self.t + 1
        self.weight *= 1 - lr * decay
        if self.t > 1:
            left, right = self.q["left"], self.q["right"]
            self.m = b1 * self.m + (1 - b1) * g
            self.v = b2 * self.v + (1 - b2) * (left.T @ g @ right) ** 2
            n = self.t - 1
            mean = left.T @ (self.m / (1 - b1**n)) @ right
            self.weight -= lr * left @ (mean / ((self.v / (1 - b2**n)).sqrt() + 1e-8)) @ right.T
        self.factor["left"] = b2 * self.factor["left"] + (1 - b2) * g @ g.T
        self.factor["right"] = b2 * self.factor["right"] + (1 - b2) * g.T @ g
        for side in self.sides:
            if self.t == 1:
                self.q[side] = torch.linalg.eigh(self.factor[side])[1].flip(1)
            elif self.t % self.frequency == 0:
                power = self.factor[side] @ self.q[side]
                order = torch.diag(self.q[side].T @ power).argsort(descending=True)
                self.q[side] = torch.linalg.qr(power[:, order])[0]
                self.v = self.v[order] if side == "left" else self.v[:, order]


@pytest.mark.parametrize(("shape", "one_sided"), [((3, 6, 6), False), ((2, 7, 4), True), ((4, 6), True)])
def test_soap_equals_the_plain_loop(shape: tuple[int, ...], one_sided: bool) -> None:
    weight = nn.Parameter(torch.randn(shape))
    matrices = [Soap(w, 3, one_sided) for w in weight.detach().view(-1, *shape[-2:])]
    optimizer = optimizer_of("soap", weight, one_sided=one_sided, beta1=0.9, beta2=0.95)
    strength = torch.logspace(0, -1, shape[-1])
    for _ in range(20):
        weight.grad = torch.randn(shape) * strength
        optimizer.step()
        for matrix, g in zip(matrices, weight.grad.view(-1, *shape[-2:]), strict=True):
            matrix.step(g, 1e-2, 0.9, 0.95, 0.1)
        expected = torch.stack([matrix.weight for matrix in matrices]).view(shape)
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape", [(12, 8), (8, 12), (9, 9)])
def test_muon_equals_torch(shape: tuple[int, int], nesterov: bool, adjust: Any) -> None:
    """And a stack of experts equals each of them by itself."""
    start = torch.randn(3, *shape)
    stacked, single = nn.Parameter(start.clone()), nn.Parameter(start[0].clone())
    theirs = [nn.Parameter(w.clone()) for w in start]
    options = {"nesterov": nesterov, "momentum": 0.9, "weight_decay": 0.05, "ns_steps": 4}
    ours = [optimizer_of("muon", p, adjust_lr=adjust, **options) for p in (stacked, single)]
    reference = torch.optim.Muon(theirs, lr=1e-2, adjust_lr_fn=adjust, **options)
    for _ in range(5):
        stacked.grad = torch.randn_like(start)
        single.grad = stacked.grad[0].clone()
        for p, g in zip(theirs, stacked.grad, strict=True):
            p.grad = g.clone()
        for optimizer in (*ours, reference):
            optimizer.step()
        expected = torch.stack([p.detach() for p in theirs])
        torch.testing.assert_close(stacked.detach(), expected, rtol=0, atol=1e-6)
        torch.testing.assert_close(single.detach(), expected[0], rtol=0, atol=1e-6)


def polar_factor(g: Tensor, steps: int) -> Tensor:
    """Amsel et al. (2025), algorithm 1, in float64; the coefficients with four decimals that NVIDIA publishes."""
    rows = [(8.2051, -22.9019, 16.4607), (4.0664, -2.8612, 0.5184), (3.9096, -2.8234, 0.5250)]
    rows += [(3.2856, -2.4153, 0.4853), (2.2779, -1.6198, 0.3985), (1.8726, -1.2307, 0.3585)]
    rows += [(1.8564, -1.2132, 0.3568), (1.8750, -1.2500, 0.3750)]
    x = g.double() / (1.01 * torch.linalg.matrix_norm(g.double()))
    for step in range(steps):
        a, b, c = rows[min(step, 7)]
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize("steps", [1, 3, 5, 8, 10])
@pytest.mark.parametrize("shape", [(32, 20), (20, 32)])
def test_polar_express(shape: tuple[int, int], steps: int) -> None:
    """As its authors' algorithm, and after eight steps the orthogonal factor of the singular value decomposition."""
    stack = torch.randn(3, *shape)
    found = orthogonalize(stack, steps, torch.float32, "polar_express")
    expected = torch.stack([polar_factor(matrix, steps) for matrix in stack])
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=2e-3)  # of the decimals
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    if steps >= 8:
        torch.testing.assert_close(found, left @ right, rtol=0, atol=1e-4)
    in_bf16 = orthogonalize(stack, steps, torch.bfloat16, "polar_express").float()
    torch.testing.assert_close(in_bf16, found, rtol=0, atol=0.06)
    assert not orthogonalize(torch.zeros(1, *shape), steps, torch.float32, "polar_express").any()


def test_polar_express_comes_nearer_in_as_many_steps() -> None:
    stack = torch.randn(4, 24, 24)
    spread = {}
    for coefficients in ("jordan", "polar_express"):
        values = torch.linalg.svdvals(orthogonalize(stack, 5, torch.float32, coefficients))
        spread[coefficients] = float((values - 1).square().mean().sqrt())
    assert spread["polar_express"] < 0.5 * spread["jordan"]


def jordans_factor(x: Tensor) -> Tensor:
    """Five of Jordan's iterations in float64."""
    x = x / torch.linalg.matrix_norm(x)
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * (x @ x.T) + 2.0315 * (x @ x.T) @ (x @ x.T)) @ x
    return x


def normuon_loop(weight: Tensor, gradients: list[Tensor], adjust_lr: str) -> Tensor:
    """The authors' code (zichongli5/NorMuon, normuon_update), or algorithm 1 of Li et al. (2025), on one matrix."""
    weight, m = weight.double(), torch.zeros_like(weight).double()
    v = m[:, :1]
    for g in (gradient.double() for gradient in gradients):
        weight = weight * (1 - 1e-2 * 0.1)
        m = 0.95 * m + 0.05 * g
        orthogonal = jordans_factor(0.95 * m + 0.05 * g)
        v = 0.9 * v + 0.1 * (orthogonal**2).mean(1, keepdim=True)
        u = orthogonal / (v.sqrt() + 1e-10)
        height, width = u.shape
        if adjust_lr == "original":
            u = u * orthogonal.norm() / u.norm() * max(1, height / width) ** 0.5
            weight = weight - 1e-2 * u
        else:
            weight = weight - 0.2 * 1e-2 * (height * width) ** 0.5 / u.norm() * u
    return weight


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("shape", [(3, 12, 8), (2, 8, 12), (9, 9)])
def test_normuon_equals_the_plain_loop(shape: tuple[int, ...], adjust_lr: str) -> None:
    weight = nn.Parameter(torch.randn(shape))
    start = weight.detach().clone()
    optimizer = optimizer_of("normuon", weight, adjust_lr=adjust_lr, beta2=0.9, matmul_dtype="float32")
    gradients = [torch.randn(shape) for _ in range(20)]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    matrices = zip(start.view(-1, *shape[-2:]), torch.stack(gradients).view(20, -1, *shape[-2:]).unbind(1), strict=True)
    expected = torch.stack([normuon_loop(w, list(g), adjust_lr) for w, g in matrices]).view(shape)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)
    assert optimizer.state[weight]["second_momentum_buffer"].numel() == start[..., 0].numel()


def hyperball_loop(name: str, weight: Tensor, gradients: list[Tensor]) -> Tensor:
    """Wen et al. (2026) as in their code (marin, muonh.py and adamh.py), on one matrix in float64."""
    weight, m = weight.double(), torch.zeros_like(weight).double()
    v, norm = m.clone(), weight.double().norm()
    for t, g in enumerate((gradient.double() for gradient in gradients), 1):
        if name == "muonh":
            m = 0.95 * m + g
            u = jordans_factor(0.95 * m + g)
        else:
            m = 0.9 * m + 0.1 * g
            v = 0.95 * v + 0.05 * g**2
            u = m / (1 - 0.9**t) / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
        moved = weight - 1e-2 * u * norm / u.norm()
        weight = moved / moved.norm() * norm
    return weight


@pytest.mark.parametrize("name", SPHERES)
@pytest.mark.parametrize("shape", [(3, 12, 8), (2, 8, 12), (9, 9)])
def test_hyperball_equals_the_plain_loop(shape: tuple[int, ...], name: str) -> None:
    weight = nn.Parameter(torch.randn(shape))
    start = weight.detach().clone()
    optimizer = optimizer_of(name, weight, **taken(name, matmul_dtype="float32"))
    gradients = [torch.randn(shape) for _ in range(20)]
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    matrices = zip(start.view(-1, *shape[-2:]), torch.stack(gradients).view(20, -1, *shape[-2:]).unbind(1), strict=True)
    expected = torch.stack([hyperball_loop(name, w, list(g)) for w, g in matrices]).view(shape)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", SPHERES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_stay(name: str, dtype: torch.dtype) -> None:
    """Over 300 steps, each of which is as long as 0.4 % of the radius more; in bf16 as far as weights are rounded."""
    weight = nn.Parameter(torch.randn(2, 16, 24).to(dtype))
    norms = torch.linalg.matrix_norm(weight.detach().float())
    optimizer = optimizer_of(name, weight)
    for _ in range(300):
        weight.grad = torch.randn(weight.shape).to(dtype)
        optimizer.step()
    after = torch.linalg.matrix_norm(weight.detach().float())
    torch.testing.assert_close(after, norms, rtol=1e-6 if dtype == torch.float32 else 3e-4, atol=0)


@pytest.mark.parametrize("name", SPHERES)
def test_decay_on_a_sphere_is_a_longer_step(name: str) -> None:
    """W (1 - lr decay) - lr u has the direction of W - lr / (1 - lr decay) u."""
    start, gradient = torch.randn(3, 6, 4), torch.randn(3, 6, 4)
    weights = [nn.Parameter(start.clone()) for _ in range(2)]
    for weight, (lr, decay) in zip(weights, [(0.1, 0.5), (0.1 / (1 - 0.05), 0.0)], strict=True):
        weight.grad = gradient.clone()
        OPTIMIZERS[name]([{"name": "expert", "params": [weight]}], lr=lr, weight_decay=decay).step()
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize("name", SPHERES)
def test_a_matrix_of_zeros_has_no_sphere(name: str) -> None:
    weight = nn.Parameter(torch.randn(3, 6, 4))
    weight.data[1] = 0.0
    weight.grad = torch.randn(3, 6, 4)
    with pytest.raises(ValueError, match=r"keep the norm of each matrix, and one of 6 x 4 begins with a norm of 0"):
        optimizer_of(name, weight).step()


@pytest.mark.parametrize("name", MATRIX)
def test_other_shapes_and_groups_are_adamws(name: str) -> None:
    """Vectors, embeddings, norms, and for shampoo and soap matrices over a size: equal to torch's fused AdamW."""
    shapes = [("dense", (7,)), ("embedding", (12, 4)), ("norm", (5,))]
    above = taken(name, adamw_above=8)
    shapes += [("dense", (9, 4))] if above else []
    ours = [nn.Parameter(torch.randn(shape)) for _, shape in shapes]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    groups = [{"name": group, "params": [p]} for (group, _), p in zip(shapes, ours, strict=True)]
    optimizer = OPTIMIZERS[name](groups, lr=1e-2, beta1=0.8, beta2=0.9, weight_decay=0.1, **SOON[name], **above)
    reference = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.8, 0.9), weight_decay=0.1, fused=True)
    for _ in range(4):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert describe_group(optimizer, optimizer.param_groups[1]) == f"AdamW (no matrices for {name})"


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_refused(name: str, value: float) -> None:
    weight = nn.Parameter(torch.randn(3, 4, 5))
    optimizer = optimizer_of(name, weight)
    weight.grad = torch.randn_like(weight)
    optimizer.step()
    before = copy.deepcopy((weight.detach(), dict(optimizer.state[weight])))
    weight.grad[1, 2, 3] = value
    with pytest.raises(ValueError, match=r"gradient of parameter 0 of group 'expert' is NaN or infinite: .* refused"):
        optimizer.step()
    torch.testing.assert_close((weight.detach(), dict(optimizer.state[weight])), before, rtol=0, atol=0)


def test_a_training_step_spares_them_the_look_at_their_gradients() -> None:
    model = tiny_model(num_layers=1)
    model.init_weights(0)
    groups = parameter_groups(model.named_parameters(), {})
    optimizer = combine(
        groups, {g["name"]: "adamw" for g in groups} | {"expert": "muon"}, lambda n, g: OPTIMIZERS[n](g)
    )
    weight = model.layers[0].moe.experts.w2
    step = functools.partial(train_step, model, [batch(0)], optimizer, balancers(), model.expert_biases(), max_norm=1.0)
    with mock.patch("titan_moe.optimizer.optimizer.refuse_nonfinite") as again:
        step()
    again.assert_not_called()  # the norm has told
    weight.grad = torch.full_like(weight, float("nan"))
    with pytest.raises(ValueError, match=r"gradient of parameter 1 of group 'expert' is NaN"):
        optimizer.step()  # without the training step


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1.0, 1e12])
def test_any_scale_gives_finite_steps(name: str, scale: float) -> None:
    """Also a gradient that never changes, whose factors have rank one; no element moves by more than some rates."""
    start = start_of(name, (2, 6, 5))
    weight = nn.Parameter(start.clone())
    optimizer = optimizer_of(name, weight, weight_decay=0.0)
    gradient = scale * torch.outer(torch.linspace(-1, 1, 6), torch.linspace(1, 2, 5)).expand(2, 6, 5)
    for step in range(8):
        before = weight.detach().clone()
        weight.grad = gradient * (1.0 if step < 4 else -1.0)
        optimizer.step()
        assert weight.isfinite().all()
        assert (weight - before).abs().max() < 10 * 1e-2
    if scale >= 1e-12:
        assert not torch.equal(weight, start)


@pytest.mark.parametrize("together", [1, 60])
@pytest.mark.parametrize("name", MATRIX)
def test_experts_are_updated_alike_however_many_at_a_time(
    name: str, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One or three of five experts of 20 elements at once, with rates by load: as all of them, state included."""
    weights = [nn.Parameter(torch.linspace(-1, 1, 100).view(5, 4, 5)) for _ in range(2)]
    by_load = expand_load_lr({"load_lr": "batch_fraction"}, top_k=2)
    groups = [{"name": "expert", "params": [w], "layers": [0], **by_load} for w in weights]
    all_at_once, some = (OPTIMIZERS[name]([group], lr=1e-2, **SOON[name]) for group in groups)
    sizes = []

    def step(optimizer: Any, gradient: Tensor, load: Tensor) -> None:
        (weight,) = optimizer.param_groups[0]["params"]
        weight.grad = gradient
        optimizer.step(load=load)
        sizes.append(len(parts_of(weight, optimizer._matrices[weight].transform)))

    for number in range(7):
        gradient = torch.randn(5, 4, 5)
        load = torch.tensor([[4.0, 0.0 if number == 3 else 2.0, 2.0, 1.0, 1.0]])
        gradient[1] *= number != 3
        step(all_at_once, gradient.clone(), load)
        with monkeypatch.context() as patch:
            patch.setattr("titan_moe.optimizer.matrix.CPU_ELEMENTS_PER_UPDATE", together)
            step(some, gradient.clone(), load)
    assert set(sizes) == {1, 5 if together == 1 else 2}
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-6)
    for key, value in all_at_once.state[weights[0]].items():
        torch.testing.assert_close(some.state[weights[1]][key], value, rtol=1e-4, atol=1e-5)


def test_all_experts_are_updated_at_once_but_on_a_cpu() -> None:
    transform = momentum(0.9)
    many = torch.empty(8, 2048, 768, device="meta")
    assert len(parts_of(many, transform)) == 1
    with torch._subclasses.FakeTensorMode():
        assert len(parts_of(torch.empty(8, 2048, 768), transform)) == 4


@pytest.mark.parametrize("name", MATRIX)
@pytest.mark.parametrize("case", ["transposed", "bfloat16"])
def test_weights_of_other_layouts_and_types_are_updated_alike(name: str, case: str) -> None:
    plain = nn.Parameter((torch.randn(2, 6, 8) / 100).bfloat16().float())
    odd = nn.Parameter(plain.detach().mT.contiguous().mT if case == "transposed" else plain.detach().bfloat16())
    optimizers = [optimizer_of(name, weight) for weight in (plain, odd)]
    for _ in range(4):
        gradient = torch.randn(plain.shape).bfloat16().float()
        plain.grad = gradient
        odd.grad = torch.empty_like(odd).copy_(gradient)
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(odd.float(), plain, atol=1e-6 if case == "transposed" else 2e-3, rtol=1e-4)


def test_a_step_is_the_direction_and_the_decay_at_the_rate() -> None:
    """W - lr (d + decay W), for weights that lie one after another in memory and those that do not."""
    direction, group = torch.randn(2, 6, 8), {"lr": 0.1, "weight_decay": 0.5}
    for weight in (torch.randn(2, 6, 8), torch.randn(2, 8, 6).mT, torch.randn(3, 7, 9)[1:, :6, :8]):
        for d in (direction, direction.mT.contiguous().mT):
            updated = weight.clone(memory_format=torch.preserve_format) if weight.is_contiguous() else weight
            want = weight - 0.1 * (d + 0.5 * weight)
            apply(updated, d, group, None)
            torch.testing.assert_close(updated, want)


@pytest.mark.parametrize("name", ["shampoo", "shampoo_fast", "soap"])
def test_factors_of_an_expert_without_tokens_stay(name: str) -> None:
    """A zero gradient is no evidence: neither factor nor count changes, and the others' are what they would be."""
    weight, other = nn.Parameter(torch.randn(3, 4, 5)), nn.Parameter(torch.randn(2, 4, 5))
    optimizer, reference = (optimizer_of(name, p, statistics_every=1) for p in (weight, other))
    kept = {}
    for step in range(200):
        weight.grad = torch.randn_like(weight)
        if step >= 5:
            weight.grad[1] = 0
        other.grad = weight.grad[[0, 2]].clone()
        optimizer.step()
        reference.step()
        state = {k: v for k, v in optimizer.state[weight].items() if k.startswith(("left", "right", "count"))}
        if step == 4:
            kept = copy.deepcopy(state)
    assert state["count_left_0"].flatten().tolist() == [200, 5, 200]
    for key, value in state.items():
        assert torch.equal(value[1], kept[key][1])
        torch.testing.assert_close(value[[0, 2]], reference.state[other][key], rtol=1e-5, atol=1e-6)
    assert weight.isfinite().all()


def moved_by(name: str, shape: tuple[int, ...], gradients: list[Tensor]) -> Tensor:
    """How far weights are after these gradients, without decay, from where they began."""
    start = start_of(name, shape)
    weight = nn.Parameter(start.clone())
    exact = taken(name, statistics_every=1) | taken(name, matmul_dtype="float32")
    optimizer = optimizer_of(name, weight, weight_decay=0.0, **exact)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach() - start


@pytest.mark.parametrize(
    ("shape", "rank", "inputs"),
    [((4, 3, 5), 3, "new"), ((4, 16, 16), 1, "new"), ((4, 16, 16), 2, "same"), ((2, 12, 24), 3, "new")],
)
@pytest.mark.parametrize("name", MATRIX)
def test_round_off_stays_round_off(
    name: str, shape: tuple[int, ...], rank: int, inputs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gradients of few tokens leave directions without evidence; which of their bases is taken must not be seen.

    Two runs whose gradients, and products of these in the factors, differ by 1e-7, as on two machines.
    """
    experts, height, width = shape
    right = [torch.randn(experts, rank, width) for _ in range(12)]
    gradients = [torch.randn(experts, height, rank) @ right[step if inputs == "new" else 0] for step in range(12)]
    want = moved_by(name, shape, gradients)
    noise = torch.Generator().manual_seed(1)

    def other(x: Tensor) -> Tensor:
        return x * (1 + 1e-7 * torch.randn(x.shape, generator=noise))

    exact = kronecker.add_product
    monkeypatch.setattr(kronecker, "add_product", lambda factor, product, *rest: exact(factor, other(product), *rest))
    moved = moved_by(name, shape, [other(gradient) for gradient in gradients])
    assert not torch.equal(moved, want)
    assert (moved - want).norm() < 2e-4 * want.norm()


def test_soap_moves_along_evidence_only() -> None:
    """An input that never occurs gets no update, though its coordinates in the basis are round-off, not zeros."""
    weight = nn.Parameter(torch.zeros(2, 8, 12))
    optimizer = optimizer_of("soap", weight, weight_decay=0.0)
    inputs = torch.linalg.qr(torch.randn(2, 12, 3)).Q.mT
    for _ in range(10):
        weight.grad = torch.randn(2, 8, 3) @ inputs
        optimizer.step()
    outside = weight.detach() - weight.detach() @ inputs.mT @ inputs
    assert outside.norm() < 1e-5 * weight.norm()


@pytest.mark.parametrize("name", MATRIX)
def test_by_load_nothing_of_an_expert_without_tokens_changes(name: str) -> None:
    """Also in the steps in which roots and bases are made."""
    weight = nn.Parameter(torch.randn(3, 4, 5))
    by_load = expand_load_lr({"load_lr": "ideal_normalized"}, top_k=1)
    optimizer = OPTIMIZERS[name]([{"name": "expert", "params": [weight], "layers": [0], **by_load}], **SOON[name])
    kept: dict[str, Tensor] = {}
    for step in range(8):
        weight.grad = torch.randn(3, 4, 5)
        weight.grad[1] *= step < 4
        optimizer.step(load=torch.tensor([[2, 2 if step < 4 else 0, 2]]))
        shared = ("clock", "load_ema", "load_factor")
        state = {key: value[1] for key, value in optimizer.state[weight].items() if key not in shared}
        state = {"weight": weight.detach()[1], **state}
        if step == 3:
            kept = copy.deepcopy(state)
    differ = [key for key, value in state.items() if not torch.equal(value, kept[key])]
    assert not differ


def test_soap_steps_alike_whenever_an_expert_wakes() -> None:
    """A constant gradient along one axis: each step after the first moves the weight by the rate, as Adam's do."""
    weight = nn.Parameter(torch.zeros(2, 4, 5))
    by_load = expand_load_lr({"load_lr": "ideal_normalized"}, top_k=1)
    (group,) = [{"name": "expert", "params": [weight], "layers": [0], **by_load}]
    optimizer = OPTIMIZERS["soap"]([group], lr=1e-2, weight_decay=0.0)
    gradient = torch.zeros(2, 4, 5)
    gradient[:, 1, 2] = 1.0
    moved = []
    for step in range(5):
        before = weight.detach().clone()
        weight.grad = gradient * torch.tensor([1.0, step > 0]).view(2, 1, 1)
        optimizer.step(load=torch.tensor([[1, int(step > 0)]]))
        moved.append((before - weight.detach())[:, 1, 2] / (2.0 if step == 0 else 1.0))
    expected = torch.full((5, 2), 1e-2)
    expected[0] = 0.0  # one makes its basis, the other has no token
    torch.testing.assert_close(torch.stack(moved), expected, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("name", MATRIX)
def test_how_an_expert_without_tokens_moves_on(name: str) -> None:
    """Muon's steps have one size, whatever is left of the momentum; the others' fade with it.

    On a sphere a direction that stays is reached in the end, so that they get shorter as well.
    """
    weight = nn.Parameter(start_of(name, (2, 8, 12)))
    optimizer = optimizer_of(name, weight, weight_decay=0.0)
    constant, moved = torch.randn(2, 8, 12), []
    for step in range(70):
        before = weight.detach().clone()
        weight.grad = constant + torch.randn_like(constant)
        weight.grad[1] *= step < 20
        optimizer.step()
        moved.append((weight.detach() - before)[1].norm())
    left = float(moved[-1] / moved[19])
    assert (0.5 if name in SPHERES else 0.95) < left < 1.05 if name in FULL_STEPS else left < 0.5


@pytest.mark.parametrize("name", MATRIX)
def test_an_expert_that_never_had_tokens_stays_finite_and_wakes(name: str) -> None:
    weight = nn.Parameter(torch.ones(2, 4, 5))
    optimizer = optimizer_of(name, weight, weight_decay=0.0)
    for step in range(12):
        weight.grad = torch.randn_like(weight)
        if step < 7:
            weight.grad[1] = 0
        optimizer.step()
        assert weight.isfinite().all()
        assert torch.equal(weight[1], torch.ones(4, 5)) == (step < 7)
        assert (weight[1] - 1).abs().max() < 0.2


@pytest.mark.parametrize("name", MATRIX)
def test_a_rate_of_zero_changes_nothing(name: str) -> None:
    """It is how torch makes the states that a checkpoint is read into."""
    weight = nn.Parameter(torch.randn(3, 4, 5))
    optimizer = optimizer_of(name, weight)
    optimizer.param_groups[0]["lr"] = 0.0
    before = weight.detach().clone()
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(weight, before)
    assert optimizer.state[weight]["clock"] == 0


def test_roots_of_different_tensors_come_on_different_steps() -> None:
    weights = [nn.Parameter(torch.randn(2, 4, 5)) for _ in range(4)]
    optimizer = OPTIMIZERS["shampoo"](
        [{"name": "expert", "params": weights}], precondition_frequency=8, stagger_roots=True
    )
    changed = []
    for step in range(1, 25):
        before = [optimizer.state[p]["root_left_0"].clone() if optimizer.state[p] else None for p in weights]
        for p in weights:
            p.grad = torch.randn_like(p)
        optimizer.step()
        for number, p in enumerate(weights):
            if before[number] is not None and not torch.equal(before[number], optimizer.state[p]["root_left_0"]):
                changed.append((step, number))
    assert changed == [(8, 0), (10, 1), (12, 2), (14, 3), (16, 0), (18, 1), (20, 2), (22, 3), (24, 0)]


@pytest.mark.parametrize("share_factors", [False, True])
def test_reduced_precision_is_close(share_factors: bool) -> None:
    """Products are in bfloat16, factors those of float32 to the bit, and so are roots until they are rounded."""
    weights = [nn.Parameter(torch.ones(2, 16, 12)) for _ in range(2)]
    optimizers = [
        optimizer_of("shampoo", p, matmul_dtype=dtype, epsilon=1e-6, share_factors=share_factors)
        for p, dtype in zip(weights, ("float32", "bfloat16"), strict=True)
    ]
    for _ in range(8):
        gradient = torch.randn(2, 16, 12)
        for p, optimizer in zip(weights, optimizers, strict=True):
            p.grad = gradient
            optimizer.step()
    moved, other = (p.detach() - 1 for p in weights)
    assert (moved - other).norm() < 0.05 * moved.norm()
    assert not torch.equal(moved, other)
    exact, rounded = (optimizer.state[p] for p, optimizer in zip(weights, optimizers, strict=True))
    for side in ("left_0", "right_0"):
        assert torch.equal(exact[side], rounded[side])
        assert torch.equal(exact[f"root_{side}"].bfloat16(), rounded[f"root_{side}"])


@pytest.mark.parametrize(("has_bf16", "like"), [(True, "bfloat16"), (False, "float32")])
def test_products_in_a_fast_type(has_bf16: bool, like: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset multiplies in bfloat16 where a CPU has instructions for it; its state is float32 on every machine."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has_bf16})
    weights = [nn.Parameter(torch.ones(2, 16, 12)) for _ in range(3)]
    optimizers = [
        OPTIMIZERS["shampoo_fast"]([{"params": [p]}], start_preconditioning_step=1, stagger_roots=False, **dtype)
        for p, dtype in zip(weights, ({}, {"matmul_dtype": "float32"}, {"matmul_dtype": "bfloat16"}), strict=True)
    ]
    gradient = torch.randn(2, 16, 12)
    for p, optimizer in zip(weights, optimizers, strict=True):
        p.grad = gradient.clone()
        optimizer.step()
    auto, float32, bfloat16 = weights

    # the roots of "bfloat16" are rounded as they are kept, those of "auto" as they are multiplied: the same numbers
    assert torch.equal(auto, {"float32": float32, "bfloat16": bfloat16}[like])
    assert not torch.equal(float32, bfloat16)
    assert {value.dtype for value in optimizers[0].state[auto].values()} == {torch.float32}


SMALL = """
[model]
dim = 16
num_layers = 1
num_heads = 2
vocab_size = 64
[moe]
num_experts = 4
expert_dim = 8
[optimizer]
lr = 0.01
beta2 = 0.9
[optimizer.expert]
name = "shampoo"
precondition_frequency = 2
load_lr = "ideal_normalized"
[optimizer.dense]
name = "muon"
lr = 0.02
"""


def configured(tmp_path: Any, *args: str) -> tuple[Any, Any, Any]:
    file = tmp_path / "x.toml"
    file.write_text(SMALL)
    config = load_config([f"--job.config_file={file}", *args])
    model = build_model(config)
    model.init_weights(0)
    return config, model, build_optimizer(config, model)


def test_groups_name_their_optimizers(tmp_path: Any) -> None:
    config, _, optimizer = configured(tmp_path)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert {name: describe_group(optimizer, group) for name, group in groups.items()} == {
        "expert": "shampoo",
        "router": "AdamW",
        "embedding": "AdamW",
        "norm": "AdamW",
        "dense": "muon",
    }
    assert (groups["expert"]["lr"], groups["expert"]["betas"], groups["expert"]["precondition_frequency"]) == (
        0.01,
        (0.9, 0.9),
        2,
    )
    assert (groups["dense"]["lr"], groups["dense"]["momentum"]) == (0.02, 0.95)
    assert kind_of(optimizer) == "shampoo (expert) + AdamW (router, embedding, norm) + muon (dense)"
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    assert load_config([f"--job.config_file={again}"]).optimizer == config.optimizer
    changed = load_config([f"--job.config_file={again}", "--optimizer.expert.name=muon"])
    assert changed.optimizer.groups["expert"] == {"name": "muon", "load_lr": "ideal_normalized"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--optimizer.expert.name=shampo"],
            "optimizer.expert.name = 'shampo': unknown component; did you mean 'shampoo'",
        ),
        (
            ["--optimizer.expert.name=muon", "--optimizer.expert.epsilon=1"],
            "epsilon: unknown argument here; it belongs to",
        ),
        (["--optimizer.expert.precondition_frequency=0"], "precondition_frequency = 0: must be greater than or equal"),
        (["--optimizer.expert.start_preconditioning_step=0"], "must be -1 or greater than 0"),
        (["--optimizer.expert.epsilon=0"], "must be greater than 0"),
        (["--optimizer.expert.grafting=sgd"], "must be 'adamw' or 'none'"),
        (["--optimizer.expert.matmul_dtype=float16"], "must be 'auto', 'float32' or 'bfloat16'"),
        (["--optimizer.router.precondition_frequency=5"], "unknown argument here; it belongs to shampoo"),
        (
            ["--optimizer.embedding.name=muon"],
            "it updates matrices, but the embedding group is always updated by element",
        ),
        (["--optimizer.norm.name=muonh"], "set it to one of adamw, ademamix, lion"),
        (["--optimizer.dense.coefficients=taylor"], "must be 'jordan' or 'polar_express'"),
        (["--optimizer.dense.ns_steps=21"], "ns_steps = 21: must be less than or equal to 20"),
        (["--optimizer.router.name=ademamix", "--optimizer.router.beta3=1"], "beta3 = 1: must be less than 1"),
        (["--optimizer.router.name=ademamix", "--optimizer.router.alpha=-1"], "alpha = -1: must be greater than or"),
        (["--optimizer.router.name=ademamix", "--optimizer.router.alpha_warmup=-1"], "alpha_warmup = -1: must be"),
        (["--optimizer.router.name=lion", "--optimizer.router.eps=1e-6"], "eps: unknown argument here"),
        (["--optimizer.expert.name=muonh", "--optimizer.expert.adjust_lr=original"], "adjust_lr: unknown argument"),
        (["--optimizer.norm.name=soap"], "optimizer.norm.name = 'soap': it updates matrices, but the norm group"),
        (["--checkpoint.exclude=model"], "checkpoint.exclude = model: item 1 must be 'optimizer'"),
    ],
)
def test_configuration_refuses(tmp_path: Any, args: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=r"\w") as caught:
        configured(tmp_path, *args)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def run(model: Any, optimizer: Any, steps: range) -> list[Tensor]:
    losses = []
    for step in steps:
        output = train_step(model, [batch(step)], optimizer, balancers(False), [], max_norm=1.0)
        losses.append(output.loss)
    return losses


METAS = [f"--optimizer.{group}.name=distributed_shampoo" for group in ("expert", "dense")]
RESUMED = [
    [],
    *([f"--optimizer.{group}.name={name}" for group in ("expert", "dense")] for name in (*MATRIX, *BY_ELEMENT)),
    [*METAS, "--optimizer.dense.precondition_frequency=2"],
]


@pytest.mark.parametrize("args", RESUMED)
def test_resume_is_bit_for_bit(tmp_path: Any, args: list[str]) -> None:
    if "distributed_shampoo" in str(args):
        pytest.importorskip("distributed_shampoo")
    _, model, optimizer = configured(tmp_path, *args)
    run(model, optimizer, range(3))
    save_checkpoint(tmp_path, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    expected = run(model, optimizer, range(3, 6))
    _, again, fresh = configured(tmp_path, *args)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=fresh)
    assert torch.equal(torch.stack(run(again, fresh, range(3, 6))), torch.stack(expected))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_resumed_run_has_the_settings_of_its_configuration(tmp_path: Any) -> None:
    """With job.allow_config_change another momentum than that of the checkpoint: what transforms were made with too."""
    name, momentum = "--optimizer.dense.name=muon", "--optimizer.dense.momentum="
    config, model, optimizer = configured(tmp_path, name, momentum + "0.9")
    run(model, optimizer, range(2))
    extra = {"data": {}}
    save_checkpoint(tmp_path, 2, model=model, optimizer=optimizer, extra=extra, files={}, keep_latest_k=0)

    config, again, fresh = configured(tmp_path, name, momentum + "0.5")
    data = SimpleNamespace(train=SimpleNamespace(load_state_dict=lambda state: None))
    load_run(SimpleNamespace(config=config, model=again, optimizer=fresh, data=data), tmp_path / "step-2")  # pyrefly: ignore
    weight = again.layers[0].attention.wq.weight
    before = fresh.state[weight]["momentum_buffer"].clone()
    weight.grad = torch.randn(weight.shape)
    fresh.step()
    torch.testing.assert_close(fresh.state[weight]["momentum_buffer"], (before + weight.grad) / 2)


def test_another_optimizer_does_not_resume(tmp_path: Any) -> None:
    _, model, optimizer = configured(tmp_path)
    run(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    _, other, muon = configured(tmp_path, "--optimizer.expert.name=muon")
    with pytest.raises(ValueError, match=r"holds another optimizer: .* there, muon .* set checkpoint\.exclude = "):
        load_checkpoint(tmp_path / "step-1", model=other, optimizer=muon)


def test_metas_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed_shampoo", None)
    with pytest.raises(ValueError, match=r"cannot be imported .*; pip install git\+https://.* name = 'shampoo'"):
        OPTIMIZERS["distributed_shampoo"]([{"params": [nn.Parameter(torch.ones(2, 2))]}])


@pytest.mark.parametrize("changes", [{}, {"max_preconditioner_dim": 5}, {"exponent": 0.5}])
def test_shampoo_equals_metas_package(changes: dict[str, Any]) -> None:
    """Skipped where it is not installed."""
    pytest.importorskip("distributed_shampoo")
    weights = [nn.Parameter(torch.ones(3, 8, 6)) for _ in range(2)]
    options = {"precondition_frequency": 5, "epsilon": 1e-6, **changes}
    optimizers = [
        OPTIMIZERS[name]([{"name": "expert", "params": [p]}], lr=1e-2, **options)
        for name, p in zip(("shampoo", "distributed_shampoo"), weights, strict=True)
    ]
    for _ in range(20):
        gradient = torch.randn(3, 8, 6)
        for p, optimizer in zip(weights, optimizers, strict=True):
            p.grad = gradient
            optimizer.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-5)
