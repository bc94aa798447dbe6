"""Token files of other tools: written by Megatron's own builder, by numpy, or byte by byte, and read in place."""

import io
import itertools
import json
import logging
import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from titan_moe.data import token_files
from titan_moe.data.build import Data, SourceFiles, build_data, build_validation
from titan_moe.data.cache import TokenFile, TokenParts
from titan_moe.data.sources import find_files
from titan_moe.data.token_files import (
    Documents,
    all_documents,
    divide_documents,
    join_documents,
    load_documents,
    open_tokens,
)
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.data.verify import verify_data

EOT = 256  # of the tokenizer of bytes, whose ids are 0 to 256
TEXTS = [f"document {index}: {'some words ' * (index % 17)}" for index in range(200)]
DOCUMENTS = [[*text.encode(), EOT] for text in TEXTS]
CODES = {"uint8": 1, "int16": 3, "int32": 4, "int64": 5, "float32": 7, "uint16": 8}


def index_bytes(lengths: list[int], borders: list[int], dtype: str = "uint16") -> bytes:
    """Return an .idx, written from the definition of the format."""
    size = np.dtype(dtype).itemsize if dtype in CODES else 2
    places = [size * before for before in itertools.accumulate(lengths, initial=0)][:-1]
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES.get(dtype, 99), len(lengths), len(borders))
    return header + struct.pack(f"<{len(lengths)}i{len(places)}q{len(borders)}q", *lengths, *places, *borders)


def write_pair(path: Path, documents: list[list[int]], dtype: str = "uint16") -> str:
    path.parent.mkdir(exist_ok=True, parents=True)
    np.array(list(itertools.chain(*documents)), dtype).tofile(path)
    path.with_suffix(".idx").write_bytes(
        index_bytes([len(ids) for ids in documents], list(range(len(documents) + 1)), dtype)
    )
    return str(path)


def write_with_megatron(prefix: Path, documents: list[list[int]], dtype: type, sentences: int = 1) -> str:
    """Write a pair with Megatron's builder, each document in a number of sequences."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    prefix.parent.mkdir(exist_ok=True, parents=True)
    builder = indexed.IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for ids in documents:
        lengths = [len(part) for part in np.array_split(ids, sentences)]
        builder.add_document(np.array(ids), lengths)
    builder.finalize(f"{prefix}.idx")
    return str(prefix)


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def read_documents(path: str, folder: Path, vocab_size: int = 257) -> list[list[int]]:
    tokenizer = bytes_tokenizer()._replace(vocab_size=vocab_size)
    (some,) = load_documents([open_tokens(path, vocab_size)], tokenizer, str(folder / "cache"))
    return [ids.tolist() for ids in np.split(some.file.tokens(), some.ends[:-1])]


def documents_of(parts: TokenParts) -> list[list[int]]:
    ids = parts.read(0, parts.num_tokens)
    return [part.tolist() for part in np.split(ids, np.flatnonzero(ids == EOT) + 1)[:-1]]


def make(folder: Path, path: Any, **settings: Any) -> Data:
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
    return build_data(**{**defaults, "path": path, **settings})


def batches(data: Data, count: int) -> list[list[list[int]]]:
    return [tokens.tolist() for tokens, _ in itertools.islice(iter(data.train), count)]


def ids_of(rows: Any) -> set[tuple[int, ...]]:
    """Return the documents that are whole in one row."""
    found = set()
    for tokens, _ in rows:
        for row in tokens.numpy():
            found |= {tuple(part.tolist()) for part in np.split(row, np.flatnonzero(row == EOT) + 1)[1:-1]}
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
@pytest.mark.parametrize("sentences", [1, 3])
def test_what_megatron_writes_is_read_in_place(tmp_path: Path, dtype: type, sentences: int) -> None:
    prefix = write_with_megatron(tmp_path / "made" / "corpus_text_document", DOCUMENTS, dtype, sentences)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        theirs = IndexedDataset(prefix)
    borders = theirs.document_indices
    expected = [
        np.concatenate([theirs[index] for index in range(start, stop)]).tolist()
        for start, stop in itertools.pairwise(borders)
    ]
    assert expected == DOCUMENTS
    (path,) = find_files(prefix)
    assert read_documents(path, tmp_path) == expected
    source = open_tokens(path, 257)
    assert source.file.dtype == np.dtype(dtype).str
    assert isinstance(source.file.tokens().base, np.memmap)
    assert {file.suffix for file in (tmp_path / "cache").iterdir()} == {".npy", ".crc32"}  # no copy of the tokens


@pytest.mark.parametrize("named", ["{}", "{}.bin", "{}.idx", "{}.*", ""])
def test_the_names_of_a_pair(tmp_path: Path, named: str) -> None:
    path = write_pair(tmp_path / "deep" / "a.bin", DOCUMENTS)
    assert find_files(named.format(tmp_path / "deep" / "a") or str(tmp_path)) == [path]


def test_training_on_tokens_is_training_on_their_text(tmp_path: Path) -> None:
    """Sequences are those of the text with the same tokenizer, whatever wrote the tokens."""
    text = make(tmp_path, write_jsonl(tmp_path / "a.jsonl", TEXTS), validation_fraction=0.0)
    expected = batches(text, 30)
    half = len(DOCUMENTS) // 2
    flat = np.concatenate([np.array(ids) for ids in DOCUMENTS])
    np.save(tmp_path / "headed.npy", flat.astype(">u4"))
    flat.astype("<u2").tofile(tmp_path / "raw16.npy")
    flat.astype("<u4").tofile(tmp_path / "raw32.npy")
    two = [write_pair(tmp_path / "1.bin", DOCUMENTS[:half]), write_pair(tmp_path / "2.bin", DOCUMENTS[half:], "int64")]
    for path in (two, *(str(tmp_path / name) for name in ("headed.npy", "raw16.npy", "raw32.npy"))):
        data = make(tmp_path, path, validation_fraction=0.0)
        assert data.validation is None
        assert batches(data, 30) == expected


@pytest.mark.parametrize(("degree", "local"), [(1, 8), (2, 4), (4, 1)])
def test_sequences_do_not_depend_on_the_layout_nor_on_a_restart(tmp_path: Path, degree: int, local: int) -> None:
    path = [write_pair(tmp_path / f"{part}.bin", DOCUMENTS[part::3]) for part in range(3)]
    whole = [sorted(rows) for rows in batches(make(tmp_path, path, local_batch_size=8), 12)]
    settings = {"local_batch_size": local, "dp_degree": degree}
    ranks = [make(tmp_path, path, dp_rank=rank, **settings) for rank in range(degree)]
    passes = 8 // (degree * local)
    first = [batches(rank, 5 * passes) for rank in ranks]
    again = [make(tmp_path, path, dp_rank=rank, num_workers=rank % 2, **settings) for rank in range(degree)]
    for rank, before in zip(again, ranks, strict=True):
        rank.train.load_state_dict(before.train.state_dict())
    second = [batches(rank, 7 * passes) for rank in again]
    for step in range(12):
        parts, start = (first, step * passes) if step < 5 else (second, (step - 5) * passes)
        rows = [row for rank in parts for batch in rank[start : start + passes] for row in batch]
        assert sorted(rows) == whole[step]


def test_a_fraction_is_held_out_by_document(tmp_path: Path) -> None:
    """Every document is on one side, whole and in its order; copies in any file are on the same side."""
    paths = [
        write_pair(tmp_path / "a.bin", DOCUMENTS[:120]),
        write_pair(tmp_path / "b.bin", [ids[:-1] for ids in DOCUMENTS[:60]] + DOCUMENTS[120:], "int32"),
    ]
    tokenizer = bytes_tokenizer()
    documents = load_documents([open_tokens(path, 257) for path in paths], tokenizer, str(tmp_path / "cache"))
    train, validation, count, borders = divided = divide_documents(documents, 0.2, [])
    assert hash(divided.train) == hash(divide_documents(documents, 0.2, []).train)
    assert train.num_tokens + validation.num_tokens == all_documents(documents).num_tokens
    assert sum(count.values()) == 260
    assert {name: len(ends) for name, (ends, _) in borders.items()} == count
    assert 10 < count["validation"] < 90
    masks = [some.hashes < 0.2 * 2.0**64 for some in documents]
    everything = [*DOCUMENTS[:120], *(ids[:-1] for ids in DOCUMENTS[:60]), *DOCUMENTS[120:]]
    mask = np.concatenate(masks)
    for parts, wanted in ((train, ~mask), (validation, mask)):
        expected = [id_ for ids, keep in zip(everything, wanted, strict=True) if keep for id_ in ids]
        assert parts.read(0, parts.num_tokens).tolist() == expected
        for start, stop in ((0, 1), (3, 900), (len(expected) - 7, len(expected))):
            assert parts.read(start, stop).tolist() == expected[start:stop]
    assert np.array_equal(masks[0][:60], masks[1][:60])  # with and without an end of text, in 2 and in 4 bytes

    data = make(tmp_path, paths, validation_fraction=0.2, seq_len=200)
    assert data.validation is not None
    held_out = ids_of(data.validation())
    trained = ids_of(itertools.islice(iter(data.train), 60))
    assert len(held_out) > 5
    assert len(trained) > 50
    assert not held_out & trained


@pytest.mark.parametrize("seed", range(20))
def test_any_choice_of_documents_reads_as_they_follow_each_other(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    documents, keep, expected = [], [], []
    for number, dtype in enumerate(rng.choice(["uint8", "uint16", "int32"], 4)):
        sizes = rng.integers(0, 6, int(rng.integers(0, 12)))
        ids, mask = rng.integers(0, 250, int(sizes.sum())), rng.random(len(sizes)) < 0.5
        ids.astype(dtype).tofile(tmp_path / f"{number}")
        file = TokenFile(str(tmp_path / f"{number}"), dtype, len(ids))
        documents.append(Documents(file, "", np.cumsum(sizes), np.zeros(len(sizes), np.uint64), sizes > 0))
        keep.append(mask)
        expected += [
            id_ for part, kept in zip(np.split(ids, np.cumsum(sizes))[:-1], mask, strict=True) if kept for id_ in part
        ]
    parts = join_documents(documents, keep)
    assert parts.num_tokens == len(expected)
    for start, stop in itertools.combinations(range(len(expected) + 1), 2):
        assert parts.read(start, stop).tolist() == expected[start:stop]


@pytest.mark.parametrize("kinds", ["tokens tokens", "tokens text", "text tokens"])
def test_validation_files_are_not_trained_on(tmp_path: Path, kinds: str) -> None:
    """Whichever of the two is text."""
    train, other = kinds.split()
    held_out = range(0, 200, 7)
    path = write_pair(tmp_path / "a.bin", DOCUMENTS) if train == "tokens" else write_jsonl(tmp_path / "a.jsonl", TEXTS)
    if other == "tokens":
        validation_path = write_pair(tmp_path / "b.bin", [DOCUMENTS[index] for index in held_out], "int32")
    else:
        validation_path = write_jsonl(tmp_path / "b.jsonl", [TEXTS[index] for index in held_out])
    data = make(tmp_path, path, validation_path=validation_path, seq_len=1000, global_batch_size=4)
    assert data.validation is not None
    rows = [row for tokens, labels in data.validation() for row in (tokens.tolist() + labels[:, -1:].tolist())]
    seen = [id_ for row in rows for id_ in row]
    joined = list(itertools.chain(*(DOCUMENTS[index] for index in held_out)))
    assert len(joined) - 1000 <= len(seen) <= len(joined) + 10
    trained = ids_of(itertools.islice(iter(data.train), 40))
    numbers = {bytes(ids[:-1]).decode().split(":")[0] for ids in trained}
    assert len(numbers) > 100
    assert not numbers & {f"document {index}" for index in held_out}


@pytest.mark.parametrize("fraction", [1e-12, 0.999999])
def test_one_document_at_least_is_on_either_side(tmp_path: Path, fraction: float) -> None:
    path = write_pair(tmp_path / "a.bin", DOCUMENTS[:50])
    documents = load_documents([open_tokens(path, 257)], bytes_tokenizer(), str(tmp_path / "cache"))
    count = divide_documents(documents, fraction, []).num_documents
    assert sorted(count.values()) == [1, 49]
    alone = write_pair(tmp_path / "alone.bin", DOCUMENTS[3:4] * 3)
    with pytest.raises(
        ValueError, match=r"data.validation_fraction \(0.1\) divides the documents into \d for training"
    ):
        make(tmp_path, alone)


def test_evaluation_on_token_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(bytes_tokenizer().to_json(), encoding="utf-8")
    arguments: dict[str, Any] = {
        "tokenizer": str(tmp_path / "tokenizer.json"),
        "seq_len": 50,
        "local_batch_size": 4,
        "cache_folder": str(tmp_path / "cache"),
    }
    pair = write_pair(tmp_path / "a.bin", DOCUMENTS)
    text = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    rows = [
        torch.cat([tokens for tokens, _ in build_validation(path=path, **arguments).batches()]) for path in (pair, text)
    ]
    assert torch.equal(*rows)


def test_empty_documents_and_files(tmp_path: Path) -> None:
    documents = [[], DOCUMENTS[1], [], [], DOCUMENTS[2], []]
    path = write_pair(tmp_path / "a.bin", documents)
    assert read_documents(path, tmp_path) == documents
    empty = write_pair(tmp_path / "empty.bin", [])
    sources = [open_tokens(name, 257) for name in (empty, path, empty)]
    loaded = load_documents(sources, bytes_tokenizer(), str(tmp_path / "cache"))
    parts = all_documents(loaded)
    assert documents_of(parts) == [DOCUMENTS[1], DOCUMENTS[2]]
    with pytest.raises(ValueError, match=r"empty.bin: no documents in it$"):
        make(tmp_path, empty)


def test_documents_larger_than_a_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Borders, hashes and last ids do not depend on how much is read at once."""
    flat = np.concatenate([np.array(ids, np.uint16) for ids in DOCUMENTS])
    np.save(tmp_path / "a.npy", flat)
    sources = [open_tokens(path, 257) for path in (str(tmp_path / "a.npy"), write_pair(tmp_path / "a.bin", DOCUMENTS))]
    results = []
    for chunk in (1 << 22, 1000, 7):
        monkeypatch.setattr(token_files, "CHUNK_TOKENS", chunk)
        for source in sources:
            job = token_files._Job(source, 257, EOT, str(tmp_path / "out.npy"))
            assert sum(token_files.index_documents(job)) == len(flat)
            results.append(np.load(tmp_path / "out.npy").tolist())
    assert all(result == results[0] for result in results)
    assert results[0][0] == list(itertools.accumulate(map(len, DOCUMENTS)))


def test_an_index_is_made_once_and_again_when_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_pair(tmp_path / "a.bin", DOCUMENTS)
    expected = batches(make(tmp_path, path), 10)
    (index,) = (tmp_path / "cache").glob("documents-*.npy")
    assert verify_data([str(tmp_path / "cache")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(token_files, "index_documents", None)
        assert batches(make(tmp_path, path), 10) == expected
    index.write_bytes(index.read_bytes()[:-1] + b"\xff")
    with pytest.raises(ValueError, match="1 damaged"):
        verify_data([str(tmp_path / "cache")])
    with caplog.at_level(logging.WARNING, "titan_moe"):
        assert batches(make(tmp_path, path), 10) == expected
    assert [message for message in caplog.messages if f"{index} is damaged" in message]
    write_pair(tmp_path / "a.bin", [*DOCUMENTS[1:], DOCUMENTS[0]])  # of the same size
    assert batches(make(tmp_path, path), 10) != expected


def test_parts_travel_to_workers(tmp_path: Path) -> None:
    path = write_pair(tmp_path / "a.bin", DOCUMENTS)
    parts = all_documents(load_documents([open_tokens(path, 257)], bytes_tokenizer(), str(tmp_path / "cache")))
    assert pickle.loads(pickle.dumps(parts)).read(5, 300).tolist() == parts.read(5, 300).tolist()
    expected = batches(make(tmp_path, path), 10)
    assert batches(make(tmp_path, path, num_workers=2), 10) == expected


def test_documents_without_an_end_of_text_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """All of these texts end with a line's end, which is no end of text, because lines end within them too."""
    path = write_pair(tmp_path / "a.bin", [[*f"{text}\nmore\n".encode()] for text in TEXTS])
    with caplog.at_level(logging.WARNING, "titan_moe"):
        make(tmp_path, path)
    assert [message for message in caplog.messages if "none of its 200 documents ends with the end of text" in message]


def raw(dtype: str, ids: list[int]) -> bytes:
    return np.array(ids, dtype).tobytes()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


FLAT = list(itertools.chain(*DOCUMENTS))
PAIR = (raw("uint16", FLAT), index_bytes([len(ids) for ids in DOCUMENTS], list(range(201))))
LENGTHS = [len(ids) for ids in DOCUMENTS]
# name -> (files by their ending, the error)
BAD: dict[str, tuple[dict[str, bytes], str]] = {
    "no idx": ({".bin": PAIR[0]}, r"a.bin: a.idx is not beside it: Megatron's files are pairs"),
    "no bin": ({".idx": PAIR[1]}, r"a.idx: a.bin is not beside it: Megatron's files are pairs"),
    "bin cut off": ({".bin": PAIR[0][:-6], ".idx": PAIR[1]}, r"a.bin: [\d,]+ bytes, but a.idx is of [\d,]+ bytes"),
    "bin of other data": ({".bin": PAIR[0] * 2, ".idx": PAIR[1]}, r"a.bin: [\d,]+ bytes, but a.idx is of [\d,]+ bytes"),
    "idx cut off": ({".bin": PAIR[0], ".idx": PAIR[1][:-9]}, r"a.idx: [\d,]+ bytes, but 200 sequences and 201 borders"),
    "idx cut off in its header": (
        {".bin": PAIR[0], ".idx": PAIR[1][:20]},
        r"a.idx: cut off within its header, after 20",
    ),
    "no index": ({".bin": PAIR[0], ".idx": b"x" * 99}, r"a.idx: not an index of Megatron's"),
    "another version": (
        {".bin": PAIR[0], ".idx": PAIR[1][:9] + b"\x02" + PAIR[1][10:]},
        r"a.idx: version 2 of Megatron's index; only version 1 is known",
    ),
    "unknown type": (
        {".bin": PAIR[0], ".idx": index_bytes(LENGTHS, list(range(201)), "?")},
        r"a.idx: .*type is 99: no",
    ),
    "floats": (
        {".bin": raw("float32", FLAT), ".idx": index_bytes(LENGTHS, list(range(201)), "float32")},
        r"a.idx: the code of its type is 7: float32, which are no ids",
    ),
    "gaps": (
        {".bin": PAIR[0], ".idx": PAIR[1][: 34 + 800 + 8] + b"\x04" + PAIR[1][34 + 800 + 9 :]},
        r"a.idx: its sequences do not follow each other",
    ),
    "documents that end early": (
        {".bin": PAIR[0], ".idx": index_bytes(LENGTHS, [*range(200), 199])},
        r"a.idx: its documents do not cover its 200 sequences",
    ),
    "id of the bin": (
        {".bin": raw("uint16", [*FLAT[:-1], 257]), ".idx": PAIR[1]},
        rf"a.bin: id 257 \(token {len(FLAT) - 1:,}\) is not one of the tokenizer's 257 ids: .*--data.tokenizer",
    ),
    "negative id": (
        {".bin": raw("int32", [-1, *FLAT[1:]]), ".idx": index_bytes(LENGTHS, list(range(201)), "int32")},
        r"a.bin: id -1 \(token 0\) is not one of the tokenizer's 257 ids",
    ),
    "another end of text": (
        {".bin": raw("uint16", [0 if id_ == EOT else id_ for id_ in FLAT]), ".idx": PAIR[1]},
        r"a.bin: every document ends with id 0 \(.*\), and the tokenizer's end of text is .* \(id 256\): .*eot_token",
    ),
    "another end of text, and an empty document": (
        {
            ".bin": raw("uint16", [0 if id_ == EOT else id_ for id_ in FLAT]),
            ".idx": index_bytes([*LENGTHS, 0], list(range(202))),
        },
        r"a.bin: every document ends with id 0 ",
    ),
    "id of the npy": (
        {".npy": npy(np.array([*FLAT, 9999]))},
        r"a.npy: id 9999 \(token .*\) is not one of the tokenizer",
    ),
    "id of a raw npy": ({".npy": raw("uint32", [*FLAT, 70_000])}, r"a.npy: id 70000 \(token .*\) is not one of the"),
    "npy cut off": ({".npy": npy(np.array(FLAT))[:-3]}, r"a.npy: cut off or damaged"),
    "npy cut off in its header": ({".npy": npy(np.array(FLAT))[:40]}, r"a.npy: cut off or damaged"),
    "npy of floats": ({".npy": npy(np.array([1.5]))}, r"a.npy: float64 of shape \(1,\): token ids are integers in one"),
    "npy of rows": ({".npy": npy(np.ones((3, 4), int))}, r"a.npy: int64 of shape \(3, 4\)"),
    "npy of objects": ({".npy": npy(np.array([{}], object))}, r"a.npy: cut off or damaged \(.*objects"),
    "raw npy cut off": ({".npy": raw("uint16", FLAT)[:-1]}, r"a.npy: [\d,]+ bytes are no ids of two or four bytes"),
    "raw npy of 4 bytes cut off": ({".npy": raw("uint32", FLAT)[:-2]}, r"a.npy: ids of four bytes by its content, but"),
    "npy that does not tell": (
        {".npy": raw("uint16", [7, 0, 0, 0, 7, 9, 7, 0] * 50)},
        r"a.npy: two or four bytes an id",
    ),
    "npy without an end of text": (
        {".npy": raw("uint16", [id_ for id_ in FLAT if id_ != EOT])},
        r"a.npy: none of its [\d,]+ tokens is the end of text, .* \(id 256\): name the tokenizer",
    ),
}


def write_bad(folder: Path, name: str) -> tuple[str, str]:
    files, message = BAD[name]
    for suffix, content in files.items():
        (folder / f"a{suffix}").write_bytes(content)
    return str(folder / f"a{next(iter(files))}"), message


@pytest.mark.parametrize("name", BAD)
def test_files_that_cannot_be_read_are_one_line(tmp_path: Path, name: str) -> None:
    path, message = write_bad(tmp_path, name)
    with pytest.raises((ValueError, OSError), match=message) as caught:
        make(tmp_path, path)
    assert "\n" not in str(caught.value)
    assert not [*tmp_path.rglob("documents-*")] or "end of text" in name


def test_settings_that_do_not_go_with_token_files(tmp_path: Path) -> None:
    pair, text = write_pair(tmp_path / "a.bin", DOCUMENTS), write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(
        ValueError, match=r"data.path: .*a.bin holds token ids and .*a.jsonl text: name files of one or"
    ):
        make(tmp_path, [pair, text])
    with pytest.raises(ValueError, match=r"data.tokenizer \(bpe:300\) is trained on text, and .*a.bin holds token ids"):
        make(tmp_path, pair, tokenizer="bpe:300")
    with pytest.raises(ValueError, match=r"data.tokenizer \(bpe:300\) is trained on text, and .*a.bin holds token ids"):
        make(tmp_path, text, validation_path=pair, tokenizer="bpe:300")
    with pytest.raises(
        ValueError, match=r"training.seq_len \(99999\) is longer than the data of data.path \([\d]+ tok"
    ):
        make(tmp_path, pair, seq_len=99_999)


def test_in_folders_text_goes_before_tokens(tmp_path: Path) -> None:
    """A .npy or .bin beside text is something else more often than data: folders are read as they were before."""
    text = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    np.save(tmp_path / "b.npy", np.ones(3))
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert find_files(str(tmp_path)) == [text]
    os.remove(text)
    assert find_files(str(tmp_path)) == [str(tmp_path / "b.npy")]


@pytest.mark.parametrize("held_out", ["fraction", "text", "tokens"])
def test_sources_of_text_and_of_tokens(tmp_path: Path, held_out: str) -> None:
    """Each with its share, and no document of one is validation data of the other."""
    first = write_jsonl(tmp_path / "a.jsonl", TEXTS[:150])
    second = write_pair(tmp_path / "b.bin", DOCUMENTS[50:])
    settings: dict[str, Any] = {"validation_fraction": 0.3}
    if held_out == "text":
        settings = {"validation_path": write_jsonl(tmp_path / "c.jsonl", TEXTS[60:90])}
    elif held_out == "tokens":
        settings = {"validation_path": write_pair(tmp_path / "c.bin", DOCUMENTS[60:90])}
    sources = [SourceFiles("text", "text", first, 3), SourceFiles("tokens", "text", second, 1)]
    data = make(tmp_path, (), sources=sources, steps=50, seq_len=400, **settings)
    assert data.validation is not None
    held = ids_of(data.validation())
    trained = ids_of(itertools.islice(iter(data.train), 100))
    numbers = {int(bytes(ids[:-1]).decode().split(":")[0].removeprefix("document ")) for ids in trained}
    assert len(held) > 10
    assert not held & trained
    assert min(numbers) < 50
    assert max(numbers) >= 150
    assert dict(data.train.tokens_by_source(400)) == {"text": 400 * 300, "tokens": 400 * 100}
    assert (held_out == "fraction") == bool(numbers & set(range(60, 90)))
