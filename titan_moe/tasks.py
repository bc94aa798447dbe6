"""Evaluation on tasks: how likely a model finds each choice, and the harness's metrics of that.

Shapes: N items (a question's choices), B sequences, S positions.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from titan_moe.data.loader import at_positions
from titan_moe.data.tasks import WIDTH_STEP, Task, task_batches
from titan_moe.model.cross_entropy import IGNORE
from titan_moe.parallelize.context_parallel import own_positions
from titan_moe.parallelize.mesh import Degrees
from titan_moe.parallelize.parallelize import reshard
from titan_moe.runtime.world import all_reduce_sum

ONE_PROCESS = Degrees()


def evaluate_task(model: nn.Module, task: Task, **place: Any) -> dict[str, float]:
    """The `task_metrics` of a model, the same on every rank; `place` are the other arguments of `score_items`."""
    return task_metrics(task, *score_items(model, task, **place))


def score_items(
    model: nn.Module,
    task: Task,
    *,
    seq_len: int,
    local_batch_size: int,
    pad_id: int,
    device: torch.device,
    rank: int = 0,
    degrees: Degrees = ONE_PROCESS,
) -> tuple[list[float], list[bool]]:
    """The log-likelihood of each item's scored tokens in nats, and whether greedy decoding gives them.

    Every rank must call it, and gets all of them. `local_batch_size` as in `task_batches`. `pad_id`, the token that
    ends documents, comes between an item and what fills up its row.
    """
    # Attention over sequences that ranks have parts of is made for training's length; any other takes any width.
    batches = task_batches(
        task,
        seq_len=seq_len,
        local_batch_size=local_batch_size,
        pad_id=pad_id,
        width_step=seq_len if degrees.context > 1 else WIDTH_STEP * degrees.tensor,
        dp_rank=rank // degrees.per_sequence,
        dp_degree=degrees.data,
    )
    sums_2N = torch.zeros(2, len(task.items), dtype=torch.float64, device=device)
    for tokens, labels, items in batches:
        positions = own_positions(tokens.shape[1], rank, degrees)
        own_tokens, own_labels = (at_positions(pair, positions).to(device) for pair in (tokens, labels))
        add_scores(model, own_tokens, own_labels, items.to(device), sums_2N)
    reshard(model)

    # Each token is on one rank, so that the sum over all ranks is that over tokens, whatever the layout.
    loglikelihoods, num_wrong = all_reduce_sum(sums_2N).tolist()
    return loglikelihoods, [wrong == 0 for wrong in num_wrong]


@torch.no_grad()
def add_scores(model: nn.Module, tokens: Tensor, labels: Tensor, items: Tensor, sums: Tensor) -> None:
    """Add to `sums` (2, N), of the `items` (B,) that a batch (B, S) has, in place.

    Those are the log-likelihood of their labels, and how many of these are not the most probable token.
    """
    scores, _ = model(tokens, labels, want="token_scores")
    is_wrong_BS = (labels != IGNORE) & ~scores.is_correct.view_as(labels)
    sums[0].index_add_(0, items, -scores.ce.double().view_as(labels).sum(1))
    sums[1].index_add_(0, items, is_wrong_BS.sum(1).double())


def task_metrics(task: Task, loglikelihoods: Sequence[float], is_greedy: Sequence[bool]) -> dict[str, float]:
    """Metrics by name from each item's log-likelihood and whether greedy decoding gives it.

    `acc`: of multiple choice how often the right choice has the largest log-likelihood, and `acc_norm` the largest by
    character; of a cloze how often greedy decoding gives the target. `perplexity` of a cloze: exp of minus the mean
    log-likelihood of a target. Each `_stderr` is the sample's standard deviation / sqrt(number of questions), of the
    perplexity times it (the delta method). Source: lm-evaluation-harness 0.4.13, `ConfigurableTask.process_results`,
    `mean_stderr`; where it draws samples for the perplexity's stderr.
    """
    if task.kind != "multiple_choice":
        mean, stderr = _mean(loglikelihoods)
        perplexity = math.exp(min(-mean, 700.0))
        metrics = _with_stderr("acc", [float(hit) for hit in is_greedy])
        metrics |= {"perplexity": perplexity, "perplexity_stderr": perplexity * stderr}
    else:
        hits, norm_hits, end = [], [], 0
        for question in task.questions:
            begin, end = end, end + len(question.choices)
            values = np.array(loglikelihoods[begin:end])
            lengths = np.array([len(choice) for choice in question.choices])
            hits.append(float(values.argmax() == question.answer))
            norm_hits.append(float((values / lengths).argmax() == question.answer))
        metrics = _with_stderr("acc", hits) | _with_stderr("acc_norm", norm_hits)
    return {**metrics, "num_questions": len(task.questions)}


def _with_stderr(name: str, values: Sequence[float]) -> dict[str, float]:
    mean, stderr = _mean(values)
    return {name: mean, f"{name}_stderr": stderr}


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, NaN of one value."""
    mean = math.fsum(values) / len(values)
    squares = math.fsum((value - mean) ** 2 for value in values)
    return mean, math.sqrt(squares / (len(values) - 1) / len(values)) if len(values) > 1 else math.nan
