"""Parallelism, applied to the model from outside, in one order: activation checkpointing, compile, FSDP2."""

import dataclasses
from typing import cast

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from titan_moe.model.transformer import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parallelize(
    model: Transformer,
    *,
    mesh: DeviceMesh | None,
    param_dtype: torch.dtype,
    reduce_dtype: torch.dtype,
    checkpoint_mode: str,
    compile_blocks: bool,
) -> None:
    """Checkpoint, compile and shard `model` in place; with `mesh` None it stays whole, on one process."""
    if checkpoint_mode == "full":
        for name, block in model.layers.named_children():
            model.layers.register_module(name, checkpoint_wrapper(block))
    if compile_blocks:
        for name, block in model.layers.named_children():
            model.layers.register_module(name, cast(nn.Module, torch.compile(block, fullgraph=True)))
    if mesh is not None:
        shard(model, mesh, MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype))


def shard(model: Transformer, mesh: DeviceMesh, policy: MixedPrecisionPolicy) -> None:
    """Apply FSDP2 to every block and to the rest of the model.

    Gradients are summed, not averaged, over ranks: the loss is already divided by the step's global token count, so
    expert and dense gradients are right whatever the layout. gloo has no pre-multiplied sum, hence the forced one.
    """
    # Activations come in the parameters' type already; the cast would only take the rotary angles out of fp32.
    block_policy = dataclasses.replace(policy, cast_forward_inputs=False)
    for block in model.layers.children():
        fully_shard(block, mesh=mesh, mp_policy=block_policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
