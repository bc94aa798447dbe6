"""What a run would take: `python -m titan_moe.estimate --job.config_file FILE --world_size N [...]`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from titan_moe import runtime
from titan_moe.build import build_model, with_vocab_size
from titan_moe.config import Config, load_config
from titan_moe.config.sections import ActivationCheckpoint, Training
from titan_moe.data.build import resolve_batch_sizes
from titan_moe.job import degrees_of
from titan_moe.parallelize.mesh import Degrees
from titan_moe.records import count_active
from titan_moe.simulate import Simulation, fake_world, simulate

# GiB of device memory, from NVIDIA's data sheets as nvidia-smi shows them.
GPUS = {"A100-40GB": 39.6, "A100": 79.3, "H100": 79.6, "H200": 140.4, "B200": 179.1}
# What allocations may fill: the rest is left to CUDA, NCCL's buffers and fragmentation. A rule of thumb, not measured.
USABLE = 0.9
GIB = 2**30
MAXVIOS = (0.0, 0.5, 1.0, 2.0)
KNOWN_VOCABULARIES = {"gpt2": 50257, "openai-community/gpt2": 50257, "bytes": 257}
USAGE = f"""usage: python -m titan_moe.estimate --job.config_file FILE --world_size N [--gpu NAME] [...]

Memory, communication and operations of a rank and step, without the hardware: the sharded model and
one step are run on fake tensors in a fake world of N ranks.

  --world_size N     number of processes, one per GPU (also --world-size)
  --gpu NAME         {", ".join(GPUS)} (H100)
  --section.key      as for training
"""


class Case(NamedTuple):
    """A configuration in a world."""

    config: Config
    degrees: Degrees
    accumulation: int  # micro-batches of a step
    note: str = ""


def main(args: list[str]) -> int:
    """Print the estimate; exit code 0 whatever the verdict."""
    if "-h" in args or "--help" in args:
        print(USAGE, end="")
        return 0
    world, args = take(args, ("--world_size", "--world-size"))
    gpu, args = take(args, ("--gpu",))
    gpu = gpu or "H100"
    if not world.isdecimal() or int(world) < 1:
        raise ValueError(f"--world_size ({world or 'not given'}) must be a number of processes, at least 1")
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: unknown; it is one of {', '.join(GPUS)}")
    config = load_config(args)
    config = with_vocab_size(config, vocabulary(config))
    case = in_world(config, int(world))
    with fake_world(int(world)):
        result = run(case)
        fullest = run(case, excess=1.0) if case.degrees.expert > 1 else result
        lines = [*describe_run(case), *describe_memory(case, result, fullest), *describe_work(case, result)]
        print("\n".join(lines))
        print("\n".join(verdict(case, result, gpu)))
    return 0


def take(args: list[str], names: tuple[str, ...]) -> tuple[str, list[str]]:
    """Take `--name VALUE` or `--name=VALUE` out of the arguments; an empty value where it is not there."""
    for i, arg in enumerate(args):
        name, equals, value = arg.partition("=")
        if name in names and equals:
            return value, args[:i] + args[i + 1 :]
        if name in names and i + 1 < len(args):
            return args[i + 1], args[:i] + args[i + 2 :]
    return "", args


def vocabulary(config: Config) -> int:
    """The tokenizer's number of tokens, from its name or file; nothing is downloaded or trained."""
    name = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    if name in KNOWN_VOCABULARIES:
        return KNOWN_VOCABULARIES[name]
    if name.startswith("bpe:") and name[4:].isdecimal():
        return int(name[4:])
    path = Path(name) / "tokenizer.json" if Path(name).is_dir() else Path(name)
    if path.is_file():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        added = [token["id"] for token in tokenizer.get("added_tokens", [])]
        return max([*tokenizer["model"]["vocab"].values(), *added]) + 1
    raise ValueError(
        f"data.tokenizer ({name}) says nothing on the size of the vocabulary without downloading it: "
        "give --model.vocab_size"
    )


def in_world(config: Config, world_size: int) -> Case:
    """Fit a configuration to a number of processes as training does; ValueError for degrees that do not fit."""
    training, degrees = config.training, degrees_of(config, world_size)
    if training.local_batch_size == -1:
        _, own = resolve_batch_sizes(training.global_batch_size, -1, degrees.data)
        config = dataclasses.replace(config, training=dataclasses.replace(training, local_batch_size=own))
        training = config.training
    together, wanted = training.local_batch_size * degrees.data, training.global_batch_size
    if wanted == -1 or wanted % together == 0:
        return Case(config, degrees, max(1, wanted // together))
    note = (
        f"training.global_batch_size ({wanted}) is no multiple of {training.local_batch_size} x {degrees.data} "
        f"sequences: training would refuse it, this is for {together}"
    )
    return Case(config, degrees, 1, note)


def run(case: Case, excess: float = 0.0) -> Simulation:
    """Simulate a case; ValueError for a component that reads tensors on the host, which has none here."""
    try:
        return simulate(case.config, case.degrees, accumulates=case.accumulation > 1, excess=excess)
    except DataDependentOutputException as error:
        config = case.config
        raise ValueError(
            f"a step with router.name = {config.router.name!r} and optimizer.name = {config.optimizer.name!r} reads a "
            f"tensor's value on the host ({error.func}), which no estimate can know: estimate with other ones"
        ) from error


def describe_run(case: Case) -> Iterator[str]:
    """What is estimated."""
    config, degrees = case.config, case.degrees
    with torch.device("meta"):
        model = build_model(config)
    total = sum(p.numel() for p in model.parameters())
    yield f"model: {total:,} parameters, {count_active(config, model):,} active a token"
    axes = f"replicas x shards {degrees.replicate} x {degrees.shard}, expert parallelism {degrees.expert}"
    own = "of a rank"
    if degrees.per_sequence > 1:
        axes += f", context x tensor parallelism {degrees.context} x {degrees.tensor}"
        own = f"of {degrees.per_sequence} ranks together"
    yield (
        f"world: {degrees.replicate * degrees.per_replica} ranks, {axes}; {own} {case.accumulation} x "
        f"{config.training.local_batch_size} sequences of {config.training.seq_len} tokens; "
        f"checkpointing {config.activation_checkpoint.mode}"
    )
    if case.note:
        yield f"note: {case.note}"


def describe_memory(case: Case, result: Simulation, fullest: Simulation) -> Iterator[str]:
    """The parts of the peak, and what uneven load adds to it."""
    parts = {
        "parameters": result.parameters,
        "gradients": result.gradients,
        "optimizer state": result.optimizer_state,
        "gathered parameters": result.gathered,
        "activations": result.activations,
    }
    yield "memory of a rank at its peak, GiB"
    for name, size in parts.items():
        yield f"  {name:22}{size / GIB:10.3f}"
    yield f"  {'all':22}{result.peak / GIB:10.3f}"
    if not case.config.moe.num_experts:
        return
    if case.degrees.expert == 1:
        yield f"  dispatch: {result.expert_rows:,} rows a MoE layer whatever the MaxVio: ranks keep their tokens"
        return
    yield "  by MaxVio, where all experts of one rank are as full as the fullest:"
    for value in MAXVIOS:
        rows = result.expert_rows + value * (fullest.expert_rows - result.expert_rows)
        yield f"    {value:4.1f}  {rows:10,.0f} rows a MoE layer {at_maxvio(result, fullest, value) / GIB:10.3f}"


def at_maxvio(result: Simulation, fullest: Simulation, value: float) -> float:
    """Peak bytes at a MaxVio: buffers grow with their rows, so from 0 and 1 follows the rest."""
    return result.peak + value * (fullest.peak - result.peak)


def describe_work(case: Case, result: Simulation) -> Iterator[str]:
    """Communication and operations."""
    yield "sent by a rank in a micro-batch, GiB, by collective and axis (ranks)"
    for (name, axis), (calls, size) in sorted(result.traffic.items()):
        yield f"  {name:20}{axis:22}{calls:6} calls{size / GIB:12.4f}"
    tokens = case.config.training.local_batch_size * case.config.training.seq_len // case.degrees.per_sequence
    yield (
        f"operations of a rank in a micro-batch: {result.flops / 1e12:.3f} TFLOP, "
        f"{result.flops / tokens / 1e9:.3f} GFLOP a token, with what checkpointing makes again"
    )


def verdict(case: Case, result: Simulation, gpu: str) -> Iterator[str]:
    """Whether it fits the GPU, and what would make it fit."""
    usable = USABLE * GPUS[gpu]
    limit = f"{usable:.1f} of {GPUS[gpu]:.1f} GiB"
    if result.peak / GIB <= usable:
        yield f"verdict: fits an {gpu}: {result.peak / GIB:.1f} GiB, {limit} are counted on"
        return
    yield f"verdict: does not fit an {gpu}: {result.peak / GIB:.1f} GiB are more than {limit}"
    for change, other in knobs(case):
        peak = run(other).peak / GIB
        if peak <= usable:
            yield f"it would with {change}: {peak:.1f} GiB"
            return
        yield f"  not with {change}: {peak:.1f} GiB"
    ranks = case.degrees.replicate * case.degrees.per_replica
    yield f"none of these makes it fit: take more than {ranks} ranks, or a smaller model"


def knobs(case: Case) -> Iterator[tuple[str, Case]]:
    """Changes that save memory, one after the other and on top of each other, the cheapest first."""
    config, words = case.config, ""
    for mode in ("selective", "full"):
        if config.activation_checkpoint.mode in ("none", "selective") and config.activation_checkpoint.mode != mode:
            config = dataclasses.replace(config, activation_checkpoint=ActivationCheckpoint(mode=mode))
            words = f"activation_checkpoint.mode = {mode}"
            yield words, case._replace(config=config)
    size = config.training.local_batch_size
    if size > 1:
        training: Training = dataclasses.replace(config.training, local_batch_size=1)
        config = dataclasses.replace(config, training=training)
        words = ", ".join(filter(None, [words, "training.local_batch_size = 1"]))
        yield words, case._replace(config=config, accumulation=case.accumulation * size)
    if case.degrees.replicate > 1:
        degrees = case.degrees._replace(replicate=1, shard=case.degrees.data)
        if case.degrees.expert == 1 or config.moe.num_experts % degrees.per_replica == 0:
            words = ", ".join(filter(None, [words, "parallelism.data_parallel_replicate_degree = 1"]))
            yield words, case._replace(config=config, degrees=degrees, accumulation=case.accumulation * size)


if __name__ == "__main__":
    runtime.run_command(main)
