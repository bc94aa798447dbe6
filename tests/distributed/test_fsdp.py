"""FSDP2 on two processes equals one process: losses, gradient norms, loads, biases and parameters."""

import functools
from typing import Any

import pytest
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from tests.distributed.harness import run_ranks
from tests.tiny import adamw, balancers, batch, steps, tiny_model
from titan_moe.model.wrappers import plain_name
from titan_moe.parallelize import parallelize as parallelize_module
from titan_moe.parallelize.grad import param_norm
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.runtime.dtensor import gathered
from titan_moe.step import evaluate, train_step

STEPS = 4
OPTIONS = {
    "plain": {},
    "checkpointed": {"checkpoint_mode": "full"},
    "always resharded": {"reshard_after_forward": "always"},
    "never resharded": {"reshard_after_forward": "never"},
}


def sharded(world: int, *, replicate: int = 1, expert: int = 1, **options: Any) -> Any:
    model = tiny_model(device="meta")
    mesh = build_mesh(device=torch.device("cpu"), shard=world // replicate, replicate=replicate, expert=expert)
    defaults = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    parallelize(model, mesh=mesh, **{**defaults, "checkpoint_mode": "none", "compile_blocks": False, **options})
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model


def full(tensor: torch.Tensor) -> torch.Tensor:
    return gathered(tensor).detach().clone()


def summarize(model: Any, outputs: list[Any]) -> dict[str, Any]:
    names = ("loss", "total_loss", "grad_norm", "load", "num_tokens")
    parameters = {plain_name(name): full(value) for name, value in model.state_dict().items()}
    return {
        **{name: torch.stack([getattr(o, name) for o in outputs]) for name in names},
        **{name: torch.stack([o.routing_means[name] for o in outputs]) for name in outputs[0].routing_means},
        "aux_loss": torch.stack([o.balance_losses["aux_loss"] for o in outputs]),
        "parameters": parameters,
        "param_norm": param_norm(model.parameters()),
    }


def train_sharded(rank: int, world: int) -> dict[str, Any]:
    results = {}
    tokens, labels = (part.chunk(world)[rank] for part in batch(9))
    for name, options in OPTIONS.items():
        model = sharded(world, **options)
        # the micro-batches of both ranks together are the four of the single process
        outputs = steps(model, STEPS, micro_batches=2, rank=rank, world=world)
        results[name] = summarize(model, outputs)
        results[name]["evaluation"] = tuple(evaluate(model, [(tokens, labels)], torch.ones(64)))
        assert all(isinstance(p, DTensor) for p in model.parameters())  # sharded again, as a save needs them
    return results


@pytest.mark.dist
def test_two_ranks_equal_one() -> None:
    model = tiny_model()
    model.init_weights(0)
    alone = summarize(model, steps(model, STEPS, micro_batches=4))
    evaluation = evaluate(model, [batch(9)], torch.ones(64))
    results = run_ranks(2, train_sharded)
    for result in results:
        assert result.keys() == OPTIONS.keys()
        for own in result.values():
            # AdamW divides by the gradient's size: where that is near 0, round-off grows, here to 1 % of the rate
            torch.testing.assert_close(own.pop("parameters"), alone["parameters"], rtol=1e-4, atol=5e-5)
            torch.testing.assert_close(own.pop("evaluation"), tuple(evaluation), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(own, {name: alone[name] for name in own}, rtol=1e-5, atol=1e-7)


# Where a unit of FSDP2 has one mesh, as below torch 2.13, experts are units of their own with expert parallelism.
ONE_MESH: dict[str, dict[str, Any]] = {
    "ep2_fsdp2": {"expert": 2},
    "hsdp2_ep2": {"expert": 2, "replicate": 2},
    "ep4": {"expert": 4},
    "checkpointed": {"expert": 2, "checkpoint_mode": "full"},
    "never resharded": {"expert": 2, "reshard_after_forward": "never"},
    "traced": {"expert": 2, "compile_blocks": True},
}


def with_one_mesh(rank: int, world: int) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # whole graphs, without minutes of a compiler
    parallelize_module.MESH_BY_PARAMETER = False
    results = {}
    for name, options in ONE_MESH.items():
        model = sharded(world, **options)
        units = sum(isinstance(module, FSDPModule) for module in model.modules())
        assert units == 1 + 2 * 2  # the model, two blocks, the experts of each
        results[name] = summarize(model, steps(model, STEPS, micro_batches=1, rank=rank, world=world))
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_units_with_one_mesh_equal_one_process() -> None:
    model = tiny_model()
    model.init_weights(0)
    alone = summarize(model, steps(model, STEPS, micro_batches=4))
    for result in run_ranks(4, with_one_mesh):
        assert result.keys() == ONE_MESH.keys()
        for own in result.values():
            torch.testing.assert_close(own.pop("parameters"), alone["parameters"], rtol=1e-4, atol=5e-5)
            torch.testing.assert_close(own, {name: alone[name] for name in own}, rtol=1e-5, atol=1e-7)


def mixed_precision(rank: int, world: int) -> dict[str, Any]:
    model = sharded(world, param_dtype=torch.bfloat16)
    tokens, labels = (part.chunk(world)[rank] for part in batch(0))
    seen: list[torch.dtype] = []
    hook = lambda module, inputs: seen.extend([inputs[0].dtype, inputs[1][0].dtype])  # noqa: E731
    handle = model.layers[0].attention.register_forward_pre_hook(hook)
    logits, routings = model(tokens)
    handle.remove()
    output = train_step(model, [(tokens, labels)], adamw(model), balancers(), model.expert_biases(), max_norm=0.1)
    return {
        "inputs": seen,
        "logits": logits.dtype,
        "router": routings[0].router_logits.dtype,
        "master": next(model.parameters()).dtype,
        "loss": output.loss,
    }


@pytest.mark.dist
def test_mixed_precision_keeps_fp32_masters_and_router() -> None:
    model = tiny_model()
    model.init_weights(0)
    (alone,) = steps(model, 1)
    for result in run_ranks(2, mixed_precision):
        assert result["inputs"] == [torch.bfloat16, torch.float32]  # activations, rotary angles
        assert result["logits"] == torch.bfloat16
        assert result["router"] == result["master"] == torch.float32
        torch.testing.assert_close(result["loss"], alone.loss, rtol=1e-2, atol=0)
