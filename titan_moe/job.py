"""A training run: all its parts, built from a configuration."""

from pathlib import Path
from typing import NamedTuple

import torch

from titan_moe import runtime
from titan_moe.build import build_balancers, build_model, build_optimizer, build_schedule, load_data, with_vocab_size
from titan_moe.checkpoint.background import Saver, background_saver, foreground_saver
from titan_moe.config import Config, cautions
from titan_moe.data.build import Data, check_batch_sizes
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.schedule import Schedule
from titan_moe.parallelize.mesh import build_mesh, resolve_shard_degree
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
    saver: Saver
    accumulation: int  # micro-batches of a step on each rank
    folder: Path


def build_job(config: Config, rt: Runtime) -> Job:
    """Build the run's parts; what can be refused is refused before any process group or file exists."""
    parallel, training = config.parallelism, config.training
    replicate = parallel.data_parallel_replicate_degree
    shard = resolve_shard_degree(
        world_size=rt.world_size, replicate=replicate, shard=parallel.data_parallel_shard_degree
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
    if rt.device.type == "cpu":
        runtime.return_large_buffers()
    runtime.seed_everything(training.seed, deterministic=training.deterministic)

    data = load_data(config, rt)
    config = with_vocab_size(config, data.tokenizer.vocab_size)
    with torch.device("meta"):
        model = build_model(config)
    mesh = build_mesh(device=rt.device, shard=shard) if rt.world_size > 1 or mixed else None
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
        saver=background_saver() if config.checkpoint.async_mode == "async" else foreground_saver(),
        accumulation=accumulation,
        folder=folder,
    )
