"""The command line of `python -m titan_moe.analyze`: which checkpoints and texts, and where to."""

import argparse
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from titan_moe.analyze.analysis import Settings
from titan_moe.analyze.run import Source, analyze
from titan_moe.analyze.tables import tables
from titan_moe.checkpoint import complete_steps, resolve_checkpoint
from titan_moe.checkpoint.folder import is_step_folder
from titan_moe.checkpoint.steps import folder_of_steps, is_folder, is_step
from titan_moe.config import Config
from titan_moe.convert.hf.convert import from_hf
from titan_moe.evaluate import OVERRIDES
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser, logger
from titan_moe.runtime.files import check_writable, temporary_path, write_atomic
from titan_moe.runtime.remote import joined, local_or_url
from titan_moe.runtime.world import Runtime

ANALYSIS, TABLES, FOLDER = "analysis.json", "analysis.md", "analysis"
IMPORTED = "imported"  # checkpoint of a Hugging Face folder, which is there while it is analyzed
PACKAGES = ("jinja2", "matplotlib")  # of the report
HELP = {
    "dead_fraction": "an expert with a load below this times the mean is dead",
    "overlap_cosine": "two experts overlap where the mean cosine of their outputs is at least this",
    "rare_share": "part of all tokens that the rarest ids make up, which are the class `rare`",
    "piece_tokens": "least length of the pieces of documents whose loads are measured",
    "top_tokens": "top tokens of an expert",
    "min_count": "how often an expert has to have got a top token",
    "kept_tokens": "tokens whose choices are kept, for contexts of top tokens and drift",
    "sample_tokens": "tokens of the text that is shown with its experts",
    "output_tokens": "tokens for which the outputs of all experts are compared; 0: none",
    "ablation_tokens": "tokens on which losses without experts are measured; 0: none",
    "ablation_passes": "most passes over these; single experts are taken away where all of them fit in",
}


def main(args: list[str]) -> int:
    """Analyze, write the document and its tables, and print the numbers of a study; return the exit code."""
    options, overrides = parse(args)
    if missing := [name for name in PACKAGES if find_spec(name) is None]:
        raise ValueError(f"the report of an analysis needs {', '.join(missing)}: pip install 'titan_moe[study]'")
    settings = Settings(**{name: getattr(options, name) for name in Settings._fields})
    rt = world.read_world()
    command.init_logging(rt)
    if rt.world_size > 1:
        world.init_process_group(rt, Config().comm.init_timeout_seconds)

    # That it can be written is known before anything is computed.
    out = output_folder(options.out, options.checkpoint)
    world.on_main(lambda: check_writable(out, "--out"), rt)
    with sources(options.checkpoint, options.all_steps, out, rt, options.trust_components) as checkpoints:
        analysis = analyze(checkpoints, options.data_path, overrides, settings, rt, options.trust_components)
    world.on_main(lambda: write(analysis, out), rt)

    # What a study draws is printed as an evaluation prints its numbers.
    if rt.is_main:
        for name, value in analysis["scalars"].items():
            print(f"{name:24} {value}")
        logger.info("wrote %s", out)
    return 0


def parse(args: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line: its own arguments, and `--section.key value` words for the configuration."""
    about = "Analyze what router and experts of a checkpoint do, in one pass over texts: report.html, analysis.json."
    parser = Parser("python -m titan_moe.analyze", about)
    place = "step folder, dump folder (its latest complete step) or Hugging Face folder; again for more: over training"
    parser.add_argument("--checkpoint", type=local_or_url, required=True, action="append", metavar="DIR", help=place)
    parser.add_argument("--all_steps", action="store_true", help="of dump folders all complete steps, not the latest")
    files = "texts, each with its name: F (named after its file) or NAME=F; without: the validation data of the run"
    parser.add_argument(
        "--data.path", dest="data_path", nargs="+", action="extend", default=[], metavar="[NAME=]F", help=files
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help=f"folder to write to ({FOLDER} in the dump folder)")
    for name, default in Settings._field_defaults.items():
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"{HELP[name]} ({default})")
    parser.add_trust()
    keys = ", ".join(key for key in OVERRIDES if key not in ("data.path", "data.packing"))
    parser.epilog = f"--section.key value, instead of the run's: {keys}."
    options, overrides = parser.parse_known_args(args)
    check_one_folder(args)

    # What argparse can't check; a mistake is told before a model is loaded.
    for name in Settings._fields:
        value, limit = getattr(options, name), 1.0 if isinstance(Settings._field_defaults[name], float) else None
        least = 1 if name in ("kept_tokens", "sample_tokens", "piece_tokens", "min_count", "ablation_passes") else 0
        if not value >= least or (limit is not None and not value <= limit):  # so that nan is refused
            bounds = f"at least {least}" if limit is None else f"from {least} to {limit:g}"
            raise ValueError(f"--{name} ({value}) must be {bounds}")
    return options, overrides


def check_one_folder(args: Sequence[str]) -> None:
    """Raise ValueError where a second folder follows --checkpoint: it would be taken for a word of some key."""
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--checkpoint=") else [word])]
    for flag, first, second in zip(words, words[1:], words[2:], strict=False):
        if flag == "--checkpoint" and not first.startswith("-") and not second.startswith("-"):
            raise ValueError(
                f"--checkpoint takes one folder, got {first} {second}: give the flag again for each: "
                f"--checkpoint {first} --checkpoint {second}"
            )


def output_folder(out: Path | None, checkpoints: Sequence[Path | str]) -> Path:
    """The folder to write to: `out`, else beside the last checkpoint's folder of steps, in the run's dump folder."""
    if out is not None:
        return out
    path = checkpoints[-1]
    if not isinstance(path, Path) or is_hf(path):
        what = "a Hugging Face folder is left as it is" if isinstance(path, Path) else "a report is written to a disk"
        raise ValueError(f"--out is needed for {path}: {what}")
    folder = path.parent if is_step_folder(path) else path
    return (folder.parent if folder.name == "checkpoint" else folder) / FOLDER


def is_hf(path: Path | str) -> bool:
    """Whether a folder holds a Hugging Face model."""
    return isinstance(path, Path) and (path / "config.json").is_file() and not is_step_folder(path)


@contextmanager
def sources(
    paths: Sequence[Path | str], all_steps: bool, out: Path, rt: Runtime, trust_components: Sequence[str]
) -> Iterator[list[Source]]:
    """The checkpoints that the paths mean, in their order; those of Hugging Face are imported while the block runs."""
    # One import serves all ranks. The name has the process in it: what a killed one leaves, the next removes.
    staging = Path(world.all_gather(str(temporary_path(out / IMPORTED)))[0])
    try:
        folders: list[Source] = []
        for number, path in enumerate(paths):
            # All that follows reads checkpoints of ours: a model of another library is made into one first.
            if isinstance(path, Path) and is_hf(path):
                target = staging / f"step-{number}"
                world.on_main(partial(from_hf, path, target, verify=False, trust_components=trust_components), rt)
                folders.append(Source(target, str(path), path.name))
            # All steps may be meant by the dump folder or by the folder of steps that is in it.
            elif all_steps and is_folder(path) and not is_step(path):
                inner = folder_of_steps(path)
                steps = [joined(inner, f"step-{step}") for step in complete_steps(inner)]
                if not steps:
                    raise ValueError(f"checkpoint {path}: no complete step-N folder in {inner}")
                folders += [source_of(step if isinstance(step, Path) else resolve_checkpoint(step)) for step in steps]
            else:
                folders.append(source_of(resolve_checkpoint(path)))
        yield folders
    finally:
        if rt.is_main:
            shutil.rmtree(staging, ignore_errors=True)


def source_of(step_folder: Path) -> Source:
    """A step folder and its names: that of the run and the step."""
    run = step_folder.absolute().parent
    run = run.parent if run.name == "checkpoint" else run
    return Source(step_folder, str(step_folder), f"{run.name}, {step_folder.name.replace('-', ' ')}")


def write(analysis: dict[str, Any], out: Path) -> None:
    """Write the document, its tables and its picture; each appears whole."""
    from titan_moe.analyze.report import write_report  # matplotlib is slow to import

    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / ANALYSIS, json.dumps(analysis, allow_nan=False, ensure_ascii=False) + "\n")
    write_atomic(out / TABLES, tables(analysis))
    write_report(analysis, out)
