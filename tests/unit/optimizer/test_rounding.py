"""States in bfloat16: what rounding does to a number and to a run, and that it depends on nothing but the element."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.cases import OPTIMIZER_NAMES
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.config import Config, load_config
from titan_moe.optimizer import rounding
from titan_moe.optimizer.build import OPTIMIZERS, optimizer_of
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.rounding import Place, keys_of, round_into
from titan_moe.optimizer.transform import ROUNDED, Tick, Transform

NAMES = [name for name in OPTIMIZER_NAMES if name != "distributed_shampoo"]
LOAD = torch.tensor([[3, 1, 0, 4]])


def place(*sizes: int, number: int = 0) -> Place:
    return Place(number, tuple(slice(0, size) for size in sizes))


def rounded(values: Tensor, step: int = 1, number: int = 0) -> Tensor:
    out = torch.empty_like(values, dtype=torch.bfloat16)
    keys = keys_of(place(*values.shape, number=number), torch.tensor(float(step)), 1)
    round_into(out, values.clone(), keys.rows, keys.columns_SN[0])
    return out


@pytest.mark.parametrize("value", [1.00123, -1.0077, 3e-39, 1.999, 2.5e30, 1.0000001])
def test_a_number_goes_to_either_neighbour_and_is_their_mean(value: float) -> None:
    values = torch.full((512, 512), value)
    mean = rounded(values).double().mean().item()
    exact = values[0, 0].item()
    below = (values[0, 0].view(torch.int32) & -0x10000).view(torch.float32).item()  # towards 0
    above = ((values[0, 0].view(torch.int32) & -0x10000) + 0x10000).view(torch.float32).item()
    assert set(rounded(values).double().unique().tolist()) <= {below, above}
    share = (exact - below) / (above - below)
    error = abs(above - below) * math.sqrt(share * (1 - share) / values.numel())
    assert abs(mean - exact) < 5 * error + 2**-16 * abs(above - below)


def test_every_part_of_a_unit_in_the_last_place_is_met() -> None:
    """A quarter above a neighbour goes up in a quarter of all cases, of each row and of each column."""
    for part in (0x1000, 0x4000, 0x8000, 0xF000):
        bits = torch.full((1024, 1024), 0x3F800000 + part, dtype=torch.int32)
        up = (rounded(bits.view(torch.float32)).float() > 1.0).double()
        for share, count in ((up.mean(0), 1024), (up.mean(1), 1024), (up.mean(), 1024**2)):
            p = part / 0x10000
            deviation = ((share - p) / math.sqrt(p * (1 - p) / count)).abs()
            assert deviation.max() < 6
            assert deviation.square().mean() < 16 if share.dim() == 0 else 0.8 < deviation.square().mean() < 1.25


def test_noise_of_steps_parameters_states_rows_and_columns_is_unrelated() -> None:
    values = torch.full((256, 256), 1.0 + 2**-8)  # halfway
    first = rounded(values).double() - values
    for other in (rounded(values, step=2), rounded(values, number=1), rounded(values).roll(1, 0), rounded(values).T):
        correlation = (first * (other.double() - values)).mean() / first.square().mean()
        assert abs(correlation) < 5 / 256
    keys = keys_of(place(256, 256), torch.tensor(1.0), 2)
    assert not (keys.columns_SN[0] == keys.columns_SN[1]).any()

    # as a matrix it is as small as independent numbers are: (sqrt(M) + sqrt(N)) times their deviation
    assert torch.linalg.matrix_norm(first, 2) < 1.3 * 2 * 16 * first.square().mean().sqrt()


def test_what_bfloat16_holds_stays() -> None:
    kept = torch.randn(64, 64).bfloat16()
    kept[0, :6] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 2.0**-133, -1e-39])
    kept[0, 6] = torch.finfo(torch.bfloat16).max
    for step in range(3):
        assert torch.equal(rounded(kept.float(), step).view(torch.int16), kept.view(torch.int16))


def test_nan_and_overflow() -> None:
    """The NaNs that processors make, a GPU's last; above bfloat16's largest number there is infinity."""
    bits = torch.tensor([0x7FC00000, -0x400000, 0x7FFFFFFF], dtype=torch.int32).repeat(4096)
    assert rounded(bits.view(torch.float32).view(3, 4096)).isnan().all()
    largest = rounded(torch.full((64, 64), 0x7F7F8000, dtype=torch.int32).view(torch.float32))
    assert set(largest.unique().tolist()) == {torch.finfo(torch.bfloat16).max, math.inf}


def test_a_parts_keys_are_a_part_of_the_keys() -> None:
    steps = torch.tensor([3.0, 5.0, 5.0, 9.0])
    whole = keys_of(place(4, 6, 10, number=7), steps, 2)
    part = keys_of(Place(7, (slice(1, 3), slice(2, 6), slice(5, 8))), steps[1:3], 2)
    assert torch.equal(part.rows.view(2, 4), whole.rows.view(4, 6)[1:3, 2:6])
    assert torch.equal(part.columns_SN, whole.columns_SN[:, 5:8])


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run("adamw", "bfloat16", steps=3)
    monkeypatch.setattr(rounding, "CPU_ELEMENTS", 16)
    pieces = run("adamw", "bfloat16", steps=3)
    for (a, of_a), (b, of_b) in zip(whole, pieces, strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(of_a[name], of_b[name]) for name in of_a)


def run(name: str, state_dtype: str, steps: int = 20, **load_lr: Any) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Weights and states of experts, a dense matrix and a vector after some steps on random gradients."""
    random = torch.Generator().manual_seed(0)
    shapes = {"layers.0.moe.experts.w1": (4, 16, 24), "layers.0.attention.wq.weight": (12, 8), "norm.weight": (9,)}
    weights = {key: nn.Parameter(torch.randn(shape, generator=random)) for key, shape in shapes.items()}
    own = {"expert": expand_load_lr(load_lr, top_k=2)} if load_lr else {}
    optimizer = OPTIMIZERS[name](parameter_groups(weights.items(), own), lr=1e-2, state_dtype=state_dtype)
    for _ in range(steps):
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=random)
        optimizer.step(load=LOAD)
    return [(weight.detach(), optimizer.state[weight]) for weight in weights.values()]


@pytest.mark.parametrize("load_lr", [{}, {"load_lr": "ideal_normalized"}], ids=["", "load_lr"])
@pytest.mark.parametrize("name", NAMES)
def test_every_optimizer_follows_fp32(name: str, load_lr: dict[str, Any]) -> None:
    for (exact, of_exact), (weight, state) in zip(
        run(name, "float32", **load_lr), run(name, "bfloat16", **load_lr), strict=True
    ):
        assert (weight - exact).norm() < 3e-3 * exact.norm()  # it has moved by a tenth of itself; Lion's signs may flip
        narrow = {key for key, value in state.items() if value.dtype == torch.bfloat16}
        assert narrow == set(state) & set(ROUNDED) != set()
        for key in narrow:
            assert state[key].nbytes * 2 == of_exact[key].nbytes
            if load_lr and weight.dim() == 3:
                assert not state[key][2].any()  # an expert without tokens


def test_float32_is_what_there_was() -> None:
    weights = {"norm.weight": nn.Parameter(torch.randn(9))}
    groups = parameter_groups(weights.items(), {"norm": {"state_dtype": "float32"}})
    for optimizer in (OPTIMIZERS["adamw"](groups), OPTIMIZERS["adamw"](groups, state_dtype="bfloat16")):
        assert "state_dtype" not in optimizer.param_groups[0]  # a group's own choice counts


def frozen_second_moment(state_dtype: str) -> tuple[float, float]:
    """Distance to the optimum, and mean second moment, where gradients are large at first and then small."""
    random = torch.Generator().manual_seed(0)
    weight, target = nn.Parameter(torch.zeros(16, 16)), torch.ones(16, 16)
    optimizer = OPTIMIZERS["adamw"](
        [{"name": "dense", "params": [weight]}], lr=1e-3, beta2=0.999, weight_decay=0.0, state_dtype=state_dtype
    )
    for step in range(3000):
        noise = torch.randn(16, 16, generator=random)
        weight.grad = noise * 10 if step < 100 else weight.detach() - target + 0.1 * noise
        optimizer.step()
    state = optimizer.state[weight]
    return (weight.detach() - target).square().mean().sqrt().item(), state["exp_avg_sq"].float().mean().item()


def test_beta2_of_0_999_needs_stochastic_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """To nearest the second moment stays where it was when it was large, and the weights hardly move any more."""
    distance, square = frozen_second_moment("float32")
    stochastic, stochastic_square = frozen_second_moment("bfloat16")
    monkeypatch.setattr(rounding, "round_into", lambda out, values, *_: out.view(values.shape).copy_(values))
    nearest, nearest_square = frozen_second_moment("bfloat16")
    assert stochastic == pytest.approx(distance, rel=0.02)
    assert stochastic_square == pytest.approx(square, rel=0.05)
    assert nearest > 1.2 * distance
    assert nearest_square > 5 * square


def test_a_step_that_is_not_finite_changes_no_bit() -> None:
    weight = nn.Parameter(torch.randn(6, 5))
    optimizer = OPTIMIZERS["adamw"]([{"name": "dense", "params": [weight]}], state_dtype="bfloat16")
    weight.grad = torch.randn(6, 5)
    optimizer.step()
    before = {name: value.clone() for name, value in optimizer.state[weight].items()}
    weight.grad = torch.full((6, 5), torch.nan)
    optimizer.step(finite=torch.tensor(False))
    assert all(torch.equal(value, before[name]) for name, value in optimizer.state[weight].items())


def test_weights_in_bfloat16() -> None:
    """The moments are then rounded stochastically, the weights to nearest, as torch's kernel does."""
    weight = nn.Parameter(torch.ones(64, 64, dtype=torch.bfloat16))
    optimizer = OPTIMIZERS["adamw"]([{"params": [weight]}], lr=0.25, weight_decay=0.0, state_dtype="bfloat16")
    weight.grad = torch.full((64, 64), 0.1, dtype=torch.bfloat16)
    optimizer.step()
    assert (weight == 0.75).all()
    assert optimizer.state[weight]["exp_avg_sq"].unique().numel() == 2


def nothing_to_round() -> Transform:
    def update(gradient: Tensor, state: dict[str, Tensor], tick: Tick) -> Tensor:
        return gradient

    return Transform(lambda weight: {}, update, rounded=())


@pytest.mark.parametrize(("name", "table"), [("dense", "optimizer.dense"), ("own", "optimizer.groups.own")])
def test_an_optimizer_may_refuse(name: str, table: str) -> None:
    groups = [{"name": name, "params": [nn.Parameter(torch.randn(3, 2))], "state_dtype": "bfloat16"}]
    message = f"[{table}] state_dtype = 'bfloat16': nothing_to_round keeps none of its states in bfloat16"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        optimizer_of(nothing_to_round)(groups)


def configured(*arguments: str) -> Config:
    small = {"vocab_size": 64, "num_layers": 1, "dim": 24, "num_heads": 2}
    return load_config([*(f"--model.{key}={value}" for key, value in small.items()), "--moe.expert_dim=16", *arguments])


def trained(config: Config, steps: range, folder: Path | None = None, start: Path | None = None) -> Any:
    model = build_model(config)
    model.init_weights(0)
    optimizer = build_optimizer(config, model)
    if start is not None:
        load_checkpoint(start / "step-2", model=model, optimizer=optimizer)
    for step in steps:
        for number, parameter in enumerate(model.parameters()):
            random = torch.Generator().manual_seed(1000 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
        if folder is not None and step == 1:
            save_checkpoint(folder, 2, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    return model, optimizer


@pytest.mark.parametrize("name", NAMES)
def test_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    config = configured(f"--optimizer.name={name}", "--optimizer.state_dtype=bfloat16")
    model, optimizer = trained(config, range(5), tmp_path)
    again, resumed = trained(config, range(2, 5), start=tmp_path)
    for a, b in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(value, resumed.state[b][key]) for key, value in optimizer.state[a].items())
        assert any(value.dtype == torch.bfloat16 for value in resumed.state[b].values())


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_torchs_state_dict_keeps_the_type(name: str) -> None:
    """torch gives loaded states the type of their parameter."""
    config = configured(f"--optimizer.name={name}", "--optimizer.state_dtype=bfloat16")
    _, optimizer = trained(config, range(2))
    _, other = trained(config, range(1))
    other.load_state_dict(optimizer.state_dict())
    for a, b in zip(optimizer.param_groups[0]["params"], other.param_groups[0]["params"], strict=True):
        for key, value in optimizer.state[a].items():
            assert other.state[b][key].dtype == value.dtype
            assert torch.equal(other.state[b][key], value)


@pytest.mark.parametrize("types", [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_another_type_is_another_optimizer(types: tuple[str, str], tmp_path: Path) -> None:
    before, now = (configured(f"--optimizer.expert.state_dtype={state_dtype}") for state_dtype in types)
    trained(before, range(2), tmp_path)
    side = "here" if types[1] == "bfloat16" else "there"
    with pytest.raises(ValueError, match=rf"only {side}: state_dtype; set checkpoint.exclude = \[\"optimizer\"\]"):
        trained(now, range(2, 3), start=tmp_path)
