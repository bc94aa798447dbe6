"""Lines of metrics.jsonl that a run is to have no more: moved, never lost, and what is missing is told."""

import json
import logging
from pathlib import Path

import pytest

from titan_moe.sinks import files
from titan_moe.sinks.files import cut


def line(step: int, kind: str = "train") -> bytes:
    return json.dumps({"step": step, "kind": kind, "loss": 1 / step}).encode() + b"\n"


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    """Steps 1 to 8, with validations after 4 and 8."""
    path = tmp_path / "run" / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(b"".join(line(s) + (line(s, "validation") if s % 4 == 0 else b"") for s in range(1, 9)))
    return path


def test_later_lines_move_to_the_end_of_one_file(metrics: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    before = metrics.read_bytes()
    cut(metrics, 8)
    assert (metrics.read_bytes(), caplog.text, len(list(metrics.parent.iterdir()))) == (before, "", 1)
    moved = metrics.with_name("metrics.cut.jsonl")
    cut(metrics, 6)
    assert metrics.read_bytes() + moved.read_bytes() == before
    cut(metrics, 4)
    assert moved.read_bytes() == line(7) + line(8) + line(8, "validation") + line(5) + line(6)
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert "from step 6: 3 lines of later steps and 0 torn ones moved" in caplog.records[0].getMessage()
    assert str(moved) in caplog.records[0].getMessage()


def test_torn_lines_are_kept_as_text(metrics: Path) -> None:
    metrics.write_bytes(metrics.read_bytes() + b'\0\xff\n[1]\n{"step": 9, "ki')
    cut(metrics, 8)
    assert metrics.read_bytes().endswith(line(8, "validation"))
    moved = map(json.loads, metrics.with_name("metrics.cut.jsonl").read_text().splitlines())
    assert [(record["kind"], record["text"]) for record in moved] == [
        ("torn", "\0\ufffd\n"),
        ("torn", "[1]\n"),
        ("torn", '{"step": 9, "ki'),
    ]


def test_a_crash_on_the_way_leaves_each_line_somewhere(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def crash(*_: object) -> None:
        raise OSError(5, "Input/output error")

    before = metrics.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(files, "drop", crash)
        with pytest.raises(OSError, match="Input"):
            cut(metrics, 7)
    assert metrics.read_bytes() == before
    moved = metrics.with_name("metrics.cut.jsonl")
    with open(moved, "ab") as file:
        file.write(b'{"step": 8')  # what a power cut left of another try
    cut(metrics, 7)
    assert moved.read_bytes().splitlines(keepends=True)[-3:] == [b'{"step": 8\n', line(8), line(8, "validation")]


@pytest.mark.parametrize(
    ("steps", "told"),
    [
        (range(1, 9), ""),
        (range(3, 9), "no line of 2 of the 8 steps that the run goes on from: 1 to 2"),
        (range(1, 7), "no line of 2 of the 8 steps that the run goes on from: 7 to 8"),
        ((), "no line of 8 of the 8 steps that the run goes on from: 1 to 8"),
        ((1, 3, 5, 7), "no line of 4 of the 8 steps that the run goes on from: 2, 4, 6 and 1 more"),
    ],
)
def test_gaps_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture, steps: tuple[int, ...], told: str) -> None:
    path = tmp_path / "metrics.jsonl"
    if steps:
        path.write_bytes(b"".join(map(line, steps)) + line(8, "validation"))
    cut(path, 8)
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * bool(told)
    assert told in caplog.text
    assert str(path) in caplog.text or not told
