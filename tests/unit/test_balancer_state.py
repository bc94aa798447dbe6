"""Balancers that keep tensors of their own: what they see, when these change, and where they are saved."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.balancer import rprop
from tests.interop.models import configure
from tests.tiny import adamw, batch, tiny_model
from titan_moe.balancer import Balancer, no_loss
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, load_model, load_weights, save_checkpoint
from titan_moe.checkpoint.export import save_weights
from titan_moe.checkpoint.lazy import read_lazily
from titan_moe.config import to_toml
from titan_moe.convert.hf.convert import model_tensors, shapes_of
from titan_moe.convert.surgery import add_experts, change_experts, merge_experts, similarity, upcycle
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.step import train_step

NAME = "examples.balancer:rprop"
STATE = f"model.layers.0.moe.balancer_state.{NAME.replace('.', '/')}/sign"


def with_state(balancer: Balancer, name: str = NAME, **arguments: Any) -> Any:
    """A tiny model for a balancer."""
    model = tiny_model(balancer_inits={} if balancer.init is None else {name: balancer.init}, **arguments)
    model.init_weights(0)
    return model


def step(model: Any, balancer: Balancer, number: int = 1, name: str = NAME, **arguments: Any) -> Any:
    return train_step(
        model,
        [batch(number)],
        adamw(model),
        {name: (1.0, balancer)},
        model.expert_biases(),
        max_norm=1.0,
        step=number,
        balancer_states=model.balancer_states(),
        **arguments,
    )


def test_a_post_step_gets_what_it_names() -> None:
    seen: list[Any] = []

    def post_step(load: Tensor, expert_bias: Tensor, *, progress: float, step: int, unused: int = 3) -> Tensor:
        seen.append((tuple(load.shape), step, progress, unused))
        return expert_bias + 1

    balancer = Balancer(no_loss, post_step)
    model = with_state(balancer)
    step(model, balancer, 5, progress=0.25)
    assert seen == [((2, 4), 5, 0.25, 3)]
    assert all((bias == 1).all() for bias in model.expert_biases())


def counting(start: float = 3.0) -> Balancer:
    """Keeps a number and a matrix for each layer; both begin at `start`."""

    def init(num_experts: int) -> dict[str, Tensor]:
        return {"steps": torch.tensor(start), "pairs": torch.full((num_experts, 2), start)}

    def post_step(load: Tensor, expert_bias: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        assert state["steps"].shape == (2,)
        assert state["pairs"].shape == (2, 4, 2)
        return expert_bias, {"steps": state["steps"] + 1, "pairs": state["pairs"] * 2}

    return Balancer(no_loss, post_step, init=init)


def test_states_of_any_shape_begin_as_init_says() -> None:
    with torch.device("meta"):
        model = tiny_model(device="meta", balancer_inits={"counting": counting().init})
    model.to_empty(device="cpu")
    model.init_weights(0)
    state = model.balancer_states()["counting"]
    assert [value.item() for value in state["steps"]] == [3.0, 3.0]
    step(model, counting(), name="counting")
    assert [value.item() for value in state["steps"]] == [4.0, 4.0]
    assert all((value == 6.0).all() for value in state["pairs"])


def test_a_schedule_weighs_the_bias_alone() -> None:
    balancer = rprop(rate=1.0)
    full, half = with_state(balancer), with_state(balancer)
    step(full, balancer)
    step(half, balancer._replace(schedule=lambda progress: 0.5))
    for a, b in zip(full.expert_biases(), half.expert_biases(), strict=True):
        torch.testing.assert_close(b, a / 2)
    assert str(full.balancer_states()) == str(half.balancer_states())


def in_its_dict(load: Tensor, expert_bias: Tensor, state: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    state["sign"] = state["sign"] + 1
    return expert_bias + 1, state


@pytest.mark.parametrize(
    "balancer", [rprop(rate=1.0), Balancer(no_loss, in_its_dict, init=lambda n: {"sign": torch.zeros(n)})]
)
def test_a_step_that_is_skipped_changes_no_state(balancer: Balancer) -> None:
    model = with_state(balancer)
    step(model, balancer)
    before = [value.clone() for value in (*model.balancer_states()[NAME]["sign"], *model.expert_biases())]
    assert all(value.any() for value in before)
    handle = model.layers[1].attention.wo.register_forward_hook(lambda module, inputs, output: output * float("nan"))
    output = step(model, balancer, 2)
    handle.remove()
    assert output.skipped
    after = [*model.balancer_states()[NAME]["sign"], *model.expert_biases()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


# Checkpoints, conversions and surgery


KEEPS: dict[str, Any] = {"moe.num_experts": 4, f"balancer.{NAME}.rate": 0.1}
KEEPS_NONE: dict[str, Any] = {"moe.num_experts": 4, "balancer.loss_free.rate": 0.1}


def trained(folder: Path, words: dict[str, Any]) -> tuple[Path, Any]:
    """A checkpoint whose states and biases are random numbers, and its model."""
    config = configure(**words)
    model = build_model(config)
    model.init_weights(0)
    for value in model.buffers():
        value.normal_(generator=torch.Generator().manual_seed(value.numel()))
    files = {"config.toml": to_toml(config), "tokenizer.json": bytes_tokenizer().to_json()}
    arguments: dict[str, Any] = {"extra": {}, "files": files, "keep_latest_k": 0}
    return save_checkpoint(
        folder / "checkpoint", 7, model=model, optimizer=build_optimizer(config, model), **arguments
    ), model


def states(model: Any) -> list[Tensor]:
    return model.balancer_states()[NAME]["sign"]


def test_checkpoints_have_it(tmp_path: Path) -> None:
    saved, model = trained(tmp_path, KEEPS)
    assert STATE in read_lazily(saved)
    again, _ = load_model(saved, trust_components=["examples"])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(states(again), states(model), strict=True))
    exported = save_weights(
        tmp_path / "export", 7, model=model, dtype=torch.bfloat16, extra={}, files={"config.toml": saved.name}
    )
    assert {t.dtype for name, t in read_lazily(exported).items() if "moe.balancer" in name or "bias" in name} == {
        torch.float32
    }


def test_weights_without_it_begin_anew_but_a_run_does_not_go_on(tmp_path: Path, caplog: Any) -> None:
    old, _ = trained(tmp_path, KEEPS_NONE)
    config = configure(**KEEPS)
    model = build_model(config)
    model.init_weights(1)
    with pytest.raises(ValueError, match=r"another model: only here: model\.layers\.0\.moe\.balancer_state"):
        load_checkpoint(old, model=model, optimizer=build_optimizer(config, model))
    with caplog.at_level("WARNING", logger="titan_moe"):
        load_weights(old, model=model, strict=True)
    assert "this run keeps its initial layers.0.moe.balancer_state.examples/balancer:rprop/rate" in caplog.text
    assert not any(value.any() for value in states(model))
    assert all(bias.any() for bias in model.expert_biases())

    new, with_it = trained(tmp_path / "new", KEEPS)
    caplog.clear()
    load_weights(new, model=model, strict=True)
    assert all(torch.equal(a, b) for a, b in zip(states(model), states(with_it), strict=True))
    without = build_model(configure(**KEEPS_NONE))
    with caplog.at_level("WARNING", logger="titan_moe"):
        load_weights(new, model=without, strict=True)
    assert "this run does not use its layers.0.moe.balancer_state" in caplog.text


def test_a_state_of_another_size_is_refused(tmp_path: Path) -> None:
    """As of a balancer whose code has changed since."""
    saved, _ = trained(tmp_path, KEEPS)
    config = configure(**KEEPS)
    model = build_model(config)
    wide = model.moe_layers()[1].balancer_state
    assert wide is not None
    wide.register_buffer(STATE.rpartition(".")[2], torch.zeros(4, 2))
    with pytest.raises(ValueError, match=r"another model: model\.layers\.1\..*/sign is \(4,\) there, \(4, 2\) here$"):
        load_checkpoint(saved, model=model, optimizer=build_optimizer(config, model))


def test_conversions_leave_it_out(tmp_path: Path) -> None:
    saved, _ = trained(tmp_path, KEEPS)
    config = configure(**KEEPS)
    assert not [name for name in (*model_tensors(saved), *shapes_of(config)) if "balancer_state" in name]
    assert "layers.0.moe.expert_bias" in model_tensors(saved)


def test_surgery_carries_its_rows(tmp_path: Path) -> None:
    saved, model = trained(tmp_path, KEEPS)
    load = torch.tensor([5, 0, 9, 3])
    options: dict[str, Any] = {"overrides": [], "trust_components": ["examples"]}

    change_experts(saved, tmp_path / "more", lambda _: [add_experts(load, 6, noise=0.5)] * 2, **options)
    more, _ = load_model(tmp_path / "more", trust_components=["examples"])
    old, new = states(model)[0], states(more)[0]
    assert torch.equal(new, old[[0, 1, 2, 3, 2, 0]])

    def merged(tensors: Any) -> Any:
        return [merge_experts(load, 3, similarity(tensors, layer)) for layer in range(2)]

    change_experts(saved, tmp_path / "fewer", merged, **options)
    fewer, _ = load_model(tmp_path / "fewer", trust_components=["examples"])
    assert states(fewer)[0].shape == (3,)


def test_upcycling_begins_anew(tmp_path: Path) -> None:
    saved, _ = trained(tmp_path, {"moe.num_experts": 0})
    words = ["--moe.num_experts=4", "--moe.top_k=2", f"--balancer.{NAME}.rate=0.1"]
    upcycle(saved, tmp_path / "moe", granularity=1, noise=0.0, overrides=words, trust_components=["examples"])
    [made] = (tmp_path / "moe" / "checkpoint").glob("step-7")
    assert not read_lazily(made)[STATE].load().any()
    load_model(made, trust_components=["examples"])
