"""Data sets of one's own: what a function may give, the cache of its documents, its streams, and what can be wrong."""

import itertools
import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.unit.data.test_token_files import write_pair
from titan_moe.data import stream
from titan_moe.data.build import Data, SourceFiles, build_data, build_validation
from titan_moe.data.tokenizer import bytes_tokenizer

TEXTS = [f"document {number} " + "word " * (number * 7 % 23) for number in range(300)]
Write = Callable[..., None]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the module `own_data`, which the next start imports; workers find it by the search path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(source: str) -> None:
        (tmp_path / "own_data.py").write_text(source)
        sys.modules.pop("own_data", None)
        sys.dont_write_bytecode = True  # or a file of the same second and size would not be read anew

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield write
    sys.modules.pop("own_data", None)


@pytest.fixture
def build(tmp_path: Path) -> Callable[..., Data]:
    def build(**options: Any) -> Data:
        settings = {"dataset": "own_data:fn", "tokenizer": "bytes", "seq_len": 16, "seed": 3, "progress": False}
        settings |= {"global_batch_size": 4, "local_batch_size": 4, "validation_fraction": 0.1, "validation_steps": 2}
        return build_data(**{**settings, "cache_folder": str(tmp_path / "cache"), **options})

    return build


def batches(of: Data, count: int = 30) -> torch.Tensor:
    return torch.cat([tokens for tokens, _ in itertools.islice(of.train, count)])


def held_out(of: Data) -> torch.Tensor:
    assert of.validation is not None
    return torch.cat([tokens for tokens, _ in of.validation()])


FORMS = {
    "a list": f"def fn(): return {TEXTS!r}",
    "rows": f"def fn(): return [{{'text': text, 'id': 3}} for text in {TEXTS!r}]",
    "a class": f"""
class Texts:
    def __len__(self): return {len(TEXTS)}
    def __getitem__(self, index): return {TEXTS!r}[index]
def fn(): return Texts()
""",
    "a data set of datasets": f"""
import datasets
def fn(): return datasets.Dataset.from_dict({{"text": {TEXTS!r}}})
""",
    "with nulls": f"def fn(): return [t for text in {TEXTS!r} for t in (None, text, '')]",
}


@pytest.mark.parametrize("form", FORMS)
def test_documents_by_index_are_what_files_of_them_are(
    write: Write, build: Callable[..., Data], tmp_path: Path, form: str
) -> None:
    """The same split, the same batches, the same validation data."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    files = build(dataset="text", path=str(tmp_path / "texts.jsonl"))
    write(FORMS[form])
    function = build()
    assert torch.equal(batches(function), batches(files))
    assert torch.equal(held_out(function), held_out(files))


def test_a_bpe_and_held_out_files(write: Write, build: Callable[..., Data], tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    (tmp_path / "some.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS[::9]))
    options = {"tokenizer": "bpe:300", "validation_path": str(tmp_path / "some.jsonl"), "validation_fraction": 0.0}
    files = build(dataset="text", path=str(tmp_path / "texts.jsonl"), **options)
    write(FORMS["a list"])
    function = build(**options)
    assert function.tokenizer.files == files.tokenizer.files
    assert torch.equal(batches(function), batches(files))
    assert torch.equal(held_out(function), held_out(files))


@pytest.mark.parametrize(
    "form", ["{}", "[numpy.array(ids, dtype='uint16') for ids in {}]", "[torch.tensor(i) for i in {}]"]
)
def test_token_ids_are_what_a_pair_of_megatrons_is(
    write: Write, build: Callable[..., Data], tmp_path: Path, form: str
) -> None:
    ids = [[*text.encode(), 256] for text in TEXTS]
    pair = build(dataset="text", path=write_pair(tmp_path / "pair.bin", ids))
    write(f"import numpy, torch\ndef fn(): return {form.format(ids)}")
    function = build()
    assert torch.equal(batches(function), batches(pair))
    assert torch.equal(held_out(function), held_out(pair))
    write(f"def fn(): return {[[*text.encode(), 300] for text in TEXTS]}")
    with pytest.raises(
        ValueError, match=r"^data.dataset \(own_data:fn\): id 300 \(token 11\) is not one of the tokeni"
    ):
        build()
    write(FORMS["a list"])


def test_ids_beside_text_are_divided_by_one_hash(write: Write, build: Callable[..., Data], tmp_path: Path) -> None:
    """So that no copy of a document is on the other side, whatever its source holds."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    write(f"def fn(): return {[[*text.encode(), 256] for text in TEXTS]}")
    sources = [SourceFiles("ids", "own_data:fn", [], 1), SourceFiles("text", "text", str(tmp_path / "texts.jsonl"), 1)]
    one = build(sources=sources)
    assert [*one.validation_sets] == ["ids", "text"]
    assert torch.equal(*map(set_tokens, one.validation_sets.values()))


def set_tokens(one: Any) -> torch.Tensor:
    return torch.cat([tokens for tokens, _ in one.batches()])


COUNTED = """
import pathlib
TEXTS = [f"text {{n}} {extra}" for n in range({count})]
class Texts:
    {fingerprint}
    def __len__(self): return len(TEXTS)
    def __getitem__(self, index):
        with open({log!r}, "a") as log: log.write(".")
        return TEXTS[index]
def fn(): return Texts()
"""


def test_documents_are_read_again_unless_a_fingerprint_says_that_they_are_the_same(
    write: Write, build: Callable[..., Data], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    log = tmp_path / "read"

    def start(fingerprint: str = "", extra: str = "more", count: int = 500) -> tuple[bool, int, str]:
        """Whether documents were tokenized, how many were read for it, and what data they are."""
        line = f"fingerprint = {fingerprint!r}" if fingerprint else ""
        write(COUNTED.format(fingerprint=line, extra=extra, count=count, log=str(log)))
        log.write_text("")
        caplog.clear()
        fingerprint = build().fingerprints["data"]
        return "token cache ready" in caplog.text, len(log.read_text()), fingerprint

    # without one: read through at each start, tokenized where they have changed
    first = start()
    assert first[0]
    again = start()
    assert (again[0], again[2]) == (False, first[2])
    assert 500 <= again[1] < 1000
    changed = start(extra="other words")
    assert changed[0]
    assert changed[2] != first[2]

    # with one: some documents are looked at
    assert start("v1")[2] == first[2]
    assert start("v1")[1] < 100
    assert start("v1")[0] is False
    other = start("v1", extra="words again")  # the function was edited, and its author forgot the fingerprint
    assert other[0]
    assert other[1] >= 1000
    assert start("v1", count=501)[0]
    assert start("v2")[1] >= 500


def test_a_function_that_gives_others_each_time(write: Write, build: Callable[..., Data]) -> None:
    write("import uuid\ndef fn(): return [f'{uuid.uuid4()}' for _ in range(100)]")
    with pytest.raises(ValueError, match=r"^data.dataset \(own_data:fn\): documents 0 to 99 are others than when they"):
        build()


STREAM = """
class Stream:
    def __init__(self): self.next = 0
    def __iter__(self):
        documents = {documents}
        while self.next < len(documents):
            self.next += 1
            yield documents[self.next - 1]
    def state_dict(self): return {{"next": self.next}}
    def load_state_dict(self, state): self.next = state["next"]
def fn(): return Stream()
"""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 16)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "source",
    [
        STREAM.format(documents=TEXTS),
        STREAM.format(documents=[{"text": text} for text in TEXTS]),
        f"""
import datasets
def fn(): return datasets.Dataset.from_dict({{"text": {TEXTS!r}}}).to_iterable_dataset(num_shards=3)
""",
        f"""
import warnings
from torchdata.stateful_dataloader import StatefulDataLoader
def fn():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torchdata 0.11 with torch 2.13
        return StatefulDataLoader({TEXTS!r}, batch_size=None)
""",
    ],
    ids=["texts", "rows", "datasets", "torchdata"],
)
def test_a_stream_is_what_a_streamed_folder_of_its_documents_is(
    write: Write, build: Callable[..., Data], tmp_path: Path, source: str
) -> None:
    """The same lanes over two epochs, the same held-out documents, and it goes on where it was."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    folder = build(dataset="hf", path=str(tmp_path / "folder"))
    write(source)
    function = build()
    whole = batches(function, 300)
    assert torch.equal(whole, batches(folder, 300))
    assert torch.equal(held_out(function), held_out(folder))

    # twice stopped, with the position as a file would have it
    train, seen = build().train, []
    for steps in (70, 90, 140):
        seen += [tokens for tokens, _ in itertools.islice(train, steps)]
        state = json.loads(json.dumps(train.state_dict()))
        train = build().train
        train.load_state_dict(state)
    assert torch.equal(torch.cat(seen), whole)


def test_a_stream_of_ids_is_that_of_the_text(write: Write, build: Callable[..., Data]) -> None:
    options = {"validation_fraction": 0.0}
    write(STREAM.format(documents=TEXTS))
    text = batches(build(**options), 100)
    write(STREAM.format(documents=[bytes_tokenizer().encode_document(text).tolist() for text in TEXTS]))
    assert torch.equal(batches(build(**options), 100), text)

    # what is held out is not trained on
    of = build(validation_fraction=0.3, seq_len=512)
    lane = batches(of, 20)[0::4].flatten().tolist()  # one after the other
    trained = set(bytes(token if token < 256 else 10 for token in lane).split(b"\n")[:-1])
    validation = bytes(token if token < 256 else 10 for token in held_out(of).flatten().tolist()).split(b"\n")[1:-1]
    documents = {text.encode() for text in TEXTS} & set(validation)
    assert documents
    assert trained <= {text.encode() for text in TEXTS}
    assert not documents & trained
    write(STREAM.format(documents=[[400, 3]] * 100))
    with pytest.raises(ValueError, match=r"data.dataset \(own_data:fn\): id 400 is not one of the tokenizer's"):
        batches(build(**options))


def test_validation_sets(write: Write, tmp_path: Path) -> None:
    """All documents by index, and the first ones of a stream."""
    options = {"tokenizer": "bytes", "seq_len": 16, "local_batch_size": 4, "cache_folder": str(tmp_path / "cache")}
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    files = set_tokens(build_validation(path=str(tmp_path / "texts.jsonl"), **options))
    for source in (FORMS["a list"], STREAM.format(documents=TEXTS)):
        write(source)
        own = build_validation(dataset="own_data:fn", **options)
        assert torch.equal(set_tokens(own), files)


WRONG: dict[str, tuple[str, str]] = {
    "raises": ("def fn(): return [][0]", r"IndexError: list index out of range \(own_data.py:1\)"),
    "no documents": ("def fn(): return 3", "gives a int, which has neither documents by index"),
    "a text": ("def fn(): return 'text'", "gives a str, which has neither"),
    "splits": ("def fn(): return {'train': ['a']}", "gives a dict, which has neither"),
    "a generator": ("def fn(): yield 'a'", "gives a generator, which has neither"),
    "nothing in it": ("def fn(): return []", "no documents: it has 0"),
    "no text in it": ("def fn(): return ['', None]", "no documents: it has 2, and none with a text"),
    "another type": ("def fn(): return [1.5]", "document 0 is a float: it must be a str, token ids"),
    "bytes": ("def fn(): return [b'a']", "document 0 is a bytes"),
    "rows without text": ("def fn(): return [{'a': 1, 'b': 2}]", "document 0 is a row of a, b: it must be"),
    "two dimensions": ("def fn(): return [[[1, 2], [3, 4]]]", "document 0 is a list"),
    "fractions": ("def fn(): return [[1, 2], [0.5]]", "document 1 is a list"),
    "both": (
        "def fn(): return ['a'] * 200 + [[1]] + ['a'] * 200",
        "document 200 is token ids, and those before it text",
    ),
    "half a character": ("def fn(): return ['\\ud800']", "document 0 holds half a surrogate pair"),
    "breaks later": (
        "class D:\n def __len__(self): return 300\n def __getitem__(self, i): return f'{i}' if i != 77 else 1 / 0\n"
        "def fn(): return D()",
        r"ZeroDivisionError: division by zero \(own_data.py:3\)",
    ),
    "a length that lies": (
        "class D(list):\n def __len__(self): return 5\ndef fn(): return D('abc')",
        r"IndexError: list index out of range \(",
    ),
    "a stream behind": (
        STREAM.format(documents=TEXTS).replace(
            "            self.next += 1\n            yield documents[self.next - 1]",
            "            yield documents[self.next]\n            self.next += 1",
        ),
        r"its state does not lead back .*: after 32 documents and load_state_dict\(state_dict\(\)\), document 0 from",
    ),
    "a stream that forgets": (
        STREAM.format(documents=TEXTS).replace('self.next = state["next"]', "pass"),
        "its state does not lead back",
    ),
    "a state of objects": (
        STREAM.format(documents=TEXTS).replace('{"next": self.next}', '{"next": object()}'),
        r"state_dict\(\) must give a dict of numbers, strings, lists and dicts",
    ),
    "no state": (
        STREAM.format(documents=TEXTS).replace('{"next": self.next}', "3"),
        r"state_dict\(\) must give a dict",
    ),
    "an empty stream": (STREAM.format(documents=[]), "no documents: the stream has none"),
    "a stream that breaks": (
        STREAM.format(documents=TEXTS).replace("self.next += 1", "self.next += 1 // (self.next < 9)"),
        r"ZeroDivisionError: .* \(own_data.py:7\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_can_be_wrong(write: Write, build: Callable[..., Data], name: str) -> None:
    source, message = WRONG[name]
    write(source)
    with pytest.raises(ValueError, match=rf"^data.dataset \(own_data:fn\): {message}") as raised:
        build()
    assert "\n" not in str(raised.value)


IDS = f"def fn(): return {[[1, 2, 256]] * 50}"
BESIDE: dict[str, tuple[str, dict[str, Any], str]] = {
    "a BPE on ids": (IDS, {"tokenizer": "bpe:300"}, r"data.tokenizer \(bpe:300\) is trained on text, and data.dataset"),
    "a BPE on a stream of ids": (
        STREAM.format(documents=[[1, 2]] * 50),
        {"tokenizer": "bpe:300"},
        r"data.tokenizer \(bpe:300\) is trained on text, and data.dataset \(own_data:fn\) holds token ids",
    ),
    "files held out of a stream of ids": (
        STREAM.format(documents=[[1, 2]] * 50),
        {"validation_fraction": 0.0, "validation_path": __file__.replace(".py", ".txt")},
        r"data.validation_path .*: set data.validation_fraction instead",
    ),
    "a stream to be packed": (
        STREAM.format(documents=TEXTS),
        {"packing": "best_fit"},
        r"data.packing \(best_fit\) needs to know all documents, and data.dataset \(own_data:fn\) is read while",
    ),
    "arguments that JSON has not": (
        "def fn(day): return []",
        {"arguments": {"day": {1}}},
        r"data.dataset \(own_data:fn\): its arguments must be numbers",
    ),
}


@pytest.mark.parametrize("name", BESIDE)
def test_what_does_not_go_together(write: Write, build: Callable[..., Data], tmp_path: Path, name: str) -> None:
    source, options, message = BESIDE[name]
    write(source)
    if "validation_path" in options:
        (tmp_path / "some.txt").write_text("text\n")
        options = {**options, "validation_path": str(tmp_path / "some.txt")}
    with pytest.raises(ValueError, match=message):
        build(**options)
