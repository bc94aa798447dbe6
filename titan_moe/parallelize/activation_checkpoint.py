"""Activation checkpointing: which results of a layer are saved for backward, and which are computed again."""

import functools
from collections.abc import Set
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from titan_moe.model.attention import MAX_LOGITS
from titan_moe.model.documents import DOCUMENT_ATTENTION
from titan_moe.model.routing.sequence import CAUSAL_TOPK
from titan_moe.runtime.compat import VARLEN_ATTENTION

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

ATTENTION_OPS = {
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    DOCUMENT_ATTENTION,
    VARLEN_ATTENTION,
}
# To draw the same numbers again, torch would save and restore the generator. Attention may draw, for its dropout.
RANDOM_OPS = ATTENTION_OPS | {aten.rand_like.default, aten.randn_like.default, aten.rand.default, aten.randn.default}
# The choice of experts is a few numbers a token. Computed again it could differ from the first where two experts are
# nearly as good, and the gradient would be that of another function than forward's.
CHOICE_OPS = {aten.topk.default, aten.sort.default, aten.sort.stable, CAUSAL_TOPK}
# A number for each head, which backward does not need: it is saved so that it is not computed again.
MEASURE_OPS = {MAX_LOGITS}
# What came from other ranks costs most to compute again. All-gathers are not here: their result is as large as the
# whole on every rank, so that it costs most to save.
COMMUNICATION_OPS = {
    c10d.all_to_all_single.default,
    c10d.reduce_scatter_tensor.default,
    c10d.wait_tensor.default,
}


def checkpoint_block(block: nn.Module, mode: str, *, keep_random: bool = False) -> nn.Module:
    """Wrap a layer so that its activations are saved (`none`), computed again (`full`), or partly saved (`selective`).

    `full` saves the choice of experts, and the heads' largest logits, alone. `selective` also saves attention's
    results, what the all-to-alls brought and what was reduced over ranks; norms, projections and experts are computed
    again. With `keep_random` attention is saved by `full` too: torch 2.13's partitioner, when a compiled layer with
    DTensors is to restore a generator, mixes up what it saves (the generator's state comes after the device mesh).
    """
    if mode == "none":
        return block
    saved_ops = CHOICE_OPS | MEASURE_OPS
    if mode == "selective":
        saved_ops = saved_ops | RANDOM_OPS | COMMUNICATION_OPS
    elif keep_random:
        saved_ops = saved_ops | RANDOM_OPS
    return checkpoint_wrapper(block, context_fn=functools.partial(_contexts, frozenset(saved_ops)))


def _contexts(saved_ops: Set[Any]) -> tuple[Any, Any]:
    """The contexts of forward and of computing it again, which save the results of `saved_ops` and find them."""
    previous_op: list[Any] = [None]

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        # What a wait returns is what its collective brought: it is saved, but for that of an all-gather.
        awaited_op, previous_op[0] = previous_op[0], op
        if op is c10d.wait_tensor.default and awaited_op is c10d.all_gather_into_tensor.default:
            return CheckpointPolicy.PREFER_RECOMPUTE

        # A copy to the host has the split sizes of dispatch: a step waits for the device once for them, not twice.
        is_copy_to_host = op is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
        return CheckpointPolicy.MUST_SAVE if op in saved_ops or is_copy_to_host else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
