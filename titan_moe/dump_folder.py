"""A dump folder belongs to one run: one process group at a time works in it, with the configuration that it began with.

What the run was so far is read from the checkpoint that it goes on from, or, before the first one, from the folder.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.balancer import BALANCERS
from titan_moe.build import balancer_inits, degrees_of, has_expert_bias
from titan_moe.checkpoint.folder import read_manifest
from titan_moe.checkpoint.remote import local_copy
from titan_moe.checkpoint.state import read_common
from titan_moe.checkpoint.steps import scan
from titan_moe.config import Config, read_saved, to_toml
from titan_moe.config.differences import Changes, changed_meaning, counts, is_of_another_model, texts
from titan_moe.config.sections import balancer_tables
from titan_moe.data.build import is_streamed, resolve_batch_sizes
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.job import Job
from titan_moe.model.moe import initial_state
from titan_moe.records import size_record
from titan_moe.runtime import machine, world
from titan_moe.runtime.command import logger
from titan_moe.runtime.files import write_atomic
from titan_moe.runtime.lock import RUN_LOCK, sole_process
from titan_moe.runtime.world import Runtime

METRICS, CONFIG, FACTS = "metrics.jsonl", "config.toml", "run.json"
TOKENIZER, EOT, BATCH = "data.tokenizer", "data.eot_token", "training.global_batch_size"
OF_STREAMS = ("data.dataset", "data.path")  # keys whose values the fingerprint of the data stands for
OF_FILES = (*OF_STREAMS, "data.validation_fraction", "data.validation_path")


class Before(NamedTuple):
    """What a run was when it last wrote; what is not known is None."""

    folder: Path  # of the step, or the dump folder
    config: Config
    data: str | None  # fingerprints
    tokenizer: str | None
    world_size: int | None
    step: int = 0  # of the checkpoint, if there is one


@contextlib.contextmanager
def sole_run(folder: Path, rt: Runtime) -> Iterator[None]:
    """Keep other runs out of a dump folder; ValueError, on every rank alike, where one is in it."""
    with contextlib.ExitStack() as held:

        def lock() -> None:
            held.enter_context(sole_process(folder / RUN_LOCK, f"job.dump_folder {folder}"))

        world.on_main(lock, rt)
        yield


def check_same_run(job: Job, step_folder: Path | None) -> None:
    """Raise ValueError, on every rank alike, where the run in the dump folder was another one than `job`.

    `step_folder` is the checkpoint to go on from. Without one, what counts is whether metrics were recorded.
    """
    world.on_main(lambda: _check(job, step_folder), job.runtime)


def _check(job: Job, step_folder: Path | None) -> None:
    allowed, metrics = job.config.job.allow_config_change, job.folder / METRICS
    if step_folder is None and not (metrics.exists() and metrics.stat().st_size):
        return

    try:
        before = _read_before(job, step_folder)
    except (ValueError, OSError) as error:  # no configuration there, or one with a key that has gone since
        text = f"what the run in {job.folder} was cannot be read: {error}"
        if not allowed:
            raise ValueError(f"{text} (job.allow_config_change = true goes on nevertheless)") from error
        logger.warning("%s: going on, as job.allow_config_change is set", text)
        return
    if before is None:
        return

    # Keys that change what is trained count; not those of the layout, of logging, or of how long it goes on.
    changes = changes_since(job, before)
    if step_folder is not None:
        _refuse_another_model(job, before, changes)
    counting = {key: values for key, values in changes.items() if counts(key)}
    if "optimizer" in job.config.checkpoint.exclude:  # it asks for another one
        counting = {key: values for key, values in counting.items() if not key.startswith("optimizer.")}

    text = "; ".join(texts(counting))
    if counting and not allowed:
        # other groups or states do not fit what was saved, whatever is allowed
        anew = ""
        if any(key.startswith("optimizer.") for key in counting):
            anew = ' (or checkpoint.exclude = ["optimizer"] to start the optimizer anew)'
        raise ValueError(
            f"{before.folder} is of a run with another configuration: {text}: change it back, give another "
            f"job.dump_folder, or set job.allow_config_change = true to go on with what has changed{anew}"
        )
    if counting:
        logger.warning("%s was of another configuration, job.allow_config_change is set: %s", before.folder, text)
    _caution_batch(job, before)
    _caution_length(job, before)


def _refuse_another_model(job: Job, before: Before, changes: Changes) -> None:
    """Raise ValueError where the weights would mean nothing here, whatever job.allow_config_change says."""
    # A selection bias is a part of the model, there if a balancer moves it. Only balancers of the registry and of this
    # configuration are asked: another that a saved configuration names may be code that nobody here has chosen to run.
    another = {key: values for key, values in changes.items() if is_of_another_model(key)}
    known = _balancers(before.config) <= BALANCERS.keys() | _balancers(job.config)
    if known and _balancer_tensors(before.config) != _balancer_tensors(job.config):
        another |= {key: values for key, values in changes.items() if key.startswith("balancer.")}

    # With another tokenizer the same ids are other words, though every shape may fit.
    tokens = {key: values for key, values in changes.items() if key.startswith((TOKENIZER, EOT))}
    if another:
        raise ValueError(
            f"{before.folder} is of another model: {'; '.join(texts({**another, **tokens}))}: change it back, or give "
            "another job.dump_folder (checkpoint.initial_load_path with initial_load_strict = false takes over the "
            "weights that fit)"
        )
    if tokens:
        raise ValueError(
            f"{before.folder} is of another tokenizer: {'; '.join(texts(tokens))}: the one it was trained with is "
            f"data.tokenizer = '{before.folder}'; for another one give another job.dump_folder"
        )


def _balancers(config: Config) -> set[str]:
    """The components that a configuration's balancers are."""
    return {table.component for table in balancer_tables(config)}


def _balancer_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of what a MoE layer has for its balancers: the selection bias, and what they keep."""
    width = config.moe.router_width
    state = initial_state(balancer_inits(config), width) if width else {}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    return {**shapes, "expert_bias": (width,)} if has_expert_bias(config) else shapes


def changes_since(job: Job, before: Before) -> Changes:
    """What has changed in configuration, data and tokenizer, by key; of the two latter the content counts."""
    config, old = job.config, before.config
    changes = changed_meaning(old, config)

    # -1 and the size that it stands for are the same batch.
    sizes = step_sequences(old, before.world_size), step_sequences(config, job.runtime.world_size)
    if BATCH in changes and None not in sizes and sizes[0] == sizes[1]:
        del changes[BATCH]

    # Files that have moved are the same data, and those that were edited are other data under the same names. What a
    # stream gives is its owner's to revise.
    streamed = is_streamed(config.data.dataset) and is_streamed(old.data.dataset)
    arguments = [f"data.{name}" for name in {**old.data.arguments, **config.data.arguments}]  # of a function outside
    covered, data = (*(OF_STREAMS if streamed else OF_FILES), *arguments), job.data.fingerprints["data"]
    if before.data == data:
        changes = {key: values for key, values in changes.items() if key not in covered}
    elif before.data and not streamed and not changes.keys() & set(covered):
        changes["data.path (content)"] = (before.data, data)

    # Likewise a tokenizer, whose end-of-text token may be named or not.
    tokenizer = job.data.tokenizer.fingerprint
    if before.tokenizer == tokenizer:
        changes.pop(TOKENIZER, None)
        changes.pop(EOT, None)
    elif before.tokenizer and not changes.keys() & {TOKENIZER, EOT}:
        changes[f"{TOKENIZER} (content)"] = (before.tokenizer, tokenizer)
    return changes


def step_sequences(config: Config, world_size: int | None) -> int | None:
    """The sequences of a step with that many processes; None where they are not known or can't be with this layout."""
    if world_size is None:
        return None
    training = config.training
    try:
        degree = degrees_of(config, world_size).data
        return resolve_batch_sizes(training.global_batch_size, training.local_batch_size, degree)[0]
    except ValueError:
        return None


def _caution_batch(job: Job, before: Before) -> None:
    """Warn of another batch size where the configuration leaves it to the number of processes: that is allowed."""
    sizes = step_sequences(before.config, before.world_size), step_sequences(job.config, job.runtime.world_size)
    if job.config.training.global_batch_size == -1 and None not in sizes and sizes[0] != sizes[1]:
        logger.warning(
            "a step has %s sequences from here on, it had %s: training.global_batch_size = -1 leaves them to "
            "training.local_batch_size and the number of processes",
            *reversed(sizes),
        )


def _caution_length(job: Job, before: Before) -> None:
    """Warn of another length of the run, which is allowed: the schedule is stretched, so rates jump here."""
    steps, now = before.config.training.steps, job.config.training.steps
    if steps != now and before.step < now and job.config.lr_scheduler.name != "constant":
        logger.warning(
            "training.steps was %d, is %d: learning rates are those of a %s schedule over %d steps from here on",
            *(steps, now, job.config.lr_scheduler.name, now),
        )


def _read_before(job: Job, step_folder: Path | None) -> Before | None:
    """What `step_folder`, or without one the dump folder, says of the run; None if neither does."""
    # A checkpoint's position in the data names the data and the tokenizer that it is a position in.
    if step_folder is not None:
        position = read_common(step_folder)["extra"].get("data", {})
        parts = position.get("fingerprint", "").rsplit("-", 2)  # of the data, of the tokenizer, seq_len
        data, tokenizer = parts[:2] if len(parts) == 3 else (None, None)
        if tokenizer != job.data.tokenizer.fingerprint and (step_folder / "tokenizer.json").exists():
            tokenizer = load_tokenizer(str(step_folder)).fingerprint  # as the library writes it today
        manifest = read_manifest(step_folder)
        config = read_saved(step_folder / CONFIG)
        return Before(step_folder, config, data, tokenizer, manifest["world_size"], manifest["step"])

    if not (job.folder / CONFIG).exists():
        return None
    facts = read_facts(job.folder)
    return Before(
        job.folder, read_saved(job.folder / CONFIG), facts.get("data"), facts.get("tokenizer"), facts.get("world_size")
    )


def write_run_files(job: Job, step: int) -> None:
    """Leave config.toml, which gives this run again, and run.json, which says where it ran, in the dump folder.

    run.json has the facts of this start, and a `history` of all starts: their facts, the step after which each went on,
    and what it changed, key -> [before, now].
    """
    if not job.runtime.is_main:
        return

    # What has changed since the last start, as far as that can be read: it is told, and keeps nobody from training.
    folder = job.folder
    step_folders, _ = scan(job.checkpoint_folder) if step else ({}, {})
    try:
        before = _read_before(job, local_copy(step_folders[step]) if step in step_folders else None)
        changes = {} if before is None else changes_since(job, before)
    except (ValueError, OSError) as error:
        changes = {CONFIG: (str(error), None)}

    size = size_record(job.config, job.model)
    facts = {**machine.describe_machine(job.runtime), **size, **job.data.fingerprints}
    if sets := {**job.data.validation_sets, **job.data.tasks}:
        facts["validation_sets"] = {name: one.fingerprint for name, one in sets.items()}
    if job.data.packing:
        facts["packing"] = job.data.packing
    earlier = read_facts(folder)
    if not earlier and (folder / FACTS).exists():
        logger.warning("%s is damaged: it is put aside as %s.damaged, its history is lost", folder / FACTS, FACTS)
        os.replace(folder / FACTS, folder / f"{FACTS}.damaged")

    now = {"step": step, "changes": {key: [_plain(v) for v in values] for key, values in changes.items()}, **facts}
    write_atomic(folder / CONFIG, to_toml(job.config))
    with_history = {**facts, "history": [*earlier.get("history", []), now]}
    write_atomic(folder / FACTS, json.dumps(with_history, indent=1, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_facts(folder: Path) -> dict[str, Any]:
    """What run.json in a folder says, empty where there is none or it is damaged."""
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    if not isinstance(facts, dict) or not _is_history(facts.get("history", [])):
        return {}
    # A run.json from before there was a history is its first entry.
    return facts if "history" in facts else {**facts, "history": [facts]}


def _is_history(history: Any) -> bool:
    return isinstance(history, list) and all(
        isinstance(start, dict)
        and isinstance(start.get("step", 0), int)
        and isinstance(start.get("changes", {}), dict)
        and all(isinstance(values, list) and len(values) == 2 for values in start.get("changes", {}).values())
        for start in history
    )


def changes_on_the_way(folder: Path) -> list[tuple[int, Changes]]:
    """What the run of a dump folder or checkpoint changed of what it trains, and after which step, in order.

    Where a later start went on from the same step or an earlier one, a start has left nothing in the weights: it is not
    among them.
    """
    changes_by_step: list[tuple[int, Changes]] = []
    next_step = math.inf  # that of the start that followed
    for start in reversed(read_facts(folder).get("history", [])):
        step = start.get("step", 0)
        if step < next_step:
            next_step = step
            changes = {key: tuple(values) for key, values in start.get("changes", {}).items() if counts(key)}
            changes_by_step.insert(0, (step, changes))
    return [(step, changes) for step, changes in changes_by_step if step and changes]
