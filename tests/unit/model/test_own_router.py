"""Routers with parameters of their own, and routers that see more than logits and bias."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from examples.router import DistanceLogits, nearest
from tests.interop.models import configure
from tests.tiny import batch, steps, tiny_model
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_model, save_checkpoint
from titan_moe.config import to_toml
from titan_moe.convert.hf.convert import to_hf
from titan_moe.convert.megatron.convert import to_megatron
from titan_moe.convert.surgery import add_experts, change_experts
from titan_moe.diagnostics import balance_tax
from titan_moe.model.routing import ROUTERS, ParametricRouter, Router, Routing, force_balanced

WORDS = {"router.name": "examples.router:nearest", "router.latent_dim": 8, "moe.num_experts": 4}


def model_of(router: Router | ParametricRouter, **arguments: Any) -> Any:
    model = tiny_model(router=router, **arguments)
    model.init_weights(0)
    return model


def test_the_logits_are_distances() -> None:
    model = model_of(nearest(top_k=2, latent_dim=8))
    inputs: list[Tensor] = []
    model.layers[0].moe.register_forward_pre_hook(lambda module, given: inputs.append(given[0]))
    _, (routing, _) = model(batch(0)[0])
    weights = {name: value.double() for name, value in model.layers[0].moe.router.named_parameters()}
    latent = inputs[0].flatten(0, 1).double() @ weights["project.weight"].t()
    distances = torch.cdist(latent, weights["vectors"]).square()
    differences = routing.router_logits - routing.router_logits[:, :1]
    torch.testing.assert_close(differences, (distances[:, :1] - distances).float(), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(routing.scores, (-distances / 0.07).softmax(-1).float(), rtol=1e-4, atol=1e-5)


def test_parameters_are_made_and_grouped_as_all_others() -> None:
    config = configure(**WORDS)
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    model.init_weights(3)
    router = model.layers[0].get_submodule("moe.router")
    assert router.get_parameter("scale").item() == 1.0
    assert router.get_parameter("vectors").std().item() == pytest.approx(0.02, rel=0.5)
    groups = {group["name"]: group["params"] for group in build_optimizer(config, model).param_groups}
    own = {id(p) for layer in model.moe_layers() for p in layer.router.parameters()}
    assert {id(p) for p in groups["router"]} == own
    assert len(own) == 6


def test_a_bias_of_a_router_begins_at_0_and_w2_is_not_residual() -> None:
    class Mlp(nn.Module):
        def __init__(self, dim: int, num_experts: int) -> None:
            super().__init__()
            self.w1, self.w2 = nn.Linear(dim, 64), nn.Linear(64, num_experts)

        def forward(self, x_TD: Tensor) -> Tensor:
            return self.w2(torch.relu(self.w1(x_TD)))

    model = model_of(ParametricRouter(ROUTERS["topk_softmax"](top_k=2), Mlp), init_std=0.5)
    router = model.layers[0].moe.router
    assert not router.w1.bias.any()
    assert router.w2.weight.std().item() == pytest.approx(0.5, rel=0.2)
    assert steps(model, 2)[-1].loss.isfinite()
    assert router.w1.bias.any()


def test_logits_are_fp32_whatever_the_parameters_are() -> None:
    model = model_of(nearest(top_k=2, latent_dim=8)).to(torch.bfloat16)
    tokens, labels = batch(0)
    loss, (routing, _) = model(tokens, labels)
    assert routing.router_logits.dtype == torch.float32
    loss.backward()
    assert model.layers[0].moe.router.vectors.grad.dtype == torch.bfloat16
    assert model.layers[0].moe.router.vectors.grad.any()


def seeing(top_k: int, seen: list[Any]) -> Router:
    """A router that takes all that is offered, in another order."""
    plain = ROUTERS["topk_softmax"](top_k=top_k)

    def route(logits: Tensor, bias: Tensor | None, layer: int, *, x: Tensor, router: nn.Module) -> Routing:
        seen.append((layer, tuple(x.shape), router))
        return plain(logits + layer * x.float().mean(-1, keepdim=True) * router.get_parameter("weight").mean(), bias)

    return route


def test_a_route_sees_what_it_names() -> None:
    seen: list[Any] = []
    model = model_of(seeing(2, seen))
    steps(model, 1)
    assert seen == [(number, (128, 16), model.layers[number].moe.router) for number in range(2)]
    balance_tax(model, *batch(0), repeats=1)
    tokens, labels = batch(0)
    _, routings = model_of(force_balanced(seeing(2, seen)))(tokens, labels)
    assert all((routing.tokens_per_expert == 64).all() for routing in routings)


def test_a_route_that_asks_for_what_there_is_not() -> None:
    def route(logits: Tensor, bias: Tensor | None, texts: Tensor) -> Routing:
        raise AssertionError

    with pytest.raises(
        ValueError, match="takes 'texts', which is not offered: x, router, layer, positions, document_ids are"
    ):
        tiny_model(router=route)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
def test_what_it_sees_is_in_the_graph() -> None:
    torch.compiler.reset()
    plain = ROUTERS["topk_softmax"](top_k=2)

    def route(logits: Tensor, bias: Tensor | None, x: Tensor, layer: int) -> Routing:
        return plain(logits + (layer + 1) * x.float().mean(-1, keepdim=True), bias)

    model, compiled = model_of(route), model_of(route)
    for name, block in compiled.layers.named_children():
        compiled.layers.register_module(name, torch.compile(block, fullgraph=True, backend="aot_eager"))
    for one, other in zip(steps(model, 2), steps(compiled, 2), strict=True):
        torch.testing.assert_close(one.loss, other.loss)
        assert torch.equal(one.load, other.load)


def checkpoint(folder: Path) -> Path:
    config = configure(**WORDS)
    model = build_model(config)
    model.init_weights(0)
    files = {"config.toml": to_toml(config)}
    return save_checkpoint(folder, 3, model=model, optimizer=None, extra={}, files=files, keep_latest_k=0)


def test_its_checkpoint_loads(tmp_path: Path) -> None:
    model, _ = load_model(checkpoint(tmp_path), trust_components=["examples"])
    assert isinstance(model.moe_layers()[0].router, DistanceLogits)


@pytest.mark.parametrize("convert", [to_hf, to_megatron])
def test_conversions_refuse_it(tmp_path: Path, convert: Any) -> None:
    saved = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"^router\.name = 'examples\.router:nearest'.* has no counterpart in "):
        convert(saved, tmp_path / "out", trust_components=["examples"])
    assert not (tmp_path / "out").exists()


def test_surgery_refuses_it(tmp_path: Path) -> None:
    saved, plans = checkpoint(tmp_path), partial(add_experts, torch.ones(4), 6, 0.0)
    with pytest.raises(ValueError, match=r"'examples\.router:nearest' has parameters of its own"):
        change_experts(saved, tmp_path / "out", lambda _: [plans()] * 2, [], ["examples"])
