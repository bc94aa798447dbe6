"""A training run: all its parts, built from a configuration."""

import dataclasses
import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist

from titan_moe import __version__
from titan_moe.balancer.common import compiled
from titan_moe.build import (
    build_balancers,
    build_optimizer,
    build_schedule,
    build_sharded,
    degrees_of,
    load_data,
    with_vocab_size,
)
from titan_moe.checkpoint.background import Saver, background_saver, foreground_saver
from titan_moe.checkpoint.steps import Place, place_of
from titan_moe.config import Config, cautions, to_toml
from titan_moe.config.differences import flatten
from titan_moe.config.layers import tomllib
from titan_moe.config.saved import outside_components
from titan_moe.config.sections import Training
from titan_moe.cuda_graph import GraphedGradients
from titan_moe.data.build import Data, resolve_batch_sizes
from titan_moe.dry_run import check_parts
from titan_moe.model.experts_backend import check_experts_backend
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.optimizer.schedule import Schedule, factors_of
from titan_moe.parallelize.float8 import check_quantize
from titan_moe.parallelize.mesh import build_mesh
from titan_moe.parallelize.parallelize import missing_compiler
from titan_moe.records import log_parameters
from titan_moe.runtime import files, machine, world
from titan_moe.runtime.command import logger
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.remote import check_url, is_url
from titan_moe.runtime.watch import connecting
from titan_moe.runtime.world import Runtime
from titan_moe.sinks.trackers import check_wandb
from titan_moe.step import Balancers, Gradients, compute_gradients


class Job(NamedTuple):
    """Everything a training run consists of."""

    config: Config
    runtime: Runtime
    data: Data
    model: Transformer
    optimizer: Optimizer
    base_lrs: list[float]  # of the optimizer's groups, before the schedule
    schedule: Schedule
    balancers: Balancers
    saver: Saver
    accumulation: int  # micro-batches of a step on each rank
    sequence_group: dist.ProcessGroup | None  # ranks that have parts of the same sequences
    gradients: Gradients  # forward and backward of a step
    folder: Path

    @property
    def checkpoint_folder(self) -> Place:
        """Where its checkpoints are: in its folder, or behind a URL."""
        return place_of(self.folder, self.config.checkpoint.folder)


def start_processes(config: Config, rt: Runtime) -> None:
    """Start the process group; what can be refused is refused before any process group or file exists."""
    # Each process by itself sees whether the layout, the device and the folder can do what is asked for.
    training = config.training
    check_gpu(rt, training)
    uses_cuda_graph(config, rt.device, rt.world_size)
    degrees = degrees_of(config, rt.world_size)
    resolve_batch_sizes(training.global_batch_size, training.local_batch_size, degrees.data)
    in_float8, param_dtype = config.quantize, DTYPES[training.mixed_precision_param]
    check_quantize(
        converters=in_float8.converters, emulate=in_float8.emulate, device=rt.device, param_dtype=param_dtype
    )
    check_experts_backend(
        config.moe.experts_backend, device=rt.device, param_dtype=param_dtype, deterministic=training.deterministic
    )
    said = check_parts(config)
    for caution in said if rt.is_main else []:
        logger.warning(caution)
    files.check_writable(Path(config.job.dump_folder))
    if is_url(config.checkpoint.folder):
        check_url(config.checkpoint.folder, "checkpoint.folder")
    if config.metrics.enable_wandb:
        check_wandb()

    # One process has nobody to talk to: without a process group it starts sooner.
    if rt.world_size > 1:
        with connecting(f"connecting {rt.world_size} processes"):
            world.init_process_group(rt, config.comm.init_timeout_seconds)
        world.caution_restarts()
    if rt.device.type == "cpu":
        machine.return_large_buffers()

    # The rest needs the others: ranks that differ would wait for each other, in different collectives, until the limit.
    check_same_on_all_ranks(config)
    check_own_gpu(rt)
    world.seed_everything(training.seed, deterministic=training.deterministic)


def build_job(config: Config, rt: Runtime) -> Job:
    """Build the run's parts, once `start_processes` has been called."""
    # How many sequences a rank reads in a step, and in how many forward passes, follows from the layout.
    training = config.training
    degrees = degrees_of(config, rt.world_size)
    step_sequences, micro_batch_size = resolve_batch_sizes(
        training.global_batch_size, training.local_batch_size, degrees.data
    )

    # The data comes first, for its tokenizer says how many embeddings the model has.
    data = load_data(config, rt, degrees)
    config = with_vocab_size(config, data.tokenizer.vocab_size)

    # The model gets its memory once it is cut into shards: no rank ever holds the whole. Weights are drawn from the
    # seed alone, so they are the same in every layout.
    with connecting("connecting the groups of the meshes"):
        mesh = build_mesh(device=rt.device, **degrees._asdict()) if rt.world_size > 1 else None
    is_compiled = compiles(config, rt.device) and can_compile(rt)
    model = build_sharded(config, mesh, compile_blocks=is_compiled)
    model.to_empty(device=rt.device)
    model.init_weights(training.seed)
    model.eot_id = data.tokenizer.eot_id
    world.set_timeout(config.comm.init_timeout_seconds)  # of the meshes' groups, too

    # Sharding replaces the parameters: an optimizer that was built before would hold those from before it.
    optimizer = build_optimizer(config, model)
    log_parameters(config, model, optimizer)
    for caution in cautions(config) if rt.is_main else []:
        logger.warning(caution)

    # On a CPU the losses' few kernels are not worth the seconds that C++ takes.
    balancers = build_balancers(config)
    if is_compiled and rt.device.type == "cuda":
        balancers = {name: (coeff, compiled(balancer)) for name, (coeff, balancer) in balancers.items()}

    # Rates are kept as they are before the schedule, which multiplies them anew at each step. A schedule by group has
    # to know the groups of this model, which a look at its first step shows.
    schedule = build_schedule(config)
    factors_of(schedule(1), [group["name"] for group in optimizer.param_groups])
    return Job(
        config=config,
        runtime=rt,
        data=data,
        model=model,
        optimizer=optimizer,
        base_lrs=[group["lr"] for group in optimizer.param_groups],
        schedule=schedule,
        balancers=balancers,
        saver=background_saver() if config.checkpoint.async_mode == "async" else foreground_saver(),
        accumulation=step_sequences // (micro_batch_size * degrees.data),
        sequence_group=None if mesh is None else mesh.sequence_group,
        gradients=GraphedGradients() if uses_cuda_graph(config, rt.device, rt.world_size) else compute_gradients,
        folder=Path(config.job.dump_folder),
    )


def compiles(config: Config, device: torch.device) -> bool:
    """Whether decoder layers are compiled on this device."""
    enable = config.compile.enable
    return device.type == "cuda" if enable == "auto" else enable


def uses_cuda_graph(config: Config, device: torch.device, world_size: int) -> bool:
    """Whether forward and backward of a step are replayed as a CUDA graph; ValueError where they can't be.

    In a graph nothing waits for the device. Grouped products in fp32 do, and an own router or balancer may: with those
    it is used only where it is asked for.
    """
    enable = config.compile.cuda_graph
    lacks = "one process" if world_size > 1 else "a GPU" if device.type != "cuda" else None
    if lacks is None and config.training.mixed_precision_param == "float32":
        lacks = "training.mixed_precision_param = 'bfloat16'"
    if enable is True and lacks is not None:
        raise ValueError(f"compile.cuda_graph = true needs {lacks}: set it to 'auto'")
    outside = outside_components(tomllib.loads(to_toml(config)))
    is_ours = all(key.startswith("optimizer") for key, _ in outside)  # which works outside of the graph
    return lacks is None and (enable is True or (enable == "auto" and is_ours))


def check_gpu(rt: Runtime, training: Training) -> None:
    """Raise ValueError where this node has more processes than GPUs, or its GPU no products in bfloat16."""
    if rt.device.type != "cuda":
        return

    # Whatever has started the processes may not say how many they are: the local rank says how many at least.
    num_gpus, num_processes = torch.cuda.device_count(), max(rt.local_world_size, rt.local_rank + 1)
    if num_processes > num_gpus:
        raise ValueError(
            f"{num_processes} processes on a node where each sees {num_gpus} GPU(s): each needs one of its own: start "
            f"torchrun with --nproc_per_node {num_gpus}, or let CUDA_VISIBLE_DEVICES name more"
        )

    # Older GPUs emulate bfloat16, or have no kernel for it: training would be slow, or end at the first product.
    key = next((key for key in ("mixed_precision_param", "dtype") if getattr(training, key) == "bfloat16"), None)
    if key is not None and torch.cuda.get_device_capability(rt.device) < (8, 0):
        raise ValueError(
            f"training.{key} = 'bfloat16' needs a GPU of compute capability 8.0 or newer (A100, H100), this is "
            f"{torch.cuda.get_device_name(rt.device)}: set it to 'float32'"
        )


def check_own_gpu(rt: Runtime) -> None:
    """Raise ValueError, on every rank, where two ranks have the same GPU: NCCL would end with pages of text."""
    if rt.device.type != "cuda" or rt.world_size == 1:
        return

    # The index of a GPU says nothing: each process counts those that CUDA_VISIBLE_DEVICES lets it see.
    uuid = str(torch.cuda.get_device_properties(rt.device).uuid)
    ranks_of_gpu: dict[str, list[int]] = {}
    for rank, gpu in enumerate(world.all_gather(uuid)):
        ranks_of_gpu.setdefault(gpu, []).append(rank)
    sharing = next((ranks for ranks in ranks_of_gpu.values() if len(ranks) > 1), None)
    if sharing is not None:
        raise ValueError(
            f"ranks {sharing} have the same GPU: each needs one of its own: start them by torchrun, or set LOCAL_RANK "
            "to another number for each process of a node"
        )


def can_compile(rt: Runtime) -> bool:
    """Whether torch.compile can make code on all ranks; a warning where not, for the run goes on without."""
    missing = world.all_gather(missing_compiler(rt.device))
    rank = next((rank for rank, what in enumerate(missing) if what), None)
    if rank is None:
        return True
    if rt.is_main:
        logger.warning("compile.enable: rank %d has %s: training goes on eager, which is slower", rank, missing[rank])
    return False


def check_same_on_all_ranks(config: Config) -> None:
    """Raise ValueError, on every rank alike, where a rank has another configuration or other versions than rank 0.

    Else they would train different models, or wait for each other in different collectives until the time limit.
    """
    # What a rank computes is decided by its configuration and by the code that reads it.
    values = {
        **_keys(config),
        "version of titan_moe": __version__,
        "version of torch": str(torch.__version__),
    }
    del values["job.config_file"]  # where the configuration came from is not part of it

    # There may be many ranks: they compare digests, and send each other the values only where these differ.
    digests = world.all_gather(hashlib.sha256(repr(values).encode()).hexdigest())
    other_rank = next((rank for rank, digest in enumerate(digests) if digest != digests[0]), None)
    if other_rank is None:
        return
    all_values = world.all_gather(values)
    first, other = all_values[0], all_values[other_rank]
    name = next(name for name in (*first, *other) if first.get(name) != other.get(name))
    raise ValueError(
        f"ranks have different configurations: {name} is {first.get(name, 'not set')} on rank 0 and "
        f"{other.get(name, 'not set')} on rank {other_rank}: give every rank the same file, arguments and versions"
    )


def _keys(config: Config) -> dict[str, str]:
    """A configuration's values by the names that users give them: optimizer.lr, optimizer.expert.lr."""
    inner = ("arguments", "groups")  # fields of the dataclasses that no key of a file has
    return {
        ".".join(part for part in key.split(".") if part not in inner): repr(value)
        for key, value in flatten(dataclasses.asdict(config)).items()
        if value != {}
    }
