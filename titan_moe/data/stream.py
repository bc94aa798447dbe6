"""Batches from a stream that is not kept: a hub data set too large or too new to tokenize first.

The training documents of the stream are numbered from 0, shuffled within blocks of `BLOCK` (exactly resumable, unlike a
shuffle buffer). Lane j of G = global_batch_size packs the documents j, j + G, j + 2 G ... end to end, and sequence j of
step s is the lane's window s. A rank reads the whole stream but tokenizes only its own lanes, so any world size makes
the same batches. A lane's position is a document and a token in it; the cursor says from which block to read again.
"""

import json
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from titan_moe.data.corpus import Split, digest, load_held_out, side
from titan_moe.data.hub import HubDataset
from titan_moe.data.loader import permute, split_labels
from titan_moe.data.storage import is_usable, locked, new_checked_file, storage_errors
from titan_moe.data.tokenizer import tokenizer_from_files
from titan_moe.data.tokenizer_files import Files

BLOCK = 4096  # documents, 20 MB or so of web text
log = logging.getLogger(__name__)


class Cursor(NamedTuple):
    """Where a block begins: its epoch, its number there, its first training document, the stream's own state."""

    epoch: int = 0
    block: int = 0
    document: int = 0
    source: dict[str, Any] | None = None


def read_blocks(
    dataset: HubDataset, cursor: Cursor, is_training: Callable[[str], bool]
) -> Iterator[tuple[Cursor, list[str]]]:
    """Yield (where it begins, its training documents) of every block from `cursor` on, epoch after epoch, endlessly."""
    while True:
        found = cursor.block > 0
        stream = dataset.open(cursor.source)
        texts = dataset.texts(stream)
        while block := list(islice(texts, BLOCK)):
            kept = [text for text in block if is_training(text)]
            found = found or bool(kept)
            yield cursor, kept
            following = (cursor.epoch, cursor.block + 1, cursor.document + len(kept), stream.state_dict())
            cursor = Cursor(*following)
        if not found:
            raise ValueError(f"data.path ({dataset.path}): no training documents in the whole stream")
        cursor = Cursor(cursor.epoch + 1, 0, cursor.document)


class _Lane:
    """The documents of a lane that are not used up, and how many tokens of the first of them are."""

    def __init__(self, document: int, offset: int) -> None:
        self.document, self.offset = document, offset  # where the next window begins
        self.texts: deque[tuple[int, str]] = deque()
        self.tokens: deque[tuple[int, np.ndarray]] = deque()

    def ready(self, size: int, encode: Callable[[str], np.ndarray]) -> bool:
        """Tokenize until `size` tokens are there; False where the texts do not suffice."""
        held = sum(len(ids) for _, ids in self.tokens) - self.offset
        while held < size and self.texts:
            number, text = self.texts.popleft()
            self.tokens.append((number, encode(text)))
            held += len(self.tokens[-1][1])
        return held >= size

    def take(self, size: int) -> np.ndarray:
        """Return the next `size` tokens and move on by all but the last, which begins the next window."""
        parts, start, missing = [], self.offset, size
        for _, ids in self.tokens:
            parts.append(ids[start : start + missing])
            start, missing = 0, missing - len(parts[-1])
            if not missing:
                break
        row = np.concatenate(parts).astype(np.int64)
        self.offset += size - 1
        while self.offset >= len(self.tokens[0][1]):
            self.offset -= len(self.tokens.popleft()[1])
        self.document = self.tokens[0][0]
        return row


class LaneBatches(IterableDataset):
    """The local batches of one rank's lanes, endlessly; every batch brings the position of its lanes after it along."""

    def __init__(
        self,
        dataset: HubDataset,
        tokenizer_files: Files,
        split: Split,
        *,
        seq_len: int,
        seed: int,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_degree: int,
        state: dict[str, Any],
    ) -> None:
        self.dataset, self.tokenizer_files, self.split = dataset, tokenizer_files, split
        self.seq_len, self.seed, self.global_batch_size, self.state = seq_len, seed, global_batch_size, state
        sequences_per_pass = local_batch_size * dp_degree
        own = range(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)
        self.micro_batches = [
            [first + lane for lane in own] for first in range(0, global_batch_size, sequences_per_pass)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Yield tokens, labels and the state after the batch: its lanes, the cursor, the sequences so far."""
        tokenizer = tokenizer_from_files(self.tokenizer_files)
        held_out = load_held_out(self.split)
        saved = self.state.get("lanes", {})
        lanes = {lane: _Lane(*saved.get(str(lane), (0, 0))) for group in self.micro_batches for lane in group}
        cursors: deque[Cursor] = deque()
        blocks = read_blocks(
            self.dataset,
            Cursor(**self.state.get("cursor", {})),
            lambda text: bool(text) and side(text.encode(), self.split, held_out) == "train",
        )
        sequences_per_pass = self.global_batch_size // len(self.micro_batches)
        for index in count(self.state["sequences"] // sequences_per_pass):
            group = self.micro_batches[index % len(self.micro_batches)]
            while not all(lanes[lane].ready(self.seq_len + 1, tokenizer.encode_document) for lane in group):
                cursor, texts = next(blocks)
                cursors.append(cursor)
                self._deal(cursor, texts, lanes)
            tokens, labels = split_labels(np.stack([lanes[lane].take(self.seq_len + 1) for lane in group]))
            oldest = min(lane.document for lane in lanes.values())
            while len(cursors) > 1 and cursors[1].document <= oldest:
                cursors.popleft()
            places = {str(lane): [lanes[lane].document, lanes[lane].offset] for lane in group}
            after = {"sequences": (index + 1) * sequences_per_pass, "lanes": places, "cursor": cursors[0]._asdict()}
            yield tokens, labels, after

    def _deal(self, cursor: Cursor, texts: list[str], lanes: dict[int, _Lane]) -> None:
        """Give the documents of a block to their lanes in its shuffled order, less those that a lane has used up."""
        order = permute(np.arange(len(texts)), len(texts), (self.seed, cursor.epoch, cursor.block))
        for number, place in enumerate(order.tolist(), cursor.document):
            lane = lanes.get(number % self.global_batch_size)
            if lane is not None and number >= lane.document:
                lane.texts.append((number, texts[place]))


def check_lanes(state: dict[str, Any], global_batch_size: int) -> None:
    """Raise unless a saved position has a place for each of `global_batch_size` lanes."""
    lanes = state.get("lanes")
    if lanes is not None and len(lanes) != global_batch_size:
        raise ValueError(
            f"training.global_batch_size ({global_batch_size}): the saved position in the stream is of {len(lanes)}; a "
            "streamed data set can only be resumed with the global batch size it was begun with"
        )


def sample_stream(
    dataset: HubDataset, wanted: str, *, fraction: float, num_bytes: int, folder: str, progress: bool
) -> str:
    """Write the stream's first documents of a side ("train", "validation"), `num_bytes` of text, to a .jsonl file.

    Returns its path; it is written once. Errors: the stream has no document of that side.
    """
    name = f"stream-{wanted}-{digest([*dataset, wanted, fraction, num_bytes])}.jsonl"
    path = os.path.join(folder, name)
    with storage_errors(folder):
        if is_usable(path):
            return path
    with storage_errors(folder), locked(path + ".lock"):
        if not is_usable(path):  # nobody else wrote it in the meantime
            _write_sample(dataset, wanted, fraction=fraction, num_bytes=num_bytes, path=path, progress=progress)
    return path


def _write_sample(
    dataset: HubDataset, wanted: str, *, fraction: float, num_bytes: int, path: str, progress: bool
) -> None:
    from tqdm import tqdm

    how = {"unit": "B", "unit_scale": True, "leave": False, "disable": None if progress else True}
    written = 0
    with new_checked_file(path) as file, tqdm(total=num_bytes, desc=f"{wanted} text", **how) as bar:
        for text in dataset.texts(dataset.open()):
            data = text.encode()
            if text and side(data, Split(fraction), frozenset()) == wanted:
                file.write((json.dumps({"text": text}) + "\n").encode())
                bar.update(len(data))
                written += len(data)
                if written >= num_bytes:
                    break
        if not written:
            raise ValueError(f"data.validation_fraction ({fraction}) leaves no {wanted} document in {dataset.path}")
