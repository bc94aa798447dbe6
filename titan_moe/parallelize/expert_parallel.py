"""Expert parallelism: each rank of the `ep` axis has E / P experts, and tokens travel to them and back.

Shapes: T tokens, D dim, K top_k, E experts, P ranks of the axis, N rows of this rank's tokens, M rows that it receives
for its experts. These come in G = E segments: from each of P ranks, for each of this rank's E / P experts.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.model.dispatch import Dispatcher, Permutation, gather_rows, permute, sort_choices
from titan_moe.model.moe import MoE
from titan_moe.model.routing import Routing
from titan_moe.runtime.compat import all_gather_single

ReadSplits = Callable[[Tensor, Tensor], tuple[list[int], list[int]]]


class Exchange(NamedTuple):
    """What `receive` and `send_back` need to know of `dispatch`."""

    by_expert_M: Tensor  # row i in the order of experts is received row by_expert[i]
    by_rank_M: Tensor  # its inverse
    rows_sent: list[int]  # to each rank
    rows_received: list[int]  # from each rank


def apply_ep(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the experts of every MoE layer DTensors, Shard(0) over `mesh`, and send tokens to them by all-to-all."""
    # One for all layers, so that torch.compile sees the same code in each.
    dispatcher, gather_experts = all_to_all(mesh), gather_over(mesh)
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.dispatcher, layer.gather_experts = dispatcher, gather_experts
            layer.first_expert = layer.num_experts // mesh.size() * mesh.get_local_rank()
            for name, parameter in list(layer.experts.named_parameters()):
                sharded = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                layer.experts.register_parameter(name, nn.Parameter(sharded))


def gather_over(mesh: DeviceMesh) -> Callable[[Tensor], Tensor]:
    """The function that puts together (E, ...) from the (E / P, ...) of the ranks of `mesh`; differentiable."""
    group = mesh.get_group()

    def gather_experts(of_experts: Tensor) -> Tensor:
        return wait_tensor(all_gather_single(of_experts.contiguous(), 0, group))  # (E / P, ...) -> (E, ...)

    return gather_experts


def all_to_all(mesh: DeviceMesh, read: ReadSplits | None = None) -> Dispatcher:
    """The dispatcher over the ranks of `mesh`, which has one axis; rank p has the E / P experts from E / P * p on.

    Any number of rows may go from any rank to any other, none included. Both ways are differentiable. An expert's rows
    are in the order of ranks and their tokens, whatever the timing. `read` gives the numbers of rows where the host
    can't read them: in a simulation.
    """
    group, ep_size, read = mesh.get_group().group_name, mesh.size(), read or read_splits

    def dispatch(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Permutation, Exchange]:
        # Ranks first tell each other how many rows come for each expert, because receiving needs memory of that size.
        permutation, sent_E = sort_choices(routing)
        sent_PE = sent_E.view(ep_size, -1)  # (P, E / P), as all below
        received_PE = wait_tensor(all_to_all_single(sent_E, None, None, group)).view(ep_size, -1)
        rows_sent, rows_received = read(sent_PE.sum(1), received_PE.sum(1))

        # Choices that a router did not keep are the last of the order, and stay here.
        order_N = permutation.order[: sum(rows_sent)]
        permutation = Permutation(order_N, permutation.row, permutation.kept)  # _replace ends graphs in torch 2.11

        # The rows travel while the order of those that come is computed, and shared experts after that.
        x_MD = all_to_all_single_autograd(gather_rows(x_TD, permutation), rows_received, rows_sent, group)
        by_expert_M, by_rank_M = orders(received_PE, sum(rows_received))
        return x_MD, received_PE.sum(0), permutation, Exchange(by_expert_M, by_rank_M, rows_sent, rows_received)

    def receive(x_MD: Tensor, exchange: Exchange) -> Tensor:
        return permute(wait_tensor(x_MD), exchange.by_expert_M, exchange.by_rank_M)

    def send_back(y_MD: Tensor, exchange: Exchange) -> Tensor:
        y_MD = permute(y_MD, exchange.by_rank_M, exchange.by_expert_M)
        return wait_tensor(all_to_all_single_autograd(y_MD, exchange.rows_sent, exchange.rows_received, group))

    return Dispatcher(dispatch, receive, send_back)


def read_splits(sent_P: Tensor, received_P: Tensor) -> tuple[list[int], list[int]]:
    """Rows to and from each rank, on the host: the one place of a step that waits for the device, one copy a layer.

    The host must know how much memory the received rows take, and NCCL takes sizes from the host.
    """
    splits = torch.cat([sent_P, received_P]).cpu().tolist()
    for split in splits:
        torch._check(split >= 0)  # for torch.compile, to which these are unknown numbers
    return splits[: len(splits) // 2], splits[len(splits) // 2 :]


def orders(received_PE: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """The order (M,) int64 that sorts received rows by expert, then by rank, and its inverse; they come by rank.

    `received_PE` (P, E / P) int64 counts the rows of each segment, `num_rows` is their sum.
    """
    # Where each segment begins and ends in the order of ranks, and where in that of experts.
    count_G, count_by_expert_G = received_PE.flatten(), received_PE.t().flatten()
    end_G, end_by_expert_G = count_G.cumsum(0), count_by_expert_G.cumsum(0)
    start_PE = (end_G - count_G).view_as(received_PE)  # (P, E / P)
    start_EP = (end_by_expert_G - count_by_expert_G).view(start_PE.t().shape)  # (E / P, P)

    # Within a segment rows keep their order, so each moves by as much as its segment does. Which segment a row is in is
    # found by the ends, without waiting for the device as repeat_interleave would.
    row_M = torch.arange(num_rows, device=received_PE.device)
    by_expert_M = row_M + (start_PE.t() - start_EP).flatten()[torch.searchsorted(end_by_expert_G, row_M, right=True)]
    by_rank_M = row_M + (start_EP.t() - start_PE).flatten()[torch.searchsorted(end_G, row_M, right=True)]
    return by_expert_M, by_rank_M
