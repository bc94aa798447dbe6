"""Files of token ids that others have written, read where they are: Megatron's .bin with its .idx, and .npy.

Nothing is tokenized or copied. Every file is read through once, to check its ids and to hash its documents; that is
kept in the cache folder (24 bytes a document) and found again by the content of the file. A document's side, training
or validation, goes by the hash of its ids, so that copies of a document are on one side, whatever files they are in.

Megatron's .idx, all little-endian: MMIDIDX and two zero bytes, a version (8 bytes, 1), a code of the type of the ids
(1 byte), the numbers of sequences S and of document borders D (8 bytes each), S lengths in tokens (int32), S places in
the .bin in bytes (int64), the D sequences at which a document begins or the last one ends (int64), and for multimodal
data S modes (int8). A .npy as OLMo-core reads and Dolma writes it has only the name of numpy's format: it is the ids
alone, uint16 or uint32, which its first numbers tell. A .npy of numpy's says itself what it holds. In both a
document ends with each end-of-text token.
"""

import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from titan_moe.data.cache import TokenFile, TokenParts, token_parts
from titan_moe.data.corpus import digest, document_hash, hash_files, nearest_fraction
from titan_moe.data.packing import Borders
from titan_moe.data.processes import run_parallel
from titan_moe.data.sources import kind_of
from titan_moe.data.storage import is_usable, new_checked_file, storage_errors
from titan_moe.data.tokenizer import Tokenizer

MAGIC, NUMPY_MAGIC = b"MMIDIDX\x00\x00", b"\x93NUMPY"
HEADER_BYTES = 34
DTYPES = {1: "|u1", 2: "|i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # Megatron writes 8 and 4
NO_IDS = {6: "float64", 7: "float32"}
CHUNK_TOKENS = 1 << 22  # read at once
SAMPLE_WORDS = 1 << 16  # of two bytes each, to tell uint16 from uint32
EMPTY = np.uint64(2**64 - 1)  # in place of the last id of a document without any
MIN_ENDS = 16  # documents that must all end with one id before it is taken for an end of text
log = logging.getLogger(__name__)


class TokenSource(NamedTuple):
    """A file of ids; `index` is Megatron's .idx, or empty where documents end with the end-of-text token."""

    file: TokenFile
    index: str = ""


class Documents(NamedTuple):
    """The documents of a file, one after the other, (D,): where each one ends, in tokens, and the hash of its ids."""

    file: TokenFile
    fingerprint: str  # of the content of the file
    ends: np.ndarray
    hashes: np.ndarray
    has_eot: np.ndarray  # whether its last id is the end of text


class DividedTokens(NamedTuple):
    """Training and validation data, and of each how many documents it has and where they end."""

    train: TokenParts
    validation: TokenParts
    num_documents: dict[str, int]
    borders: dict[str, Borders]


class _Job(NamedTuple):
    source: TokenSource
    vocab_size: int
    eot_id: int
    output: str


def open_tokens(path: str, vocab_size: int) -> TokenSource:
    """Open a token file by its name, a .bin or .npy, for a tokenizer of `vocab_size` ids.

    Errors: a file that is missing, cut off, of an unknown type of ids, or that doesn't fit its .idx.
    """
    if kind_of(path) == "npy":
        return TokenSource(_open_npy(path, vocab_size))
    index_path = f"{path.removesuffix('.bin')}.idx"
    for needed, other in ((path, index_path), (index_path, path)):
        if not os.path.isfile(needed):
            raise FileNotFoundError(f"{other}: {os.path.basename(needed)} is not beside it: Megatron's files are pairs")

    # Places and lengths are held against each other when the documents are read; here the last one says the size.
    dtype, lengths, places, _ = _map_index(index_path)
    itemsize = np.dtype(dtype).itemsize
    size, want = os.path.getsize(path), int(places[-1]) + int(lengths[-1]) * itemsize if len(lengths) else 0
    if size != want:
        raise ValueError(
            f"{path}: {size:,} bytes, but {os.path.basename(index_path)} is of {want:,} bytes: it is cut off, or the "
            "two are of different data; fetch or make both again"
        )
    return TokenSource(TokenFile(path, dtype, size // itemsize), index_path)


def _map_index(path: str) -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    """Return the type of the ids, the lengths (S,) and places (S,) of sequences and the borders (D,) of an .idx."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        header = file.read(HEADER_BYTES)
    if not header.startswith(MAGIC):
        raise ValueError(f"{path}: not an index of Megatron's (it does not begin with MMIDIDX)")
    if len(header) < HEADER_BYTES:
        raise ValueError(f"{path}: cut off within its header, after {size} bytes: fetch or make it again")
    version, code = int.from_bytes(header[9:17], "little"), header[17]
    if version != 1:
        raise ValueError(f"{path}: version {version} of Megatron's index; only version 1 is known")
    if code not in DTYPES:
        kind = f"{NO_IDS[code]}, which are no ids" if code in NO_IDS else f"no type of Megatron's {[*DTYPES]}"
        raise ValueError(f"{path}: the code of its type is {code}: {kind}")

    # The size follows from the two counts, with or without a mode for each sequence.
    sequences, borders = int.from_bytes(header[18:26], "little"), int.from_bytes(header[26:34], "little")
    want = HEADER_BYTES + 12 * sequences + 8 * borders
    if size not in (want, want + sequences):
        raise ValueError(
            f"{path}: {size:,} bytes, but {sequences:,} sequences and {borders:,} borders of documents need {want:,}: "
            "it is cut off or damaged; fetch or make it again"
        )
    data = np.memmap(path, mode="r")
    lengths, places, documents = np.split(data[HEADER_BYTES:want], [4 * sequences, 12 * sequences])
    if size > want and data[want:].any():
        raise ValueError(f"{path}: multimodal data: some of its sequences are no text")
    return DTYPES[code], lengths.view("<i4"), places.view("<i8"), documents.view("<i8")


def write_index(file: BinaryIO, lengths: np.ndarray) -> None:
    """Write the .idx of a .bin of int32 ids: documents of `lengths` tokens, (D,) int32, one after the other."""
    places = np.concatenate([[0], np.cumsum(lengths[:-1], dtype="<i8")])[: len(lengths)] * 4
    header = MAGIC + (1).to_bytes(8, "little") + bytes([4])
    counts = np.array([len(lengths), len(lengths) + 1], "<u8")
    for part in (header, counts, lengths, places.astype("<i8"), np.arange(len(lengths) + 1, dtype="<i8")):
        file.write(part if isinstance(part, bytes) else part.tobytes())


def _index_ends(path: str) -> np.ndarray:
    """Return where each document of an .idx ends, in tokens (D - 1,)."""
    dtype, lengths, places, borders = _map_index(path)
    ends = np.cumsum(lengths, dtype=np.int64)
    if (lengths < 0).any() or not np.array_equal(places[1:], ends[:-1] * np.dtype(dtype).itemsize) or places[:1].any():
        raise ValueError(f"{path}: its sequences do not follow each other in the .bin: it is damaged; make it again")
    if not len(borders) or borders[0] or borders[-1] != len(lengths) or (np.diff(borders) < 0).any():
        raise ValueError(f"{path}: its documents do not cover its {len(lengths):,} sequences: it is damaged")
    return np.concatenate([[0], ends])[borders[1:]]


def _open_npy(path: str, vocab_size: int) -> TokenFile:
    """Open a .npy, with a header of numpy's or without any."""
    with open(path, "rb") as file:
        is_headed = file.read(len(NUMPY_MAGIC)) == NUMPY_MAGIC
    if not is_headed:
        dtype = _told_dtype(path, vocab_size)
        return TokenFile(path, dtype, os.path.getsize(path) // np.dtype(dtype).itemsize)

    # numpy says what is wrong with a header; what it maps may still be anything.
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cut off or damaged ({str(error).splitlines()[0]})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(f"{path}: {array.dtype} of shape {array.shape}: token ids are integers in one dimension")
    return TokenFile(path, array.dtype.str, len(array), getattr(array, "offset", 0))


def _told_dtype(path: str, vocab_size: int) -> str:
    """Tell uint16 from uint32 in ids without a header."""
    # Of a uint32 the upper half is never above that of the largest id, which is 0 for up to 65,536 ids and 1 or 2 for
    # the largest vocabularies. Of uint16 every second number would have to be one of these few ids.
    size = os.path.getsize(path)
    if size % 2:
        raise ValueError(f"{path}: {size:,} bytes are no ids of two or four bytes: it is cut off, or no token file")
    upper = np.fromfile(path, "<u2", min(SAMPLE_WORDS, size // 4 * 2))[1::2]
    share = float(np.mean(upper <= (vocab_size - 1) >> 16)) if len(upper) else 0.0
    if share > 0.9 and size % 4:
        raise ValueError(f"{path}: ids of four bytes by its content, but {size:,} bytes: it is cut off")
    if 0.5 < share <= 0.9:
        raise ValueError(
            f"{path}: two or four bytes an id, its content does not tell: save it with numpy.save, which says so"
        )
    return "<u4" if share > 0.9 else "<u2"


def load_documents(
    sources: Sequence[TokenSource], tokenizer: Tokenizer, folder: str, *, must_end: bool = False
) -> list[Documents]:
    """Return the documents of token files, whose ids are checked once; what is found is kept in `folder`.

    Errors: ids that the tokenizer lacks, documents that end with another token than the tokenizer's end of text, and
    with `must_end` those of a file of which none ends with it.
    """
    # Named by all that decides what is in it. Content hashes of files that have not changed are remembered.
    paths = dict.fromkeys(path for source in sources for path in (source.file.path, source.index) if path)
    contents = dict(zip(paths, hash_files([*paths], folder), strict=True))
    jobs = []
    for source in sources:
        content = [contents[source.file.path], contents.get(source.index), source.file.dtype, source.file.offset]
        name = digest([content, tokenizer.vocab_size, tokenizer.eot_id])
        jobs.append(_Job(source, tokenizer.vocab_size, tokenizer.eot_id, str(Path(folder) / f"documents-{name}.npy")))

    # As many at once as there are cores; copies of a file are read once.
    with storage_errors(folder):
        todo = [job for path, job in {job.output: job for job in jobs}.items() if not is_usable(path)]
        if todo:
            size = sum(job.source.file.num_tokens for job in todo)
            log.info("checking %s tokens of %d files, once: %s", f"{size:,}", len(todo), todo[0].source.file.path)
            Path(folder).mkdir(parents=True, exist_ok=True)
        for _ in run_parallel(index_documents, todo):
            pass

    # The last ids of documents are looked at here, because a worker can't warn.
    documents = []
    for job in jobs:
        ends, hashes, last = np.load(job.output, mmap_mode="r")
        _check_last(job.source, ends, last, tokenizer, must_end)
        fingerprint = Path(job.output).stem.removeprefix("documents-")
        documents.append(Documents(job.source.file, fingerprint, ends.view(np.int64), hashes, last == tokenizer.eot_id))
    if sources and not any(len(some.ends) for some in documents):
        raise ValueError(f"{sources[0].file.path}: no documents in it{', nor in the others' if sources[1:] else ''}")
    return documents


def index_documents(job: _Job) -> Iterator[int]:
    """Write the end, hash and last id of each document of a file, (3, D) uint64; runs in a worker process."""
    file, eot = job.source.file, job.eot_id

    # Borders first: an index that is damaged is told before all of a large file is read.
    ends = _index_ends(job.source.index) if job.source.index else None
    eots = [np.zeros(0, np.int64)]
    for start in range(0, file.num_tokens, CHUNK_TOKENS):
        ids = file.read(start, min(start + CHUNK_TOKENS, file.num_tokens))
        if ids.max() >= job.vocab_size or ids.min() < 0:
            place = int(((ids >= job.vocab_size) | (ids < 0)).argmax())
            raise ValueError(
                f"{file.path}: id {ids[place]} (token {start + place:,}) is not one of the tokenizer's "
                f"{job.vocab_size:,} ids: name the tokenizer that made the file with --data.tokenizer"
            )
        if ends is None:
            eots.append(np.flatnonzero(ids == eot) + start + 1)
        yield len(ids)

    # What follows the last end of text is a document too.
    if ends is None:
        ends = np.concatenate(eots)
        if file.num_tokens and (not len(ends) or ends[-1] != file.num_tokens):
            ends = np.append(ends, file.num_tokens)
    with new_checked_file(job.output) as output:
        hashes, last = _hash_documents(file, ends, eot)
        np.save(output, np.stack([ends.astype(np.uint64), hashes, last]))


def _hash_documents(file: TokenFile, ends: np.ndarray, eot: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes and last ids of documents, (D,) uint64 each; the last id of an empty one is `EMPTY`."""
    # The same for every type of ids, and with or without an end of text, so that copies show in any pair of files.
    hashes, last = np.empty(len(ends), np.uint64), np.full(len(ends), EMPTY)
    starts = np.concatenate([[0], ends[:-1]])
    first = 0
    while first < len(ends):
        # As many documents at once as a chunk holds. A longer one, which may be all of a file, is read by chunks.
        begin = int(starts[first])
        stop = int(np.searchsorted(ends, begin + CHUNK_TOKENS, side="right"))
        if stop <= first:
            last[first] = file.read(int(ends[first]) - 1, int(ends[first]))[0]
            end = int(ends[first]) - bool(last[first] == eot)
            hashes[first] = document_hash(b"", _chunks(file, begin, end))
            first += 1
            continue
        data = b"".join(_chunks(file, begin, int(ends[stop - 1])))
        ids = np.frombuffer(data, "<u4")
        for index in range(first, stop):
            start, end = int(starts[index]) - begin, int(ends[index]) - begin
            if end > start:
                last[index] = ids[end - 1]
                end -= bool(ids[end - 1] == eot)
            hashes[index] = document_hash(data[4 * start : 4 * end])
        first = stop
    return hashes, last


def _chunks(file: TokenFile, start: int, stop: int) -> Iterator[bytes]:
    for first in range(start, stop, CHUNK_TOKENS):
        yield file.read(first, min(first + CHUNK_TOKENS, stop)).astype("<u4").tobytes()


def _check_last(source: TokenSource, ends: np.ndarray, last: np.ndarray, tokenizer: Tokenizer, must_end: bool) -> None:
    """Hold the ends of documents against the tokenizer's end of text."""
    file, eot = source.file, tokenizer.eot_id
    ends, last = ends[last != EMPTY], last[last != EMPTY]
    name = tokenizer.backend.id_to_token(eot)
    if (last == eot).any() or not len(last):
        if must_end and source.index and (count := int((last != eot).sum())):
            log.warning(
                "%s: %s of its %s documents do not end with the end of text, %s (id %d): data.document_mask takes "
                "each of them together with the next",
                *(file.path, f"{count:,}", f"{len(last):,}", name, eot),
            )
        return
    advice = "name the tokenizer that made the file with --data.tokenizer, or its end of text with --data.eot_token"
    if not source.index:
        raise ValueError(
            f"{file.path}: none of its {file.num_tokens:,} tokens is the end of text, {name} (id {eot}): {advice}"
        )

    # An id that ends every document and is found nowhere else is another tokenizer's end of text.
    other = int(last[0])
    count = max(MIN_ENDS, int(np.searchsorted(ends, CHUNK_TOKENS)))
    if len(last) >= MIN_ENDS and (last == other).all():
        beginning = file.read(0, int(ends[:count][-1]))
        if int((beginning == other).sum()) == len(ends[:count]):
            raise ValueError(
                f"{file.path}: every document ends with id {other} ({tokenizer.backend.id_to_token(other)}), and the "
                f"tokenizer's end of text is {name} (id {eot}): {advice}"
            )
    if must_end:
        raise ValueError(
            f"{file.path}: none of its {len(last):,} documents ends with the end of text, {name} (id {eot}), by which "
            "data.document_mask = true tells them apart: make the file anew with --append-eod, or turn the mask off"
        )
    log.warning(
        "%s: none of its %s documents ends with the end of text, %s (id %d): a model will not learn where texts end",
        file.path,
        f"{len(last):,}",
        name,
        eot,
    )


def join_documents(documents: Sequence[Documents], keep: Sequence[np.ndarray]) -> TokenParts:
    """Return the documents that are kept, one after the other; `keep` is a mask (D,) for each file."""
    offsets, sizes, owners = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for owner, (some, mask) in enumerate(zip(documents, keep, strict=True)):
        # Neighbours that are kept are one part, so that there are few parts where little is left out.
        edges = np.flatnonzero(np.diff(mask.astype(np.int8), prepend=0, append=0)).reshape(-1, 2)
        borders = np.concatenate([[0], some.ends])[edges]
        borders = borders[borders[:, 0] < borders[:, 1]]
        offsets.append(borders[:, 0])
        sizes.append(borders[:, 1] - borders[:, 0])
        owners.append(np.full(len(borders), owner))
    return token_parts(
        [some.file for some in documents], np.concatenate(sizes), np.concatenate(offsets), np.concatenate(owners)
    )


def all_documents(documents: Sequence[Documents]) -> TokenParts:
    """Return all documents of some files, one after the other."""
    return join_documents(documents, _all(documents))


def join_borders(documents: Sequence[Documents], keep: Sequence[np.ndarray] | None = None) -> Borders:
    """Return where the documents of `join_documents` end in what it returns, or those of `all_documents` (None)."""
    keep = keep or _all(documents)
    sizes = [np.diff(some.ends, prepend=0)[mask] for some, mask in zip(documents, keep, strict=True)]
    has_eot = [some.has_eot[mask] for some, mask in zip(documents, keep, strict=True)]
    return Borders(np.cumsum(np.concatenate(sizes)), np.concatenate(has_eot))


def _all(documents: Sequence[Documents]) -> list[np.ndarray]:
    return [np.ones(len(some.ends), bool) for some in documents]


def divide_documents(documents: Sequence[Documents], fraction: float, held_out: Sequence[Documents]) -> DividedTokens:
    """Divide documents into training and validation data.

    Validation data are all of `held_out`, of which training sees no copy, or `fraction` of `documents`, by their hash:
    one document at least, and not all of them, where two differ and the fraction is not 0.
    """
    if held_out:
        seen = np.unique(np.concatenate([some.hashes for some in held_out]))
        keep = [~np.isin(some.hashes, seen) for some in documents]
        validation, borders = all_documents(held_out), join_borders(held_out)
    else:
        limit = _hash_limit(documents, fraction)
        keep = [some.hashes >= limit for some in documents]
        left_out = [~mask for mask in keep]
        validation, borders = join_documents(documents, left_out), join_borders(documents, left_out)
    of_side = {"train": join_borders(documents, keep), "validation": borders}
    num_documents = {name: len(borders.ends) for name, borders in of_side.items()}
    return DividedTokens(join_documents(documents, keep), validation, num_documents, of_side)


def _hash_limit(documents: Sequence[Documents], fraction: float) -> np.uint64:
    """Return the hash from which on documents are training data."""
    hashes = [some.hashes for some in documents if len(some.hashes)]
    least, most = min(int(some.min()) for some in hashes), max(int(some.max()) for some in hashes)
    if fraction and least < most and (near := nearest_fraction(fraction, least, most)) != fraction:
        log.info("data.validation_fraction is taken as %.3g: one document at least on either side", near)
        fraction = near
    return np.uint64(math.ceil(fraction * 2.0**64))  # rounding up changes nothing between integers
