"""Tokens a processor second of building a token cache, and of `tokenizers` alone on the same documents, in turns.

    python benchmarks/bench_tokenizing.py --data.tokenizer gpt2/ --data.path corpus/*.jsonl.gz --rounds 3

A build is all that a run waits for: reading, unpacking, hashing, splitting, tokenizing, writing, with the start of its
worker processes. `tokenizers` is `encode_batch` and `encode_batch_fast` on documents that are in memory already, with a
tokenizer that is loaded already. Processor seconds of all threads and processes, so that others on the machine do not
count; the ratio is of neighbours in time. At the end the ids that a build makes are compared with the library's.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np

from titan_moe.data.cache import build_cache
from titan_moe.data.corpus import make_corpus
from titan_moe.data.encode import library_of, make_encoder
from titan_moe.data.sources import documents, find_files, plan_shards
from titan_moe.data.tokenizer import Tokenizer, load_tokenizer

BATCH = 1000  # documents in a call of encode_batch


def children_seconds() -> float:
    """Processor seconds of the processes that this one started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def build_rate(files: list[str], tokenizer: Tokenizer, processes: int) -> float:
    """Tokens a processor second of a build into an empty folder."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.process_time() + children_seconds()
        corpus = make_corpus(files, fraction=0.01, folder=folder)
        cache = build_cache(corpus, tokenizer, folder, num_processes=processes, progress=False)
        return (cache.train.num_tokens + cache.validation.num_tokens) / (
            time.process_time() + children_seconds() - start
        )


def library_rate(encode: Callable, texts: list[str]) -> float:
    """Tokens a processor second of `encode` on all the texts."""
    start, tokens = time.process_time(), 0
    for first in range(0, len(texts), BATCH):
        tokens += sum(len(encoding.ids) for encoding in encode(texts[first : first + BATCH], add_special_tokens=False))
    return tokens / (time.process_time() - start)


def other_ids(tokenizer: Tokenizer, texts: list[str]) -> int:
    """How many of the texts get other ids in a build than by `tokenizers`."""
    encode, count = make_encoder(tokenizer), 0
    for first in range(0, len(texts), BATCH):
        batch = texts[first : first + BATCH]
        ids, lengths = encode(batch)
        documents = np.split(ids, np.cumsum(lengths)[:-1])
        expected = tokenizer.backend.encode_batch(batch, add_special_tokens=False)
        count += sum(
            document.tolist() != [*encoding.ids, tokenizer.eot_id]
            for document, encoding in zip(documents, expected, strict=True)
        )
    return count


def main(args: list[str]) -> None:
    """Print a line for each round and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.tokenizer", dest="tokenizer", required=True, help="tokenizer.json, or its folder")
    parser.add_argument("--data.path", dest="path", nargs="+", required=True, help="files, globs, folders")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="worker processes of a build (1)")
    options = parser.parse_args(args)
    files, tokenizer = find_files(options.path), load_tokenizer(options.tokenizer)
    backend = tokenizer.backend
    texts = [text for shard in plan_shards(files) for text in documents(shard)]
    print(f"{len(texts)} documents, {sum(len(text.encode()) for text in texts) / 1e6:.1f} MB of text")
    print(f"builds by {library_of(tokenizer)}")

    # The library comes last in a round: once its threads ran, a fork would warn, but builds start fresh interpreters.
    rounds = []
    for index in range(options.rounds):
        build = build_rate(files, tokenizer, options.processes)
        batch, fast = library_rate(backend.encode_batch, texts), library_rate(backend.encode_batch_fast, texts)
        rounds.append((build, batch, fast))
        print(f"round {index}: build {build:,.0f}, encode_batch {batch:,.0f}, encode_batch_fast {fast:,.0f} tokens/s")
    build, batch, fast = map(statistics.median, zip(*rounds, strict=True))
    to_batch, to_fast = (statistics.median(r[0] / r[i] for r in rounds) for i in (1, 2))
    print(f"medians: build {build:,.0f}")
    print(f"encode_batch {batch:,.0f}: a build is {to_batch:.2f} of it")
    print(f"encode_batch_fast {fast:,.0f}: a build is {to_fast:.2f} of it")
    print(f"documents with other ids: {other_ids(tokenizer, texts)} of {len(texts)}")


if __name__ == "__main__":
    main(sys.argv[1:])
