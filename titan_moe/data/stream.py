"""Batches straight from a stream: a hub data set that is too large or too new to tokenize before training.

The training documents of the stream are numbered from 0, shuffled within blocks of `BLOCK` (exactly resumable, unlike a
shuffle buffer). Lane j of G = global_batch_size packs the documents j, j + G, j + 2 G ... end to end, and sequence j of
step s is the lane's window s. A rank reads the whole stream but tokenizes only its own lanes, so any world size makes
the same batches. A lane's position is a document and a token in it; the cursor is the block from which a resumed run
has to read the stream again.
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
from titan_moe.runtime.progress import progress_of

BLOCK = 4096  # documents, 20 MB or so of web text
log = logging.getLogger(__name__)


class Cursor(NamedTuple):
    """The beginning of a block."""

    epoch: int = 0
    block: int = 0  # its number within the epoch
    document: int = 0  # the number of its first training document, over all epochs
    source: dict[str, Any] | None = None  # the state of the `datasets` stream there; None: the stream's beginning


def read_blocks(
    dataset: HubDataset, cursor: Cursor, is_training: Callable[[str], bool]
) -> Iterator[tuple[Cursor, list[str]]]:
    """Yield (its cursor, its training documents) of every block from `cursor` on, epoch after epoch, endlessly.

    Errors: ValueError where a whole epoch has no training document.
    """
    while True:
        # Resumed in the middle of an epoch, what the earlier blocks had is not known: they are given credit.
        has_documents = cursor.block > 0
        stream = dataset.open(cursor.source)
        texts = dataset.texts(stream)

        # A cursor is taken before its block is read. The documents outside the training set get no number, so that a
        # lane's documents follow each other without gaps.
        while block := list(islice(texts, BLOCK)):
            training = [text for text in block if is_training(text)]
            has_documents = has_documents or bool(training)
            yield cursor, training
            cursor = Cursor(cursor.epoch, cursor.block + 1, cursor.document + len(training), stream.state_dict())

        # Without this a stream without training documents would be read over and over, and nobody would learn why.
        if not has_documents:
            raise ValueError(f"data.path ({dataset.path}): no training documents in the whole stream")
        cursor = Cursor(cursor.epoch + 1, 0, cursor.document)


class _Lane:
    """A lane's position, and its documents from there on: first those that are tokenized, then those that are not."""

    def __init__(self, document: int, offset: int) -> None:
        self.document, self.offset = document, offset  # where the next window begins: a document and a token in it
        self.texts: deque[tuple[int, str]] = deque()  # (document, text)
        self.tokens: deque[tuple[int, np.ndarray]] = deque()  # (document, ids)

    def ready(self, size: int, encode: Callable[[str], np.ndarray]) -> bool:
        """Tokenize until the next `size` tokens are there; False where the documents do not suffice."""
        available = sum(len(ids) for _, ids in self.tokens) - self.offset
        while available < size and self.texts:
            number, text = self.texts.popleft()
            self.tokens.append((number, encode(text)))
            available += len(self.tokens[-1][1])
        return available >= size

    def take(self, size: int) -> np.ndarray:
        """Return the next `size` tokens (size,), int64, and move on by all but the last, which begins the next window.

        `ready(size, ...)` must have been true.
        """
        # A window may span several documents.
        parts, start, missing = [], self.offset, size
        for _, ids in self.tokens:
            parts.append(ids[start : start + missing])
            start, missing = 0, missing - len(parts[-1])
            if not missing:
                break
        row = np.concatenate(parts).astype(np.int64)

        # Documents that are used up are let go. One is always left, because the last token was not passed.
        self.offset += size - 1
        while self.offset >= len(self.tokens[0][1]):
            self.offset -= len(self.tokens.popleft()[1])
        self.document = self.tokens[0][0]
        return row


class LaneBatches(IterableDataset):
    """The local batches of one rank, endlessly; every batch comes with the state from which to go on after it."""

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

        # A step's sequences are its lanes in order, divided into micro-batches and these among the ranks. So sequence j
        # is lane j's whatever the layout, and a rank has the same lanes in every step.
        sequences_per_pass = local_batch_size * dp_degree
        rank_sequences = range(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)
        self.micro_batches = [
            [first + lane for lane in rank_sequences] for first in range(0, global_batch_size, sequences_per_pass)
        ]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Yield tokens and labels (B, S), int64, and the state after the batch.

        The state has the positions of the batch's lanes, the cursor and the number of sequences so far.
        """
        # A new run begins at document 0, a resumed one where its lanes were, whatever rank had them.
        tokenizer = tokenizer_from_files(self.tokenizer_files)
        held_out = load_held_out(self.split)
        saved = self.state.get("lanes", {})
        lanes = {lane: _Lane(*saved.get(str(lane), (0, 0))) for group in self.micro_batches for lane in group}
        blocks = read_blocks(
            self.dataset,
            Cursor(**self.state.get("cursor", {})),
            lambda text: bool(text) and side(text.encode(), self.split, held_out) == "train",
        )

        # Lanes use up documents at their own pace. Blocks are read as soon as one lane of the micro-batch is short of
        # tokens, and wait in the others.
        cursors: deque[Cursor] = deque()  # of the blocks that some lane still needs
        sequences_per_pass = self.global_batch_size // len(self.micro_batches)
        for index in count(self.state["sequences"] // sequences_per_pass):
            group = self.micro_batches[index % len(self.micro_batches)]
            while not all(lanes[lane].ready(self.seq_len + 1, tokenizer.encode_document) for lane in group):
                cursor, texts = next(blocks)
                cursors.append(cursor)
                self._deal(cursor, texts, lanes)
            tokens, labels = split_labels(np.stack([lanes[lane].take(self.seq_len + 1) for lane in group]))

            # A resumed run has to read from the block of the document that the slowest lane is at.
            oldest = min(lane.document for lane in lanes.values())
            while len(cursors) > 1 and cursors[1].document <= oldest:
                cursors.popleft()

            # Of the other lanes `TrainLoader` has the positions from their last batches.
            positions = {str(lane): [lanes[lane].document, lanes[lane].offset] for lane in group}
            after = {"sequences": (index + 1) * sequences_per_pass, "lanes": positions, "cursor": cursors[0]._asdict()}
            yield tokens, labels, after

    def _deal(self, cursor: Cursor, texts: list[str], lanes: dict[int, _Lane]) -> None:
        """Shuffle a block and give its documents to this rank's lanes, without those that a lane has used up."""
        order = permute(np.arange(len(texts)), len(texts), (self.seed, cursor.epoch, cursor.block))
        for number, index in enumerate(order.tolist(), cursor.document):
            lane = lanes.get(number % self.global_batch_size)
            if lane is not None and number >= lane.document:
                lane.texts.append((number, texts[index]))


def check_lanes(state: dict[str, Any], global_batch_size: int) -> None:
    """Raise ValueError unless a saved state has the positions of `global_batch_size` lanes, or none at all."""
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

    Return its path. A file that is there already is not written again. Errors: the stream has no document of that side.
    """
    name = f"stream-{wanted}-{digest([*dataset, wanted, fraction, num_bytes])}.jsonl"
    path = os.path.join(folder, name)
    with storage_errors(folder):
        if is_usable(path):
            return path
    with storage_errors(folder), locked(path + ".lock"):
        if not is_usable(path):  # it may have been written while this process waited for the lock
            _write_sample(dataset, wanted, fraction=fraction, num_bytes=num_bytes, path=path, progress=progress)
    return path


def _write_sample(
    dataset: HubDataset, wanted: str, *, fraction: float, num_bytes: int, path: str, progress: bool
) -> None:
    written = 0
    with new_checked_file(path) as file, progress_of(f"reading {wanted} text", show=progress) as show:
        # The sides are told apart by the same hash as in training, so they never share a document.
        for text in dataset.texts(dataset.open()):
            data = text.encode()
            if text and side(data, Split(fraction), frozenset()) == wanted:
                file.write((json.dumps({"text": text}) + "\n").encode())
                written += len(data)
                show(min(written / num_bytes, 1.0), f"{written / 1e6:,.0f} MB")
                if written >= num_bytes:
                    break

        # Raised within the block, so that no empty file is left.
        if not written:
            raise ValueError(f"data.validation_fraction ({fraction}) leaves no {wanted} document in {dataset.path}")
