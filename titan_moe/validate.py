"""Validation in the course of training: the loss on held-out data, and how far the routing has drifted."""

from typing import Any

import torch
from torch import Tensor

from titan_moe.build import degrees_of
from titan_moe.data.build import resolve_batch_sizes, token_bytes
from titan_moe.diagnostics import of_whole_sequences, rehearse, routing_choices, routing_drift
from titan_moe.divergence import SkippedSteps, stop_if_diverged
from titan_moe.dump_folder import METRICS
from titan_moe.job import Job, compiles
from titan_moe.metrics import eval_metrics, to_numbers
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.records import Record, write_record
from titan_moe.resume import Progress
from titan_moe.runtime import world
from titan_moe.sinks.files import has_record
from titan_moe.sinks.sink import Sink, under_set
from titan_moe.step import evaluate
from titan_moe.tasks import evaluate_task


def validate(job: Job, sinks: Sink, progress: Progress) -> Progress:
    """Evaluate on the held-out data and record it for the step of `progress`; the progress with this validation in it.

    The drift that is recorded is between the choices of experts at the validation before and those of now.
    Raises DivergedError, after the record, where the loss is NaN or infinite.
    """
    # All passes run on every rank, also where the main one alone uses what comes out: they have collectives.
    assert job.data.validation is not None
    bytes_V = token_bytes(job.data.tokenizer).to(job.runtime.device)
    config, rt = job.config, job.runtime
    place: dict[str, Any] = {
        "seq_len": config.training.seq_len,
        "local_batch_size": config.validation.local_batch_size,
        "pad_id": job.data.tokenizer.eot_id,
        "device": rt.device,
        "rank": rt.rank,
        "degrees": degrees_of(config, rt.world_size),
    }
    with job.optimizer.evaluating():
        choices = probe(job)
        output = evaluate(job.model, job.data.validation(), bytes_V)
        sets = {name: evaluate(job.model, one.batches(), bytes_V) for name, one in job.data.validation_sets.items()}
        due = due_tasks(job, progress.step)
        tasks = {name: evaluate_task(job.model, job.data.tasks[name], **place) for name in due}

    # Choices of the validation before may be missing: this is the first one, or an older checkpoint did not have them.
    record: Record = {"step": progress.step, "kind": "validation", **eval_metrics(output)}
    if output.load.numel():
        record["load/experts"] = output.load  # each expert's, and a heatmap
    for name, output_of_set in sets.items():
        record |= under_set(name, eval_metrics(output_of_set))
    for name, metrics in tasks.items():
        record |= under_set(name, metrics)
    if progress.choices is not None and choices is not None and job.runtime.is_main:
        record["routing_drift"] = routing_drift(progress.choices, choices)

    # It is judged once it is written, so that metrics.jsonl shows what ended the run.
    (record,) = to_numbers([record])
    write_record(sinks, record)
    stop_if_diverged(record, SkippedSteps())
    return progress._replace(choices=choices, validation_due=False)


def due_tasks(job: Job, step: int) -> list[str]:
    """The tasks that are a part of the validation after `step`: at the run's last step all of them."""
    tasks, is_last = job.config.validation.tasks, step == job.config.training.steps
    return [name for name in job.data.tasks if is_last or not tasks[name].freq or step % tasks[name].freq == 0]


def probe(job: Job) -> Tensor | None:
    """The experts chosen on this rank's first batch of validation, None for a dense model. The main rank's count.

    They are of whole sequences, also where each rank has a part of them, so that the drift does not depend on that.
    """
    assert job.data.validation is not None
    if not job.config.moe.num_experts:
        return None
    tokens, labels = next(iter(job.data.validation()))
    choices = routing_choices(job.model, tokens, labels)
    rank, world = job.runtime.rank, job.runtime.world_size
    positions = own_positions(job.config.training.seq_len, rank, degrees_of(job.config, world))
    return choices if positions is None else of_whole_sequences(choices, positions, len(tokens), job.sequence_group)


def make_up_validation(job: Job, sinks: Sink, progress: Progress) -> Progress:
    """Validate at the step that the run goes on from, where its checkpoint was saved before its validation.

    The choices of that validation can't be in the checkpoint, but come out the same. The rest of it is done only if the
    run was cut off before it: if metrics.jsonl, which ends at that step, has no record of it.
    """
    # The main rank's file decides for all, as only that rank writes it.
    training, rt = job.config.training, job.runtime
    is_recorded = rt.is_main and has_record(job.folder / METRICS, progress.step, "validation")
    is_recorded = world.all_gather(is_recorded)[0]
    if is_recorded and progress.step >= training.steps:
        return progress  # no validation follows that these choices would be compared with

    # Compiled code is to be made for the shape of training first, as it was in a run that nothing stopped.
    if compiles(job.config, rt.device):
        degrees = degrees_of(job.config, rt.world_size)
        _, sequences = resolve_batch_sizes(training.global_batch_size, training.local_batch_size, degrees.data)
        length = training.seq_len // degrees.per_sequence
        tokens = torch.zeros(sequences, length, dtype=torch.int64, device=rt.device)
        rehearse(job.model, tokens, tokens)

    # What is recorded already is not written twice; the next drift is measured from these choices in any case.
    if is_recorded:
        with job.optimizer.evaluating():
            return progress._replace(choices=probe(job), validation_due=False)
    return validate(job, sinks, progress)
