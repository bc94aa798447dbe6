"""Data sets of one's function: `dataset = "my_pkg.my_mod:fn"`, a function that gives documents.

It gives an object by whose index documents are read (`len`, `[i]`), which are tokenized once into the cache as files
are, or a stream (iterable, `state_dict`, `load_state_dict`), which is read while training. A document is a str, a row
with a str under `text`, or token ids.

Tokens of the cache are found by the content of the documents, which are read through at each start and hashed. Where
the object has a `fingerprint`, what was found is kept and taken again as long as that, the number of documents, some of
them, and the file of the function are the same. Tokenizing reads them again, and compares with the hashes: tokens are
never of other documents than those that the function gives.
"""

import contextlib
import hashlib
import inspect
import itertools
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_moe.config.schema import find_component
from titan_moe.data.corpus import Corpus, digest, hash_files
from titan_moe.data.sources import MIN_SHARD, Piece, group_pieces, plan_shards, shard_size
from titan_moe.data.storage import (
    is_usable,
    locked,
    made_anew,
    new_checked_file,
    read_sealed,
    storage_errors,
    write_sealed,
)
from titan_moe.data.token_files import write_index

SAMPLE = 64  # documents that are looked at before anything is made of them
Document = str | np.ndarray  # a text, or token ids (n,), int64
log = logging.getLogger(__name__)


class DataFunction(NamedTuple):
    """A function outside, and its arguments as JSON; `key` has named it."""

    name: str
    arguments: str
    key: str

    def label(self) -> str:
        """The key and the name, for errors."""
        return f"{self.key} ({self.name})"


class Chunk(NamedTuple):
    """Some documents in a row: the number of the first, that after the last, their bytes, and the hash of them all."""

    start: int
    stop: int
    size: int
    hash: str


class OwnDocuments(NamedTuple):
    """Documents by their index, which were read through once: texts, or token ids."""

    function: DataFunction
    are_ids: bool
    chunks: tuple[Chunk, ...]

    def fingerprint(self) -> str:
        """A hash of all documents."""
        return digest(["own", self.are_ids, [chunk.hash for chunk in self.chunks]])


class OwnStream(NamedTuple):
    """A stream of texts or token ids. `sample` is of its first documents, `code` of the function's file."""

    function: DataFunction
    are_ids: bool
    fingerprint: str  # of the name, the arguments and its own fingerprint
    sample: str
    code: str

    @property
    def place(self) -> str:
        """What errors begin with."""
        return self.function.label()

    def state_of(self, stream: Any) -> dict[str, Any]:
        """The state of an opened stream after what was read of it."""
        with blamed(self.function):
            state = stream.state_dict()
        return plain_state(self.function, state)

    @property
    def facts(self) -> list[object]:
        """All that says what its documents are."""
        return ["own", self.fingerprint, self.sample, self.code]

    @property
    def position_name(self) -> str:
        """All that says whether a position in it is one in the same documents."""
        return f"own:{digest([self.fingerprint, self.sample])}"

    def open(self, state: dict[str, Any] | None = None) -> Any:
        """Call the function, and let the stream go on at `state`."""
        stream = call(self.function)
        if state is not None:
            with blamed(self.function):
                stream.load_state_dict(state)
        return stream

    def texts(self, stream: Any) -> Iterator[Document]:
        """Yield the documents of an opened stream, without those that are empty or null."""
        for number, document in enumerate(_guarded(self.function, stream)):
            if document is not None and len(document):
                yield _of_one_kind(self.function, number, document, self.are_ids)


def is_own(dataset: str) -> bool:
    """Whether a data set is a function outside."""
    return ":" in dataset


def own_data(dataset: str, arguments: Mapping[str, Any], key: str) -> DataFunction:
    """Name a data set of one's own; ValueError for arguments that can't be told to another process."""
    try:
        return DataFunction(dataset, json.dumps(dict(arguments), sort_keys=True), key)
    except TypeError as error:
        raise ValueError(
            f"{key} ({dataset}): its arguments must be numbers, strings, booleans, lists and tables: {error}"
        ) from error


def call(function: DataFunction) -> Any:
    """Call the function; a fault in it is a ValueError of one line with its place."""
    builder = find_component({}, function.name, "configuration", function.key)
    with blamed(function):
        return builder(**json.loads(function.arguments))


@contextlib.contextmanager
def blamed(function: DataFunction) -> Iterator[None]:
    """Make one line of a fault in a function outside, with what it is for and its place."""
    try:
        yield
    except Exception as error:
        # The innermost line of the function's own file says most to its author.
        frames = traceback.extract_tb(error.__traceback__)
        file = function.name.partition(":")[0].replace(".", "/")
        last = next((f for f in reversed(frames) if file in f.filename.replace("\\", "/")), frames[-1])
        what = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{function.label()}: {what} ({Path(last.filename).name}:{last.lineno})") from error


def open_own(function: DataFunction, folder: str) -> OwnDocuments | OwnStream:
    """Call the function, and look at what it gives.

    Errors: what is neither of the two, or has no documents; documents of another type or of two types; a stream whose
    state leads to another place, or can't be saved.
    """
    data = call(function)
    return (_read_through if _kind_of(function, data) == "documents" else _look_at_stream)(function, data, folder)


def check_own(function: DataFunction) -> None:
    """Call the function, and see that it gives one of the two; ValueError where it doesn't."""
    _kind_of(function, call(function))


def _kind_of(function: DataFunction, data: Any) -> str:
    """Tell documents by their index from a stream."""
    if _is_indexed(data):
        return "documents"
    if all(callable(getattr(data, name, None)) for name in ("__iter__", "state_dict", "load_state_dict")):
        return "stream"
    raise ValueError(
        f"{function.label()}: gives a {type(data).__name__}, which has neither documents by index (len and [i]) nor is "
        "it a stream with a state (iterable, state_dict, load_state_dict)"
    )


def _is_indexed(data: Any) -> bool:
    # A text and a table by names have a length and an index, too.
    has_index = hasattr(type(data), "__len__") and hasattr(type(data), "__getitem__")
    return has_index and not isinstance(data, (str, bytes, Mapping))


def as_document(function: DataFunction, number: int, row: Any) -> Document | None:
    """Return the text or the ids (n,), int64, of what a function gave as a document; None for null."""
    # One error for what is no document, and for a row without one.
    value = row.get("text", row) if isinstance(row, Mapping) else row
    if value is None or isinstance(value, str):
        if value is not None and not _is_unicode(value):
            raise ValueError(f"{function.label()}: document {number} holds half a surrogate pair, not Unicode text")
        return value
    ids = None if isinstance(value, (bytes, Mapping)) else _as_ids(value)
    if ids is None:
        what = f"row of {', '.join(map(str, value))}" if isinstance(value, Mapping) else type(value).__name__
        raise ValueError(
            f"{function.label()}: document {number} is a {what}: it must be a str, token ids (a list or an array of "
            "integers in one dimension), or a row with a str under text"
        )
    return ids


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _as_ids(value: Any) -> np.ndarray | None:
    try:
        ids = np.asarray(value)
    except (TypeError, ValueError, RuntimeError):
        return None
    if ids.ndim != 1 or (len(ids) and ids.dtype.kind not in "iu"):
        return None
    return ids.astype(np.int64)


def _of_one_kind(function: DataFunction, number: int, document: Document, are_ids: bool) -> Document:
    if isinstance(document, str) == are_ids:
        kinds = ("token ids", "text") if are_ids else ("text", "token ids")
        raise ValueError(
            f"{function.label()}: document {number} is {kinds[1]}, and those before it {kinds[0]}: give one"
        )
    return document


def content_of(document: Document) -> bytes:
    """The bytes by whose hash a document is on a side: its text, or its ids as four bytes each."""
    return document.encode() if isinstance(document, str) else document.astype("<u4").tobytes()


def check_ids(ids: np.ndarray, vocab_size: int, what: str) -> np.ndarray:
    """Return ids as they are; ValueError for one that a tokenizer lacks."""
    if len(ids) and (ids.max() >= vocab_size or ids.min() < 0):
        wrong = ids[(ids >= vocab_size) | (ids < 0)][0]
        raise ValueError(
            f"{what}: id {wrong} is not one of the tokenizer's {vocab_size:,} ids: name the tokenizer that made "
            "them with --data.tokenizer"
        )
    return ids


def _rows(function: DataFunction, data: Any, numbers: Iterable[int]) -> Iterator[tuple[int, Document | None]]:
    """Yield the documents of some indices, with these; None for null."""
    for number in numbers:
        with blamed(function):
            row = data[number]
        yield number, as_document(function, number, row)


def _guarded(function: DataFunction, stream: Any) -> Iterator[Document | None]:
    """Yield the documents of a stream; a fault in it is one line."""
    with blamed(function):
        rows = iter(stream)
    for number in itertools.count():
        with blamed(function):
            row = next(rows, rows)  # itself stands for the end
        if row is rows:
            return
        yield as_document(function, number, row)


def _file_hash(function: DataFunction) -> str:
    """The hash of the file that the function is in; of none where it has none that can be read."""
    builder = find_component({}, function.name, "configuration", function.key)
    try:
        path = inspect.getsourcefile(inspect.unwrap(builder))
        content = Path(path).read_bytes() if path else b""
    except (OSError, TypeError):
        content = b""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


class _Hash:
    """A hash of documents, one after the other, in which it shows where each one ends."""

    def __init__(self) -> None:
        self.content, self.size = hashlib.blake2b(digest_size=16), 0

    def add(self, document: Document | None) -> None:
        data = b"" if document is None else content_of(document)
        kind = b"n" if document is None else b"t" if isinstance(document, str) else b"i"
        self.content.update(kind + len(data).to_bytes(8, "little") + data)
        self.size += len(data)


def _read_through(function: DataFunction, data: Any, folder: str) -> OwnDocuments:
    """Read all documents and hash them in chunks; or find what an earlier start has found."""
    with blamed(function):
        count = len(data)
    seen, sample = [], _Hash()
    for _, document in _rows(function, data, range(0, count, max(1, count // SAMPLE))):
        seen.append(document)
        sample.add(document)
    are_ids = any(isinstance(document, np.ndarray) for document in seen)

    # Only who says that nothing has changed can spare the reading.
    memo = None
    if (given := getattr(data, "fingerprint", None)) is not None:
        name = digest(
            [function.name, function.arguments, str(given), count, sample.content.hexdigest(), _file_hash(function)]
        )
        memo = Path(folder) / f"own-{name}.json"
        with storage_errors(folder), made_anew():
            if (known := read_sealed(memo)) is not None:
                return OwnDocuments(function, known["are_ids"], tuple(Chunk(*chunk) for chunk in known["chunks"]))

    # Shards of the cache are made of chunks, so that each can be read by itself.
    log.info("reading %d documents of %s to know whether they have changed", count, function.label())
    chunks, start, content = [], 0, _Hash()
    for number, document in _rows(function, data, range(count)):
        content.add(document if document is None else _of_one_kind(function, number, document, are_ids))
        if content.size >= MIN_SHARD or number == count - 1:
            chunks.append(Chunk(start, number + 1, content.size, content.content.hexdigest()))
            start, content = number + 1, _Hash()
    if not any(chunk.size for chunk in chunks):
        raise ValueError(f"{function.label()}: no documents: it has {count}, and none with a text")
    if memo is not None:
        with storage_errors(folder):
            memo.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(memo, {"are_ids": are_ids, "chunks": chunks})
    return OwnDocuments(function, are_ids, tuple(chunks))


# Opened once in a worker, which reads chunk after chunk.
_opened = lru_cache(maxsize=4)(call)


def read_documents(piece: Piece) -> Iterator[Document | None]:
    """Yield the documents of a chunk; ValueError where they are others than those that were hashed."""
    function, content = piece.function, _Hash()
    for _, document in _rows(function, _opened(function), range(piece.start, piece.stop)):
        content.add(document)
        yield document
    if content.content.hexdigest() != piece.hash:
        raise ValueError(
            f"{function.label()}: documents {piece.start} to {piece.stop - 1} are others than when they were read "
            "before: it must give the same ones each time"
        )


def _pieces(data: OwnDocuments) -> list[Piece]:
    return [
        Piece(data.function.name, "own", *chunk[:3], function=data.function, hash=chunk.hash) for chunk in data.chunks
    ]


def own_corpus(data: OwnDocuments, held_out: list[str], fraction: float, folder: str) -> Corpus:
    """The corpus of texts by index, as `make_corpus` makes it of files."""
    pieces = _pieces(data)
    shards = group_pieces(pieces, shard_size(sum(piece.size for piece in pieces)))
    fingerprint = digest([data.fingerprint(), hash_files(held_out, folder), fraction])
    return Corpus(tuple(shards), tuple(plan_shards(held_out)), fraction, fingerprint)


def own_token_file(data: OwnDocuments, folder: str) -> str:
    """Return the path of a .bin, with its .idx, of the ids of documents; it is written now unless it is there."""
    name = str(Path(folder) / f"own-{data.fingerprint()}")
    _opened.cache_clear()  # the function may have been changed in this process
    chunks = partial(map, read_documents, _pieces(data))
    return write_token_file(name, lambda: itertools.chain.from_iterable(chunks()), folder, data.function.label())


def write_token_file(name: str, documents: Callable[[], Iterator[Document | None]], folder: str, what: str) -> str:
    """Write documents of ids to NAME.bin and NAME.idx, unless they are there, and return the path of the .bin.

    Errors begin with `what`.
    """
    path, index = f"{name}.bin", f"{name}.idx"
    with storage_errors(folder), contextlib.ExitStack() as held:
        if is_usable(path) and is_usable(index):
            return path
        held.enter_context(locked(f"{name}.lock"))
        if is_usable(path) and is_usable(index):  # written while this process waited for the lock
            return path
        lengths = []
        with new_checked_file(path) as file:
            for document in documents():
                if document is not None and len(document):
                    ids = check_ids(np.asarray(document), 2**31, what)
                    file.write(ids.astype("<i4").tobytes())
                    lengths.append(len(ids))
        with new_checked_file(index) as file:
            write_index(file, np.array(lengths, "<i4"))
    return path


def _look_at_stream(function: DataFunction, stream: Any, _: str) -> OwnStream:
    """Read the first documents of a stream, and go on in another one from the state in the middle of them."""
    documents, state, sample = _guarded(function, stream), None, _Hash()
    first = [*itertools.islice(documents, SAMPLE // 2)]
    with blamed(function):
        state = stream.state_dict()
    state = plain_state(function, state)
    rest = [*itertools.islice(documents, SAMPLE // 2)]
    for document in (*first, *rest):
        sample.add(document)
    if not sample.size:
        raise ValueError(f"{function.label()}: no documents: the stream has none with a text among its first {SAMPLE}")
    are_ids = any(isinstance(document, np.ndarray) for document in first)

    # A state that is a document behind, or is forgotten, would train on some text twice or never, and nobody would see.
    again = call(function)
    with blamed(function):
        again.load_state_dict(state)
    for number, (one, other) in enumerate(
        itertools.zip_longest(rest, itertools.islice(_guarded(function, again), len(rest)))
    ):
        if _content(one) != _content(other):
            raise ValueError(
                f"{function.label()}: its state does not lead back to where it was taken: after {len(first)} documents "
                f"and load_state_dict(state_dict()), document {number} from there is another one"
            )
    given = getattr(stream, "fingerprint", None)
    fingerprint = digest([function.name, function.arguments, None if given is None else str(given)])
    return OwnStream(function, are_ids, fingerprint, sample.content.hexdigest(), _file_hash(function))


def _content(document: Document | None) -> object:
    return document if document is None else content_of(document)


def plain_state(function: DataFunction, state: Any) -> dict[str, Any]:
    """Return a copy of the state of a stream; ValueError where a checkpoint can't hold it."""
    problem = "a dict" if not isinstance(state, dict) else ""
    try:
        copied = json.loads(json.dumps(state))
    except (TypeError, ValueError):
        problem, copied = "a dict of numbers, strings, lists and dicts", state
    if problem:
        raise ValueError(f"{function.label()}: state_dict() must give {problem}, gave {str(state)[:80]}")
    return copied
