import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan_moe.data import build
from titan_moe.data.build import Data, build_data, build_validation, main_process_first, token_bytes, trained_on
from titan_moe.data.corpus import document_hash

TEXTS = [f"document {index}: {'some words ' * (index % 17)}" for index in range(200)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def numbers_in(data: Data, batches: Any) -> set[int]:
    """Return the numbers of the documents whose beginning is whole in one row."""
    rows = [data.tokenizer.decode(row) for tokens, _ in batches for row in tokens.tolist()]
    return {int(number) for row in rows for number in re.findall(r"document (\d+): ", row)}


@pytest.fixture
def path(tmp_path: Path) -> str:
    return write_jsonl(tmp_path / "corpus" / "a.jsonl", TEXTS)


def make(folder: Path, **settings: Any) -> Data:
    defaults: dict[str, Any] = {
        "dataset": "text",
        "tokenizer": "bytes",
        "seq_len": 32,
        "seed": 1,
        "global_batch_size": 8,
        "local_batch_size": 4,
        "validation_fraction": 0.1,
        "validation_local_batch_size": 4,
        "cache_folder": str(folder / "cache"),
    }
    return build_data(**{**defaults, **settings})


def texts_in(data: Data, batches: Any) -> str:
    return "".join(data.tokenizer.decode(row) for tokens, _ in batches for row in tokens.tolist())


def test_text_from_files_to_batches_and_back(tmp_path: Path, path: str) -> None:
    data = make(tmp_path, path=path)
    assert data.validation is not None
    validation = list(data.validation())
    assert "document " in texts_in(data, validation)
    assert torch.equal(validation[0][0], next(data.validation())[0])
    tokens, labels = next(iter(data.train))
    assert tokens.shape == labels.shape == (4, 32)
    assert data.train.state_dict()["sequences"] == 4
    again = make(tmp_path, path=path)
    assert again.fingerprints == data.fingerprints
    assert torch.equal(next(iter(again.train))[0], tokens)


def test_stdlib_needs_no_path_and_trains_its_own_bpe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import json.decoder as module

    files = sorted(str(file) for file in Path(str(module.__file__)).parent.glob("*.py"))
    monkeypatch.setattr(build, "stdlib_files", lambda: files)
    data = make(tmp_path, dataset="stdlib", tokenizer="bpe:300", validation_fraction=0.4)
    assert data.tokenizer.vocab_size == 300
    assert "def " in texts_in(data, itertools.islice(iter(data.train), 40))
    assert token_bytes(data.tokenizer).sum() > 300
    assert (
        make(tmp_path, dataset="stdlib", tokenizer="bytes", validation_fraction=0.4).fingerprints["data"]
        == (data.fingerprints["data"])
    )


def test_worker_processes_and_tokenizer_threads_do_not_meet(
    tmp_path: Path, path: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = make(tmp_path, path=path, tokenizer="bpe:300", num_workers=2)
    data.tokenizer.encode("some words")
    assert "some words" in texts_in(data, itertools.islice(iter(data.train), 5))
    assert "fork" not in capfd.readouterr().err


def test_validation_files_instead_of_a_fraction(tmp_path: Path, path: str) -> None:
    other = write_jsonl(tmp_path / "other.jsonl", ["held out " * 50])
    data = make(tmp_path, path=[path], validation_path=other)
    assert data.validation is not None
    assert set(texts_in(data, data.validation())) == set("held out ")
    assert make(tmp_path, path=path, validation_fraction=0.0).validation is None


@pytest.mark.slow
@pytest.mark.parametrize(("fraction", "held_out"), [(1e-9, 1), (0.999999, 199)])
@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_of_few_documents_one_at_least_is_on_either_side(
    tmp_path: Path, path: str, fraction: float, held_out: int, tokenizer: str
) -> None:
    """The next run finds the same division; which side a document is on goes by its hash, as ever."""
    data = [make(tmp_path, path=path, validation_fraction=fraction, tokenizer=tokenizer, seq_len=4) for _ in range(2)]
    assert data[0].fingerprints == data[1].fingerprints
    assert data[0].validation is not None
    caches = sorted((tmp_path / "cache").glob("*/meta.json"), key=lambda path: path.stat().st_mtime_ns)
    assert len(caches) == 2
    meta = json.loads(caches[-1].read_text())
    assert meta["num_documents"] == {"train": 200 - held_out, "validation": held_out}
    seen = sum(tokens.numel() for tokens, _ in data[0].validation())
    assert 0 < meta["num_tokens"]["validation"] - seen <= 4  # the last one is a label only
    if tokenizer == "bytes":
        ids = np.fromfile(caches[-1].with_name("validation.bin"), meta["dtype"]).tolist()
        by_hash = sorted(TEXTS, key=lambda text: document_hash(text.encode()))
        assert set("".join("|" if id_ == 256 else chr(id_) for id_ in ids).split("|")[:-1]) == set(by_hash[:held_out])


@pytest.mark.slow
@pytest.mark.parametrize("texts", [["alone " * 50], ["twice " * 50] * 2])
def test_documents_that_cannot_be_divided_are_an_error(tmp_path: Path, texts: list[str]) -> None:
    path = write_jsonl(tmp_path / "corpus" / "few.jsonl", texts)
    with pytest.raises(
        ValueError, match=r"data.validation_fraction \(0.1\) divides the documents into \d for training"
    ):
        make(tmp_path, path=path)


def test_evaluation_on_other_files(tmp_path: Path, path: str) -> None:
    data = make(tmp_path, path=path)
    (tmp_path / "tokenizer.json").write_text(data.tokenizer.to_json(), encoding="utf-8")
    held_out = build_validation(
        path=write_jsonl(tmp_path / "other.jsonl", ["x" * 99]),
        tokenizer=str(tmp_path / "tokenizer.json"),
        seq_len=9,
        local_batch_size=4,
        cache_folder=str(tmp_path / "cache"),
    )
    assert texts_in(data, held_out.batches()) == "x" * 99
    assert [len(tokens) for tokens, _ in held_out.batches()] == [4, 4, 3]


def test_the_standard_library_as_a_set_to_evaluate_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "module.py").write_text("x = 1\n" * 20)
    monkeypatch.setattr(build, "stdlib_files", lambda: [str(tmp_path / "module.py")])
    settings: dict[str, Any] = {"dataset": "stdlib", "seq_len": 9, "local_batch_size": 4, "tokenizer": "bytes"}
    one, other = (build_validation(**settings, cache_folder=str(tmp_path / "cache")) for _ in range(2))
    assert one.fingerprint == other.fingerprint
    assert sum(tokens.numel() for tokens, _ in one.batches()) == 120 // 9 * 9


def test_bad_data_to_evaluate_on(tmp_path: Path) -> None:
    empty, short = tmp_path / "empty.txt", tmp_path / "short.txt"
    empty.touch()
    short.write_text("four")
    settings: dict[str, Any] = {"seq_len": 9, "local_batch_size": 4, "tokenizer": "bytes", "key": "a.path"}
    for path, text in (
        (tmp_path / "none.txt", "a.path: no such file or folder: "),
        (empty, "a.path: no data: "),
        (short, "training.seq_len (9) is longer than the data of a.path (5 tokens)"),
    ):
        with pytest.raises((ValueError, OSError), match=re.escape(text)):
            build_validation(path=str(path), cache_folder=str(tmp_path / "cache"), **settings)


def test_what_of_a_set_is_trained_on(tmp_path: Path, path: str) -> None:
    """By content: a copy under another name counts, a file of the same size does not."""
    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    copy.write_bytes(Path(path).read_bytes())
    other.write_bytes(Path(path).read_bytes().replace(b"document", b"DOCUMENT"))
    cache, files = str(tmp_path / "cache"), [str(copy), str(other)]
    train = [("text", [path], {})]
    assert trained_on(("text", files, {}), train, cache) == [str(copy)]
    assert trained_on(("text", [str(other)], {}), train, cache) == []
    assert trained_on(("text", [path], {}), train, cache) == [path]
    assert trained_on(("hf", ["a/b"], {}), [("hf", ["a/b"], {})], cache) == ["hf a/b"]
    assert trained_on(("hf", ["a/b"], {}), [("hf", ["a/c"], {})], cache) == []
    assert trained_on(("text", [path], {}), [("hf", ["a"], {})], cache) == []
    assert trained_on(("my:fn", [], {"n": 1}), [("my:fn", [], {"n": 1})], cache) == ["my:fn"]
    assert trained_on(("my:fn", [], {"n": 1}), [("my:fn", [], {"n": 2}), *train], cache) == []


@pytest.mark.slow
def test_a_streamed_folder(tmp_path: Path, path: str) -> None:
    folder = str(Path(path).parent)
    data = make(tmp_path, dataset="hf", path=folder, tokenizer="bpe:300", validation_steps=2, num_workers=2)
    assert data.validation is not None
    assert len(list(data.validation())) == 2
    assert "document " in texts_in(data, itertools.islice(iter(data.train), 4))
    same = make(tmp_path, path=path, tokenizer="bpe:300")
    assert same.validation is not None
    held_out = numbers_in(same, same.validation())
    assert held_out
    assert not numbers_in(data, itertools.islice(iter(data.train), 100)) & held_out

    own = make(tmp_path, dataset="hf", path=folder, validation_path=write_jsonl(tmp_path / "own.jsonl", TEXTS[:50]))
    trained = numbers_in(own, itertools.islice(iter(own.train), 300))
    assert len(trained) > 100
    assert min(trained) == 50

    # a validation set is the stream's first documents, whatever training has held out
    settings: dict[str, Any] = {"dataset": "hf", "path": [folder], "tokenizer": "bytes", "seq_len": 32}
    first = build_validation(**settings, steps=3, local_batch_size=4, cache_folder=str(tmp_path / "cache"))
    rows = [row for _, labels in first.batches() for row in labels.tolist()]
    assert len(rows) == 12
    found = numbers_in(own, first.batches())
    assert found
    assert max(found) < 100


ERRORS: dict[str, tuple[dict[str, Any], str]] = {
    "no such data set": ({"dataset": "txt"}, r"data.dataset \(txt\): did you mean text\? there are stdlib, text, fine"),
    "no path": ({"path": ()}, "data.path is empty: name the files to read"),
    "path with stdlib": ({"dataset": "stdlib"}, r"data.path \(.*\) has no use with data.dataset stdlib"),
    "path with fineweb_edu": ({"dataset": "fineweb_edu"}, r"data.path \(.*\) has no use with data.dataset fineweb_edu"),
    "seq_len": ({"seq_len": 99_999}, r"training.seq_len \(99999\) is longer than the data of data.path \(\d+ tokens\)"),
    "validation seq_len": (
        {"seq_len": 4000, "validation_fraction": 0.05},
        r"training.seq_len \(4000\) is longer than the data of data.validation_fraction \(0.05\) \(\d+ tokens\)",
    ),
    "fraction": ({"validation_fraction": 1.5}, r"data.validation_fraction \(1.5\) must be at least 0 and below 1"),
    "global batch": (
        {"global_batch_size": 10},
        r"training.global_batch_size \(10\) must be a multiple of training.local_batch_size \(4\) x 1 data-parallel",
    ),
    "local batch": ({"local_batch_size": 0}, r"training.local_batch_size \(0\)"),
    "hf without a name": ({"dataset": "hf", "path": ""}, "data.path is empty: data.dataset hf needs the name"),
}


@pytest.mark.parametrize("name", ERRORS)
def test_settings_that_cannot_be(tmp_path: Path, path: str, name: str) -> None:
    settings, message = ERRORS[name]
    with pytest.raises((ValueError, OSError), match=message) as caught:
        make(tmp_path, **{"path": path, **settings})
    assert "\n" not in str(caught.value)


def test_fineweb_without_the_hub(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"can't be reached .*: use local files instead: --data.dataset text --data.path"):
        make(tmp_path, dataset="fineweb_edu", endpoint="http://127.0.0.1:9")


@pytest.mark.parametrize(
    ("sizes", "want"), [((-1, 4, 3), (12, 4)), ((40, -1, 8), (40, 5)), ((40, -1, 1), (40, 40)), ((40, 5, 4), (40, 5))]
)
def test_batch_sizes_that_follow_from_each_other(sizes: tuple[int, int, int], want: tuple[int, int]) -> None:
    assert build.resolve_batch_sizes(*sizes) == want


@pytest.mark.parametrize("ranks", [3, 64])
def test_batches_that_ranks_cannot_share(ranks: int) -> None:
    with pytest.raises(
        ValueError, match=rf"global_batch_size \(40\) must be a multiple of {ranks} data-parallel ranks"
    ):
        build.resolve_batch_sizes(40, -1, ranks)


def test_the_main_process_goes_first_and_frees_the_others_when_it_fails(tmp_path: Path, path: str) -> None:
    events: list[str] = []

    def work() -> str:
        events.append("work")
        return "made"

    def fail() -> str:
        raise ValueError("no")

    def barrier() -> None:
        events.append("barrier")

    assert main_process_first(work, True, barrier) == main_process_first(work, False, barrier) == "made"
    assert events == ["work", "barrier", "barrier", "work"]
    with pytest.raises(ValueError, match="no"):
        main_process_first(fail, True, barrier)
    assert events[4:] == ["barrier"]
    ranks = [
        make(tmp_path, path=path, dp_rank=rank, dp_degree=2, is_main=not rank, barrier=barrier) for rank in range(2)
    ]
    assert ranks[0].fingerprints == ranks[1].fingerprints
    assert not torch.equal(next(iter(ranks[0].train))[0], next(iter(ranks[1].train))[0])


@pytest.mark.slow
def test_nothing_heavy_is_imported_before_it_is_needed() -> None:
    code = "import sys, titan_moe.data.{}; print([name for name in {} if name in sys.modules])"
    heavy = ["datasets", "pyarrow", "pandas", "zstandard", "huggingface_hub"]
    for module, names in (("build", heavy), ("cache", [*heavy, "torch"])):  # workers import the cache alone
        command = [sys.executable, "-c", code.format(module, names)]
        assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "[]"
