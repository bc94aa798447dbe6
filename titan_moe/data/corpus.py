"""A corpus: the files to tokenize, how their documents are split, and what is made of them once (hashes, a BPE)."""

import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from titan_moe.data import sources
from titan_moe.data.processes import available_cpus, run_parallel, watch
from titan_moe.data.remote import hash_content, known_hashes, stat_all
from titan_moe.data.sources import Shard, documents
from titan_moe.data.storage import (
    is_usable,
    locked,
    made_anew,
    new_checked_file,
    read_sealed,
    storage_errors,
    write_sealed,
)
from titan_moe.data.tokenizer import Tokenizer, bpe_vocab_size, load_tokenizer, train_bpe
from titan_moe.runtime.progress import clock, progress_of
from titan_moe.runtime.remote import RemoteFile, is_url

VERSION = 1  # raise it when the same input gives other tokens, splits or files
BPE_CHARS = 32 << 20  # a BPE is trained on at most this much text, spread over the data set
REPORT_CHARS = 1 << 20  # between two reports of how far reading is
MEMO_BYTES = 8 << 20  # the content hashes of files from this size on are remembered
log = logging.getLogger(__name__)


class Split(NamedTuple):
    """How documents are divided, by the hash of their content alone: the same for every order, shard and world size.

    `fraction` of the documents is validation data; copies of the documents hashed in the file `held_out` are dropped.
    """

    fraction: float
    held_out: str = ""


class Corpus(NamedTuple):
    """What is to be tokenized: `train` is divided by `fraction`, or all of `validation` is held out instead."""

    train: tuple[Shard, ...]
    validation: tuple[Shard, ...]
    fraction: float
    fingerprint: str


def make_corpus(
    files: Sequence[str],
    validation_files: Sequence[str] = (),
    *,
    fraction: float,
    folder: str,
    kind: str = "",
    key: str = "data.path",
) -> Corpus:
    """Plan the shards of files and fingerprint their content: moved files keep their cache, edited ones do not.

    `kind` overrides the format that the names tell. Errors: nothing in any of the files, which `key` has named.
    """
    train, validation = tuple(sources.plan_shards(files, kind)), tuple(sources.plan_shards(validation_files))
    every = [*files, *validation_files]

    # Files without a byte would end in an error about fractions or lengths, far from its cause.
    if not any(piece.size for shard in (*train, *validation) for piece in shard):
        raise ValueError(f"{key}: no data: {every[0]} is empty{f', and {len(every) - 1} more' if every[1:] else ''}")

    fingerprint = fingerprint_of(files, validation_files, hash_files(every, folder), fraction=fraction, kind=kind)
    return Corpus(train, validation, fraction, fingerprint)


def fingerprint_of(
    files: Sequence[str], validation_files: Sequence[str], hashes: Sequence[str], *, fraction: float, kind: str = ""
) -> str:
    """Return the fingerprint of a corpus by the content hashes of all its files, in this order."""
    # It leaves out the names of files, except for the format, which decides how they are read.
    kinds = [kind or sources.kind_of(path) for path in files] + [sources.kind_of(path) for path in validation_files]
    return digest([list(zip(kinds, hashes, strict=True)), len(files), fraction])


def same_files(files: Sequence[str], others: Sequence[str], folder: str) -> list[str]:
    """Return those of `files` whose content is that of one of `others`, under whatever name; empty files are left out.

    Hashes of big files are remembered in `folder`. Copies of single documents in different files are not looked for.
    """
    # Only files of one size can be the same, so that of a large corpus hardly any is read. What is behind a URL was
    # fetched before, or nobody knows yet what is in it.
    every = stat_all([*{*files, *others}])
    sizes = {file.url: file.size for file in every}
    common = {sizes[path] for path in files} & {sizes[path] for path in others} - {0}
    candidates = [path for path in files if sizes[path] in common]
    rivals = [path for path in others if sizes[path] in common]
    contents = content_hashes([file for file in every if file.url in {*candidates, *rivals}], folder)
    known = {contents[path] for path in rivals} - {None}
    return [path for path in candidates if contents[path] in known]


def content_hashes(files: Sequence[RemoteFile], folder: str) -> dict[str, str | None]:
    """Return content hashes of files by path or URL: of local ones as `hash_files` does, None of one never fetched."""
    local = [file.url for file in files if not is_url(file.url)]
    remote = [file for file in files if is_url(file.url)]
    fetched = {file.url: content for file, content in zip(remote, known_hashes(remote, folder), strict=True)}
    return {**fetched, **dict(zip(local, hash_files(local, folder), strict=True))}


def joined(corpora: Sequence[Corpus]) -> Corpus:
    """All of some corpora, which have the same files to validate on, if any; by each one's own fingerprint."""
    if len(corpora) == 1:
        return corpora[0]
    train = tuple(shard for corpus in corpora for shard in corpus.train)
    fraction = max(corpus.fraction for corpus in corpora)
    return Corpus(train, corpora[0].validation, fraction, digest([corpus.fingerprint for corpus in corpora]))


def digest(content: object) -> str:
    """Return a short hash of something JSON can hold, and of the version of this code's files."""
    return hashlib.sha256(json.dumps([VERSION, content]).encode()).hexdigest()[:16]


def hash_files(files: Sequence[str], folder: str) -> list[str]:
    """Return content hashes of files; those of big files are remembered by path, size, inode, mtime and ctime."""
    # A cache is named by the content of its files, and to read all of a large corpus would delay every start.
    memo_path = Path(folder) / "file_hashes.json"
    memo: dict[str, str] = {}
    with storage_errors(folder), made_anew():
        memo = read_sealed(memo_path) or {}

    def content_hash(path: str) -> str:
        stat = os.stat(path)
        key = json.dumps([os.path.abspath(path), stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns])
        if stat.st_size >= MEMO_BYTES and key in memo:
            return memo[key]
        content = hash_content(path)
        if stat.st_size >= MEMO_BYTES:
            memo[key] = content
        return content

    # In threads: hashing and reading both leave the interpreter's lock to others. An error of the user's files is told
    # with their name, one of the cache folder below with its own.
    known = len(memo)
    try:
        with ThreadPoolExecutor(available_cpus()) as pool:
            hashes = list(pool.map(content_hash, files))
    except OSError as error:
        raise OSError(f"{error.filename}: {error.strerror}") from error
    if len(memo) > known:
        with storage_errors(folder):
            memo_path.parent.mkdir(parents=True, exist_ok=True)
            write_sealed(memo_path, memo)
    return hashes


def document_hash(data: bytes, more: Iterable[bytes] = ()) -> int:
    """Return the 64-bit hash that decides a document's side, of `data` and then `more`: copies are on the same side."""
    content = hashlib.blake2b(data, digest_size=8)
    for piece in more:
        content.update(piece)
    return int.from_bytes(content.digest(), "little")


def load_held_out(split: Split) -> frozenset[int]:
    """Return the hashes of the documents that training must not see, empty where the split is by fraction."""
    return frozenset(np.load(split.held_out).tolist()) if split.held_out else frozenset()


def side(data: bytes, split: Split, held_out: frozenset[int]) -> str:
    """Return the side of a document: "train", "validation", or "" for a copy of a held-out one, which is dropped."""
    number = document_hash(data)
    if number < split.fraction * 2.0**64:
        return "validation"
    return "" if number in held_out else "train"


def make_split(corpus: Corpus, folder: str) -> Split:
    """Return how the corpus is divided; where it has validation files, their documents are hashed first."""
    if not corpus.validation:
        return Split(corpus.fraction)
    path = os.path.join(folder, f"held-out-{corpus.fingerprint}.npy")
    return Split(corpus.fraction, _hash_file(corpus.validation, path, folder))


def fraction_for_both(corpus: Corpus, folder: str) -> float:
    """Return the fraction nearest to the corpus's that leaves a document on either side, or its own where none does.

    That takes two documents that differ. All documents are read once for it, which is quick beside tokenizing them.
    """
    hashes = np.load(_hash_file(corpus.train, hashes_path(corpus, folder), folder))
    if len(hashes) < 2:
        return corpus.fraction
    return nearest_fraction(corpus.fraction, int(hashes[0]), int(hashes[-1]))


def nearest_fraction(fraction: float, least: int, most: int) -> float:
    """Return the fraction nearest to `fraction` that leaves a document on either side, by the least and most hash."""
    # Validation data are the documents whose hash is below fraction * 2^64: at least the smallest, never the largest.
    return min(max(fraction, math.nextafter(least / 2**64, 1)), math.nextafter(most / 2**64, 0))


def hashes_path(corpus: Corpus, folder: str) -> str:
    """Return the path of the hashes of all training documents, which `fraction_for_both` writes."""
    return os.path.join(folder, f"hashes-{corpus.fingerprint}.npy")


def _hash_file(shards: Sequence[Shard], path: str, folder: str) -> str:
    """Return the path of a file with the hashes of some shards' documents, written now unless it is there."""
    if not is_usable(path):
        with storage_errors(folder):
            os.makedirs(folder, exist_ok=True)
            for _ in run_parallel(hash_documents, [(shards, path)]):
                pass
    return path


def hash_documents(job: tuple[Sequence[Shard], str]) -> Iterator[int]:
    """Write the hashes of all documents of some shards to a .npy file; runs in a worker process."""
    shards, path = job
    hashes = {document_hash(text.encode()) for shard in shards for text in documents(shard)}
    with new_checked_file(path) as file:
        np.save(file, np.array(sorted(hashes), np.uint64))
    yield 0


def corpus_tokenizer(
    name: str, corpus: Corpus, folder: str, endpoint: str, eot_token: str = "", *, progress: bool = True
) -> Tokenizer:
    """Load a tokenizer by name; `bpe:N` is trained on the corpus's training documents and kept by its fingerprint."""
    vocab_size = bpe_vocab_size(name)
    if vocab_size is None:
        return load_tokenizer(name, endpoint, eot_token)

    # A BPE is trained once, by one process, and found again by the corpus's fingerprint. A worker trains it, because
    # after the library's threads a fork of this process would not be safe.
    path = bpe_path(vocab_size, corpus, folder)
    with storage_errors(folder):
        if not is_usable(path):
            with locked(path + ".lock"):
                if not is_usable(path):
                    log.info("training a BPE of %d tokens on the data set", vocab_size)
                    job = (corpus, make_split(corpus, folder), vocab_size, path)
                    _show_training(run_parallel(train_bpe_file, [job]), progress)
    return load_tokenizer(path, eot_token=eot_token)


def bpe_path(vocab_size: int, corpus: Corpus, folder: str) -> str:
    """Return the path of the BPE that is trained on a corpus."""
    return os.path.join(folder, f"bpe-{vocab_size}-{corpus.fingerprint}.json")


def _show_training(told: Iterator[dict[str, Any]], progress: bool) -> None:
    """Show how far each stage of a training is, one after the other: `tokenizers` tells no more."""
    start = time.monotonic()
    for stage, reports in groupby(told, itemgetter("stage")):
        with progress_of(f"training a BPE: {stage.lower()}", show=progress) as show:
            for report in reports:
                current, total = report["current"], report["total"]
                of_total = f" of {total:,}" if total else ""
                show(min(current / total, 1.0) if total else None, f"{current:,}{of_total}")
    log.info("trained the BPE in %s", clock(time.monotonic() - start))


def train_bpe_file(job: tuple[Corpus, Split, int, str]) -> Iterator[dict[str, Any]]:
    """Train a BPE on training documents and write its tokenizer.json, telling how far it is; runs in a worker."""
    corpus, split, vocab_size, path = job
    with new_checked_file(path) as file:
        tokenizer = yield from watch(partial(train_bpe, _bpe_texts(corpus, split), vocab_size, report=True))
        file.write(tokenizer.to_json().encode())


def _bpe_texts(corpus: Corpus, split: Split) -> Iterator[str]:
    """Yield training documents of evenly spread shards, until there are `BPE_CHARS` characters of them.

    How far it is goes to standard error, as the library writes there how far it is with what comes then.
    """
    held_out = load_held_out(split)
    pieces = [piece for shard in corpus.train for piece in shard]
    size, room = sum(piece.size for piece in pieces), BPE_CHARS
    is_packed = any(piece.path.endswith(sources.COMPRESSIONS) for piece in pieces)  # there may be any amount in it
    for shard in corpus.train[:: max(-(-size // BPE_CHARS), 1)]:
        for text in documents(shard):
            if side(text.encode(), split, held_out) == "train":
                yield text
                before, room = room, room - len(text)
                if before // REPORT_CHARS > room // REPORT_CHARS:
                    report = {
                        "stage": "Read text",
                        "current": BPE_CHARS - room,
                        "total": 0 if is_packed else min(size, BPE_CHARS),
                    }
                    os.write(2, json.dumps(report).encode() + b"\n")
                if room <= 0:
                    return
