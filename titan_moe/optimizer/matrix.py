"""The torch optimizer around a transform: sharded states, AdamW for what is no matrix, rates by load, refusals.

Shapes: L MoE layers, E experts, R the experts of a stacked tensor that this rank holds (1 for a dense matrix).
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torch.optim import Optimizer

from titan_moe.optimizer.load_lr import Group, next_factors
from titan_moe.optimizer.transform import State, Tick, Transform, adam, fused_sgd, make_adamw_states, step_adamw
from titan_moe.runtime.dtensor import gathered, local, own_part, rows, sharded_like

NO_MATRICES = ("embedding", "norm")  # groups that are updated by AdamW whatever the shape
# Elements of a stacked parameter whose rows are updated together on a CPU. Temporaries of more are handed back to the
# system and faulted in again at each use, which doubles the time of an update of eight experts of 768 x 2048. A GPU
# keeps its memory, and each kernel costs a launch: there all rows are updated together.
CPU_ELEMENTS_PER_UPDATE = 1 << 22
COUNTS = ("step", "clock", "load_ema", "load_factor")  # states that are the same on every rank


class MatrixOptimizer(Optimizer):
    """Updates each expert of a stacked parameter (E, M, N), and each matrix (M, N), by a transform.

    `make(group, offset)` gives the transform for a group's settings; `offset` spreads the periodic work of the
    parameters over `period(group)` steps. What `fits` says no to goes to AdamW, fused, with the group's betas, eps, lr
    and decay: other shapes, and embeddings and norms by the name of their group.

    States are sharded as their parameter is, on whole experts, so that nothing is communicated. A dense matrix that is
    sharded is gathered: each rank updates all of it and keeps its own part, and its state is on every rank.
    A step whose gradients are not finite is refused; a step with lr 0 makes the states and changes nothing.
    """

    def __init__(
        self,
        kind: str,
        param_groups: list[Group],
        defaults: dict[str, Any],
        *,
        make: Callable[[Group, int], Transform],
        period: Callable[[Group], int] = lambda _: 0,
        fits: Callable[[Group, Tensor], bool] = lambda *_: True,
    ) -> None:
        super().__init__(param_groups, defaults)
        self.kind = kind
        self.known_finite = False  # the next step's gradients: who has read their norm already sets it
        self._memory: Tensor | None = None  # for the directions of a step, one after another
        self._make, self._fits = make, fits
        self._transforms: dict[Tensor, Transform] = {}
        matrices = [(group, p) for group in self.param_groups for p in group["params"] if self.is_matrix(group, p)]
        self._offsets = {p: period(group) * i // len(matrices) for i, (group, p) in enumerate(matrices)}
        for group, parameter in matrices:
            check_whole_experts(kind, group, parameter)

    def is_matrix(self, group: Group, parameter: Tensor) -> bool:
        """Whether the transform updates this parameter, AdamW if not."""
        return parameter.dim() in (2, 3) and group.get("name") not in NO_MATRICES and self._fits(group, parameter)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None, *, load: Tensor | None = None) -> Any:
        """Update all parameters that have a gradient; `load` (L, E) are tokens per expert, for load-based rates.

        There an expert without a token is left alone, with its state. Raises ValueError, before anything is changed,
        if a gradient is NaN or infinite.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self.known_finite:
            refuse_nonfinite(self.param_groups)
        self.known_finite = False
        for group in self.param_groups:
            by_load = "load_lr" in group
            factor_LE = next_factors(self, group, load) if by_load else None
            dense: list[Tensor] = []
            for number, parameter in enumerate(group["params"]):
                if parameter.grad is None:
                    continue
                if self.is_matrix(group, parameter) or by_load:
                    layer = group["layers"][number] if by_load else 0
                    factor_E = None if factor_LE is None else factor_LE[layer]
                    alive_E = None if load is None or factor_E is None else load[layer] > 0
                    self._step_matrix(group, parameter, factor_E, alive_E)
                else:
                    dense.append(parameter)
            make_adamw_states(dense, self.state)
            if group["lr"] > 0:
                step_adamw(group, dense, self.state)
        self._memory = None
        return loss

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state, and the settings of its groups."""
        super().__setstate__(state)
        self._transforms = {}

    def _transform(self, group: Group, parameter: Tensor) -> Transform:
        if parameter not in self._transforms:
            if self.is_matrix(group, parameter):
                made = self._make(group, self._offsets[parameter])
            else:
                made = adam(*group["betas"], eps=group["eps"])
            self._transforms[parameter] = made
        return self._transforms[parameter]

    def _step_matrix(self, group: Group, parameter: Tensor, factor_E: Tensor | None, alive_E: Tensor | None) -> None:
        gradient = parameter.grad
        assert gradient is not None
        transform = self._transform(group, parameter)
        state = self.state[parameter]
        if "clock" not in state:
            state.update(fresh_state(transform, parameter))
        if group["lr"] == 0:
            return
        state["clock"] += 1
        state["step"] += 1 if alive_E is None else alive_E
        stacked = parameter.dim() == 3
        mine = rows(parameter) if stacked else slice(0, 1)
        step, steps = int(state["clock"]), state["step"][mine]
        alive = None if alive_E is None else alive_E[mine]
        factor = None if factor_E is None else factor_E[mine]
        local_state = {name: local(value) for name, value in state.items() if name not in COUNTS}
        whole = local(gradient) if stacked else gathered(gradient).unsqueeze(0)
        target = local(parameter)
        for part in parts_of(whole, transform):
            some = whole[part].float().contiguous()
            tick = Tick(step, steps[part], self._spare, None if alive is None else alive[part])
            direction = transform.update(some, {name: value[part] for name, value in local_state.items()}, tick)
            if stacked:
                apply(target[part], direction, group, None if factor is None else factor[part])
            else:
                apply(target, own_part(direction[0], parameter), group, factor)

    def _spare(self, like: Tensor) -> Tensor:
        """Memory of a tensor's shape, zeros or what an earlier direction of this step left."""
        if self._memory is None or self._memory.numel() < like.numel():
            self._memory = like.new_zeros(like.numel())
        return self._memory[: like.numel()].view(like.shape)


def parts_of(stack: Tensor, transform: Transform) -> list[slice]:
    """Rows of (R, M, N) that are updated together, none where it has none (more ranks than experts)."""
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


def fresh_state(transform: Transform, parameter: Tensor) -> State:
    """A transform's first state, sharded as the parameter is, and how often the parameter and its rows were updated."""
    stacked, device = parameter.dim() == 3, parameter.device
    state = transform.init(local(parameter) if stacked else torch.empty((1, *parameter.shape), device=device))
    if stacked and isinstance(parameter, DTensor):
        state = {name: sharded_like(value, parameter) for name, value in state.items()}
    count = parameter.shape[0] if stacked else 1
    steps = torch.zeros(count, dtype=torch.float32, device=device)
    return {"clock": torch.zeros((), dtype=torch.float32), "step": steps, **state}


def check_whole_experts(kind: str, group: Group, parameter: Tensor) -> None:
    """Raise ValueError for a stacked parameter whose shards are not whole experts."""
    if not isinstance(parameter, DTensor) or parameter.dim() != 3:
        return
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


def refuse_nonfinite(groups: list[Group]) -> None:
    """Raise ValueError if a gradient on this rank is NaN or infinite, for the first such parameter."""
    found = [
        (f"parameter {i} of group {group.get('name', number)!r}", local(p.grad))
        for number, group in enumerate(groups)
        for i, p in enumerate(group["params"])
        if p.grad is not None
    ]
    if bad := first_nonfinite(found):
        raise ValueError(nonfinite_text(bad))


def first_nonfinite(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """Name the first tensor that holds a NaN or an infinity; waits for a GPU."""
    named = [(name, tensor) for name, tensor in named if tensor.numel()]
    if not named:
        return None
    norms = torch._foreach_norm([tensor for _, tensor in named], float("inf"))
    finite = torch.stack([norm.float() for norm in norms]).isfinite()
    return None if finite.all() else named[int(finite.int().argmin())][0]


def nonfinite_text(name: str) -> str:
    """Say that a step is refused because of a parameter's gradient."""
    return (
        f"the gradient of {name} is NaN or infinite: the step is refused and nothing was changed; lower optimizer.lr "
        "or warm up longer, and resume from the last checkpoint"
    )
