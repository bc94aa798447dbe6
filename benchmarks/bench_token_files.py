"""Seconds of the first start on a file of token ids and of the next ones, and milliseconds of a batch of 40 x 512.

    python benchmarks/bench_token_files.py --tokens 100000000

The file is random ids below 50,000 as numpy saves them, uint16, in documents of 200 to 1,800 tokens, of which 1 % are
held out. Batches are read in a row, from the divided file and from the file as a whole.
"""

import argparse
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from titan_moe.data.cache import Tokens
from titan_moe.data.loader import WindowBatches
from titan_moe.data.token_files import divide_documents, load_documents, open_tokens
from titan_moe.data.tokenizer import bytes_tokenizer

EOT, VOCAB_SIZE = 50_000, 50_001
BATCHES = 200


def write_tokens(path: Path, num_tokens: int) -> None:
    """Save random ids in documents."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, EOT, num_tokens, dtype=np.uint16)
    ends = np.cumsum(rng.integers(200, 1_800, num_tokens // 1_000))
    ids[ends[ends < num_tokens] - 1] = EOT
    np.save(path, ids)


def batch_milliseconds(tokens: Tokens) -> float:
    """The median of reading a batch."""
    batches = WindowBatches(tokens, seq_len=512, seed=1, local_batch_size=40, dp_rank=0, dp_degree=1)
    times = []
    for index in range(BATCHES):
        start = time.perf_counter()
        batches[index]
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def main(args: list[str]) -> None:
    """Print a line for each number."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000_000)
    options = parser.parse_args(args)
    tokenizer = bytes_tokenizer()._replace(vocab_size=VOCAB_SIZE, eot_id=EOT)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.npy"
        write_tokens(path, options.tokens)
        for name in ("first", "next"):
            start = time.perf_counter()
            documents = load_documents([open_tokens(str(path), VOCAB_SIZE)], tokenizer, folder)
            divided = divide_documents(documents, 0.01, [])
            print(f"{name} start {time.perf_counter() - start:.3f} s, {len(documents[0].ends):,} documents")
        part, whole = batch_milliseconds(divided.train), batch_milliseconds(documents[0].file)
        print(f"batch {part:.3f} ms divided, {whole:.3f} ms whole")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB at most, the map's pages included")


if __name__ == "__main__":
    main(sys.argv[1:])
