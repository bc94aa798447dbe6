"""Tensor parallelism: each rank of the `tp` axis has some heads of attention and a part of each dense layer's width.

Between these layers each rank has its own part of every sequence, 1 / P of its tokens, so norms, routers, experts,
embedding and logits see each token once, as they do with data parallelism. Before attention and dense layers the tokens
of all P ranks are gathered. Each rank computes its heads, or its part of the width; the results are summed over ranks,
and each rank keeps those of its own tokens (Korthikanti et al., 2022). Hooks on the layers do this: their forward is
that of one process.

Shapes: B batch, S the tokens of a sequence that this rank has, D dim, P ranks of the axis, I and O the width of a
linear layer's input and output.
"""

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from titan_moe.model.attention import Attention
from titan_moe.model.moe import FeedForward
from titan_moe.runtime.compat import all_gather_single, reduce_scatter_single

SHARDED_DIMS = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1}  # of a (O, I) weight: heads, width


class ShardedLinear(nn.Linear):
    """A linear layer whose weight is a DTensor sharded on one dim, and so is its bias where outputs are sharded."""

    def forward(self, x: Tensor) -> Tensor:
        """Apply this rank's shard: (..., I) -> (..., O / P), or (..., I / P) -> its term (..., O) of a sum."""
        assert isinstance(self.weight, DTensor)
        bias = self.bias.to_local() if isinstance(self.bias, DTensor) else None
        return F.linear(x, self.weight.to_local(), bias)


class ShardedRMSNorm(nn.RMSNorm):
    """An RMSNorm over numbers of which each rank of `mesh` has a part: the weight is a DTensor, sharded alike."""

    def __init__(self, norm: nn.RMSNorm, mesh: DeviceMesh) -> None:
        super().__init__(list(norm.normalized_shape), eps=norm.eps, device="meta")
        self.group, self.size = mesh.get_group(), mesh.size()
        self.weight = sharded(norm.weight, mesh, 0)

    def forward(self, x: Tensor) -> Tensor:
        """(..., I / P) -> (..., I / P), in fp32 inside, as torch's own norm."""
        assert isinstance(self.weight, DTensor)
        assert self.eps is not None
        square = x.float().square().mean(-1, keepdim=True)
        parts = wait_tensor(all_gather_single(square.unsqueeze(0), 0, self.group))  # (..., 1) -> (P, ..., 1)
        return x.float().mul(torch.rsqrt(parts.mean(0) + self.eps)).mul(self.weight.to_local()).type_as(x)


def apply_tp(model: nn.Module, mesh: DeviceMesh) -> None:
    """Shard the weights of attention, dense layers and shared experts over `mesh`, and gather tokens around them."""
    group = mesh.get_group()

    # The collectives put ranks side by side on dim 0, so the sequence goes there and back. Both are differentiable, the
    # gradient of one being the other. One pair of hooks for all layers, so that torch.compile sees the same code in
    # each.

    def gather_tokens(layer: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x_SBD = args[0].transpose(0, 1).contiguous()
        x_BSD = wait_tensor(all_gather_single(x_SBD, 0, group)).transpose(0, 1)  # (B, P S, D)
        return (x_BSD, *args[1:])

    def reduce_scatter_tokens(layer: nn.Module, args: tuple[Any, ...], y_BSD: Tensor) -> Tensor:
        y_SBD = y_BSD.transpose(0, 1).contiguous()  # (P S, B, D)
        return wait_tensor(reduce_scatter_single(y_SBD, "sum", 0, group)).transpose(0, 1)  # (B, S, D)

    def finish_attention(layer: nn.Module, args: tuple[Any, ...], output: tuple[Tensor, Tensor | None]) -> Any:
        # The largest logits are of this rank's heads: those of others are left open, at the places of all heads.
        y_BSD, max_logits = output
        if max_logits is not None:
            before = mesh.get_local_rank() * len(max_logits)
            after = mesh.size() * len(max_logits) - len(max_logits) - before
            max_logits = F.pad(max_logits, (before, after), value=-math.inf)  # (H / P,) -> (H,)
        return reduce_scatter_tokens(layer, args, y_BSD), max_logits

    for layer in model.modules():
        if isinstance(layer, Attention | FeedForward):
            for name, part in list(layer.named_children()):
                if isinstance(part, nn.Linear):
                    layer.register_module(name, shard_linear(part, mesh, SHARDED_DIMS[name]))
                elif isinstance(layer, Attention) and layer.qk_norm == "full":
                    layer.register_module(name, ShardedRMSNorm(cast(nn.RMSNorm, part), mesh))
            layer.register_forward_pre_hook(gather_tokens)
            layer.register_forward_hook(finish_attention if isinstance(layer, Attention) else reduce_scatter_tokens)


def shard_linear(linear: nn.Linear, mesh: DeviceMesh, dim: int) -> ShardedLinear:
    """The linear layer with its weight sharded on `dim` over `mesh`; each rank must have it whole.

    Its bias, if it has one, is sharded with the outputs: `dim` must be 0.
    """
    shards = ShardedLinear(linear.in_features, linear.out_features, bias=False, device="meta")
    shards.weight = sharded(linear.weight, mesh, dim)
    if linear.bias is not None:
        assert dim == 0, "each rank has a term of the sum, and would add the bias to it"
        shards.bias = sharded(linear.bias, mesh, 0)
    return shards


def sharded(parameter: Tensor, mesh: DeviceMesh, dim: int) -> nn.Parameter:
    """The parameter, sharded on `dim` over `mesh`."""
    return nn.Parameter(distribute_tensor(parameter.detach(), mesh, [Shard(dim)], src_data_rank=None))
