"""A report on any runs, from their folders: what differs between their configurations becomes the axes."""

import datetime
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from titan_moe.config import Config, read_saved
from titan_moe.config.differences import flat
from titan_moe.runtime.command import StopRequest
from titan_moe.study.grid import Run, without_job
from titan_moe.study.progress import counts, statuses
from titan_moe.study.report.likeness import listed
from titan_moe.study.report.page import Page, write_report
from titan_moe.study.runs import METRICS, POINT
from titan_moe.study.spec import Section

MOST_AXES = 3  # runs that differ in more keys are told apart by their folders


def compare(folders: Sequence[str], target: Path, watch: float | None) -> int:
    """Write a report on the runs in `folders` (or below, where they are studies) into `target`; again with `watch`."""
    # These runs have no study file: the keys that differ are the axes, and the first run is the baseline.
    runs, labels, differ = read_runs(find_runs(folders))
    page = Page(
        f"Comparison of {len(runs)} run{'' if len(runs) == 1 else 's'}",
        "",
        "",
        labels,
        Section().report,
        (*Section().curves, "train/param_norm"),
        runs[0].point,
        differ,
    )

    # Runs may be going: each round reads their files again.
    stop = StopRequest() if watch else None
    while True:
        report = write_report(page, runs, target, watch)
        states = statuses(runs)
        print(f"{datetime.datetime.now():%H:%M:%S}  {counts(states)}  {report.path}", flush=True)
        if watch is None or stop is None or all(s.state in ("finished", "failed") for s in states):
            print("\n".join(report.findings))
            return 0

        # Short naps, so that a signal is answered at once.
        limit = time.monotonic() + watch
        while time.monotonic() < limit and not stop.signal:
            time.sleep(min(0.2, watch))
        if stop.signal:
            return 128 + stop.signal


def find_runs(folders: Sequence[str]) -> list[Path]:
    """The folders of runs that were named, or that lie in the studies named; ValueError for a folder without any run.

    A run that is named twice is given once.
    """
    run_folders: list[Path] = []
    for name in folders:
        folder = Path(name)
        if not folder.is_dir():
            raise ValueError(f"--compare {name}: no such folder")
        inside = [folder] if _is_run(folder) else sorted(p for p in (folder / "runs").glob("*/*") if _is_run(p))
        if not inside:
            raise ValueError(f"--compare {name}: holds no run (no config.toml with {METRICS}) and no study")
        run_folders += [run for run in inside if run.resolve() not in {other.resolve() for other in run_folders}]
    return run_folders


def _is_run(folder: Path) -> bool:
    return (folder / METRICS).exists() and any((folder / name).exists() for name in ("config.toml", POINT))


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], Mapping[str, str], list[str]]:
    """The runs with their points, the labels of the axes, and sentences on what differs.

    The axes are the keys in which the configurations differ. Where these are too many, or do not tell the runs apart,
    the only axis is the run's folder, and a sentence says what differs; else there is no sentence.
    """
    # The last part of a key is its label, unless two keys end alike.
    configs = [read_saved(_config_file(folder)) for folder in folders]
    keys = differing([without_seed(config) for config in configs])
    short = {key: key.rpartition(".")[2] for key in keys}
    if len(set(short.values())) < len(short):
        short = {key: key for key in keys}
    tables = [flat(config) for config in configs]
    points: list[dict[str, Any]] = [{short[key]: _plain(table.get(key)) for key in keys} for table in tables]

    # Two runs with the same point and seed would be taken for one, and a point of many keys is no name to read.
    differ: list[str] = []
    same = [repr((point, config.training.seed)) for point, config in zip(points, configs, strict=True)]
    if len(keys) > MOST_AXES or len(set(same)) < len(same):
        points = [{"run": name} for name in _names(folders)]
        short = {"run": "run"}
        differ = told(keys, tables)
    runs = [
        Run(point, config.training.seed, folder, config)
        for point, config, folder in zip(points, configs, folders, strict=True)
    ]
    return runs, {name: name for name in short.values()}, differ


def told(keys: Sequence[str], tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence that says in which keys the configurations of runs differ, or that they do not differ."""
    if not keys:
        return ["The configurations do not differ but for the seed: what differs in the results is not of a setting."]
    parts = []
    for key in keys:
        values = list(dict.fromkeys(str(_plain(table.get(key))) for table in tables))
        parts.append(f"{key} ({listed(values)})")
    return [f"The configurations differ in {len(keys)} key{'' if len(keys) == 1 else 's'}: {', '.join(parts)}."]


def _config_file(folder: Path) -> Path:
    written = folder / "config.toml"
    return written if written.exists() else folder / POINT


def without_seed(config: Config) -> dict[str, Any]:
    """Every key of a configuration that can tell runs apart, with its value."""
    return {key: value for key, value in flat(without_job(config)).items() if key != "training.seed"}


def differing(tables: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys whose value is not the same in all tables."""
    keys = list(dict.fromkeys(key for table in tables for key in table))
    return [key for key in keys if any(table.get(key) != tables[0].get(key) for table in tables)]


def _plain(value: Any) -> Any:
    return "unset" if value is None else value if isinstance(value, (bool, int, float, str)) else str(value)


def _names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder: as few of the last parts of its path as tell all of them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]
