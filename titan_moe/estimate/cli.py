"""What a run would take: `python -m titan_moe.estimate --job.config_file FILE --world_size N [...]`."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from titan_moe.build import build_model, degrees_of, with_vocab_size
from titan_moe.config import Config, load_config
from titan_moe.config.sections import ActivationCheckpoint, Training
from titan_moe.data.build import resolve_batch_sizes
from titan_moe.estimate.simulate import Simulation, fake_world, simulate
from titan_moe.estimate.step_time import COMPARED_ON, MEASURED_ON, StepTime, step_time
from titan_moe.job import compiles, uses_cuda_graph
from titan_moe.parallelize.mesh import Degrees
from titan_moe.records import count_active, flops_of_token
from titan_moe.runtime.machine import GPUS

# What allocations may fill: the rest is left to CUDA, NCCL's buffers and fragmentation. A rule of thumb, not measured.
USABLE = 0.9
GIB = 2**30
MAXVIOS = (0.0, 0.5, 1.0, 2.0)
KNOWN_VOCABULARIES = {"gpt2": 50257, "openai-community/gpt2": 50257, "bytes": 257}
USAGE = f"""usage: python -m titan_moe.estimate --job.config_file FILE --world_size N [--gpu NAME] [...]

Memory, communication, operations and time of a rank and step, without the hardware: the sharded model
and one step are run on fake tensors in a fake world of N ranks.

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

    @property
    def ranks(self) -> int:
        """Processes of the world."""
        return self.degrees.replicate * self.degrees.per_replica


def main(args: list[str]) -> int:
    """Print the estimate; exit code 0 whatever the verdict."""
    if "-h" in args or "--help" in args:
        print(USAGE, end="")
        return 0

    # These two are the command's own; all other arguments are the configuration's, as in training.
    world, args = take_option(args, ("--world_size", "--world-size"))
    gpu, args = take_option(args, ("--gpu",))
    gpu = gpu or "H100"
    if not world.isdecimal() or int(world) < 1:
        raise ValueError(f"--world_size ({world or 'not given'}) must be a number of processes, at least 1")
    if gpu not in GPUS:
        raise ValueError(f"--gpu {gpu}: unknown; it is one of {', '.join(GPUS)}")

    config = load_config(args)
    config = with_vocab_size(config, vocabulary(config))
    case = in_world(config, int(world))

    # What does not depend on the verdict is printed first: the search for what fits takes further simulations.
    with fake_world(int(world)):
        result = run(case)
        few = case._replace(accumulation=min(2, case.accumulation))  # enough for the peak
        fullest = run(few, excess=1.0) if case.degrees.expert > 1 else result
        lines = [*describe_run(case), *describe_memory(case, result, fullest), *describe_work(case, result)]
        print("\n".join([*lines, *describe_time(case, result, gpu)]))
        print("\n".join([*verdict(case, result, gpu), *describe_batch(case, result, gpu)]))
    return 0


def take_option(args: list[str], names: tuple[str, ...]) -> tuple[str, list[str]]:
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
    # A size that the configuration states wins, as in training; then come names whose size is known.
    name = config.data.tokenizer
    if config.model.vocab_size:
        return config.model.vocab_size
    if name in KNOWN_VOCABULARIES:
        return KNOWN_VOCABULARIES[name]
    if name.startswith("bpe:") and name[4:].isdecimal():
        return int(name[4:])

    # Ids need not be without gaps: the largest counts, of the vocabulary and of the tokens added to it.
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
        _, local_batch_size = resolve_batch_sizes(training.global_batch_size, -1, degrees.data)
        training = dataclasses.replace(training, local_batch_size=local_batch_size)
        config = dataclasses.replace(config, training=training)

    # Training refuses a batch that does not divide. Here it is a note, and the estimate is of one micro-batch a step.
    sequences_per_pass, wanted = training.local_batch_size * degrees.data, training.global_batch_size
    if wanted == -1 or wanted % sequences_per_pass == 0:
        return Case(config, degrees, max(1, wanted // sequences_per_pass))
    note = (
        f"training.global_batch_size ({wanted}) is no multiple of {training.local_batch_size} x {degrees.data} "
        f"sequences: training would refuse it, this is for {sequences_per_pass}"
    )
    return Case(config, degrees, 1, note)


def run(case: Case, excess: float = 0.0) -> Simulation:
    """Simulate a case; ValueError for a component that reads tensors on the host, which has none here."""
    try:
        return simulate(case.config, case.degrees, micro_batches=case.accumulation, excess=excess)
    except DataDependentOutputException as error:
        config = case.config
        raise ValueError(
            f"a step with router.name = {config.router.name!r} and optimizer.name = {config.optimizer.name!r} reads a "
            f"tensor's value on the host ({error.func}), which no estimate can know: estimate with other ones"
        ) from error


def describe_run(case: Case) -> Iterator[str]:
    """Yield lines on what is estimated: model, world, batch."""
    config, degrees = case.config, case.degrees
    with torch.device("meta"):
        total = sum(p.numel() for p in build_model(config).parameters())
    yield f"model: {total:,} parameters, {active_parameters(config):,} active a token"

    # The two axes that share a sequence's work are named only when they are in use: then a batch belongs to several
    # ranks, and "of a rank" would be wrong.
    axes = f"replicas x shards {degrees.replicate} x {degrees.shard}, expert parallelism {degrees.expert}"
    owner = "of a rank"
    if degrees.per_sequence > 1:
        axes += f", context x tensor parallelism {degrees.context} x {degrees.tensor}"
        owner = f"of {degrees.per_sequence} ranks together"
    yield (
        f"world: {case.ranks} ranks, {axes}; {owner} {case.accumulation} x "
        f"{config.training.local_batch_size} sequences of {config.training.seq_len} tokens; "
        f"checkpointing {config.activation_checkpoint.mode}"
    )
    if case.note:
        yield f"note: {case.note}"


def describe_memory(case: Case, result: Simulation, fullest: Simulation) -> Iterator[str]:
    """Yield lines on the parts of the peak, and on what uneven load adds to it; `fullest` is a run with excess 1."""
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

    # Only with expert parallelism does a rank compute rows that others send it, so only there does load cost memory.
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
    """Peak bytes at a MaxVio of `value`, from those at 0 (`result`) and 1 (`fullest`): buffers grow with their rows."""
    return result.peak + value * (fullest.peak - result.peak)


def describe_work(case: Case, result: Simulation) -> Iterator[str]:
    """Yield lines on communication and operations."""
    yield "sent by a rank in a step, GiB, by collective and axis (ranks)"
    for (name, axis), (calls, size) in sorted(result.traffic.items()):
        yield f"  {name:20}{axis:22}{calls:6} calls{size / GIB:12.4f}"
    tokens = step_tokens(case) / case.ranks
    yield (
        f"operations of a rank in a step: {result.flops / 1e12:.3f} TFLOP, "
        f"{result.flops / tokens / 1e9:.3f} GFLOP a token, with what checkpointing makes again"
    )


def step_tokens(case: Case) -> int:
    """Tokens of a step, over all ranks."""
    training = case.config.training
    return case.accumulation * training.local_batch_size * case.degrees.data * training.seq_len


def active_parameters(config: Config) -> int:
    """Parameters in a token's matrix products."""
    with torch.device("meta"):
        return count_active(config, build_model(config))


def is_compiled(config: Config) -> bool:
    """Whether a GPU would run compiled layers."""
    return compiles(config, torch.device("cuda"))


def predict(case: Case, result: Simulation, gpu: str) -> StepTime:
    """Time of a step on a GPU."""
    graphed = uses_cuda_graph(case.config, torch.device("cuda"), case.ranks)
    return step_time(result.work, result.groups, GPUS[gpu], compiled=is_compiled(case.config), graphed=graphed)


def describe_time(case: Case, result: Simulation, gpu: str) -> Iterator[str]:
    """Yield lines on the parts of a step's time, and what follows for the run: throughput, MFU and hours."""
    config, time = case.config, predict(case, result, gpu)
    yield f"time of a step on {article(gpu)} {gpu}, ms"
    for name, seconds in time.device.items():
        yield f"  {name:28}{1000 * seconds:10.1f}"
    yield f"  {'all on the device':28}{1000 * sum(time.device.values()):10.1f}"
    yield f"  {'launches on the host':28}{1000 * time.host:10.1f}   of {time.operators:,} operators"

    # Operations as training's own MFU counts them, not those of the simulation, which has recomputation in it.
    speed, flops = step_tokens(case) / time.seconds, flops_of_token(config, active_parameters(config))
    mfu, steps = speed * flops / (GPUS[gpu].bf16 * case.ranks), config.training.steps
    yield (
        f"prediction: about {1000 * time.seconds:,.0f} ms a step, {short(speed)} tokens/s, MFU {100 * mfu:.0f} %, "
        f"{duration(steps * time.seconds)} for {steps:,} steps on {case.ranks:,} {gpu}, "
        f"{'compiled' if is_compiled(config) else 'eager'}, without validation and checkpoints"
    )

    if config.data.document_mask:
        yield (
            "note: with data.document_mask the time of attention is that of whole sequences, an upper bound; MFU "
            "leaves it out"
        )

    # A prediction says what it does not rest on: one process was measured, without a network and with AdamW.
    if gpu not in (MEASURED_ON, COMPARED_ON):
        yield (
            f"note: nothing was measured on {article(gpu)} {gpu}: scaled from an {MEASURED_ON} by the data sheets' "
            "peak and bandwidth"
        )
    if case.ranks > 1:
        yield "note: communication was not measured: its bytes over the data sheets' NVLink and network"
    others = sorted(optimizer_names(config) - {"adamw"})
    if others:
        yield (
            f"note: the time of the update by {', '.join(others)} is a lower bound: products of small matrices are "
            "slower than counted, and decompositions are not counted"
        )


def optimizer_names(config: Config) -> set[str]:
    """The optimizers in use."""
    groups = [group["name"] for group in config.optimizer.groups.values() if "name" in group]
    return {config.optimizer.name, *groups}


def article(gpu: str) -> str:
    """The indefinite article for the name of a GPU."""
    return "an" if gpu[0] in "AH" else "a"


def short(number: float) -> str:
    """Three digits or so: 178k, 1.42M."""
    return f"{number / 1e6:.3g}M" if number >= 999.5e3 else f"{number / 1e3:.3g}k"


def duration(seconds: float) -> str:
    """In hours, or in minutes where it is less than a tenth of one."""
    return f"{seconds / 3600:,.1f} h" if seconds >= 360 else f"{seconds / 60:.1f} min"


def describe_batch(case: Case, result: Simulation, gpu: str) -> Iterator[str]:
    """Yield a line on the largest micro-batch that fits, of those that divide a rank's part of the step.

    With selective recomputation where that makes the step faster; no line where not even one sequence fits.
    """
    config, usable = case.config, USABLE * GPUS[gpu].memory * GIB
    whole = case.accumulation * config.training.local_batch_size
    states = result.parameters + result.gradients + result.optimizer_state

    # Recomputation costs time, and pays only where it makes room for fewer micro-batches.
    fitting = [largest_that_fits(case, usable, states, {config.training.local_batch_size: result})]
    reaches_all = fitting[0] is not None and fitting[0][0].accumulation == 1
    if config.activation_checkpoint.mode == "none" and not reaches_all:
        config = dataclasses.replace(config, activation_checkpoint=ActivationCheckpoint(mode="selective"))
        fitting.append(largest_that_fits(case._replace(config=config), usable, states, {}))
    times = [(predict(*pair, gpu).seconds, *pair) for pair in fitting if pair is not None]
    if not times:
        return
    seconds, best, _ = min(times, key=lambda entry: entry[0])

    # The time of today is given for comparison, where the configuration can run as it is.
    size, mode = best.config.training.local_batch_size, best.config.activation_checkpoint.mode
    words = f"largest training.local_batch_size that fits: {size} of the {whole} sequences of a rank's step"
    if mode != case.config.activation_checkpoint.mode:
        words += f", with activation_checkpoint.mode = {mode}"
    if best == case:
        yield f"{words}, as it is"
        return
    fits = result.peak <= usable
    now = f" where it is {1000 * predict(case, result, gpu).seconds:,.0f} ms now" if fits else ""
    micro_batches = "1 micro-batch" if best.accumulation == 1 else f"{best.accumulation} micro-batches"
    yield f"{words}: {micro_batches}, about {1000 * seconds:,.0f} ms a step{now}"


def largest_that_fits(
    case: Case, usable: float, states: int, known: dict[int, Simulation]
) -> tuple[Case, Simulation] | None:
    """The largest micro-batch whose peak is at most `usable` bytes, among the divisors of a rank's part of the step.

    `states` are the bytes of parameters, gradients and optimizer state, which no micro-batch changes; `known` are
    simulations by size. None where not even one sequence fits.
    """
    whole = case.accumulation * case.config.training.local_batch_size
    sizes = [size for size in range(1, whole + 1) if whole % size == 0]

    # Each try is a simulation, which takes seconds. The whole goes first, as it often fits.
    best, (low, low_peak), size = None, (0, states), whole
    high, high_peak = whole + 1, float("inf")
    while size:
        other = with_batch(case, size)
        result = known.get(size) or run(other)
        if result.peak <= usable:
            best, low, low_peak = (other, result), size, result.peak
        else:
            high, high_peak = size, result.peak

        # Peaks are nearly a straight line in the size, so the line through what fits and what does not says which size
        # to try next: two simulations a mode, where bisection took eight.
        should_fit = low + (high - low) * (usable - low_peak) / (high_peak - low_peak)
        between = [size for size in sizes if low < size < high]
        untried = between[:1] if best is None else []  # before giving up
        size = max([size for size in between if size <= should_fit] or untried, default=0)
    return best


def with_batch(case: Case, size: int) -> Case:
    """The same step in micro-batches of `size` sequences, which must divide a rank's part of the step."""
    training: Training = dataclasses.replace(case.config.training, local_batch_size=size)
    accumulation = case.accumulation * case.config.training.local_batch_size // size
    return case._replace(config=dataclasses.replace(case.config, training=training), accumulation=accumulation)


def verdict(case: Case, result: Simulation, gpu: str) -> Iterator[str]:
    """Yield lines on whether it fits the GPU, and on what would make it fit."""
    memory = GPUS[gpu].memory
    usable = USABLE * memory
    limit = f"{usable:.1f} of {memory:.1f} GiB"
    if result.peak / GIB <= usable:
        yield f"verdict: fits {article(gpu)} {gpu}: {result.peak / GIB:.1f} GiB, {limit} are counted on"
        return
    yield f"verdict: does not fit {article(gpu)} {gpu}: {result.peak / GIB:.1f} GiB are more than {limit}"

    # Changes are tried until one is enough; those that are not are shown as well.
    for change, other in knobs(case):
        peak = run(other).peak / GIB
        if peak <= usable:
            yield f"it would with {change}: {peak:.1f} GiB"
            return
        yield f"  not with {change}: {peak:.1f} GiB"
    yield f"none of these makes it fit: take more than {case.ranks} ranks, or a smaller model"


def knobs(case: Case) -> Iterator[tuple[str, Case]]:
    """Yield changes that save memory, in words and as a case; each is on top of those before it, the cheapest first."""
    # Recomputation costs time alone: batch and layout stay as they are.
    config, words = case.config, ""
    for mode in ("selective", "full"):
        if config.activation_checkpoint.mode in ("none", "selective") and config.activation_checkpoint.mode != mode:
            config = dataclasses.replace(config, activation_checkpoint=ActivationCheckpoint(mode=mode))
            words = f"activation_checkpoint.mode = {mode}"
            yield words, case._replace(config=config)

    # Smaller micro-batches make more of them: products are smaller, and FSDP gathers more often.
    case = with_batch(case._replace(config=config), 1)
    if config.training.local_batch_size > 1:
        words = ", ".join(filter(None, [words, "training.local_batch_size = 1"]))
        yield words, case

    # Without replicas the states are shared by more ranks, where these divide the experts.
    if case.degrees.replicate > 1:
        degrees = case.degrees._replace(replicate=1, shard=case.degrees.data)
        if degrees.expert == 1 or config.moe.num_experts % degrees.per_replica == 0:
            words = ", ".join(filter(None, [words, "parallelism.data_parallel_replicate_degree = 1"]))
            yield words, case._replace(degrees=degrees)
