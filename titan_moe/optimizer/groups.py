"""Parameter groups: every parameter belongs to exactly one of expert, router, embedding, norm, dense."""

import re
from collections.abc import Iterable
from typing import Any

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


def group_of(name: str) -> str:
    """Name the group of the parameter called `name` in the model."""
    return next(group for group, pattern in GROUP_PATTERNS.items() if re.search(pattern, name))


def parameter_groups(
    named_parameters: Iterable[tuple[str, nn.Parameter]], group_arguments: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """Sort parameters into torch.optim groups {"name", "params", **the group's own arguments}.

    Groups without a parameter are left out; one that has arguments in `group_arguments` but no parameter is a
    ValueError, for example [optimizer.expert] of a dense model.
    """
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in named_parameters:
        group = groups.setdefault(group_of(name), {"name": group_of(name), "params": []})
        group["params"].append(parameter)
    for name, arguments in group_arguments.items():
        if name not in groups:
            raise ValueError(f"[optimizer.{name}] is set, but the model has no {name} parameters: remove that table")
        groups[name].update(arguments)
    return [groups[name] for name in GROUP_PATTERNS if name in groups]
