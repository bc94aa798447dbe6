"""Every component of a registry with its defaults, and once more for each other choice that its signature offers."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints


class Case(NamedTuple):
    name: str
    arguments: dict[str, Any]

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.arguments.items())])


def cases(registry: Mapping[str, Callable[..., Any]], extra: Mapping[str, list[dict[str, Any]]] | None = None) -> list:
    """One Case per entry, one per value of an argument that is a Literal or a bool, and those of `extra`."""
    found = []
    for name, builder in registry.items():
        found.append(Case(name, {}))
        hints = get_type_hints(builder)
        for key, parameter in inspect.signature(builder).parameters.items():
            choices = get_args(hints[key]) if get_origin(hints[key]) is Literal else ()
            choices = (True, False) if hints[key] is bool else choices
            found += [Case(name, {key: choice}) for choice in choices if choice != parameter.default]
        found += [Case(name, arguments) for arguments in (extra or {}).get(name, [])]
    return found
