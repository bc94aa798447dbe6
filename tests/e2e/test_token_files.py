"""Runs on files of token ids, in real commands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e.harness import Ended, records
from tests.e2e.test_bad_input import error_line
from tests.unit.data.test_token_files import EOT, write_bad, write_pair

Train = Callable[..., Ended]


def test_a_run_on_tokens_is_the_run_on_their_text(train: Train, tmp_path: Path, shared: Path) -> None:
    texts = [json.loads(line)["text"] for line in (shared / "text.jsonl").read_text().splitlines()]
    half = len(texts) // 2
    documents = [[*text.encode(), EOT] for text in texts]
    paths = [
        write_pair(tmp_path / "a.bin", documents[:half]).removesuffix(".bin"),
        write_pair(tmp_path / "b.bin", documents[half:], "int32"),
    ]
    settings = {"data.validation_fraction": 0.0, "validation.enable": False}
    assert train("text", **settings).code == 0
    assert train("tokens", **settings, data__path=paths, data__cache_folder=str(tmp_path / "cache")).code == 0
    assert records(tmp_path / "text") == records(tmp_path / "tokens")
    assert len(records(tmp_path / "text")) > 1
    assert not [*(tmp_path / "cache").rglob("*.bin")]


@pytest.mark.parametrize(
    "name", ["no idx", "bin cut off", "idx cut off", "unknown type", "id of the bin", "another end of text"]
)
def test_bad_token_files(train: Train, tmp_path: Path, name: str) -> None:
    path, _ = write_bad(tmp_path, name)
    for key in ("data__path", "data__validation_path"):
        line = error_line(train(**{key: [path], "data__cache_folder": str(tmp_path / "cache")}))
        assert str(tmp_path / "a.") in line
    assert not (tmp_path / "run").exists()


def test_validation_sets_of_tokens_and_of_their_text(train: Train, tmp_path: Path) -> None:
    texts = [f"def f{index}(x): return x + {index}" for index in range(60)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    pair = write_pair(tmp_path / "pair.bin", [[*text.encode(), EOT] for text in texts])
    sets = {"pair": {"path": pair}, "text": {"path": str(tmp_path / "text.jsonl")}}
    assert train(validation__sets=sets).code == 0
    record = records(tmp_path / "run", "validation")[-1]
    numbers = [
        {key.removeprefix(f"validation/{name}/"): value for key, value in record.items() if f"/{name}/" in key}
        for name in sets
    ]
    assert numbers[0] == numbers[1]
    assert numbers[0]["loss"] > 0
