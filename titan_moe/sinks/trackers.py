"""Sinks for TensorBoard and Weights & Biases."""

import io
import os
import secrets
import socket
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from titan_moe.runtime.files import appender, write_atomic
from titan_moe.sinks.sink import Record, Sink, tagged


def tensorboard(folder: Path, resume_step: int, heatmap_freq: int = 1000) -> Sink:
    """Write `KIND/KEY` scalars (those of single layers as `KIND_per_layer/KEY`), and the load as a picture.

    Pictures, drawn when a record carries `load`: each validation and each `heatmap_freq`-th training step (one takes
    as long as many scalars); those of `NAME/experts` always. What an earlier run wrote after `resume_step` is purged
    from view.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyrefly: ignore[missing-module-attribute]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyrefly: ignore[missing-module-attribute]
    from tensorboard.summary.writer.record_writer import RecordWriter

    from titan_moe.sinks.heatmap import picture

    # Each start writes a file of its own: TensorBoard reads all files of a folder. Through an `appender` an event is
    # whole in it, and a write that fails raises at once.
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 1000:017d}.{socket.gethostname()}.{os.getpid()}"
    append, sync, close = appender(folder / name)

    def write_event(event: Event) -> None:
        buffer = io.BytesIO()
        RecordWriter(buffer).write(event.SerializeToString())
        append(buffer.getvalue())

    # A START event hides what an earlier run wrote from its step on; no file is changed.
    write_event(Event(wall_time=time.time(), file_version="brain.Event:2"))
    write_event(Event(wall_time=time.time(), step=resume_step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(record: Record) -> None:
        # All numbers of a record are one event, and so one write: whole in the file, or not there.
        step, kind = record["step"], record["kind"]
        values = [Summary.Value(tag=tag, simple_value=number) for tag, number in tagged(record).items()]

        # A picture of the load now and then. A record that has `load/experts` asks for it at its own step.
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

    # The id is written before the run is begun, so that a start that is killed at once is resumed, too.
    id_file = folder / "wandb_id.txt"
    if not id_file.exists():
        write_atomic(id_file, secrets.token_hex(4) + "\n")
    run_id = id_file.read_text(encoding="utf-8").strip()
    name = folder.resolve().name
    run = client.init(project=project, name=name, id=run_id, resume="allow", dir=str(folder), config=dict(config))
    run.define_metric("*", step_metric="step")  # steps that run again after a crash are drawn again, not refused

    def write(record: Record) -> None:
        run.log({**tagged(record), "step": record["step"]})

    return Sink(write, run.finish, f"wandb run {run_id}")
