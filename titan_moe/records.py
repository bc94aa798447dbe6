"""Records of a run: the flat dicts that sinks get, and what the user is told about the model at the start."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from titan_moe.config import Config
from titan_moe.metrics import (
    StepOutput,
    active_parameters,
    expert_lr_range,
    expert_metrics,
    flops_per_token,
    to_numbers,
    train_metrics,
)
from titan_moe.model.moe import MoE
from titan_moe.model.transformer import Transformer
from titan_moe.model.wrappers import plain_name
from titan_moe.optimizer.combined import describe_group
from titan_moe.parallelize.grad import param_norm
from titan_moe.runtime import machine
from titan_moe.runtime.command import logger
from titan_moe.runtime.world import Runtime
from titan_moe.sinks.sink import Sink

Record = dict[str, Any]  # its tensors may still be on the device; functions give values that are known when it is done
SKIPPED, NONFINITE, GRADIENTS = "skipped", "nonfinite", "nonfinite_gradients"  # never written


def train_record(
    model: Transformer, output: StepOutput, lrs: dict[str, float], *, with_param_norm: bool = True
) -> Record:
    """What a `train` line says of the step itself; the parameters' norm reads all of them, for the record alone.

    The load (L, E) goes along for the heatmap, and for `flush` whether the step was skipped, and because of what.
    """
    record: Record = {"kind": "train", **train_metrics(output), **expert_metrics(output)}
    if with_param_norm:
        record["param_norm"] = param_norm(model.parameters())

    # lr/expert is the scheduled rate; where loads scale it, the smallest and largest applied are beside it.
    record |= {f"lr/{name}": lr for name, lr in lrs.items()}
    if output.load_factors is not None:
        record |= expert_lr_range(lrs["expert"], output.load_factors)

    # Not for metrics.jsonl: the load becomes a heatmap, the rest says what was wrong with a step that was skipped.
    if output.load.numel():
        record["load"] = output.load
    own = {SKIPPED: output.skipped, NONFINITE: output.nonfinite, GRADIENTS: output.nonfinite_gradients}
    return record | {name: value for name, value in own.items() if value is not None}


def speed_record(
    config: Config, model: Transformer, rt: Runtime, step_tokens: int, seconds: Callable[[], float]
) -> Record:
    """What a `train` line says of the step's cost, once its `seconds` are asked for; MFU where the peak is known."""
    record: Record = {"tokens_per_second": lambda: step_tokens / seconds(), "step_seconds": seconds}
    record["peak_memory_gib"] = machine.peak_memory_gib(rt.device)

    # A share of the peak of all devices, which only GPUs that we know have.
    peak = machine.peak_flops(rt.device)
    if peak is not None:
        flops = flops_per_token(
            count_active(config, model),
            num_layers=config.model.num_layers,
            dim=config.model.dim,
            seq_len=config.training.seq_len,
        )
        record["mfu"] = lambda: step_tokens * flops / (seconds() * peak * rt.world_size)
    return record


def count_active(config: Config, model: Transformer) -> int:
    """Parameters in the matrix products of a token's forward pass: not the look-up of an untied embedding."""
    parameters = model.named_parameters()
    if not config.model.tie_embeddings:
        parameters = ((name, p) for name, p in parameters if not name.startswith("tok_embeddings"))
    return active_parameters(parameters, config.moe.num_experts, config.moe.top_k)


class DivergedError(ValueError):
    """The run has to end, because of numbers that are NaN or infinite; `step` is where they were."""

    def __init__(self, step: int, text: str) -> None:
        super().__init__(f"step {step}: {text}")
        self.step = step


@dataclass
class Skips:
    """How many steps were skipped, and how many the last of them in a row; `allowed` in a row do not end the run."""

    allowed: int = 0
    total: int = 0
    in_a_row: int = 0

    def count(self, skipped: bool) -> None:
        """Take the next step into account."""
        self.total += skipped
        self.in_a_row = self.in_a_row + 1 if skipped else 0


def flush(sinks: Sink, pending: list[Record], moe_layers: Sequence[str] = (), skips: Skips | None = None) -> None:
    """Bring the pending records to the host, all at once, and write them.

    Raises DivergedError, on every rank alike, after the record of a step that was skipped where `skips` allow no more,
    or of a validation whose loss is NaN or infinite. `moe_layers` are the names of the MoE layers.
    """
    skips = skips or Skips()
    for record in to_numbers(pending):
        skipped, nonfinite, gradients = (record.pop(name, None) for name in (SKIPPED, NONFINITE, GRADIENTS))
        if record["kind"] == "train":
            skips.count(bool(skipped))
            if skips.allowed:
                record["skipped_steps"] = skips.total
        sinks.write({key: value() if callable(value) else value for key, value in record.items()})

        if skipped:
            routers = [name for name, bad in zip(moe_layers, nonfinite, strict=True) if bad] if moe_layers else []
            judge_skip(record, routers, gradients() if gradients else [], skips)
        elif not math.isfinite(record["loss"]):
            text = f"{record['kind']} loss {record['loss']}: the run has diverged and stops"
            raise DivergedError(record["step"], f"{text}: lower optimizer.lr, warm up longer")
    pending.clear()


def judge_skip(record: Record, routers: Sequence[str], gradients: Sequence[str], skips: Skips) -> None:
    """Tell the user of a step that was skipped; raise DivergedError where it is one too many.

    `routers` are the layers whose router logits were NaN or infinite, which shows where it began in the forward pass.
    `gradients` are the parameters whose gradients were: the last of them is the first on the way back from the loss.
    """
    what = [f"NaN or infinite router logits in {', '.join(routers)}"] if routers else []
    bad = [name for name in ("loss", "total_loss", "grad_norm") if not math.isfinite(record[name])]
    what += [f"{name} {record[name]}" for name in bad]
    if gradients:
        others = f" and of {len(gradients) - 1} before it" if len(gradients) > 1 else ""
        what.append(f"NaN or infinite gradient of {plain_name(gradients[-1])}{others}")
    text = f"{', '.join(what)}: the step was skipped and changed nothing"
    if skips.in_a_row <= skips.allowed:
        logger.info("step %d: %s (%d in a row)", record["step"], text, skips.in_a_row)
        return
    if skips.allowed:
        text += f", as {skips.in_a_row} in a row were, and training.skip_nonfinite_steps allows {skips.allowed}"
    remedies = ["lower optimizer.lr" + (" (or optimizer.router.lr)" if routers else ""), "warm up longer"]
    remedies += ["turn balancer.z_loss on"] if routers else []
    remedies += ["raise training.skip_nonfinite_steps to go on after a few such steps"]
    raise DivergedError(record["step"], f"{text}; the run has diverged and stops: {', '.join(remedies)}")


def moe_layer_names(model: Transformer) -> list[str]:
    """The model's names of its MoE layers, in order, without those of wrappers."""
    names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    return list(map(plain_name, names))


def size_record(config: Config, model: Transformer) -> Record:
    """The model's parameters, and those active for a token, for run.json."""
    total = sum(p.numel() for p in model.parameters())
    return {"parameters": total, "active_parameters": count_active(config, model)}


def log_parameters(config: Config, model: Transformer, optimizer: torch.optim.Optimizer) -> None:
    """Tell the model's size, and of each parameter group its size, learning rate and decay."""
    size = size_record(config, model)
    logger.info("model: %s parameters, %s active a token", f"{size['parameters']:,}", f"{size['active_parameters']:,}")
    for group in optimizer.param_groups:
        count = sum(p.numel() for p in group["params"])
        logger.info(
            "  %-10s %15s parameters in %3d tensors, lr %g%s, weight decay %g: %s",
            group["name"],
            f"{count:,}",
            len(group["params"]),
            group["lr"],
            f" by {group['load_lr']} of the load" if "load_lr" in group else "",
            group["weight_decay"],
            describe_group(optimizer, group),
        )
