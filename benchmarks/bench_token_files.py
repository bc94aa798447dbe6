"""Seconds of the first start on token ids and of the next ones, milliseconds of a batch of 40 x 512, and memory.

    python benchmarks/bench_token_files.py --tokens 100000000
    python benchmarks/bench_token_files.py --tokens 1000000000 --sparse

The file is random ids below 256 as numpy saves them, uint16, in documents of 200 to 1,800 tokens, of which 1 % are
held out. With --sparse nothing is written but holes: Megatron's pair in documents of 1,000 tokens, and a token cache,
as if text of as many bytes had been tokenized. Each start is a process of its own, timed from the end of its imports to
the first batch; batches are read in a row after it. Of its memory `own` is what the process holds itself; the rest is
code and the map of the file, which all processes share and the system takes back when it needs it.
"""

import argparse
import multiprocessing
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from titan_moe.data.build import build_data
from titan_moe.data.cache import META, PIECE_BYTES
from titan_moe.data.corpus import digest, make_corpus
from titan_moe.data.storage import write_sealed
from titan_moe.data.token_files import MAGIC
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.runtime.files import crc32_of

EOT = bytes_tokenizer().eot_id
BATCHES = 1_000
DOCUMENT = 1_000  # tokens of each, in the sparse pair
BATCH = {"seq_len": 512, "seed": 1, "global_batch_size": 40, "local_batch_size": 40}


def write_tokens(path: Path, num_tokens: int) -> None:
    """Save random ids in documents."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, EOT, num_tokens, dtype=np.uint16)
    ends = np.cumsum(rng.integers(200, 1_800, num_tokens // 1_000))
    ids[ends[ends < num_tokens] - 1] = EOT
    np.save(path, ids)


def write_hole(path: Path, num_bytes: int) -> None:
    """Make a file of zeros that takes no room."""
    with path.open("wb") as file:
        file.truncate(num_bytes)


def write_sparse_pair(path: Path, num_tokens: int) -> None:
    """Make a .bin of zeros, and its .idx."""
    count = num_tokens // DOCUMENT
    write_hole(path, 2 * DOCUMENT * count)
    numbers = np.arange(count + 1, dtype=np.int64)
    with path.with_suffix(".idx").open("wb") as file:
        file.write(MAGIC + struct.pack("<QBQQ", 1, 8, count, count + 1))
        file.write(np.full(count, DOCUMENT, np.int32).tobytes())
        file.write((numbers[:-1] * 2 * DOCUMENT).tobytes() + numbers.tobytes())


def write_sparse_cache(text: Path, num_tokens: int, folder: Path) -> None:
    """Make a text of zeros and the cache of its bytes, both of which take no room."""
    write_hole(text, num_tokens)
    corpus = make_corpus([str(text)], fraction=0.0, folder=str(folder))
    home = folder / digest([corpus.fingerprint, bytes_tokenizer().fingerprint])
    home.mkdir(parents=True)
    sizes = {"train": num_tokens, "validation": 0}
    checksums = {}
    for name, size in sizes.items():
        path, total = home / f"{name}.bin", 2 * size
        write_hole(path, total)
        pieces = [(start, min(PIECE_BYTES, total - start)) for start in range(0, total, PIECE_BYTES)]
        checksums[name] = [[length, crc32_of(path, start, length)] for start, length in pieces]
    counts = {"num_tokens": sizes, "num_documents": {"train": 1, "validation": 0}, "num_bytes": sizes}
    write_sealed(home / META, {"dtype": "uint16", **counts, "checksums": checksums})


def memory() -> str:
    """The MiB of this process that are its own, and all of them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    sizes = {words[0]: int(words[1]) >> 10 for words in map(str.split, lines) if words[-1] == "kB"}
    return f"{sizes['Anonymous:']} MiB own, {sizes['Rss:']} MiB with maps"


def start(name: str, settings: dict[str, Any]) -> None:
    """Start, read batches, and print a line; runs in a process of its own."""
    begin, cpu_begin = time.perf_counter(), time.process_time()
    data = build_data(dataset="text", tokenizer="bytes", progress=False, **BATCH, **settings)
    batches = iter(data.train)
    next(batches)
    seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    before, times = memory(), []
    for _ in range(BATCHES):
        begin = time.perf_counter()
        next(batches)
        times.append(time.perf_counter() - begin)
    print(f"{name}: start {seconds:.2f} s ({cpu_seconds:.2f} of a core), {before};", end=" ")
    print(f"batch {statistics.median(times) * 1e3:.3f} ms, then {memory()}")


def main(args: list[str]) -> None:
    """Print a line for each start."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    parser.add_argument("--sparse", action="store_true", help="files of zeros that take no room")
    options = parser.parse_args(args)
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = {"cache_folder": str(folder / "cache"), "validation_fraction": 0.0 if options.sparse else 0.01}
        if options.sparse:
            write_sparse_pair(folder / "pair.bin", options.tokens)
            write_sparse_cache(folder / "text.txt", options.tokens, folder / "cache")
            paths = ["pair.bin", "text.txt"]
        else:
            write_tokens(folder / "ids.npy", options.tokens)
            paths = ["ids.npy"]
        for path in paths:
            for packing in ("concat", "best_fit"):
                for turn in ("first", "next"):
                    words = (f"{path} {packing} {turn}", {**settings, "path": str(folder / path), "packing": packing})
                    process = spawn.Process(target=start, args=words)
                    process.start()
                    process.join()


if __name__ == "__main__":
    main(sys.argv[1:])
