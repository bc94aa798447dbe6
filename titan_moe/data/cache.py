"""The token cache: documents are tokenized once, in parallel, into memory-mapped files that runs and ranks share.

A cache lives in a folder named by what it is made of (content of the files, split, tokenizer). Shards are tokenized
into part files, and finished parts survive a kill. At the end the parts become train.bin and validation.bin, and
meta.json is written last: a folder with a meta.json is complete. Every file gets its name by a rename when it is whole,
and a name always stands for the same bytes. So two runs that build at once both end right; a lock keeps them from doing
the work twice. While the parts are joined the disk holds the tokens twice.

meta.json has a checksum for the tokens of each part, taken by the worker that made them. Checksums are compared when a
cache is opened for the first time, and again when one of its files has changed; a damaged cache is built anew.
"""

import contextlib
import functools
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_moe.data import sources
from titan_moe.data.corpus import Corpus, Split, digest, load_held_out, make_split, side
from titan_moe.data.encode import Encode, library_of, make_encoder
from titan_moe.data.processes import available_cpus, run_parallel
from titan_moe.data.sources import Shard, texts
from titan_moe.data.storage import DamagedError, locked, made_anew, read_sealed, storage_errors, write_sealed
from titan_moe.data.tokenizer import Tokenizer, load_tokenizer
from titan_moe.runtime.files import crc32_of, new_file, remove_leftovers, write_atomic
from titan_moe.runtime.progress import progress_of

SPLITS = ("train", "validation")
COUNT_NAMES = ("num_tokens", "num_documents", "num_bytes", "num_nulls")
META, CHECKED = "meta.json", "checked.json"
LARGE_BYTES = 4 << 30  # comparing checksums of more takes a while, and is logged
READ_TOKENS = 1 << 19  # that a read may bring into memory, however few it asks for: Linux maps up to 1 or 2 MiB at once
MAPPED_TOKENS = 1 << 26  # of all maps, before they are given back
PIECE_BYTES = 16 << 20  # of one checksum, in a cache of a version that took none
BATCH_CHARS = 1 << 20  # tokenized at once: enough for a quick call, little beside the libraries' own memory
log = logging.getLogger(__name__)


class TokenFile(NamedTuple):
    """A file of token ids: documents one after the other, in our own files the end-of-text token after each."""

    path: str
    dtype: str
    num_tokens: int
    offset: int = 0  # bytes before the first id

    def tokens(self) -> np.ndarray:
        """Return the memory map (num_tokens,), opened once in every process."""
        return _map(self) if self.num_tokens else np.empty(0, self.dtype)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids from `start` to `stop` (stop - start,)."""
        _maps.will_read(stop - start)
        return self.tokens()[start:stop]


class TokenParts(NamedTuple):
    """Parts of token files, one after the other, to be read as one file is.

    `table` holds int64 (3, P + 1) for P parts: where each one begins in the whole, where in its file, and the number of
    its file; the last column ends the whole. As bytes two of the same parts are equal, and have one hash.
    """

    files: tuple[TokenFile, ...]
    table: bytes

    @property
    def num_tokens(self) -> int:
        """The number of ids of all parts."""
        return int(self._columns()[0, -1])

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return the ids from `start` to `stop` (stop - start,)."""
        starts, places, numbers = self._columns()
        pieces = []
        part = int(starts.searchsorted(start, side="right")) - 1
        while start < stop:
            end = min(stop, int(starts[part + 1]))
            place = int(places[part]) + start - int(starts[part])
            pieces.append(self.files[numbers[part]].read(place, place + end - start))
            start, part = end, part + 1
        return np.concatenate(pieces) if pieces[1:] else pieces[0]

    def _columns(self) -> np.ndarray:
        return np.frombuffer(self.table, np.int64).reshape(3, -1)


def token_parts(files: Sequence[TokenFile], sizes: np.ndarray, places: np.ndarray, numbers: np.ndarray) -> TokenParts:
    """Join parts, each (P,): `sizes` tokens from `places` on of the file of `numbers`."""
    starts = np.concatenate([[0], np.cumsum(sizes)])
    table = np.stack([starts, np.append(places, 0), np.append(numbers, 0)]).astype(np.int64)
    return TokenParts(tuple(files), table.tobytes())


Tokens = TokenFile | TokenParts  # ids by their place, however they lie on the disk


class TokenCache(NamedTuple):
    """A complete cache: a token file, the count of documents and the count of UTF-8 bytes for each split."""

    train: TokenFile
    validation: TokenFile
    num_documents: dict[str, int]
    num_bytes: dict[str, int]


class _Job(NamedTuple):
    """A shard to tokenize, and all that a worker needs for it."""

    shard: Shard
    split: Split | None  # None: all of it is validation data
    output: str  # the path of its part files, without their endings
    tokenizer: str  # the folder of the tokenizer's files

    @property
    def size(self) -> int:
        """The bytes of its files, as they lie on the disk."""
        return sum(piece.size for piece in self.shard)


class _Told(NamedTuple):
    """What a worker has done since it told the last time, and the shard that it has finished with it."""

    num_bytes: int  # of text
    num_tokens: int
    shard_size: int = 0  # bytes of files
    shard_text: int = 0  # bytes of text


@functools.lru_cache(maxsize=1 << 14)  # a corpus of other tools may be thousands of files, and every batch reads many
def _map(file: TokenFile) -> np.ndarray:
    ids = np.memmap(file.path, dtype=file.dtype, mode="r", offset=file.offset, shape=(file.num_tokens,))
    return np.asarray(ids)  # a plain array is sliced faster


class _Maps:
    """Unmaps all token files now and then.

    A page that is read counts as memory of the process, and so do those around it: after an epoch that would be all of
    the file, in every process. In the system's cache they stay.
    """

    def __init__(self) -> None:
        self.tokens = 0  # that may be in memory

    def will_read(self, num_tokens: int) -> None:
        # A map that somebody still has a part of stays until it is let go. It is made again in 15 us.
        self.tokens += max(num_tokens, READ_TOKENS)
        if self.tokens > MAPPED_TOKENS:
            _map.cache_clear()
            self.tokens = num_tokens


_maps = _Maps()


def build_cache(
    corpus: Corpus, tokenizer: Tokenizer, folder: str, *, num_processes: int = 0, progress: bool = True
) -> TokenCache:
    """Return the cache of a corpus, built now unless it is there; `num_processes` 0 means one per core.

    Errors: OSError of one line where the folder can't be used, ValueError for data that can't be read.
    """
    # Opened again under the lock, because another process may have built it meanwhile; and after building, because that
    # reads the checksums back from the disk.
    home = cache_home(corpus.fingerprint, tokenizer, folder)
    with storage_errors(folder):
        cache = _usable_cache(home)
        if cache is None:
            with locked(home / "lock"):
                cache = _usable_cache(home)
                if cache is None:
                    _build(corpus, tokenizer, home, num_processes, progress)
                    cache = _usable_cache(home)
    if cache is None:
        raise OSError(
            f"data.cache_folder ({folder}): what was just written there is read back as something else: the disk or "
            "the memory of this machine is faulty; choose another folder with --data.cache_folder"
        )
    return cache


def cache_home(fingerprint: str, tokenizer: Tokenizer, folder: str) -> Path:
    """Return the folder of the cache of a corpus with this fingerprint."""
    return Path(folder) / digest([fingerprint, tokenizer.fingerprint])


def _usable_cache(home: Path) -> TokenCache | None:
    with made_anew():
        return open_cache(home)
    return None


def open_cache(home: Path, *, check: bool = False) -> TokenCache | None:
    """Return the cache in a folder, None where it is missing or unfinished.

    Its checksums are compared when it is opened for the first time or has changed since, and with `check` in any case.
    Raises DamagedError.
    """
    # Written last: without it the cache is not complete.
    meta = read_sealed(home / META)
    if meta is None:
        return None
    try:
        files = [TokenFile(str(home / f"{name}.bin"), meta["dtype"], meta["num_tokens"][name]) for name in SPLITS]
        cache = TokenCache(*files, num_documents=meta["num_documents"], num_bytes=meta["num_bytes"])
        sizes = [file.num_tokens * np.dtype(file.dtype).itemsize for file in files]
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{home / META} is damaged: {type(error).__name__}") from error

    # Sizes are compared every time, because that costs nothing; checksums only when they have to be.
    for file, size in zip(files, sizes, strict=True):
        if not os.path.exists(file.path) or os.path.getsize(file.path) != size:  # lost in a power cut, or by hand
            raise DamagedError(f"{file.path} is damaged: it does not have its {size} bytes")

    # Caches of an earlier version stay in use.
    if "checksums" not in meta:
        _add_checksums(home, meta)
    _check_tokens(home, meta["checksums"], check)
    return cache


def _add_checksums(home: Path, meta: dict[str, Any]) -> None:
    """Take the checksums of a cache that has none, from its files as they are now."""
    meta["checksums"] = {}
    for name in SPLITS:
        path = home / f"{name}.bin"
        total = path.stat().st_size
        pieces = [(path, start, min(PIECE_BYTES, total - start)) for start in range(0, total, PIECE_BYTES)]
        meta["checksums"][name] = [[size, crc] for (*_, size), crc in zip(pieces, _crc32s(pieces), strict=True)]
    with contextlib.suppress(OSError):  # a folder that is only read
        write_sealed(home / META, meta)


def _check_tokens(home: Path, checksums: dict[str, list[tuple[int, str]]], check: bool) -> None:
    """Raise DamagedError where a token file does not have its checksums (size and CRC-32 of each piece)."""
    # Files that were compared once and have not changed since are not read again. Their identities are taken before
    # they are read, so that a change in the meantime shows the next time.
    paths = {name: home / f"{name}.bin" for name in SPLITS}
    identities = {name: _identity(path) for name, path in paths.items()}
    with contextlib.suppress(DamagedError):
        if not check and read_sealed(home / CHECKED) == identities:
            return

    # A piece is what one worker wrote; its place in the file follows from the sizes of those before it.
    pieces, expected = [], []
    for name in SPLITS:
        sizes = [size for size, _ in checksums[name]]
        pieces += [(paths[name], end - size, size) for size, end in zip(sizes, accumulate(sizes), strict=True)]
        expected += [crc for _, crc in checksums[name]]
    if (total := sum(size for *_, size in pieces)) > LARGE_BYTES:
        log.info("comparing %.1f GB of tokens in %s with their checksums", total / 1e9, home)
    for (path, start, size), crc, right_crc in zip(pieces, _crc32s(pieces), expected, strict=True):
        if crc != right_crc:
            with contextlib.suppress(OSError):
                (home / CHECKED).unlink()  # or the next process would take the file for checked
            raise DamagedError(f"{path} is damaged: bytes {start} to {start + size} do not have their checksum")

    with contextlib.suppress(OSError):  # a folder that is only read: it is checked again the next time
        write_sealed(home / CHECKED, identities)


def _crc32s(pieces: Sequence[tuple[Path, int, int]]) -> list[str]:
    """Return the checksums of pieces (path, first byte, size) of files, read in parallel by threads."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        return list(pool.map(lambda piece: crc32_of(*piece), pieces))


def _identity(path: Path) -> list[int]:
    """Return numbers that change when a file does, even where its modification time is set back."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def _build(corpus: Corpus, tokenizer: Tokenizer, home: Path, num_processes: int, progress: bool) -> None:
    """Tokenize a corpus in worker processes, and join the parts."""
    # Workers are fresh processes: each loads the tokenizer from these files, once.
    parts = home / "parts"
    parts.mkdir(exist_ok=True)
    for name, content in tokenizer.files.items():
        write_atomic(parts / name, content)

    # A part's name is its number in the plan, which depends on the files alone: what a killed run has finished is found
    # again.
    split = make_split(corpus, str(home.parent)) if corpus.train else Split(0.0)
    shards = [(shard, None) for shard in corpus.validation] + [(shard, split) for shard in corpus.train]
    jobs = [_Job(*shard, str(parts / f"{index:06d}"), str(parts)) for index, shard in enumerate(shards)]
    todo = [job for job in jobs if not _is_done(job)]
    library = library_of(tokenizer)
    log.info("tokenizing into %s: %d of %d parts to do, by %s", home, len(todo), len(jobs), library)
    try:
        _show_progress(run_parallel(tokenize_shard, todo, num_processes), jobs, todo, progress)
    except ValueError:  # the data are bad: once mended they are others, with another cache
        shutil.rmtree(parts, ignore_errors=True)
        raise
    finally:
        remove_leftovers(parts)  # of workers that were ended

    # Joined in the order of the plan, whichever worker was first, so that a cache is the same on every machine.
    results = [read_sealed(Path(f"{job.output}.json")) or {} for job in jobs]
    for name in SPLITS:
        with new_file(home / f"{name}.bin") as file:
            for job in jobs:
                with open(f"{job.output}.{name}.bin", "rb") as part:
                    shutil.copyfileobj(part, file, 1 << 22)

    # The parts are deleted only after meta.json is there: until then they are what a killed run goes on from.
    totals = {key: {name: sum(result[key][name] for result in results) for name in SPLITS} for key in COUNT_NAMES}
    checksums = {name: [result["checksums"][name] for result in results] for name in SPLITS}
    write_sealed(home / META, {"dtype": tokenizer.dtype.name, **totals, "checksums": checksums})
    shutil.rmtree(parts, ignore_errors=True)
    if nulls := sum(totals["num_nulls"].values()):
        log.warning("%d documents without a text (null) are left out", nulls)
    log.info("token cache ready: %s tokens, %s documents", totals["num_tokens"], totals["num_documents"])


def _is_done(job: _Job) -> bool:
    """Whether a part is there as its worker made it; a part of a version that took no checksums is done again."""
    with made_anew():
        checksums = (read_sealed(Path(f"{job.output}.json")) or {}).get("checksums")
        return checksums is not None and all(
            os.path.exists(path) and crc32_of(Path(path)) == crc
            for path, (_, crc) in ((f"{job.output}.{name}.bin", checksums[name]) for name in SPLITS)
        )
    return False


def _show_progress(told: Iterator[_Told], jobs: Sequence[_Job], todo: Sequence[_Job], progress: bool) -> None:
    """Show what workers tell, until they are done."""
    # Files count by their bytes. Of a shard that is being read only the text is known. Files take as many bytes for it
    # as in the shards that are finished: JSON is larger than its text, an archive smaller.
    size = sum(job.size for job in jobs)
    before = size - sum(job.size for job in todo)
    is_packed = any(piece.path.endswith(sources.COMPRESSIONS) for job in todo for piece in job.shard)
    total, start = _Told(0, 0), time.monotonic()
    with progress_of("tokenizing", show=progress) as show:
        for news in told:
            total = _Told(*(a + b for a, b in zip(total, news, strict=True)))
            ratio = total.shard_size / total.shard_text if total.shard_text else 1.0
            done = before + total.shard_size + (total.num_bytes - total.shard_text) * ratio
            is_known = total.shard_text > 0 or not is_packed
            rate = total.num_tokens / max(time.monotonic() - start, 1e-9)
            text = f"{total.num_bytes / 1e6:,.0f} MB of text, {rate:,.0f} tokens/s"
            show(min(done / max(size, 1), 0.99) if is_known else None, text)


# Loaded once in a worker, which tokenizes shard after shard of one corpus: loading a tokenizer takes as long as
# tokenizing half a shard.
@functools.lru_cache(maxsize=1)
def _load_encoder(folder: str) -> Encode:
    return make_encoder(load_tokenizer(folder))


_load_held_out = functools.lru_cache(maxsize=1)(load_held_out)


def tokenize_shard(job: _Job) -> Iterator[_Told]:
    """Tokenize one shard into its part files, telling what is done; runs in a worker process."""
    encode = _load_encoder(job.tokenizer)
    held_out = _load_held_out(job.split) if job.split else frozenset()
    counts = {key: dict.fromkeys(SPLITS, 0) for key in COUNT_NAMES}
    sizes, crcs, shard_text = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), 0
    with contextlib.ExitStack() as stack:
        files = {name: stack.enter_context(new_file(Path(f"{job.output}.{name}.bin"))) for name in SPLITS}
        for batch in _batches(texts(job.shard)):
            # Rows without a text are no error, but counted, so that they are warned of at the end.
            counts["num_nulls"]["train" if job.split else "validation"] += batch.count(None)
            documents = [text for text in batch if text]
            data = [text.encode() for text in documents]
            sides = [side(one, job.split, held_out) if job.split else "validation" for one in data]
            num_bytes = np.array([len(one) for one in data], np.int64)
            ids, lengths = encode(documents)

            # No side is that of a copy of a held-out document: it belongs to neither.
            for name in SPLITS:
                chosen = np.array([its == name for its in sides], bool)
                for key, its in (("num_tokens", lengths), ("num_documents", chosen), ("num_bytes", num_bytes)):
                    counts[key][name] += int(its[chosen].sum())

                # The checksum is of what was in memory, so that it also shows what the disk or a copy got wrong.
                token_bytes = ids[np.repeat(chosen, lengths)].tobytes()
                sizes[name] += files[name].write(token_bytes)
                crcs[name] = zlib.crc32(token_bytes, crcs[name])
            shard_text += int(num_bytes.sum())
            yield _Told(int(num_bytes.sum()), len(ids))

    # Written after its token files have their names: a part with this file is done.
    checksums = {name: [sizes[name], f"{crcs[name]:08x}"] for name in SPLITS}
    write_sealed(Path(f"{job.output}.json"), {**counts, "checksums": checksums})
    yield _Told(0, 0, job.size, shard_text)


def _batches(some: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Yield lists of texts that have `BATCH_CHARS` characters, or of one that is longer."""
    batch: list[str | None] = []
    size = 0
    for text in some:
        batch.append(text)
        size += len(text or "")
        if size >= BATCH_CHARS:
            yield batch
            batch, size = [], 0
    yield batch
