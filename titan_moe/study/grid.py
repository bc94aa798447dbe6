"""From a study to its runs: points of the axes, and for each point and seed a configuration and a folder."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.config import Config, merge_layers
from titan_moe.config.layers import Layer, insert
from titan_moe.config.schema import key_error
from titan_moe.config.sections import Job
from titan_moe.runtime.remote import is_url
from titan_moe.study.report.measures import OF_SETS, OF_TASKS, key_in_set, set_of
from titan_moe.study.spec import Study

Point = Mapping[str, Any]  # axis id -> value; of an axis with options the option's name
LONGEST = 150  # characters of a folder's name; file systems allow 255 bytes


class Run(NamedTuple):
    """One training run of a study."""

    point: Point
    seed: int
    folder: Path
    config: Config


def expand(study: Study) -> list[Point]:
    """The study's points, the last axis fastest; ValueError for two that are the same, or axes that make none."""
    for axis in study.axes:
        if not axis.values and study.section.combine != "points":
            raise ValueError(f"{study.path}: axes.{axis.id}.values: is missing or empty: give a list of values")

    # The axes' values in each of the three ways; "points" makes none of its own and needs explicit ones.
    if study.section.combine == "points":
        grid: list[tuple[Any, ...]] = []
        if not study.points:
            raise ValueError(f'{study.path}: study.combine = "points" needs [[points]], but there are none')
    elif study.section.combine == "zip":
        lengths = {axis.id: len(axis.values) for axis in study.axes}
        if len(set(lengths.values())) > 1:
            shown = ", ".join(f"axes.{name} {length}" for name, length in lengths.items())
            raise ValueError(f'{study.path}: study.combine = "zip" needs axes of the same length, but: {shown}')
        grid = list(zip(*(axis.values for axis in study.axes), strict=True))
    else:
        grid = list(itertools.product(*(axis.values for axis in study.axes)))

    # Explicit points come on top in all three.
    ids = [axis.id for axis in study.axes]
    points = [*(dict(zip(ids, values, strict=True)) for values in grid), *study.points]
    _check_distinct(study, points)
    return points


def baseline_of(study: Study, points: Sequence[Point]) -> Point:
    """The point that the others are compared with; ValueError where `study.baseline` is none of them."""
    wanted = study.section.baseline
    if not wanted:
        return points[0]
    if wanted not in points:
        shown = f"{{ {', '.join(f'{key} = {value!r}' for key, value in points[0].items())} }}"
        raise ValueError(
            f"{study.path}: study.baseline: {point_text(wanted)} is none of the points: give a value for each axis, as "
            f"in {shown}"
        )
    return next(point for point in points if point == wanted)


def _check_distinct(study: Study, points: Sequence[Point]) -> None:
    """Raise ValueError for two points of one folder: they would train over each other."""
    folders: dict[str, Point] = {}
    for point in points:
        other = folders.setdefault(folder_name(point), point)
        if other is not point:
            raise ValueError(
                f"{study.path}: two points collide: {point_text(other)} and {point_text(point)}: remove one, or give "
                "values that differ in letters, digits or .+-"
            )


def runs_of(study: Study) -> list[Run]:
    """Every run of the study with its configuration checked; ValueError where an axis names no key or a wrong value."""
    runs, same = [], dict[str, Point]()
    points = expand(study)
    baseline_of(study, points)
    for point in points:
        for seed in study.section.seeds:
            folder = study.folder / "runs" / folder_name(point) / f"seed-{seed}"
            runs.append(Run(point, seed, folder, resolve(study, point, seed, folder)))

        # Points with different names can be the same configuration, such as two options that set the same values. They
        # would train twice, and be level in every table.
        key = repr(without_job(runs[-1].config))
        other = same.setdefault(key, point)
        if other is not point:
            raise ValueError(
                f"{study.path}: two points collide: {point_text(other)} and {point_text(point)} are the same "
                "configuration: remove one, or let an axis make the difference"
            )
    _check_sets(study, runs)
    return runs


def _check_sets(study: Study, runs: Sequence[Run]) -> None:
    """Raise ValueError for a number to draw of a validation set, or of a task, that no run has."""
    sets = sorted({name for run in runs for name in run.config.validation.sets})
    tasks = sorted({name for run in runs for name in run.config.validation.tasks})
    for key in ("report", "curves"):
        for shown in getattr(study.section, key):
            name, number = set_of(shown), key_in_set(shown)
            is_there = (number in OF_SETS and name in sets) or (number in OF_TASKS and name in tasks)
            if name is not None and not is_there:
                what, names = ("set", sets) if number in OF_SETS else ("task", tasks)
                raise key_error(
                    study.path,
                    f"study.{key}",
                    f"{shown!r}: no run has a validation {what} {name}: there are {', '.join(names) or 'none'}; add "
                    f"[config.validation.{what}s.{name}]",
                )


def resolve(study: Study, point: Point, seed: int, folder: Path) -> Config:
    """Build the configuration of one run."""
    layers = [*study.config, *point_layers(study, point)]
    job_table = {"job": {"dump_folder": str(folder), "description": f"{study.name}: {point_text(point)}, seed {seed}"}}
    seeded = Layer(f"{study.path}: study.seeds", {"training": {"seed": seed}})
    config = merge_layers([*layers, Layer(study.path, job_table), seeded])
    if study.section.analyze and not (config.checkpoint.enable and config.moe.num_experts):
        key = "checkpoint.enable = false" if config.moe.num_experts else "moe.num_experts = 0"
        raise ValueError(f"{study.path}: study.analyze = true needs checkpoints of models with experts, not {key}")
    if is_url(config.checkpoint.folder):
        raise ValueError(
            f"{study.path}: checkpoint.folder ({config.checkpoint.folder}): all runs of a study would save into one "
            "folder: leave it out, each run has its own"
        )
    if not config.validation.enable:
        raise ValueError(f"{study.path}: validation.enable = false: a study compares validation losses: set it to true")
    return config


def point_layers(study: Study, point: Point) -> Iterator[Layer]:
    """One layer of configuration for each axis of a point, whose errors name the axis."""
    for axis in study.axes:
        origin, value = f"{study.path}: axes.{axis.id}", point[axis.id]
        table = dict(axis.options[value]) if axis.options else {}
        for key in axis.keys:
            insert(table, key, value, origin)
        yield Layer(origin, table)


def without_job(config: Config) -> Config:
    """The configuration without what does not change the run: [job] and the folder where tokens are cached."""
    data = dataclasses.replace(config.data, cache_folder="")
    return dataclasses.replace(config, job=Job(), data=data)


def point_text(point: Point) -> str:
    """A point for people: `coeff 0.1, experts 8`; a study without axes has the point `base`."""
    return ", ".join(f"{name} {value_text(value)}" for name, value in point.items()) or "base"


def value_text(value: Any) -> str:
    """An axis value for people."""
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def folder_name(point: Point) -> str:
    """A point as the name of a folder: `coeff=0.1,experts=8`. It depends on nothing else that is in the study."""
    whole = {name: int(v) if isinstance(v, float) and v.is_integer() else v for name, v in point.items()}  # 1.0 is 1
    text = ",".join(f"{name}={value}" for name, value in whole.items())
    name = re.sub(r"[^A-Za-z0-9._=,+-]+", "_", text) or "base"
    return name if len(name) <= LONGEST else f"{name[:LONGEST]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
