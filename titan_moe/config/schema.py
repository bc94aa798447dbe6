"""Checking values: a key's annotation, or the signature of a component's builder, is the schema."""

import difflib
import importlib
import inspect
import math
import types
from collections.abc import Callable, Collection, Mapping
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

COMMAND_LINE = "command line"
REQUIRED = inspect.Parameter.empty
LARGEST_FLOAT = 3.4e38  # what a tensor of fp32 can take


class Words(NamedTuple):
    """What the command line gives for a key: zero or more words, to be read as the type that the key has."""

    words: tuple[str, ...]


class Kind(NamedTuple):
    """A kind of component: its registry, what others supply, and the ranges of its usual arguments."""

    registry: Mapping[str, Callable[..., Any]]
    supplied: Mapping[str, str]  # parameter -> where its value comes from
    ranges: Mapping[str, Any]  # argument of a registered component -> pydantic constraint


class Parameter(NamedTuple):
    """An argument of a builder: its type, and its default or REQUIRED."""

    annotation: Any
    default: Any


def key_error(origin: str, key: str, message: str, value: Any = REQUIRED) -> ValueError:
    """Make the error for `key`, which `origin` (a file or the command line) has set to `value`."""
    shown = f"--{key}" if origin == COMMAND_LINE else key
    if value is not REQUIRED and value != Words(()):
        text = " ".join(value.words) if isinstance(value, Words) else repr(value)
        shown = f"{shown} = {text if len(text) <= 80 else text[:38] + '...' + text[-38:]}"
    return ValueError(f"{origin}: {shown}: {message}")


def unknown_key(
    origin: str, key: str, valid: Collection[str], what: str = "key", others: Collection[str] = ()
) -> ValueError:
    """Make the error for an unknown dotted `key`: the nearest of `valid` (its siblings) or of `others` (dotted)."""
    parent, _, last = key.rpartition(".")
    prefix = f"{parent}." if parent else ""
    nearest = [prefix + k for k in difflib.get_close_matches(last, list(valid), n=1)]
    if not nearest:
        match = difflib.get_close_matches(last, [k.rpartition(".")[2] for k in others], n=1, cutoff=0.75)
        nearest = [k for k in others if match and k.rpartition(".")[2] == match[0]]
    hint = f"did you mean {nearest[0]}?" if nearest else f"valid: {', '.join(valid)}" if valid else "it takes none"
    return key_error(origin, key, f"unknown {what}; {hint}")


def bare_type(annotation: Any) -> Any:
    """Take Annotated off a type."""
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _alternatives(annotation: Any) -> list[Any]:
    """List the members of a union, or the type alone, without Annotated."""
    bare = bare_type(annotation)
    if get_origin(bare) in (Union, types.UnionType):
        return [bare_type(member) for member in get_args(bare)]
    return [bare]


def _from_words(annotation: Any, words: Words, key: str) -> Any:
    """Turn the words after an argument into one value for pydantic's lax mode: a list, a flag or a string."""
    alternatives = _alternatives(annotation)
    if words.words and any((get_origin(a) or a) in (list, tuple) for a in alternatives):
        return list(words.words)
    if not words.words and bool in alternatives:
        return True
    if len(words.words) != 1:
        raise key_error(COMMAND_LINE, key, f"takes one value, got {len(words.words)}", words)
    return words.words[0]


def check_value(annotation: Any, value: Any, origin: str, key: str) -> Any:
    """Give `value` as the type that `annotation` asks for: TOML values strictly, words of the command line by parsing.

    An integer is accepted for a float, an array for a tuple; anything else that does not fit is a ValueError.
    """
    if isinstance(value, dict) and origin == COMMAND_LINE:
        raise key_error(origin, f"{key}.{next(iter(value))}", f"{key} is a value, not a table")

    # A value of TOML has a type already, and a wrong one is a mistake; a word is read as whatever is asked for.
    strict = not isinstance(value, Words)
    read = _from_words(annotation, value, key) if isinstance(value, Words) else value
    if isinstance(read, list) and tuple in [get_origin(a) or a for a in _alternatives(annotation)]:
        read = tuple(read)  # neither TOML nor words have any
    try:
        adapter = TypeAdapter(annotation, config=ConfigDict(strict=strict, arbitrary_types_allowed=True))
        checked = adapter.validate_python(read)
    except ValidationError as error:
        raise key_error(origin, key, _one_line(error), value) from None
    except PydanticUserError as error:
        raise key_error(origin, key, f"its type {type_text(annotation)} cannot be read from a file", value) from error

    # What Python can hold and a tensor, a kernel's argument or the name of a file cannot.
    for item in checked if isinstance(checked, (list, tuple)) else [checked]:
        if isinstance(item, float) and math.isnan(item):
            raise key_error(origin, key, "must be a number", value)
        if isinstance(item, float) and LARGEST_FLOAT < abs(item) < math.inf:
            raise key_error(origin, key, f"must be at most {LARGEST_FLOAT}, the largest number of fp32", value)
        if isinstance(item, int) and not -(2**63) <= item < 2**63:
            raise key_error(origin, key, "must fit into 64 bits", value)
        if isinstance(item, str) and "\0" in item:
            raise key_error(origin, key, "must not have a NUL character", value)
    return checked


def _one_line(error: ValidationError) -> str:
    """Say what pydantic found wrong in one line, in our words."""
    problems = []
    for problem in error.errors():
        text = problem["msg"].replace("Input should be", "must be").removeprefix("Value error, ")
        item = "".join(f"item {part + 1} " for part in problem["loc"] if isinstance(part, int))
        problems.append(item + text.partition(", unable to")[0])
    return " or ".join(dict.fromkeys(problems))


def find_component(
    registry: Mapping[str, Callable[..., Any]], name: str, origin: str = "configuration", key: str = "name"
) -> Callable[..., Any]:
    """Find the builder called `name`: an entry of the registry, or a callable outside by `my_pkg.my_mod:fn`."""
    if ":" not in name:
        if name not in registry:
            near = difflib.get_close_matches(name, list(registry), n=1)
            hint = f"did you mean {near[0]!r}?" if near else "none is near"
            valid = ", ".join(registry)
            value = REQUIRED if key.endswith(f".{name}") else name  # [balancer.NAME]: the key says it
            raise key_error(origin, key, f"unknown component; {hint} (valid: {valid}, or my_pkg.my_mod:fn)", value)
        return registry[name]
    module, _, function = name.partition(":")
    try:
        builder = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the import of someone else's module raises is that module's fault
        what = " ".join(f"{type(error).__name__}: {error}".split())
        # a script looks into its own folder, `python -m` into the current one: this helps with both
        mend = ": put the folder that holds it on PYTHONPATH, or install it" if isinstance(error, ImportError) else ""
        raise key_error(origin, key, f"cannot be imported ({what}){mend}", name) from error
    if not callable(builder):
        raise key_error(origin, key, f"is a {type(builder).__name__}, not a function", name)
    return builder


def parameters_of(kind: Kind, name: str, origin: str, key: str) -> dict[str, Parameter]:
    """Read what arguments the component `name` takes from the signature of its builder, without the supplied ones."""
    builder = find_component(kind.registry, name, origin, key)
    try:
        signature = inspect.signature(builder, eval_str=True)
    except (NameError, TypeError, ValueError) as error:
        raise key_error(origin, key, f"has no readable signature ({error})", name) from error
    if kind.supplied and not kind.supplied.keys() & signature.parameters.keys():
        wanted = " or ".join(kind.supplied)
        raise key_error(origin, key, f"does not fit here: it must take {wanted}", name)

    # Arguments are given by name. *args and **kwargs say nothing about theirs, so no key is taken for them.
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = {}
    for parameter in signature.parameters.values():
        if parameter.name in kind.supplied:
            continue
        if parameter.kind not in by_name:
            if parameter.kind is inspect.Parameter.POSITIONAL_ONLY and parameter.default is REQUIRED:
                raise key_error(origin, key, f"does not fit here: it takes {parameter.name} by position only", name)
            continue

        # Without an annotation the default says the type; the ranges are those of this package's own builders.
        annotation = parameter.annotation
        if annotation is REQUIRED:
            annotation = Any if parameter.default in (REQUIRED, None) else type(parameter.default)
        if name in kind.registry and parameter.name in kind.ranges:
            annotation = Annotated[annotation, kind.ranges[parameter.name]]
        parameters[parameter.name] = Parameter(annotation, parameter.default)
    return parameters


def type_text(annotation: Any) -> str:
    """Write a type for people: `int > 0`, `none | full`, `list of str`."""
    # Python's names for types are for programmers: those that a key can have get the words of a TOML file.
    bare = bare_type(annotation)
    arguments = get_args(bare)
    if get_origin(bare) in (Union, types.UnionType):
        text = " | ".join(type_text(member) for member in arguments)
    elif get_origin(bare) is Literal:
        text = " | ".join(str(choice) for choice in arguments)
    elif get_origin(bare) is list:
        text = f"list of {type_text(arguments[0])}"
    elif get_origin(bare) is not None:
        text = str(bare)
    else:
        text = getattr(bare, "__name__", str(bare)).replace("NoneType", "none")

    # The range stands beside the type in Annotated, in one of several forms of pydantic's.
    bounds = [_bounds(item) for item in getattr(annotation, "__metadata__", ())]
    return " ".join([text, *filter(None, bounds)])


def _bounds(constraint: Any) -> str:
    """Write a pydantic or annotated_types constraint: `>= 0, < 1`."""
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    parts = getattr(constraint, "metadata", None) or [constraint]
    texts = [f"{sign} {getattr(part, name)}" for part in parts for name, sign in signs.items() if hasattr(part, name)]
    return ", ".join(texts)


def document(annotation: Any) -> str:
    """Find the sentence in an annotation, empty when there is none."""
    return next((item for item in reversed(getattr(annotation, "__metadata__", ())) if isinstance(item, str)), "")
