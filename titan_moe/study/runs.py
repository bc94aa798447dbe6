"""Read a run's folder: whether the run is new, running, finished or failed, and what it measured.

The folder is the dump folder of a training. Beside what training writes there, a study leaves `point.toml` (the
configuration that it asked for), `log.txt` (what training printed) and `exit_code` (how the last try ended).
"""

import functools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any, NamedTuple

from titan_moe.config import read_saved, to_toml
from titan_moe.config.differences import differences
from titan_moe.config.layers import read_file
from titan_moe.config.saved import outside_components, outside_datasets
from titan_moe.runtime.command import TRUST
from titan_moe.runtime.files import write_atomic
from titan_moe.runtime.lock import RUN_LOCK, is_locked
from titan_moe.sinks.files import last_records, parse_record
from titan_moe.study.grid import Run, point_text, without_job
from titan_moe.study.report.measures import CURVES, OF_SETS, set_of

POINT, LOG, EXIT_CODE, METRICS, LOCK = "point.toml", "log.txt", "exit_code", "metrics.jsonl", ".lock"
ANALYSIS = "analysis"  # folder of an analysis of the last checkpoint
TOKENS = "train/num_tokens"  # tokens seen so far, over the steps
Record = dict[str, Any]
Curve = list[tuple[int, float]]  # step, value


class Status(NamedTuple):
    """How far a run has come: new, running, finished, interrupted (goes on by itself next time) or failed."""

    state: str
    step: int = 0
    message: str = ""
    train: Record | None = None  # its last line of each kind
    validation: Record | None = None


class History(NamedTuple):
    """What a report needs of metrics.jsonl."""

    curves: dict[str, Curve]  # kind/key -> its points
    validations: list[Record]
    load: list[list[float]] | None  # (L, E) tokens per expert in the last validation


def status(folder: Path, steps: int) -> Status:
    """How far the run in `folder` has come on its way to `steps`."""
    # metrics.jsonl is believed before the exit code: a run whose last validation is there is finished, even where
    # nobody saw its process end.
    train, validation = last_records(folder / METRICS)
    step = train["step"] if train else 0
    if is_going(folder):
        return Status("running", step, "", train, validation)
    if step >= steps and validation is not None and validation["step"] == step:
        return Status("finished", step, "", train, validation)

    # Without an exit code nobody saw the end: the study itself was killed, or the machine.
    code = exit_code(folder)
    if code is None:
        started = (folder / LOG).exists() or step > 0
        message = f"stopped at step {step} of {steps}" if started else ""
        return Status("interrupted" if started else "new", step, message, train, validation)

    # A signal (negative by subprocess, above 128 by a shell) came from outside, so the run may go on; any other code is
    # the training's own, and trying again would fail again.
    if code < 0 or code >= 128:
        number = -code if code < 0 else code - 128
        message = f"ended by signal {number} at step {step} of {steps}"
        if number == 9:
            message += " (killed: was it short of memory?)"
        return Status("interrupted", step, message, train, validation)
    return Status(
        "failed", step, f"exit code {code} at step {step} of {steps}: {last_words(folder)}", train, validation
    )


def exit_code(folder: Path) -> int | None:
    """The exit code of the last try, None where it has not ended or nobody saw its end."""
    try:
        return int((folder / EXIT_CODE).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None


def last_words(folder: Path) -> str:
    """The last line of a run's log that begins with `error: `, else its last line."""
    try:
        with open(folder / LOG, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - (1 << 16)))
            lines = file.read().decode("utf-8", "replace").split("\n")
    except FileNotFoundError:
        return "it left no log"
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it said nothing"])[-1]


def history(path: Path) -> History:
    """Read metrics.jsonl; a file that has not changed since is not read again."""
    try:
        facts = path.stat()
    except FileNotFoundError:
        return History({}, [], None)
    return _history(path, facts.st_size, facts.st_mtime_ns)


@functools.lru_cache(maxsize=1024)
def _history(path: Path, size: int, changed: int) -> History:
    # By step: of a step that stands in the file twice the later line counts.
    curves: dict[str, dict[int, float]] = {}
    validations: list[Record] = []
    load = None
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            record = parse_record(line)
            if record is None:
                continue
            step, kind = record["step"], record["kind"]

            # A line holds numbers of every layer and expert: only those that a report draws are kept in memory.
            for key in _curve_keys(kind):
                if key in record:
                    curves.setdefault(f"{kind}/{key}", {})[step] = record[key]
            if kind == "validation":
                for key in filter(set_of, record):
                    curves.setdefault(key, {})[step] = record[key]
                load = _load(record) or load
                validations.append({key: value for key, value in record.items() if "/" not in key or _is_of_set(key)})
    points = {name: sorted(curve.items()) for name, curve in curves.items()}
    return History(points, validations, load)


def _is_of_set(key: str) -> bool:
    """Whether a number of a validation is one of a whole validation set, not of a layer."""
    return key.startswith("validation/") and key.count("/") == 2


def _curve_keys(kind: str) -> list[str]:
    """The keys of a record of a kind that a report draws or `measure` reads."""
    extra = ["step_seconds", "peak_memory_gib", "num_tokens"] if kind == "train" else []
    return [name.partition("/")[2] for name in CURVES if name.startswith(f"{kind}/")] + extra


def _load(record: Record) -> list[list[float]] | None:
    """The load (L, E) in a record, None where it has none."""
    rows: list[list[float]] = []
    while f"load/layer_{len(rows)}/expert_0" in record:
        row: list[float] = []
        while (key := f"load/layer_{len(rows)}/expert_{len(row)}") in record:
            row.append(record[key])
        rows.append(row)
    return rows or None


def measure(run_history: History) -> dict[str, float]:
    """The measures of a run (see `measures.MEASURES`); those that it does not have are absent.

    Validation numbers are of the last validation, `best_` ones of the best. Speed is the median over the steps after
    the first, memory the peak; `maxvio_batch` is the mean over all steps (the paper, 3.3.4). Numbers of training leave
    out the steps where they are not finite, and are NaN where none is.
    """
    # The last validation is taken as it is, also where it is NaN: that a run diverged must not be hidden. The best one
    # is of the finite ones.
    results: dict[str, float] = {}
    if run_history.validations:
        last = run_history.validations[-1]
        results |= {key: value for key, value in last.items() if key in OF_SETS or set_of(key)}
        for key, choose in (("loss", min), ("perplexity", min), ("accuracy", max)):
            values = [record[key] for record in run_history.validations if math.isfinite(record.get(key, math.nan))]
            results |= {f"best_{key}": choose(values)} if values else {}

    # Each measure over the steps has its own reduction: the last tenth for what should have settled, the median for
    # times, which a few slow steps do not move.
    of_curves: dict[str, tuple[str, Callable[[list[float]], float]]] = {
        "train_loss": ("loss", _last_tenth),
        "maxvio_batch": ("maxvio_batch", fmean),
        "maxvio_batch_last": ("maxvio_batch", _last_tenth),
        "load_entropy": ("load_entropy", _last_tenth),
        "param_norm": ("param_norm", lambda values: values[-1]),
        "step_seconds": ("step_seconds", lambda values: median(values[1:] or values)),
        "tokens_per_second": ("tokens_per_second", lambda values: median(values[1:] or values)),
        "peak_memory_gib": ("peak_memory_gib", max),
        "train_seconds": ("step_seconds", sum),
    }
    for name, (key, reduce) in of_curves.items():
        if curve := run_history.curves.get(f"train/{key}"):
            values = [value for _, value in curve if math.isfinite(value)]
            results[name] = reduce(values) if values else math.nan
    return results


def _last_tenth(values: list[float]) -> float:
    return fmean(values[-max(1, len(values) // 10) :])


def until(run_history: History, tokens: int) -> History:
    """The history of a run up to the last step by which it had seen at most `tokens` tokens; without the load."""
    last = max((step for step, seen in run_history.curves.get(TOKENS, []) if seen <= tokens), default=0)
    curves = {name: [point for point in curve if point[0] <= last] for name, curve in run_history.curves.items()}
    return History(curves, [record for record in run_history.validations if record["step"] <= last], None)


def validated_at(run_history: History) -> set[int]:
    """How many tokens a run had seen at each of its validations."""
    seen = dict(run_history.curves.get(TOKENS, []))
    return {int(seen[record["step"]]) for record in run_history.validations if record["step"] in seen}


def changes(run: Run) -> list[str]:
    """What differs between the configuration on disk and the run's, such as `training.steps: 300, now 400`.

    Empty where nothing differs, and for a run that has taken no step. ValueError where the folder holds another run.
    """
    # Without a step nothing is lost by training anew, so nobody needs to be asked.
    path = run.folder / POINT
    train, _ = last_records(run.folder / METRICS)
    if train is None:
        return []
    if not path.exists():
        raise ValueError(
            f"{run.folder} holds a run that is not of this study (it has no {POINT}): "
            "move it away, or give another study.dump_folder"
        )

    # A file that can no longer be read is a difference, too, and the error says which.
    try:
        before = read_saved(path)
    except ValueError as error:  # it has a key that no longer exists
        return [str(error)]
    return differences(without_job(before), without_job(run.config))


def prepare(run: Run) -> None:
    """Make a run's folder ready for a try: write its configuration, remove the exit code of the last try."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_atomic(run.folder / POINT, to_toml(run.config))
    (run.folder / EXIT_CODE).unlink(missing_ok=True)


def is_going(folder: Path) -> bool:
    """Whether a study, or a training that was started without one, works on the run."""
    return is_locked(folder / LOCK) or is_locked(folder / RUN_LOCK)


def read_facts(folder: Path) -> Record:
    """run.json of a run, empty where there is none or it can't be read."""
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def result(run: Run, state: str) -> Record:
    """One line of results.jsonl: what was run, how far it came, what it measured, on what data and machine."""
    # The point and the data are the configuration's; what the machine and the data were in fact, run.json says.
    run_history, data = history(run.folder / METRICS), run.config.data
    return {
        "point": dict(run.point),
        "name": point_text(run.point),
        "seed": run.seed,
        "state": state,
        "steps": run.config.training.steps,
        **reached(run_history),
        **measure(run_history),
        **analysis_scalars(run),
        "folder": str(run.folder),
        "dataset": data.dataset,
        "path": list(data.path),
        "validation_path": list(data.validation_path),
        "tokenizer": data.tokenizer,
        **recorded(read_facts(run.folder)),
    }


def analysis_scalars(run: Run) -> dict[str, float]:
    """The numbers that an analysis of the run's last step gives a study; none where there is no such analysis."""
    path = run.folder / ANALYSIS / "analysis.json"
    try:
        facts = path.stat()
    except FileNotFoundError:
        return {}
    step, scalars = _analysis(path, facts.st_size, facts.st_mtime_ns)
    return scalars if step == run.config.training.steps else {}


@functools.lru_cache(maxsize=1024)
def _analysis(path: Path, size: int, changed: int) -> tuple[int, dict[str, float]]:
    """The step that an analysis is of, and its scalars that are numbers."""
    document = json.loads(path.read_text(encoding="utf-8"))
    scalars = {name: value for name, value in document["scalars"].items() if value is not None}
    return document["checkpoint"]["step"], scalars


def lacks_analysis(run: Run) -> bool:
    """Whether a finished run has a checkpoint, but no analysis of it."""
    is_finished = status(run.folder, run.config.training.steps).state == "finished"
    return is_finished and (run.folder / run.config.checkpoint.folder).is_dir() and not analysis_scalars(run)


def analysis_words(run: Run) -> list[str]:
    """The command line of the analysis of a run that is prepared."""
    # The configuration is the user's, as the study is, and so is the code that it names: training has run it already.
    table = read_file(str(run.folder / POINT))
    outside = (*outside_components(table), *outside_datasets(table))
    modules = sorted({name.partition(":")[0] for _, name in outside})
    words = ["--checkpoint", str(run.folder / run.config.checkpoint.folder), "--out", str(run.folder / ANALYSIS)]
    return [*words, TRUST, *modules] if modules else words


def reached(run_history: History) -> Record:
    """Steps and tokens that a run has come to, tokens that it is validated on, steps without a finite loss."""
    losses, tokens = run_history.curves.get("train/loss", []), run_history.curves.get(TOKENS, [])
    last = run_history.validations[-1] if run_history.validations else {}
    return {
        "step": losses[-1][0] if losses else 0,
        "num_tokens": int(tokens[-1][1]) if tokens else None,
        "validation_tokens": last.get("num_tokens"),
        "nonfinite_steps": sum(not math.isfinite(value) for _, value in losses),
        **{key: value for key, value in last.items() if _is_of_set(key) and key.endswith("/num_tokens")},
    }


def recorded(facts: Record) -> Record:
    """What run.json says of the model, the data and the machine, None for what it does not say.

    `changed_keys` are those of the configuration that a start of the run changed, by its history.
    """
    keys = ("git_commit", "device", "world_size", "threads", "torch", "parameters", "active_parameters")
    starts = facts.get("history")
    changes = [start.get("changes") for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []
    changed = {str(key) for one in changes if isinstance(one, dict) for key in one}
    return {
        **{key: facts.get(key) for key in keys},
        "data_fingerprint": facts.get("data"),
        "tokenizer_fingerprint": facts.get("tokenizer"),
        "changed_keys": sorted(changed),
        **({"validation_sets": facts["validation_sets"]} if "validation_sets" in facts else {}),
    }


def write_results(path: Path, results: list[Record]) -> None:
    """Write results.jsonl; a number that is not finite becomes null."""
    lines = []
    for record in results:
        plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
        lines.append(json.dumps(plain, allow_nan=False) + "\n")
    write_atomic(path, "".join(lines))
