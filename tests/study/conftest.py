import copy
import logging
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from titan_moe.study import cli
from titan_moe.study.grid import Run
from titan_moe.study.report.page import Written

FAKE = Path(__file__).parent / "fake_train.py"
SMALL: dict[str, Any] = {
    "study": {"seeds": [1, 2]},
    "config": {
        "model": {"num_layers": 2},
        "moe": {"num_experts": 4},
        "balancer": {"aux_loss": {"coeff": 0.1}},
        "training": {"steps": 8},
        "validation": {"freq": 4},
    },
    "axes": {"coeff": {"key": "balancer.aux_loss.coeff", "values": [0, 0.1]}},
}
Write = Callable[..., str]
Study = Callable[..., int]


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """Studies note signals and set up logging: give pytest's back."""
    logger, numbers = logging.getLogger("titan_moe"), (signal.SIGINT, signal.SIGTERM)
    before, handlers = (logger.handlers, logger.propagate, logger.level), [signal.getsignal(n) for n in numbers]
    yield
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a study file, SMALL with changes by dotted key (None takes away), into the working folder."""
    monkeypatch.chdir(tmp_path)

    def make(name: str = "small.toml", text: str | None = None, **changes: Any) -> str:
        document = copy.deepcopy(SMALL)
        for key, value in changes.items():
            *parents, last = key.split("__")
            table = document
            for parent in parents:
                table = table.setdefault(parent, {})
            if value is None:
                table.pop(last)
            else:
                table[last] = value
        (tmp_path / name).write_text(tomli_w.dumps(document) if text is None else text, encoding="utf-8")
        return name

    return make


def fake_command(nproc: int) -> Callable[[Run], list[str]]:
    return lambda run: [sys.executable, str(FAKE), "--job.config_file", str(run.folder / "point.toml")]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings are those of fake_train.py."""
    monkeypatch.setattr(cli, "train_command", fake_command)


@pytest.fixture
def study(fake: None, monkeypatch: pytest.MonkeyPatch) -> Study:
    """Run a study of fake trainings without drawing a report; the exit code."""
    monkeypatch.setattr(
        cli, "write_report", lambda study, runs, refresh=None: Written(study.folder / "report.html", [])
    )
    return lambda *args: cli.main(list(args))
