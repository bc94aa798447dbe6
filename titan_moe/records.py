"""Records of a run: the flat dicts that sinks get, and what the user is told about the model at the start."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from titan_moe import runtime
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
from titan_moe.optimizer.combined import describe_group
from titan_moe.parallelize.grad import param_norm
from titan_moe.runtime import Runtime, logger
from titan_moe.sinks import Sink

Record = dict[str, Any]  # its tensors may still be on the device; functions give values that are known when it is done
NONFINITE = "nonfinite"  # never written


def train_record(
    model: Transformer, output: StepOutput, lrs: dict[str, float], *, with_param_norm: bool = True
) -> Record:
    """What a `train` line says of the step itself; the parameters' norm reads all of them, for the record alone.

    The load (L, E) goes along for the heatmap, and for `flush` which layers' routers left the finite numbers.
    """
    record: Record = {
        "kind": "train",
        **train_metrics(output),
        **expert_metrics(output),
    }
    if with_param_norm:
        record["param_norm"] = param_norm(model.parameters())
    record |= {f"lr/{name}": lr for name, lr in lrs.items()}
    if output.load_factors is not None:  # lr/expert is the scheduled rate, these are the smallest and largest applied
        record |= expert_lr_range(lrs["expert"], output.load_factors)
    if output.load.numel():
        record["load"] = output.load
    if output.nonfinite is not None:
        record[NONFINITE] = output.nonfinite
    return record


def speed_record(
    config: Config, model: Transformer, rt: Runtime, step_tokens: int, seconds: Callable[[], float]
) -> Record:
    """What a `train` line says of the step's cost, once its `seconds` are asked for; MFU where the peak is known."""
    record: Record = {"tokens_per_second": lambda: step_tokens / seconds(), "step_seconds": seconds}
    record["peak_memory_gib"] = runtime.peak_memory_gib(rt.device)
    peak = runtime.peak_flops(rt.device)
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


def flush(sinks: Sink, pending: list[Record], moe_layers: Sequence[str] = ()) -> None:
    """Bring the pending records to the host, all at once, and write them.

    Raises ValueError, on every rank alike, after the record of a step that has diverged. As what is pending is written
    before a save, no such step is saved. `moe_layers` are the names of the MoE layers.
    """
    for record in to_numbers(pending):
        nonfinite = record.pop(NONFINITE, None)
        sinks.write({key: value() if callable(value) else value for key, value in record.items()})
        names = [] if nonfinite is None else [name for name, bad in zip(moe_layers, nonfinite, strict=True) if bad]
        refuse_diverged(record, names)
    pending.clear()


def refuse_diverged(record: Record, bad_routers: Sequence[str]) -> None:
    """Raise ValueError where a loss or the gradients were NaN or infinite: the weights may be from there on.

    `bad_routers` are the layers whose router logits were so: there choices mean nothing, and they say where it began.
    """
    bad = [name for name in ("loss", "total_loss", "grad_norm") if not math.isfinite(record.get(name, 0.0))]
    if not bad and not bad_routers:
        return
    prefix = "validation " if record.get("kind") == "validation" else ""
    what = ", ".join(f"{prefix}{name} {record[name]}" for name in bad)
    if bad_routers:
        what = f"NaN or infinite router logits in {', '.join(bad_routers)}"
    router = (" (or optimizer.router.lr)", ", or turn balancer.z_loss on") if bad_routers else ("", "")
    raise ValueError(
        f"step {record['step']}: {what}: the run has diverged and stops. Lower optimizer.lr{router[0]}, warm up "
        f"longer{router[1]}; the last checkpoint is from before"
    )


def moe_layer_names(model: Transformer) -> list[str]:
    """The model's names of its MoE layers, in order, without those of wrappers."""
    names = [name for name, module in model.named_modules() if isinstance(module, MoE)]
    return [name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "") for name in names]


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
