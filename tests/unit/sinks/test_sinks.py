"""Sinks: each step once whatever happens, and no failure to write ends a run."""

import errno
import io
import json
import logging
import math
import os
import resource
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan_moe.runtime.files import appender, write_atomic
from titan_moe.sinks.console import console, summary
from titan_moe.sinks.files import jsonl
from titan_moe.sinks.heatmap import load_figure
from titan_moe.sinks.sink import Sink, fan_out, last_validation, of_sets, tagged, under_set
from titan_moe.sinks.trackers import tensorboard, wandb


def train(step: int, **more: Any) -> dict[str, Any]:
    record = {"step": step, "kind": "train", "loss": 1.0 + 1 / step, "maxvio_batch": 0.25, "maxvio_batch/layer_3": 0.5}
    return {**record, "tokens_per_second": 12345.6, "lr/dense": 1e-3, **more}


def validation(step: int, **more: Any) -> dict[str, Any]:
    numbers = {"loss": 2.0, "perplexity": math.exp(2.0), "accuracy": 0.3125, "maxvio_global": 0.125}
    return {"step": step, "kind": "validation", **numbers, **more}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


class LimitedFileSize:
    """Every write beyond `size` bytes in a file fails, as on a full disk (EFBIG instead of ENOSPC)."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __enter__(self) -> None:
        self.old = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.old[1]))

    def __exit__(self, *_) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.old)


# files


def test_write_atomic(tmp_path):
    path = tmp_path / "f"
    write_atomic(path, "ü\n")
    assert path.read_bytes() == "ü\n".encode()
    with LimitedFileSize(10), pytest.raises(OSError, match="too large"):
        write_atomic(path, "x" * 11)
    assert path.read_bytes() == "ü\n".encode()
    assert [p.name for p in tmp_path.iterdir()] == ["f"]


def test_appender_keeps_pieces_whole(tmp_path):
    append, _, close = appender(tmp_path / "f")
    append(b"one\n")
    with LimitedFileSize(6):
        for piece in (b"two\n", b"three\n"):
            with pytest.raises(OSError, match="too large"):
                append(piece)
            assert (tmp_path / "f").read_bytes() == b"one\n"  # the two bytes that fitted are gone
    append(b"four\n")
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\nthree\nfour\n"
    with LimitedFileSize(20), pytest.raises(OSError, match="too large"):
        append(b"five\n")
    close()
    assert (tmp_path / "f").read_bytes() == b"one\ntwo\nthree\nfour\nfive\n"


# jsonl


def test_jsonl(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    sink = jsonl(path, 0)
    sink.write(train(1, loss=math.nan, grad_norm=math.inf, load=torch.ones(2, 4)))
    assert lines_of(path) == [{k: v for k, v in train(1).items() if k != "loss"} | {"loss": None, "grad_norm": None}]
    sink.write(train(2, loss=torch.tensor(0.5), aux_loss=np.float32(0.25), num_tokens=np.int64(2**40)))
    assert lines_of(path)[1] == train(2, loss=0.5, aux_loss=0.25, num_tokens=2**40)
    sink.close()


def test_jsonl_holds_each_step_once_after_a_crash(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = jsonl(path, 0)
    for step in range(1, 8):
        sink.write(train(step))
        if step % 2 == 0:
            sink.write(validation(step))
    sink.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b"\0\0\0\n[1]\n" + whole[:40])  # what a power cut and a kill leave
    sink = jsonl(path, 4)
    assert [(r["step"], r["kind"][0]) for r in lines_of(path)] == [
        (1, "t"),
        (2, "t"),
        (2, "v"),
        (3, "t"),
        (4, "t"),
        (4, "v"),
    ]
    for step in range(5, 9):
        sink.write(train(step))
    sink.close()
    assert [r["step"] for r in lines_of(path) if r["kind"] == "train"] == list(range(1, 9))
    jsonl(path, 8).close()
    before = path.stat()
    jsonl(path, 8).close()  # nothing to drop: not rewritten
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    jsonl(path, 0).close()
    assert path.read_bytes() == b""


def test_jsonl_torn_at_every_byte(tmp_path):
    path = tmp_path / "metrics.jsonl"
    text = b'{"step": 1}\n{"step": 2}\n'
    for length in range(len(text) + 1):
        path.write_bytes(text[:length])
        jsonl(path, 9).close()
        assert path.read_bytes() == text[: 12 * (length // 12)]


def test_full_disk_does_not_stop_training(tmp_path, caplog):
    """The kernel refuses writes for a while: one loud line, other sinks go on, nothing of the jsonl is lost."""
    seen = []
    path = tmp_path / "metrics.jsonl"
    other = Sink(lambda record: seen.append(record["step"]), lambda: None, "other")
    sink = fan_out(jsonl(path, 0), tensorboard(tmp_path / "tb", 0), other)
    sink.write(train(1))
    with LimitedFileSize(200):
        for step in (2, 3, 4):
            sink.write(train(step))
        assert [r["step"] for r in lines_of(path)] == [1]
    assert seen == [1, 2, 3, 4]
    errors = [record.getMessage() for record in caplog.records]
    assert len(errors) == 2
    assert "CANNOT WRITE TO" in errors[0]
    assert str(path) in errors[0]
    assert str(tmp_path / "tb") in errors[1]
    caplog.clear()
    sink.write(train(5))
    assert [r["step"] for r in lines_of(path)] == [1, 2, 3, 4, 5]
    assert len([r for r in caplog.records if "can be written again" in r.getMessage()]) == 2
    sink.close()
    assert sorted({e.step for e in events(tmp_path / "tb").Scalars("train/loss")}) == [1, 2, 3, 4, 5]


def test_bugs_are_not_hidden():
    def fail(record):
        raise KeyError("loss")

    with pytest.raises(KeyError):
        fan_out(Sink(fail, lambda: None, "x")).write({})


def test_close_reports_what_is_lost(tmp_path, caplog):
    sink = fan_out(jsonl(tmp_path / "m", 0))
    with LimitedFileSize(0):
        sink.close()
        assert caplog.text == ""  # nothing waited
    sink = fan_out(jsonl(tmp_path / "m", 0))
    with LimitedFileSize(0):
        sink.write(train(1))
        sink.close()
    assert caplog.text.count("CANNOT WRITE") == 1


def test_sync_reaches_the_files_and_ends_nothing(tmp_path, monkeypatch, caplog):
    """A disk that cannot sync is told and no more; what was refused before is not said to be written by it."""
    synced, fsync = [], os.fsync

    def note(descriptor):
        fsync(descriptor)
        synced.append(os.fstat(descriptor).st_size)

    sink = fan_out(jsonl(tmp_path / "m", 0), tensorboard(tmp_path / "tb", 0), last_validation()[0])
    sink.write(train(1))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", note)
        sink.sync()
    (event_file,) = (tmp_path / "tb").iterdir()
    assert synced == [(tmp_path / "m").stat().st_size, event_file.stat().st_size]

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    with LimitedFileSize(100):
        sink.write(train(2))
    assert caplog.text.count("CANNOT WRITE TO") == 2
    caplog.clear()
    sink.sync()
    assert caplog.text == ""
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        sink.sync()
    assert [record.levelno for record in caplog.records] == [logging.ERROR] * 2
    assert f"CANNOT SYNC {tmp_path / 'm'} ([Errno 5] Input/output error)" in caplog.text
    sink.close()
    assert [r["step"] for r in lines_of(tmp_path / "m")] == [1, 2]


def test_last_validation():
    sink, last = last_validation()
    assert last() is None
    for record in (train(1), validation(1, loss=3.0), train(2), validation(2), train(3)):
        sink.write(record)
    assert last() == validation(2)


# tensorboard


def events(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def test_tensorboard(tmp_path):
    sink = tensorboard(tmp_path, 0, heatmap_freq=2)
    load = torch.tensor([[1.0, 3.0], [2.0, 2.0]])
    for step in (1, 2, 3):
        sink.write(train(step, load=load))
        assert (events(tmp_path).Scalars("train/loss")[-1].step) == step  # on disk at once
    sink.write(validation(3, load=load))
    sink.close()
    found = events(tmp_path)
    assert set(found.Tags()["scalars"]) == {
        *("train/loss", "train/maxvio_batch", "train/tokens_per_second", "train/lr/dense"),
        *("train_per_layer/maxvio_batch/layer_3",),
        *("validation/loss", "validation/perplexity", "validation/accuracy", "validation/maxvio_global"),
    }
    assert [(e.step, round(e.value, 5)) for e in found.Scalars("train/loss")] == [(1, 2.0), (2, 1.5), (3, 1.33333)]
    assert [e.step for e in found.Images("train/load")] == [2]
    (image,) = found.Images("validation/load")
    assert image.step == 3
    assert image.encoded_image_string.startswith(b"\x89PNG")
    width, height = (int.from_bytes(image.encoded_image_string[i : i + 4], "big") for i in (16, 20))
    assert (width, height) == (image.width, image.height)


def test_tensorboard_resumes(tmp_path):
    first = tensorboard(tmp_path, 0)
    for step in range(1, 8):
        first.write(train(step, loss=1.0))
    first.close()
    second = tensorboard(tmp_path, 4)
    for step in range(5, 9):
        second.write(train(step, loss=2.0))
    second.close()
    curve = [(e.step, e.value) for e in events(tmp_path).Scalars("train/loss")]
    assert curve == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 1.0), (5, 2.0), (6, 2.0), (7, 2.0), (8, 2.0)]


@pytest.mark.parametrize("shape", [(4, 8), (24, 128), (1, 2)])
def test_heatmap(shape):
    load = torch.rand(shape) + 0.5
    load[0, 1] = 0
    if shape[0] > 2:
        load[2] = 0  # a layer without tokens: no warning, no number
    figure = load_figure(load, "title")
    axes, bar = figure.axes
    assert (axes.get_xlabel(), axes.get_ylabel(), bar.get_ylabel()) == ("expert", "MoE layer", "load / ideal load")
    image = axes.images[0]
    assert (image.norm.vmin, image.norm.vmax) == (0.0, 2.0)  # centred at 1
    shown = np.ma.filled(np.ma.asarray(image.get_array()), np.nan)
    assert shown.shape == shape
    np.testing.assert_allclose(shown[0], (load[0] / load[0].mean()).numpy(), rtol=1e-6)
    assert len(axes.get_xticks()) <= 16
    assert len(axes.get_yticks()) <= 16
    assert len(axes.texts) == (0 if shape[1] > 16 else load.numel())
    assert "0.00 to" in axes.get_title()


def test_slow_packages_are_imported_late():
    code = (
        "import sys, titan_moe.sinks; print(*{'torch', 'matplotlib', 'tensorboard', 'tqdm', 'wandb'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "\n"


# console


def test_console_lines():
    out = io.StringIO()
    sink = console(25, 10, is_terminal=False, stream=out)
    for step in range(3, 26):
        sink.write(train(step, step_seconds=0.5))
        if step == 20:
            sink.write(validation(step))
    sink.close()
    lines = out.getvalue().splitlines()
    assert [line.split("/")[0] for line in lines] == ["step  3", "step 10", "step 20", "step 20", "step 25"]
    assert lines[1].startswith(
        "step 10/25  loss  1.1000  perplexity      3.00  MaxVio  0.250  tokens/s    12,346  left 0:00:0"
    )
    assert lines[3] == "step 20/25  validation  loss  2.0000  perplexity      7.39  accuracy 31.25%  MaxVio  0.125"
    assert lines[4].endswith("left 0:00:00")


def test_validation_sets_on_the_console_and_by_their_names():
    sets = {"code": {"loss": 3.0, "perplexity": math.exp(3.0), "accuracy": 0.5, "maxvio_global": 0.25}, "c2": {}}
    sets["c2"] = {**sets["code"], "loss": 1.0, "maxvio_global/layer_0": 0.5}
    record = validation(4, **under_set("code", sets["code"]), **under_set("c2", sets["c2"]))
    assert of_sets(record) == sets
    assert of_sets(validation(4)) == {}
    tags = tagged(record)
    assert (tags["validation/loss"], tags["validation/code/loss"]) == (2.0, 3.0)
    assert tags["validation_per_layer/c2/maxvio_global/layer_0"] == 0.5
    assert len(tags) == 4 + 4 + 5

    # a line each, with the columns of the line above
    stream = io.StringIO()
    console(4, 1, is_terminal=False, stream=stream).write(record)
    lines = stream.getvalue().splitlines()
    assert [line.split()[-8:-6] for line in lines] == [["loss", "2.0000"], ["loss", "3.0000"], ["loss", "1.0000"]]
    assert [line.partition("loss")[0].split() for line in lines] == [["step", "4/4", "validation"], ["code"], ["c2"]]
    assert len({line.index("loss") for line in lines}) == len({line.index("MaxVio") for line in lines}) == 1
    assert "\n  code       loss 3.0000  ppl 20.09" in summary(record, checkpoint=None, tensorboard=None)


def test_console_of_a_dense_model_that_diverged():
    out = io.StringIO()
    console(5, 1, is_terminal=False, stream=out).write({"step": 1, "kind": "train", "loss": 1e9})
    assert "MaxVio" not in out.getvalue()
    out = io.StringIO()
    console(5, 1, is_terminal=False, stream=out).write({"step": 1, "kind": "train", "loss": math.nan})
    assert "loss     nan" in out.getvalue()


def test_console_bar():
    out = io.StringIO()
    sink = console(12, 5, is_terminal=True, stream=out)
    for step in range(5, 13):
        sink.write(train(step))
        if step == 10:
            sink.write(validation(step))
    sink.close()
    text = out.getvalue()
    assert "step 12/12" in text.split("\r")[-1]
    assert " loss 1.0833  ppl 2.955  MaxVio 0.250  12.3k tok/s  00:00 left" in text.split("\r")[-1]
    assert "\nstep" not in text.split("validation")[1]
    assert "step 10/12  validation  loss  2.0000" in text


def test_closed_pipe(caplog):
    class Closed(io.StringIO):
        def write(self, _):
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    sink = fan_out(console(5, 1, is_terminal=False, stream=Closed()))
    for step in (1, 2, 3):
        sink.write(train(step))
    assert caplog.text.count("the console") == 1
    assert logging.ERROR in {record.levelno for record in caplog.records}


def test_summary(tmp_path):
    checkpoint, curves = tmp_path / "a run" / "checkpoint" / "step-9", tmp_path / "a run" / "tensorboard"
    text = summary(validation(9), checkpoint=checkpoint, tensorboard=curves, prompt="def ")
    assert "loss 2.0000  ppl 7.389  accuracy 31.25%  MaxVio 0.125  (step 9)" in text
    assert f"-m titan_moe.generate --checkpoint '{checkpoint}' --prompt 'def '" in text
    assert f"--logdir '{curves}'" in text
    python = text.splitlines()[-1].split(" -m ")[0].strip()
    printed = subprocess.check_output(f'{python} -c "import sys; print(sys.prefix)"', shell=True, text=True)
    assert printed.strip() == sys.prefix
    assert summary(None, checkpoint=None, tensorboard=None) == ""

    own = summary(None, checkpoint=checkpoint, tensorboard=None, modules=["my_moe.balancer", "my_moe.router"])
    assert own.endswith("--prompt 'The ' --trust_components my_moe.balancer my_moe.router")


# wandb


def test_wandb_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"metrics\.enable_wandb .* pip install 'titan_moe\[wandb\]'"):
        wandb(tmp_path, {})
    assert list(tmp_path.iterdir()) == []


def test_wandb_resumes_by_the_id_in_the_folder(tmp_path, monkeypatch):
    inits, logs = [], []
    run = types.SimpleNamespace(log=logs.append, finish=lambda: logs.append("end"), define_metric=lambda *a, **k: None)
    fake = types.SimpleNamespace(init=lambda **arguments: (inits.append(arguments), run)[1], __spec__="found")
    monkeypatch.setitem(sys.modules, "wandb", fake)
    folder = tmp_path / "moe8x"
    folder.mkdir()
    for step in (1, 2):
        sink = wandb(folder, {"lr": 1})
        sink.write(train(step, load=torch.ones(1, 2)))
        sink.close()
    assert inits[0] == inits[1]
    assert inits[0]["id"] == (folder / "wandb_id.txt").read_text().strip()
    assert (inits[0]["name"], inits[0]["config"], inits[0]["resume"]) == ("moe8x", {"lr": 1}, "allow")
    assert logs[1] == "end"
    assert logs[2]["step"] == 2
    assert logs[2]["train_per_layer/maxvio_batch/layer_3"] == 0.5
    assert "train/load" not in logs[2]
