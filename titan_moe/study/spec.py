"""A study file: the configuration that its runs start from, its axes, its seeds and what to report.

It inherits from others by `base`, as configurations do: later values win, key by key. [config] is the configuration
that every run starts from, with a `base` of its own; each table of [axes] is one axis.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

from pydantic import AfterValidator, PositiveInt

from titan_moe.config.layers import Layer, command_line_layer, file_layers
from titan_moe.config.schema import check_value, key_error, unknown_key
from titan_moe.study.report.measures import ANALYZED, CURVES, MEASURES, OF_SETS, OF_TASKS, set_of

TABLES = ("study", "config", "axes", "points")
Settings = Mapping[str, Any]  # section -> key -> value, as in a configuration file


def _known(names: Sequence[str], valid: Mapping[str, Any]) -> Any:
    for name in names:
        if name not in valid and set_of(name) is None:
            of_sets = (
                f"validation/NAME/KEY of a validation set, KEY in {', '.join(OF_SETS)}, or of a task, KEY in "
                f"{', '.join(OF_TASKS)}"
            )
            raise ValueError(f"{name!r} is none of {', '.join(valid)}, or {of_sets}")
    return list(names)


def _seeds(seeds: list[int]) -> list[int]:
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError("must be one or more different numbers")
    return seeds


Seeds = Annotated[list[int], AfterValidator(_seeds)]
Measures = Annotated[list[str], AfterValidator(lambda names: _known(names, MEASURES))]
Curves = Annotated[list[str], AfterValidator(lambda names: _known(names, CURVES))]


@dataclass(frozen=True)
class Section:
    """What [study] can say."""

    title: Annotated[str, "headline of the report"] = ""
    mirrors: Annotated[str, "the table or figure that the study repeats"] = ""
    description: Annotated[str, "a paragraph on it, for the reader"] = ""
    dump_folder: Annotated[str, "folder of the study (empty: ./outputs/studies/NAME)"] = ""
    seeds: Annotated[Seeds, "values of training.seed: every point runs with each"] = field(default_factory=lambda: [42])
    baseline: Annotated[
        dict[str, Any], "the point that the others are compared with, a value for each axis (empty: the first)"
    ] = field(default_factory=dict)
    combine: Annotated[
        Literal["product", "zip", "points"], "how the axes' values make points; points: only those of [[points]]"
    ] = "product"
    nproc: Annotated[PositiveInt, "processes of a run; above 1 by torchrun"] = 1
    keep_checkpoints: Annotated[bool, "whether finished runs keep their checkpoints"] = True
    analyze: Annotated[bool, "whether finished runs are analyzed, for what router and experts of a model do"] = False
    report: Annotated[Measures, "measures to draw against the axes"] = field(
        default_factory=lambda: ["loss", "perplexity", "accuracy", "maxvio_global"]
    )
    curves: Annotated[Curves, "numbers of metrics.jsonl, as kind/key, to draw over the steps"] = field(
        default_factory=lambda: ["validation/loss", "train/loss", "validation/maxvio_global", "train/maxvio_batch"]
    )
    sbatch: Annotated[list[str], "lines after #SBATCH for --launcher slurm, such as --partition=gpu"] = field(
        default_factory=list
    )


class Axis(NamedTuple):
    """One thing that varies: values of one or more keys, or named options that each set several."""

    id: str
    label: str
    keys: tuple[str, ...]  # empty where it has options
    values: tuple[Any, ...]  # of the keys, or the names of the options
    options: Mapping[str, Settings]


class Study(NamedTuple):
    """A study file, read and checked. Values of its axes are not: only a run's whole configuration can be checked."""

    path: str
    section: Section
    folder: Path
    axes: tuple[Axis, ...]
    points: tuple[Mapping[str, Any], ...]  # explicit ones: axis id -> value
    config: tuple[Layer, ...]  # what every run starts from

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return Path(self.path).stem


def load_study(path: str, overrides: Sequence[str] = (), dump_folder: str = "") -> Study:
    """Read a study file; `overrides` are words `--section.key value ...` for the configuration of every run.

    A mistake is a ValueError (an OSError for a file that cannot be read) of one line, as for configurations.
    """
    # Each file is checked before it is merged, so that an error names the file that has the mistake. Axes merge key by
    # key; a list of points replaces the one before, as lists do in configurations.
    layers = file_layers(path, key="STUDY.toml")
    merged: dict[str, Any] = {"study": {}, "axes": {}}
    origins: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.table.items():
            if name not in TABLES:
                raise unknown_key(layer.origin, name, TABLES, "table of a study")
            _check_table(layer.origin, name, value, list if name == "points" else dict)
        merged["study"] |= _checked_section(layer.table.get("study", {}), layer.origin)
        for axis, table in layer.table.get("axes", {}).items():
            _check_table(layer.origin, f"axes.{axis}", table, dict)
            merged["axes"][axis] = merged["axes"].get(axis, {}) | table
            origins[axis] = layer.origin
        if "points" in layer.table:
            merged["points"] = layer.table["points"]

    # An axis whose `key` is an empty list sets nothing, and is left out: so a file takes back an axis of its base.
    section = Section(**merged["study"])
    _check_analyzed(path, section)
    axes = tuple(_axis(origins[name], name, table) for name, table in merged["axes"].items())
    axes = tuple(axis for axis in axes if axis.keys or axis.options)

    # The command line is the last layer, above the files, and is checked against what the axes set.
    folder = dump_folder or section.dump_folder or os.path.join("outputs", "studies", Path(path).stem)
    config = (*_config_layers(layers), command_line_layer(list(overrides)))
    _check_axes(path, axes, config[-1])
    points = tuple(_explicit_point(path, axes, number, point) for number, point in enumerate(merged.get("points", [])))
    return Study(path, section, Path(folder), axes, points, config)


def _check_table(origin: str, key: str, value: Any, kind: type) -> None:
    if not isinstance(value, kind):
        raise key_error(origin, key, f"must be {'a table' if kind is dict else 'an array of tables'}", value)


def _check_analyzed(path: str, section: Section) -> None:
    """Raise ValueError for a measure to draw that no run would have."""
    for name in section.report:
        if name in ANALYZED and not section.analyze:
            raise key_error(path, "study.report", f"{name!r} is of an analysis: set study.analyze = true")


def _checked_section(table: dict[str, Any], origin: str) -> dict[str, Any]:
    annotations = get_type_hints(Section, include_extras=True)
    for name in table:
        if name not in annotations:
            raise unknown_key(origin, f"study.{name}", tuple(annotations))
    return {name: check_value(annotations[name], value, origin, f"study.{name}") for name, value in table.items()}


def _config_layers(layers: Sequence[Layer]) -> list[Layer]:
    """The layers of [config]: the base that the last file names, then the values of each file.

    A base is relative to the file that names it.
    """
    # Only one base is in force: of a study and its own base, both naming one, the study's.
    values_of_files: list[Layer] = []
    base: list[Layer] = []
    for layer in layers:
        table = dict(layer.table.get("config", {}))
        if "base" in table:
            name = table.pop("base")
            if not isinstance(name, str):
                raise key_error(layer.origin, "config.base", "must be the name of a configuration file", name)
            base_path = os.path.normpath(os.path.join(os.path.dirname(layer.origin), name))
            base = file_layers(base_path, layer.origin, "config.base")
        values_of_files.append(Layer(f"{layer.origin}: [config]", table))
    return [*base, *values_of_files]


def _axis(origin: str, name: str, table: dict[str, Any]) -> Axis:
    """Read one [axes.NAME], merged from all files; errors name the last of these. With `key = []` it sets nothing."""
    # The id is part of names of folders and figures, and must be one on every file system.
    prefix = f"axes.{name}"
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise key_error(
            origin, prefix, "must be of letters, digits, _ and -: files have its name; label is for readers"
        )
    known = {"key": list[str] | str, "values": list[Any], "label": str, "options": dict[str, dict[str, Any]]}
    for key in table:
        if key not in known:
            raise unknown_key(origin, f"{prefix}.{key}", tuple(known))
    given = {key: check_value(known[key], value, origin, f"{prefix}.{key}") for key, value in table.items()}

    # An axis with options: each sets several keys, and its name is the value.
    label, options = given.get("label", name), given.get("options", {})
    if ("key" in given) == ("options" in given):
        raise key_error(origin, prefix, "an axis has either key and values, or options: give one of them")
    if options:
        values = tuple(given.get("values", options))
        for value in values:
            if value not in options:
                raise unknown_key(origin, f"{prefix}.options.{value}", tuple(options), "option")
        return Axis(name, label, (), values, options)
    if "options" in given:
        raise key_error(origin, f"{prefix}.options", "is empty: give each option a table [axes.NAME.options.OPTION]")

    # An axis with keys, which all take the same value. Folders and seeds are the study's to set.
    keys = (given["key"],) if isinstance(given["key"], str) else tuple(given["key"])
    for key in keys:
        if key.count(".") < 1 or not all(key.split(".")):
            raise key_error(origin, f"{prefix}.key", "must be the key of a configuration: section.key", key)
        if key.startswith("job.") or key == "training.seed":
            other = "study.seeds" if key == "training.seed" else "study.dump_folder"
            raise key_error(origin, f"{prefix}.key", f"cannot be an axis: the study sets it by {other}", key)
    return Axis(name, label, keys, tuple(given.get("values", ())), {})


def _check_axes(path: str, axes: Sequence[Axis], command_line: Layer) -> None:
    """Raise ValueError for a key that two axes set, and for one that the command line would set for all points."""
    # Without this the later of two axes would win silently, and every axis over the command line.
    owner: dict[str, str] = {}
    for axis in axes:
        for key in axis.keys:
            if key in owner:
                raise key_error(path, f"axes.{axis.id}.key", f"axes.{owner[key]} sets it too", key)
            owner[key] = axis.id
    for section, table in command_line.table.items():
        for name in table:
            if f"{section}.{name}" in owner or section == "job":
                what = "the study sets it" if section == "job" else f"axes.{owner[f'{section}.{name}']} varies it"
                raise key_error(command_line.origin, f"{section}.{name}", f"cannot be set here: {what}")


def _explicit_point(path: str, axes: Sequence[Axis], number: int, point: Any) -> dict[str, Any]:
    """Check that one of [[points]] has a value for each axis and for nothing else, and give it in the axes' order."""
    # All points have the same axes, so that each fills its row of the table.
    prefix = f"points[{number + 1}]"
    _check_table(path, prefix, point, dict)
    ids = tuple(axis.id for axis in axes)
    for name in point:
        if name not in ids:
            raise unknown_key(path, f"{prefix}.{name}", ids, "axis")
    for axis in axes:
        if axis.id not in point:
            raise key_error(path, f"{prefix}.{axis.id}", "is missing: a point has a value for each axis")
        if axis.options and point[axis.id] not in axis.options:
            raise unknown_key(path, f"{prefix}.{axis.id}.{point[axis.id]}", tuple(axis.options), "option")
    return {axis.id: point[axis.id] for axis in axes}
