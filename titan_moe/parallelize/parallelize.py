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

from titan_moe.model.attention import Attention
from titan_moe.model.moe import MoE
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.activation import checkpoint_block
from titan_moe.parallelize.expert import share_out_experts
from titan_moe.parallelize.mesh import Meshes
from titan_moe.parallelize.sequence import attend_to_all, rope_of_part
from titan_moe.parallelize.tensor import share_out_matrices
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
    has_shares = mesh is not None and (mesh.ep is not None or mesh.tp is not None)
    if mesh is not None:
        share_out(model, mesh, seq_len)
    for name, block in model.layers.named_children():
        wrapped = checkpoint_block(block, checkpoint_mode, keep_random=compile_blocks and has_shares)
        model.layers.register_module(name, wrapped)
    if compile_blocks:
        torch._dynamo.config.capture_scalar_outputs = True  # the split sizes of dispatch are numbers in the graph
        # All layers are one piece of code to torch, which ends a run at its 9th graph of it: dense and MoE layers, with
        # gradients and without, with another router to compare with, and of batches of one row, some or many are more.
        torch._dynamo.config.recompile_limit = 64
        whole = MESH_BY_PARAMETER or mesh is None or mesh.ep is None  # else FSDP2's hooks around experts break graphs
        for name, block in model.layers.named_children():
            model.layers.register_module(name, cast(nn.Module, torch.compile(block, fullgraph=whole)))
        if MESH_BY_PARAMETER or torch.cuda.is_available():  # the C++ of torch 2.11 for it is wrong
            model.softmax_ = torch.compile(model.softmax_, fullgraph=True)
    if mesh is not None:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
        shard(model, mesh, policy, reshard_after_forward)


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


def share_out(model: Transformer, mesh: Meshes, seq_len: int) -> None:
    """Give each process its part of sequences (CP, TP), of attention and dense layers (TP) and of experts (EP)."""
    if mesh.sequence is not None:
        model.rope = rope_of_part(cp=mesh.cp, tp=mesh.tp)
    if mesh.cp is not None:
        attend = attend_to_all(mesh.cp, seq_len)
        for layer in model.modules():
            if isinstance(layer, Attention):
                layer.attend = attend
    if mesh.tp is not None:
        share_out_matrices(model, mesh.tp)
    if mesh.ep is not None:
        share_out_experts(model, mesh.ep)


def shard(model: Transformer, mesh: Meshes, policy: MixedPrecisionPolicy, reshard_after_forward: Reshard) -> None:
    """Apply FSDP2 to every block and to the rest of the model.

    A block is one unit, whose experts and matrices have meshes of their own where they are shared out; below torch
    2.13 a unit has one mesh, and experts that are shared out are a unit of their own. Gradients are summed, not
    averaged, over ranks: the loss is already divided by the step's global token count, so all gradients are right
    whatever the layout. gloo has no pre-multiplied sum, hence the forced one.

    Between forward and backward the gathered parameters of blocks are freed; with `always` also those of the rest,
    which backward gathers again at once, with `never` none. To free them saves next to nothing where there is one
    process to shard over, so that `default` is `never` there.
    """
    shards = mesh.dense["dp_shard"].size() if mesh.dense.ndim > 1 else mesh.dense.size()
    if reshard_after_forward == "default" and shards == 1:
        reshard_after_forward = "never"
    model.keeps_gathered = reshard_after_forward == "never"
    # Activations come in the parameters' type already; the cast would only take the rotary angles out of fp32.
    block_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    frees = reshard_after_forward != "never"
    if mesh.efsdp is not None and not MESH_BY_PARAMETER:
        for layer in model.modules():
            if isinstance(layer, MoE):
                fully_shard(layer.experts, mesh=mesh.efsdp, mp_policy=block_policy, reshard_after_forward=frees)
    placement = placements(model, mesh) if MESH_BY_PARAMETER else None
    # One process that keeps all has nothing to send while it computes: one unit, whose hooks run once, spares the host.
    blocks = [] if mesh.dense.size() == 1 and model.keeps_gathered else model.layers.children()
    for block in blocks:
        fully_shard(
            block,
            mesh=mesh.dense,
            mp_policy=block_policy,
            shard_placement_fn=placement,
            reshard_after_forward=frees,
        )
    fully_shard(model, mesh=mesh.dense, mp_policy=policy, reshard_after_forward=reshard_after_forward == "always")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)
            if mesh.dense.size() > 1:  # one process divides by nothing; with a factor it would, in a pass of its own
                module.set_gradient_divide_factor(1.0)


def set_last_micro_batch(model: nn.Module, last: bool) -> None:
    """Say whether the next forward and backward are the step's last: FSDP2 puts off until then what can wait.

    Replicas (HSDP) sum their gradients once a step. Where gathered parameters are kept until backward, they are kept
    from one micro-batch to the next too, and gradients add up whole, in the type of their reduction, before this is
    done once. It takes as much memory as all gradients do on one process; so the default reduces each micro-batch's.
    """
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
    """Where FSDP2 shards what is shared out: over the axes that this leaves. The rest goes where it would anyway."""
    experts = {p for layer in model.modules() if isinstance(layer, MoE) for p in layer.experts.parameters()}
    matrices = {p for p in model.parameters() if isinstance(p, DTensor)} - experts
    where: dict[nn.Parameter, Any] = {}
    assert ShardPlacementResult is not None
    for parameters, rest in ((experts, mesh.efsdp), (matrices, mesh.tfsdp)):
        if rest is not None:
            where |= dict.fromkeys(parameters, ShardPlacementResult(Shard(0), mesh_info(rest)))
    return where.get if where else None


def mesh_info(mesh: DeviceMesh) -> FSDPMeshInfo:
    """A mesh of one axis to shard over, or of two: replicas, then shards."""
    if mesh.ndim == 1:
        return FSDPMeshInfo(mesh, shard_mesh_dim=0)
    return HSDPMeshInfo(mesh, replicate_mesh_dim=0, shard_mesh_dim=1)
