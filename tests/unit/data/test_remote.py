"""Data behind URLs: the same run as from a disk, a bounded disk, each object once, stores that fail."""

import gzip
import json
import random
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import fsspec
import numpy as np
import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from titan_moe.data import waves
from titan_moe.data.build import Data, SourceFiles, build_data, build_validation, trained_on
from titan_moe.data.remote import REMOTE
from titan_moe.data.sources import find_files
from titan_moe.runtime import remote

URL = "memory://bucket/corpus"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small waves, short waits, an empty store."""
    monkeypatch.setattr(waves, "WAVE_BYTES", 20_000)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.001)
    monkeypatch.setattr(remote, "BLOCK_BYTES", 3_000)
    MemoryFileSystem.store.clear()
    yield
    MemoryFileSystem.store.clear()


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six files of text in a folder, and the same behind URL."""
    draw, folder, words = random.Random(0), tmp_path / "corpus", ["a", "b", "the", "cat", "ünder"]
    folder.mkdir()
    for index in range(6):
        texts = [f"{' '.join(draw.choices(words, k=30))} {index} {n}" for n in range(150)]
        data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        name, data = (f"{index}.jsonl", data) if index % 2 else (f"{index}.jsonl.gz", gzip.compress(data, mtime=0))
        (folder / name).write_bytes(data)
        fsspec.filesystem("memory").pipe_file(f"/bucket/corpus/{name}", data)
    return folder


def make(cache: Path, **settings: Any) -> Data:
    defaults: dict[str, Any] = {
        "dataset": "text",
        "tokenizer": "bytes",
        "seq_len": 32,
        "seed": 1,
        "global_batch_size": 4,
        "local_batch_size": 4,
        "validation_fraction": 0.1,
        "cache_folder": str(cache),
        "progress": False,
    }
    return build_data(**{**defaults, **settings})


def read(cache: Path, **settings: Any) -> tuple[dict[str, str], list[list[list[int]]]]:
    """What a run reads: fingerprints, its first batches, and its validation data."""
    data = make(cache, **settings)
    train = iter(data.train)
    assert data.validation is not None
    every = [*(next(train) for _ in range(6)), *data.validation()]
    return data.fingerprints, [tensor.tolist() for batch in every for tensor in batch]


@pytest.mark.parametrize("how", [{}, {"tokenizer": "bpe:300"}, {"validation": True}, {"validation_fraction": 1e-12}])
def test_the_same_run_as_from_a_disk(tmp_path: Path, corpus: Path, how: dict[str, Any]) -> None:
    """Fingerprints, training and validation batches; some documents held out, a file of them, or just one."""
    here, there = dict(how), dict(how)
    if how.pop("validation", False):
        here, there = {"validation_path": str(corpus / "1.jsonl")}, {"validation_path": f"{URL}/1.jsonl"}
    local = read(tmp_path / "local", path=str(corpus), **here)
    assert local == read(tmp_path / "remote", path=f"{URL}/*.jsonl*", **there)
    assert local == read(tmp_path / "remote", path=URL, **there)
    mixed = [str(corpus / f"{n}.jsonl{'' if n % 2 else '.gz'}") if n < 3 else f"{URL}/{n}.jsonl*" for n in range(6)]
    assert local == read(tmp_path / "mixed", path=mixed, **there)
    assert not [path for path in (tmp_path / "remote" / REMOTE).rglob("*") if path.is_file() and path.name != "lock"]


def test_the_disk_holds_two_waves(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a wave is tokenized the next one is there or on its way, and no third."""
    folder, build = tmp_path / "cache" / REMOTE, waves.build_cache
    sizes = []

    def build_slowly(*arguments: Any, **more: Any) -> Any:
        cache = build(*arguments, **more)
        sizes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
        return cache

    monkeypatch.setattr(waves, "build_cache", build_slowly)
    make(tmp_path / "cache", path=URL)
    every = [path.stat().st_size for path in corpus.iterdir()]
    assert len(sizes) > 2
    assert sum(every) > 1.5 * max(sizes)
    largest = max(20_000, *every)
    assert max(sizes) <= 2 * largest
    assert sizes[0] > largest  # the second wave was fetched meanwhile


def test_each_object_is_fetched_once_until_it_changes(tmp_path: Path, corpus: Path) -> None:
    """A restart reads no byte of the store; of a changed object its own wave alone is read again."""
    local, cat = read(tmp_path / "local", path=str(corpus)), MemoryFileSystem.cat_file
    paths: list[str] = []

    def count(self: Any, path: str, **more: Any) -> bytes:
        paths.append(path)
        return cat(self, path, **more)

    with mock.patch.object(MemoryFileSystem, "cat_file", count):
        make(tmp_path / "cache", path=URL)
        assert {Path(path).name for path in paths} == {path.name for path in corpus.iterdir()}
        paths.clear()
        assert local == read(tmp_path / "cache", path=URL)
        assert not paths

        changed = (corpus / "1.jsonl").read_bytes().replace(b"cat", b"dog")
        (corpus / "1.jsonl").write_bytes(changed)
        fsspec.filesystem("memory").pipe_file("/bucket/corpus/1.jsonl", changed)
        other = read(tmp_path / "local", path=str(corpus))
        assert other[0] != local[0]
        assert other == read(tmp_path / "cache", path=URL)
        names = {Path(path).name for path in paths}
        assert "1.jsonl" in names
        assert "5.jsonl" not in names


def test_a_store_that_fails_now_and_then(tmp_path: Path, corpus: Path) -> None:
    """Busy answers, cut-off ones and broken connections are asked for again; the data are the same."""
    draw, cat, failures = random.Random(1), MemoryFileSystem.cat_file, []

    def fail(self: Any, path: str, start: int | None = None, end: int | None = None, **more: Any) -> bytes:
        data = cat(self, path, start=start, end=end, **more)
        if draw.random() < 0.7:
            return data
        failures.append(path)
        if draw.random() < 0.5:
            return data[: len(data) // 2]
        raise draw.choice([OSError(16, "SlowDown"), ConnectionResetError(), TimeoutError(), RuntimeError("500")])

    with mock.patch.object(MemoryFileSystem, "cat_file", fail):
        data = read(tmp_path / "cache", path=URL)
    assert len(failures) > 10
    assert data == read(tmp_path / "local", path=str(corpus))


def test_a_download_that_stays_cut_off_is_one_line(tmp_path: Path, corpus: Path) -> None:
    """And nothing with the name of the file is left; the next start goes on."""
    with (
        mock.patch.object(MemoryFileSystem, "cat_file", return_value=b"short"),
        pytest.raises(OSError, match=r"^data\.path memory:.*: EOFError: 5 of 3,000 bytes .* \(tried 8 times\)$"),
    ):
        make(tmp_path / "cache", path=URL)
    left = [path for path in (tmp_path / "cache" / REMOTE).rglob("*") if path.is_file()]
    assert [path.name for path in left] == ["lock"]
    assert read(tmp_path / "local", path=str(corpus)) == read(tmp_path / "cache", path=URL)


def test_an_object_that_changes_while_it_is_fetched(tmp_path: Path, corpus: Path) -> None:
    cat, memory = MemoryFileSystem.cat_file, fsspec.filesystem("memory")

    def replace(self: Any, path: str, **more: Any) -> bytes:
        data = cat(self, path, **more)
        memory.pipe_file(path, (corpus / Path(path).name).read_bytes())
        return data

    with (
        mock.patch.object(MemoryFileSystem, "cat_file", replace),
        pytest.raises(OSError, match=r"^data\.path memory:.*: changed while it was fetched: start again"),
    ):
        make(tmp_path / "cache", path=URL)


def test_files_of_token_ids(tmp_path: Path) -> None:
    """Megatron's pair, by its prefix, and a .npy are fetched whole, and mapped where they then are."""
    memory, folder = fsspec.filesystem("memory"), tmp_path / "ids"
    folder.mkdir()
    ids = np.random.default_rng(0).integers(0, 255, 5_000).astype(np.uint16)
    ids[49::50] = 256
    np.save(folder / "ids.npy", ids)
    memory.put(str(folder / "ids.npy"), "/bucket/ids.npy")
    assert read(tmp_path / "a", path=str(folder / "ids.npy")) == read(tmp_path / "b", path="memory://bucket/*.npy")
    (kept,) = (tmp_path / "b" / REMOTE).rglob("*.npy")
    assert kept.read_bytes() == (folder / "ids.npy").read_bytes()

    # The index as Megatron writes it: version 1, uint16, a sequence for each document.
    ends = np.arange(0, 5_001, 50)
    header = b"MMIDIDX\0\0" + np.array([1], "<u8").tobytes() + bytes([8])
    counts = np.array([100, 101], "<u8").tobytes()
    sizes, starts = np.full(100, 50, "<i4").tobytes(), (ends[:-1] * 2).astype("<i8").tobytes()
    (folder / "text.idx").write_bytes(header + counts + sizes + starts + np.arange(101, dtype="<i8").tobytes())
    ids.tofile(folder / "text.bin")
    for name in ("text.bin", "text.idx"):
        memory.put(str(folder / name), f"/bucket/{name}")
    assert read(tmp_path / "a", path=str(folder / "text")) == read(tmp_path / "b", path="memory://bucket/text")


def test_validation_sets_and_what_is_trained_on(tmp_path: Path, corpus: Path) -> None:
    """A set is the same from a URL, and is known to be trained on under another name."""
    common: dict[str, Any] = {"tokenizer": "bytes", "seq_len": 32, "local_batch_size": 2, "progress": False}
    cache = str(tmp_path / "cache")
    here = build_validation(path=str(corpus / "1.jsonl"), cache_folder=str(tmp_path / "local"), **common)
    there = build_validation(path=f"{URL}/1.jsonl", cache_folder=cache, **common)
    assert here.fingerprint == there.fingerprint
    for one, other in zip(here.batches(), there.batches(), strict=True):
        assert torch.equal(one[0], other[0])
    shutil.copy(corpus / "1.jsonl", tmp_path / "copy.jsonl")

    def both(path: str, other: str) -> bool:
        shared = trained_on(("text", [path], {}), [("text", [other], {})], cache)
        assert shared in ([], [path])
        return bool(shared)

    copy = str(tmp_path / "copy.jsonl")
    assert both(f"{URL}/1.jsonl", str(corpus))
    assert not both(copy, f"{URL}/3.jsonl")
    make(tmp_path / "cache", path=URL)
    assert both(copy, URL)
    assert not both(f"{URL}/3.jsonl", f"{URL}/1.jsonl")


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_beside_a_data_set_of_ones_own_all_is_fetched(
    tmp_path: Path, corpus: Path, tokenizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is the same run as with the files of a disk."""
    (tmp_path / "data_beside.py").write_text("def fn(): return [f'document {n} ' * (n % 7 + 1) for n in range(200)]")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    runs = []
    for cache, path in (("here", str(corpus)), ("there", URL)):
        sources = [SourceFiles("own", "data_beside:fn", [], 1), SourceFiles("text", "text", path, 2)]
        runs.append(read(tmp_path / cache, sources=sources, tokenizer=tokenizer))
    assert runs[0] == runs[1]


def test_a_folder_is_searched_as_a_local_one() -> None:
    memory = fsspec.filesystem("memory")
    for name in ("a.txt", "deep/b.jsonl.zst", "c.json", ".hidden/d.txt", "e.npy", "readme.md", "f.bin", "g.idx"):
        memory.pipe_file(f"/bucket/mix/{name}", b"x")
    assert [file.rpartition("mix/")[2] for file in find_files("memory://bucket/mix")] == ["a.txt", "deep/b.jsonl.zst"]
    memory.rm("/bucket/mix/a.txt")
    memory.rm("/bucket/mix/deep", recursive=True)
    assert [file.rpartition("mix/")[2] for file in find_files("memory://bucket/mix/")] == ["e.npy"]


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("memory://bucket/none.txt", "data.path memory://bucket/none.txt: no such file, folder or bucket"),
        ("memory://bucket/*.txt", r"data.path: memory://bucket/\*.txt matches no file"),
        ("memory://bucket/corpus/1.csv", "data.path: memory://bucket/corpus/1.csv has no format that is known"),
        ("ftp://host/a.txt", "data.path ftp://host/a.txt: no protocol that is read here: there are s3, "),
        ("simplecache::s3://b/a.txt", "no protocol that is read here"),
        ("s3://key:secret@bucket/a.txt", r"data.path s3://bucket/a.txt: the URL holds a user or a secret"),
        ("https://host/a.txt?X-Amz-Signature=secret", r"data.path https://host/a.txt: the URL holds a user or a sec"),
    ],
)
def test_mistakes_are_one_line(corpus: Path, url: str, text: str) -> None:
    fsspec.filesystem("memory").pipe_file("/bucket/corpus/1.csv", b"x")
    with pytest.raises((ValueError, OSError), match=text) as caught:
        find_files(url)
    assert "\n" not in str(caught.value)
    assert "secret@" not in str(caught.value)
    assert "Signature" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "package", "install"),
    [
        ("s3://bucket/a.txt", "s3fs", r"'titan_moe\[remote\]'"),
        ("gs://bucket/a.txt", "gcsfs", "gcsfs"),
        ("hf://datasets/a/b/c.txt", "huggingface_hub", r"'titan_moe\[remote\]'"),
    ],
)
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, url: str, package: str, install: str) -> None:
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ValueError, match=rf"^data\.path {url}: .*:// needs {package}: pip install {install}$"):
        find_files(url)


def test_credentials_that_are_not_there_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoCredentialsError(Exception):
        pass

    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append(0)
        raise NoCredentialsError("Unable to locate credentials")

    monkeypatch.setattr(MemoryFileSystem, "info", fail)
    with pytest.raises(
        OSError, match=r"^data\.path memory://b/a\.txt: no credentials \(Unable to locate credentials\)"
    ):
        find_files("memory://b/a.txt")
    assert len(calls) == 1
