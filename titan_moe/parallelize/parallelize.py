"""Parallelism, applied from outside, in one order: CP, TP, EP, activation checkpointing, compile, FSDP2."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_common import FSDPMeshInfo, HSDPMeshInfo
from torch.distributed.tensor import DTensor, Shard
from torch.utils._triton import has_triton

from titan_moe.model.moe import MoE
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.activation_checkpoint import checkpoint_block
from titan_moe.parallelize.context_parallel import apply_cp, local_rope, local_sequences
from titan_moe.parallelize.expert_parallel import apply_ep
from titan_moe.parallelize.mesh import Meshes
from titan_moe.parallelize.mixed_precision import LowPrecision
from titan_moe.parallelize.tensor_parallel import apply_tp
from titan_moe.runtime.compat import MESH_BY_PARAMETER, ShardPlacementResult
from titan_moe.runtime.machine import c_compiler

Reshard = Literal["default", "always", "never"]  # torchtitan's names


def parallelize(
    model: Transformer,
    *,
    mesh: Meshes | None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    checkpoint_mode: str,
    compile_blocks: bool,
    seq_len: int = 0,
    reshard_after_forward: Reshard = "default",
) -> None:
    """Parallelize `model` in place; with `mesh` None it stays whole, on one process.

    `seq_len`, of whole sequences, is needed with context parallelism.
    """
    if mesh is not None:
        apply_model_parallel(model, mesh, seq_len)

    # Checkpointing comes before compilation, which then sees what is saved and what computed again.
    has_dtensors = mesh is not None and (mesh.ep is not None or mesh.tp is not None)
    for name, block in model.layers.named_children():
        wrapped = checkpoint_block(block, checkpoint_mode, keep_random=compile_blocks and has_dtensors)
        model.layers.register_module(name, wrapped)
    if compile_blocks:
        apply_compile(model, mesh)

    # What casts parameters comes last, so that its hooks stay outside of the graphs.
    if mesh is None:
        if any(parameter.dtype != param_dtype for parameter in model.parameters()):
            model.low_precision = LowPrecision(model, param_dtype)
    else:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        apply_fsdp(model, mesh, policy, reshard_after_forward)


def apply_model_parallel(model: Transformer, mesh: Meshes, seq_len: int) -> None:
    """Apply context, tensor and expert parallelism, as far as the mesh has their axes."""
    if mesh.sequence is not None:
        model.rope = local_rope(cp=mesh.cp, tp=mesh.tp)
        model.sequences = local_sequences(mesh.sequence, cp=mesh.cp, tp=mesh.tp)
    if mesh.cp is not None:
        apply_cp(model, mesh.cp, seq_len)
    if mesh.tp is not None:
        apply_tp(model, mesh.tp)
    if mesh.ep is not None:
        apply_ep(model, mesh.ep)


def apply_compile(model: Transformer, mesh: Meshes | None) -> None:
    """Compile every layer into one graph, and the softmax of the loss."""
    torch._dynamo.config.capture_scalar_outputs = True  # the split sizes of dispatch are numbers in the graph

    # All layers are one piece of code to torch, which ends a run at its 9th graph of it. There are more: dense and MoE
    # layers, with gradients and without, another router to compare with, batches of one row, some or many.
    torch._dynamo.config.recompile_limit = 64

    # Experts that are an FSDP2 unit of their own have hooks inside the layer, which break its graph.
    is_one_graph = MESH_BY_PARAMETER or mesh is None or mesh.ep is None
    for name, block in model.layers.named_children():
        model.layers.register_module(name, cast(nn.Module, torch.compile(block, fullgraph=is_one_graph)))

    if MESH_BY_PARAMETER or torch.cuda.is_available():  # the C++ of torch 2.11 for it is wrong
        model.softmax_ = torch.compile(model.softmax_, fullgraph=True)


def missing_compiler(device: torch.device) -> str | None:
    """What torch.compile needs to make code for the device and this machine lacks; None where all is there."""
    if device.type == "cuda":
        if not has_triton():
            return "no Triton for this GPU: pip install triton"
        return None if c_compiler() else "no C compiler (gcc, clang or $CC), which Triton needs"
    from torch._inductor import cpp_builder, exc  # a second of imports, which only torch.compile is worth

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "no C++ compiler (g++ or $CXX)"
    return None


def apply_fsdp(model: Transformer, mesh: Meshes, policy: MixedPrecisionPolicy, reshard_after_forward: Reshard) -> None:
    """Apply FSDP2 to every block and to the rest of the model.

    A block is one unit, whose experts (EP) and matrices (TP) are sharded over meshes of their own; below torch 2.13 a
    unit has one mesh, and experts over `ep` are a unit of their own. Gradients are summed, not averaged, over ranks:
    the loss is already divided by the step's global token count, so all gradients are right whatever the layout.

    Between forward and backward the gathered parameters of blocks are freed; with `always` also those of the rest,
    which backward gathers again at once, with `never` none. To free them saves next to nothing where there is one
    rank to shard over, so that `default` is `never` there.
    """
    num_shards = mesh.dense["dp_shard"].size() if mesh.dense.ndim > 1 else mesh.dense.size()
    if reshard_after_forward == "default" and num_shards == 1:
        reshard_after_forward = "never"
    model.keeps_gathered = reshard_after_forward == "never"

    # Activations come in the parameters' type already; the cast would only take the rotary angles out of fp32.
    block_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    frees_blocks = reshard_after_forward != "never"

    # Inner units first: FSDP2 leaves out of a unit the parameters that belong to one already.
    if mesh.efsdp is not None and not MESH_BY_PARAMETER:
        for layer in model.modules():
            if isinstance(layer, MoE):
                fully_shard(layer.experts, mesh=mesh.efsdp, mp_policy=block_policy, reshard_after_forward=frees_blocks)
    placement = placements(model, mesh) if MESH_BY_PARAMETER else None
    for block in model.layers.children():
        fully_shard(
            block,
            mesh=mesh.dense,
            mp_policy=block_policy,
            shard_placement_fn=placement,
            reshard_after_forward=frees_blocks,
        )
    fully_shard(model, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=reshard_after_forward == "always")

    # Sums, not averages. The plain sum is forced because gloo has none that multiplies first.
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Say whether the next forward and backward are the step's last: FSDP2 puts off until then what can wait.

    Replicas (HSDP) sum their gradients once a step. A model that keeps gathered parameters until backward also keeps
    them from one micro-batch to the next, adds up whole gradients, in the type of their reduction, and reduces them
    once. That takes as much memory as all gradients do on one rank, so by default each micro-batch's are reduced.
    """
    if getattr(model, "low_precision", None) is not None:
        cast(Any, model).low_precision.is_last = last
    if not isinstance(model, FSDPModule):
        return
    if cast(Any, model).keeps_gathered:
        model.set_is_last_backward(last)
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    else:
        model.set_requires_all_reduce(last)


def move_for_inference(model: nn.Module, device: torch.device, param_dtype: torch.dtype) -> nn.Module:
    """Move a whole model of fp32 to where it is evaluated, on a GPU in the type that training multiplied in.

    In fp32 the experts' products are a loop there that waits for the device. The selection biases stay in fp32.
    """
    if device.type != "cpu":
        cast_parameters(model, param_dtype)
    return model.to(device)


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Parameters in another type; buffers stay: a selection bias of bf16 would lose most of its small steps."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def reshard(model: nn.Module) -> None:
    """Free parameters that a forward pass without a backward has left gathered; nothing where nothing is sharded."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def placements(model: nn.Module, mesh: Meshes) -> Callable[[nn.Parameter], Any] | None:
    """Where FSDP2 shards what `ep` and `tp` have sharded: over the axes that are left. The rest goes over all ranks."""
    assert ShardPlacementResult is not None
    experts = {p for layer in model.modules() if isinstance(layer, MoE) for p in layer.experts.parameters()}
    matrices = {p for p in model.parameters() if isinstance(p, DTensor)} - experts

    # dim 0 again, so that ranks have whole experts, as optimizers of matrices need them
    by_parameter: dict[nn.Parameter, Any] = {}
    for parameters, axes_left in ((experts, mesh.efsdp), (matrices, mesh.tfsdp)):
        if axes_left is not None:
            by_parameter |= dict.fromkeys(parameters, ShardPlacementResult(Shard(0), mesh_info(axes_left)))
    return by_parameter.get if by_parameter else None


def mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    """A mesh of one axis to shard over, or of two: replicas, then shards."""
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, replicate_mesh_dim=0, shard_mesh_dim=1)
