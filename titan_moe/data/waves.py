"""Text behind URLs, tokenized in waves: while one wave of files is tokenized the next one is fetched.

Each wave is a corpus with a cache of its own, named as always by content, split and tokenizer; its text is removed once
the cache is there. So the disk holds the text of two waves, a restart fetches only what has no cache yet, and an object
that has changed costs its own wave. The tokens of all waves, one after the other, are those that the same files give
from a disk.
"""

import logging
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from titan_moe.data.cache import (
    TokenCache,
    TokenFile,
    Tokens,
    build_cache,
    cache_home,
    open_cache,
    token_parts,
)
from titan_moe.data.corpus import (
    Corpus,
    bpe_path,
    content_hashes,
    corpus_tokenizer,
    fingerprint_of,
    hashes_path,
    joined,
    make_corpus,
)
from titan_moe.data.remote import Fetcher, fetch_all, fetcher, forget, place_of, stat_all
from titan_moe.data.storage import is_usable, made_anew, storage_errors
from titan_moe.data.tokenizer import Tokenizer, bpe_vocab_size
from titan_moe.runtime.remote import RemoteFile, is_url

WAVE_BYTES, MOST_WAVES = 256 << 20, 256
log = logging.getLogger(__name__)


class Texts(NamedTuple):
    """What `make_corpus` makes a corpus of, where some of it is behind URLs."""

    files: Sequence[RemoteFile]
    held_out: Sequence[RemoteFile]
    fraction: float
    kind: str = ""
    key: str = "data.path"


class WaveCache(NamedTuple):
    """The caches of all waves, to be read as one, as a TokenCache is."""

    train: Tokens
    validation: Tokens
    num_documents: dict[str, int]
    num_bytes: dict[str, int]


def find_texts(
    files: Sequence[str], held_out: Sequence[str], *, fraction: float, kind: str = "", key: str = "data.path"
) -> Texts:
    """Return what the files are at this moment. Raises OSError of one line for one that is not there."""
    return Texts(stat_all(files), stat_all(held_out), fraction, kind, key)


def whole_corpus(texts: Texts, folder: str) -> Corpus:
    """Return the corpus of texts that are all on the disk: those behind URLs are fetched now."""
    files, held_out = (fetch_all([file.url for file in some], folder) for some in (texts.files, texts.held_out))
    return make_corpus(files, held_out, fraction=texts.fraction, folder=folder, kind=texts.kind, key=texts.key)


def named_corpus(texts: Texts, folder: str) -> Corpus | None:
    """Return the fingerprint of texts, as a corpus without shards; None if one of them was never fetched."""
    every = [*texts.files, *texts.held_out]
    contents = content_hashes(every, folder)
    hashes = [content for file in every if (content := contents[file.url]) is not None]
    if len(hashes) < len(every):
        return None
    files, held_out = ([file.url for file in some] for some in (texts.files, texts.held_out))
    fingerprint = fingerprint_of(files, held_out, hashes, fraction=texts.fraction, kind=texts.kind)
    return Corpus((), (), texts.fraction, fingerprint)


def texts_tokenizer(name: str, texts: Sequence[Texts], folder: str, endpoint: str, eot_token: str) -> Tokenizer:
    """Load a tokenizer, or train one on all of some texts, which are on the disk together for that."""
    corpora: list[Corpus] = []
    if vocab_size := bpe_vocab_size(name):
        named = [corpus for some in texts if (corpus := named_corpus(some, folder)) is not None]
        is_trained = len(named) == len(texts) and is_usable(bpe_path(vocab_size, joined(named), folder))
        corpora = named if is_trained else [whole_corpus(some, folder) for some in texts]
    corpus = joined(corpora) if corpora else Corpus((), (), 0.0, "")
    return corpus_tokenizer(name, corpus, folder, endpoint, eot_token)


def hashed_corpus(texts: Texts, folder: str) -> Corpus:
    """Return the corpus of texts for `fraction_for_both`: on the disk, unless their documents were hashed before."""
    named = named_corpus(texts, folder)
    is_hashed = named is not None and is_usable(hashes_path(named, folder))
    return named if named is not None and is_hashed else whole_corpus(texts, folder)


def build_waves(texts: Texts, tokenizer: Tokenizer, folder: str, *, progress: bool) -> tuple[str, WaveCache]:
    """Return the fingerprint and the tokens of texts, whose waves are fetched and tokenized unless they were before."""
    waves = _plan(texts)
    caches = [_find(wave, tokenizer, folder) for wave in waves]
    if None in caches:
        with fetcher(folder) as fetch:
            caches = _build(waves, tokenizer, fetch, progress)
        forget([*texts.files, *texts.held_out], folder)
    corpus = named_corpus(texts, folder)
    assert corpus is not None
    done = [cache for cache in caches if cache is not None]

    # Files to validate on go with each wave, which leaves out their documents: once is enough.
    validation = done[:1] if texts.held_out else done
    train, held_out = _joined([one.train for one in done]), _joined([one.validation for one in validation])
    num_documents, num_bytes = (
        {"train": sum(one["train"] for one in counts), "validation": sum(one["validation"] for one in counts[:few])}
        for few in [len(validation)]
        for counts in ([one.num_documents for one in done], [one.num_bytes for one in done])
    )
    return corpus.fingerprint, WaveCache(train, held_out, num_documents, num_bytes)


def _plan(texts: Texts) -> list[Texts]:
    """Cut texts into waves of neighbouring files; a function of their sizes."""
    # An empty file has no shard.
    if not any(file.size for file in (*texts.files, *texts.held_out)):
        every = [*texts.files, *texts.held_out]
        more = f", and {len(every) - 1} more" if every[1:] else ""
        raise ValueError(f"{texts.key}: no data: {every[0].url} is empty{more}")
    most = max(WAVE_BYTES, sum(file.size for file in texts.files) // MOST_WAVES)
    waves: list[list[RemoteFile]] = [[]]
    for file in texts.files:
        if waves[-1] and sum(one.size for one in waves[-1]) + file.size > most:
            waves.append([])
        if file.size:
            waves[-1].append(file)
    return [texts._replace(files=wave) for wave in waves]


def _find(wave: Texts, tokenizer: Tokenizer, folder: str) -> TokenCache | None:
    """Return the cache of a wave, if it is known what is in its files and they were tokenized."""
    corpus = named_corpus(wave, folder)
    if corpus is not None:
        with storage_errors(folder), made_anew():
            return open_cache(cache_home(corpus.fingerprint, tokenizer, folder))
    return None


def _build(waves: Sequence[Texts], tokenizer: Tokenizer, fetch: Fetcher, progress: bool) -> list[TokenCache]:
    """Tokenize the waves that have no cache, each while the next one is fetched."""
    # Another run may have built them while this one waited for the lock.
    folder = fetch.folder
    caches = {number: cache for number, wave in enumerate(waves) if (cache := _find(wave, tokenizer, folder))}
    todo = [number for number in range(len(waves)) if number not in caches]
    size = sum(file.size for number in todo for file in waves[number].files if is_url(file.url))
    log.info("fetching %.1f MB, %d of %d waves, into %s", size / 1e6, len(todo), len(waves), folder)

    def begin(some: Sequence[RemoteFile]) -> list:
        return fetch.begin((file, place_of(file, folder)) for file in some)

    held_out = begin(waves[0].held_out if todo else [])
    ahead = begin(waves[todo[0]].files if todo else [])
    for number, following in zip(todo, [*todo[1:], None], strict=True):
        wave, files = waves[number], ahead
        ahead = [] if following is None else begin(waves[following].files)
        paths, others = [future.result() for future in files], [future.result() for future in held_out]
        corpus = make_corpus(paths, others, fraction=wave.fraction, folder=folder, kind=wave.kind, key=wave.key)
        caches[number] = build_cache(corpus, tokenizer, folder, progress=progress)
        forget(wave.files, folder)
    return [caches[number] for number in range(len(waves))]


def _joined(files: Sequence[TokenFile]) -> Tokens:
    """Return token files one after the other."""
    if not files[1:]:
        return files[0]
    sizes = np.array([file.num_tokens for file in files])
    full = np.flatnonzero(sizes)
    return token_parts(files, sizes[full], np.zeros_like(full), full) if len(full) else files[0]
