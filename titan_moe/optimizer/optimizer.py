"""One optimizer for all parameter groups, each of which names the rule that it is updated by.

Begin with `Optimizer.step`. A rule makes a `Transform` (AdamW, Shampoo, SOAP, Muon), which turns a gradient into the
direction of an update. This file does the rest: which parameters a transform takes, states and their shards, learning
rates, weight decay, and that a step with a NaN changes nothing. A parameter is updated in one of three ways:

- by a kernel, which makes the whole step of tensors of any shape in one pass (AdamW): `step_by_kernel`;
- by a direction, for a dense matrix and for each expert's matrix of a stacked tensor: `Optimizer._step_matrix`;
- by another torch.optim.Optimizer, one from outside: `Optimizer._step_outside`.

In all three the experts may have learning rates that depend on how many tokens they got (`load_lr`). An expert that got
none in a step keeps its state and its weights; only decay goes on, if it is not to depend on the rate.

Shapes: L MoE layers, E experts, R the experts of a stacked tensor that this rank holds (1 for a dense matrix), M x N.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from titan_moe.optimizer.groups import NO_MATRICES
from titan_moe.optimizer.load_lr import Group, keep_factors
from titan_moe.optimizer.transform import Kernel, State, Tick, Transform, adamw, fused_sgd, keep_dead_rows
from titan_moe.runtime.dtensor import gathered, local, local_rows, own_part, sharded_like

# Elements of a stacked parameter whose rows are updated together on a CPU. Temporaries of more are handed back to the
# system and faulted in again at each use, which doubles the time of an update of eight experts of 768 x 2048. A GPU
# keeps its memory, and each kernel costs a launch: there all rows are updated together.
CPU_ELEMENTS_PER_UPDATE = 1 << 22
REPLICATED_STATES = ("step", "clock", "load_ema", "load_factor")  # by name; each rank has all of them


class Rule(NamedTuple):
    """How a group is updated: a name for people and checkpoints, and what makes a `Transform` of a group's settings."""

    name: str
    make: Callable[..., Transform]


class Scalars(NamedTuple):
    """What kernels read on the device so that the host need not wait for it: fp32 scalars, None for no effect.

    A kernel divides gradients by `grad_scale`, and changes nothing where `skip` is 1.
    """

    skip: Tensor | None = None
    grad_scale: Tensor | None = None


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that updates each group by the entry of `rules` at the group's place.

    An entry is a `Rule` or an optimizer from outside. A rule whose transform has a kernel updates all parameters of its
    groups. Any other updates matrices: each expert of a stacked parameter (E, M, N), and each (M, N). What is no
    matrix, is larger than the transform takes, or is in a group of `NO_MATRICES` goes to AdamW, with the group's betas,
    eps, rate and decay.

    States are sharded as their parameter is. A matrix optimizer needs whole experts on each rank, and then communicates
    nothing. A dense matrix that is sharded is gathered: each rank computes the update of all of it and applies its own
    part, so that the state of such a matrix is whole on every rank.
    An optimizer from outside shares groups and states with this one, so that there is one of each to save.
    """

    def __init__(
        self,
        param_groups: Iterable[Any],
        rules: Sequence[Rule | torch.optim.Optimizer],
        defaults: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(param_groups, dict(defaults or {}))
        self.rules = list(rules)
        self._outside = list(dict.fromkeys(rule for rule in rules if isinstance(rule, torch.optim.Optimizer)))
        for outside in self._outside:
            self.state.update(outside.state)  # what some make when they are made
        self._prepare()

    @classmethod
    def around(cls, outside: torch.optim.Optimizer) -> "Optimizer":
        """One whose groups are all updated by an optimizer from outside; one of ours is given back as it is."""
        return outside if isinstance(outside, cls) else cls(outside.param_groups, [outside] * len(outside.param_groups))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state, and the settings of its groups."""
        super().__setstate__(state)
        self._prepare()

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        load: Tensor | None = None,
        grad_norm: Tensor | None = None,
        max_norm: float = 0.0,
        finite: Tensor | None = None,
    ) -> Any:
        """Update every parameter that has a gradient.

        `load` (L, E): the tokens of each expert in this step, of all ranks; for a group whose rates depend on it.
        `grad_norm`, a scalar: the norm of all gradients on all ranks. They are clipped to `max_norm` (0: they are not).
        `finite`, a bool scalar, the same on all ranks: where it is false, nothing changes, neither weights nor states
        nor counts of steps. By default it is whether grad_norm is finite.

        Returns the factors (L, E) of the experts' rates, all 0 in a step that changed nothing; None where no rate
        depends on load; with a `closure`, its loss. With lr 0 the states of matrices are made, and nothing else.
        Raises ValueError, before anything is changed, where neither grad_norm nor finite is given and a gradient in a
        group of matrices is NaN or infinite.
        """
        loss = None if closure is None else torch.enable_grad()(closure)()
        if finite is None and grad_norm is not None:
            finite = grad_norm.isfinite()

        # Kernels leave a step out on the device, and the host waits for nothing. A transform would keep a NaN for ever,
        # and what it does every n-th step is counted on the host: for its sake one flag is read there.
        skip = None if finite is None else (~finite).float()
        if self.waits():
            skip = None
            if self._is_refused(finite):
                by_load = load is not None and any("load_lr" in group for group in self.param_groups)
                factor_LE = torch.zeros(load.shape, device=load.device) if by_load else None
                return loss if closure is not None else factor_LE

        # at most one group, the experts, has rates by load and gives factors
        scalars = Scalars(skip, self._clip(grad_norm, max_norm))
        factors = [self._step_group(group, rule, load, scalars) for group, rule in self._ruled()]
        factors += [self._step_outside(outside, load, scalars) for outside in self._outside]
        factor_LE = next((group_LE for group_LE in factors if group_LE is not None), None)
        if factor_LE is not None and finite is not None:
            factor_LE = torch.where(finite, factor_LE, 0.0)

        self._memory = None  # up to a whole stack of experts, which the next forward pass has use for
        return loss if closure is not None else factor_LE

    def waits(self) -> bool:
        """Whether a step reads on the host whether it is finite, which waits for a GPU."""
        return bool(self._matrices) or not all(skips_by_itself(outside) for outside in self._outside)

    def is_matrix(self, parameter: Tensor) -> bool:
        """Whether a parameter is updated by a transform's direction."""
        return parameter in self._matrices

    def _ruled(self) -> list[tuple[Group, Rule]]:
        """The groups that are updated by a transform of ours, with their rules."""
        pairs = zip(self.param_groups, self.rules, strict=True)
        return [(group, rule) for group, rule in pairs if isinstance(rule, Rule)]

    def _prepare(self) -> None:
        """Make what depends on the groups' settings: each matrix' transform, and the offset of its periodic work."""
        self._memory: Tensor | None = None  # for the directions of a step, one after another
        self._matrices: dict[Tensor, Transform] = {}
        self._offsets: dict[Tensor, int] = {}

        # the very same groups and states, not copies: a rate that is set here, a state that is loaded, holds there
        for outside in self._outside:
            groups = [group for group, rule in zip(self.param_groups, self.rules, strict=True) if rule is outside]
            outside.__setstate__({"state": self.state, "param_groups": groups})

        # a transform for each matrix, because it may keep things of its own beside the state (Meta's package does)
        matrices: dict[Rule, list[Tensor]] = {}
        for group, rule in self._ruled():
            for parameter in group["params"]:
                transform = transform_of(rule.make, group)
                if takes(transform, group, parameter):
                    check_whole_experts(rule.name, group, parameter)
                    self._matrices[parameter] = transform
                    matrices.setdefault(rule, []).append(parameter)

        # Roots and bases are the dearest work of a step. Those of one rule's matrices, in whatever groups, are spread
        # over the period, so that they do not all fall into one step; with period 0 they do.
        for parameters in matrices.values():
            for number, parameter in enumerate(parameters):
                self._offsets[parameter] = self._matrices[parameter].period * number // len(parameters)

    def _is_refused(self, finite: Tensor | None) -> bool:
        """Read on the host whether the step is not finite; without a flag an error says which gradient is not."""
        if finite is None:
            refuse_nonfinite([group for group, rule in self._ruled() if not transform_of(rule.make, group).kernel])
        return finite is not None and not finite

    def _clip(self, grad_norm: Tensor | None, max_norm: float) -> Tensor | None:
        """Return the scalar that kernels divide gradients by; those that no kernel reads are divided here.

        A kernel does it while it reads them, which saves a pass over memory.
        """
        if grad_norm is None or max_norm <= 0:
            return None
        grad_scale = ((grad_norm + 1e-6) / max_norm).clamp(min=1.0)
        parameters = list(self._matrices)
        for outside in self._outside:
            if not takes_scalars(outside):
                parameters += [parameter for group in outside.param_groups for parameter in group["params"]]
        divide([parameter.grad for parameter in parameters if parameter.grad is not None], grad_scale)
        return grad_scale

    def _step_group(self, group: Group, rule: Rule, load_LE: Tensor | None, scalars: Scalars) -> Tensor | None:
        """Update a group by its transform; returns the factors (L, E) of its rates if they depend on load."""
        # What is no matrix goes to a kernel in one call: that of the transform, or AdamW's.
        by_kernel = [parameter for parameter in group["params"] if parameter.grad is not None]
        matrices: list[Tensor] = []
        if self._matrices:  # looking for each parameter takes the host longer than the rest of this
            matrices = [parameter for parameter in by_kernel if parameter in self._matrices]
            by_kernel = [parameter for parameter in by_kernel if parameter not in self._matrices]
        kernel = (transform_of(rule.make, group).kernel or transform_of(adamw, group).kernel) if by_kernel else None

        # one rate for all: one call for all parameters
        if "load_lr" not in group:
            if kernel is not None:
                step_by_kernel(kernel, group, by_kernel, self.state, scalars)
            for parameter in matrices:
                self._step_matrix(group, parameter)
            return None

        # the rates of experts are those of their layer, so a kernel is called for one layer after another
        layers = dict(zip(group["params"], group["layers"], strict=True))
        factor_LE = keep_factors(self.state, group, load_LE, scalars.skip)
        for layer in dict.fromkeys(group["layers"]):
            factor_E, alive_E = None, None
            if factor_LE is not None and load_LE is not None:
                factor_E, alive_E = factor_LE[layer], load_LE[layer] > 0
            experts = [parameter for parameter in by_kernel if layers[parameter] == layer]
            if experts and kernel is not None:
                step_experts_by_kernel(kernel, group, experts, self.state, scalars, factor_E, alive_E)
            for parameter in matrices:
                if layers[parameter] == layer:
                    self._step_matrix(group, parameter, factor_E, alive_E)
        return factor_LE

    def _step_matrix(
        self, group: Group, parameter: Tensor, factor_E: Tensor | None = None, alive_E: Tensor | None = None
    ) -> None:
        """Update the experts of (E, M, N) that this rank holds, or all of (M, N), by the direction of its transform.

        `factor_E` multiplies the experts' rates; experts that are not `alive_E` got no token and are left alone.
        """
        transform, state, gradient = self._matrices[parameter], self.state[parameter], parameter.grad
        assert gradient is not None
        if "clock" not in state:
            state.update(fresh_state(transform, parameter))
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
                spare=self._spare,
                weight=lambda part=part: weight[part] if stacked else gathered(parameter).detach().unsqueeze(0),
                alive=None if alive is None else alive[part],
                offset=self._offsets[parameter],
            )
            part_states = {name: value[part] for name, value in states.items()}
            direction = transform.update(stack[part].float().contiguous(), part_states, tick)
            if stacked:
                apply(weight[part], direction, group, None if factor is None else factor[part])
            else:
                apply(weight, own_part(direction[0], parameter), group, factor)  # (1, M, N) -> this rank's part

    def _spare(self, like: Tensor) -> Tensor:
        """Memory of a tensor's shape, zeros or what an earlier direction of this step left."""
        if self._memory is None or self._memory.numel() < like.numel():
            self._memory = like.new_zeros(like.numel())
        return self._memory[: like.numel()].view(like.shape)

    def _step_outside(self, outside: torch.optim.Optimizer, load_LE: Tensor | None, scalars: Scalars) -> Tensor | None:
        """Let an optimizer from outside take its step, and scale its experts' updates if their rates depend on load.

        The weights p of an expert with factor r become p_old + r (p_new - p_old). That is a learning rate of r * lr for
        every optimizer whose update is proportional to it. Decay that is not scaled is taken to be decoupled, p -= lr *
        weight_decay * p. An expert without a token gets back what has the parameter's shape in the state; a count of
        steps is one for all experts. During the step this costs a copy of the experts and of these states.
        """
        # only torch.optim's interface is there to ask, so what must stay is copied before the step
        by_load = [group for group in outside.param_groups if "load_lr" in group]
        experts = [p for group in by_load for p in group["params"] if p.grad is not None]
        weights = {parameter: local(parameter).clone() for parameter in experts}
        states = {
            p: {k: local(v).clone() for k, v in self.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape}
            for p in experts
        }

        # torch's fused ones have the scalars from here for this step, as from torch.amp.GradScaler
        reads_scalars = takes_scalars(outside)
        if reads_scalars:
            outside.grad_scale = scalars.grad_scale  # pyrefly: ignore[missing-attribute]
            outside.found_inf = scalars.skip  # pyrefly: ignore[missing-attribute]
        outside.step()
        if reads_scalars:
            outside.grad_scale = outside.found_inf = None  # pyrefly: ignore[missing-attribute]

        # without a load, which is so while torch makes the states of a checkpoint, all experts are alike
        factor_LE = None
        for group in by_load:
            factor_LE = keep_factors(self.state, group, load_LE, scalars.skip)
            for parameter, layer in zip(group["params"], group["layers"], strict=True):
                if factor_LE is not None and load_LE is not None and parameter in weights:
                    rows = local_rows(parameter)
                    scale_update(parameter, weights[parameter], factor_LE[layer][rows], group)
                    for name, old in states[parameter].items():
                        keep_dead_rows(local(self.state[parameter][name]), old, load_LE[layer][rows] > 0)
        return factor_LE


def combine(
    groups: list[Group], names: Mapping[str, str], build: Callable[[str, list[Group]], torch.optim.Optimizer]
) -> Optimizer:
    """Build the optimizer over all groups, of which group g is updated as `names[g]` says.

    `build(name, groups)` makes an optimizer of some of them: one of ours, whose rule is taken, or one from outside.
    """
    updated_by: dict[str, tuple[Group, Rule | torch.optim.Optimizer]] = {}
    for name in dict.fromkeys(names[group["name"]] for group in groups):
        built = Optimizer.around(build(name, [group for group in groups if names[group["name"]] == name]))
        updated_by |= {
            group["name"]: (group, rule) for group, rule in zip(built.param_groups, built.rules, strict=True)
        }
    ordered, rules = zip(*(updated_by[group["name"]] for group in groups), strict=True)
    return Optimizer(ordered, rules)


def kind_of(optimizer: torch.optim.Optimizer | Rule) -> str:
    """What updates which groups, for checkpoints to compare: `AdamW`, or `AdamW (router, dense) + shampoo (expert)`."""
    if not isinstance(optimizer, Optimizer):
        return optimizer.name if isinstance(optimizer, Rule) else type(optimizer).__name__
    groups: dict[Any, list[str]] = {}
    for group, rule in zip(optimizer.param_groups, optimizer.rules, strict=True):
        groups.setdefault(rule, []).append(group.get("name", ""))
    if len(groups) == 1:
        return kind_of(optimizer.rules[0])
    return " + ".join(f"{kind_of(rule)} ({', '.join(members)})" for rule, members in groups.items())


def describe_group(optimizer: torch.optim.Optimizer, group: Group) -> str:
    """How a group is updated, where it is not all by AdamW: `shampoo, but AdamW for 2 tensors (1,024 parameters)`."""
    if not isinstance(optimizer, Optimizer):
        return kind_of(optimizer)

    # AdamW, or an optimizer from outside, which says no more of itself than its name
    rule = next(rule for g, rule in zip(optimizer.param_groups, optimizer.rules, strict=True) if g is group)
    if not isinstance(rule, Rule) or transform_of(rule.make, group).kernel is not None:
        return kind_of(rule)

    # one who asked for a matrix optimizer wants to know what it does not take
    rest = [parameter for parameter in group["params"] if not optimizer.is_matrix(parameter)]
    if len(rest) == len(group["params"]):
        return f"AdamW (no matrices for {rule.name})"
    if rest:
        count = sum(parameter.numel() for parameter in rest)
        return f"{rule.name}, but AdamW for {len(rest)} tensors ({count:,} parameters)"
    return rule.name


def transform_of(make: Callable[..., Transform], group: Group) -> Transform:
    """Make a transform with the group's settings that it takes; its beta1 and beta2 are the group's `betas`."""
    settings = {**group, **dict(zip(("beta1", "beta2"), group["betas"], strict=True))}
    return make(**{name: settings[name] for name in arguments_of(make)})


@functools.cache
def arguments_of(make: Callable[..., Transform]) -> tuple[str, ...]:
    """The names of a maker's arguments."""
    return tuple(inspect.signature(make).parameters)


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

    # an expert without a token has factor 0, and its direction is undefined
    factor = factor_R.view(-1, 1, 1)
    step = torch.where(factor > 0, direction * (lr * factor), 0.0)
    if group["load_lr_decay"]:
        step += weight * (decay * factor)  # so that the weight is rounded once, as by the kernel
    else:
        weight.mul_(1 - decay)
    weight.sub_(step)


def scale_update(parameter: Tensor, old: Tensor, factor_R: Tensor, group: Group) -> None:
    """Replace this rank's rows by old + factor * (new - old); decay is in full unless the group scales it too."""
    new = local(parameter)
    factor = factor_R.to(new.dtype).view(-1, *[1] * (new.dim() - 1))
    new.copy_(torch.lerp(old, new, factor))
    if not group["load_lr_decay"]:
        new.addcmul_(old, 1 - factor, value=-group["lr"] * group.get("weight_decay", 0.0))  # what lerp took of it


def step_by_kernel(
    kernel: Kernel, group: Group, parameters: Sequence[Tensor], states: Mapping[Tensor, State], scalars: Scalars
) -> None:
    """Update parameters of any shape in one call."""
    lists, steps = kernel_tensors(kernel, parameters, states)
    torch._foreach_add_(steps, 1 if scalars.skip is None else [1 - scalars.skip] * len(steps))

    # local tensors: for DTensors the host would take as long to look at each as a GPU takes for a layer
    # Plain tensors are passed as they are: to detach each of them takes the host 1 % of a small model's step.
    parts = lists
    if any(isinstance(parameter, DTensor) for parameter in parameters):
        parts = [[local(tensor) for tensor in tensors] for tensors in lists]
    kernel.step(parts, steps, group["lr"], group["weight_decay"], skip=scalars.skip, grad_scale=scalars.grad_scale)


def step_experts_by_kernel(
    kernel: Kernel,
    group: Group,
    parameters: Sequence[Tensor],
    states: Mapping[Tensor, State],
    scalars: Scalars,
    factor_E: Tensor | None,
    alive_E: Tensor | None,
) -> None:
    """Update the experts of one layer as if each were a parameter of its own, with a rate and a step count (E,).

    The kernel is called for each expert; nothing is copied, and no value is read on the host of a GPU. An expert
    without a token is left alone, its states and step count too.
    """
    lists, steps = kernel_tensors(kernel, parameters, states, by_expert=True)
    if factor_E is None or alive_E is None:  # no load: all alike
        factor_E = torch.ones(parameters[0].shape[0], device=parameters[0].device)
        alive_E = factor_E > 0
    skip_E = (~alive_E).to(torch.float32)
    if scalars.skip is not None:
        skip_E = skip_E.maximum(scalars.skip)

    # decay that is not scaled goes on for all experts, so the kernel is not to do it
    weight_decay = group["weight_decay"]
    if not group["load_lr_decay"]:
        for weight in map(local, parameters):
            decayed = weight * (1 - group["lr"] * weight_decay)  # a factor on the device would be of weight's type
            weight.copy_(decayed if scalars.skip is None else torch.where(scalars.skip > 0, weight, decayed))
        weight_decay = 0.0

    # counts are of all experts on every rank, so that they are the same whatever the layout
    for step_E in steps:
        step_E.add_(1 - skip_E)

    # views of the rows of every tensor: those of this rank's experts
    rows = local_rows(parameters[0])
    rates, skips = (factor_E * group["lr"])[rows].unbind(), skip_E[rows].unbind()  # R scalars each
    counts = [step_E[rows].unbind() for step_E in steps]
    experts = [[local(tensor).unbind() for tensor in tensors] for tensors in lists]  # (R, M, N) -> R of (M, N)
    for row, (rate, skip) in enumerate(zip(rates, skips, strict=True)):
        tensors = [[tensor[row] for tensor in tensors] for tensors in experts]
        row_steps = [count[row] for count in counts]
        kernel.step(tensors, row_steps, rate, weight_decay, skip=skip, grad_scale=scalars.grad_scale)


def kernel_tensors(
    kernel: Kernel, parameters: Sequence[Tensor], states: Mapping[Tensor, State], *, by_expert: bool = False
) -> tuple[list[list[Tensor]], list[Tensor]]:
    """Lists of weights, gradients and each of a kernel's states, and of step counts: scalars, or by expert (E,).

    States that are not there yet are made, sharded as their parameter is.
    """
    own_states = [states[parameter] for parameter in parameters]
    for parameter, state in zip(parameters, own_states, strict=True):
        if "step" not in state:
            shape = parameter.shape[:1] if by_expert else ()
            count = torch.zeros(shape, dtype=torch.float32, device=parameter.device)
            state.update(step=count, **{name: torch.zeros_like(parameter) for name in kernel.states})
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    lists = [list(parameters), gradients, *([state[name] for state in own_states] for name in kernel.states)]
    return lists, [state["step"] for state in own_states]


def fresh_state(transform: Transform, parameter: Tensor) -> State:
    """A transform's first state, sharded as the parameter is, and the counts of steps at zero.

    `clock`, a scalar on the CPU, counts the parameter's steps; `step`, (E,) or (1,), those in which a row was alive.
    """
    # of a dense matrix, which may be sharded, a transform sees a whole one of the same shape, without its values
    stacked, device = parameter.dim() == 3, parameter.device
    state = transform.init(local(parameter) if stacked else torch.empty((1, *parameter.shape), device=device))
    if stacked and isinstance(parameter, DTensor):
        state = {name: sharded_like(value, parameter) for name, value in state.items()}
    steps = torch.zeros(parameter.shape[0] if stacked else 1, dtype=torch.float32, device=device)
    return {"clock": torch.zeros((), dtype=torch.float32), "step": steps, **state}


def divide(gradients: Sequence[Tensor], scale: Tensor) -> None:
    """Divide gradients by a scalar on their device, in place."""
    gradients = [local(gradient) for gradient in gradients]
    if gradients and all(gradient.dtype == scale.dtype for gradient in gradients):
        torch._foreach_div_(gradients, scale)
    else:
        for gradient in gradients:
            gradient.div_(scale.view(1))  # not a scalar, which a GPU rounds to the gradient's type first


def takes_scalars(outside: torch.optim.Optimizer) -> bool:
    """Whether an optimizer from outside is given `grad_scale` and `found_inf`, which torch's fused ones read.

    Not where rates depend on load: a step that it skips on the device would be scaled all the same.
    """
    by_load = any("load_lr" in group for group in outside.param_groups)
    return getattr(outside, "_step_supports_amp_scaling", False) and not by_load


def skips_by_itself(outside: torch.optim.Optimizer) -> bool:
    """Whether an optimizer's step changes nothing where its `found_inf` is 1, on the device.

    Not torch's SGD: its first momentum is memory that is not initialized, and stays so in a step that is skipped.
    """
    return takes_scalars(outside) and not isinstance(outside, torch.optim.SGD)


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


def refuse_nonfinite(groups: Sequence[Group]) -> None:
    """Raise ValueError if a gradient on this rank is NaN or infinite, for the first such parameter; waits for a GPU."""
    # parameters have no names here, so the first one is told by its place in its group
    named = [
        (f"parameter {i} of group {group.get('name', number)!r}", local(p.grad))
        for number, group in enumerate(groups)
        for i, p in enumerate(group["params"])
        if p.grad is not None and local(p.grad).numel()
    ]
    if not named:
        return

    # one read on the host for all of them
    norms = torch._foreach_norm([tensor for _, tensor in named], float("inf"))
    finite = torch.stack([norm.float() for norm in norms]).isfinite()
    if not finite.all():
        raise ValueError(
            f"the gradient of {named[int(finite.int().argmin())][0]} is NaN or infinite: the step is refused and "
            "nothing was changed; lower optimizer.lr or warm up longer, and resume from the last checkpoint"
        )
