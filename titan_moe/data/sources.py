"""Sources: where documents come from, and how files are cut into shards that worker processes read on their own.

A shard is a tuple of pieces; a piece is a file, a byte range of one, or a range of a parquet file's row groups or an
arrow file's batches. Shards depend on the files only, never on the number of processes, so whatever is built from them
is the same on every machine.
"""

import glob
import io
import json
import logging
import os
import sysconfig
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.runtime import remote

MIN_SHARD, MAX_SHARD = 1 << 20, 32 << 20  # bytes: seconds of tokenizing, the unit of parallel work and of resumption
DOCUMENT_CHARS = 16 << 10  # running text (.txt) is cut into documents of about this many characters
CHUNK_BYTES = 1 << 20
KINDS = {
    ".txt": "txt",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
    ".arrow": "arrow",  # as `datasets` saves them
}
TOKEN_KINDS = {".bin": "megatron", ".npy": "npy"}  # files of token ids, which need no tokenizing
COMPRESSIONS = (".gz", ".zst")
FORMATS = (
    "txt, jsonl, ndjson, json with an object a line, parquet, arrow, each also with .gz or .zst; token ids: Megatron's "
    ".bin with its .idx, .npy"
)
ARROW_END = b"\xff\xff\xff\xff\x00\x00\x00\x00"
MAX_WINDOW = 1 << 31  # bytes that zstd may look back, its largest: `zstd --long=31` (the library stops at 1 << 27)
# Folders beside the standard library's modules that are no part of it, or only tests.
NOT_STDLIB = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A part of a file: `start` and `stop` are bytes (txt, jsonl), row groups or batches; `stop` -1: to the end.

    Of a data set of one's own it is some documents that `function` gives, with their hash (`titan_moe.data.own`).
    """

    path: str
    kind: str
    start: int = 0
    stop: int = -1
    size: int = 0
    function: Any = None
    hash: str = ""


Shard = tuple[Piece, ...]


def kind_of(path: str) -> str | None:
    """Return the format of a file by its name (`txt`, `jsonl`, `megatron` ...), or None where it is none of ours."""
    kind = KINDS.get(os.path.splitext(_unpacked(path))[1].lower())
    return kind or TOKEN_KINDS.get(os.path.splitext(path)[1])


def are_tokens(files: Sequence[str]) -> bool:
    """Whether files of `find_files` hold token ids; they all do, or none does."""
    return any(kind_of(path) in TOKEN_KINDS.values() for path in files)


def find_files(paths: str | Sequence[str], key: str = "data.path") -> list[str]:
    """Return the files that `paths` name: files, globs (`**` too) and folders, which are searched recursively.

    Each may be a URL (s3://bucket/folder). Paths stay in the order given, the files of a glob or folder are sorted. In
    folders, hidden files and other formats are left out, as are .json and .arrow files, most of which are no data, and
    token files beside text; a file named directly or by a glob must have one of our formats. A folder of `save_to_disk`
    lists its files itself. Megatron's pair may be named by its prefix, its .bin or its .idx, and is returned as the
    .bin. Errors: nothing given, no such file, no match, unknown format, both text and tokens.
    """
    # An ordered set: a file that two patterns name counts once, and the order of files decides that of documents.
    files: dict[str, None] = {}
    for path in [paths] if isinstance(paths, str) else paths:
        full = os.path.expanduser(path)
        if remote.is_url(path):
            matches = _remote_files(path, key)
        elif os.path.isdir(full):
            matches = _files_in(full)
        elif os.path.isfile(full):
            matches = [full]
        elif glob.has_magic(full):
            matches = sorted(name for name in glob.glob(full, recursive=True) if os.path.isfile(name))
        elif os.path.isfile(f"{full}.bin") or os.path.isfile(f"{full}.idx"):
            matches = [f"{full}.bin"]
        else:
            raise FileNotFoundError(f"{key}: no such file or folder: {path}")
        matches = [f"{name.removesuffix('.idx')}.bin" if name.endswith(".idx") else name for name in matches]

        # A path that adds nothing is a mistake, and so is a file that can't be read: better told than left out.
        if not matches:
            raise FileNotFoundError(f"{key}: {path} matches no file ({FORMATS})")
        for name in matches:
            if kind_of(name) is None:
                raise ValueError(f"{key}: {name} has no format that is known by its name ({FORMATS})")
        files |= dict.fromkeys(matches)
    if not files:
        raise ValueError(f"{key} is empty: name the files to read ({FORMATS}), e.g. --{key} 'corpus/*.jsonl'")
    _warn_of_copies(files, key)
    _refuse_a_mix([*files], key)
    return list(files)


def _remote_files(url: str, key: str) -> list[str]:
    """Return the data files behind a URL: a file, the matches of a glob, or those of a folder as a local one has."""
    # A prefix of Megatron's pair is nothing by itself.
    try:
        files, root = remote.find(url, key)
    except remote.RemoteError as error:
        if isinstance(error.__cause__, FileNotFoundError) and remote.exists(f"{url}.bin", key):
            return [f"{url}.bin"]
        raise
    if not root:
        return files
    names = [name for name in files if _is_data(Path(name.removeprefix(root).lstrip("/")))]
    texts = [name for name in names if not are_tokens([name])]
    return texts or [name for name in names if kind_of(name) == "npy" or f"{name[:-4]}.idx" in files]


def _files_in(folder: str) -> list[str]:
    """Return the data files of a folder: those of a saved data set, else text, and where there is none, token files."""
    if saved := _saved_files(Path(folder)):
        return saved
    names = sorted(str(p) for p in Path(folder).rglob("*") if _is_data(p.relative_to(folder)) and p.is_file())
    texts = [name for name in names if not are_tokens([name])]
    return texts or [name for name in names if kind_of(name) == "npy" or os.path.isfile(f"{name[:-4]}.idx")]


def _is_data(path: Path) -> bool:
    """Whether a file of a folder is read, by its path within the folder."""
    hidden = any(part.startswith(".") for part in path.parts)
    return not hidden and path.suffix.lower() not in (".json", ".arrow") and kind_of(path.name) is not None


def _saved_files(folder: Path) -> list[str]:
    """Return the files of a data set that `save_to_disk` of `datasets` wrote; none where the folder is none."""
    # A set of splits is a folder for each. To take them all would be to train on the test data.
    splits, state = folder / "dataset_dict.json", folder / "state.json"
    try:
        if splits.is_file():
            names = json.loads(splits.read_text(encoding="utf-8"))["splits"]
            if names[1:]:
                raise ValueError(f"{folder}: a data set of several splits: name one, e.g. {folder / names[0]}")
            folder = folder / Path(names[0]).name  # nothing outside, whatever it says
            state = folder / "state.json"
        listed = json.loads(state.read_text(encoding="utf-8")).get("_data_files") if state.is_file() else []
        files = [str(folder / Path(file["filename"]).name) for file in listed or ()]
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError(
            f"{folder}: its dataset_dict.json or state.json is damaged: save the data set again"
        ) from error

    # A folder that was copied in part would be a smaller data set.
    for name in files:
        if not os.path.isfile(name):
            raise FileNotFoundError(f"{name}: no such file, but {state.name} beside it lists it")
    return files


def _refuse_a_mix(files: Sequence[str], key: str) -> None:
    tokens = [path for path in files if are_tokens([path])]
    if tokens and len(tokens) < len(files):
        text = next(path for path in files if path not in tokens)
        raise ValueError(f"{key}: {tokens[0]} holds token ids and {text} text: name files of one or of the other")


def _warn_of_copies(files: Iterable[str], key: str) -> None:
    """Warn of files that are given both compressed and uncompressed (`zstd` keeps its source)."""
    groups: dict[str, list[str]] = {}
    for path in files:
        groups.setdefault(_unpacked(path), []).append(path)
    copies = [group for group in groups.values() if group[1:]]
    if copies:
        more = f", and {len(copies) - 1} more files" if copies[1:] else ""
        log.warning(
            "%s: %s hold the same by their names%s: their documents count twice", key, " and ".join(copies[0]), more
        )


def _unpacked(path: str) -> str:
    for suffix in COMPRESSIONS:
        path = path.removesuffix(suffix)
    return path


def stdlib_files() -> list[str]:
    """Return the source files of the running Python's standard library without its tests: 12 MB in 700 files or so."""
    root = sysconfig.get_paths()["stdlib"]
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_STDLIB  # not walked into
        files += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not files:
        raise FileNotFoundError(
            f"data.dataset stdlib: this Python has no library source in {root}: use --data.dataset text"
        )
    return sorted(files)


def plan_shards(files: Sequence[str], kind: str = "") -> list[Shard]:
    """Group files, and ranges of big ones, into shards of a 64th of them all, within `MIN_SHARD` and `MAX_SHARD`.

    `kind` overrides the format that the names tell.
    """
    # Small enough that many workers have something to do, large enough that a shard is worth its part files.
    most = shard_size(sum(map(_size, files)))
    return group_pieces((piece for path in files for piece in _pieces(path, kind or kind_of(path) or "", most)), most)


def shard_size(total: int) -> int:
    """Return the most bytes of a shard, of `total` bytes."""
    return min(max(MIN_SHARD, total // 64), MAX_SHARD)


def group_pieces(pieces: Iterable[Piece], most: int) -> list[Shard]:
    """Group pieces in their order into shards of `most` bytes, or of one piece that is larger."""
    shards: list[Shard] = []
    group: list[Piece] = []
    room = most
    for piece in pieces:
        if group and piece.size > room:
            shards.append(tuple(group))
            group, room = [], most
        group.append(piece)
        room -= piece.size
    return [*shards, tuple(group)] if group else shards


def _pieces(path: str, kind: str, most: int) -> Iterator[Piece]:
    """Cut a file into pieces of `most` bytes, as far as its format can be read from the middle."""
    # An archive can only be read from its beginning; a source file is one document.
    size = _size(path)
    if path.endswith(COMPRESSIONS) or kind == "source":
        yield Piece(path, kind, size=size)
    elif kind == "parquet":
        metadata = _parquet(path).metadata
        for index in range(metadata.num_row_groups):
            yield Piece(path, kind, index, index + 1, metadata.row_group(index).total_byte_size)
    elif kind == "arrow":
        yield from _arrow_pieces(path, most)

    # A piece has the lines that begin in it, so that the cut may be anywhere.
    else:
        for start in range(0, size, most):
            stop = min(start + most, size)
            yield Piece(path, kind, start, stop, stop - start)


def documents(shard: Shard) -> Iterator[str]:
    """Yield the documents of a shard in order, without those that are empty or null."""
    return filter(None, texts(shard))


def texts(shard: Shard) -> Iterator[str | None]:
    """Yield the texts of a shard in order; None for a row whose text is null.

    txt: running text, cut at paragraphs; jsonl: the field `text` of every line; parquet, arrow: the column `text`;
    source: the whole file. Errors name the file and the place: not UTF-8, a truncated archive, a line that is not JSON,
    no `text`.
    """
    for piece in shard:
        yield from READERS[piece.kind](piece)


def _read_source(piece: Piece) -> Iterator[str]:
    data = b"".join(_chunks(piece.path))
    try:
        yield data.decode()
    except UnicodeDecodeError:
        return  # a module of the standard library in another declared encoding; none is known outside its tests


def _read_text(piece: Piece) -> Iterator[str]:
    return cut_text(text for _, _, text in lines_of(piece))


def cut_text(lines: Iterable[str]) -> Iterator[str]:
    """Cut running text into documents of `DOCUMENT_CHARS` characters, or up to twice that to end at a paragraph."""
    pending: list[str] = []
    size = 0

    # An empty line ends a paragraph. Text without one is cut between lines when it gets too long.
    for line in chain.from_iterable(map(_split_line, lines)):
        if size + len(line) > 2 * DOCUMENT_CHARS:
            yield "".join(pending)
            pending, size = [], 0
        pending.append(line)
        size += len(line)
        if size >= DOCUMENT_CHARS and line.isspace():
            yield "".join(pending)
            pending, size = [], 0
    yield "".join(pending)


def _split_line(line: str) -> Iterator[str]:
    """Cut a line that is longer than a document, after a space where there is one."""
    start = 0
    while len(line) - start > DOCUMENT_CHARS:
        stop = line.rfind(" ", start, start + DOCUMENT_CHARS) + 1 or start + DOCUMENT_CHARS
        yield line[start:stop]
        start = stop
    yield line[start:]


_decode_row = json.JSONDecoder(parse_int=float).decode  # as an int a number may not have more than 4300 digits


def _read_jsonl(piece: Piece) -> Iterator[str | None]:
    for index, offset, line in lines_of(piece):
        if line.isspace():
            continue

        # A line that can't be read ends the run, with its place: left out, it would not be noticed.
        try:
            row = _decode_row(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{_place(piece, index, offset)}: not JSON ({error.msg})") from error
        except RecursionError as error:
            raise ValueError(f"{_place(piece, index, offset)}: nested too deeply to be read") from error

        # Without a field `text` this is the row, which is no string: one error for both. Null is an absent text.
        text = row.get("text", row) if isinstance(row, dict) else row
        if text is None:
            yield None
            continue
        if not isinstance(text, str):
            fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{_place(piece, index, offset)}: no string in the field 'text' (found: {fields})")

        # JSON can write what UTF-8 can't: half of a pair, which would fail later, in the tokenizer.
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{_place(piece, index, offset)}: 'text' holds half a surrogate pair, not Unicode text"
            ) from error
        yield text


def _place(piece: Piece, index: int, offset: int) -> str:
    """Return file:line of an error. The lines before a byte range are counted here, where they are needed."""
    if piece.start:
        with open(piece.path, "rb") as file:
            index = sum(file.read(min(CHUNK_BYTES, offset - at)).count(b"\n") for at in range(0, offset, CHUNK_BYTES))
    return f"{piece.path}:{index + 1}"


def _read_parquet(piece: Piece) -> Iterator[str | None]:
    import pyarrow as pa

    file = _parquet(piece.path)
    _check_column(piece.path, file.schema_arrow)

    # Small batches of this column alone: row groups and other columns may be large.
    groups = range(piece.start, piece.stop if piece.stop >= 0 else file.metadata.num_row_groups)
    try:
        for batch in file.iter_batches(row_groups=list(groups), columns=["text"], batch_size=1024):
            yield from batch.column(0).to_pylist()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{piece.path}: damaged parquet file ({str(error).splitlines()[0]})") from error


def _check_column(path: str, schema: Any) -> None:
    """Raise ValueError where a table has no column of texts; by its schema, before any row is read."""
    # A name may occur twice, which both formats allow.
    kinds = [field.type for field in schema if field.name == "text"]
    if len(kinds) != 1 or not _is_text(kinds[0]):
        columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
        wrong = f"{len(kinds)} columns 'text'" if kinds[1:] else "no column 'text' of strings"
        raise ValueError(f"{path}: {wrong} (columns: {columns})")


def _arrow_pieces(path: str, most: int) -> Iterator[Piece]:
    """Cut an arrow file between batches, into pieces of `most` bytes or one batch."""
    # Of a mapped file no more is read than where its batches begin.
    start, size, index = 0, 0, -1
    for index, batch in enumerate(_arrow_batches(path)):
        if size and size + batch.nbytes > most:
            yield Piece(path, "arrow", start, index, size)
            start, size = index, 0
        size += batch.nbytes
    if size:
        yield Piece(path, "arrow", start, index + 1, size)


def _read_arrow(piece: Piece) -> Iterator[str | None]:
    batches = islice(_arrow_batches(piece.path), piece.start, piece.stop if piece.stop >= 0 else None)
    try:
        for batch in batches:
            yield from batch.column("text").to_pylist()
    except UnicodeDecodeError as error:
        raise ValueError(f"{piece.path}: damaged arrow file ({error})") from error


def _arrow_batches(path: str) -> Iterator[Any]:
    """Yield the record batches of a file in arrow's stream format; a truncated or damaged one is an error."""
    import pyarrow as pa

    packed = path.endswith(COMPRESSIONS)
    try:
        file = pa.BufferReader(b"".join(_chunks(path))) if packed else pa.memory_map(path)
        stream = pa.ipc.open_stream(file)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable arrow file ({str(error).splitlines()[0]})") from error
    _check_column(path, stream.schema)

    # The last bytes of a stream say that it ends there, else a file that was cut off between batches would look whole.
    try:
        yield from stream
        file.seek(-len(ARROW_END), os.SEEK_END)
        if file.read() != ARROW_END:
            raise EOFError("it is cut off")
    except (pa.ArrowException, OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged arrow file ({str(error).splitlines()[0]})") from error


def _is_text(kind: Any) -> bool:
    """Whether an arrow type holds strings, in any of its forms, or nothing but null."""
    from pyarrow import types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return any(of(kind) for of in (types.is_string, types.is_large_string, types.is_string_view, types.is_null))


def _parquet(path: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    packed = path.endswith(COMPRESSIONS)
    try:
        return pq.ParquetFile(io.BytesIO(b"".join(_chunks(path))) if packed else path)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]})") from error


def _read_own(piece: Piece) -> Iterator[str | None]:
    # Imported by who reads such a piece: its module plans pieces by this one.
    from titan_moe.data.own import read_documents

    for document in read_documents(piece):
        assert document is None or isinstance(document, str)  # ids have a token file of their own
        yield document


READERS = {
    "own": _read_own,
    "source": _read_source,
    "txt": _read_text,
    "jsonl": _read_jsonl,
    "parquet": _read_parquet,
    "arrow": _read_arrow,
}


def _size(path: str) -> int:
    try:
        return os.path.getsize(path)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror}") from error


def lines_of(piece: Piece) -> Iterator[tuple[int, int, str]]:
    """Yield (index, byte offset, text) of every line that begins in the piece, with its newline.

    The index counts from the piece's first line, or from the one before where the piece begins within the file. A byte
    order mark is left out. Errors: not UTF-8.
    """
    # A line that begins in the piece before belongs to that one. Reading starts a byte early: where that byte is a
    # newline, it is the whole line that is skipped, and a line begins at `start`.
    offset = piece.start
    skip = piece.start > 0
    chunks = _chunks(piece.path, piece.start - 1 if skip else 0)
    if skip:
        offset -= 1
    for index, line in enumerate(_split_lines(chunks)):
        if index == 0 and skip:
            offset += len(line)
            continue
        if 0 <= piece.stop <= offset:
            return

        # Line by line, so that the error can say at which byte of the file.
        try:
            text = line.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{piece.path}: not UTF-8 at byte {offset + error.start} (0x{line[error.start]:02x}): "
                "convert the file or leave it out"
            ) from error
        yield index, offset, text.removeprefix("\ufeff") if offset == 0 else text
        offset += len(line)


def _split_lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Yield lines with their newlines; the last one may have none."""
    pending: list[bytes] = []
    for chunk in chunks:
        head, *rest = chunk.split(b"\n")
        pending.append(head)
        for part in rest:
            yield b"".join(pending) + b"\n"
            pending = [part]
    if last := b"".join(pending):
        yield last


def _chunks(path: str, start: int = 0) -> Iterator[bytes]:
    """Yield a file's bytes from `start`, decompressed; a truncated or damaged archive is an error."""
    try:
        with open(path, "rb") as file:
            file.seek(start)
            blocks = iter(lambda: file.read(CHUNK_BYTES), b"")
            yield from blocks if not path.endswith(COMPRESSIONS) else _decompress(path, blocks)
    except OSError as error:
        raise OSError(f"{path}: {error.strerror or error}") from error


def _decompress(path: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the content of a .gz or .zst file from its blocks."""
    import zstandard

    # A decompressor serves one member of an archive.
    def new() -> Any:
        if path.endswith(".gz"):
            return zlib.decompressobj(wbits=31)
        return zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW).decompressobj()

    # Files put together by cat have several members: what one leaves unused begins the next.
    stream, read = new(), 0
    try:
        for block in blocks:
            data = block
            while data:
                if stream.eof:
                    stream = new()
                yield stream.decompress(data)
                data = stream.unused_data if stream.eof else b""
            read += len(block)
    except (zlib.error, zstandard.ZstdError) as error:
        raise ValueError(f"{path}: damaged archive near byte {read} ({error})") from error

    # A download that was cut off decompresses well up to its end.
    if not stream.eof:
        raise ValueError(
            f"{path}: truncated archive: it ends after {read} bytes in the middle of its data; fetch it again"
        )
