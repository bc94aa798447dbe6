import bz2
import gzip
import json
import logging
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from titan_moe.data import sources
from titan_moe.data.sources import documents, find_files, plan_shards, stdlib_files, texts

TEXTS = ["first ä document", "two\nlines", "", "third 漢字 \U0001f600", "x" * 3000]


def pack(path: Path, data: bytes) -> Path:
    packed = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)(data)
    path.write_bytes(packed)
    return path


def read_all(*paths: Path) -> list[str]:
    return [text for shard in plan_shards(find_files([str(path) for path in paths])) for text in documents(shard)]


def jsonl(texts: list[str] | list[str | None]) -> bytes:
    return "".join(json.dumps({"id": index, "text": text}) + "\n" for index, text in enumerate(texts)).encode()


def parquet(texts: list[str], name: str = "text") -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(len(texts)), name: texts}), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_documents_of_every_format_come_in_order_without_empty_ones(tmp_path: Path, kind: str, packing: str) -> None:
    data = jsonl(TEXTS) if kind == "jsonl" else parquet(TEXTS)
    path = pack(tmp_path / f"a.{kind}{packing}", data)
    assert read_all(path) == [text for text in TEXTS if text]


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_text_is_cut_at_paragraphs_and_nothing_is_lost(tmp_path: Path, packing: str) -> None:
    paragraphs = [f"paragraph {i} " + "wörd " * (i % 200) + "\n\n" for i in range(600)]
    text = "".join(paragraphs)
    found = read_all(pack(tmp_path / f"book.txt{packing}", text.encode()))
    assert "".join(found) == text
    assert len(found) > 10
    assert all(part.endswith("\n\n") for part in found[:-1])
    assert max(map(len, found)) <= 2 * sources.DOCUMENT_CHARS


def test_a_line_without_end_is_cut_too(tmp_path: Path) -> None:
    text = "word " * 20_000 + "ä" * 50_000
    found = read_all(pack(tmp_path / "line.txt", text.encode()))
    assert "".join(found) == text
    assert max(map(len, found)) <= 2 * sources.DOCUMENT_CHARS


@pytest.mark.slow
@pytest.mark.parametrize("most", [1, 7, 64, 1000])
def test_byte_ranges_divide_lines_without_gap_or_overlap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD", most)
    monkeypatch.setattr(sources, "MAX_SHARD", most)
    texts: list[str] = ["é" * random.Random(i).randrange(1, 40) for i in range(30)]
    path = pack(tmp_path / "a.jsonl", jsonl(texts).rstrip(b"\n"))
    assert len(plan_shards([str(path)])) == -(-path.stat().st_size // most)
    assert read_all(path) == texts


def test_concatenated_members_are_read_to_the_end(tmp_path: Path) -> None:
    for name, compress in (("a.jsonl.gz", gzip.compress), ("a.jsonl.zst", zstandard.compress)):
        (tmp_path / name).write_bytes(compress(jsonl(["one"])) + compress(jsonl(["two"])))
        assert read_all(tmp_path / name) == ["one", "two"]


NULLS = ["one", None, "two"]


def arrow(array: Any) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": array}), sink)
    return sink.getvalue().to_pybytes()


def far_looking(data: bytes) -> bytes:
    """What `zstd --long=28` writes: its reader has to keep 256 MiB."""
    settings = zstandard.ZstdCompressionParameters(window_log=28)
    stream = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    return stream.compress(data) + stream.flush()


ROWS = {
    "null.jsonl": jsonl(NULLS),
    "null.ndjson": jsonl(NULLS),
    "c4.json.gz": gzip.compress(jsonl(NULLS)),
    "null.parquet": arrow(pa.array(NULLS)),
    "view.parquet": arrow(pa.array(NULLS, pa.string_view())),
    "dictionary.parquet": arrow(pa.array(NULLS).dictionary_encode()),
    "large.parquet": arrow(pa.array(NULLS, pa.large_string()).dictionary_encode()),
    "digits.jsonl": b'{"text": "one"}\n{"id": %s, "text": null}\n{"text": "two"}' % (b"1" * 5000),
    "window.jsonl.zst": far_looking(jsonl(NULLS)),
}


@pytest.mark.parametrize("name", ROWS)
def test_rows_without_a_text_are_none_and_no_documents(tmp_path: Path, name: str) -> None:
    """Whatever holds them, and however strings are stored."""
    (tmp_path / name).write_bytes(ROWS[name])
    (shard,) = plan_shards(find_files(str(tmp_path)))
    assert list(texts(shard)) == NULLS
    assert list(documents(shard)) == ["one", "two"]


def test_a_column_of_nothing_but_null_has_no_documents(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(arrow(pa.array([None, None])))
    assert read_all(tmp_path / "a.parquet") == []


def test_json_is_data_where_it_is_named_and_not_in_folders(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(jsonl(["one"]))
    (tmp_path / "b.json.zst").write_bytes(zstandard.compress(jsonl(["two"])))
    assert find_files(str(tmp_path)) == [str(tmp_path / "b.json.zst")]
    assert read_all(tmp_path / "*.json*") == ["one", "two"]


def test_a_file_beside_its_packed_copy_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a.jsonl", "a.jsonl.zst", "b.txt", "b.txt.gz", "c.txt.gz", "d.txt"):
        (tmp_path / name).write_text("x")
    with caplog.at_level(logging.WARNING, "titan_moe"):
        assert len(find_files(str(tmp_path))) == 6
        find_files([str(tmp_path / name) for name in ("a.jsonl.zst", "b.txt", "c.txt.gz", "d.txt")])
    assert len(caplog.messages) == 1
    assert caplog.messages[0] == (
        f"data.path: {tmp_path}/a.jsonl and {tmp_path}/a.jsonl.zst hold the same by their names, and 1 more files: "
        "their documents count twice"
    )


def test_byte_order_mark_is_dropped(tmp_path: Path) -> None:
    assert read_all(pack(tmp_path / "a.jsonl", b"\xef\xbb\xbf" + jsonl(["one"]))) == ["one"]
    assert read_all(pack(tmp_path / "a.txt", b"\xef\xbb\xbfone")) == ["one"]


def test_files_globs_and_folders(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt", "deep/er/c.jsonl.gz", "deep/README.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    a, b, c = (str(tmp_path / name) for name in ("a.txt", "b.txt", "deep/er/c.jsonl.gz"))
    assert find_files(str(tmp_path)) == [a, b, c]
    assert find_files(str(tmp_path / "*.txt")) == [a, b]
    assert find_files([b, str(tmp_path / "**" / "*.txt")]) == [b, a]


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        ("nowhere.txt", "data.path: no such file or folder: .*nowhere.txt"),
        ("no*.txt", "data.path: .*no.*matches no file"),
        ("empty", "data.path: .*empty matches no file"),
        ("a.pdf", "a.pdf has no format that is known by its name .txt, jsonl"),
    ],
)
def test_missing_files_are_errors(tmp_path: Path, paths: str, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        find_files(str(tmp_path / paths))


def test_no_path_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"data\.path is empty: name the files"):
        find_files([])


def two_columns() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), sink)
    return sink.getvalue().to_pybytes()


NOISE = random.Random(0).randbytes(5000).hex().encode()
BAD = {
    "latin.txt": (b"abc\nd\xe9f\n", r"latin.txt: not UTF-8 at byte 5 \(0xe9\)"),
    "broken.jsonl": (jsonl(["a", "b"]) + b'{"text": "c"\n', r"broken.jsonl:3: not JSON"),
    "notext.jsonl": (b'{"body": "a", "id": 3}\n', r"notext.jsonl:1: no string in the field 'text' \(found: body, id\)"),
    "number.jsonl": (b'{"text": 3}\n', r"number.jsonl:1: no string in the field 'text'"),
    "list.jsonl": (b"[1]\n", r"list.jsonl:1: no string in the field 'text' \(found: list\)"),
    "half.jsonl": (b'{"text": "\\ud83d"}\n', r"half.jsonl:1: 'text' holds half a surrogate pair"),
    "cut.txt.gz": (gzip.compress(NOISE)[:-2000], r"cut.txt.gz: truncated archive: it ends after \d+ bytes"),
    "cut.txt.zst": (zstandard.compress(NOISE)[:-2000], r"cut.txt.zst: truncated archive: it ends after \d+ bytes"),
    "not.txt.gz": (bz2.compress(b"abc"), r"not.txt.gz: damaged archive near byte 0"),
    "empty.txt.gz": (b"", r"empty.txt.gz: truncated archive"),
    "body.parquet": (parquet(["a"], "body"), r"no column 'text' of strings \(columns: id \(int64\), body \(string\)\)"),
    "two.parquet": (two_columns(), r"two.parquet: 2 columns 'text' \(columns: text \(string\), text \(string\)\)"),
    "deep.jsonl": (b'{"text": "a"}\n{"a": ' + b"[" * 99999 + b"\n", r"deep.jsonl:2: nested too deeply to be read"),
    "cut.parquet": (parquet(["a"])[:-9], r"cut.parquet: not a readable parquet file"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_errors_that_name_file_and_place(tmp_path: Path, name: str) -> None:
    data, message = BAD[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        read_all(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_line_numbers_are_right_in_later_byte_ranges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SHARD", 100)
    monkeypatch.setattr(sources, "MIN_SHARD", 100)
    path = pack(tmp_path / "a.jsonl", jsonl(["abc"] * 57) + b"oops\n" + jsonl(["abc"]))
    with pytest.raises(ValueError, match=r"a.jsonl:58: not JSON"):
        read_all(path)


def test_stdlib_is_source_without_tests() -> None:
    files = stdlib_files()
    assert files == sorted(files)
    names = [Path(file).as_posix() for file in files]
    assert any(name.endswith("/json/decoder.py") for name in names)
    assert not any("/test/" in name or "/tests/" in name or "site-packages" in name for name in names)
    shards = plan_shards(files, "source")
    assert sum(len(shard) for shard in shards) == len(files)
    assert len(shards) > 4
    first = next(documents((next(piece for shard in shards for piece in shard if "argparse" in piece.path),)))
    assert "ArgumentParser" in first
