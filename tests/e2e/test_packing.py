"""Runs on documents that are packed best-fit: ranks, going on, evaluation, and what a user can get wrong."""

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Command, Ended, command, free_port, records
from tests.e2e.test_bad_input import error_line
from tests.unit.data.test_token_files import EOT
from titan_moe.checkpoint import load_model
from titan_moe.evaluate import validation_batches
from titan_moe.model.cross_entropy import IGNORE

Train = Callable[..., Ended]
BEST_FIT = {"data__packing": "best_fit", "training__seq_len": 64}


@pytest.fixture
def path(tmp_path: Path) -> str:
    """Documents of 5 to 200 bytes, most of which fit a sequence."""
    texts = [f"{number}: " + "one more word, " * (number * 5 % 14) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(tmp_path / "a.jsonl")


def end_ranks(words: list[str], count: int, log: Path) -> None:
    """Train with that many processes."""
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(count)}
    ranks = [
        Command("train", words, log.with_name(f"{log.name}-{i}"), {**place, "RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(count)
    ]
    assert [rank.end().code for rank in ranks] == [0] * count, ranks[0].written(".err")


@pytest.mark.slow
def test_the_same_losses_for_any_number_of_ranks(arguments: Arguments, tmp_path: Path, path: str) -> None:
    """Over 50 steps, and with a break after 20 of them, from which other processes go on."""
    options = {**BEST_FIT, "data__path": [path], "training__local_batch_size": 1, "lr_scheduler__name": "constant"}
    options |= {"training__steps": 50, "optimizer__lr": 1e-3, "checkpoint__interval": 20, "validation__freq": 25}
    words = arguments("one", **options)
    assert command("train", words).code == 0
    for count in (2, 4):
        end_ranks(arguments(f"ranks{count}", **options), count, tmp_path / f"log{count}")
    end_ranks(arguments("part", **options, **{"training.steps": 20}), 2, tmp_path / "log-part")
    assert command("train", arguments("part", **options)).code == 0
    one = records(tmp_path / "one")
    assert len(one) == 50
    assert one[-1]["loss"] < 0.8 * one[0]["loss"]
    for name in ("ranks2", "ranks4", "part"):
        for kind in ("train", "validation"):
            of_one, others = records(tmp_path / "one", kind), records(tmp_path / name, kind)
            others = [line for line in others if line["step"] in {line["step"] for line in of_one}]
            assert [line["num_tokens"] for line in of_one] == [line["num_tokens"] for line in others]
            losses = [line["loss"] for line in others]
            assert losses == pytest.approx([line["loss"] for line in of_one], rel=1e-4), (name, kind)


def test_a_run_says_what_it_wastes_and_is_evaluated_as_it_was_trained(train: Train, tmp_path: Path, path: str) -> None:
    ended = train(**BEST_FIT, data__path=[path])
    assert ended.code == 0, ended.err
    assert "data.packing best_fit of data.path: " in ended.err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())["packing"]["data.path"]
    assert facts["cut_documents"] < facts["cut_documents_concat"]
    assert facts["labels"] < facts["sequences"] * 64
    validation = records(tmp_path / "run", "validation")[-1]
    checkpoint = ["--checkpoint", str(tmp_path / "run"), "--json"]
    evaluated, concat = (
        json.loads(command("evaluate", [*checkpoint, *more]).out)["results"][0]
        for more in ([], ["--data.packing", "concat"])
    )
    for name in ("loss", "accuracy", "bits_per_byte", "maxvio_global", "aux_loss", "z_loss"):
        assert evaluated[name] == pytest.approx(validation[name], rel=1e-5), name
    assert evaluated["num_tokens"] == validation["num_tokens"]
    assert concat["num_tokens"] % 64 == 0
    assert concat["num_tokens"] != evaluated["num_tokens"]

    # another packing is other data
    line = error_line(train(**BEST_FIT | {"data__packing": "concat"}, data__path=[path], training__steps=8))
    assert "data.packing: 'best_fit', now 'concat'" in line


def test_packed_sources_and_validation_sets(train: Train, tmp_path: Path, path: str, shared: Path) -> None:
    sources: dict[str, Any] = {"words": {"path": path, "weight": 3}, "text": {"path": str(shared / "text.jsonl")}}
    sets = {"whole": {"path": path}}
    ended = train(**BEST_FIT, data__path=None, data__sources=sources, validation__sets=sets)
    assert ended.code == 0, ended.err
    assert "data.packing best_fit of data.sources.text: " in ended.err
    validation = records(tmp_path / "run", "validation")[-1]
    assert all(math.isfinite(validation[f"validation/{name}/loss"]) for name in ("words", "text", "whole"))
    line = records(tmp_path / "run")[-1]
    assert line["tokens/words"] + line["tokens/text"] == line["num_tokens"]


def test_packed_documents_do_not_see_each_other(train: Train, tmp_path: Path, path: str) -> None:
    """With data.document_mask each is read as if it were alone, and the padding behind them changes nothing."""
    masked = {"data__document_mask": True, "data__restart_positions": True}
    assert train(**BEST_FIT, **masked, data__path=[path]).code == 0
    model, config = load_model(tmp_path / "run")
    tokens, labels = next(validation_batches(config, "bytes", []))
    with torch.no_grad():
        logits = model(tokens)[0]
        for ids, of_row, logits_SV in zip(tokens, labels, logits, strict=True):
            ends = [*(ids == EOT).nonzero().flatten().add(1).tolist(), len(ids)]
            for start, end in itertools.pairwise([0, *ends]):
                if (of_row[start:end] != IGNORE).any():
                    alone = model(ids[None, start:end])[0][0]
                    torch.testing.assert_close(logits_SV[start:end], alone, rtol=0, atol=1e-5)


def test_what_can_be_wrong(train: Train, path: str, tmp_path: Path) -> None:
    line = error_line(train(**BEST_FIT | {"data__packing": "bestfit"}, data__path=[path]))
    assert "data.packing = 'bestfit'" in line
    assert "best_fit" in line
    line = error_line(train(**BEST_FIT, data__path=None, data__dataset="fineweb_edu"))
    assert "data.packing (best_fit) needs to know all documents, and data.dataset fineweb_edu" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
