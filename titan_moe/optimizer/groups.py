"""Parameter groups: those of one's own by patterns, then expert, router, embedding, norm, dense for all the rest."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import nn

from titan_moe.model.wrappers import plain_name

# The first pattern that a parameter's name matches decides; `dense` takes the rest (attention, dense FFNs and shared
# experts, which every token passes). An untied output head is grouped with the embedding, whose shape and role it has,
# the gate of the shared experts with the router, and attention's biases, vectors that don't decay, with the norms.
GROUP_PATTERNS = {
    "expert": r"\.experts\.",
    "router": r"\.(router|shared_expert_gate)\.",
    "embedding": r"^(tok_embeddings|output)\.",
    "norm": r"norm\.|\.attention\.w[qkv]\.bias$",
    "dense": r"",
}
NO_MATRICES = ("embedding", "norm")  # groups that are updated by AdamW whatever the shape, if by a transform of ours
Heads = tuple[int, int]  # of an attention matrix: how many, and the dimension along which they lie side by side


class Scale(NamedTuple):
    """What a parameter's learning rate, weight decay and eps are those of its group times."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def group_of(name: str, patterns: Mapping[str, str] = GROUP_PATTERNS) -> str:
    """Name the group of the parameter called `name` in the model; ValueError where no pattern matches."""
    for group, pattern in patterns.items():
        if re.search(pattern, name):
            return group
    raise ValueError(f"{name} is in no parameter group: none of the patterns {', '.join(patterns.values())} matches it")


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group_arguments: Mapping[str, Mapping[str, Any]],
    patterns: Mapping[str, str] = GROUP_PATTERNS,
    *,
    matches: Mapping[str, Sequence[str]] | None = None,
    heads: Mapping[str, Heads] | None = None,
    optional: Collection[str] = (),
) -> list[dict[str, Any]]:
    """Sort parameters into torch.optim groups {"name", "params", **the group's own arguments}.

    `matches` are groups of one's own, each with globs of parameters' names. The first group that matches a parameter
    has it; what none matches is sorted by `patterns`. Groups without a parameter are left out. One of `patterns` that
    has arguments in `group_arguments` but no parameter is a ValueError, unless it is `optional`: [optimizer.expert] of
    a dense model, for example. So is a glob that adds nothing.

    A group with load-based rates gets `layers`: of each parameter the index of its layer among all MoE layers, the row
    of the step's load that it goes by. One with `per_head` gets the `heads` of each parameter.
    """
    parameters = {plain_name(name): parameter for name, parameter in named_parameters}
    sorts = {name: group_of(name, patterns) for name in parameters}
    group_by_name = match_names(parameters, matches or {})
    members: dict[str, list[str]] = {}
    for name in parameters:
        members.setdefault(group_by_name.get(name, sorts[name]), []).append(name)

    # nothing is silently ignored: settings of a group that the model does not have are an error
    for group in group_arguments:
        if group not in members and group not in optional:
            taken_by = {group_by_name[name]: None for name, sort in sorts.items() if sort == group}
            reason = f"[optimizer.groups] {', '.join(taken_by)} has all" if taken_by else "the model has no"
            raise ValueError(f"[optimizer.{group}] is set, but {reason} {group} parameters: remove that table")

    # one's own first, in their order, then those of the patterns, so that the groups of all models are listed alike
    groups = []
    for group in (*(matches or {}), *patterns):
        if group in members:
            settings = dict(group_arguments.get(group, {}))
            key = table_of(group)
            if "load_lr" in settings:
                layers = moe_layers(name for name, sort in sorts.items() if sort == "expert")
                settings["layers"] = of_each(members[group], layers, f"[{key}] load_lr: only experts have a load")
            if settings.get("per_head"):
                settings["heads"] = of_each(members[group], heads or {}, f"[{key}] per_head: only attention has heads")
            else:
                settings.pop("per_head", None)
            groups.append({"name": group, "params": [parameters[name] for name in members[group]], **settings})
    return groups


def table_of(group: str) -> str:
    """The path of a group's table in a configuration; "optimizer" for a group without a name."""
    return f"optimizer.{group}" if group in GROUP_PATTERNS else f"optimizer.groups.{group}" if group else "optimizer"


def match_names(names: Collection[str], matches: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """The group of each name that a glob matches, the first of those that do.

    `*` stands for any characters, dots too, `?` for one, `[01]` for one of these. Raises ValueError for a glob that
    matches no name, or only names that groups before it have.
    """
    group_by_name: dict[str, str] = {}
    for group, globs in matches.items():
        for glob in globs:
            matched = [name for name in names if fnmatchcase(name, glob)]
            key = f"optimizer.groups.{group}.match = {glob!r}"
            if not matched:
                raise ValueError(f"{key}: matches no parameter of the model; {near_names(glob, names)}")
            if group not in [group_by_name.setdefault(name, group) for name in matched]:
                before = ", ".join(dict.fromkeys(group_by_name[name] for name in matched))
                raise ValueError(
                    f"{key}: all that it matches is in groups before it, {before}: put it before them, or leave it out"
                )
    return group_by_name


def near_names(glob: str, names: Iterable[str]) -> str:
    """Names that may have been meant by a glob; those that differ by the number of a layer are one, with a `*`."""
    forms = list(dict.fromkeys(re.sub(r"\.\d+\.", ".*.", name) for name in names))
    near = difflib.get_close_matches(glob, forms, n=3, cutoff=0.5)
    return f"near: {', '.join(near)}" if near else f"there are {', '.join(forms)}"


def moe_layers(names: Iterable[str]) -> dict[str, int]:
    """Of the name of each of all experts' parameters the index of its layer among the MoE layers."""
    names = list(names)
    return dict(zip(names, layer_indices(names), strict=True))


def of_each(names: Sequence[str], values: Mapping[str, Any], problem: str) -> list[Any]:
    """The value of each name; ValueError for the first one that has none."""
    for name in names:
        if name not in values:
            raise ValueError(f"{problem}, and {name} in this group has none: match others, or leave the key out")
    return [values[name] for name in names]


def layer_indices(names: Sequence[str]) -> list[int]:
    """Of each parameter's name (`layers.I. ...`) the index of its layer among the layers that occur: 0, 1, ..."""
    layers = [int(name.partition("layers.")[2].partition(".")[0]) for name in names]
    order = sorted(set(layers))
    return [order.index(layer) for layer in layers]
