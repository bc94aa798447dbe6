"""Updates by a direction: of a dense matrix, and of each expert's matrix of a stacked tensor.

What a rank holds whole it updates by itself: `step_matrix`. A matrix that ranks hold parts of goes to its owner and
back: `step_owned`.

Shapes: E experts, R the rows of a stack that this rank holds (1 for a dense matrix), M x N a matrix.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titan_moe.optimizer.groups import NO_MATRICES, Heads, table_of
from titan_moe.optimizer.load_lr import Group
from titan_moe.optimizer.owners import Owned, Transfer, gather, join, scatter
from titan_moe.optimizer.rounding import Place, in_fp32, is_narrow, narrowed
from titan_moe.optimizer.transform import State, Tick, Transform, fused_sgd
from titan_moe.runtime.dtensor import held_by_one, local, local_rows, sharded_like

# Elements of a stacked parameter whose rows are updated together on a CPU. Temporaries of more are handed back to the
# system and faulted in again at each use, which doubles the time of an update of eight experts of 768 x 2048. A GPU
# keeps its memory, and each kernel costs a launch: there all rows are updated together.
CPU_ELEMENTS_PER_UPDATE = 1 << 22
REPLICATED_STATES = ("step", "clock", "load_ema", "load_factor")  # by name; each rank has all of them


class Matrix(NamedTuple):
    """How a matrix, or a stack of them, is updated: by a transform of its own, and so many steps later if periodic.

    With `heads` a dense matrix is a stack of these. `number` is the parameter's place in the whole optimizer. One that
    is `owned` is updated by one of the ranks that hold parts of it.
    """

    transform: Transform
    offset: int = 0
    heads: Heads | None = None
    number: int = 0
    owned: Owned | None = None

    @property
    def needs_weight(self) -> bool:
        """Whether the owner has to see the weight."""
        return self.transform.reads_weight or self.transform.retract is not None


class Task(NamedTuple):
    """A matrix to update, with the settings of its group and the state of its parameter."""

    matrix: Matrix
    parameter: Tensor
    state: State
    group: Group

    @property
    def owned(self) -> Owned:
        """Who updates the matrix, of one that is sharded."""
        assert self.matrix.owned is not None
        return self.matrix.owned


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


def to_stack(tensor: Tensor, heads: Heads | None = None) -> Tensor:
    """View a parameter's values as the stack (R, M, N) that they are.

    A dense matrix (M, N) is one of a single matrix, or of its heads, (H, M / H, N) or (H, M, N / H).
    """
    if tensor.dim() == 3 or heads is None:
        return tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    number, dim = heads
    return tensor.unflatten(dim, (number, -1)).movedim(dim, 0)


def from_stack(stack: Tensor, heads: Heads | None) -> Tensor:
    """The dense matrix (M, N) whose `to_stack` is this."""
    return stack[0] if heads is None else stack.movedim(0, heads[1]).flatten(heads[1], heads[1] + 1)


def fresh_state(matrix: Matrix, parameter: Tensor, *, narrow: bool = False) -> State:
    """A transform's first state, where the parameter is updated, and the counts of steps at zero.

    `clock`, a scalar on the CPU, counts the parameter's steps; `step`, (E,), (H,) or (1,), those in which a row was
    alive.
    `narrow`: in bfloat16 where it may be.
    """
    # of a dense matrix, which may be sharded, a transform sees a whole one of the same shape, without its values
    stacked, device = parameter.dim() == 3, parameter.device
    stack = local(parameter) if stacked else to_stack(torch.empty(parameter.shape, device=device), matrix.heads)
    state = matrix.transform.init(stack)
    state = narrowed(state, matrix.transform.rounded) if narrow else state
    if matrix.owned is not None:
        state = {name: held_by_one(value, matrix.owned.home) for name, value in state.items()}
    elif stacked and isinstance(parameter, DTensor):
        state = {name: sharded_like(value, parameter) for name, value in state.items()}
    steps = torch.zeros(parameter.shape[0] if stacked else len(stack), dtype=torch.float32, device=device)
    return {"clock": torch.zeros((), dtype=torch.float32), "step": steps, **state}


def counted(task: Task, alive_E: Tensor | None = None) -> bool:
    """Make a state where there is none, and count the step; false where there is nothing to do."""
    matrix, parameter, state, group = task
    if "clock" not in state:
        state.update(fresh_state(matrix, parameter, narrow=is_narrow(group)))
    if group["lr"] == 0:
        return False  # so torch makes the states that a checkpoint is loaded into: no count may move

    # the clock is kept on the host, which decides what is due; steps of rows on the device, which knows the loads
    state["clock"] += 1
    state["step"] += 1 if alive_E is None else alive_E
    return True


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
                f"[{table_of(group.get('name', 'expert'))}] name = {kind!r} needs whole experts on each rank, but "
                f"the degrees {degrees} cut the matrices of {parameter.shape[0]} experts on {names[axis]}: choose "
                "degrees whose product on experts divides their number, or adamw"
            )


def step_matrix(
    task: Task,
    spare: Callable[[Tensor], Tensor],
    factor_E: Tensor | None = None,
    alive_E: Tensor | None = None,
) -> None:
    """Update the experts of (E, M, N) that this rank holds, or (M, N), by the direction of their transform.

    `spare` is that of `Tick`. `factor_E` multiplies the experts' rates; experts that are not `alive_E` got no token and
    are left alone.
    """
    matrix, parameter, state, group = task
    assert parameter.grad is not None
    if not counted(task, alive_E):
        return

    # Counts, rates and loads are those of all experts on every rank, so this rank's rows are taken out of them.
    rows = local_rows(parameter) if parameter.dim() == 3 else slice(None)
    alive = None if alive_E is None else alive_E[rows]  # (E,) -> (R,)
    factor = None if factor_E is None else factor_E[rows]  # (R,)
    weight = to_stack(local(parameter), matrix.heads)  # (R, M, N)
    gradient = to_stack(local(parameter.grad), matrix.heads)  # (R, M, N)
    for part, direction, part_state, tick in directions(matrix, gradient, weight, state, rows, spare, alive):
        of_part = None if factor is None else factor[part]
        move(weight[part], direction, matrix.transform, part_state, tick, group, of_part)


def directions(
    matrix: Matrix,
    gradient: Tensor,
    weight: Tensor | None,
    state: State,
    rows: slice,
    spare: Callable[[Tensor], Tensor],
    alive: Tensor | None = None,
) -> Iterator[tuple[slice, Tensor, State, Tick]]:
    """The directions of a stack (R, M, N), some rows after the other, each valid until the next is asked for.

    `rows` are those of the stack among all that the state's `step` counts.
    """
    steps = state["step"][rows]  # (R,)
    states = {name: local(value) for name, value in state.items() if name not in REPLICATED_STATES}  # (R, ...)

    def weight_of(part: slice) -> Tensor:
        assert weight is not None, "a transform with reads_weight = False has asked for the weight"
        return weight[part]

    # some rows at a time: what a transform makes on the way is then small enough to stay in the cache of a CPU
    for part in parts_of(gradient, matrix.transform):
        tick = Tick(
            step=int(state["clock"]),
            steps=steps[part],
            spare=spare,
            weight=lambda part=part: weight_of(part),
            alive=None if alive is None else alive[part],
            offset=matrix.offset,
        )
        # what is kept in bfloat16 is rounded when the next direction is asked for
        first = (rows.start or 0) + part.start
        place = Place(matrix.number, (slice(first, first + len(tick.steps)),))
        narrow_state = {name: value[part] for name, value in states.items()}
        with in_fp32(narrow_state, matrix.transform.rounded, place, tick.steps) as part_state:
            direction = matrix.transform.update(gradient[part].float().contiguous(), part_state, tick)
            if direction.shape != gradient[part].shape:  # it would be broadcast over experts, and nobody would notice
                update = matrix.transform.update
                raise ValueError(
                    f"{getattr(update, '__qualname__', update)} must return a direction of its gradient's shape, "
                    f"{tuple(gradient[part].shape)}, gave {tuple(direction.shape)}"
                )
            yield part, direction, part_state, tick


def step_owned(tasks: Sequence[Task], spare: Callable[[Tensor], Tensor]) -> None:
    """Update matrices that have owners: gather, compute, scatter, round by round.

    While a round is computed, the parts of the next are on their way, and the updates of the one before.
    """
    # all ranks go through the same rounds in the same order, whether they own something in them or not
    by_round: dict[tuple[dist.ProcessGroup, int], list[Task]] = {}
    for task in tasks:
        if counted(task):
            by_round.setdefault((task.owned.group, task.owned.round), []).append(task)
    groups = list(dict.fromkeys(group for group, _ in by_round))
    rounds = [by_round[key] for key in sorted(by_round, key=lambda key: (groups.index(key[0]), key[1]))]

    # Sent before it is waited for: a round travels while another is computed, and an update leaves a round later.
    arriving = send_gradients(rounds[0]) if rounds else None
    leaving: list[tuple[list[Task], Transfer]] = []
    for number, round_ in enumerate(rounds):
        assert arriving is not None
        arrived = arriving
        arriving = send_gradients(rounds[number + 1]) if number + 1 < len(rounds) else None
        arrived.work.wait()
        leaving.append((round_, send_updates(round_, arrived.received, spare)))
        if number:
            finish(*leaving.pop(0))
    for round_, updates in leaving:
        finish(round_, updates)


def send_gradients(tasks: Sequence[Task]) -> Transfer:
    """Begin to send this rank's parts of the gradients of a round, and of weights that are needed, to their owners."""
    parts = []
    for task in tasks:
        parameter, gradient = task.parameter, task.parameter.grad
        assert isinstance(gradient, DTensor)
        assert isinstance(parameter, DTensor)
        if gradient.placements != parameter.placements:
            gradient = gradient.redistribute(parameter.device_mesh, parameter.placements)
        tensors = [gradient, parameter] if task.matrix.needs_weight else [gradient]
        parts.append((task.owned, [local(tensor) for tensor in tensors]))
    return gather(parts)


def send_updates(tasks: Sequence[Task], received: Tensor, spare: Callable[[Tensor], Tensor]) -> Transfer:
    """Update the matrix of a round that is this rank's own, if any, and begin to send the parts of all updates."""
    updates = [(task.owned, update_of(task, received, spare) if task.owned.is_mine else None) for task in tasks]

    # directions are in fp32; a weight that was brought back is sent itself
    moved = [local(task.parameter) for task in tasks if task.matrix.transform.retract is not None]
    return scatter(updates, [torch.empty(0, device=received.device), *moved])


def update_of(task: Task, received: Tensor, spare: Callable[[Tensor], Tensor]) -> Tensor:
    """The direction of a matrix (M, N) from all its parts, or its next weight if that is brought back."""
    matrix, parameter, state, group = task
    whole = join(task.owned, received, 1 + matrix.needs_weight, parameter.shape)  # (M, N) each
    gradient, *rest = (to_stack(tensor, matrix.heads) for tensor in whole)  # (R, M, N) each
    weight = rest[0].to(parameter.dtype) if rest else None

    update = weight if matrix.transform.retract is not None else torch.empty_like(gradient, dtype=torch.float)
    assert update is not None
    for part, direction, part_state, tick in directions(matrix, gradient, weight, state, slice(None), spare):
        if matrix.transform.retract is None:
            update[part] = direction
        else:
            move(update[part], direction, matrix.transform, part_state, tick, group)
    return from_stack(update, matrix.heads)


def finish(tasks: Sequence[Task], updates: Transfer) -> None:
    """Wait for the parts of a round's updates, and apply them to this rank's parts of the weights."""
    # they come in the order of their owners
    updates.work.wait()
    parts = updates.received
    for matrix, parameter, _, group in sorted(tasks, key=lambda task: task.owned.owner):
        weight = local(parameter)
        part, parts = parts[: weight.numel()].view(weight.shape), parts[weight.numel() :]
        if not weight.numel():
            continue
        if matrix.transform.retract is None:
            apply(weight, part, group, None)
        else:
            weight.copy_(part)


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
    if transform.retract is None:
        apply(weight, direction, group, factor_R)
        return

    # In fp32, and bf16 is rounded once: from a step of bf16 no small way leads back, because it would be rounded away.
    moved = weight.float()  # the weight itself where it is fp32
    apply(moved, direction, group, factor_R)
    transform.retract(moved, state, tick)
    if moved is not weight:
        weight.copy_(moved)
