"""Where a run goes on: the checkpoint that it starts from, how far it had come there, what the folder has of later."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from titan_moe.checkpoint import (
    CheckpointError,
    complete_steps,
    load_checkpoint,
    load_weights,
    resolve_checkpoint,
    step_to_resume,
)
from titan_moe.checkpoint.branch import leave_branch
from titan_moe.checkpoint.export import EXPORT, has_export
from titan_moe.checkpoint.folder import run_on_all_ranks
from titan_moe.checkpoint.steps import Place, steps_after
from titan_moe.config import read_saved
from titan_moe.config.layers import read_file
from titan_moe.divergence import SkippedSteps
from titan_moe.dump_folder import CONFIG, METRICS, check_same_run
from titan_moe.job import Job
from titan_moe.runtime import world
from titan_moe.runtime.command import logger
from titan_moe.runtime.remote import joined
from titan_moe.sinks.files import last_records


class Progress(NamedTuple):
    """How far a run has come."""

    step: int = 0
    num_tokens: int = 0
    choices: Tensor | None = None  # of experts at the last validation, on the first batch of it
    validation_due: bool = False  # a validation follows this step, and `choices` are of the one before
    skipped: SkippedSteps = SkippedSteps()


def to_extra(progress: Progress) -> dict[str, Any]:
    """What a checkpoint keeps of `progress` beside its step, by names that checkpoints have had from the beginning."""
    return {
        "num_tokens": progress.num_tokens,
        "choices": progress.choices,
        "validates": progress.validation_due,
        "skipped": tuple(progress.skipped),  # a plain one: a checkpoint holds no classes of ours
    }


def from_extra(step: int, extra: Mapping[str, Any]) -> Progress:
    """How far the run of a checkpoint had come; what an older version did not save is as in a new run."""
    new = Progress()
    return Progress(
        step,
        num_tokens=extra.get("num_tokens", new.num_tokens),
        choices=extra.get("choices", new.choices),
        validation_due=extra.get("validates", new.validation_due),
        skipped=SkippedSteps(*extra.get("skipped", new.skipped)),
    )


def resume(job: Job) -> Progress:
    """Load the checkpoint that the run goes on from, if there is one, and say how far it had come.

    That is the latest complete one, or the one of checkpoint.load_step. The configuration decides the hyperparameters,
    also where the checkpoint was saved with others. Raises ValueError, on every rank alike, where the dump folder is of
    another run.
    """
    # A run without checkpoints begins anew each time, but not in the folder of another run.
    config = job.config.checkpoint
    if not config.enable:
        check_same_run(job, None)
        return Progress()

    # The folder's run is compared with this one before anything of it is loaded: weights that happen to fit would go on
    # in another run, and nobody would notice.
    folder = job.checkpoint_folder
    if config.load_step >= 0:
        step_folder = resolve_checkpoint(joined(folder, f"step-{config.load_step}"), "checkpoint.load_step")
    else:
        step_folder = step_to_resume(folder)
    check_same_run(job, step_folder)

    # A new run may take its first weights from another one, whose steps and data are not its own.
    if step_folder is None:
        if config.initial_load_path:
            source = resolve_checkpoint(config.initial_load_path, "checkpoint.initial_load_path")
            check_same_factors(job, source)
            try:
                load_weights(source, model=job.model, strict=config.initial_load_strict)
            except CheckpointError:
                raise
            except ValueError as error:  # of another model, or with states of balancers of another size
                mend = "checkpoint.initial_load_strict = false takes what fits, and leaves the rest as in a new run"
                raise ValueError(f"{error}: {mend}") from error
            logger.info("starting from the weights of %s", source)
        return Progress()
    return load_run(job, step_folder)


def check_same_factors(job: Job, source: Path) -> None:
    """Raise ValueError where first weights are of another parametrization: their forward multiplies otherwise.

    Only a warning where `initial_load_strict` is off. A checkpoint without a configuration is not looked at.
    """
    file = source / "config.toml"
    if not file.exists():
        return
    theirs, ours = read_saved(file).parametrization, job.config.parametrization
    if theirs == ours:
        return

    # Whoever takes what fits may mean to: between some bases the factors are the same.
    text = (
        f"{source} is of parametrization {theirs.name!r} {theirs.arguments}, this run of {ours.name!r} {ours.arguments}"
    )
    if job.config.checkpoint.initial_load_strict:
        raise ValueError(
            f"{text}: weights of one mean something else in the other: take the same [parametrization], or set "
            "checkpoint.initial_load_strict = false to take them nevertheless"
        )
    logger.warning("%s", text)


def load_run(job: Job, step_folder: Path) -> Progress:
    """Put the model, the optimizer and the data of `job` where they were at the step that is saved in `step_folder`."""
    # The saved optimizer brings the hyperparameters of then, too: those of the configuration are put back.
    new_optimizer = "optimizer" in job.config.checkpoint.exclude
    configured = [{k: v for k, v in group.items() if k != "params"} for group in job.optimizer.param_groups]
    optimizer = None if new_optimizer else job.optimizer
    restored = load_checkpoint(step_folder, model=job.model, optimizer=optimizer, check=False)
    job.optimizer.use_settings(configured)

    # Converted and edited checkpoints are models without a run.
    if "data" not in restored.extra:
        raise ValueError(
            f"{step_folder} is of no run, as it has no position in the data: take its weights into another "
            "job.dump_folder with checkpoint.initial_load_path"
        )
    job.data.train.load_state_dict(restored.extra["data"])

    # Moments that start anew may show as a jump of the loss: whoever asked for it should see it in the log.
    if new_optimizer:
        logger.warning("resuming from %s with a new optimizer, as checkpoint.exclude says", step_folder)
    else:
        logger.info("resuming from %s", step_folder)
    return from_extra(restored.step, restored.extra)


def is_over(job: Job, progress: Progress) -> bool:
    """Whether nothing is left of a run: its steps, their last validation and the export are there; on every rank."""
    # The main rank looks and tells the others: on a network's file system they could see another state of the folder.
    config, finished = job.config, False
    if job.runtime.is_main and progress.step >= config.training.steps:
        _, validation = last_records(job.folder / METRICS)
        validated = validation is not None and validation["step"] >= progress.step
        finished = validated or not (progress.validation_due and config.validation.enable)
        if has_export(config):
            finished = finished and _exported_dtype(job.folder, progress.step) == config.checkpoint.export_dtype
    return world.all_gather(finished)[0]


def set_later_aside(job: Job, step: int) -> int:
    """Set aside, on the main rank, what the dump folder has of later steps than the one that the run goes on from.

    Return the step up to which the metrics there stay: none where this run or the last one there has no checkpoints,
    as they are two runs then. A run without checkpoints leaves those that are there alone.
    """
    # Checkpoints, exports and metrics of later steps belong to a course of the run that is left now.
    config, saved = job.config.checkpoint, job.checkpoint_folder
    folders: list[Place] = [saved, job.folder / EXPORT] if config.enable else []
    same_run = config.enable and _had_checkpoints(job.folder)
    run_on_all_ranks(lambda: leave_branch(job.folder / METRICS, folders, step, same_run=same_run), main_only=True)

    # A run that does not save would leave the next one that does a folder of two runs: the user should know.
    (untouched,) = run_on_all_ranks(lambda: steps_after(saved, 0), main_only=True)
    if untouched and not config.enable and job.runtime.is_main:
        logger.warning(
            "checkpoint.enable = false: this run begins at step 1, and %s stays in %s for the next run with "
            "checkpoints to go on from: another job.dump_folder keeps the two apart",
            *(Path(untouched[-1]).name, saved),
        )
    return step if same_run else 0


def last_checkpoint(job: Job, step: int) -> str:
    """Name the last checkpoint from before `step`, where the run has diverged, and one of `step` itself if there is.

    That one was saved before its validation, whose loss was not finite.
    """
    folder = job.checkpoint_folder
    saved = world.all_gather(complete_steps(folder) if job.runtime.is_main else [])[0]
    earlier = [other for other in saved if other < step]
    if not earlier:
        return "no checkpoint is from before" if step in saved else "no checkpoint was saved"

    name = f"step {earlier[-1]} at {folder}/step-{earlier[-1]}"
    if step in saved:
        return f"the last checkpoint before it is {name}: go back with checkpoint.load_step = {earlier[-1]}"
    return f"the last checkpoint is {name}"


def _had_checkpoints(folder: Path) -> bool:
    """Whether the last run in a dump folder had checkpoints; True where there was none."""
    return _checkpoint_keys(folder).get("enable", True)


def _exported_dtype(folder: Path, step: int) -> str | None:
    """The type that the weights after `step` were exported in; None where they were not."""
    return _checkpoint_keys(folder / EXPORT / f"step-{step}").get("export_dtype")


def _checkpoint_keys(folder: Path) -> dict[str, Any]:
    """The [checkpoint] table of the config.toml in `folder`; empty where there is none that can be read."""
    try:
        return read_file(str(folder / CONFIG)).get("checkpoint", {})
    except (OSError, ValueError):
        return {}
