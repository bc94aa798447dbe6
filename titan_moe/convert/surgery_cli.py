"""The command line of scripts/surgery.py."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from titan_moe.checkpoint import load_model, resolve_checkpoint
from titan_moe.checkpoint.lazy import LazyTensors
from titan_moe.checkpoint.store import read_config
from titan_moe.convert.hf.architectures import moe_layers
from titan_moe.convert.surgery import (
    Plan,
    add_experts,
    change_experts,
    keep,
    merge_experts,
    prune_experts,
    revive_experts,
    similarity,
    upcycle,
)
from titan_moe.data.build import token_bytes
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.evaluate import evaluation_config, validation_batches
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser
from titan_moe.runtime.remote import local_or_url
from titan_moe.step import evaluate

VERBS = {
    "upcycle": "a dense model gets experts, copies of its feed-forward networks",
    "add": "more experts, copies of the busiest",
    "prune": "fewer experts: the least loaded go",
    "merge": "fewer experts: similar ones become one, weighted by load",
    "revive": "experts without load become copies of the busiest",
}


def surgery(args: list[str]) -> int:
    """Change the experts of a checkpoint."""
    # One parser for all verbs, because most of their options are the same; `_check` tells which don't fit the verb.
    verbs = "; ".join(f"{name}: {text}" for name, text in VERBS.items())
    parser = Parser("surgery.py", f"Write a checkpoint with other experts. {verbs}.")
    parser.add_argument("verb", choices=list(VERBS))
    parser.add_argument("checkpoint", type=local_or_url, help="step folder, dump folder (its latest step), or a URL")
    parser.add_argument("out", type=Path, help="dump folder to make, or a step folder (.../step-N)")
    parser.add_argument("--num_experts", type=int, help="experts of a layer afterwards (all but revive)")
    parser.add_argument("--granularity", type=int, default=1, help="upcycle: experts that a copy is cut into (1)")
    parser.add_argument("--noise", type=float, default=0.0, help="on copies, relative to their weights (0)")
    parser.add_argument("--threshold", type=float, default=0.01, help="revive: loads up to this times the mean (0.01)")
    parser.add_argument("--steps", type=int, default=16, help="batches to measure loads on; -1: all (16)")
    parser.add_argument("--data.path", dest="data_path", nargs="+", default=[], help="files to measure loads on")
    parser.add_trust()

    # What the parser doesn't know is left to the configuration, which refuses what it doesn't know either.
    parser.epilog = "Further --section.key value change the configuration, for example --moe.top_k 4."
    options, overrides = parser.parse_known_args(args)
    _check(options)
    command.init_logging(world.read_world())

    # A dense model has no experts whose load could be measured: upcycling needs no plan.
    if options.verb == "upcycle":
        overrides = ["--moe.num_experts", str(options.num_experts), *overrides]
        granularity, noise = options.granularity, options.noise
        upcycle(
            options.checkpoint,
            options.out,
            granularity=granularity,
            noise=noise,
            overrides=overrides,
            trust_components=options.trust_components,
        )
    else:
        change_experts(options.checkpoint, options.out, _planner(options), overrides, options.trust_components)
    return 0


def _check(options: argparse.Namespace) -> None:
    """Raise ValueError for options that the verb needs or has no use for, and for noise that is no number."""
    if options.verb != "revive" and options.num_experts is None:
        raise ValueError(f"{options.verb} needs --num_experts N")
    if options.verb == "revive" and options.num_experts is not None:
        raise ValueError("revive keeps the number of experts: leave --num_experts out")
    if options.verb != "upcycle" and options.granularity != 1:
        raise ValueError("--granularity is for upcycle")
    if not 0 <= options.noise < float("inf"):
        raise ValueError(f"--noise ({options.noise}) must be at least 0")


def _planner(options: argparse.Namespace) -> Callable[[LazyTensors], list[Plan]]:
    """The plan of each MoE layer, from the loads that the checkpoint's model gives its experts."""

    def plans(tensors: LazyTensors) -> list[Plan]:
        load_LE = measure_load(options.checkpoint, options.data_path, options.steps, options.trust_components)
        config = read_config(resolve_checkpoint(options.checkpoint), options.trust_components)
        layers = moe_layers(config) if options.verb == "merge" else range(len(load_LE))
        layer_plans = [_plan(options, load_E, tensors, layer) for layer, load_E in zip(layers, load_LE, strict=True)]
        if options.verb == "revive" and all(plan == [keep(e) for e in range(len(plan))] for plan in layer_plans):
            raise ValueError(f"no expert has a load of at most {options.threshold} times the mean: nothing to revive")
        return layer_plans

    return plans


def _plan(options: argparse.Namespace, load_E: Tensor, tensors: LazyTensors, layer: int) -> Plan:
    if options.verb == "add":
        return add_experts(load_E, options.num_experts, options.noise)
    if options.verb == "prune":
        return prune_experts(load_E, options.num_experts)
    if options.verb == "merge":
        return merge_experts(load_E, options.num_experts, similarity(tensors, layer))
    return revive_experts(load_E, options.threshold, options.noise)


def measure_load(checkpoint: Path | str, files: list[str], steps: int, trust_components: Sequence[str] = ()) -> Tensor:
    """Tokens per expert (L, E) on `steps` batches of the run's validation data, or of `files`.

    `trust_components` as in `load_model`.
    """
    step_folder = resolve_checkpoint(checkpoint)
    words = ["--data.path", *files] if files else []
    config, files = evaluation_config(step_folder, [*words, "--validation.steps", str(steps)], trust_components)
    model, _ = load_model(step_folder, trust_components)
    tokenizer = str(step_folder / "tokenizer.json")
    output = evaluate(model, validation_batches(config, tokenizer, files), token_bytes(load_tokenizer(tokenizer)))
    return output.load
