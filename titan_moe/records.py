"""Records of a run: the flat dicts that sinks get, and what the user is told about the model at the start."""

from collections.abc import Callable
from typing import Any

import torch

from titan_moe.config import Config
from titan_moe.metrics import (
    StepOutput,
    active_parameters,
    expert_lr_range,
    expert_metrics,
    flops_per_token,
    train_metrics,
)
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.optimizer import describe_group
from titan_moe.parallelize.grad import param_norm
from titan_moe.runtime import machine
from titan_moe.runtime.command import logger
from titan_moe.runtime.world import Runtime
from titan_moe.sinks.sink import Sink

Record = dict[str, Any]  # its tensors may still be on the device; functions give values that are known when it is done
SKIPPED, NONFINITE, GRADIENTS = "skipped", "nonfinite", "nonfinite_gradients"
UNWRITTEN = (SKIPPED, NONFINITE, GRADIENTS)  # they are for `titan_moe.divergence` alone


def train_record(
    model: Transformer, output: StepOutput, lrs: dict[str, float], *, with_param_norm: bool = True
) -> Record:
    """What a `train` line says of the step itself; the parameters' norm reads all of them, for the record alone.

    The load (L, E) goes along for the heatmap, and whether the step was skipped, and because of what, for
    `titan_moe.divergence`.
    """
    record: Record = {"kind": "train", **train_metrics(output), **expert_metrics(output)}
    if with_param_norm:
        record["param_norm"] = param_norm(model.parameters())

    # lr/expert is the scheduled rate; where loads scale it, the smallest and largest applied are beside it.
    record |= {f"lr/{name}": lr for name, lr in lrs.items()}
    record |= expert_lr_range(lrs, output.group_factors)

    # Not for metrics.jsonl: the load becomes a heatmap, the rest says what was wrong with a step that was skipped.
    if output.load.numel():
        record["load"] = output.load
    judged = {SKIPPED: output.skipped, NONFINITE: output.nonfinite, GRADIENTS: output.nonfinite_gradients}
    return record | {name: value for name, value in judged.items() if value is not None}


def speed_record(
    config: Config, model: Transformer, rt: Runtime, step_tokens: int, seconds: Callable[[], float]
) -> Record:
    """What a `train` line says of the step's cost, once its `seconds` are asked for; MFU where the peak is known."""
    record: Record = {"tokens_per_second": lambda: step_tokens / seconds(), "step_seconds": seconds}
    record["peak_memory_gib"] = machine.peak_memory_gib(rt.device)

    # A share of the peak of all devices, which only GPUs that we know have.
    peak = machine.peak_flops(rt.device)
    if peak is not None:
        flops = flops_of_token(config, count_active(config, model))
        record["mfu"] = lambda: step_tokens * flops / (seconds() * peak * rt.world_size)
    return record


def flops_of_token(config: Config, active_parameters: int) -> float:
    """Training FLOPs of a token, by which MFU goes, of a model with so many active parameters.

    With data.document_mask those of attention's products depend on the data, and are left out: a lower bound.
    """
    return flops_per_token(
        active_parameters,
        num_layers=config.model.num_layers,
        attention_dim=config.model.num_heads * config.model.channels,
        seq_len=0 if config.data.document_mask else config.training.seq_len,
    )


def count_active(config: Config, model: Transformer) -> int:
    """Parameters in the matrix products of a token's forward pass: not the look-up of an untied embedding."""
    parameters = model.named_parameters()
    if not config.model.tie_embeddings:
        parameters = ((name, p) for name, p in parameters if not name.startswith("tok_embeddings"))
    return active_parameters(parameters, config.moe.router_width, config.moe.top_k)


def write_record(sinks: Sink, record: Record) -> None:
    """Write a record whose numbers are on the host; what it holds as functions, such as times, is asked for now."""
    written = {name: value for name, value in record.items() if name not in UNWRITTEN}
    sinks.write({name: value() if callable(value) else value for name, value in written.items()})


def size_record(config: Config, model: Transformer) -> Record:
    """The model's parameters, and those active for a token, for run.json."""
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "active_parameters": count_active(config, model)}


def log_parameters(config: Config, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Tell the model's size, and of each parameter group its size, learning rate and decay."""
    # From the optimizer's groups and not from the configuration, where a rate may stand in one of several tables.
    size = size_record(config, model)
    logger.info("model: %s parameters, %s active a token", f"{size['parameters']:,}", f"{size['active_parameters']:,}")

    # A group with another rate or decay than was meant shows here, before hours are spent on it.
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        match = config.optimizer.groups.get(group["name"], {}).get("match", [])  # of one's own groups
        logger.info(
            "  %-10s %15s parameters in %3d tensors, lr %g%s, weight decay %s: %s%s",
            group["name"],
            f"{count:,}",
            len(group["params"]),
            group["lr"],
            f" by {group['load_lr']} of the load" if "load_lr" in group else "",
            f"{group['weight_decay']:g}" if "weight_decay" in group else "none",  # one from outside may know none
            describe_group(optimizer, group),
            f" [{', '.join(match)}]" if match else "",
        )
