"""Evaluate a checkpoint: `python -m titan_moe.evaluate --checkpoint DIR [--data.path FILE ...]`."""

from pathlib import Path

from titan_moe import runtime
from titan_moe.checkpoint import load_model, resolve_checkpoint
from titan_moe.config import Config, load_config
from titan_moe.data.build import Batches, build_data, build_validation, token_bytes
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.metrics import eval_metrics, to_numbers
from titan_moe.step import evaluate

USAGE = """usage: python -m titan_moe.evaluate --checkpoint DIR [--data.path FILE ...] [--section.key value ...]

Evaluate a checkpoint: loss, perplexity, accuracy, bits per byte, routing losses and MaxVio.

  --checkpoint DIR        step folder, or dump folder (its latest complete step)
  --data.path FILE ...    files to evaluate on, all of them; without it: the validation data of the run
  --section.key value     any key of the run's configuration, for example --validation.local_batch_size 4
"""


def main(args: list[str]) -> int:
    """Print one line for each number."""
    if "-h" in args or "--help" in args:
        print(USAGE, end="")
        return 0
    checkpoint, overrides = split_checkpoint(args)
    rt = runtime.read_world()
    runtime.init_logging(rt)
    step_folder = resolve_checkpoint(checkpoint)
    config = load_config(["--job.config_file", str(step_folder / "config.toml"), *overrides])
    files = config.data.path if any(arg.partition("=")[0] == "--data.path" for arg in overrides) else []
    model, _ = load_model(step_folder)
    tokenizer = step_folder / "tokenizer.json"
    output = evaluate(
        model.to(rt.device),
        validation_batches(config, tokenizer, files),
        token_bytes(load_tokenizer(str(tokenizer))).to(rt.device),
    )
    for name, value in to_numbers([eval_metrics(output)])[0].items():
        print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")
    return 0


def split_checkpoint(args: list[str]) -> tuple[Path, list[str]]:
    """Take --checkpoint DIR (or --checkpoint=DIR) out of the arguments."""
    for i, arg in enumerate(args):
        if arg.startswith("--checkpoint="):
            return Path(arg.partition("=")[2]), args[:i] + args[i + 1 :]
        if arg == "--checkpoint" and i + 1 < len(args):
            return Path(args[i + 1]), args[:i] + args[i + 2 :]
    raise ValueError("--checkpoint DIR is missing: a step folder or a run's dump folder")


def validation_batches(config: Config, tokenizer: Path, files: list[str]) -> Batches:
    """Iterate over all of `files`, or over the run's validation data where there are none."""
    data, training, validation = config.data, config.training, config.validation
    folder = data.cache_folder or str(runtime.user_cache_folder())
    if files:
        return build_validation(
            path=files,
            tokenizer=str(tokenizer),
            seq_len=training.seq_len,
            steps=validation.steps,
            local_batch_size=validation.local_batch_size,
            cache_folder=folder,
        )()
    made = build_data(
        dataset=data.dataset,
        path=data.path,
        tokenizer=data.tokenizer,
        seq_len=training.seq_len,
        seed=training.seed,
        global_batch_size=1,
        local_batch_size=1,
        validation_fraction=data.validation_fraction,
        validation_path=data.validation_path,
        validation_steps=validation.steps,
        validation_local_batch_size=validation.local_batch_size,
        cache_folder=folder,
    )
    if made.validation is None:
        raise ValueError("the run held out no validation data: give files by --data.path")
    return made.validation()


if __name__ == "__main__":
    runtime.run_command(main)
