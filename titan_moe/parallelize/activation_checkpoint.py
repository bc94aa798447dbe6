"""Activation checkpointing: which results of a layer are kept for backward, and which are made again."""

import functools
from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

ATTENTION = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
}
# Drawing again the same numbers means to save and restore the generator. Attention counts, for its dropout.
RANDOM = ATTENTION | {aten.rand_like.default, aten.randn_like.default, aten.rand.default, aten.randn.default}
# The choice of experts is a few numbers for each token, and made anew it could differ from the first where two experts
# are nearly as good: the gradient would be of another function than the one that was computed.
CHOICE = {aten.topk.default, aten.sort.default, aten.sort.stable}
# What travelled between processes costs most to make again. What is gathered is as large as the whole, on every
# process: that is gathered again.
ROUTED = CHOICE | {
    c10d.all_to_all_single.default,
    c10d.reduce_scatter_tensor.default,
    c10d.wait_tensor.default,
}


def checkpoint_block(block: nn.Module, mode: str, *, keep_random: bool = False) -> nn.Module:
    """Wrap a layer so that its activations are kept (`none`), made again (`full`), or kept in part (`selective`).

    `full` keeps the choice of experts alone. `selective` keeps also attention's results, what the all-to-alls brought
    and what was reduced over processes; norms, projections and experts are computed again. With `keep_random`
    attention is kept by `full` too: torch 2.13's partitioner, when a compiled layer with DTensors is to restore a
    generator, mixes up what it saves (the generator's state comes after the device mesh).
    """
    if mode == "none":
        return block
    kept = RANDOM | ROUTED if mode == "selective" else RANDOM | CHOICE if keep_random else CHOICE
    return checkpoint_wrapper(block, context_fn=functools.partial(_contexts, frozenset(kept)))


def _contexts(kept: Set[Any]) -> tuple[Any, Any]:
    before: list[Any] = [None]  # the operator before this one

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        waits_for, before[0] = before[0], op
        if op is c10d.wait_tensor.default and waits_for is c10d.all_gather_into_tensor.default:
            return CheckpointPolicy.PREFER_RECOMPUTE
        # numbers on their way to the host: the split sizes of dispatch are waited for once
        to_host = op is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        return CheckpointPolicy.MUST_SAVE if op in kept or to_host else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
