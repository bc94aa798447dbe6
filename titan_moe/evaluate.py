"""Evaluate a checkpoint: `python -m titan_moe.evaluate --checkpoint DIR [--data.path FILE ...]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from titan_moe.build import data_arguments
from titan_moe.checkpoint import load_model, resolve_checkpoint
from titan_moe.config import Config, load_saved
from titan_moe.data.build import Batches, build_data, build_validation, token_bytes
from titan_moe.data.loader import CPU
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.metrics import eval_metrics, to_numbers
from titan_moe.parallelize.parallelize import move_for_inference
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.world import Runtime
from titan_moe.step import evaluate

OVERRIDES = (  # what the command line may change: the rest belongs to the checkpoint
    "data.dataset",
    "data.path",
    "data.validation_path",
    "data.validation_fraction",
    "data.cache_folder",
    "validation.steps",
    "validation.local_batch_size",
    "training.seq_len",
)


def main(args: list[str]) -> int:
    """Evaluate the checkpoint and print one line for each number; return the exit code."""
    options, overrides = parse(args)
    rt = world.read_world()
    command.init_logging(rt)

    # The configuration first: what the command line can't ask for is refused before gigabytes are read.
    step_folder = resolve_checkpoint(options.checkpoint)
    config, files = evaluation_config(step_folder, overrides, options.trust_components)
    model, _ = load_model(step_folder, options.trust_components)

    # The tokenizer of the checkpoint, for others have other words at the same ids.
    tokenizer = str(step_folder / "tokenizer.json")
    output = evaluate(
        move_for_inference(model, rt.device, DTYPES[config.training.mixed_precision_param]),
        validation_batches(config, tokenizer, files, rt.device),
        token_bytes(load_tokenizer(tokenizer)).to(rt.device),
    )
    for name, value in to_numbers([eval_metrics(output)])[0].items():
        print(f"{name:24} {value:.8g}" if isinstance(value, float) else f"{name:24} {value}")
    return 0


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: its own arguments, and `--section.key value` words for the configuration."""
    # The arguments of this command. Keys of the configuration keep the names that they have in training.
    about = "Evaluate a checkpoint: loss, perplexity, accuracy, bits per byte, routing losses and MaxVio."
    parser = Parser("python -m titan_moe.evaluate", about)
    place = "step folder, or dump folder (its latest complete step)"
    parser.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help=place)
    parser.add_trust()

    # Keys of the configuration are words that this parser does not know: it passes them on.
    parser.epilog = (
        "--data.path FILE ...: files to evaluate on, all of them; without it: the validation data of the run. "
        f"--section.key value, instead of the run's: {', '.join(OVERRIDES)}. "
        "Text is cut into sequences of training.seq_len tokens; a rest of less than one is left out."
    )
    return parser.parse_known_args(args)


def evaluation_config(
    step_folder: Path, overrides: list[str], trust_components: Sequence[str] = ()
) -> tuple[Config, list[str]]:
    """Give the run's configuration with the overrides, and the files of --data.path: of these all is evaluated.

    `trust_components` as in `load_model`.
    """
    # Who gives files wants all of them evaluated, not as many batches as the run looked at between steps.
    given = {arg[2:].partition("=")[0] for arg in overrides if arg.startswith("--")}
    with_all = ["--validation.steps", "-1"] if "data.path" in given and "validation.steps" not in given else []
    words = [*overrides, *with_all]
    config = load_saved(step_folder / "config.toml", words, trust_components=trust_components)

    # Checked last: a key that does not exist at all has a better message by then.
    if useless := sorted(given.difference(OVERRIDES)):
        raise ValueError(f"--{useless[0]} changes nothing here: an evaluation takes {', '.join(OVERRIDES)}")
    return config, config.data.path if "data.path" in given else []


def validation_batches(
    config: Config, tokenizer: str, files: list[str], device: torch.device = CPU, rt: Runtime | None = None
) -> Batches:
    """Iterate over `files`, or over the run's validation data where there are none, on `device`.

    With `rt` this process gets its share of the sequences, and all get the same number of batches.
    """
    arguments = data_arguments(config)
    share: dict[str, Any] = {}
    if rt is not None:
        share = {"dp_rank": rt.rank, "dp_degree": rt.world_size, "is_main": rt.local_rank == 0}
        share["barrier"] = world.barrier

    # Files of one's own are validation data as a whole: nothing of them is held out or shuffled.
    if files:
        return build_validation(
            path=files,
            tokenizer=tokenizer,
            seq_len=arguments["seq_len"],
            steps=arguments["validation_steps"],
            local_batch_size=arguments["validation_local_batch_size"],
            cache_folder=arguments["cache_folder"],
            device=device,
            **share,
        )()

    # The batches of training are not taken, so their size is any.
    sizes = {"global_batch_size": -1, "local_batch_size": 1}
    data = build_data(**arguments, **share, **sizes, tokenizer=tokenizer, device=device)
    if data.validation is None:
        raise ValueError("the run held out no validation data: give files by --data.path")
    return data.validation()


if __name__ == "__main__":
    command.run_command(main)
