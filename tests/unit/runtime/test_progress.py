import logging
import sys

import pytest

from titan_moe.runtime import progress
from titan_moe.runtime.progress import clock, progress_of


@pytest.fixture
def seconds(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_now_and_then(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress_of("counting") as show:
        for step in range(10):
            show(0.5 + step / 20, f"{step} sheep")
            seconds[0] += 10.0
    # A twentieth takes 10 seconds, and half was done before.
    assert caplog.messages == [
        "counting: 65%, 3 sheep, 0:01:10 left",
        "counting: 80%, 6 sheep, 0:00:40 left",
        "counting: 95%, 9 sheep, 0:00:10 left",
    ]


def test_without_a_known_part_there_is_no_time_left(seconds: list[float], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    with progress_of("counting") as show:
        for done in (None, 0.2, 0.4):
            seconds[0] += 31.0
            show(done, "sheep")
    assert caplog.messages == ["counting: sheep", "counting: 20%, sheep", "counting: 40%, sheep, 0:01:33 left"]


def test_nothing_is_shown_that_is_not_asked_for(
    seconds: list[float], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    with progress_of("counting", show=False) as show:
        seconds[0] += 100.0
        show(0.5)
    assert not caplog.messages
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with progress_of("counting") as show:
        for done in (None, 0.25, 0.75):
            progress.time.sleep(0.11)  # a bar is drawn ten times a second
            show(done, "sheep")
    drawn = capsys.readouterr().err.split("\r")
    assert any(text.split() == ["counting", "sheep"] for text in drawn)
    assert any("counting  25%" in text and text.rstrip().endswith("sheep") for text in drawn)
    assert any("counting  75%" in text and text.rstrip().endswith("sheep, 0:00:00 left") for text in drawn)
    assert not drawn[-1].strip()  # the line is left empty


def test_clock() -> None:
    assert clock(3671.4) == "1:01:11"
