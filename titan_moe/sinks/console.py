"""The console: progress of a run while it trains, and a summary when it is over."""

import math
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from titan_moe.runtime.command import TRUST
from titan_moe.runtime.progress import clock
from titan_moe.sinks.sink import Record, Sink, of_sets


def console(total_steps: int, log_freq: int, *, is_terminal: bool, stream: TextIO | None = None) -> Sink:
    """Show progress on `stream` (standard output): a bar on a terminal, else a line for each `log_freq`-th step.

    Give it every record; it also shows the first and the last step, and each validation as a line of its own, with one
    more for each validation set and task.
    """
    out = stream or sys.stdout
    bar: Any = None
    began: tuple[int, float] | None = None  # step before the first record, and the host's clock then

    def write(record: Record) -> None:
        nonlocal bar, began

        # A resumed run begins at a later step, which only its first record tells. The time left goes by this start's
        # steps alone.
        step = record["step"]
        if began is None:
            began = (max(step - 1, 0), time.monotonic() - record.get("step_seconds", 0.0))
            if is_terminal:
                from tqdm import tqdm

                layout = "step {n_fmt}/{total_fmt} {bar} {desc}  {remaining} left"
                bar = tqdm(total=total_steps, initial=began[0], file=out, bar_format=layout, dynamic_ncols=True)

        # A validation is a line of its own, also above a bar; a step moves the bar, or is a line now and then.
        line = f"step {step:>{len(str(total_steps))}}/{total_steps}"
        if record["kind"] != "train":
            line = _validation_lines(line, record)
        elif bar is not None:
            bar.set_description_str(_short(record), refresh=False)
            bar.update(step - bar.n)
            return
        elif step % log_freq and step != total_steps and step != began[0] + 1:
            return
        else:
            seconds = (time.monotonic() - began[1]) / (step - began[0]) * (total_steps - step)
            line = f"{line}  {_columns(record)}  left {clock(seconds)}"

        # Printed past tqdm, a line would tear the bar.
        if bar is not None:
            bar.write(line, file=out)
        else:
            print(line, file=out, flush=True)

    def close() -> None:
        if bar is not None:
            bar.close()

    return Sink(write, close, "the console")


def summary(
    validation: Record | None,
    *,
    checkpoint: Path | str | None,
    tensorboard: Path | None,
    prompt: str = "The ",
    modules: Sequence[str] = (),
) -> str:
    """The text for the end of a run: its last validation, where its files are, and the commands that use them.

    `modules` hold components of the user's own, which the commands have to be told to trust.
    """
    # The commands can be pasted as they are: paths are quoted, and the Python is this one.
    python = _python()
    lines = []
    if validation is not None:
        lines += [f"validation   {_short(validation)}  (step {validation['step']})"]
        sets = of_sets(validation)
        width = max([10, *map(len, sets)])
        lines += [f"  {name:<{width}} {_short(numbers)}" for name, numbers in sets.items()]
    if tensorboard is not None:
        lines += [
            f"curves       {tensorboard}",
            f"  {python} -m tensorboard.main --logdir {shlex.quote(str(tensorboard))}",
        ]
    if checkpoint is not None:
        command = f"--checkpoint {shlex.quote(str(checkpoint))} --prompt {shlex.quote(prompt)}"
        command += f" {TRUST} {shlex.join(modules)}" if modules else ""
        lines += [f"checkpoint   {checkpoint}", f"  {python} -m titan_moe.generate {command}"]
    return "\n".join(lines)


def _python() -> str:
    """The shortest words that call this Python from the current folder."""
    python = shutil.which("python")
    if python and os.path.realpath(Path(python).parent) == os.path.realpath(Path(sys.executable).parent):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith("..") else relative)


def _watched(record: Record) -> dict[str, float]:
    """The numbers that people watch; those that a record lacks are left out."""
    loss = record.get("loss")  # a task has none
    perplexity = None if loss is None else math.exp(min(loss, 700.0))
    values = {
        "loss": loss,
        "perplexity": record.get("perplexity", perplexity),
        "accuracy": record.get("accuracy"),
        "acc": record.get("acc"),
        "acc_norm": record.get("acc_norm"),
        "MaxVio": record.get("maxvio_batch", record.get("maxvio_global")),
        "tokens/s": record.get("tokens_per_second"),
    }
    return {name: value for name, value in values.items() if value is not None}


_WIDE = {
    "loss": "7.4f",
    "perplexity": "9.2f",
    "accuracy": "6.2%",
    "acc": "6.2%",
    "acc_norm": "6.2%",
    "MaxVio": "6.3f",
    "tokens/s": "9,.0f",
}


def _validation_lines(step: str, record: Record) -> str:
    """A validation behind its step, and below it a line for each validation set and task, with columns as they have."""
    lines = {record["kind"]: record, **of_sets(record)}
    width = max(map(len, lines))
    texts = [f"{name:<{width}}  {_columns(numbers)}" for name, numbers in lines.items()]
    return f"{step}  " + f"\n{' ' * len(step)}  ".join(texts)


def _columns(record: Record) -> str:
    """Watched numbers, aligned below those of other records."""
    return "  ".join(f"{name} {value:{_WIDE[name]}}" for name, value in _watched(record).items())


def _short(record: Record) -> str:
    """Watched numbers for a line that also has a bar."""
    watched = _watched(record)
    texts = [f"loss {watched['loss']:.4f}"] if "loss" in watched else []
    texts += [f"ppl {watched['perplexity']:.4g}"] if "perplexity" in watched else []
    names = ("accuracy", "acc", "acc_norm", "MaxVio")
    texts += [f"{name} {watched[name]:{_WIDE[name]}}" for name in names if name in watched]
    if "tokens/s" in watched:
        texts.append(f"{watched['tokens/s'] / 1000:.3g}k tok/s")
    return "  ".join(" ".join(text.split()) for text in texts)
