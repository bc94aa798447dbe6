"""Parameters in fp32 and their copies in bf16, on one process: what FSDP2 does there, to the bit."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.tiny import SEQ, adamw, balancers, batch, tiny_model
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.mesh import Meshes, build_mesh
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.step import eval_step, train_step


@pytest.fixture
def mesh() -> Iterator[Meshes]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield build_mesh(device=torch.device("cpu"), shard=1)
    dist.destroy_process_group()


def build(mesh: Meshes | None, *, mode: str = "none", compile_blocks: bool = False, **options: Any) -> Transformer:
    model = tiny_model(device="meta", **options)
    types = {"param_dtype": torch.bfloat16, "reduce_dtype": torch.float32}
    parallelize(model, mesh=mesh, checkpoint_mode=mode, compile_blocks=compile_blocks, seq_len=SEQ, **types)
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model


def trained(model: Transformer, micro_batches: int, steps: int = 3) -> dict[str, torch.Tensor]:
    optimizer, numbers = adamw(model), []
    for step in range(steps):
        micro = list(zip(*(part.chunk(micro_batches) for part in batch(step)), strict=True))
        output = train_step(model, micro, optimizer, balancers(), model.expert_biases(), max_norm=0.1, step=step + 1)
        numbers += [output.loss, output.grad_norm]
        eval_step(model, *batch(step), torch.ones(1000, dtype=torch.int64))
        if model.low_precision is not None:
            assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
        else:
            for module in (model, *model.layers.children()):
                module.reshard()
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in model.named_parameters()}
    return {"numbers": torch.stack(numbers), **{name: p.detach().clone() for name, p in whole.items()}}


@pytest.mark.parametrize("mode", ["none", "selective", "full"])
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_equals_fsdp2_on_one_process(mesh: Meshes, micro_batches: int, mode: str):
    expected = trained(build(mesh, mode=mode), micro_batches)
    torch.testing.assert_close(trained(build(None, mode=mode), micro_batches), expected, rtol=0, atol=0)


@pytest.mark.parametrize("tie_embeddings", [False, True])
def test_shared_and_frozen_parameters(mesh: Meshes, tie_embeddings: bool):
    results = []
    for where in (mesh, None):
        model = build(where, tie_embeddings=tie_embeddings)
        results.append(trained(model, 2))
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


def test_frozen_parameters_stay_and_have_no_gradient():
    model = build(None)
    model.tok_embeddings.weight.requires_grad_(False)
    before = model.tok_embeddings.weight.clone()
    trained(model, 1)
    assert torch.equal(model.tok_embeddings.weight, before)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, as inductor starts
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
def test_compiled_layers_see_no_new_parameters():
    """Every step after the first finds its graph, although parameters come and go."""
    model = build(None, compile_blocks=True)
    trained(model, 1, steps=2)
    with torch.compiler.set_stance("fail_on_recompile"):
        trained(model, 1)


def test_a_forward_that_fails_leaves_the_parameters():
    model = build(None)
    with pytest.raises(IndexError):
        model(torch.full((1, 4), 10**6))
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def test_gradients_of_micro_batches_add_up_in_fp32():
    """Thousand copies of a gradient, of which bf16 would lose most."""
    linear = torch.nn.Linear(1, 1, bias=False)
    model: Any = linear
    from titan_moe.parallelize.mixed_precision import LowPrecision

    low = LowPrecision(model, torch.bfloat16)
    for number in range(1000):
        low.is_last = number == 999
        linear(torch.ones(1, 1, dtype=torch.bfloat16)).sum().backward()
    assert linear.weight.grad is not None
    assert linear.weight.grad.item() == 1000
