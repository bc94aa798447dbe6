"""Configurations that came with a model or a run: who wrote them is not known, so what they name is not imported.

`load_config` is for files that a user wrote: there `name = "my_pkg.my_mod:fn"` is an import and a call. `load_saved`
takes components from the registries, and others only from modules that the user names. `read_saved` is for looking at
a configuration, and imports nothing.
"""

import copy
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_moe.config.layers import Layer, command_line_layer, read_file
from titan_moe.config.load import merge_layers, merge_unchecked
from titan_moe.config.schema import key_error
from titan_moe.config.sections import DATA_TABLES, KINDS, NAMED_TABLES, REMOVED, Component, Config, Data, Optimizer
from titan_moe.optimizer.groups import GROUP_PATTERNS
from titan_moe.runtime.command import TRUST

PLAIN_KEYS = ("moe.experts_backend",)  # keys outside of KINDS that name a component


def load_saved(
    path: Path, overrides: Sequence[str] = (), *, trust_components: Sequence[str] = (), with_data: bool = True
) -> Config:
    """Build the configuration of a file that came with a model, changed by `overrides`, the user's words.

    Components from outside of the registries must be of `trust_components`, modules or packages, which are imported.
    Who reads none of its data goes without them (`with_data` False): data sets that are functions outside are not
    imported, and stay as they are written. Errors as of `load_config`, and ValueError for a component that nobody
    vouches for, or for a `base`.
    """
    # Before anything is merged, for checking a key of such a component would import it. A user who names a package
    # trusts all of its modules.
    layer, words = _layer(path), command_line_layer(list(overrides))
    written = layer.table
    if not with_data:
        table = _without_own_data(written)
        if "path" in words.table.get("data", {}) and isinstance(table.get("data"), dict):
            table["data"].pop("sources", None)  # beside which there is no data.path
        layer = layer._replace(table=table)
    trusted = (trust_components,) if isinstance(trust_components, str) else trust_components
    strange = {
        name.partition(":")[0]: (key, name)
        for key, name in (*outside_components(layer.table), *outside_datasets(layer.table))
        if not any(f"{name.partition(':')[0]}.".startswith(f"{known}.") for known in trusted)
    }
    if strange:
        key, name = next(iter(strange.values()))
        wanted = " ".join(strange)
        raise key_error(
            layer.origin, key, f"is code from outside of titan_moe: add {TRUST} {wanted} if you trust it", name
        )

    # Overrides are the user's words, who may name anything but another file.
    if "config_file" in words.table.get("job", {}):
        raise key_error(words.origin, "job.config_file", "the configuration is the checkpoint's: leave it out")
    config = merge_layers([layer, words])
    if with_data:
        return config
    data = dataclasses.replace(config.data, sources=read_saved(path).data.sources)
    return _with_own_data(dataclasses.replace(config, data=data), written)


def read_saved(path: Path) -> Config:
    """Read a run's configuration to look at it or to compare it, not to build from it: nothing is imported.

    Sections that name a component from outside of the registries stay as they are written, and what must hold between
    keys is not looked at: the run was started with them.
    """
    # Reading a section's arguments takes the builder's signature, and so an import: sections with a builder from
    # outside are left out of the merge, and put in afterwards as they are written.
    layer = _layer(path)
    written = {key.partition(".")[0] for key, _ in outside_components(layer.table)} & KINDS.keys()
    table = {section: content for section, content in layer.table.items() if section not in written}
    if "balancer" in written:  # one from outside does not keep the others from being read
        balancers = layer.table["balancer"].items()
        table["balancer"] = {
            name: options for name, options in balancers if not any(_names("balancer", {name: options}))
        }
    config = merge_unchecked([Layer(layer.origin, _without_own_data(table))])
    config = _with_own_data(config, table)
    return dataclasses.replace(
        config, **{section: _as_written(config, section, layer.table[section]) for section in written}
    )


def _as_written(config: Config, section: str, table: dict[str, Any]) -> Any:
    """A section that names something from outside, as its table says; balancers that are not from outside as read."""
    if section == "balancer":
        return {name: config.balancer.get(name, options) for name, options in table.items() if options is not False}
    arguments = {key: value for key, value in table.items() if key != "name"}
    name = table.get("name", getattr(config, section).name)
    if section != "optimizer":
        return Component(name, arguments)
    groups = {group: arguments.pop(group) for group in GROUP_PATTERNS if group in arguments}
    groups |= arguments.pop("groups", {})
    return Optimizer(name, arguments, {group: options for group, options in groups.items() if options is not False})


def outside_components(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a configuration file that name a component outside of the registries, with the names."""
    for section in KINDS:
        yield from _names(section, table.get(section))
    for key in PLAIN_KEYS:
        section, _, name = key.partition(".")
        value = table[section].get(name) if isinstance(table.get(section), dict) else None
        if isinstance(value, str) and ":" in value:
            yield key, value


def outside_datasets(table: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys of a configuration file that name a data set outside of ours, with the names: who reads needs them."""
    for key, data in _own_data(table).items():
        yield f"{key}.dataset", data["dataset"]


def _own_data(table: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The tables of a configuration file whose data set is a function outside, by their dotted names."""
    tables = {"data": table.get("data")}
    for kind in DATA_TABLES:
        section, _, key = kind.partition(".")
        named = table[section].get(key) if isinstance(table.get(section), dict) else None
        tables |= {f"{kind}.{name}": data for name, data in named.items()} if isinstance(named, dict) else {}
    return {
        name: data for name, data in tables.items() if isinstance(data, dict) and ":" in str(data.get("dataset", ""))
    }


def _without_own_data(table: Mapping[str, Any]) -> dict[str, Any]:
    """The tables of a file with a data set of ours in place of each function outside and of its arguments."""
    # The standard library needs no path, so that the rest can be checked as it is.
    changed = copy.deepcopy(dict(table))
    for path, data in _own_data(changed).items():
        fields = {field.name for field in dataclasses.fields(NAMED_TABLES.get(path.rpartition(".")[0], Data))}
        others = {key: value for key, value in data.items() if key in fields - {"path", "dataset"}}
        data.clear()
        data |= {"dataset": "stdlib", **others}
    return changed


def _with_own_data(config: Config, table: Mapping[str, Any]) -> Config:
    """A configuration of `_without_own_data` with the functions and their arguments as the file names them."""
    # A path is an argument where there is one: without a function that takes it, it would have been refused.
    for path, data in _own_data(table).items():
        kind, _, name = path.rpartition(".")
        section = path.partition(".")[0]
        old = getattr(config, section)
        part = old if not kind else getattr(old, kind.partition(".")[2])[name]
        names = {field.name for field in dataclasses.fields(part)} - {"path"}
        arguments = {key: value for key, value in data.items() if key not in names and value != []}
        new = dataclasses.replace(part, dataset=data["dataset"], arguments=arguments)
        if kind:
            key = kind.partition(".")[2]
            new = dataclasses.replace(old, **{key: {**getattr(old, key), name: new}})
        config = dataclasses.replace(config, **{section: new})
    return config


def _names(key: str, table: Any) -> Iterator[tuple[str, str]]:
    """Names in a section of components, at any depth; a balancer's is the name of its table."""
    for name, value in table.items() if isinstance(table, dict) else ():
        if key == "balancer" and ":" in name:
            yield f"{key}.{name}", name
        if name == "name" and isinstance(value, str) and ":" in value:
            yield f"{key}.{name}", value
        yield from _names(f"{key}.{name}", value)


def _layer(path: Path) -> Layer:
    """The file alone: what a run wrote is whole, and a `base` could be any file of this machine."""
    table = read_file(str(path), "checkpoint", "config")
    if "base" in table:
        raise key_error(
            str(path), "base", "is not for the configuration of a checkpoint, which is whole", table["base"]
        )
    return Layer(str(path), {section: _present(section, content) for section, content in table.items()})


def _present(section: str, table: Any) -> Any:
    """A section without the keys that only older versions have: what the run was is told by the others."""
    if not isinstance(table, dict):
        return table
    return {key: value for key, value in table.items() if f"{section}.{key}" not in REMOVED}
