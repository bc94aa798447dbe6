"""A training run: all its parts, built from a configuration."""

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from titan_moe import runtime
from titan_moe.build import build_balancers, build_model, build_optimizer, build_schedule, load_data, with_vocab_size
from titan_moe.config import Config, cautions, to_toml
from titan_moe.data.build import Data, check_batch_sizes
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.schedule import Schedule
from titan_moe.parallelize.mesh import build_mesh, resolve_degrees
from titan_moe.parallelize.parallelize import DTYPES, parallelize
from titan_moe.records import log_parameters
from titan_moe.runtime import Runtime, logger
from titan_moe.sinks import check_wandb
from titan_moe.step import Balancers


class Job(NamedTuple):
    """Everything a training run consists of."""

    config: Config
    runtime: Runtime
    data: Data
    model: Transformer
    optimizer: torch.optim.Optimizer
    base_lrs: list[float]  # of the optimizer's groups, before the schedule
    schedule: Schedule
    balancers: Balancers
    accumulation: int  # micro-batches of a step on each rank
    folder: Path


def build_job(config: Config, rt: Runtime) -> Job:
    """Build the run's parts; what can be refused is refused before any process group or file exists."""
    parallel, training = config.parallelism, config.training
    degrees = resolve_degrees(
        world_size=rt.world_size,
        replicate=parallel.data_parallel_replicate_degree,
        shard=parallel.data_parallel_shard_degree,
        expert=parallel.expert_parallel_degree,
        num_experts=config.moe.num_experts,
    )
    batch_size = check_batch_sizes(training.global_batch_size, training.local_batch_size, rt.world_size)
    accumulation = batch_size // (training.local_batch_size * rt.world_size)
    folder = Path(config.job.dump_folder)
    runtime.check_writable(folder)
    if config.metrics.enable_wandb:
        check_wandb()
    mixed = DTYPES[training.mixed_precision_param] != DTYPES[training.dtype]
    if rt.world_size > 1 or mixed:
        runtime.init_process_group(rt, config.comm.init_timeout_seconds)
        check_same(config)
        runtime.caution_restarts()
    if rt.device.type == "cpu":
        runtime.return_large_buffers()
    runtime.seed_everything(training.seed, deterministic=training.deterministic)

    data = load_data(config, rt)
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    with torch.device("meta"):
        model = build_model(config)
    mesh = build_mesh(device=rt.device, **degrees._asdict()) if rt.world_size > 1 or mixed else None
    parallelize(
        model,
        mesh=mesh,
        param_dtype=DTYPES[training.mixed_precision_param],
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
        checkpoint_mode=config.activation_checkpoint.mode,
        compile_blocks=config.compile.enable,
    )
    model.to(DTYPES[training.dtype]).to_empty(device=rt.device)
    model.init_weights(training.seed)
    runtime.set_timeout(config.comm.init_timeout_seconds)  # of the meshes' groups, too
    optimizer = build_optimizer(config, model)
    log_parameters(config, model, optimizer)
    for caution in cautions(config):
        logger.warning(caution)
    return Job(
        config=config,
        runtime=rt,
        data=data,
        model=model,
        optimizer=optimizer,
        base_lrs=[group["lr"] for group in optimizer.param_groups],
        schedule=build_schedule(config),
        balancers=build_balancers(config),
        accumulation=accumulation,
        folder=folder,
    )


def check_same(config: Config) -> None:
    """Raise ValueError, on every process alike, where processes were started with different configurations."""
    digests = runtime.all_gather(hashlib.sha256(to_toml(config).encode()).hexdigest())
    other = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other is None:
        return
    configs = runtime.all_gather(flatten(dataclasses.asdict(config)))
    first, second = configs[0], configs[other]
    keys = [key for key in {**first, **second} if first.get(key) != second.get(key) and key != "job.config_file"]
    values = f"{first.get(keys[0])!r} on rank 0 and {second.get(keys[0])!r} on rank {other}"
    raise ValueError(
        f"processes were started with different configurations: {keys[0]} is {values}: "
        "give every node the same file and arguments"
    )


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one, by dotted keys."""
    flat = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat
