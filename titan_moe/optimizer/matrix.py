"""Updates by a direction: of a dense matrix, and of each expert's matrix of a stacked tensor.

Shapes: E experts, R the rows of a stack that this rank holds (1 for a dense matrix), M x N a matrix.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titan_moe.optimizer.groups import NO_MATRICES
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.rounding import Place, in_fp32, is_narrow, narrowed
from titan_moe.optimizer.transform import State, Tick, Transform, fused_sgd
from titan_moe.runtime.dtensor import gathered, local, local_rows, own_part, sharded_like

# Elements of a stacked parameter whose rows are updated together on a CPU. Temporaries of more are handed back to the
# system and faulted in again at each use, which doubles the time of an update of eight experts of 768 x 2048. A GPU
# keeps its memory, and each kernel costs a launch: there all rows are updated together.
CPU_ELEMENTS_PER_UPDATE = 1 << 22
REPLICATED_STATES = ("step", "clock", "load_ema", "load_factor")  # by name; each rank has all of them


class Matrix(NamedTuple):
    """How a matrix, or a stack of them, is updated: by a transform of its own, and so many steps later if periodic.

    `number` is the parameter's place in the whole optimizer.
    """

    transform: Transform
    offset: int = 0
    number: int = 0


def takes(transform: Transform, group: Group, parameter: Tensor) -> bool:
    """Whether a transform updates a parameter of a group by its direction; if not, a kernel updates it."""
    if transform.kernel is not None or parameter.dim() not in (2, 3) or group.get("name") in NO_MATRICES:
        return False
    return transform.max_dim is None or max(parameter.shape[-2:]) <= transform.max_dim


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

    # The step is made in temporaries, as the rates are on the device: on a CPU of one row at a time, which stay in its
    # cache; on a GPU of all rows, because each kernel costs a launch.
    factor = factor_R.view(-1, 1, 1)
    count = 1 if weight.device.type == "cpu" else max(1, len(weight))
    for rows, along, by in zip(weight.split(count), direction.split(count), factor.split(count), strict=True):
        # an expert without a token has factor 0, and its direction is undefined
        step = torch.where(by > 0, along * (lr * by), 0.0)
        if group["load_lr_decay"]:
            step += rows * (decay * by)  # so that the weight is rounded once, as by the kernel
        else:
            rows.mul_(1 - decay)
        rows.sub_(step)


def fresh_state(transform: Transform, parameter: Tensor, *, narrow: bool = False) -> State:
    """A transform's first state, sharded as the parameter is, and the counts of steps at zero.

    `narrow`: in bfloat16 where it may be.

    `clock`, a scalar on the CPU, counts the parameter's steps; `step`, (E,) or (1,), those in which a row was alive.
    """
    # of a dense matrix, which may be sharded, a transform sees a whole one of the same shape, without its values
    stacked, device = parameter.dim() == 3, parameter.device
    state = transform.init(local(parameter) if stacked else torch.empty((1, *parameter.shape), device=device))
    state = narrowed(state, transform.rounded) if narrow else state
    if stacked and isinstance(parameter, DTensor):
        state = {name: sharded_like(value, parameter) for name, value in state.items()}
    steps = torch.zeros(parameter.shape[0] if stacked else 1, dtype=torch.float32, device=device)
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
    transform, gradient = matrix.transform, parameter.grad
    assert gradient is not None
    if "clock" not in state:
        state.update(fresh_state(transform, parameter, narrow=is_narrow(group)))
    if group["lr"] == 0:
        return  # so torch makes the states that a checkpoint is loaded into: no count may move

    # the clock is kept on the host, which decides what is due; steps of rows on the device, which knows the loads
    state["clock"] += 1
    state["step"] += 1 if alive_E is None else alive_E

    # A dense matrix is a stack of one, and whole on every rank: its directions depend on all of it. Counts, rates
    # and loads are those of all experts on every rank, so this rank's rows are taken out of them.
    stacked = parameter.dim() == 3
    rows = local_rows(parameter) if stacked else slice(0, 1)
    stack = local(gradient) if stacked else gathered(gradient).unsqueeze(0)  # (R, M, N)
    steps = state["step"][rows]  # (E,) -> (R,)
    alive = None if alive_E is None else alive_E[rows]  # (R,)
    factor = None if factor_E is None else factor_E[rows]  # (R,)
    weight = local(parameter)  # (R, M, N), or this rank's part of (M, N)
    states = {name: local(value) for name, value in state.items() if name not in REPLICATED_STATES}  # (R, ...)

    # some rows at a time: what a transform makes on the way is then small enough to stay in the cache of a CPU
    for part in parts_of(stack, transform):
        tick = Tick(
            step=int(state["clock"]),
            steps=steps[part],
            spare=spare,
            weight=lambda part=part: weight[part] if stacked else gathered(parameter).detach().unsqueeze(0),
            alive=None if alive is None else alive[part],
            offset=matrix.offset,
        )
        first = rows.start + part.start
        place = Place(matrix.number, (slice(first, first + len(tick.steps)),))
        narrow_states = {name: value[part] for name, value in states.items()}
        with in_fp32(narrow_states, transform.rounded, place, tick.steps) as part_states:
            direction = transform.update(stack[part].float().contiguous(), part_states, tick)
            if stacked:
                of_part = None if factor is None else factor[part]
                move(weight[part], direction, transform, part_states, tick, group, of_part)
            elif transform.retract is None:
                apply(weight, own_part(direction[0], parameter), group, factor)  # (1, M, N) -> this rank's part
            else:
                whole = gathered(parameter).detach().unsqueeze(0).clone()  # (1, M, N): it goes where all of it says
                move(whole, direction, transform, part_states, tick, group)
                weight.copy_(own_part(whole[0], parameter))


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
