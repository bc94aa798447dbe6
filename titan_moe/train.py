"""Train a model: `torchrun -m titan_moe.train --job.config_file FILE [--section.key value ...]`."""

import dataclasses
import gc
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.checkpoint.export import EXPORT, has_export, save_weights
from titan_moe.config import Config, help_text, load_config, to_toml
from titan_moe.config.layers import tomllib
from titan_moe.config.saved import outside_components
from titan_moe.data.loader import merge_states
from titan_moe.diagnostics import balance_tax
from titan_moe.divergence import DivergedError, moe_layer_names, stop_if_diverged, stop_if_weights_diverged
from titan_moe.dump_folder import FACTS, METRICS, sole_run, write_run_files
from titan_moe.job import Job, build_job, start_processes
from titan_moe.metrics import StepOutput, to_numbers
from titan_moe.optimizer.build import set_lr
from titan_moe.optimizer.expert_stats import GradientMoments
from titan_moe.records import Record, speed_record, train_record, write_record
from titan_moe.resume import Progress, is_over, last_checkpoint, resume, set_later_aside, to_extra
from titan_moe.runtime import command, world
from titan_moe.runtime.command import StopRequest, logger
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.profiling import profiler, start_timer
from titan_moe.runtime.watch import Watch, watching
from titan_moe.sinks.console import console, summary
from titan_moe.sinks.files import jsonl
from titan_moe.sinks.sink import Sink, fan_out, last_validation
from titan_moe.sinks.trackers import tensorboard, wandb
from titan_moe.step import States, train_step
from titan_moe.validate import make_up_validation, validate


def main(args: list[str]) -> int:
    """Train as the configuration says; return the exit code."""
    # Help first: it is wanted most where the other arguments are wrong.
    if "-h" in args or "--help" in args:
        print(help_text())
        return 0

    # The watch comes before any process group: connecting can hang as well.
    config, rt = load_config(args), world.read_world()
    command.init_logging(rt)
    watch = Watch(config.comm.init_timeout_seconds)
    with watching(watch):
        # What can be refused is refused here, before the dump folder is touched; from then on it is this run's alone.
        start_processes(config, rt)
        with sole_run(Path(config.job.dump_folder), rt):
            job = build_job(config, rt)
            progress = resume(job)
            if is_over(job, progress):
                if rt.is_main:
                    print(f"nothing to do: {progress.step} of {config.training.steps} steps in {job.folder}")
                return 0
            stopped, validation = train(job, progress, watch)

    # Said when all is written and the folder is free: whoever reads it may start the next command at once.
    if stopped:
        if rt.is_main:
            restart = "the same command"
            if config.checkpoint.load_step >= 0:
                restart += " without checkpoint.load_step"
            logger.warning("stopped by %s: %s goes on from here", command.signal_name(stopped), restart)
        return 128 + stopped
    if rt.is_main:
        print(closing_words(job, validation))
    return 0


def train(job: Job, progress: Progress, watch: Watch) -> tuple[int, Mapping[str, Any] | None]:
    """Train from where `progress` is to the end, and export the weights where the configuration says so.

    Return the signal that stopped the run early, else 0, and the record of the last validation, if there was one.
    """
    # The folder first becomes that of a run which has come this far and no further.
    last_step_kept = set_later_aside(job, progress.step)
    write_run_files(job, progress.step)
    validation_sink, get_validation = last_validation()
    sinks = open_sinks(job, last_step_kept, validation_sink)

    # The export is of a finished run alone. However the run ends, sinks write what they have, and the collector of
    # garbage, which `settle` told to leave things alone, looks at all of them again.
    try:
        stopped, progress = run_and_finish(job, sinks, progress, watch)
        if not stopped:
            export(job, progress)
    finally:
        sinks.close()
        gc.unfreeze()
    return stopped, get_validation()


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


def run(job: Job, sinks: Sink, progress: Progress, watch: Watch) -> tuple[int, Progress]:
    """Train from where `progress` is to the end; the signal that stopped the run early, else 0, and how far it came."""
    # What the loop reads or changes. Modules are looked up once: a walk through the model costs time at every step.
    config, rt, training, first_step = job.config, job.runtime, job.config.training, progress.step + 1
    batches, expert_biases, moe_layers = iter(job.data.train), job.model.expert_biases(), moe_layer_names(job.model)
    balancer_states, allowed = job.model.balancer_states(), training.skip_nonfinite_steps
    gradient_moments: GradientMoments | None = {} if config.metrics.expert_stats_freq else None
    stop_request, signal, timetable, retry = StopRequest(), 0, timetable_of(config, rt.device), Retry()
    pending: list[Record] = []  # of steps whose numbers are still on the device

    # A run that was cut off between a save and the validation of its step makes up for that first.
    if progress.validation_due and config.validation.enable:
        progress = make_up_validation(job, sinks, progress)

    # One round is one optimizer step and what is due after it, on all ranks alike.
    with trace(job) as trace_step:
        for step in range(first_step, training.steps + 1):
            # Waiting for data counts as time of the step, and is told apart from the rest of it.
            watch.step, stop_timer = step, start_timer(rt.device)
            micro_batches, data_seconds = read_micro_batches(batches, job.accumulation)

            # Rates and random numbers follow from the step's number alone, so that a resumed run has the same.
            lrs = set_lr(job.optimizer, job.base_lrs, job.schedule(step))
            world.seed_step(training.seed, step, rt.rank)
            output = take_step(job, step, micro_batches, expert_biases, balancer_states, gradient_moments)
            seconds = stop_timer()

            # Its numbers stay on the device for now: the host runs ahead of a GPU, and does not wait for it here.
            step_tokens = rt.world_size * sum(labels.numel() for _, labels in micro_batches)
            progress = progress._replace(step=step, num_tokens=progress.num_tokens + step_tokens)
            record: Record = {"step": step, "num_tokens": progress.num_tokens, "data_seconds": data_seconds}
            record |= record_step(job, step, output, lrs, step_tokens, seconds)
            if is_due(step, config.metrics.balance_tax_freq):
                record["balance_tax"] = balance_tax(job.model, *micro_batches[0])
            pending.append(record)
            trace_step()

            # A signal may reach one rank alone, or a save fail on one: all ranks then do the same about it.
            signal, save_failed = stop_request.on_any_rank(job.saver.failed())
            now = due(step, timetable, retry, signal=signal > 0, save_failed=save_failed)
            retry, progress = now.retry, progress._replace(validation_due=now.validate)

            # Numbers are judged once they are written, so that metrics.jsonl shows what ended the run.
            if now.flush:
                for line in to_numbers(pending):
                    progress = progress._replace(skipped=progress.skipped.count(line))
                    if allowed:
                        line["skipped_steps"] = progress.skipped.total
                    write_record(sinks, line)
                    stop_if_diverged(line, progress.skipped, allowed=allowed, moe_layers=moe_layers)
                pending.clear()

            # The save comes first: no fault of the validation, and no scheduler's patience, is to cost the step.
            if now.save:
                save(job, sinks, progress, must_succeed=now.stop)
            if now.validate:
                progress = validate(job, sinks, progress)
            if now.stop:
                break
            if step == first_step:
                settle(watch, config)
    return signal if progress.step < training.steps else 0, progress


class Timetable(NamedTuple):
    """Which steps are followed by what."""

    last_step: int
    flush_freq: int
    validation_freq: int  # 0: never
    save_freq: int  # 0: never


class Retry(NamedTuple):
    """When to save again after saves have failed: 1, 2, 4 ... steps after the last attempt."""

    step: int = 0  # the latest step that this was planned for
    wait: int = 1  # steps from there to the next one, should it fail as well


class Due(NamedTuple):
    """What is to be done after a step, on every rank."""

    flush: bool  # bring the numbers of the steps so far to the host, and write them
    validate: bool
    save: bool
    stop: bool  # the run ends here: this is its last step, or a signal came
    retry: Retry  # for the next step


def due(step: int, timetable: Timetable, retry: Retry, *, signal: bool, save_failed: bool) -> Due:
    """Say what is due after `step`: a function of its arguments alone, which are alike on all ranks.

    `signal`: some process was asked to stop. `save_failed`: the latest save is known to have failed, on any rank.
    """
    # A failure in the background is known some steps after the attempt: the wait counts from then. A regular save is an
    # attempt in any case, after which the waits begin anew.
    regular = is_due(step, timetable.save_freq)
    if regular:
        retry = Retry()
    elif save_failed and retry.step < step:
        retry = Retry(step + retry.wait - 1, 2 * retry.wait)

    # Whatever the run leaves behind has its last step; what is saved or validated has its numbers written before.
    stop = signal or step == timetable.last_step
    save = timetable.save_freq > 0 and (regular or step == retry.step or stop)
    validate = timetable.validation_freq > 0 and (
        is_due(step, timetable.validation_freq) or step == timetable.last_step
    )
    flush = is_due(step, timetable.flush_freq) or validate or save or stop
    return Due(flush, validate, save, stop, retry)


def timetable_of(config: Config, device: torch.device) -> Timetable:
    """The timetable of a run on `device`."""
    return Timetable(
        last_step=config.training.steps,
        # reading numbers from a GPU waits for it: not at every step
        flush_freq=1 if device.type == "cpu" else config.metrics.log_freq,
        validation_freq=config.validation.freq if config.validation.enable else 0,
        save_freq=config.checkpoint.interval if config.checkpoint.enable else 0,
    )


def is_due(step: int, freq: int) -> bool:
    """Whether something that happens every `freq` steps, 0 for never, happens at `step`."""
    return freq > 0 and step % freq == 0


def read_micro_batches(
    batches: Iterator[tuple[Tensor, Tensor]], count: int
) -> tuple[list[tuple[Tensor, Tensor]], float]:
    """The next `count` micro-batches of this rank, tokens and labels (B, S), and the seconds that training waited."""
    begin = time.perf_counter()
    micro_batches = [next(batches) for _ in range(count)]
    return micro_batches, time.perf_counter() - begin


def take_step(
    job: Job,
    step: int,
    micro_batches: Sequence[tuple[Tensor, Tensor]],
    expert_biases: Sequence[Tensor],
    balancer_states: States,
    gradient_moments: GradientMoments | None,
) -> StepOutput:
    """`train_step` with the parts of the run."""
    # A step sees plain values and no configuration, so that a test, or somebody's own loop, can call it with others.
    training = job.config.training
    return train_step(
        job.model,
        micro_batches,
        job.optimizer,
        job.balancers,
        expert_biases,
        max_norm=training.max_norm,
        qk_clip=training.qk_clip,
        step=step,
        progress=step / training.steps,
        balancer_states=balancer_states,
        measure_experts=is_due(step, job.config.metrics.expert_stats_freq),
        gradient_moments=gradient_moments,
        sequence_group=job.sequence_group,
        gradients=job.gradients,
    )


def record_step(
    job: Job, step: int, output: StepOutput, lrs: dict[str, float], step_tokens: int, seconds: Callable[[], float]
) -> Record:
    """What a `train` line says of a step and its cost; its numbers may not be known yet (see `titan_moe.records`)."""
    config, rt = job.config, job.runtime

    # On a GPU the norm of all parameters is a pass over memory: it is taken where somebody may look.
    is_shown = is_due(step, config.metrics.log_freq) or step in (1, config.training.steps)
    with_param_norm = is_shown or rt.device.type == "cpu"
    record = train_record(job.model, output, lrs, with_param_norm=with_param_norm)
    record |= {f"tokens/{name}": tokens for name, tokens in job.data.train.tokens_by_source(config.training.seq_len)}
    return record | speed_record(config, job.model, rt, step_tokens, seconds)


def settle(watch: Watch, config: Config) -> None:
    """After the first step, which connects and compiles: what comes now is quick, and what lives now lives on."""
    gc.freeze()  # what lives on is searched for garbage no more: that takes half a second, at any step
    watch.limit_seconds = config.comm.train_timeout_seconds
    world.set_timeout(config.comm.train_timeout_seconds)


def trace(job: Job) -> AbstractContextManager[Callable[[], None]]:
    """`profiler` as the configuration says."""
    profiling = job.config.profiling
    folder = job.folder / profiling.save_traces_folder
    return profiler(job.runtime, enable=profiling.enable_profiling, folder=folder, freq=profiling.profile_freq)


def save(job: Job, sinks: Sink, progress: Progress, *, must_succeed: bool) -> None:
    """Save a checkpoint; one that fails on the way is a loud warning, the last one an error.

    What the sinks have is on the disk first: a power cut never leaves a checkpoint without the lines of its steps.

    Raises DivergedError, and saves nothing, where a parameter is NaN or infinite.
    """
    # Weights that are not finite would only replace others that are.
    stop_if_weights_diverged(job.model, progress.step)

    # Ranks read different data, and a position of all of them holds for any number of ranks that goes on from here.
    config = job.config
    data_position = merge_states(world.all_gather(job.data.train.state_dict()))
    sinks.sync()
    job.saver.save(
        job.checkpoint_folder,
        progress.step,
        model=job.model,
        optimizer=job.optimizer,
        extra={"data": data_position, **to_extra(progress)},
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


def export(job: Job, progress: Progress) -> None:
    """Write the weights of the finished run in checkpoint.export_dtype, where `has_export`."""
    # Weights in training's own type are in the last checkpoint already: only a smaller type is worth a file.
    dtype = job.config.checkpoint.export_dtype
    if not has_export(job.config):
        return
    with job.optimizer.evaluating():
        step_folder = save_weights(
            job.folder / EXPORT,
            progress.step,
            model=job.model,
            dtype=DTYPES[dtype],
            extra={"num_tokens": progress.num_tokens},
            files=checkpoint_files(job),
        )
    logger.info("wrote %s: the weights in %s", step_folder, dtype)


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
    components = outside_components(tomllib.loads(to_toml(config)))
    return summary(
        validation,
        modules=sorted({name.partition(":")[0] for _, name in components}),
        checkpoint=job.checkpoint_folder if config.checkpoint.enable else None,
        tensorboard=job.folder / "tensorboard" if config.metrics.enable_tensorboard else None,
        prompt="def " if config.data.dataset == "stdlib" else "The ",
    )


if __name__ == "__main__":
    command.run_command(main)
