"""Run a study, or compare runs: `python -m titan_moe.study STUDY.toml`, `... --compare DIR ...`."""

import argparse
import datetime
import os
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from titan_moe.runtime import command, files, world
from titan_moe.runtime.command import Parser, StopRequest
from titan_moe.runtime.files import write_atomic
from titan_moe.study.grid import Run, point_text, runs_of
from titan_moe.study.progress import counts, progress, statuses
from titan_moe.study.reuse import reuse
from titan_moe.study.runner import Pool, analyze_command, check_pool, run_all, train_command
from titan_moe.study.runs import changes, is_going, lacks_analysis, last_words
from titan_moe.study.spec import Study, load_study

if TYPE_CHECKING:
    from titan_moe.study.report.page import Written

MARKER = "study.txt"  # marks a folder as a study's, and holds the study's name
PACKAGES = ("rich", "scipy", "jinja2", "matplotlib")


def build_parser() -> Parser:
    """The parser of the command line without `--section.key value`, which `split_overrides` takes out."""
    # Options say how to run a study. What it runs is in its file, so that the file repeats it.
    about = (
        "Run the points of a study as trainings of their own, and write results.jsonl, report.html and figures; or "
        "compare any runs. Finished runs are skipped, interrupted ones resumed."
    )
    parser = Parser("python -m titan_moe.study", about)
    parser.epilog = "--section.key value, after the study file: changes the configuration of every run, as in training."
    parser.add_argument("study", nargs="?", metavar="STUDY.toml", help="the study file")
    parser.add_argument("--jobs", type=int, default=1, help="trainings at a time (1)")
    parser.add_argument("--jobs_per_gpu", type=int, default=1, help="how many of them share a GPU (1)")
    parser.add_argument("--resume", action="store_true", help="try runs that failed again, too")
    parser.add_argument(
        "--force", action="store_true", help="where the study's base has changed, put old runs aside and train anew"
    )
    parser.add_argument(
        "--reuse", nargs="+", default=[], metavar="DIR", help="copy the finished runs shared with these studies"
    )
    parser.add_argument("--launcher", choices=["local", "slurm"], default="local", help="where runs train (local)")
    parser.add_argument("--dump_folder", default="", help="folder of the study or of the comparison")
    parser.add_argument("--report", action="store_true", help="train nothing, write the report of what is there")
    parser.add_argument("--compare", nargs="+", metavar="DIR", help="report on these runs (or studies), going or over")
    parser.add_argument(
        "--watch",
        nargs="?",
        type=float,
        const=30.0,
        metavar="SECONDS",
        help="write the report again every so many seconds (30) until all runs are over",
    )
    return parser


def main(args: list[str]) -> int:
    """Do what the command line says; exit code 1 where runs failed or are left, 128 + a signal that stopped it."""
    # All that can be wrong on the command line is said before the first run starts, missing packages included: a study
    # may train for days before it draws.
    words, overrides = split_overrides(args)
    options = build_parser().parse_args(words)
    if (options.study is None) == (options.compare is None):
        raise ValueError("give a study file, or --compare DIR ... (--help lists the arguments)")
    for name, number in (("jobs", options.jobs), ("jobs_per_gpu", options.jobs_per_gpu)):
        if number < 1:
            raise ValueError(f"--{name} ({number}) must be at least 1")
    if options.watch is not None and not options.watch > 0:
        raise ValueError(f"--watch ({options.watch}) must be above 0 seconds")
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise ValueError(f"a study needs {', '.join(missing)}: pip install 'titan_moe[study]'")
    command.init_logging(world.read_world())

    # matplotlib and jinja2 are slow to import, so the report's modules are imported where they are used.
    if options.compare:
        if overrides:
            raise ValueError(f"{overrides[0]}: a comparison trains nothing, so it has no configuration to change")
        from titan_moe.study.report.compare import compare

        return compare(options.compare, Path(options.dump_folder or "outputs/compare"), options.watch)
    study = load_study(options.study, overrides, options.dump_folder)
    return run_study(study, runs_of(study), options)


def split_overrides(args: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the arguments into the study's own, and `--section.key value ...` for the configurations of its runs.

    An override takes all words up to the next one that begins with `--`.
    """
    words: list[str] = []
    overrides: list[str] = []
    target = words
    for arg in args:
        if arg.startswith("--"):
            target = overrides if "." in arg.partition("=")[0] else words
        target.append(arg)
    return words, overrides


def run_study(study: Study, runs: Sequence[Run], options: argparse.Namespace) -> int:
    """Train the runs of a study that are left, here or by SLURM, and write the report; the exit code."""
    # Nothing is trained into a folder of something else, nor beside runs that another configuration has made.
    claim_folder(study)
    move_runs_of_another_base(study, runs, force=options.force)
    if options.reuse:
        print(f"{reuse(runs, options.reuse)} runs are taken from {', '.join(options.reuse)}")

    # A failed run would most likely fail again, so it is tried again only on demand.
    run_statuses = statuses(runs)
    wanted = {"new", "interrupted", "failed"} if options.resume else {"new", "interrupted"}
    todo = [run for run, run_status in zip(runs, run_statuses, strict=True) if run_status.state in wanted]
    todo += unanalyzed(study, runs)
    print(f"{study.name}: {len(runs)} runs in {study.folder}: {counts(run_statuses)}", flush=True)
    stopped = 0
    if options.report:
        todo = []

    # SLURM trains after this process has ended. To see the runs go, `--watch` looks at their files.
    if options.launcher == "slurm":
        from titan_moe.study.slurm import submit

        submit(study, todo, options.jobs)
    elif todo:
        stopped = train(study, runs, todo, options)
    if options.watch and not stopped and (options.report or options.launcher == "slurm"):
        stopped = watch(study, runs, options.watch)
    return closing(study, runs, stopped)


def train(study: Study, runs: Sequence[Run], todo: Sequence[Run], options: argparse.Namespace) -> int:
    """Train `todo` on this machine, with the table of all runs; the number of the signal that stopped it, else 0."""
    pool = Pool(options.jobs, study.section.nproc, options.jobs_per_gpu)
    check_pool(pool)
    written = time.monotonic()

    # With `--watch` the report is written between two looks at the trainings, which go on meanwhile.
    with progress(study.section.title or study.name, runs, options.jobs) as (tick, ended):

        def on_tick(active: object) -> None:
            nonlocal written
            tick(active)
            if options.watch and time.monotonic() - written >= options.watch:
                write_report(study, runs, refresh=options.watch)
                written = time.monotonic()

        return run_all(
            todo,
            pool=pool,
            command=train_command(study.section.nproc),
            keep_checkpoints=study.section.keep_checkpoints,
            then=analyze_command(study.section.nproc) if study.section.analyze else None,
            on_tick=on_tick,
            on_end=ended,
        )


def unanalyzed(study: Study, runs: Sequence[Run]) -> list[Run]:
    """The finished runs whose analysis the study wants and lacks."""
    return [run for run in runs if lacks_analysis(run)] if study.section.analyze else []


def watch(study: Study, runs: Sequence[Run], seconds: float) -> int:
    """Write the report every `seconds` until every run is over or a signal comes; the signal's number, else 0."""
    # New and interrupted runs may yet be started, by SLURM or by another process; finished and failed ones are over.
    stop = StopRequest()
    while not stop.signal:
        run_statuses = statuses(runs)
        write_report(study, runs, refresh=seconds)
        print(f"{datetime.datetime.now():%H:%M:%S}  {counts(run_statuses)}", flush=True)
        if all(run_status.state in ("finished", "failed") for run_status in run_statuses):
            return 0

        # Short naps, so that a signal is answered at once.
        limit = time.monotonic() + seconds
        while time.monotonic() < limit and not stop.signal:
            time.sleep(min(0.2, seconds))
    return stop.signal


def closing(study: Study, runs: Sequence[Run], stopped: int) -> int:
    """Write the report, print what came out and what did not finish, and give the exit code."""
    report = write_report(study, runs)
    run_statuses = statuses(runs)
    print(f"\n{counts(run_statuses)}\nresults      {study.folder / 'results.jsonl'}\nreport       {report.path}")
    for sentence in report.findings:
        print(sentence)
    for run, run_status in zip(runs, run_statuses, strict=True):
        if run_status.state in ("failed", "interrupted"):
            print(f"{run_status.state:<12} {point_text(run.point)}, seed {run.seed}: {run_status.message}")
            print(f"{'':12} {run.folder}")
    lacking = unanalyzed(study, runs)
    for run in lacking:
        print(f"{'unanalyzed':<12} {point_text(run.point)}, seed {run.seed}: {last_words(run.folder)}")
        print(f"{'':12} {run.folder}")

    # The exit code says whether the result is whole, so that a script can run the command again until it is.
    if stopped:
        print(f"stopped by {command.signal_name(stopped)}: the same command goes on from here")
        return 128 + stopped
    if any(run_status.state == "failed" for run_status in run_statuses):
        print("the same command with --resume tries failed runs again")
    return int(bool(lacking) or any(run_status.state in ("failed", "interrupted") for run_status in run_statuses))


def write_report(study: Study, runs: Sequence[Run], refresh: float | None = None) -> "Written":
    """Write results.jsonl, report.html and the figures of a study."""
    from titan_moe.study.report.page import study_report

    return study_report(study, runs, refresh)


def claim_folder(study: Study) -> None:
    """Mark the study's folder as its own; ValueError where it cannot be written or holds something else."""
    # Two studies in one folder would each overwrite the other's report.
    folder, marker = study.folder, study.folder / MARKER
    files.check_writable(folder)
    if marker.exists():
        name = marker.read_text(encoding="utf-8").strip()
        if name != study.name:
            raise ValueError(f"{folder} is the folder of the study {name!r}: give another by --dump_folder")
        return

    # A folder with other things is somebody's: nothing is written into it.
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty and not the folder of a study: give another by --dump_folder")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(marker, study.name + "\n")


def move_runs_of_another_base(study: Study, runs: Sequence[Run], *, force: bool) -> None:
    """Find runs that were trained with another base; with `force` move them to `replaced/`, else raise ValueError."""
    # A point names its axes alone: with another base it is another run under the same name, and the table would mix.
    stale = [(run, changed_keys) for run in runs if (changed_keys := changes(run))]
    if not stale:
        return
    run, changed_keys = stale[0]
    if not force:
        more = f" and {len(changed_keys) - 3} more" if len(changed_keys) > 3 else ""
        raise ValueError(
            f"{study.path}: {len(stale)} runs in {study.folder} were trained with another base, {run.folder} with "
            f"{'; '.join(changed_keys[:3])}{more}: change it back, give another --dump_folder, or put them aside and "
            "train anew with --force"
        )
    if going := [run for run, _ in stale if is_going(run.folder)]:
        raise ValueError(f"{going[0].folder} is still training with another base: stop it first")

    # They cost hours of training, so they are moved, never removed; each move has a folder of its own.
    aside = study.folder / "replaced" / f"{datetime.datetime.now():%Y%m%d-%H%M%S}"
    for run, _ in stale:
        target = aside / run.folder.relative_to(study.folder / "runs")
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(run.folder, target)
    print(f"{len(stale)} runs of another base are now in {aside}")
