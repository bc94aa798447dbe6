"""Tensor parallelism: each process of the `tp` axis has some heads of attention and a part of each dense layer's width.

Between these layers each process has its own part of every sequence, 1 / P of its tokens, so norms, routers, experts,
embedding and logits see each token once, as they do with data parallelism. Before attention and dense layers the tokens
of all P come together, and the sum of what their parts give is shared out again (Korthikanti et al., 2022).

Shapes: B batch, S the tokens of a sequence that this process has, D dim, P processes of the axis.
"""

from torch import Tensor, nn
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.model.attention import Attention
from titan_moe.model.moe import FeedForward
from titan_moe.model.share import Share
from titan_moe.runtime.compat import all_gather_single, reduce_scatter_single

SHARED_DIMS = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1}  # of a (out, in) matrix: heads, width


def share_out_matrices(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the matrices of attention, dense layers and shared experts DTensors, sharded over `mesh`."""
    share = over(mesh)  # one for all layers, so that torch.compile sees the same code in each
    for layer in model.modules():
        if isinstance(layer, Attention | FeedForward):
            layer.share = share
            for name, linear in layer.named_children():
                if isinstance(linear, nn.Linear):
                    placement = Shard(SHARED_DIMS[name])
                    part = distribute_tensor(linear.weight.detach(), mesh, [placement], src_data_rank=None)
                    linear.weight = nn.Parameter(part)


def over(mesh: DeviceMesh) -> Share:
    """The two ends of a layer whose matrices are shared out over `mesh`: both are differentiable."""
    group = mesh.get_group()

    def gather(x_BSD: Tensor) -> Tensor:
        return wait_tensor(all_gather_single(x_BSD.transpose(0, 1).contiguous(), 0, group)).transpose(0, 1)

    def reduce(y_BSD: Tensor) -> Tensor:
        return wait_tensor(reduce_scatter_single(y_BSD.transpose(0, 1).contiguous(), "sum", 0, group)).transpose(0, 1)

    return Share(gather, reduce)
