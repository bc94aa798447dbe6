"""Activation checkpointing: which results of a layer are kept for backward, and which are made again."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

aten, c10d = torch.ops.aten, torch.ops._c10d_functional

# What `selective` keeps. The choice of experts and what travelled between processes: made again they cost most, and a
# choice made anew could differ from the first where two experts are nearly as good. And attention, the most costly part
# by token. The rest of a layer (norms, projections, experts) is made again.
KEPT = {
    aten.topk.default,
    aten.sort.default,
    aten.sort.stable,
    c10d.all_to_all_single.default,
    c10d.wait_tensor.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
    aten._scaled_dot_product_attention_math.default,
}


def checkpoint_block(block: nn.Module, mode: str) -> nn.Module:
    """Wrap a layer so that its activations are kept (`none`), made again (`full`), or kept in part (`selective`)."""
    if mode == "none":
        return block
    context_fn: dict[str, Callable[..., Any]] = {}
    if mode == "selective":
        context_fn["context_fn"] = functools.partial(create_selective_checkpoint_contexts, keep)
    return checkpoint_wrapper(block, **context_fn)


def keep(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep the results of the operators in KEPT, and numbers on their way to the host, which are waited for once."""
    to_host = op is aten._to_copy.default and kwargs.get("device") == torch.device("cpu")
    return CheckpointPolicy.MUST_SAVE if op in KEPT or to_host else CheckpointPolicy.PREFER_RECOMPUTE
