"""Evaluate a checkpoint: `python -m titan_moe.evaluate --checkpoint DIR [--data.path FILE ...]`."""

import argparse
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from titan_moe.build import data_arguments, load_validation_sets, make_tasks, read_tasks
from titan_moe.checkpoint import load_model, resolve_checkpoint
from titan_moe.checkpoint.folder import read_manifest
from titan_moe.config import Config, load_saved
from titan_moe.data.build import Batches, build_data, build_validation, token_bytes
from titan_moe.data.loader import CPU
from titan_moe.data.tasks import Question
from titan_moe.data.tokenizer import Tokenizer, load_tokenizer
from titan_moe.metrics import eval_metrics, to_numbers
from titan_moe.parallelize.parallelize import move_for_inference
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser
from titan_moe.runtime.dtypes import DTYPES
from titan_moe.runtime.remote import local_or_url
from titan_moe.runtime.world import Runtime
from titan_moe.step import evaluate
from titan_moe.tasks import evaluate_task

OVERRIDES = (  # what the command line may change: the rest belongs to the checkpoint
    "data.dataset",
    "data.path",
    "data.validation_path",
    "data.validation_fraction",
    "data.packing",
    "data.cache_folder",
    "validation.steps",
    "validation.local_batch_size",
    "training.seq_len",
)


COLUMNS = {  # of the rows: numbers and their formats
    "loss": ".4f",
    "perplexity": ".2f",
    "accuracy": ".2%",
    "bits_per_byte": ".4f",
    "maxvio_global": ".3f",
    "num_tokens": ",",
}
TASK_COLUMNS = {  # of tasks
    **dict.fromkeys(("acc", "acc_stderr", "acc_norm", "acc_norm_stderr"), ".2%"),
    **dict.fromkeys(("perplexity", "perplexity_stderr"), ".2f"),
    "num_questions": ",",
}
WHOLE = "all"  # the name of all files together


class Row(NamedTuple):
    """What was measured on a text: some files, or a set of the run's, which has no files here; or on a task."""

    name: str
    files: list[str]
    numbers: dict[str, Any]
    is_task: bool = False


def main(args: list[str]) -> int:
    """Evaluate the checkpoint and print its numbers; return the exit code."""
    options, overrides = parse(args)
    rt = world.read_world()
    command.init_logging(rt)

    # The configuration first: what the command line can't ask for is refused before gigabytes are read.
    step_folder = resolve_checkpoint(options.checkpoint)
    config, files = evaluation_config(step_folder, overrides, options.trust_components, with_sets=True)
    config = with_asked_tasks(config, files, options.tasks)
    questions = read_tasks(config)
    model, _ = load_model(step_folder, options.trust_components)

    # The tokenizer of the checkpoint, for others have other words at the same ids.
    tokenizer = str(step_folder / "tokenizer.json")
    move_for_inference(model, rt.device, DTYPES[config.training.mixed_precision_param])
    rows = evaluate_texts(model, config, tokenizer, files, rt.device) if options.tasks is None else []
    rows += evaluate_tasks(model, config, questions, load_tokenizer(tokenizer), rt.device)
    if options.json:
        print(as_json(step_folder, rows))
        return 0

    # All numbers of the whole, a line each; of its parts those that people compare.
    texts, tasks = [row for row in rows if not row.is_task], [row for row in rows if row.is_task]
    for name, value in texts[0].numbers.items() if texts else ():
        print(f"{name:24} {value:.8g}" if isinstance(value, float) else f"{name:24} {value}")
    tables = [table(part, columns) for part, columns in ((texts[1:], COLUMNS), (tasks, TASK_COLUMNS)) if part]
    for index, lines in enumerate(tables):
        print(*([""] if texts or index else []), *lines, sep="\n")
    return 0


def with_asked_tasks(config: Config, files: list[str], names: list[str] | None) -> Config:
    """The configuration with those tasks that --tasks names, all where it names none or is not there; with files none.

    ValueError where --tasks asks for what there is not.
    """
    tasks = config.validation.tasks
    if names is not None:
        if files:
            raise ValueError("--tasks has no use with --data.path: leave one out")
        if missing := [name for name in names if name not in tasks]:
            raise ValueError(f"--tasks {missing[0]}: no such task: there are {', '.join(tasks) or 'none'}")
        if not tasks:
            raise ValueError("--tasks: the run has none: add --validation.tasks.NAME.path FILE.jsonl")
    asked = {} if files else {name: tasks[name] for name in names or tasks}
    return dataclasses.replace(config, validation=dataclasses.replace(config.validation, tasks=asked))


def evaluate_tasks(
    model: nn.Module,
    config: Config,
    questions: Mapping[str, Sequence[Question]],
    tokenizer: Tokenizer,
    device: torch.device,
) -> list[Row]:
    """Ask the `questions` of each task, by its name: a row for each."""
    rows = []
    for name, task in make_tasks(config, questions, tokenizer).items():
        numbers = evaluate_task(
            model,
            task,
            seq_len=config.training.seq_len,
            local_batch_size=config.validation.local_batch_size,
            pad_id=tokenizer.eot_id,
            device=device,
        )
        rows.append(Row(name, config.validation.tasks[name].path, numbers, is_task=True))
    return rows


def evaluate_texts(
    model: nn.Module, config: Config, tokenizer: str, files: list[str], device: torch.device
) -> list[Row]:
    """Evaluate on `files` together, then on each by itself; without any, on the run's validation data and its sets.

    A glob or folder among `files` is one text. `tokenizer` is a file.
    """
    bytes_V = token_bytes(load_tokenizer(tokenizer)).to(device)

    def row(name: str, paths: list[str], batches: Batches) -> Row:
        (numbers,) = to_numbers([eval_metrics(evaluate(model, batches, bytes_V))])
        return Row(name, paths, numbers)

    # Of the run each set by its name, as in its own validations. All are there before the first is computed.
    sets = {} if files else load_validation_sets(config, tokenizer, device=device)
    batches = validation_batches(config, tokenizer, files, device)
    if not files:
        return [row("validation", [], batches), *(row(name, [], one.batches()) for name, one in sets.items())]

    # A text is cut into sequences by itself, and may be too short for one although all of them together are not.
    rows = [row(files[0] if len(files) == 1 else WHOLE, files, batches)]
    for path in files if len(files) > 1 else ():
        try:
            batches = validation_batches(config, tokenizer, [path], device)
        except ValueError as error:
            command.logger.warning("%s has no row of its own: %s", path, error)
        else:
            rows.append(row(path, [path], batches))
    return rows


def table(rows: Sequence[Row], formats: Mapping[str, str]) -> list[str]:
    """The lines of a table with a row for each text or task; what one does not have is left empty."""
    columns = [name for name in formats if any(name in row.numbers for row in rows)]
    texts = [["", *columns]]
    for row in rows:
        texts.append([row.name, *(format(row.numbers[n], formats[n]) if n in row.numbers else "" for n in columns)])
    name_width, *widths = (max(map(len, column)) for column in zip(*texts, strict=True))
    return [
        f"{name:<{name_width}}" + "".join(f"  {text:>{width}}" for text, width in zip(numbers, widths, strict=True))
        for name, *numbers in texts
    ]


def as_json(step_folder: Path, rows: Sequence[Row]) -> str:
    """One JSON object: the checkpoint, its step, and for each text and task its name, its files and all numbers.

    The first result is what is printed without --json. A number that is not finite is null.
    """

    def finite(numbers: dict[str, Any]) -> dict[str, Any]:
        return {key: value if math.isfinite(value) else None for key, value in numbers.items()}

    results = [{"name": row.name, "path": row.files, **finite(row.numbers)} for row in rows]
    head = {"checkpoint": str(step_folder), "step": read_manifest(step_folder)["step"]}
    return json.dumps({**head, "results": results}, indent=1, allow_nan=False)


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: its own arguments, and `--section.key value` words for the configuration."""
    # The arguments of this command. Keys of the configuration keep the names that they have in training.
    about = "Evaluate a checkpoint: loss, perplexity, accuracy, bits per byte, routing losses and MaxVio; its tasks."
    parser = Parser("python -m titan_moe.evaluate", about)
    place = "step folder, or dump folder (its latest complete step)"
    parser.add_argument("--checkpoint", type=local_or_url, required=True, metavar="DIR", help=place)
    parser.add_argument("--json", action="store_true", help="print one JSON object: {checkpoint, step, results: [...]}")
    about = "ask the questions of these [validation.tasks] alone, of all of them without a NAME"
    parser.add_argument("--tasks", nargs="*", metavar="NAME", help=about)
    parser.add_trust()

    # Keys of the configuration are words that this parser does not know: it passes them on.
    parser.epilog = (
        "--data.path FILE ...: files to evaluate on, all of them together, then each by itself in a table (a glob in "
        "quotes, or a folder, is one text); without it: the validation data of the run, then each of its "
        "[validation.sets] and [validation.tasks]. "
        f"--section.key value, instead of the run's: {', '.join(OVERRIDES)}, validation.sets.NAME.path and .dataset, "
        "validation.tasks.NAME.path and its other keys (validation.sets.NAME false: without it). "
        "Text is cut into sequences of training.seq_len tokens; a rest of less than one is left out."
    )
    return parser.parse_known_args(args)


def evaluation_config(
    step_folder: Path, overrides: list[str], trust_components: Sequence[str] = (), *, with_sets: bool = False
) -> tuple[Config, list[str]]:
    """Give the run's configuration with the overrides, and the files of --data.path: of these all is evaluated.

    `trust_components` as in `load_model`. `with_sets`: validation sets and tasks are evaluated, where no files are
    given, and may be overridden.
    """
    # Who gives files wants all of them evaluated, not as many batches as the run looked at between steps.
    given = {arg[2:].partition("=")[0] for arg in overrides if arg.startswith("--")}
    with_all = ["--validation.steps", "-1"] if "data.path" in given and "validation.steps" not in given else []
    words = [*overrides, *with_all]

    # Of files no data set is read that the run had; its functions are not called, whoever wrote them.
    with_data = "data.path" not in given or "data.dataset" in given
    config_file = step_folder / "config.toml"
    config = load_saved(config_file, words, trust_components=trust_components, with_data=with_data)

    # Checked last: a key that does not exist at all has a better message by then.
    tables = ("validation.sets.", "validation.tasks.")
    sets = {key for key in given if key.startswith(tables) and with_sets and "data.path" not in given}
    arguments = {f"data.{name}" for name in config.data.arguments}  # of a data set of one's own
    if useless := sorted(given.difference(OVERRIDES, sets, arguments)):
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
            packing=arguments["packing"],
            steps=arguments["validation_steps"],
            local_batch_size=arguments["validation_local_batch_size"],
            cache_folder=arguments["cache_folder"],
            document_mask=arguments["document_mask"],
            device=device,
            **share,
        ).batches()

    # The batches of training are not taken, so their size is any.
    sizes = {"global_batch_size": -1, "local_batch_size": 1}
    data = build_data(**arguments, **share, **sizes, tokenizer=tokenizer, device=device)
    if data.validation is None:
        raise ValueError("the run held out no validation data: give files by --data.path")
    return data.validation()


if __name__ == "__main__":
    command.run_command(main)
