"""The configuration of a run: defaults < base files < file < command line, merged key by key and checked strictly.

Plain sections are the dataclasses of `sections`. The sections router, balancer, optimizer and lr_scheduler name
components: the signature of a component's builder is the schema of its table.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, get_type_hints

import tomli_w
from pydantic import AfterValidator, Field

from titan_moe.balancer import BALANCERS
from titan_moe.config.checks import check_config
from titan_moe.config.help import render_help
from titan_moe.config.layers import Layer, command_line_layer, file_layers
from titan_moe.config.schema import (
    COMMAND_LINE,
    Kind,
    Words,
    check_arguments,
    check_value,
    find_builder,
    key_error,
    parameters_of,
    unknown_key,
    with_defaults,
)
from titan_moe.config.sections import Component, Config, Optimizer, positive_or_minus_one
from titan_moe.model.routing import ROUTERS
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import GROUP_PATTERNS
from titan_moe.optimizer.load_lr import load_lr
from titan_moe.optimizer.schedule import SCHEDULES

_POSITIVE, _NOT_NEGATIVE = Field(gt=0, allow_inf_nan=False), Field(ge=0, allow_inf_nan=False)
_FACTOR, _BETA, _COUNT = Field(ge=0, le=1), Field(ge=0, lt=1), Field(ge=1)

KINDS = {
    "router": Kind(
        ROUTERS,
        {"top_k": "moe.top_k"},
        {
            "temperature": _POSITIVE,
            "score_scale": _POSITIVE,
            "num_groups": _COUNT,
            "topk_groups": _COUNT,
            "jitter": _BETA,
            "noise_std": _NOT_NEGATIVE,
            "capacity_factor": _NOT_NEGATIVE,
            "iterations": _COUNT,
        },
    ),
    "balancer": Kind(BALANCERS, {}, {"coeff": _NOT_NEGATIVE, "rate": _NOT_NEGATIVE, "decay_ratio": _FACTOR}),
    "optimizer": Kind(
        OPTIMIZERS,
        {"param_groups": "the model", "params": "the model"},  # `params` in torch.optim's own classes
        {
            **dict.fromkeys(("lr", "weight_decay"), _NOT_NEGATIVE),
            **dict.fromkeys(("beta1", "beta2", "momentum"), _BETA),
            **dict.fromkeys(("eps", "epsilon"), _POSITIVE),
            **dict.fromkeys(("precondition_frequency", "statistics_every"), _COUNT),
            **dict.fromkeys(("max_preconditioner_dim", "adamw_above"), _COUNT),
            "start_preconditioning_step": AfterValidator(positive_or_minus_one),
            "exponent": _FACTOR,
            "ns_steps": Field(ge=1, le=20),
        },
    ),
    "lr_scheduler": Kind(
        SCHEDULES,
        {"steps": "training.steps"},
        {"warmup_steps": _NOT_NEGATIVE, "min_lr_factor": _FACTOR, "decay_ratio": _FACTOR},
    ),
}
# What [optimizer.expert] takes besides, whatever the optimizer.
LOAD_LR = Kind(
    {"load_lr": load_lr},
    {},
    {
        "load_lr_power": Field(allow_inf_nan=False),
        "load_lr_ema": _BETA,
        "load_lr_floor": _NOT_NEGATIVE,
        "load_lr_ceiling": Field(gt=0),
    },
)
SECTIONS = get_type_hints(Config)

State = dict[str, dict[str, Any]]  # section -> checked values; of a component {"name", "arguments", "origin", ...}

# Keys that there were, each with the reason why nothing is lost without it. `titan_moe.config.saved` reads over them.
REMOVED = {"moe.dispatcher": "parallelism.expert_parallel_degree says how tokens reach their experts"}


def load_config(args: list[str]) -> Config:
    """Build the configuration from command-line arguments such as ["--job.config_file", "x.toml", "--compile.enable"].

    A user's mistake is a ValueError (an OSError for a file that cannot be read) of one line that names the file or
    argument, the key, the value and what would be right.
    """
    command_line = command_line_layer(args)
    config_file = _config_file(command_line)
    return merge_layers([*(file_layers(config_file) if config_file else []), command_line])


def merge_layers(layers: Iterable[Layer]) -> Config:
    """Build the configuration that the layers make, later ones over earlier ones, and check it as a whole."""
    config = merge_unchecked(layers)
    check_config(config)
    return config


def merge_unchecked(layers: Iterable[Layer]) -> Config:
    """As `merge_layers`, but what must hold between keys is not looked at."""
    state = _initial_state()
    for layer in layers:
        for section, table in layer.table.items():
            _apply(state, section, table, layer.origin)
    return _finish(state)


def find_component(registry: Mapping[str, Callable[..., Any]], name: str) -> Callable[..., Any]:
    """Find the builder that a component's name means: an entry of its registry, or a function outside of it."""
    return find_builder(registry, name, "configuration", "name")


def help_text() -> str:
    """Describe every section, key and component with types and defaults, for --help."""
    return render_help(KINDS, LOAD_LR, tuple(GROUP_PATTERNS))


def to_toml(config: Config) -> str:
    """Write the resolved configuration as TOML; loading that file gives an equal Config."""
    document: dict[str, Any] = {}
    for section in SECTIONS:
        value = getattr(config, section)
        if section == "balancer":
            table = {name: dict(arguments) for name, arguments in value.items()}
        elif isinstance(value, Component):
            table = {"name": value.name, **value.arguments}
        elif isinstance(value, Optimizer):
            off = {group: False for group in Optimizer().groups if group not in value.groups}
            table = {"name": value.name, **value.arguments, **off, **value.groups}
        else:
            table = dataclasses.asdict(value)
            for name in ("config_file", "allow_config_change"):  # of one start, not of the run
                table.pop(name, None)
        document[section] = table
    return tomli_w.dumps({section: table for section, table in document.items() if table})


def _config_file(command_line: Layer) -> str:
    job = command_line.table.get("job", {})
    value = job.get("config_file", "")
    return check_value(str, value, COMMAND_LINE, "job.config_file") if isinstance(value, Words) else ""


def _initial_state() -> State:
    """Put the defaults of Config in the form that layers are merged into."""
    state: State = {}
    for section in SECTIONS:
        default = getattr(Config(), section)
        state[section] = dict(default) if isinstance(default, dict) else dict(vars(default))
        state[section].update({"origin": "defaults"} if isinstance(default, (Component, Optimizer)) else {})
    return state


def _apply(state: State, section: str, table: Any, origin: str) -> None:
    """Merge one section's table of one layer into the state, checked."""
    if section not in SECTIONS:
        raise unknown_key(origin, section, tuple(SECTIONS), "section", _all_keys(state))
    if not isinstance(table, dict):
        raise key_error(origin, section, f"must be a table: [{section}]", table)
    if section == "balancer":
        _apply_balancers(state, table, origin)
    elif section in KINDS:
        _apply_component(state, section, table, origin)
    else:
        annotations = get_type_hints(SECTIONS[section], include_extras=True)
        for name, value in table.items():
            key = f"{section}.{name}"
            if key in REMOVED:
                raise key_error(origin, key, f"is no key any more: leave it out, {REMOVED[key]}", value)
            if name not in annotations:
                raise unknown_key(origin, key, tuple(annotations), others=_all_keys(state))
            if key == "job.config_file" and origin != COMMAND_LINE:
                raise key_error(origin, key, 'is for the command line; a file inherits with base = "..."', value)
            state[section][name] = check_value(annotations[name], value, origin, key)


def _apply_balancers(state: State, tables: dict[str, Any], origin: str) -> None:
    """Merge [balancer.NAME] tables; `NAME = false` switches one off, `NAME = true` on."""
    balancers = state["balancer"]
    for name, value in tables.items():
        key = f"balancer.{name}"
        parameters = parameters_of(KINDS["balancer"], name, origin, key)
        on, table = _on_or_table(value, origin, key)
        if not on:
            balancers.pop(name, None)
            continue
        given = check_arguments(parameters, table, origin, key, kind=KINDS["balancer"])
        balancers[name] = {**balancers.get(name, {}), **given}


def _on_or_table(table: Any, origin: str, key: str) -> tuple[bool, dict[str, Any]]:
    """Read a nested table, or true or false in its place: whether it is on, and its keys."""
    if isinstance(table, dict):
        return True, table
    return check_value(bool, table, origin, key), {}


def _apply_component(state: State, section: str, table: dict[str, Any], origin: str) -> None:
    """Merge the table of a component; a new name drops the inherited arguments that the new component lacks."""
    current, table = state[section], dict(table)
    before = current["name"]
    if "name" in table:
        current["name"], current["origin"] = check_value(str, table.pop("name"), origin, f"{section}.name"), origin
    siblings: tuple[str, ...] = ("name",)
    if section == "optimizer":
        parameters_of(KINDS[section], current["name"], origin, "optimizer.name")  # refused here, not for a group
        siblings = ("name", *GROUP_PATTERNS)
        tables = {group: table.pop(group) for group in GROUP_PATTERNS if group in table}
        merged = {
            group: _merge_group(group, current["groups"].get(group, {}), tables.get(group, {}), before, current, origin)
            for group in GROUP_PATTERNS
        }
        current["groups"] = {group: arguments for group, arguments in merged.items() if arguments}
    names = before, current["name"]
    current["arguments"] = _merge(section, current["arguments"], table, names, origin, section, siblings)


def _merge_group(
    group: str, old: dict[str, Any], table: Any, before: str, current: dict[str, Any], origin: str
) -> dict[str, Any]:
    """Merge an [optimizer.GROUP] table, whose `name` may be its own; `GROUP = false` takes away what it has.

    `before` is the name that [optimizer] had up to this layer, `current` has the one from this layer on.
    """
    prefix = f"optimizer.{group}"
    on, table = _on_or_table(table, origin, prefix)
    if not on:
        return {}
    own, given = dict(old), dict(table)
    old_name = own.pop("name", before)
    name = check_value(str, given.pop("name"), origin, f"{prefix}.name") if "name" in given else old.get("name")
    names = old_name, name or current["name"]
    merged = _merge("optimizer", own, given, names, origin, prefix, ("name",))
    return merged if name is None else {"name": name, **merged}


def _merge(
    section: str,
    old: dict[str, Any],
    new: dict[str, Any],
    names: tuple[str, str],
    origin: str,
    prefix: str,
    siblings: tuple[str, ...],
) -> dict[str, Any]:
    """Merge the arguments `new`, checked, into `old`; `names` are the component's until now and from now on."""
    kind = KINDS[section]
    parameters = parameters_of(kind, names[1], origin, f"{prefix}.name")
    if section == "optimizer":
        by_load = parameters_of(LOAD_LR, "load_lr", origin, section)
        if prefix == "optimizer.expert":
            parameters = {**parameters, **by_load}
        for key in new.keys() & (by_load.keys() - parameters.keys()):
            raise key_error(
                origin, f"{prefix}.{key}", "only experts have a load: set it in [optimizer.expert]", new[key]
            )
    if names[0] != names[1]:
        old = {key: value for key, value in old.items() if key in parameters}
        old = check_arguments(parameters, old, f"{origin} (inherited)", prefix, kind=kind)
    return {**old, **check_arguments(parameters, new, origin, prefix, kind=kind, siblings=siblings)}


def _all_keys(state: State) -> list[str]:
    """List the dotted keys of every section as they are now, for suggestions."""
    keys = []
    for section, hint in SECTIONS.items():
        if section == "balancer":
            keys += [f"balancer.{name}" for name in BALANCERS]
        elif section in KINDS:
            name = state[section]["name"]
            keys += [f"{section}.{key}" for key in ("name", *parameters_of(KINDS[section], name, "", section))]
        else:
            keys += [f"{section}.{field.name}" for field in dataclasses.fields(hint)]
    return keys


def _finish(state: State) -> Config:
    """Fill in the defaults of components' arguments and make the dataclasses."""
    sections: dict[str, Any] = {}
    for section, hint in SECTIONS.items():
        values = dict(state[section])
        if section == "balancer":
            sections[section] = {name: _filled(section, name, given, "configuration") for name, given in values.items()}
        elif section in KINDS:
            origin = values.pop("origin")
            values["arguments"] = _filled(section, values["name"], values["arguments"], origin)
            sections[section] = hint(**values)
        else:
            sections[section] = hint(**values)
    return Config(**sections)


def _filled(section: str, name: str, given: dict[str, Any], origin: str) -> dict[str, Any]:
    prefix = f"{section}.{name}" if section == "balancer" else section
    parameters = parameters_of(KINDS[section], name, origin, prefix)
    return with_defaults(parameters, given, origin, prefix, name)
