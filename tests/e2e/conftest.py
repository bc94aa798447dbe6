import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.e2e.harness import STARTED, Ended, command, tiny_config, write_text


@pytest.fixture(autouse=True)
def _process_as_before() -> Iterator[None]:
    """Commands own their process: give pytest's back what they change in it."""
    logger, numbers = logging.getLogger("titan_moe"), (signal.SIGINT, signal.SIGTERM)
    before = logger.handlers, logger.propagate, logger.level
    handlers, threads = [signal.getsignal(number) for number in numbers], torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    while STARTED:
        STARTED.pop().kill()
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    torch._C._set_deterministic_fill_uninitialized_memory(True)
    logger.handlers, logger.propagate = before[:2]
    logger.setLevel(before[2])
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data (text.jsonl) and a token cache that all tests use."""
    folder = tmp_path_factory.mktemp("shared")
    write_text(folder / "text.jsonl")
    return folder


Arguments = Callable[..., list[str]]


@pytest.fixture
def arguments(tmp_path: Path, shared: Path) -> Arguments:
    """Arguments of a tiny run into tmp_path/NAME, with changes to its configuration file by dotted key."""

    def make(name: str = "run", **changes: object) -> list[str]:
        dotted = {key.replace("__", "."): value for key, value in changes.items()}
        where = {"data.path": [str(shared / "text.jsonl")], "data.cache_folder": str(shared / "cache")}
        config = tiny_config(tmp_path / f"{name}.toml", {**where, **dotted})
        return ["--job.config_file", str(config), "--job.dump_folder", str(tmp_path / name)]

    return make


@pytest.fixture
def train(arguments: Arguments) -> Callable[..., Ended]:
    """Train a tiny model into tmp_path/NAME; `more` are further words of the command line."""

    def run(name: str = "run", more: str = "", **changes: object) -> Ended:
        return command("train", [*arguments(name, **changes), *more.split()])

    return run
