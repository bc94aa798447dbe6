"""Where numbers go: metrics.jsonl, TensorBoard, the console, Weights & Biases.

A record is one flat dictionary of a step: `step`, `kind` ('train' or 'validation') and numbers; it may carry `load`, an
(L, E) array of tokens per expert. Only the main rank has sinks. Slow packages are imported where they are used.
"""

import io
import json
import logging
import math
import os
import re
import secrets
import shlex
import shutil
import socket
import sys
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from titan_moe.cut import cut
from titan_moe.files import appender, write_atomic

logger = logging.getLogger(__name__)
Record = Mapping[str, Any]
TAIL = 1 << 21  # bytes at the end of metrics.jsonl that hold the last step and the last validation
_PER_LAYER = re.compile(r".*/layer_\d+")


class Sink(NamedTuple):
    """A place for records. If `write` raises OSError, that record is late or lost, and the next one may succeed.

    `sync` waits until what was written is on the disk, where a power cut cannot take it.
    """

    write: Callable[[Record], None]
    close: Callable[[], None]
    name: str
    sync: Callable[[], None] = lambda: None


def fan_out(*sinks: Sink) -> Sink:
    """One sink that writes to all. A full disk or a closed pipe stops none of the others and no training: it warns."""
    failing: set[str] = set()
    gone: set[str] = set()  # a closed pipe stays closed

    def attempt(sink: Sink, task: Callable[[], None]) -> None:
        if sink.name in gone:
            return
        try:
            task()
        except OSError as error:
            if sink.name not in failing:
                logger.error("CANNOT WRITE TO %s (%s): training goes on without it", sink.name, error)
            failing.add(sink.name)
            if isinstance(error, BrokenPipeError):
                gone.add(sink.name)
        else:
            if sink.name in failing:
                logger.warning("%s can be written again", sink.name)
            failing.discard(sink.name)

    def write(record: Record) -> None:
        for sink in sinks:
            attempt(sink, lambda sink=sink: sink.write(record))

    def close() -> None:
        for sink in sinks:
            attempt(sink, sink.close)

    def sync() -> None:
        for sink in sinks:
            try:  # no `attempt`: a full disk refuses writes and syncs what it has
                sink.sync()
            except OSError as error:
                logger.error("CANNOT SYNC %s (%s): a power cut may take its last lines", sink.name, error)

    return Sink(write, close, ", ".join(sink.name for sink in sinks), sync)


def jsonl(path: Path, resume_step: int) -> Sink:
    """Append each record's numbers as one line of JSON; a number that is not finite becomes null.

    An array `NAME/experts` (L, E) becomes the numbers `NAME/layer_I/expert_J`.

    Lines of steps after `resume_step`, and torn ones, are first moved to a file beside it (`titan_moe.cut`), so
    that after a crash the file holds each step once. A record that the disk refuses is kept and tried again with the
    next one.
    """
    cut(path, resume_step)
    append, sync, close = appender(path)

    def write(record: Record) -> None:
        values = {**_scalars(record), **_of_experts(record)}
        numbers = {key: None if _is_odd(value) else value for key, value in values.items()}
        append((json.dumps(numbers, allow_nan=False) + "\n").encode())

    return Sink(write, close, str(path), sync)


def last_validation() -> tuple[Sink, Callable[[], Record | None]]:
    """A sink that keeps the last validation that it is given, and the function that tells it."""
    kept: list[Record] = []

    def write(record: Record) -> None:
        if record["kind"] == "validation":
            kept[:] = [record]

    return Sink(write, lambda: None, "the summary"), lambda: kept[0] if kept else None


def last_records(path: Path) -> tuple[dict[str, Any] | None, dict[str, Any] | None]:
    """The last whole line of kind train and of kind validation, from the end of the file alone."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL))
            lines = file.read().split(b"\n")[1 if size > TAIL else 0 :]
    except FileNotFoundError:
        return None, None
    found: dict[str, dict[str, Any]] = {}
    for line in reversed(lines):
        record = parse_record(line)
        if record is not None:
            found.setdefault(record["kind"], record)
        if len(found) == 2:
            break
    return found.get("train"), found.get("validation")


def parse_record(line: bytes | str) -> dict[str, Any] | None:
    """One line of metrics.jsonl; None where it is torn."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("step"), int) or "kind" not in record:
        return None
    return {key: math.nan if value is None else value for key, value in record.items()}


def tensorboard(folder: Path, resume_step: int, heatmap_freq: int = 1000) -> Sink:
    """Write `KIND/KEY` scalars (those of single layers as `KIND_per_layer/KEY`), and the load as a picture.

    Pictures, drawn when a record carries `load`: each validation and each `heatmap_freq`-th training step (one takes
    as long as many scalars); those of `NAME/experts` always. What an earlier run wrote after `resume_step` is purged
    from view.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
    from tensorboard.summary.writer.record_writer import RecordWriter

    from titan_moe.heatmap import picture

    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{socket.gethostname()}.{os.getpid()}"
    append, sync, close = appender(folder / name)

    def write_event(event: Event) -> None:
        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        append(buffer.getvalue())

    write_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
    write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(record: Record) -> None:
        step, kind = record["step"], record["kind"]
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in _tagged(record).items()]
        maps = {key: value for key, value in record.items() if key.endswith("/experts")}
        if "load" in record and (kind != "train" or step % heatmap_freq == 0) and "load/experts" not in maps:
            maps["load"] = record["load"]
        for key, array in maps.items():
            png, (width, height) = picture(array, f"{kind}, step {step}", key.removesuffix("/experts"))
            image = Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png)
            tag = f"{kind}/load" if key == "load/experts" else f"{kind}/{key}"
            values.append(Summary.Value(tag=tag, image=image))
        write_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    return Sink(write, close, str(folder), sync)


def console(total_steps: int, log_freq: int, *, is_terminal: bool, stream: TextIO | None = None) -> Sink:
    """Show progress on `stream` (standard output): a bar on a terminal, else a line for each `log_freq`-th step.

    Give it every record; it also shows the first and the last step, and each validation as a line of its own.
    """
    out = stream or sys.stdout
    bar: Any = None
    began: tuple[int, float] | None = None

    def write(record: Record) -> None:
        nonlocal bar, began
        step = record["step"]
        if began is None:
            began = (max(step - 1, 0), time.monotonic() - record.get("step_seconds", 0.0))
            if is_terminal:
                from tqdm import tqdm

                layout = "step {n_fmt}/{total_fmt} {bar} {desc}  {remaining} left"
                bar = tqdm(total=total_steps, initial=began[0], file=out, bar_format=layout, dynamic_ncols=True)
        line = f"step {step:>{len(str(total_steps))}}/{total_steps}"
        if record["kind"] != "train":
            line = f"{line}  {record['kind']}  {_columns(record)}"
        elif bar is not None:
            bar.set_description_str(_short(record), refresh=False)
            bar.update(step - bar.n)
            return
        elif step % log_freq and step != total_steps and step != began[0] + 1:
            return
        else:
            seconds = (time.monotonic() - began[1]) / (step - began[0]) * (total_steps - step)
            line = f"{line}  {_columns(record)}  left {clock(seconds)}"
        if bar is not None:
            bar.write(line, file=out)
        else:
            print(line, file=out, flush=True)

    def close() -> None:
        if bar is not None:
            bar.close()

    return Sink(write, close, "the console")


def check_wandb() -> None:
    """Raise ValueError if the package that `wandb` needs is missing."""
    if find_spec("wandb") is None:
        raise ValueError("metrics.enable_wandb needs a package: pip install 'titan_moe[wandb]'")


def wandb(folder: Path, config: Mapping[str, Any], project: str = "titan_moe") -> Sink:
    """Log `KIND/KEY` numbers to Weights & Biases; the run is named after `folder`, and its id is kept there to resume.

    Raises ValueError if the package is missing.
    """
    check_wandb()
    import wandb as client  # pyrefly: ignore[missing-import]

    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4) + "\n")
    run_id = id_file.read_text(encoding="utf-8").strip()
    name = folder.resolve().name
    run = client.init(project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=dict(config))
    run.define_metric("*", step_metric="step")  # steps that run again after a crash are drawn again, not refused

    def write(record: Record) -> None:
        run.log({**_tagged(record), "step": record["step"]})

    return Sink(write, run.finish, f"wandb run {run_id}")


def summary(
    validation: Record | None, *, checkpoint: Path | None, tensorboard: Path | None, prompt: str = "The "
) -> str:
    """What to say when a run is over: its last validation, where things are, the commands that use them."""
    python = _python()
    lines = []
    if validation is not None:
        lines += [f"validation   {_short(validation)}  (step {validation['step']})"]
    if tensorboard is not None:
        lines += [
            f"curves       {tensorboard}",
            f"  {python} -m tensorboard.main --logdir {shlex.quote(str(tensorboard))}",
        ]
    if checkpoint is not None:
        command = f"--checkpoint {shlex.quote(str(checkpoint))} --prompt {shlex.quote(prompt)}"
        lines += [f"checkpoint   {checkpoint}", f"  {python} -m titan_moe.generate {command}"]
    return "\n".join(lines)


def _python() -> str:
    """How to call this Python from this folder, as short as works."""
    found = shutil.which("python")
    if found and os.path.realpath(Path(found).parent) == os.path.realpath(Path(sys.executable).parent):
        return "python"
    relative = os.path.relpath(sys.executable)
    return shlex.quote(sys.executable if relative.startswith("..") else relative)


def _watched(record: Record) -> dict[str, float]:
    """The numbers that people watch; those that a record lacks are left out."""
    loss = record["loss"]
    found = {
        "loss": loss,
        "perplexity": record.get("perplexity", math.exp(min(loss, 700.0))),
        "accuracy": record.get("accuracy"),
        "MaxVio": record.get("maxvio_batch", record.get("maxvio_global")),
        "tokens/s": record.get("tokens_per_second"),
    }
    return {name: value for name, value in found.items() if value is not None}


_WIDE = {"loss": "7.4f", "perplexity": "9.2f", "accuracy": "6.2%", "MaxVio": "6.3f", "tokens/s": "9,.0f"}


def _columns(record: Record) -> str:
    """Watched numbers, aligned below those of other records."""
    return "  ".join(f"{name} {value:{_WIDE[name]}}" for name, value in _watched(record).items())


def _short(record: Record) -> str:
    """Watched numbers for a line that also has a bar."""
    watched = _watched(record)
    texts = [f"loss {watched['loss']:.4f}", f"ppl {watched['perplexity']:.4g}"]
    texts += [f"{name} {watched[name]:{_WIDE[name]}}" for name in ("accuracy", "MaxVio") if name in watched]
    if "tokens/s" in watched:
        texts.append(f"{watched['tokens/s'] / 1000:.3g}k tok/s")
    return "  ".join(" ".join(text.split()) for text in texts)


def clock(seconds: float) -> str:
    """Hours:minutes:seconds."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def _scalars(record: Record) -> dict[str, Any]:
    """The record without its arrays; zero-dimensional ones become numbers."""
    plain = {key: value.item() if getattr(value, "ndim", None) == 0 else value for key, value in record.items()}
    return {key: value for key, value in plain.items() if isinstance(value, (str, int, float))}


def _is_odd(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _tagged(record: Record) -> dict[str, float]:
    """Numbers by their name in TensorBoard and wandb."""
    kind = record["kind"]
    numbers = {key: value for key, value in _scalars(record).items() if key not in {"step", "kind"}}
    return {
        f"{kind}{'_per_layer' if _PER_LAYER.fullmatch(key) else ''}/{key}": value
        for key, value in numbers.items()
        if not isinstance(value, str)
    }


def _of_experts(record: Record) -> dict[str, float]:
    """The numbers of each expert, from the arrays that the record carries of them."""
    arrays = {key.removesuffix("/experts"): value for key, value in record.items() if key.endswith("/experts")}
    return {
        f"{name}/layer_{layer}/expert_{expert}": value
        for name, array in arrays.items()
        for layer, values in enumerate(array.tolist())
        for expert, value in enumerate(values)
    }


def has_record(path: Path, step: int, kind: str) -> bool:
    """Whether a jsonl file, whose lines are whole once it was opened as a sink, has a record of a step."""
    if not path.exists():
        return False
    with open(path, encoding="utf-8") as file:
        return any(record["step"] == step and record["kind"] == kind for record in map(json.loads, file))
