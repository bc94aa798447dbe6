"""Runs on several sources of data: shares and stages, ranks, going on, and what a user can get wrong."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Command, Ended, command, end_two, records, start_two

Train = Callable[..., Ended]


@pytest.fixture
def sources(tmp_path: Path) -> dict[str, Any]:
    """Words for three quarters of two steps and half of the others, numbers for the rest."""
    words, numbers = tmp_path / "words.jsonl", tmp_path / "numbers.jsonl"
    words.write_text("".join(json.dumps({"text": f"a tale of {i} words " * 20}) + "\n" for i in range(60)))
    numbers.write_text("".join(json.dumps({"text": " ".join(map(str, range(i, i + 60)))}) + "\n" for i in range(60)))
    return {
        "words": {"path": str(words), "weight": 3, "until_step": 2},
        "numbers": {"path": str(numbers)},
        "more_words": {"path": str(words), "from_step": 3},
    }


def options(sources: dict[str, Any]) -> dict[str, Any]:
    return {"data__path": None, "data__sources": sources, "data__validation_fraction": 0.1}


def test_a_run_on_sources(train: Train, tmp_path: Path, sources: dict[str, Any]) -> None:
    ended = train(**options(sources), training__steps=6, training__global_batch_size=4, checkpoint__interval=3)
    assert ended.code == 0, ended.err
    assert "the run reads data.sources.words" in ended.err
    lines = records(tmp_path / "run")
    per_sequence = lines[0]["num_tokens"] // 4
    given = [[line[f"tokens/{name}"] // per_sequence for name in sources] for line in lines]
    assert given == [[3, 1, 0], [6, 2, 0], [6, 4, 2], [6, 6, 4], [6, 8, 6], [6, 10, 8]]
    assert [line["num_tokens"] for line in lines] == [per_sequence * sum(row) for row in given]
    validation = records(tmp_path / "run", "validation")[-1]
    assert math.isfinite(validation["loss"])

    # what is held out of the sources, by the tokens that each has of it: no third one for files that are there already
    by_source = {key.split("/")[1] for key in validation if key.startswith("validation/")}
    assert by_source == {"words", "numbers"}
    tokens = {name: validation[f"validation/{name}/num_tokens"] for name in by_source}
    mean = sum(tokens[name] * validation[f"validation/{name}/loss"] for name in by_source) / sum(tokens.values())
    assert validation["loss"] == pytest.approx(mean, rel=1e-6)
    assert validation["validation/words/loss"] != validation["validation/numbers/loss"]

    # an evaluation of files has nothing to do with the sources
    (tmp_path / "some.txt").write_text("a tale of some words\n" * 20)
    ended = command("evaluate", ["--checkpoint", str(tmp_path / "run"), "--data.path", str(tmp_path / "some.txt")])
    assert ended.code == 0, ended.err

    # the same folder again is the same run, and a part of it that goes on too
    assert "nothing to do" in train(**options(sources), training__steps=6, training__global_batch_size=4).out
    short = {**options(sources), "training__global_batch_size": 4, "checkpoint__interval": 3}
    constant = {"lr_scheduler__name": "constant"}
    assert train("part", "--training.steps=3", **short, **constant).code == 0
    assert train("part", "--training.steps=6", **short, **constant).code == 0
    assert train("whole", "--training.steps=6", **short, **constant).code == 0
    assert records(tmp_path / "part") == records(tmp_path / "whole")


def test_ranks_share_the_sources(arguments: Arguments, tmp_path: Path, sources: dict[str, Any]) -> None:
    batches = {"training__steps": 4, "training__global_batch_size": 4, "training__local_batch_size": 1}
    words = arguments("one", **options(sources), **batches)
    assert command("train", words).code == 0
    words = arguments("two", **options(sources), **batches)
    assert end_two(start_two(words, tmp_path / "log")) == [0, 0], (tmp_path / "log-0").read_text()
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert [one[f"tokens/{name}"] for name in sources] == [two[f"tokens/{name}"] for name in sources]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.fixture
def streams(tmp_path: Path, sources: dict[str, Any]) -> dict[str, Any]:
    """Files, a function's documents, its stream at two weights, and a folder that is read as data of the hub are."""
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [json.dumps({"text": f"a row of the hub, number {i}"}) + "\n" for i in range(200)]
    (folder / "rows.jsonl").write_text("".join(rows))
    return {
        "numbers": sources["numbers"],
        "sums": {"dataset": "examples.data:sums", "count": 300},
        "walks": {"dataset": "examples.data:walks", "length": 12, "weight": 2, "until_step": 4},
        "hub": {"dataset": "hf", "path": str(folder), "from_step": 3},
        "late_walks": {"dataset": "examples.data:walks", "length": 12, "weight": 1.5, "from_step": 5},
    }


def test_streams_on_one_two_and_four_ranks(arguments: Arguments, tmp_path: Path, streams: dict[str, Any]) -> None:
    """The same shares and losses, with micro-batches and a worker; each source has its own validation."""
    batches = {"training__steps": 8, "training__global_batch_size": 8, "training__local_batch_size": 2}
    common = {**options(streams), **batches, "validation__steps": 8}
    assert command("train", arguments("one", **common)).code == 0
    for size, more in ((2, {"data__num_workers": 1}), (4, {})):
        words = arguments(str(size), **common, **more)
        log = tmp_path / f"log-{size}"
        log.mkdir()
        ended = end_two(start_two(words, log / "log", ranks=range(size), world_size=size))
        assert ended == [0] * size, (log / "log-0.err").read_text()
        for one, other in zip(records(tmp_path / "one"), records(tmp_path / str(size)), strict=True):
            assert [one[f"tokens/{name}"] for name in streams] == [other[f"tokens/{name}"] for name in streams]
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)

    # 8 sequences a step: 1 : 1 : 2, then also 1 of the hub, then 1 : 1 : 1 : 1.5
    last = records(tmp_path / "one")[-1]
    shares = [2 * 2 + 2 * 8 / 5 + 4 * 8 / 4.5] * 2 + [2 * 4 + 2 * 16 / 5, 2 * 8 / 5 + 4 * 8 / 4.5, 4 * 12 / 4.5]
    given = [last[f"tokens/{name}"] / 16 for name in streams]
    assert sum(given) == 64
    assert all(abs(number - share) < 1 for number, share in zip(given, shares, strict=True))
    validation = records(tmp_path / "one", "validation")[-1]
    by_source = {key.split("/")[1] for key in validation if key.startswith("validation/")}
    assert by_source == {"numbers", "sums", "walks", "hub"}


def test_a_killed_run_on_streams_goes_on(
    train: Train, arguments: Arguments, tmp_path: Path, streams: dict[str, Any]
) -> None:
    """Killed with -9 after a save: on one rank to the bit, then on two with the same losses."""
    batches = {"training__global_batch_size": 4, "training__local_batch_size": 1, "checkpoint__interval": 2}
    common = {**options(streams), **batches, "lr_scheduler__name": "constant", "validation__steps": 8}
    assert train("whole", training__steps=8, **common).code == 0
    killed = Command("train", arguments("cut", training__steps=8, **common), tmp_path / "log")
    killed.wait_for((tmp_path / "cut" / "checkpoint" / "step-4").exists)
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.end().code == -signal.SIGKILL
    again = train("cut", training__steps=8, **common)
    assert again.code == 0, again.err
    assert records(tmp_path / "cut") == records(tmp_path / "whole")

    # and in another layout
    assert train("part", training__steps=4, **common).code == 0
    words = arguments("part", training__steps=8, **common)
    assert end_two(start_two(words, tmp_path / "log")) == [0, 0], (tmp_path / "log-0.err").read_text()
    for one, other in zip(records(tmp_path / "whole"), records(tmp_path / "part"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_function_that_is_not_the_same_for_all(train: Train, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its documents have the number of the process in them, and those that tokenize have others."""
    (tmp_path / "by_process.py").write_text("import os\ndef fn(): return [f'{os.getpid()} words'] * 99\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    ended = train(data__path=None, data__dataset="by_process:fn")
    assert ended.code == 2
    assert "data.dataset (by_process:fn): documents 0 to 98 are others than when they were read before" in ended.err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_source_that_is_read_often(train: Train, sources: dict[str, Any], tmp_path: Path) -> None:
    small = tmp_path / "small.txt"
    small.write_text("some words, and then some more of them\n" * 3)
    sources = {"small": {"path": str(small)}, "numbers": sources["numbers"]}
    ended = train(
        **{**options(sources), "data__validation_fraction": 0.0, "validation__enable": False}, training__steps=20
    )
    assert ended.code == 0, ended.err
    assert "warning: the run reads data.sources.small" in ended.err


WRONG: dict[str, tuple[dict[str, Any], list[str]]] = {
    "weight 0": ({"words.weight": 0}, ["data.sources.words.weight", "0"]),
    "NaN": ({"words.weight": math.nan}, ["data.sources.words.weight", "nan"]),
    "no files": ({"words.path": None}, ["data.sources.words.path is missing"]),
    "files that are not there": ({"words.path": "nowhere.txt"}, ["data.sources.words.path", "nowhere.txt"]),
    "unknown key": ({"words.wieght": 2}, ["data.sources.words.wieght", "weight"]),
    "no such data set": ({"words.dataset": "fineweb"}, ["data.sources.words.dataset", "did you mean fineweb_edu?"]),
    "a path that fineweb_edu has not": ({"words.dataset": "fineweb_edu"}, ["data.sources.words.path", "has no use"]),
    "no name of the hub": (
        {"words.dataset": "hf", "words.path": None},
        ["data.sources.words.path is missing: give"],
    ),
    "a name of the hub that is none": ({"words.dataset": "hf", "words.path": "a/b/c"}, ["a/b/c", "needs a data set"]),
    "no such module": (
        {"words.dataset": "examples.date:sums", "words.path": None},
        ["data.sources.words.dataset = 'examples.date:sums'", "cannot be imported", "PYTHONPATH"],
    ),
    "no such function": (
        {"words.dataset": "examples.data:sum", "words.path": None},
        ["data.sources.words.dataset = 'examples.data:sum'", "has no attribute 'sum'"],
    ),
    "a path that the function has not": (
        {"words.dataset": "examples.data:sums"},
        ["data.sources.words.path", "has no use with dataset = 'examples.data:sums'"],
    ),
    "an argument that it has not": (
        {"words.dataset": "examples.data:sums", "words.path": None, "words.cuont": 3},
        ["data.sources.words.cuont", "did you mean data.sources.words.count?"],
    ),
    "an argument of another type": (
        {"words.dataset": "examples.data:sums", "words.path": None, "words.count": "many"},
        ["data.sources.words.count = 'many'", "must be a valid integer"],
    ),
    "an argument without the function": ({"words.count": 3}, ["data.sources.words.count", "unknown key"]),
    "a function that fails": (
        {"words.dataset": "examples.data:sums", "words.path": None, "words.digits": -1},
        ["data.sources.words.dataset (examples.data:sums): ", "(data.py:"],
    ),
    "no documents": (
        {"words.dataset": "examples.data:sums", "words.path": None, "words.count": 0},
        ["data.sources.words.dataset (examples.data:sums): no documents: it has 0"],
    ),
    "ends before it begins": ({"words.from_step": 3}, ["data.sources.words.until_step (2)", "from_step (3)"]),
    "all have ended": (
        {"numbers.until_step": 4, "more_words.until_step": 4},
        ["data.sources: none has a weight in step 5", "from_step"],
    ),
    "none at first": ({"words.from_step": 2, "numbers.from_step": 2}, ["data.sources: none has a weight in step 1"]),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_be_wrong(train: Train, tmp_path: Path, sources: dict[str, Any], name: str) -> None:
    changes, parts = WRONG[name]
    for key, value in changes.items():
        source, _, field = key.partition(".")
        sources[source][field] = value
        if value is None:
            del sources[source][field]
    ended = train(**options(sources), training__steps=6)
    assert ended.code == 2
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ended.err
    for part in parts:
        assert part in lines[0]
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_names_and_paths_beside_sources(train: Train, sources: dict[str, Any], tmp_path: Path) -> None:
    named = train(**options({"my words": sources["words"]}))
    assert (named.code, "a name is of letters, digits and _" in named.err) == (2, True)
    as_a_source = train(**options(sources), validation__sets={"words": {"path": sources["words"]["path"]}})
    assert (as_a_source.code, "held out of data.sources.words is called so" in as_a_source.err) == (2, True)
    beside = train(data__sources=sources)
    assert (beside.code, "has no use beside data.sources" in beside.err) == (2, True)
