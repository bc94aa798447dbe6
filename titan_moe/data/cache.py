"""The token cache: documents are tokenized once, in parallel, into memory-mapped files that runs and ranks share.

A cache lives in a folder named by what it is made of (content of the files, split, tokenizer). Shards are tokenized
into part files, and finished parts survive a kill. At the end the parts become train.bin and validation.bin, and
meta.json is written last: a folder with a meta.json is complete. Every file gets its name by a rename when it is whole,
and a name always stands for the same bytes, so two runs that build at once both end right; a lock keeps them from doing
the work twice. While the parts are joined the disk holds the tokens twice.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titan_moe.data import sources
from titan_moe.data.corpus import Corpus, Split, digest, load_held_out, make_split, side
from titan_moe.data.processes import run_parallel
from titan_moe.data.sources import Shard, texts
from titan_moe.data.storage import locked, storage_errors, temporary_name, write_whole
from titan_moe.data.tokenizer import Tokenizer, load_tokenizer

SPLITS = ("train", "validation")
log = logging.getLogger(__name__)


class TokenFile(NamedTuple):
    """A file of token ids: documents one after the other, the end-of-text token after each."""

    path: str
    dtype: str
    num_tokens: int

    def tokens(self) -> np.ndarray:
        """Return the memory map (num_tokens,), opened once in every process."""
        return _map(self) if self.num_tokens else np.empty(0, self.dtype)


class TokenCache(NamedTuple):
    """A complete cache: a token file, the count of documents and the count of UTF-8 bytes for each split."""

    train: TokenFile
    validation: TokenFile
    num_documents: dict[str, int]
    num_bytes: dict[str, int]


class _Job(NamedTuple):
    shard: Shard
    split: Split | None  # None: all of it is validation data
    output: str
    tokenizer: str


@functools.lru_cache(maxsize=16)
def _map(file: TokenFile) -> np.ndarray:
    return np.asarray(np.memmap(file.path, dtype=file.dtype, mode="r"))  # a plain array is sliced faster


def build_cache(
    corpus: Corpus, tokenizer: Tokenizer, folder: str, *, num_processes: int = 0, progress: bool = True
) -> TokenCache:
    """Return the cache of a corpus, built now unless it is there; `num_processes` 0 means one per core."""
    home = Path(folder) / digest([corpus.fingerprint, tokenizer.fingerprint])
    with storage_errors(folder):
        cache = open_cache(home)
        if cache is None:
            with locked(home / "lock"):
                cache = open_cache(home)
                if cache is None:
                    _build(corpus, tokenizer, home, num_processes, progress)
                    cache = open_cache(home)
    assert cache is not None
    return cache


def open_cache(home: Path) -> TokenCache | None:
    """Return the cache in a folder, None where it is missing, unfinished or too short (after a power cut)."""
    try:
        meta = json.loads((home / "meta.json").read_text())
        files = [TokenFile(str(home / f"{split}.bin"), meta["dtype"], meta["num_tokens"][split]) for split in SPLITS]
        if any(os.path.getsize(file.path) != file.num_tokens * np.dtype(file.dtype).itemsize for file in files):
            return None
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return TokenCache(*files, num_documents=meta["num_documents"], num_bytes=meta["num_bytes"])


def _build(corpus: Corpus, tokenizer: Tokenizer, home: Path, num_processes: int, progress: bool) -> None:
    parts = home / "parts"
    parts.mkdir(exist_ok=True)
    _remove_leftovers(home)
    for name, content in tokenizer.files.items():
        write_whole(parts / name, content)
    split = make_split(corpus, str(home.parent)) if corpus.train else Split(0.0)
    shards = [(shard, None) for shard in corpus.validation] + [(shard, split) for shard in corpus.train]
    jobs = [_Job(shard, how, str(parts / f"{index:06d}"), str(parts)) for index, (shard, how) in enumerate(shards)]
    todo = [job for job in jobs if not os.path.exists(f"{job.output}.json")]
    log.info("tokenizing into %s: %d of %d parts to do", home, len(todo), len(jobs))
    try:
        _show_progress(run_parallel(tokenize_shard, todo, num_processes), jobs, todo, progress)
    except ValueError:  # the data are bad: once mended they are others, with another cache
        shutil.rmtree(parts, ignore_errors=True)
        raise
    finally:
        _remove_leftovers(home)

    none = {"num_nulls": dict.fromkeys(SPLITS, 0)}  # of parts from before they were counted
    results = [{**none, **json.loads(Path(f"{job.output}.json").read_text())} for job in jobs]
    for name in SPLITS:
        _join([f"{job.output}.{name}.bin" for job in jobs], str(home / f"{name}.bin"))
    totals = {key: {name: sum(result[key][name] for result in results) for name in SPLITS} for key in results[0]}
    write_whole(home / "meta.json", json.dumps({"dtype": tokenizer.dtype.name, **totals}))
    shutil.rmtree(parts, ignore_errors=True)
    if nulls := sum(totals["num_nulls"].values()):
        log.warning("%d documents without a text (null) are left out", nulls)
    log.info("token cache ready: %s tokens, %s documents", totals["num_tokens"], totals["num_documents"])


def _remove_leftovers(home: Path) -> None:
    """Remove what processes that died or failed were writing."""
    for leftover in [*home.glob("parts/*.tmp-*"), *home.glob("*.tmp-*")]:
        leftover.unlink(missing_ok=True)


def _join(parts: Sequence[str], path: str) -> None:
    with open(temporary_name(path), "wb") as target:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, target, 1 << 22)
        target.flush()
        os.fsync(target.fileno())
    os.replace(temporary_name(path), path)


def _show_progress(counts: Iterator[int], jobs: Sequence[_Job], todo: Sequence[_Job], progress: bool) -> None:
    from tqdm import tqdm

    def text_size(some: Sequence[_Job]) -> int:
        return sum(piece.size for job in some for piece in job.shard)

    packed = any(piece.path.endswith(sources.COMPRESSIONS) for job in jobs for piece in job.shard)
    with tqdm(
        total=None if packed else text_size(jobs),  # how much text is in an archive shows at its end
        initial=text_size(jobs) - text_size(todo),
        desc="tokenizing",
        unit="B",
        unit_scale=True,
        leave=False,
        disable=None if progress else True,  # None: off where standard error is no terminal
    ) as bar:
        for count in counts:
            bar.update(count)


# Once in a worker, which tokenizes shard after shard of one corpus: a tokenizer takes as long to load as half a shard.
_load_tokenizer = functools.lru_cache(maxsize=1)(load_tokenizer)
_load_held_out = functools.lru_cache(maxsize=1)(load_held_out)


def tokenize_shard(job: _Job) -> Iterator[int]:
    """Tokenize one shard into its part files, yielding the bytes of text done; runs in a worker process."""
    tokenizer = _load_tokenizer(job.tokenizer)
    held_out = _load_held_out(job.split) if job.split else frozenset()
    counts = {key: dict.fromkeys(SPLITS, 0) for key in ("num_tokens", "num_documents", "num_bytes", "num_nulls")}
    done = 0
    with contextlib.ExitStack() as stack:
        paths = {name: f"{job.output}.{name}.bin" for name in SPLITS}
        files = {name: stack.enter_context(open(temporary_name(path), "wb")) for name, path in paths.items()}
        for text in texts(job.shard):
            if not text:
                counts["num_nulls"]["train" if job.split else "validation"] += text is None
                continue
            data = text.encode()
            name = side(data, job.split, held_out) if job.split else "validation"
            done += len(data)
            if name:
                ids = tokenizer.encode_document(text)
                files[name].write(ids.tobytes())
                for key, count in (("num_tokens", len(ids)), ("num_documents", 1), ("num_bytes", len(data))):
                    counts[key][name] += count
            if done >= 1 << 20:
                yield done
                done = 0
    for path in paths.values():
        os.replace(temporary_name(path), path)
    write_whole(f"{job.output}.json", json.dumps(counts))
    yield done
