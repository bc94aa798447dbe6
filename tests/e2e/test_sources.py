"""Runs on several sources of data: shares and stages, ranks, going on, and what a user can get wrong."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Ended, command, end_two, records, start_two

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
    "a stream": ({"words.dataset": "fineweb_edu"}, ["data.sources.words.dataset", "fineweb_edu", "stdlib", "text"]),
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
