"""Train a model: `torchrun -m titan_moe.train --job.config_file FILE [--section.key value ...]`."""

import contextlib
import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.build import degrees_of
from titan_moe.checkpoint import (
    Restored,
    complete_steps,
    load_checkpoint,
    load_weights,
    resolve_checkpoint,
    step_to_resume,
)
from titan_moe.checkpoint.background import Timetable
from titan_moe.checkpoint.branch import leave_branch
from titan_moe.checkpoint.export import save_weights
from titan_moe.checkpoint.folder import run_on_all_ranks, steps_after
from titan_moe.config import Config, help_text, load_config, to_toml
from titan_moe.config.layers import read_file
from titan_moe.data.build import resolve_batch_sizes, token_bytes
from titan_moe.data.loader import merge_states
from titan_moe.dump_folder import FACTS, METRICS, check_same_run, sole_run, write_run_files
from titan_moe.job import Job, build_job, compiles, start_processes
from titan_moe.metrics import StepOutput, eval_metrics
from titan_moe.optimizer.build import set_lr
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.parallelize.grad import param_norm
from titan_moe.probe import balance_tax, of_whole_sequences, rehearse, routing_choices, routing_drift
from titan_moe.records import DivergedError, Record, Skips, flush, moe_layer_names, speed_record, train_record
from titan_moe.runtime import command, world
from titan_moe.runtime.command import StopRequest, logger
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.profiling import profiler, start_timer
from titan_moe.runtime.watch import Watch, watching
from titan_moe.sinks.console import console, summary
from titan_moe.sinks.files import has_record, jsonl, last_records
from titan_moe.sinks.sink import Sink, fan_out, last_validation
from titan_moe.sinks.trackers import tensorboard, wandb
from titan_moe.step import evaluate, train_step

EXPORT = "export"  # in the dump folder


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    num_tokens: int = 0
    choices: Tensor | None = None  # of experts at the last validation, on the first batch of it
    validates: bool = False  # whether this step is followed by a validation, which `choices` are not of
    skipped: tuple[int, int] = (0, 0)  # steps so far, and how many the last of them in a row


PROGRESS = [name for name in Progress._fields if name != "step"]  # what a checkpoint keeps under these names


def main(args: list[str]) -> int:
    """Train as the configuration says; return the exit code."""
    if "-h" in args or "--help" in args:
        print(help_text())
        return 0
    config, rt = load_config(args), world.read_world()
    command.init_logging(rt)
    watch = Watch(config.comm.init_timeout_seconds)
    with watching(watch), contextlib.ExitStack() as held:
        start_processes(config, rt)
        held.enter_context(sole_run(Path(config.job.dump_folder), rt))
        job = build_job(config, rt)
        progress = resume(job)
        if is_over(job, progress):
            if rt.is_main:
                print(f"nothing to do: {progress.step} of {config.training.steps} steps in {job.folder}")
            return 0
        kept = set_later_aside(job, progress.step)
        write_run_files(job, progress.step)
        last_validated, validation = last_validation()
        sinks = open_sinks(job, kept, last_validated)
        try:
            stopped, progress = run_and_finish(job, sinks, progress, watch)
            if not stopped:
                export(job, progress)
        finally:
            sinks.close()
            gc.unfreeze()
    if stopped:
        if rt.is_main:
            restart = "the same command"
            if config.checkpoint.load_step >= 0:
                restart += " without checkpoint.load_step"
            logger.warning("stopped by %s: %s goes on from here", command.signal_name(stopped), restart)
        return 128 + stopped
    if rt.is_main:
        print(closing_words(job, validation()))
    return 0


def resume(job: Job) -> Progress:
    """Load the latest complete checkpoint of the run, if there is one, and say how far it had come.

    The configuration decides the hyperparameters, also where the checkpoint was saved with others.
    """
    config = job.config.checkpoint
    if not config.enable:
        check_same_run(job, None)
        return Progress()
    folder = job.folder / config.folder
    if config.load_step >= 0:
        found = resolve_checkpoint(folder / f"step-{config.load_step}", "checkpoint.load_step")
    else:
        found = step_to_resume(folder)
    check_same_run(job, found)
    if found is None:
        if config.initial_load_path:
            source = resolve_checkpoint(config.initial_load_path, "checkpoint.initial_load_path")
            load_weights(source, model=job.model, strict=config.initial_load_strict)
            logger.info("starting from the weights of %s", source)
        return Progress()
    # The checkpoint's optimizer brings the hyperparameters of then, too: those of now are put back.
    anew = "optimizer" in config.exclude
    configured = [{k: v for k, v in group.items() if k != "params"} for group in job.optimizer.param_groups]
    restored = load_checkpoint(found, model=job.model, optimizer=None if anew else job.optimizer, check=False)
    for group, values in zip(job.optimizer.param_groups, configured, strict=True):
        group.update(values)

    if "data" not in restored.extra:
        raise ValueError(
            f"{found} is of no run, as it has no position in the data: take its weights into another job.dump_folder "
            "with checkpoint.initial_load_path"
        )
    job.data.train.load_state_dict(restored.extra["data"])
    if anew:
        logger.warning("resuming from %s with a new optimizer, as checkpoint.exclude says", found)
    else:
        logger.info("resuming from %s", found)
    return progress_of(restored)


def progress_of(restored: Restored) -> Progress:
    """How far the run of a checkpoint had come; what an older version didn't save is as in a new run."""
    return Progress(restored.step, **{name: restored.extra[name] for name in PROGRESS if name in restored.extra})


def run_and_finish(job: Job, sinks: Sink, progress: Progress, watch: Watch) -> tuple[int, Progress]:
    """`run`; whatever ends it, a save that is under way comes to its end.

    Raises ValueError, on every rank alike, where the run has diverged, and names the checkpoint to go back to.
    """
    try:
        return run(job, sinks, progress, watch)
    except DivergedError as error:
        job.saver.finish()
        # what it advises, another rate, is a change that a dump folder takes only where it is asked for
        allowed = "job.allow_config_change = true lets it go on in this folder with what you change"
        raise ValueError(f"{error}; {last_checkpoint(job, error.step)} ({allowed})") from error
    finally:
        job.saver.finish()


def last_checkpoint(job: Job, step: int) -> str:
    """Name the last checkpoint from before `step`, where the run has diverged, and one of `step` itself if there is.

    That one was saved before its validation, whose loss was not finite.
    """
    folder = job.folder / job.config.checkpoint.folder
    saved = world.all_gather(complete_steps(folder) if job.runtime.is_main else [])[0]
    before = [other for other in saved if other < step]
    if not before:
        return "no checkpoint is from before" if step in saved else "no checkpoint was saved"
    text = (
        f"the last checkpoint{' before it' if step in saved else ''} is step {before[-1]} at {folder}/step-{before[-1]}"
    )
    return f"{text}: go back with checkpoint.load_step = {before[-1]}" if step in saved else text


def is_over(job: Job, progress: Progress) -> bool:
    """Whether nothing is left of a run: its steps, their last validation and the export are there; on every rank."""
    config, over = job.config, False
    if job.runtime.is_main and progress.step >= config.training.steps:
        _, validation = last_records(job.folder / METRICS)
        validated = validation is not None and validation["step"] >= progress.step
        over = validated or not (progress.validates and config.validation.enable)
        if has_export(config):
            over = over and exported_dtype(job.folder, progress.step) == config.checkpoint.export_dtype
    return world.all_gather(over)[0]


def set_later_aside(job: Job, step: int) -> int:
    """Set aside, on the main rank, what the dump folder has of later steps than the one that the run goes on from.

    Return the step up to which the metrics there stay: none where this run or the last one there has no checkpoints,
    as they are two runs then. A run without checkpoints leaves those that are there alone.
    """
    config, saved = job.config.checkpoint, job.folder / job.config.checkpoint.folder
    folders = [saved, job.folder / EXPORT] if config.enable else []
    same_run = config.enable and had_checkpoints(job.folder)
    run_on_all_ranks(lambda: leave_branch(job.folder / METRICS, folders, step, same_run=same_run), main_only=True)
    (there,) = run_on_all_ranks(lambda: steps_after(saved, 0), main_only=True)
    if there and not config.enable and job.runtime.is_main:
        logger.warning(
            "checkpoint.enable = false: this run begins at step 1, and %s stays in %s for the next run with "
            "checkpoints to go on from: another job.dump_folder keeps the two apart",
            *(there[-1].name, saved),
        )
    return step if same_run else 0


def had_checkpoints(folder: Path) -> bool:
    """Whether the last run in a dump folder had checkpoints; True where there was none."""
    try:
        table = read_file(str(folder / "config.toml"))
    except (OSError, ValueError):
        return True
    return table.get("checkpoint", {}).get("enable", True)


def run(job: Job, sinks: Sink, progress: Progress, watch: Watch) -> tuple[int, Progress]:
    """Train from where `progress` is to the end; the signal that stopped the run early, else 0, and how far it came."""
    start, num_tokens, choices = progress.step, progress.num_tokens, progress.choices
    config, rt, profiling = job.config, job.runtime, job.config.profiling
    stop, steps, batches = StopRequest(), config.training.steps, iter(job.data.train)
    timetable = Timetable(config.checkpoint.interval)
    expert_biases, balancer_states = job.model.expert_biases(), job.model.balancer_states()
    moe_layers = moe_layer_names(job.model)
    pending: list[Record] = []
    skips = Skips(config.training.skip_nonfinite_steps, *progress.skipped)
    if progress.validates and config.validation.enable:
        choices = validate_saved(job, sinks, progress)
    traces = job.folder / profiling.save_traces_folder
    with profiler(rt, enable=profiling.enable_profiling, folder=traces, freq=profiling.profile_freq) as profile_step:
        for step in range(start + 1, steps + 1):
            watch.step, begin, stop_timer = step, time.perf_counter(), start_timer(rt.device)
            micro_batches = [next(batches) for _ in range(job.accumulation)]
            data_seconds = time.perf_counter() - begin
            lrs = set_lr(job.optimizer, job.base_lrs, job.schedule(step))
            world.seed_step(config.training.seed, step, rt.rank)
            output = train_step(
                job.model,
                micro_batches,
                job.optimizer,
                job.balancers,
                expert_biases,
                max_norm=config.training.max_norm,
                step=step,
                progress=step / steps,
                balancer_states=balancer_states,
                measure_experts=is_due(step, config.metrics.expert_stats_freq),
                sequence_group=job.sequence_group,
            )
            seconds = stop_timer()
            step_tokens = rt.world_size * sum(labels.numel() for _, labels in micro_batches)
            num_tokens += step_tokens
            pending.append({"step": step, "num_tokens": num_tokens, "data_seconds": data_seconds})
            pending[-1] |= record_step(job, step, micro_batches, output, lrs, step_tokens, seconds)
            profile_step()

            signal, failed = stop.on_any_rank(job.saver.failed())
            last = step == steps
            validating = config.validation.enable and (step % config.validation.freq == 0 or last)
            saving = config.checkpoint.enable and (timetable.due(step, failed) or last or signal > 0)
            waits = rt.device.type != "cpu"  # reading numbers from a GPU waits for it: not at every step
            if not waits or step % config.metrics.log_freq == 0 or validating or saving or signal or last:
                flush(sinks, pending, moe_layers, skips)
            if saving:  # first: no fault of the validation, and no scheduler's patience, is to cost the step
                now = Progress(step, num_tokens, choices, validating, (skips.total, skips.in_a_row))
                save(job, sinks, now, must_succeed=last or signal > 0)
            if validating:
                choices = validate(job, sinks, step, choices)
            if signal and not last:
                return signal, Progress(step, num_tokens, choices)
            if step == start + 1:
                gc.freeze()  # what lives on is searched for garbage no more: that takes half a second, at any step
                watch.limit_seconds = config.comm.train_timeout_seconds
                world.set_timeout(config.comm.train_timeout_seconds)
    return 0, Progress(max(start, steps), num_tokens, choices)


def record_step(
    job: Job,
    step: int,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    output: StepOutput,
    lrs: dict[str, float],
    step_tokens: int,
    seconds: Callable[[], float],
) -> Record:
    """What a `train` line says of a step and its cost; its numbers may not be known yet (see `titan_moe.records`)."""
    config, rt = job.config, job.runtime
    # on a GPU the norm of all parameters is a pass over memory: it is taken where somebody may look
    logging = step % config.metrics.log_freq == 0 or step in (1, config.training.steps) or rt.device.type == "cpu"
    record = train_record(job.model, output, lrs, with_param_norm=logging)
    record |= speed_record(config, job.model, rt, step_tokens, seconds)
    if is_due(step, config.metrics.balance_tax_freq):
        record["balance_tax"] = balance_tax(job.model, *micro_batches[0])
    return record


def is_due(step: int, freq: int) -> bool:
    """Whether something that happens every `freq` steps, 0 for never, happens at `step`."""
    return freq > 0 and step % freq == 0


def probe(job: Job) -> Tensor | None:
    """The experts chosen on this rank's first batch of validation, None for a dense model. The main rank's count.

    Of whole sequences, also where ranks have parts of them, so that the drift does not depend on that.
    """
    assert job.data.validation is not None
    if not job.config.moe.num_experts:
        return None
    tokens, labels = next(iter(job.data.validation()))
    choices = routing_choices(job.model, tokens, labels)
    rank, world = job.runtime.rank, job.runtime.world_size
    positions = own_positions(job.config.training.seq_len, rank, degrees_of(job.config, world))
    return choices if positions is None else of_whole_sequences(choices, positions, len(tokens), job.sequence_group)


def validate(job: Job, sinks: Sink, step: int, before: Tensor | None) -> Tensor | None:
    """Evaluate on the held-out data and record it, and how far the probe's choices drifted from those `before`.

    Returns the choices. Raises DivergedError, after the record, where the loss is NaN or infinite.
    """
    assert job.data.validation is not None
    choices = probe(job)
    bytes_V = token_bytes(job.data.tokenizer).to(job.runtime.device)
    output = evaluate(job.model, job.data.validation(), bytes_V)
    record: Record = {"step": step, "kind": "validation", **eval_metrics(output)}
    if output.load.numel():
        record["load/experts"] = output.load  # each expert's, and a heatmap
    if before is not None and choices is not None and job.runtime.is_main:
        record["routing_drift"] = routing_drift(before, choices)
    flush(sinks, [record])
    return choices


def validate_saved(job: Job, sinks: Sink, progress: Progress) -> Tensor | None:
    """Make up for the validation that followed the save of the step that the run goes on from; returns its choices.

    They are not in the checkpoint, but come out the same. The rest is done where it was cut off: where metrics.jsonl,
    which ends at that step, has no record of it.
    """
    training, rt = job.config.training, job.runtime
    is_there = rt.is_main and has_record(job.folder / METRICS, progress.step, "validation")
    validated = world.all_gather(is_there)[0]
    if validated and progress.step >= training.steps:
        return None
    if compiles(job.config, rt.device):
        degrees = degrees_of(job.config, rt.world_size)
        _, sequences = resolve_batch_sizes(training.global_batch_size, training.local_batch_size, degrees.data)
        length = training.seq_len // degrees.per_sequence
        tokens = torch.zeros(sequences, length, dtype=torch.int64, device=rt.device)
        rehearse(job.model, tokens, tokens)
    return probe(job) if validated else validate(job, sinks, progress.step, progress.choices)


def save(job: Job, sinks: Sink, progress: Progress, *, must_succeed: bool) -> None:
    """Save a checkpoint; one that fails on the way is a loud warning, the last one an error.

    What the sinks have is on the disk first: a power cut never leaves a checkpoint without the lines of its steps.

    Raises DivergedError, and saves nothing, where a parameter is NaN or infinite.
    """
    config = job.config
    if not param_norm(job.model.parameters()).isfinite():
        raise DivergedError(
            progress.step,
            "a parameter is NaN or infinite: the run has diverged and stops, and this step is not saved: lower "
            "optimizer.lr, warm up longer",
        )
    data = merge_states(world.all_gather(job.data.train.state_dict()))
    sinks.sync()
    job.saver.save(
        job.folder / config.checkpoint.folder,
        progress.step,
        model=job.model,
        optimizer=job.optimizer,
        extra={"data": data, **{name: getattr(progress, name) for name in PROGRESS}},
        files=checkpoint_files(job),
        keep_latest_k=config.checkpoint.keep_latest_k,
        wait=must_succeed,
    )


def checkpoint_files(job: Job) -> dict[str, str]:
    """Give the text files of every checkpoint, by name; run.json tells what has changed on the way to it."""
    files = {"config.toml": to_toml(job.config), **job.data.tokenizer.files}
    if job.runtime.is_main and (job.folder / FACTS).exists():
        files[FACTS] = (job.folder / FACTS).read_text(encoding="utf-8")
    return files


def has_export(config: Config) -> bool:
    """Whether the finished run's weights are also written in another type: one that is smaller than their own."""
    return config.checkpoint.enable and config.checkpoint.export_dtype not in ("float32", config.training.dtype)


def exported_dtype(folder: Path, step: int) -> str | None:
    """The type that the weights after `step` were exported in; None where they were not."""
    try:
        table = read_file(str(folder / EXPORT / f"step-{step}" / "config.toml"))
    except (OSError, ValueError):
        return None
    return table.get("checkpoint", {}).get("export_dtype")


def export(job: Job, progress: Progress) -> None:
    """Write the weights of the finished run in checkpoint.export_dtype, where `has_export`."""
    dtype = job.config.checkpoint.export_dtype
    if not has_export(job.config):
        return
    made = save_weights(
        job.folder / EXPORT,
        progress.step,
        model=job.model,
        dtype=DTYPES[dtype],
        extra={"num_tokens": progress.num_tokens},
        files=checkpoint_files(job),
    )
    logger.info("wrote %s: the weights in %s", made, dtype)


def open_sinks(job: Job, step: int, *more: Sink) -> Sink:
    """Open the sinks that [metrics] names and `more`, on the main rank; none of them shows steps after `step`."""
    if not job.runtime.is_main:
        return fan_out()
    config, folder = job.config, job.folder
    steps, log_freq = config.training.steps, config.metrics.log_freq
    sinks = [console(steps, log_freq, is_terminal=sys.stdout.isatty()), jsonl(folder / METRICS, step)]
    if config.metrics.enable_tensorboard:
        sinks.append(tensorboard(folder / "tensorboard", step))
    if config.metrics.enable_wandb:
        sinks.append(wandb(folder, dataclasses.asdict(config)))
    return fan_out(*sinks, *more)


def closing_words(job: Job, validation: Mapping[str, Any] | None) -> str:
    """Say how the run ended, by the last validation of this process, and where things are."""
    config = job.config
    return summary(
        validation,
        checkpoint=job.folder / config.checkpoint.folder if config.checkpoint.enable else None,
        tensorboard=job.folder / "tensorboard" if config.metrics.enable_tensorboard else None,
        prompt="def " if config.data.dataset == "stdlib" else "The ",
    )


if __name__ == "__main__":
    command.run_command(main)
