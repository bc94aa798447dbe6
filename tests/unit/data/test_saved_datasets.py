"""Data sets that `save_to_disk` of the library `datasets` wrote, and arrow files one by one."""

import gzip
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from titan_moe.data import sources
from titan_moe.data.sources import documents, find_files, plan_shards, texts

TEXTS = [f"document {index}: {'ä and more ' * (index % 23)}" for index in range(3000)]


def stream(rows: list[Any], name: str = "text", kind: Any = None, batch: int = 100) -> bytes:
    sink = pa.BufferOutputStream()
    table = pa.table({"id": range(len(rows)), name: pa.array(rows, kind)})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, batch)
    return sink.getvalue().to_pybytes()


def library() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        datasets = pytest.importorskip("datasets")
    datasets.disable_progress_bars()
    return datasets


def read_all(path: Path) -> list[str]:
    return [text for shard in plan_shards(find_files(str(path))) for text in documents(shard)]


@pytest.mark.filterwarnings("ignore")  # the library's own
def test_what_the_library_saves(tmp_path: Path) -> None:
    """In its order, whole; files that it puts beside the saved ones are left out."""
    datasets = library()
    data = datasets.Dataset.from_dict({"text": TEXTS, "id": list(range(len(TEXTS)))})
    data.save_to_disk(str(tmp_path / "plain"), num_shards=3)
    assert read_all(tmp_path / "plain") == TEXTS

    shuffled = data.shuffle(seed=1).select(range(500))
    shuffled.save_to_disk(str(tmp_path / "shuffled"))
    datasets.load_from_disk(str(tmp_path / "shuffled")).map(lambda row: {"text": row["text"].upper()})
    assert len([*(tmp_path / "shuffled").glob("cache-*.arrow")]) == 1
    assert read_all(tmp_path / "shuffled") == shuffled["text"][:]

    datasets.DatasetDict({"train": data, "test": data.select([7])}).save_to_disk(str(tmp_path / "splits"))
    with pytest.raises(ValueError, match=r"splits: a data set of several splits: name one, e.g. .*splits/train$"):
        find_files(str(tmp_path / "splits"))
    assert read_all(tmp_path / "splits" / "test") == [TEXTS[7]]
    datasets.DatasetDict({"all": data}).save_to_disk(str(tmp_path / "one"))
    assert read_all(tmp_path / "one") == TEXTS


@pytest.mark.parametrize("packing", ["", ".gz"])
def test_large_files_are_cut_between_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, packing: str) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD", 20_000)
    path = tmp_path / f"a.arrow{packing}"
    path.write_bytes(gzip.compress(stream(TEXTS)) if packing else stream(TEXTS))
    shards = plan_shards(find_files(str(path)))
    assert (len(shards) == 1) == bool(packing)
    assert [text for shard in shards for text in documents(shard)] == TEXTS


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
)
def test_strings_of_every_kind_and_null(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "a.arrow").write_bytes(stream(["one", None, "two"], kind=kind))
    (shard,) = plan_shards(find_files(str(tmp_path / "a.arrow")))
    assert list(texts(shard)) == ["one", None, "two"]


WHOLE = stream(TEXTS)
BAD = {
    "cut off": (WHOLE[:-500], r"a.arrow: damaged arrow file \(.*\)"),
    "cut off between batches": (WHOLE[:-8], r"a.arrow: damaged arrow file \(it is cut off\)"),
    "no arrow": (b"something else", r"a.arrow: not a readable arrow file"),
    "nothing": (b"", r"a.arrow: not a readable arrow file"),
    "another column": (
        stream(["a"], "body"),
        r"a.arrow: no column 'text' of strings \(columns: id .*, body \(string\)\)",
    ),
    "numbers": (stream([1]), r"a.arrow: no column 'text' of strings \(columns: id .*, text \(int64\)\)"),
}


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    content, message = BAD[name]
    (tmp_path / "a.arrow").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_all(tmp_path / "a.arrow")
    assert "\n" not in str(caught.value)


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    with pytest.raises(
        FileNotFoundError, match=r"data-00000-of-00001.arrow: no such file, but state.json beside it lists"
    ):
        find_files(str(tmp_path))
    (tmp_path / "a.arrow").write_bytes(WHOLE)
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "state.json").write_text(json.dumps({"_data_files": [{"filename": "../a.arrow"}]}))
    with pytest.raises(FileNotFoundError, match=r"inner/a.arrow: no such file"):
        find_files(str(tmp_path / "inner"))
    (tmp_path / "state.json").write_text("[")
    with pytest.raises(ValueError, match=r"its dataset_dict.json or state.json is damaged: save the data set again"):
        find_files(str(tmp_path))


def test_a_folder_of_something_else_with_a_state(tmp_path: Path) -> None:
    """state.json is a common name; and arrow files outside a saved data set are caches more often than data."""
    (tmp_path / "state.json").write_text(json.dumps({"step": 3}))
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "cache-1.arrow").write_bytes(WHOLE)
    assert find_files(str(tmp_path)) == [str(tmp_path / "a.txt")]
    os.remove(tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match="matches no file"):
        find_files(str(tmp_path))
