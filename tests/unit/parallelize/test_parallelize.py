"""Degrees, meshes' errors, selective checkpointing, and what waits for the device, without other processes."""

import traceback
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests.tiny import balancers, batch, tiny_model
from titan_moe.model.attention import rope_cos_sin
from titan_moe.model.rope import Rotation
from titan_moe.model.routing import ROUTERS
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer import optimizer as optimizers
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.owners import find_owners
from titan_moe.parallelize import expert_parallel
from titan_moe.parallelize.activation_checkpoint import checkpoint_block
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.parallelize.mesh import Degrees, build_mesh, resolve_degrees
from titan_moe.parallelize.parallelize import move_for_inference, parallelize
from titan_moe.records import train_record
from titan_moe.runtime import dtensor
from titan_moe.runtime.compat import MESH_BY_PARAMETER
from titan_moe.runtime.watch import PACKAGE
from titan_moe.step import train_step


def resolve(world: int, **degrees: int) -> Degrees:
    return resolve_degrees(world_size=world, **{"replicate": 1, "shard": -1, "num_experts": 8, **degrees})


def test_degrees_are_filled_in() -> None:
    assert resolve(1) == Degrees(1, 1, 1)
    assert resolve(8, expert=4) == Degrees(1, 8, 4)
    assert resolve(8, replicate=2, expert=4) == Degrees(2, 4, 4)
    assert resolve(16, num_experts=0) == Degrees(1, 16, 1)
    assert resolve(16, context=2, tensor=4, replicate=2) == Degrees(2, 1, 1, 2, 4)
    assert resolve(8, context=2, tensor=2, expert=8) == Degrees(1, 2, 8, 2, 2)
    assert resolve(16, num_experts=3) == Degrees(1, 16, 1)  # FSDP2 alone takes any number of experts


@pytest.mark.parametrize(
    ("world", "degrees", "parts"),
    [
        (4, {"shard": 3}, ["data_parallel_shard_degree (3)", "processes (4)", "nproc_per_node"]),
        (4, {"replicate": 3}, ["data_parallel_replicate_degree (3)", "processes (4)"]),
        (2, {"replicate": 4}, ["data_parallel_replicate_degree (4)", "processes (2)"]),
        (2, {"expert": 2, "num_experts": 0}, ["expert_parallel_degree (2)", "num_experts is 0"]),
        (3, {"expert": 3}, ["expert_parallel_degree (3)", "must divide moe.num_experts (8)"]),
        (2, {"expert": 4}, ["expert_parallel_degree (4)", "must divide data_parallel_shard_degree (2)"]),
        (
            4,
            {"replicate": 2, "expert": 4},
            ["expert_parallel_degree (4)", "must divide data_parallel_shard_degree (2)"],
        ),
        (4, {"shard": 4, "context": 2}, ["shard_degree (4) x context_parallel_degree (2)", "processes (4)"]),
        (2, {"tensor": 4}, ["shard_degree (1) x tensor_parallel_degree (4)", "processes (2)"]),
        (4, {"tensor": 2, "expert": 8}, ["must divide", "shard_degree (2) x tensor_parallel_degree (2)"]),
        (16, {"tensor": 2, "expert": 8}, ["shard_degree (8) x tensor_parallel_degree (2)", "num_experts (8)"]),
        (16, {"expert": 8}, ["data_parallel_shard_degree (16)", "num_experts (8)", "raise data_parallel_replicate"]),
    ],
)
def test_degrees_that_do_not_fit_are_refused(world: int, degrees: dict[str, int], parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:  # noqa: PT011
        resolve(world, **degrees)
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize("degrees", [Degrees(2, 2), Degrees(context=2, tensor=2), Degrees(2, 1, 1, 3, 2)])
def test_parts_of_sequences(degrees: Degrees) -> None:
    """Each token is on one process of a group, and a causal mask gives all processes of the cp axis the same work."""
    parts = [own_positions(24, rank, degrees) for rank in range(degrees.replicate * degrees.per_replica)]
    if degrees.per_sequence == 1:
        assert parts == [None] * 4
        return
    for group in range(degrees.data):
        own = parts[group * degrees.per_sequence : (group + 1) * degrees.per_sequence]
        assert torch.equal(torch.cat([p for p in own if p is not None]).sort().values, torch.arange(24))
    work = torch.stack([p for p in parts if p is not None]).view(degrees.data, degrees.context, -1).sum(-1)
    assert work.unique().numel() == 1


def gradients(mode: str) -> dict[str, Tensor]:
    """Gradients of a layer in which all experts are equally good, so that noise of 1e-7 decides.

    The noise is another one whenever it is computed again, as a GPU's sums may have it.
    """
    model = tiny_model(num_layers=1, expert_bias=False)
    model.init_weights(0)
    moe: Any = model.layers[0].moe
    moe.router.weight.data.zero_()
    route, calls = ROUTERS["topk_softmax"](top_k=2), [0]
    moe.route = lambda logits, bias: route(logits + unsteady_noise(logits, calls), bias)
    x = torch.randn(2, 16, 16, generator=torch.Generator().manual_seed(0))
    y, *_ = checkpoint_block(model.layers[0], mode)(x, rope_cos_sin(16, Rotation(8, 1e4), x.device))
    y.square().sum().backward()
    assert calls[0] == (1 if mode == "none" else 2)
    return {name: p.grad for name, p in model.layers[0].named_parameters() if p.grad is not None}


def unsteady_noise(logits: Tensor, calls: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(calls[0])
    calls[0] += 1
    return 1e-7 * torch.randn(logits.shape, generator=generator)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointing_keeps_the_choice_of_experts(mode: str) -> None:
    want = gradients("none")
    got = {plain_name(name): value for name, value in gradients(mode).items()}
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:.*Function'> should not be instantiated:DeprecationWarning"
)  # torch's own, in dynamo
@pytest.mark.parametrize("mode", ["selective", "full"])
def test_compiled_backward_does_not_choose_again(mode: str) -> None:
    graphs: list[set[Any]] = []

    def note(module: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append({node.target for node in module.graph.nodes})
        return make_boxed_func(module.forward)

    model = tiny_model(num_layers=1)
    model.init_weights(0)
    backend = aot_autograd(fw_compiler=note, partition_fn=min_cut_rematerialization_partition)
    x = torch.randn(2, 16, 16, requires_grad=True)
    block: Any = torch.compile(checkpoint_block(model.layers[0], mode), backend=backend, fullgraph=True)
    block(x, rope_cos_sin(16, Rotation(8, 1e4), x.device))[0].sum().backward()
    torch.compiler.reset()
    forward, backward = graphs
    aten = torch.ops.aten
    assert {aten.topk.default, aten.sort.stable, aten.rsqrt.default} <= forward
    assert aten.rsqrt.default in backward  # norms are made again
    assert not {aten.topk.default, aten.sort.stable, aten.sort.default} & backward


def test_models_are_evaluated_in_the_type_of_training_but_on_a_cpu() -> None:
    model = tiny_model()
    assert next(move_for_inference(model, torch.device("cpu"), torch.bfloat16).parameters()).dtype == torch.float32
    move_for_inference(model, torch.device("meta"), torch.bfloat16)  # stands for a GPU
    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    assert {(b.dtype, b.device.type) for b in model.buffers()} == {(torch.float32, "meta")}


# The functions that may read a tensor's value on the host, which waits for the device, in a training step.
ALLOWED_TO_WAIT = {
    "read_splits": "all-to-alls want their sizes on the host: once for each MoE layer and forward pass",
    "_is_refused": "a NaN would stay in factors of matrices: whether to step is known before",
}


@pytest.fixture
def four_ranks() -> Iterator[None]:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    yield
    dist.destroy_process_group()


def fake_step(checkpoint_mode: str, optimizer: str) -> None:
    """A whole step of rank 0 of 4, EP 2 x FSDP2 2, and all that is recorded of it; a read of a value raises."""
    with torch.device("meta"):
        model = tiny_model(device="meta")
    parallelize(
        model,
        mesh=build_mesh(device=torch.device("cpu"), shard=4, expert=2),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        checkpoint_mode=checkpoint_mode,
        compile_blocks=False,
    )
    by_load = expand_load_lr({"load_lr": "ideal_normalized", "load_lr_ema": 0.9}, top_k=2)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.to_empty(device="cpu")
        groups = parameter_groups(model.named_parameters(), {"expert": by_load if optimizer == "adamw" else {}})
        built = OPTIMIZERS[optimizer](groups, lr=1e-2)
        micro_batches = [batch(0, 2), batch(1, 2)]
        biases = model.expert_biases()
        output = train_step(model, micro_batches, built, balancers(), biases, max_norm=1.0, measure_experts=True)
        record = train_record(model, output, {"expert": 1e-2})
    assert record["grad_norm"].shape == record["param_norm"].shape == record["maxvio_batch"].shape == ()
    assert ("lr/expert_min" in record) == (optimizer == "adamw")
    assert "update_ratio" in record


def first_wait(checkpoint_mode: str, optimizer: str) -> str:
    """The name of the function of ours that waits first."""
    with pytest.raises(DataDependentOutputException) as error:
        fake_step(checkpoint_mode, optimizer)
    return [frame.name for frame in traceback.extract_tb(error.tb) if frame.filename.startswith(PACKAGE)][-1]


@pytest.mark.slow
@pytest.mark.usefixtures("four_ranks")
@pytest.mark.parametrize("checkpoint_mode", ["none", "selective", "full"])
def test_a_step_waits_for_the_device_only_where_it_must(checkpoint_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if checkpoint_mode != "none" and not MESH_BY_PARAMETER:
        pytest.skip("below torch 2.13 a checkpointed step does not survive the exception that tells of a wait")
    monkeypatch.setattr(dtensor, "compute_local_shape_and_global_offset", offsets_of_the_host)
    monkeypatch.setattr(optimizers, "find_owners", owners_of_the_host)
    waits = [first_wait(checkpoint_mode, "adamw")]
    # 2 sequences of 16 tokens with 2 experts each, dealt out evenly
    monkeypatch.setattr(expert_parallel, "read_splits", lambda sent, received: ([32, 32], [32, 32]))
    fake_step(checkpoint_mode, "adamw")
    waits += [first_wait(checkpoint_mode, "muon")]
    assert waits == list(ALLOWED_TO_WAIT)


def owners_of_the_host(matrices: Any) -> Any:
    """Owners are found when the optimizer is made, by tables of ranks, which are the host's on any device."""
    with unset_fake_temporarily():
        return find_owners(matrices)


def offsets_of_the_host(*args: Any) -> Any:
    """torch computes which rows are here by small tensors, which are the host's on any device."""
    with unset_fake_temporarily():
        return compute_local_shape_and_global_offset(*args)
