"""Parameter groups: every parameter belongs to exactly one of expert, router, embedding, norm, dense."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import nn

# The first pattern that a parameter's name matches decides; `dense` takes the rest (attention, dense FFNs and shared
# experts, which every token passes). An untied output head is grouped with the embedding, whose shape and role it has.
GROUP_PATTERNS = {
    "expert": r"\.experts\.",
    "router": r"\.router\.",
    "embedding": r"^(tok_embeddings|output)\.",
    "norm": r"norm\.",
    "dense": r"",
}
NO_MATRICES = ("embedding", "norm")  # groups that are updated by AdamW whatever the shape, if by a transform of ours


class Scale(NamedTuple):
    """What a parameter's learning rate, weight decay and eps are those of its group times."""

    lr: float = 1.0
    weight_decay: float = 1.0
    eps: float = 1.0


def group_of(name: str, patterns: Mapping[str, str] = GROUP_PATTERNS) -> str:
    """Name the group of the parameter called `name` in the model."""
    return next(group for group, pattern in patterns.items() if re.search(pattern, name))


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    group_arguments: dict[str, dict[str, Any]],
    patterns: Mapping[str, str] = GROUP_PATTERNS,
) -> list[dict[str, Any]]:
    """Sort parameters into torch.optim groups {"name", "params", **the group's own arguments}.

    Groups without a parameter are left out; one that has arguments in `group_arguments` but no parameter is a
    ValueError, for example [optimizer.expert] of a dense model. A group with load-based rates gets `layers`: of each
    parameter the index of its MoE layer, the row of the step's load that it goes by.
    """
    groups: dict[str, dict[str, Any]] = {}
    parameters = dict(named_parameters)
    for name, parameter in parameters.items():
        kind = group_of(name, patterns)
        groups.setdefault(kind, {"name": kind, "params": []})["params"].append(parameter)

    # nothing is silently ignored: settings of a group that the model does not have are an error
    for name, arguments in group_arguments.items():
        if name not in groups:
            raise ValueError(f"[optimizer.{name}] is set, but the model has no {name} parameters: remove that table")
        groups[name].update(arguments)
        if "load_lr" in arguments:
            if name != "expert":
                raise ValueError(f"[optimizer.{name}] load_lr: only experts have a load, set it in [optimizer.expert]")
            groups[name]["layers"] = layer_indices([key for key in parameters if group_of(key, patterns) == name])

    # in the order of the patterns, so that the groups of all models are listed alike
    return [groups[name] for name in GROUP_PATTERNS if name in groups]


def layer_indices(names: Sequence[str]) -> list[int]:
    """Of each parameter's name (`layers.I. ...`) the index of its layer among the layers that occur: 0, 1, ..."""
    layers = [int(name.partition("layers.")[2].partition(".")[0]) for name in names]
    order = sorted(set(layers))
    return [order.index(layer) for layer in layers]
