"""Layers of configuration: TOML files with the files they inherit from, and the command line, as nested tables."""

import codecs
import os
import sys
from typing import Any, NamedTuple

from titan_moe.config.schema import COMMAND_LINE, Words, key_error

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # pyrefly: ignore[missing-import]


class Layer(NamedTuple):
    """The values that one origin sets: section -> key -> value or table; leaves of the command line are Words."""

    origin: str
    table: dict[str, Any]


def read_file(path: str, origin: str = COMMAND_LINE, key: str = "job.config_file") -> dict[str, Any]:
    """Read a TOML file that `origin` names under `key`; what is wrong with it is one line with file and position."""
    # A file that can't be opened is the fault of whoever named it, so the message names that place.
    try:
        with open(path, "rb") as file:
            data = file.read().removeprefix(codecs.BOM_UTF8)  # which some editors put first
    except OSError as error:
        raise type(error)(str(key_error(origin, key, f"cannot be read ({error.strerror})", path))) from None

    # What is wrong inside is the file's own fault. An editor counts lines and columns from 1.
    try:
        return tomllib.loads(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path}: is not UTF-8 text: byte 0x{data[error.start]:02x} (at line {line}, column {column})"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path}: is not valid TOML: {error}") from None
    except RecursionError:
        raise ValueError(f"{path}: is not a configuration: its values are nested hundreds of levels deep") from None


def file_layers(
    path: str, origin: str = COMMAND_LINE, key: str = "job.config_file", inheriting: tuple[str, ...] = ()
) -> list[Layer]:
    """Read a file and, before it, the files that its `base` names (relative to the file), in order of precedence.

    `origin` names the file under `key`; `inheriting` are the files that wait for it as their base.
    """
    # A cycle would never end. It may go through links, so files are compared by their real paths.
    identity = os.path.realpath(path)
    if identity in inheriting:
        raise key_error(origin, key, "inherits from itself, through a cycle of base files", path)

    # `base` is for this function alone: no section has that name.
    table = read_file(path, origin, key)
    bases = table.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise key_error(path, "base", "must be a file name or a list of them", bases)

    # Paths are relative to the file, not to the current folder, so that a folder of configurations can be moved.
    layers = []
    for base in bases:
        base_path = os.path.normpath(os.path.join(os.path.dirname(path), base))
        layers += file_layers(base_path, path, "base", (*inheriting, identity))
    return [*layers, Layer(path, table)]


def command_line_layer(args: list[str]) -> Layer:
    """Read `--section.key value ...`, `--section.key=value` and `--section.flag`; of a key given twice the last counts.

    Words that do not begin with `--` are values, so that a negative number is one.
    """
    # First the words of each key. Their types are not known here, so a key takes whatever comes up to the next one.
    given: dict[str, list[str]] = {}
    values = None
    for arg in args:
        if arg.startswith("--"):
            key, equals, value = arg[2:].partition("=")
            values = given[key] = [value] if equals else []
        elif values is None:
            raise ValueError(f"{COMMAND_LINE}: {arg}: unexpected word; arguments are --section.key value (see --help)")
        else:
            values.append(arg)

    # Then nested tables, as a file has them, so that both are merged in the same way.
    table: dict[str, Any] = {}
    for key, values in given.items():
        parts = split_key(key)
        if len(parts) < 2 or not all(parts):
            raise key_error(COMMAND_LINE, key, "is not an argument: arguments are --section.key value (see --help)")
        insert(table, key, Words(tuple(values)), COMMAND_LINE)
    return Layer(COMMAND_LINE, table)


def insert(table: dict[str, Any], key: str, value: Any, origin: str) -> None:
    """Put a value at its dotted key into nested tables; ValueError where a part of the key is a value, or has keys."""
    *parents, last = split_key(key)
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise key_error(origin, key, "is a table here and a value in another argument")
    if isinstance(table.get(last), dict):
        raise key_error(origin, key, "is a value here and a table in another argument", value)
    table[last] = value


def split_key(key: str) -> list[str]:
    """Split a dotted key; the dots in an outside component's `my_pkg.my_mod:fn` do not separate."""
    head, colon, tail = key.partition(":")
    if not colon:
        return key.split(".")
    section, _, module = head.partition(".")
    function, *rest = tail.split(".")
    return [section, f"{module}:{function}", *rest]
