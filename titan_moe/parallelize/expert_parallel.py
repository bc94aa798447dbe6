"""Expert parallelism: each process of the `ep` axis keeps E / P experts, and tokens travel to them and back.

Shapes: T tokens, D dim, K top_k, E experts, P processes of the axis, N rows of this process's tokens, M rows that it
receives for its experts, S = E segments of these: from each process for each of its own E / P experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.distributed._functional_collectives import all_to_all_single, all_to_all_single_autograd, wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.model.dispatch import Dispatcher, Permutation, combine_rows, gather_rows, sort_choices
from titan_moe.model.moe import MoE
from titan_moe.model.routing import Routing

ReadSplits = Callable[[Tensor, Tensor], tuple[list[int], list[int]]]


class Exchange(NamedTuple):
    """What `combine` needs to undo `dispatch`."""

    permutation: Permutation  # of this process's choices
    by_expert_M: Tensor  # row i of the rows sorted by expert is received row by_expert[i]
    by_process_M: Tensor  # its inverse
    sent: list[int]  # rows to each process
    received: list[int]  # rows from each process


def share_out_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make the experts of every MoE layer DTensors, Shard(0) over `mesh`, and send tokens to them by all-to-all."""
    dispatcher = all_to_all(mesh)  # one for all layers, so that torch.compile sees the same code in each
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.dispatcher = dispatcher
            for name, parameter in list(layer.experts.named_parameters()):
                share = distribute_tensor(parameter.detach(), mesh, [Shard(0)], src_data_rank=None)
                layer.experts.register_parameter(name, nn.Parameter(share))


def all_to_all(mesh: DeviceMesh, read: ReadSplits | None = None) -> Dispatcher:
    """The dispatcher over the processes of `mesh`, one axis; the experts of process p are E / P * p and the next.

    Any number of rows may go from any process to any other, none included. Both ways are differentiable, and an
    expert's rows are in the order of the processes and their tokens, whatever the timing. `read` gives the numbers of
    rows where the host can't read them: in a simulation.
    """
    group, degree, read = mesh.get_group().group_name, mesh.size(), read or read_splits

    def dispatch(x_TD: Tensor, routing: Routing) -> tuple[Tensor, Tensor, Exchange]:
        permutation, sent_E = sort_choices(routing)
        sent_PE = sent_E.view(degree, -1)
        received_PE = wait_tensor(all_to_all_single(sent_E, None, None, group)).view(degree, -1)
        sent, received = read(sent_PE.sum(1), received_PE.sum(1))
        kept_N = permutation.order[: sum(sent)]  # less where choices are not kept
        permutation = Permutation(kept_N, permutation.row, permutation.kept)  # _replace ends graphs in torch 2.11
        x_MD = all_to_all_single_autograd(gather_rows(x_TD, permutation), received, sent, group)
        by_expert_M, by_process_M = orders(received_PE, sum(received))
        return x_MD, received_PE.sum(0), Exchange(permutation, by_expert_M, by_process_M, sent, received)

    def receive(x_MD: Tensor, state: Exchange) -> Tensor:
        return _Permute.apply(wait_tensor(x_MD), state.by_expert_M, state.by_process_M)

    def combine(y_MD: Tensor, topk_scores_TK: Tensor, state: Exchange) -> Tensor:
        y_MD = _Permute.apply(y_MD, state.by_process_M, state.by_expert_M)
        y_ND = wait_tensor(all_to_all_single_autograd(y_MD, state.sent, state.received, group))
        return combine_rows(y_ND, topk_scores_TK, state.permutation)

    return Dispatcher(dispatch, receive, combine)


def read_splits(sent_P: Tensor, received_P: Tensor) -> tuple[list[int], list[int]]:
    """Rows to and from each process, on the host: the one place of a step that waits for the device, one copy a layer.

    The host must know how much memory the received rows take, and NCCL takes sizes from the host.
    """
    splits = torch.cat([sent_P, received_P]).cpu().tolist()
    for split in splits:
        torch._check(split >= 0)  # for torch.compile, to which these are unknown numbers
    return splits[: len(splits) // 2], splits[len(splits) // 2 :]


def orders(received_PE: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order (M,) of received rows by expert, then by process, and its inverse; they come by process."""
    count_S, count_by_expert_S = received_PE.flatten(), received_PE.t().flatten()
    end_S, end_by_expert_S = count_S.cumsum(0), count_by_expert_S.cumsum(0)
    start_PE = (end_S - count_S).view_as(received_PE)
    start_EP = (end_by_expert_S - count_by_expert_S).view(start_PE.t().shape)
    row_M = torch.arange(rows, device=received_PE.device)
    by_expert_M = row_M + (start_PE.t() - start_EP).flatten()[torch.searchsorted(end_by_expert_S, row_M, right=True)]
    by_process_M = row_M + (start_EP.t() - start_PE).flatten()[torch.searchsorted(end_S, row_M, right=True)]
    return by_expert_M, by_process_M


class _Permute(Function):
    @staticmethod
    def forward(ctx: Any, x_MD: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_M)
        return x_MD.index_select(0, order_M)

    @staticmethod
    def backward(ctx: Any, grad_MD: Tensor) -> tuple[Tensor, None, None]:  # pyrefly: ignore
        (inverse_M,) = ctx.saved_tensors
        return grad_MD.index_select(0, inverse_M), None, None
