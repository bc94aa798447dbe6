"""Runs whose attention stays inside documents, in real commands, and what a user can get wrong."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Ended, command, end_two, records, start_two
from tests.e2e.test_bad_input import error_line
from tests.unit.data.test_token_files import EOT, write_pair
from titan_moe.checkpoint import load_model

Train = Callable[..., Ended]
MASKED: dict[str, Any] = {"data__document_mask": True}
CONSTANT = {"lr_scheduler__name": "constant"}


@pytest.fixture
def short(tmp_path: Path) -> str:
    """Documents of which a sequence has several."""
    path = tmp_path / "short.jsonl"
    path.write_text("".join(json.dumps({"text": "abcdefgh"[: 2 + i % 7]}) + "\n" for i in range(400)))
    return str(path)


def test_a_run_in_documents(train: Train, tmp_path: Path, short: str) -> None:
    """It goes on as it was, is another one than without, and its model keeps documents apart wherever it is used."""
    options = {**MASKED, **CONSTANT, "data__path": [short]}
    assert train("part", "--training.steps=4", **options).code == 0
    assert train("part", **options).code == 0
    assert train("whole", **options).code == 0
    assert records(tmp_path / "part") == records(tmp_path / "whole")
    assert train("plain", **CONSTANT, data__path=[short]).code == 0
    assert records(tmp_path / "plain")[-1]["loss"] != records(tmp_path / "whole")[-1]["loss"]

    model, config = load_model(tmp_path / "whole")
    assert config.data.document_mask
    tokens = torch.tensor([[*b"abc", EOT, *b"abcd"]])
    torch.testing.assert_close(model(tokens)[0][:, 4:], model(tokens[:, 4:])[0], rtol=0, atol=1e-5)
    evaluated = command("evaluate", ["--checkpoint", str(tmp_path / "whole"), "--json"])
    assert evaluated.code == 0, evaluated.err
    (result,) = json.loads(evaluated.out)["results"]
    assert result["loss"] == pytest.approx(records(tmp_path / "whole", "validation")[-1]["loss"], rel=1e-5)
    words = ["--checkpoint", str(tmp_path / "whole"), "--prompt", "ab", "--max_new_tokens", "20", "--temperature", "0"]
    assert command("generate", words).out == command("generate", [*words, "--no_cache"]).out

    # a mask is a part of what is trained
    words = ["--data.document_mask=false", "--training.steps=8"]
    assert "data.document_mask" in error_line(train("whole", " ".join(words), **options))


def test_two_ranks_and_one(arguments: Arguments, tmp_path: Path, short: str) -> None:
    options = {**MASKED, "data__path": [short], "data__restart_positions": True, "training__local_batch_size": 1}
    assert command("train", arguments("one", **options)).code == 0
    words = arguments("two", **options, parallelism__context_parallel_degree=2)
    assert end_two(start_two(words, tmp_path / "log")) == [0, 0], (tmp_path / "log-0").read_text()
    for one, two in zip(records(tmp_path / "one"), records(tmp_path / "two"), strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


def test_positions_that_restart_where_documents_are_seen(train: Train) -> None:
    line = error_line(train(data__restart_positions=True))
    assert "data.restart_positions = true needs data.document_mask = true" in line


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"router.name": "expert_choice", "balancer": {}}, "'expert_choice' chooses the experts of tokens by all of"),
        ({"router.name": "causal_bias", "balancer": {}}, "'causal_bias' chooses the experts of tokens by those before"),
        ({"router.capacity_factor": 1.25}, "router.capacity_factor chooses the experts of tokens by all of a forward"),
        ({}, ""),
    ],
)
def test_routers_that_see_other_documents(train: Train, changes: dict[str, Any], words: str) -> None:
    options = {key.replace(".", "__"): value for key, value in changes.items()}
    ended = train(**options, **MASKED, training__steps=1)
    assert ended.code == 0, ended.err
    assert words in ended.err
    assert ("hides other documents from attention alone" in ended.err) == bool(words)
    assert "from attention alone" not in train("plain", **options, training__steps=1).err


def test_documents_without_an_end(train: Train, tmp_path: Path) -> None:
    """Megatron's files, which need not have one: none is an error, some are a warning; validation data as well."""
    documents = [[*f"def f{index}(x): return x".encode()] for index in range(60)]
    whole = write_pair(tmp_path / "whole.bin", [[*ids, EOT] for ids in documents])
    without = write_pair(tmp_path / "without.bin", documents)
    options = {"validation__enable": False, "data__validation_fraction": 0.0}
    cache = {"data__cache_folder": str(tmp_path / "cache")}
    line = error_line(train(**MASKED, **options, **cache, data__path=[without]))
    assert f"{without}: none of its 60 documents ends with the end of text" in line
    assert "--append-eod" in line
    assert "none of its 60" in error_line(train(**MASKED, **cache, data__path=[whole], data__validation_path=[without]))
    sets = {"mine": {"path": without}}
    assert "none of its 60" in error_line(train(**MASKED, **cache, data__path=[whole], validation__sets=sets))
    assert not (tmp_path / "run").exists()

    some = write_pair(tmp_path / "some.bin", [[*ids, EOT] if n % 4 else ids for n, ids in enumerate(documents)])
    ended = train(**MASKED, **options, **cache, data__path=[some], training__steps=1)
    assert ended.code == 0, ended.err
    assert "some.bin: 15 of its 60 documents do not end with the end of text" in ended.err
    assert "do not end with" not in train("plain", **options, **cache, data__path=[some], training__steps=1).err
