"""Runs with a balancer that keeps a state: whole, and cut by a checkpoint."""

from pathlib import Path
from typing import Any

from torch import Tensor

from tests.interop.models import configure
from tests.tiny import VOCAB, batch
from titan_moe.build import build_balancers, build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.config import Config, to_toml
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.step import train_step

STEPS = 4


def start(name: str) -> tuple[Config, Any, Any]:
    """A configuration with that balancer, its model and its optimizer."""
    config = configure(**{"moe.num_experts": 4, f"balancer.{name}.rate": 0.05})
    model = build_model(config)
    model.init_weights(0)
    return config, model, build_optimizer(config, model)


def train(config: Config, model: Any, optimizer: Any, steps: range) -> None:
    assert config.model.vocab_size >= VOCAB
    for step in steps:
        options = {"max_norm": 1.0, "step": step, "balancer_states": model.balancer_states()}
        balancers = build_balancers(config)
        train_step(model, [batch(step)], optimizer, balancers, model.expert_biases(), **options)


def tensors(model: Any) -> list[Tensor]:
    states = [layer for state in model.balancer_states().values() for layers in state.values() for layer in layers]
    assert states
    return [*model.parameters(), *model.expert_biases(), *states]


def whole_run(name: str) -> list[Tensor]:
    """Every parameter, bias and state after all steps."""
    config, model, optimizer = start(name)
    train(config, model, optimizer, range(1, STEPS + 1))
    return tensors(model)


def after_a_restart(name: str, folder: Path) -> list[Tensor]:
    """The same of a run that saved in the middle, and of which the second half began with what was saved."""
    config, model, optimizer = start(name)
    train(config, model, optimizer, range(1, STEPS // 2 + 1))
    files = {"config.toml": to_toml(config), "tokenizer.json": bytes_tokenizer().to_json()}
    saved = save_checkpoint(
        folder / "checkpoint", 2, model=model, optimizer=optimizer, extra={}, files=files, keep_latest_k=0
    )
    _, model, optimizer = start(name)
    load_checkpoint(saved, model=model, optimizer=optimizer)
    train(config, model, optimizer, range(STEPS // 2 + 1, STEPS + 1))
    return tensors(model)
