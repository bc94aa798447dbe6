"""The text of --help: sections, keys, types, defaults, and the components of every registry with their arguments."""

import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints

import tomli_w

from titan_moe.balancer import Balancer
from titan_moe.config.schema import REQUIRED, Kind, Parameter, document, parameters_of, type_text
from titan_moe.config.sections import ARGUMENTS, GROUP_KEYS, KINDS, LOAD_LR, NAMED_TABLES, SECTIONS, Config
from titan_moe.optimizer.groups import GROUP_PATTERNS
from titan_moe.optimizer.load_lr import load_lr

WIDTH = 100
COLUMN = 44  # where descriptions begin
NO_BREAK = "\N{NO-BREAK SPACE}"

USAGE = """\
usage: torchrun -m titan_moe.train [--job.config_file FILE] [--section.key VALUE ...]

A key is set in a TOML file, [training] steps = 1000, or on the command line, --training.steps 1000 or
--training.steps=1000. Precedence: defaults < base file(s) < file < command line. A file inherits from
others with base = "base.toml" (or a list) in its first line, relative to the file. A list takes several
words (--data.path a.txt b.txt), a switch none (--compile.enable). An unknown key or a wrong type is an
error. Below: key = default, what it means (type)."""

COMPONENTS = {
    "parametrization": "A component by name and its arguments: how initial weights, rates and the forward's factors "
    "follow from the model's size.",
    "router": 'A component by name and its arguments; name = "my_pkg.my_mod:fn" takes a function from outside.',
    "balancer": "A table [balancer.NAME] for each balancer that is on, none by default. NAME = false switches off one "
    'that a base file turned on; NAME may be "my_pkg.my_mod:fn". A table [balancer.ANY] with name = "NAME" is an '
    "instance of it under a name of its own: so one balancer can be on several times.",
    "optimizer": "A component by name and its arguments. A table [optimizer.GROUP] sets the same arguments for one "
    "parameter group ({groups}), or names another optimizer for it; GROUP = false takes back what a base file set. A "
    "table [optimizer.groups.NAME] makes a group of one's own.",
    "lr_scheduler": "A component by name and its arguments: the factor of every learning rate at a step.",
}


def help_text() -> str:
    """Describe every section, key and component with types and defaults, for a terminal of 100 columns."""
    blocks = [textwrap.fill(paragraph, WIDTH) for paragraph in USAGE.split("\n\n")]

    # Everything below is read from annotations and signatures, which also check the keys: help can't be out of date.
    default = Config()
    for section, hint in SECTIONS.items():
        if section in KINDS:
            intro = COMPONENTS[section].format(groups=", ".join(GROUP_PATTERNS))
            blocks.append(_component_block(section, KINDS[section], intro, getattr(default, section)))
            if section == "optimizer":
                blocks += [_group_block(), _load_lr_block()]
        else:
            lines = [f"[{section}]  {inspect.getdoc(hint)}"]
            for key, annotation in get_type_hints(hint, include_extras=True).items():
                if f"{section}.{key}" not in NAMED_TABLES and key != ARGUMENTS:
                    about = f"{document(annotation)} {_type(annotation)}"
                    lines += _entry(f"  {key}", getattr(getattr(default, section), key), about)
            blocks.append("\n".join(lines))
            blocks += [
                _table_block(path, table) for path, table in NAMED_TABLES.items() if path.startswith(f"{section}.")
            ]
    return "\n\n".join(blocks) + "\n"


def _table_block(path: str, table: type) -> str:
    """Describe the tables [SECTION.KEY.NAME]."""
    about = " ".join((inspect.getdoc(table) or "").split())
    lines = textwrap.wrap(f"[{path}.NAME]  {about}", WIDTH, subsequent_indent="  ")
    default = table()
    for key, annotation in get_type_hints(table, include_extras=True).items():
        if key != ARGUMENTS:
            lines += _entry(f"  {key}", getattr(default, key), f"{document(annotation)} {_type(annotation)}")
    return "\n".join(lines)


def _component_block(section: str, kind: Kind, intro: str, default: Any) -> str:
    """Describe a section that names components: its own keys, then each component with its arguments."""
    # First the keys of the section, with the arguments that parameter groups have by default.
    lines = [f"[{section}]", *textwrap.wrap(intro, WIDTH - 2, initial_indent="  ", subsequent_indent="  ")]
    if section != "balancer":
        lines += _entry("  name", default.name, f"one of: {', '.join(kind.registry)}")
    for group, arguments in getattr(default, "groups", {}).items():
        for key, value in arguments.items():
            lines += _entry(f"  {group}.{key}", value, f"the default of [{section}.{group}]")

    # Then each component. The first paragraph of its docstring is for users, the rest for readers of the code.
    for name, builder in kind.registry.items():
        summary = (inspect.getdoc(builder) or "").partition("\n\n")[0].replace("\n", " ")
        title = f"[balancer.{name}]" if section == "balancer" else f'name = "{name}"'
        lines += ["", *textwrap.wrap(f"{title}: {summary}", WIDTH - 4, initial_indent="  ", subsequent_indent="    ")]
        for key, (annotation, value) in parameters_of(kind, name, "help", section).items():
            lines += _entry(f"    {key}", value, _type(annotation))
        if names := _state_of(builder) if section == "balancer" else []:
            lines += textwrap.wrap(f"keeps of each layer, in checkpoints: {', '.join(names)}", initial_indent="    ")
    return "\n".join(lines)


def _state_of(builder: Callable[..., Balancer]) -> list[str]:
    """The names of the tensors that a balancer keeps, as it is by default."""
    init = builder().init
    return [] if init is None else list(init(1))


def _group_block() -> str:
    """Describe what groups by pattern take beside the arguments of the optimizer."""
    title = (
        "[optimizer.groups.NAME], a group of one's own: the parameters whose names match, with the keys of GROUP; what "
        "it leaves out comes from [optimizer]. A parameter is in the first group, in their order, that matches it; the "
        "five groups have what is left."
    )
    return _keys_block(title, GROUP_KEYS)


def _load_lr_block() -> str:
    """Describe what [optimizer.expert] takes beside the arguments of the optimizer."""
    about = " ".join((inspect.getdoc(load_lr) or "").partition("Returns a parameter")[0].split())
    return _keys_block(f"[optimizer.expert], and [optimizer.groups.NAME] of experts: {about}", LOAD_LR)


def _keys_block(title: str, keys: Mapping[str, Parameter]) -> str:
    """Describe keys that tables of one sort have besides."""
    lines = textwrap.wrap(title, WIDTH - 2, initial_indent="  ", subsequent_indent="    ")
    for key, (annotation, value) in keys.items():
        lines += _entry(f"    {key}", value, f"{document(annotation)} {_type(annotation)}")
    return "\n".join(lines)


def _type(annotation: Any) -> str:
    """Write a type in brackets; a short one is not broken at the end of a line."""
    text = f"({type_text(annotation)})"
    return text.replace(" ", NO_BREAK) if len(text) < 40 else text


def _entry(key: str, default: Any, about: str) -> list[str]:
    """Lay out one key: `key = default` on the left, what it means on the right, wrapped."""
    left = f"{key}  (required)" if default is REQUIRED else f"{key} = {_toml(default)}"
    lines = [line.replace(NO_BREAK, " ") for line in textwrap.wrap(about, WIDTH - COLUMN)]
    if len(left) >= COLUMN:
        return [left, *(" " * COLUMN + line for line in lines)]
    return [f"{left:<{COLUMN}}{lines[0]}", *(" " * COLUMN + line for line in lines[1:])]


def _toml(value: Any) -> str:
    """Write a default as it would stand in a file."""
    if isinstance(value, list):  # on one line, where tomli_w takes one for each item
        return f"[{', '.join(map(_toml, value))}]"
    return "none" if value is None else tomli_w.dumps({"k": value}).partition(" = ")[2].strip()
