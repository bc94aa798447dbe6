"""From layers to a Config: defaults < base files < file < command line.

1. Merge: each layer is laid over the tables so far, key by key, as it was written, with its origin beside every value.
2. Check: what a table may hold is in a signature, of a section's dataclass or of the builder of the component that the
   table names. Unknown keys, wrong types and values out of range are errors that name the origin.
3. Make the sections, with the defaults of the components' arguments.
4. `checks` looks at what must hold between keys.
"""

import dataclasses
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, get_type_hints

import tomli_w

from titan_moe.balancer import BALANCERS
from titan_moe.config.checks import check_config
from titan_moe.config.layers import Layer, command_line_layer, file_layers
from titan_moe.config.schema import (
    COMMAND_LINE,
    REQUIRED,
    Parameter,
    Words,
    check_value,
    key_error,
    parameters_of,
    unknown_key,
)
from titan_moe.config.sections import (
    ARGUMENTS,
    DATA_TABLES,
    GROUP_KEYS,
    KINDS,
    LOAD_LR,
    METRIC_NAMES,
    NAMED_TABLES,
    OWN_DATASET,
    REMOVED,
    SECTIONS,
    Component,
    Config,
    Optimizer,
    is_component,
)
from titan_moe.optimizer.groups import GROUP_PATTERNS


class Given(NamedTuple):
    """A value and its origin: the layer that set it, or that named another component than the one it was set for."""

    value: Any
    origin: str
    inherited: bool = False  # set for another component, so the one that is named now may lack the key


GROUPS = "optimizer.groups"  # the path of groups by pattern
Table = dict[str, Given]
Tables = dict[str, Table]  # by path: "training", "optimizer", "optimizer.expert", "balancer.aux_loss" ...


def load_config(args: list[str]) -> Config:
    """Build the configuration from command-line arguments such as ["--job.config_file", "x.toml", "--compile.enable"].

    A user's mistake is a ValueError (an OSError for a file that cannot be read) of one line that names the file or
    argument, the key, the value and what would be right.
    """
    words = command_line_layer(args)
    file = words.table.get("job", {}).get("config_file")
    files = file_layers(check_value(str, file, COMMAND_LINE, "job.config_file")) if isinstance(file, Words) else []
    return merge_layers([*files, words])


def merge_layers(layers: Iterable[Layer]) -> Config:
    """Build the configuration that the layers make, later ones over earlier ones, and check it as a whole."""
    config = merge_unchecked(layers)
    check_config(config)
    return config


def merge_unchecked(layers: Iterable[Layer]) -> Config:
    """As `merge_layers`, but what must hold between keys is not looked at."""
    # Defaults of a component are values as any other, which a new name may take away; dataclasses have their own.
    tables: Tables = {}
    for section, content in to_document(Config()).items():
        if section in KINDS:
            tables = _merge(tables, section, content, "defaults")

    # What a layer sets is checked at once and not at the end: a mistake is one also where a later layer covers it.
    for layer in layers:
        for section, content in layer.table.items():
            merged = _merge(tables, section, content, layer.origin)
            changed = {path: _check(path, merged, tables) for path in merged if merged[path] is not tables.get(path)}
            tables = {**merged, **changed}
    return _make_config(tables)


def _merge(tables: Tables, section: str, content: Any, origin: str) -> Tables:
    """Give the tables with a layer's section laid over them. Tables that it does not touch stay the same objects.

    Values stay as they are written, but for those that say what the others are for: a component's name, NAME = false.
    """
    if section not in SECTIONS:
        raise unknown_key(origin, section, tuple(SECTIONS), "section", _all_keys(tables))
    if not isinstance(content, dict):
        raise key_error(origin, section, f"must be a table: [{section}]", content)
    merged = dict(tables)
    for path, table in _split(section, content, origin, tables).items():
        if table is None:
            merged.pop(path, None)
            continue
        new = {key: Given(value, origin) for key, value in table.items()}

        # With a new name, what is there already was meant for another component. In [optimizer] that goes for its
        # groups too, but for those with a name of their own.
        if "name" in new and section in KINDS and section != "balancer":
            new["name"] = Given(check_value(str, table["name"], origin, f"{path}.name"), origin)
            for other, old in tables.items():
                if other == path or (other.startswith(f"{path}.") and "name" not in old):
                    merged[other] = {key: Given(old[key].value, f"{origin} (inherited)", True) for key in old}

        # Likewise the arguments of a data set of one's own; a path may be one of them, of another type.
        if "dataset" in new and _has_dataset(path):
            new["dataset"] = Given(check_value(str, table["dataset"], origin, f"{path}.dataset"), origin)
            merged[path] = {key: old._replace(inherited=True) for key, old in merged.get(path, {}).items()}

        merged[path] = {**merged.get(path, {}), **new}
    return merged


def _split(section: str, content: dict[str, Any], origin: str, earlier: Tables) -> dict[str, dict[str, Any] | None]:
    """A section's own keys and the tables within it, by their paths; None for one that NAME = false takes away.

    `earlier` are the tables so far: instances of balancers that are among them may go without a name here.
    """
    # Sections of one's own fields may have tables of some kinds.
    if section not in ("balancer", "optimizer"):
        named = {path: path.partition(".")[2] for path in NAMED_TABLES if path.partition(".")[0] == section}
        inner = {}
        for path in [path for path, key in named.items() if key in content]:
            inner |= _named_tables(path, content[named[path]], origin)
        return {section: {key: value for key, value in content.items() if key not in named.values()}, **inner}
    names = [name for name in (content if section == "balancer" else GROUP_PATTERNS) if name in content]
    inner = {f"{section}.{name}": content[name] for name in names}
    plain = {key: value for key, value in content.items() if key not in names}
    if section == "optimizer" and "groups" in plain:
        inner |= _own_groups(plain.pop("groups"), origin)
    tables: dict[str, dict[str, Any] | None] = {section: plain} if section == "optimizer" else {}

    # A table, or true, turns one on; false takes back what an earlier layer has turned on.
    for path, table in inner.items():
        name = path.removeprefix(f"{section}.")
        if section == "balancer" and not (path in earlier or (isinstance(table, dict) and "name" in table)):
            # Named by its table, so the name has to be right where that is empty or off, too.
            parameters_of(KINDS[section], name, origin, path)
        on = isinstance(table, dict) or check_value(bool, table, origin, path)
        tables[path] = None if not on else table if isinstance(table, dict) else {}
    return tables


def _named_tables(path: str, content: Any, origin: str) -> dict[str, dict[str, Any] | None]:
    """The tables of [SECTION.KEY.NAME] by their paths; NAME = false takes one away. ValueError for another name."""
    if not isinstance(content, dict):
        raise key_error(origin, path, f"must have tables: [{path}.NAME]", content)
    off = [name for name, table in content.items() if table is False or table == Words(("false",))]
    for name, table in content.items():
        if not (name.isascii() and name.isidentifier()):
            message = "a name is of letters, digits and _, and does not begin with a digit"
            raise key_error(origin, f"{path}.{name}", message)
        if name not in off and not isinstance(table, dict):
            raise key_error(origin, f"{path}.{name}", f"must be a table: [{path}.{name}]", table)
    return {f"{path}.{name}": None if name in off else table for name, table in content.items()}


def _own_groups(content: Any, origin: str) -> dict[str, Any]:
    """The tables of [optimizer.groups] by their paths; ValueError for a name that a group can't have."""
    if not isinstance(content, dict):
        raise key_error(origin, GROUPS, f"must have tables: [{GROUPS}.NAME]", content)
    for name in content:
        if not name.isidentifier():
            message = "the name of a group is of letters, digits and _, and does not begin with a digit"
            raise key_error(origin, f"{GROUPS}.{name}", message)
        if name in GROUP_PATTERNS:
            message = f"is a group without patterns: set it in [optimizer.{name}], or take another name"
            raise key_error(origin, f"{GROUPS}.{name}", message)
        if name.endswith(("_min", "_max")):
            message = f"lr/{name} could be a metric of another group: take a name without _min and _max at its end"
            raise key_error(origin, f"{GROUPS}.{name}", message)
    return {f"{GROUPS}.{name}": table for name, table in content.items()}


def _check(path: str, tables: Tables, before: Tables) -> Table:
    """Give the values that are new in a table as the types that its keys have; ValueError for what does not fit."""
    annotations, known, checked = _annotations(path, tables), before.get(path, {}), dict(tables[path])
    for key, given in tables[path].items():
        dotted = f"{path}.{key}"
        if given is known.get(key):
            continue

        # A key of the component that was named before goes with it; one that the user wrote for this one is a mistake.
        if key not in annotations:
            if not given.inherited:
                raise _unknown(path, key, given, tables)
            del checked[key]
            continue

        # A file can't name the file to read.
        if dotted == "job.config_file" and given.origin != COMMAND_LINE:
            message = 'is for the command line; a file inherits with base = "..."'
            raise key_error(given.origin, dotted, message, given.value)
        checked[key] = given._replace(value=check_value(annotations[key], given.value, given.origin, dotted))
    return checked


def _annotations(path: str, tables: Tables) -> dict[str, Any]:
    """The types of the keys that a table may have: those of a section's fields, or of a builder's parameters."""
    if (path in SECTIONS and path not in KINDS) or path.rpartition(".")[0] in NAMED_TABLES:
        arguments = {key: parameter.annotation for key, parameter in _dataset_parameters(path, tables).items()}
        return {**_fields(path), **arguments}
    annotations = {key: parameter.annotation for key, parameter in _parameters(path, tables).items()}
    return {**annotations, "name": str} if _has_name(path) else annotations


def _has_dataset(path: str) -> bool:
    """Whether a table says where documents come from, by its key `dataset`."""
    return path == "data" or path.rpartition(".")[0] in DATA_TABLES


def _fields(path: str) -> dict[str, Any]:
    """The types of the keys that a section of fields has, whatever is in it."""
    hint = NAMED_TABLES.get(path.rpartition(".")[0]) or SECTIONS[path]
    return {key: kind for key, kind in get_type_hints(hint, include_extras=True).items() if key != ARGUMENTS}


def _dataset_parameters(path: str, tables: Tables) -> dict[str, Parameter]:
    """The arguments of a table's data set where that is one's own, else none; ValueError where it can't be called."""
    given = tables.get(path, {}).get("dataset")
    if not _has_dataset(path) or given is None or ":" not in given.value:
        return {}
    parameters = parameters_of(OWN_DATASET, given.value, given.origin, f"{path}.dataset")

    # A path is the function's where it takes one. Other keys of the table have a meaning already.
    if taken := parameters.keys() & _fields(path).keys() - {"path"}:
        name = min(taken)
        message = f"does not fit here: its argument {name} would be {path}.{name}, which is another key: rename it"
        raise key_error(given.origin, f"{path}.dataset", message, given.value)
    return parameters


def _parameters(path: str, tables: Tables) -> dict[str, Parameter]:
    """The arguments of the component that a table is for; ValueError where there is no such component."""
    name, origin, key = _named(path, tables)
    parameters = parameters_of(KINDS[path.partition(".")[0]], name, origin, key)
    if path.startswith(f"{GROUPS}."):
        return {**GROUP_KEYS, **parameters, **LOAD_LR}
    return {**parameters, **LOAD_LR} if path == "optimizer.expert" else parameters


def _named(path: str, tables: Tables) -> tuple[str, str, str]:
    """The name of the component that a table is for, the origin of that name, and the key that has it."""
    section, _, label = path.partition(".")
    if section == "balancer" and not _has_name(path):
        return label, "configuration", path

    # An instance's name is that of its losses in metrics.jsonl, and stands in names of tensors.
    if section == "balancer":
        given = tables[path]["name"]
        if not label.isidentifier() or label in METRIC_NAMES:
            message = "a balancer with a name of its own is called by letters, digits and _, and not as another metric"
            raise key_error(given.origin, path, message)
        return check_value(str, given.value, given.origin, f"{path}.name"), given.origin, f"{path}.name"
    naming = path if "name" in tables[path] else section  # a group that names no optimizer has that of [optimizer]
    given = tables[naming]["name"]
    return given.value, given.origin, f"{naming}.name"


def _has_name(path: str) -> bool:
    """Whether a component's table has a key `name`: a balancer's, unless the table is called as a component."""
    section, _, label = path.partition(".")
    return section != "balancer" or not is_component(label)


def _unknown(path: str, key: str, given: Given, tables: Tables) -> ValueError:
    """Make the error for a key that its table does not have: why not, or else which one may be meant."""
    # Sections with fields of their own: a key was removed, or is misspelled, or belongs to another section.
    origin, value = given.origin, given.value
    dotted, section = f"{path}.{key}", path.partition(".")[0]
    annotations = _annotations(path, tables)
    if dotted in REMOVED:
        return key_error(origin, dotted, f"is no key any more: leave it out, {REMOVED[dotted]}", value)
    if section not in KINDS:
        return unknown_key(origin, dotted, tuple(annotations), others=_all_keys(tables))

    # Sections of components: the key may be right, but for another table, another component or nobody.
    kind, message = KINDS[section], None
    if section == "optimizer" and key in LOAD_LR:
        message = "only experts have a load: set it in [optimizer.expert]"
    elif section == "optimizer" and key in GROUP_KEYS:
        message = f"is for groups by pattern: set it in [{GROUPS}.NAME]"
    elif key in kind.supplied:
        message = f"cannot be set here: it comes from {kind.supplied[key]}"
    elif section == "balancer" and key == "name":
        label, component = path.partition(".")[2], check_value(str, value, origin, dotted)
        instance = f"[balancer.my_{component.rpartition(':')[2]}]"
        message = f"its table is for {label}, as it is called so: leave it out, or call the table {instance}"
    if message is not None:
        return key_error(origin, dotted, message, value)
    takers = [name for name, builder in kind.registry.items() if key in inspect.signature(builder).parameters]
    if takers:
        return key_error(origin, dotted, f"unknown argument here; it belongs to {', '.join(takers)}")
    first = () if not _has_name(path) else ("name", *GROUP_PATTERNS, "groups") if path == "optimizer" else ("name",)
    return unknown_key(origin, dotted, tuple({**dict.fromkeys(first), **annotations}), "argument")


def _all_keys(tables: Tables) -> list[str]:
    """List the dotted keys of every section as they are now, for suggestions."""
    keys = {section: _annotations(section, tables) for section in SECTIONS if section != "balancer"}
    return [f"{section}.{key}" for section in SECTIONS for key in keys.get(section, BALANCERS)]


def _make_config(tables: Tables) -> Config:
    """Make the sections of checked tables, components with the defaults of their arguments."""
    sections: dict[str, Any] = {}
    for section, hint in SECTIONS.items():
        if section not in KINDS:
            sections[section] = _made(hint, section, tables, **_made_tables(section, tables))
        elif section == "balancer":
            paths = [path for path in tables if path.startswith("balancer.")]
            sections[section] = {path.partition(".")[2]: _arguments(path, tables) for path in paths}
        else:
            sections[section] = hint(_named(section, tables)[0], _arguments(section, tables))

    # A group that says nothing is as if it were not there: it has all from [optimizer].
    groups = {group: _values(f"optimizer.{group}", tables) for group in GROUP_PATTERNS}
    groups = {group: arguments for group, arguments in groups.items() if arguments}

    # those by pattern in the order in which they were written first
    for path in tables:
        if path.startswith(f"{GROUPS}."):
            groups[path.removeprefix(f"{GROUPS}.")] = table = _values(path, tables)
            if "match" not in table:
                origin = next((given.origin for given in tables[path].values()), "configuration")
                raise key_error(origin, f"{path}.match", "is missing: give globs on names of parameters")
    sections["optimizer"] = dataclasses.replace(sections["optimizer"], groups=groups)
    return Config(**sections)


def _made_tables(section: str, tables: Tables) -> dict[str, dict[str, Any]]:
    """The tables within a section, by their key, then by their name."""
    by_key: dict[str, dict[str, Any]] = {}
    for kind, hint in NAMED_TABLES.items():
        if kind.startswith(f"{section}."):
            paths = [path for path in tables if path.startswith(f"{kind}.")]
            by_key[kind.partition(".")[2]] = {path.rpartition(".")[2]: _made(hint, path, tables) for path in paths}
    return by_key


def _made(hint: Any, path: str, tables: Tables, **inner: Any) -> Any:
    """Make a section, or a table in one, of its values and of the tables within it."""
    values, parameters = _values(path, tables), _dataset_parameters(path, tables)
    if not parameters:
        return hint(**values, **inner)
    name, origin, _ = tables[path]["dataset"]
    arguments = _with_defaults(values, parameters, name, origin, path)
    return hint(**{key: values[key] for key in values if key not in parameters}, **inner, arguments=arguments)


def _values(path: str, tables: Tables) -> dict[str, Any]:
    """The values of a table, a component's name first."""
    given = tables.get(path, {})
    return {key: given[key].value for key in sorted(given, key=lambda key: key != "name")}


def _arguments(path: str, tables: Tables) -> dict[str, Any]:
    """The arguments of a component in the order of its signature, with those defaults that TOML can hold."""
    # Defaults are written out, so that config.toml says all that a run had, also when a later version changes one.
    name, origin, _ = _named(path, tables)
    given = _values(path, tables)
    if _has_name(path):
        del given["name"]
    arguments = _with_defaults(given, _parameters(path, tables), name, origin, path)
    is_instance = path.startswith("balancer.") and _has_name(path)  # kept with its arguments, which are all it has
    return {"name": name, **arguments} if is_instance else arguments


def _with_defaults(
    given: Mapping[str, Any], parameters: Mapping[str, Parameter], name: str, origin: str, path: str
) -> dict[str, Any]:
    """The arguments of `name` that are given, and of the others those defaults that TOML can hold."""
    arguments = {}
    for key, (_, default) in parameters.items():
        if key in given:
            arguments[key] = given[key]
        elif default is REQUIRED:
            raise key_error(origin, f"{path}.{key}", f"is missing: {name} needs a value")
        elif isinstance(default, (bool, int, float, str, list, tuple)):
            arguments[key] = default
    return arguments


def to_toml(config: Config) -> str:
    """Write the resolved configuration as TOML; loading that file gives an equal Config."""
    return tomli_w.dumps(to_document(config))


def to_document(config: Config) -> dict[str, Any]:
    """The resolved configuration as the nested tables of a file, without those that are empty."""
    # Each kind of section keeps its values in another way, and all of them are one table of keys in a file.
    document: dict[str, Any] = {}
    for section in SECTIONS:
        value = getattr(config, section)
        if section == "balancer":
            table = {name: dict(arguments) for name, arguments in value.items()}
        elif isinstance(value, Component):
            table = {"name": value.name, **value.arguments}
        elif isinstance(value, Optimizer):
            # A group that the defaults have and this one has not: to leave it out would bring the defaults' back.
            off = {group: False for group in Optimizer().groups if group not in value.groups}
            five = {group: options for group, options in value.groups.items() if group in GROUP_PATTERNS}
            by_pattern = {group: options for group, options in value.groups.items() if group not in five}
            table = {
                "name": value.name,
                **value.arguments,
                **off,
                **five,
                **({"groups": by_pattern} if by_pattern else {}),
            }
        else:
            table = dataclasses.asdict(value)
            for name in ("config_file", "allow_config_change"):  # of one start, not of the run
                table.pop(name, None)
            table |= table.pop(ARGUMENTS, {})
            for key in [kind.partition(".")[2] for kind in NAMED_TABLES if kind.startswith(f"{section}.")]:
                inner = {name: {**values.pop(ARGUMENTS, {}), **values} for name, values in table.pop(key).items()}
                table |= {key: inner} if inner else {}
        document[section] = table

    # A dense model has no balancer, and an empty table would say no more than none.
    return {section: table for section, table in document.items() if table}
