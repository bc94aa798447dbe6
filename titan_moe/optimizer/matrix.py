"""Updates by a direction: of a dense matrix, and of each expert's matrix of a stacked tensor.

Shapes: E experts, R the rows of a stack that this rank holds (1 for a dense matrix), M x N a matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titan_moe.optimizer.groups import NO_MATRICES, Heads
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.transform import State, Tick, Transform, fused_sgd
from titan_moe.runtime.dtensor import gathered, local, local_rows, own_part, sharded_like

# Elements of a stacked parameter whose rows are updated together on a CPU. Temporaries of more are handed back to the
# system and faulted in again at each use, which doubles the time of an update of eight experts of 768 x 2048. A GPU
# keeps its memory, and each kernel costs a launch: there all rows are updated together.
CPU_ELEMENTS_PER_UPDATE = 1 << 22
REPLICATED_STATES = ("step", "clock", "load_ema", "load_factor")  # by name; each rank has all of them


class Matrix(NamedTuple):
    """How a matrix, or a stack of them, is updated: by a transform of its own, and so many steps later if periodic.

    With `heads` a dense matrix is a stack of these.
    """

    transform: Transform
    offset: int = 0
    heads: Heads | None = None


def to_stack(matrix: Tensor, heads: Heads | None) -> Tensor:
    """View (M, N) as the stack of its heads, (H, M / H, N) or (H, M, N / H), or as one of a single matrix."""
    if heads is None:
        return matrix.unsqueeze(0)
    number, dim = heads
    return matrix.unflatten(dim, (number, -1)).movedim(dim, 0)


def from_stack(stack: Tensor, heads: Heads | None) -> Tensor:
    """The matrix (M, N) whose `to_stack` is this."""
    return stack[0] if heads is None else stack.movedim(0, heads[1]).flatten(heads[1], heads[1] + 1)


def takes(transform: Transform, group: Group, parameter: Tensor, heads: Heads | None = None) -> bool:
    """Whether a transform updates a parameter of a group by its direction; if not, a kernel updates it."""
    if transform.kernel is not None or parameter.dim() not in (2, 3) or group.get("name") in NO_MATRICES:
        return False
    shape = list(parameter.shape[-2:])
    if heads is not None:
        shape[heads[1]] //= heads[0]
    return transform.max_dim is None or max(shape) <= transform.max_dim


def parts_of(stack: Tensor, transform: Transform) -> list[slice]:
    """Which rows of (R, M, N) are updated together; none of a rank without experts (more ranks than experts)."""
    if not stack.numel():
        return []
    one_update = not transform.by_rows or stack.device.type != "cpu"
    count = len(stack) if one_update else max(1, CPU_ELEMENTS_PER_UPDATE // stack[0].numel())
    return [slice(start, start + count) for start in range(0, len(stack), count)]


def apply(weight: Tensor, direction: Tensor, group: Group, factor_R: Tensor | None) -> None:
    """W <- W - lr factor (direction + weight_decay W), in place; decay without the factor if the group says so."""
    lr, decay = group["lr"], group["lr"] * group["weight_decay"]
    if factor_R is None:
        if weight.dtype == direction.dtype and weight.is_contiguous():
            fused_sgd(weight, direction.contiguous(), lr, group["weight_decay"])
        else:
            weight.mul_(1 - decay).add_(direction, alpha=-lr)
        return

    # an expert without a token has factor 0, and its direction is undefined
    factor = factor_R.view(-1, 1, 1)
    step = torch.where(factor > 0, direction * (lr * factor), 0.0)
    if group["load_lr_decay"]:
        step += weight * (decay * factor)  # so that the weight is rounded once, as by the kernel
    else:
        weight.mul_(1 - decay)
    weight.sub_(step)


def fresh_state(matrix: Matrix, parameter: Tensor) -> State:
    """A transform's first state, sharded as the parameter is, and the counts of steps at zero.

    `clock`, a scalar on the CPU, counts the parameter's steps; `step`, (E,), (H,) or (1,), those in which a row was
    alive.
    """
    # of a dense matrix, which may be sharded, a transform sees a whole one of the same shape, without its values
    stacked, device = parameter.dim() == 3, parameter.device
    stack = local(parameter) if stacked else to_stack(torch.empty(parameter.shape, device=device), matrix.heads)
    state = matrix.transform.init(stack)
    if stacked and isinstance(parameter, DTensor):
        state = {name: sharded_like(value, parameter) for name, value in state.items()}
    steps = torch.zeros(parameter.shape[0] if stacked else len(stack), dtype=torch.float32, device=device)
    return {"clock": torch.zeros((), dtype=torch.float32), "step": steps, **state}


def check_whole_experts(kind: str, group: Group, parameter: Tensor) -> None:
    """Raise ValueError for a stacked parameter whose shards are not whole experts."""
    if not isinstance(parameter, DTensor) or parameter.dim() != 3:
        return

    # the error names the degrees, because they are what a user can change
    for axis, placement in enumerate(parameter.placements):
        if isinstance(placement, Shard) and placement.dim != 0:
            mesh = parameter.device_mesh
            names = mesh.mesh_dim_names or tuple(f"axis {i}" for i in range(mesh.ndim))
            degrees = " x ".join(f"{name} {size}" for name, size in zip(names, mesh.shape, strict=True))
            raise ValueError(
                f"[optimizer.{group.get('name', 'expert')}] name = {kind!r} needs whole experts on each rank, but "
                f"the degrees {degrees} cut the matrices of {parameter.shape[0]} experts on {names[axis]}: choose "
                "degrees whose product on experts divides their number, or adamw"
            )


def step_matrix(
    matrix: Matrix,
    parameter: Tensor,
    state: State,
    group: Group,
    spare: Callable[[Tensor], Tensor],
    factor_E: Tensor | None = None,
    alive_E: Tensor | None = None,
) -> None:
    """Update the experts of (E, M, N) that this rank holds, or all of (M, N), by the direction of their transform.

    `state` is the parameter's, made where it is empty; `spare` is that of `Tick`. `factor_E` multiplies the experts'
    rates; experts that are not `alive_E` got no token and are left alone.
    """
    transform, heads, gradient = matrix.transform, matrix.heads, parameter.grad
    assert gradient is not None
    if "clock" not in state:
        state.update(fresh_state(matrix, parameter))
    if group["lr"] == 0:
        return  # so torch makes the states that a checkpoint is loaded into: no count may move

    # the clock is kept on the host, which decides what is due; steps of rows on the device, which knows the loads
    state["clock"] += 1
    state["step"] += 1 if alive_E is None else alive_E

    # A dense matrix is a stack of one or of its heads, and whole on every rank: its directions depend on all of it.
    # Counts, rates and loads are those of all experts on every rank, so this rank's rows are taken out of them.
    stacked = parameter.dim() == 3
    rows = local_rows(parameter) if stacked else slice(None)
    stack = local(gradient) if stacked else to_stack(gathered(gradient), heads)  # (R, M, N)
    steps = state["step"][rows]  # (E,) -> (R,)
    alive = None if alive_E is None else alive_E[rows]  # (R,)
    factor = None if factor_E is None else factor_E[rows]  # (R,)
    weight = local(parameter)  # (R, M, N), or this rank's part of (M, N)
    states = {name: local(value) for name, value in state.items() if name not in REPLICATED_STATES}  # (R, ...)

    # some rows at a time: what a transform makes on the way is then small enough to stay in the cache of a CPU
    for part in parts_of(stack, transform) if heads is None else [slice(None)]:
        tick = Tick(
            step=int(state["clock"]),
            steps=steps[part],
            spare=spare,
            weight=lambda part=part: weight[part] if stacked else to_stack(gathered(parameter).detach(), heads),
            alive=None if alive is None else alive[part],
            offset=matrix.offset,
        )
        part_states = {name: value[part] for name, value in states.items()}
        direction = transform.update(stack[part].float().contiguous(), part_states, tick)
        if stacked:
            move(weight[part], direction, transform, part_states, tick, group, None if factor is None else factor[part])
        elif transform.retract is None:
            apply(weight, own_part(from_stack(direction, heads), parameter), group, factor)  # this rank's part
        else:
            whole = to_stack(gathered(parameter).detach(), heads)  # (R, M, N): where it goes depends on all of it
            whole = whole.clone(memory_format=torch.contiguous_format)
            move(whole, direction, transform, part_states, tick, group)
            weight.copy_(own_part(from_stack(whole, heads), parameter))


def move(
    weight: Tensor,
    direction: Tensor,
    transform: Transform,
    state: State,
    tick: Tick,
    group: Group,
    factor_R: Tensor | None = None,
) -> None:
    """Step whole matrices (R, M, N) along a direction, in place, and retract them if their transform does so."""
    apply(weight, direction, group, factor_R)
    if transform.retract is not None:
        transform.retract(weight, state, tick)
