"""One optimizer for all parameter groups, each of which names the rule that it is updated by.

Begin with `Optimizer.step`. A rule makes a `Transform` (AdamW, Shampoo, SOAP, Muon), which turns a gradient into the
direction of an update. This file does the rest: which parameters a transform takes, states and their shards, learning
rates, weight decay, and that a step with a NaN changes nothing. A parameter is updated in one of three ways:

- by a kernel, which makes the whole step of tensors of any shape in one pass (AdamW): `step_by_kernel`;
- by a direction, for a dense matrix and for each expert's matrix of a stacked tensor: `step_matrix`, and `step_owned`
  for a dense matrix that is sharded;
- by another torch.optim.Optimizer, one from outside: `step_outside`.

In all three the experts may have learning rates that depend on how many tokens they got (`load_lr`). An expert that got
none in a step keeps its state and its weights; only decay goes on, if it is not to depend on the rate.

Shapes: L MoE layers, E experts, R the experts of a stacked tensor that this rank holds (1 for a dense matrix), M x N.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.optimizer.groups import Heads, Scale, table_of
from titan_moe.optimizer.kernels import Scalars, step_by_kernel, step_experts_by_kernel
from titan_moe.optimizer.load_lr import Group, keep_factors, layer_factors, parameter_by_layer
from titan_moe.optimizer.matrix import Matrix, Task, check_whole_experts, step_matrix, step_owned, takes
from titan_moe.optimizer.outside import skips_by_itself, step_outside, takes_scalars
from titan_moe.optimizer.owners import find_owners
from titan_moe.optimizer.rounding import check_state_dtype, is_narrow, narrowed
from titan_moe.optimizer.transform import Kernel, Transform, adamw
from titan_moe.runtime.dtensor import local, wrapped_like


class Rule(NamedTuple):
    """How a group is updated: a name for people and checkpoints, and what makes a `Transform` of a group's settings."""

    name: str
    make: Callable[..., Transform]


class Optimizer(torch.optim.Optimizer):
    """A torch.optim.Optimizer that updates each group by the entry of `rules` at the group's place.

    An entry is a `Rule` or an optimizer from outside. A rule whose transform has a kernel updates all parameters of its
    groups. Any other updates matrices: each expert of a stacked parameter (E, M, N), and each (M, N). What is no
    matrix, is larger than the transform takes, or is in a group of `NO_MATRICES` goes to AdamW, with the group's betas,
    eps, rate and decay.

    States are sharded as their parameter is. A matrix optimizer needs whole experts on each rank, and then communicates
    nothing. A dense matrix that is sharded has an owner: one rank gathers it, keeps its state and computes its update,
    of which each rank gets the part that it holds.
    An optimizer from outside shares groups and states with this one, so that there is one of each to save.

    A group with `per_head` has `heads`, of each parameter their number and the dimension that they share: each head is
    then a matrix by itself.
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

        # of single parameters, and not among the settings of groups, which checkpoints compare by name
        self._scales: dict[Tensor, Scale] = {}
        for group, rule in zip(self.param_groups, self.rules, strict=True):
            by_parameter = dict(zip(group["params"], group.pop("scales", ()), strict=False))
            self._scales |= {parameter: scale for parameter, scale in by_parameter.items() if scale != Scale()}
            check_scales(group, rule, by_parameter.values())
            check_heads(group, rule)
        self._prepare()

    @classmethod
    def around(cls, outside: torch.optim.Optimizer) -> "Optimizer":
        """One whose groups are all updated by an optimizer from outside; one of ours is given back as it is."""
        return outside if isinstance(outside, cls) else cls(outside.param_groups, [outside] * len(outside.param_groups))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over a loaded state, and the settings of its groups."""
        super().__setstate__(state)
        self._prepare()
        self._narrow_again()

    def use_settings(self, groups: Iterable[Mapping[str, Any]]) -> None:
        """Give groups these settings, in their order: those of a configuration, after a checkpoint brought its own."""
        # what transforms were made with is among them, so that these have to be made anew
        for group, settings in zip(self.param_groups, groups, strict=True):
            group.update(settings)
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
        depends on load; with a `closure`, its loss. Where several groups have rates by load, a layer's are those of the
        first group that has parameters of it, and ones where none has; `load_factors` has those of each group. With lr
        0 the states of matrices are made, and nothing else.
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

        # of each group the factors of its layers, in the order in which groups are updated
        self._sharded = []
        scalars = Scalars(skip, self._clip(grad_norm, max_norm))
        factors = [self._step_group(group, rule, load, scalars) for group, rule in self._ruled()]
        for outside in self._outside:
            factors += step_outside(outside, self.state, load, scalars)
        step_owned(self._sharded, self._spare)
        factor_LE = layer_factors(factors, load)
        if factor_LE is not None and finite is not None:
            factor_LE = torch.where(finite, factor_LE, 0.0)

        self._memory = None  # up to a whole stack of experts, which the next forward pass has use for
        return loss if closure is not None else factor_LE

    def load_factors(self, finite: Tensor | None = None) -> dict[str, Tensor]:
        """Of each group whose rates depend on load the factors of its layers' experts in the last step, (l, E).

        `finite` as in `step`: all 0 where it is false.
        """
        factors = {}
        for number, group in enumerate(self.param_groups):
            parameters = parameter_by_layer(group).values() if "load_lr" in group else ()
            states = [self.state.get(parameter, {}) for parameter in parameters]
            if states and all("load_factor" in state for state in states):
                factor_lE = torch.stack([state["load_factor"] for state in states])
                name = group.get("name", str(number))
                factors[name] = factor_lE if finite is None else torch.where(finite, factor_lE, 0.0)
        return factors

    def waits(self) -> bool:
        """Whether a step reads on the host whether it is finite, which waits for a GPU."""
        return bool(self._matrices) or not all(skips_by_itself(outside) for outside in self._outside)

    def is_matrix(self, parameter: Tensor) -> bool:
        """Whether a parameter is updated by a transform's direction."""
        return parameter in self._matrices

    @contextmanager
    @torch.no_grad()
    def evaluating(self) -> Iterator[None]:
        """Within it parameters have the averaged weights, and after it, to the bit, those that are trained."""
        before = {parameter: local(parameter).clone() for parameter, *_ in averages(self)}
        try:
            for parameter, average in averaged_weights(self):
                local(parameter).copy_(local(average))
            yield
        finally:
            for parameter, weight in before.items():
                local(parameter).copy_(weight)

    def _ruled(self) -> list[tuple[Group, Rule]]:
        """The groups that are updated by a transform of ours, with their rules."""
        pairs = zip(self.param_groups, self.rules, strict=True)
        return [(group, rule) for group, rule in pairs if isinstance(rule, Rule)]

    def _prepare(self) -> None:
        """Make what depends on the groups' settings: each matrix' transform, and the offset of its periodic work."""
        self._memory: Tensor | None = None  # for the directions of a step, one after another
        self._matrices: dict[Tensor, Matrix] = {}
        self._sharded: list[Task] = []  # of a step: they are updated together, after all that a rank does by itself

        # the very same groups and states, not copies: a rate that is set here, a state that is loaded, holds there
        for outside in self._outside:
            groups = [group for group, rule in zip(self.param_groups, self.rules, strict=True) if rule is outside]
            outside.__setstate__({"state": self.state, "param_groups": groups})

        # places among all parameters, which are the same in every layout
        every = [parameter for group in self.param_groups for parameter in group["params"]]
        self._numbers = {parameter: number for number, parameter in enumerate(every)}

        # a transform for each matrix, because it may keep things of its own beside the state (Meta's package does)
        transforms: dict[Rule, dict[Tensor, Transform]] = {}
        heads: dict[Tensor, Heads] = {}
        for group, rule in self._ruled():
            heads |= zip(group["params"], group.get("heads", ()), strict=False)
            check_average(rule, group)
            for part in self._parts(group, group["params"]):
                for parameter in part["params"]:
                    transform = transform_of(rule.make, part)
                    if takes(transform, group, parameter, heads.get(parameter)):
                        check_whole_experts(rule.name, group, parameter)
                        check_state_dtype(rule.name, group, transform)
                        transforms.setdefault(rule, {})[parameter] = transform

        # Roots and bases are the dearest work of a step. Those of one rule's matrices, in whatever groups, are spread
        # over the period, so that they do not all fall into one step; with period 0 they do.
        owners = find_owners([parameter for of_rule in transforms.values() for parameter in of_rule])
        for of_rule in transforms.values():
            for number, (parameter, transform) in enumerate(of_rule.items()):
                offset = transform.period * number // len(of_rule)
                matrix = Matrix(
                    transform, offset, heads.get(parameter), self._numbers[parameter], owners.get(parameter)
                )
                self._matrices[parameter] = matrix

    def _narrow_again(self) -> None:
        """Give states that torch has loaded in their parameter's type the one that they were saved in; exact."""
        for group, rule in self._ruled():
            for parameter in group["params"] if is_narrow(group) else ():
                matrix = self._matrices.get(parameter)
                names = matrix.transform.rounded if matrix else kernel_of(rule, group).rounded
                self.state[parameter] = narrowed(self.state.get(parameter, {}), names)

    def _parts(self, group: Group, parameters: Sequence[Tensor]) -> list[Group]:
        """These parameters of a group, apart by their scales: each part with the settings that hold for it."""
        if not self._scales:
            return [{**group, "params": parameters}]
        by_scale: dict[Scale, list[Tensor]] = {}
        for parameter in parameters:
            by_scale.setdefault(self._scales.get(parameter, Scale()), []).append(parameter)
        return [{**scaled(group, scale), "params": members} for scale, members in by_scale.items()]

    def _is_refused(self, finite: Tensor | None) -> bool:
        """Read on the host whether the step is not finite; without a flag an error says which gradient is not."""
        if finite is None:
            refuse_nonfinite([group for group, rule in self._ruled() if not transform_of(rule.make, group).kernel])
        return finite is not None and not finite

    def _clip(self, grad_norm: Tensor | None, max_norm: float) -> Tensor | None:
        """Return the scalar that kernels divide gradients by; those that no kernel reads are divided here.

        A kernel does it while it reads them, which saves a pass over memory.
        """
        grad_scale = None if grad_norm is None else clip_scale(grad_norm, max_norm)
        if grad_scale is None:
            return None
        parameters = list(self._matrices)
        for outside in self._outside:
            if not takes_scalars(outside):
                parameters += [parameter for group in outside.param_groups for parameter in group["params"]]
        divide([parameter.grad for parameter in parameters if parameter.grad is not None], grad_scale)
        return grad_scale

    def _step_group(self, group: Group, rule: Rule, load_LE: Tensor | None, scalars: Scalars) -> dict[int, Tensor]:
        """Update a group by its transform; returns of each layer the factors (E,) of its rates, if they have any."""
        # one rate for all: one call for all parameters
        parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
        if "load_lr" not in group:
            for part in self._parts(group, parameters):
                self._step_part(part, rule, scalars)
            return {}

        # the rates of experts are those of their layer, so a kernel is called for one layer after another
        layers = dict(zip(group["params"], group["layers"], strict=True))
        factors = keep_factors(self.state, group, load_LE, scalars.skip)
        for layer in dict.fromkeys(group["layers"]):
            factor_E, alive_E = None, None
            if load_LE is not None:
                factor_E, alive_E = factors[layer], load_LE[layer] > 0
            for part in self._parts(group, [parameter for parameter in parameters if layers[parameter] == layer]):
                self._step_part(part, rule, scalars, factor_E, alive_E)
        return factors

    def _step_part(
        self,
        part: Group,
        rule: Rule,
        scalars: Scalars,
        factor_E: Tensor | None = None,
        alive_E: Tensor | None = None,
    ) -> None:
        """Update parameters that have all settings alike; with load-based rates those of one layer's experts."""
        # What is no matrix goes to a kernel in one call: that of the transform, or AdamW's.
        by_kernel, matrices = part["params"], []
        if self._matrices:  # looking for each parameter takes the host longer than the rest of this
            matrices = [parameter for parameter in by_kernel if parameter in self._matrices]
            by_kernel = [parameter for parameter in by_kernel if parameter not in self._matrices]
        if by_kernel:
            kernel = kernel_of(rule, part)
            if "load_lr" in part:
                step_experts_by_kernel(kernel, part, by_kernel, self.state, scalars, self._numbers, factor_E, alive_E)
            else:
                step_by_kernel(kernel, part, by_kernel, self.state, scalars, self._numbers)

        # What a rank holds whole is updated now, the rest at the end of the step, together with that of other groups.
        for parameter in matrices:
            task = Task(self._matrices[parameter], parameter, self.state[parameter], part)
            if task.matrix.owned is not None:
                self._sharded.append(task)
            else:
                step_matrix(task, self._spare, factor_E, alive_E)

    def _spare(self, like: Tensor) -> Tensor:
        """Memory of a tensor's shape, zeros or what an earlier direction of this step left."""
        if self._memory is None or self._memory.numel() < like.numel():
            self._memory = like.new_zeros(like.numel())
        return self._memory[: like.numel()].view(like.shape)


def combine(
    groups: list[Group], names: Mapping[str, str], build: Callable[[str, list[Group]], torch.optim.Optimizer]
) -> Optimizer:
    """Build the optimizer over all groups, of which group g is updated as `names[g]` says.

    `build(name, groups)` makes an optimizer of some of them: one of ours, whose rule is taken, or one from outside.
    """
    # Scales of single parameters are for the whole: those that are built of some groups are taken apart again.
    scales = {group["name"]: group["scales"] for group in groups if "scales" in group}
    groups = [{key: value for key, value in group.items() if key != "scales"} for group in groups]
    updated_by: dict[str, tuple[Group, Rule | torch.optim.Optimizer]] = {}
    for name in dict.fromkeys(names[group["name"]] for group in groups):
        built = Optimizer.around(build(name, [group for group in groups if names[group["name"]] == name]))
        updated_by |= {
            group["name"]: (group, rule) for group, rule in zip(built.param_groups, built.rules, strict=True)
        }
    ordered, rules = zip(*(updated_by[group["name"]] for group in groups), strict=True)
    for name, of_group in scales.items():
        updated_by[name][0]["scales"] = of_group
    return Optimizer(ordered, rules)


def averaging(rule: Rule | torch.optim.Optimizer, group: Group) -> Kernel | None:
    """The kernel of a group whose weights are averaged over steps; None where they are not."""
    kernel = transform_of(rule.make, group).kernel if isinstance(rule, Rule) else None
    return kernel if kernel is not None and kernel.average is not None else None


def averages(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Callable[..., Tensor], list[Tensor]]]:
    """Parameters that are averaged over steps and have taken one, what makes the average, and the states it takes."""
    for group, rule in optimizer._ruled() if isinstance(optimizer, Optimizer) else []:
        kernel = averaging(rule, group)
        for parameter in group["params"] if kernel is not None else []:
            if "step" in (state := optimizer.state.get(parameter, {})):
                assert kernel is not None
                assert kernel.average is not None
                yield parameter, kernel.average, [state[name] for name in kernel.states]


def averaged_weights(optimizer: torch.optim.Optimizer) -> Iterator[tuple[Tensor, Tensor]]:
    """Parameters that are averaged over steps, and these averages, sharded alike: what to evaluate and export."""
    for parameter, average, states in averages(optimizer):
        yield parameter, wrapped_like(average(local(parameter), *map(local, states)), parameter)


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
    name = f"{rule.name} head by head" if group.get("per_head") else rule.name
    rest = [parameter for parameter in group["params"] if not optimizer.is_matrix(parameter)]
    if len(rest) == len(group["params"]):
        return f"AdamW (no matrices for {rule.name})"
    if rest:
        count = sum(parameter.numel() for parameter in rest)
        return f"{name}, but AdamW for {len(rest)} tensors ({count:,} parameters)"
    return name


def scaled(group: Group, scale: Scale) -> Group:
    """A group's settings as they are for a parameter that has a scale of its own."""
    factors = {name: factor for name, factor in scale._asdict().items() if name in group}  # not all have an eps
    return {**group, **{name: group[name] * factor for name, factor in factors.items()}}


def check_scales(group: Group, rule: Rule | torch.optim.Optimizer, scales: Iterable[Scale]) -> None:
    """Raise ValueError where parameters have scales of their own and their optimizer would not know of them."""
    if not isinstance(rule, Rule) and any(scale != Scale() for scale in scales):
        raise ValueError(
            f"[{table_of(group.get('name', 'expert'))}]: rates that differ by parameter do not reach "
            f"{kind_of(rule)}, an optimizer from outside: choose one of ours, or one rate for all"
        )


def check_heads(group: Group, rule: Rule | torch.optim.Optimizer) -> None:
    """Raise ValueError where heads are to be matrices by themselves for an optimizer that does not look at matrices."""
    if group.get("per_head") and (not isinstance(rule, Rule) or transform_of(rule.make, group).kernel):
        raise ValueError(
            f"[{table_of(group.get('name', ''))}] per_head = true does nothing with {kind_of(rule)}, which does "
            "not update by matrices: leave it out, or choose an optimizer of matrices"
        )


def check_served(optimizer: Optimizer, names: Iterable[str]) -> None:
    """Raise ValueError where an optimizer of matrices updates none of a group's parameters; `names` are of groups."""
    pairs = [pair for pair in zip(optimizer.param_groups, optimizer.rules, strict=True) if pair[0]["name"] in names]
    for group, rule in pairs:
        by_kernel = not isinstance(rule, Rule) or transform_of(rule.make, group).kernel
        if not by_kernel and not any(optimizer.is_matrix(parameter) for parameter in group["params"]):
            shapes = ", ".join(dict.fromkeys(str(tuple(parameter.shape)) for parameter in group["params"]))
            limited = isinstance(rule, Rule) and transform_of(rule.make, group).max_dim is not None
            why = "they are no matrices" + (", or larger than its adamw_above" if limited else "")
            raise ValueError(
                f"[{table_of(group['name'])}] name = {kind_of(rule)!r} updates matrices, and takes none of what "
                f"this group matches, of shapes {shapes}: {why}; choose 'adamw'"
            )


def check_scalable(optimizer: Optimizer, parameters: Sequence[Tensor]) -> None:
    """Raise ValueError where an optimizer would undo, or not notice, that its parameters are scaled after a step."""
    scaled_ones = set(parameters)
    for group, rule in optimizer._ruled():
        members = [parameter for parameter in group["params"] if parameter in scaled_ones]
        matrices = [optimizer._matrices[parameter] for parameter in members if optimizer.is_matrix(parameter)]
        why = ""
        if members and averaging(rule, group) is not None:
            why = "evaluates an average that stays as it is"
        elif any(matrix.transform.retract is not None for matrix in matrices):
            why = "brings back to their norm at the next step"
        if why:
            raise ValueError(
                f"training.qk_clip scales wq and wk, which {rule.name}, the optimizer of the group {group['name']}, "
                f"{why}: set training.qk_clip to 0, or another optimizer for them"
            )


def check_average(rule: Rule, group: Group) -> None:
    """Raise ValueError for settings with which weights can't be averaged over steps."""
    if averaging(rule, group) is None:
        return
    if any(parameter.dtype != torch.float32 for parameter in group["params"]):
        raise ValueError(
            f"optimizer {rule.name} averages weights over steps, which a smaller type rounds away: set training.dtype "
            "= 'float32'"
        )
    if not group.get("load_lr_decay", True):
        raise ValueError(
            f"optimizer {rule.name} does not go with load_lr_decay = false: decay is a part of what it averages: leave "
            "it out"
        )


def transform_of(make: Callable[..., Transform], group: Group) -> Transform:
    """Make a transform with the group's settings that it takes; its beta1 and beta2 are the group's `betas`."""
    settings = {**group, **dict(zip(("beta1", "beta2"), group["betas"], strict=True))}
    return make(**{name: settings[name] for name in arguments_of(make)})


def kernel_of(rule: Rule, group: Group) -> Kernel:
    """What updates those parameters of a group that no direction does: the rule's own kernel, or AdamW's."""
    kernel = transform_of(rule.make, group).kernel or transform_of(adamw, group).kernel
    assert kernel is not None
    return kernel


@functools.cache
def arguments_of(make: Callable[..., Transform]) -> tuple[str, ...]:
    """The names of a maker's arguments."""
    return tuple(inspect.signature(make).parameters)


def clip_scale(grad_norm: Tensor, max_norm: float) -> Tensor | None:
    """What gradients of that norm are divided by to be clipped to `max_norm`; None where they are not (0)."""
    return ((grad_norm + 1e-6) / max_norm).clamp(min=1.0) if max_norm > 0 else None


def divide(gradients: Sequence[Tensor], scale: Tensor) -> None:
    """Divide gradients by a scalar on their device, in place."""
    gradients = [local(gradient) for gradient in gradients]
    if gradients and all(gradient.dtype == scale.dtype for gradient in gradients):
        torch._foreach_div_(gradients, scale)
    else:
        for gradient in gradients:
            gradient.div_(scale.view(1))  # not a scalar, which a GPU rounds to the gradient's type first


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
