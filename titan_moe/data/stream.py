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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import IterableDataset

from titan_moe.data.corpus import Split, digest, load_held_out, side
from titan_moe.data.hub import HubDataset
from titan_moe.data.loader import permute, split_labels
from titan_moe.data.own import Document, OwnStream, check_ids, content_of, write_token_file
from titan_moe.data.storage import is_usable, locked, new_checked_file, storage_errors
from titan_moe.data.tokenizer import tokenizer_from_files
from titan_moe.data.tokenizer_files import Files
from titan_moe.runtime.progress import progress_of

BLOCK = 4096  # documents, 20 MB or so of web text
Stream = HubDataset | OwnStream
log = logging.getLogger(__name__)


class TrainStream(NamedTuple):
    """Training data that are read while training: the documents of a stream that are not held out."""

    dataset: Stream
    split: Split


class Cursor(NamedTuple):
    """The beginning of a block."""

    epoch: int = 0
    block: int = 0  # its number within the epoch
    document: int = 0  # the number of its first training document, over all epochs
    source: dict[str, Any] | None = None  # the state of the `datasets` stream there; None: the stream's beginning


def read_blocks(
    dataset: Stream, cursor: Cursor, is_training: Callable[[Document], bool]
) -> Iterator[tuple[Cursor, list[Document]]]:
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
            cursor = Cursor(cursor.epoch, cursor.block + 1, cursor.document + len(training), dataset.state_of(stream))

        # Without this a stream without training documents would be read over and over, and nobody would learn why.
        if not has_documents:
            raise ValueError(f"{dataset.place}: no training documents in the whole stream")
        cursor = Cursor(cursor.epoch + 1, 0, cursor.document)


class _Lane:
    """A lane's position, and its documents from there on: first those that are tokenized, then those that are not."""

    def __init__(self, document: int, offset: int) -> None:
        self.document, self.offset = document, offset  # where the next window begins: a document and a token in it
        self.texts: deque[tuple[int, Document]] = deque()  # (document, text or ids)
        self.tokens: deque[tuple[int, np.ndarray]] = deque()  # (document, ids)

    def ready(self, size: int, encode: Callable[[Document], np.ndarray]) -> bool:
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


class LaneReader:
    """Windows of some lanes of a stream, of `num_lanes`, from a state of all of them on."""

    def __init__(
        self,
        dataset: Stream,
        tokenizer_files: Files,
        split: Split,
        lanes: Iterable[int],
        *,
        num_lanes: int,
        seq_len: int,
        seed: int,
        state: dict[str, Any],
    ) -> None:
        # A new run begins at document 0, a resumed one where its lanes were, whatever rank had them. Lanes that had no
        # window yet are not among those saved.
        saved = state.get("lanes", {})
        self.num_lanes, self.seq_len, self.seed, self.place = num_lanes, seq_len, seed, dataset.place
        self.lanes = {lane: _Lane(*saved.get(str(lane), (0, 0))) for lane in lanes}
        self.tokenizer = tokenizer_from_files(tokenizer_files)
        held_out = load_held_out(split)
        self.blocks = read_blocks(
            dataset,
            Cursor(**state["cursor"]) if len(saved) == num_lanes else Cursor(),
            lambda document: len(document) > 0 and side(content_of(document), split, held_out) == "train",
        )
        self.cursors: deque[Cursor] = deque()  # of the blocks that some lane still needs

    def read(self, group: Sequence[int]) -> np.ndarray:
        """Return the next window of each lane of a group (B, S + 1), int64."""
        # Lanes use up documents at their own pace. Blocks are read as soon as one lane of the group is short of tokens,
        # and wait in the others.
        while not all(self.lanes[lane].ready(self.seq_len + 1, self._encode) for lane in group):
            cursor, documents = next(self.blocks)
            self.cursors.append(cursor)
            self._deal(cursor, documents)
        windows = np.stack([self.lanes[lane].take(self.seq_len + 1) for lane in group])

        # A resumed run has to read from the block of the document that the slowest lane is at.
        oldest = min(lane.document for lane in self.lanes.values())
        while len(self.cursors) > 1 and self.cursors[1].document <= oldest:
            self.cursors.popleft()
        return windows

    def state(self, group: Sequence[int]) -> dict[str, Any]:
        """Return the positions of the lanes of a group, and the cursor, after `read`."""
        # Of the other lanes `TrainLoader` has the positions from their last batches.
        positions = {str(lane): [self.lanes[lane].document, self.lanes[lane].offset] for lane in group}
        return {"lanes": positions, "cursor": self.cursors[0]._asdict()}

    def _encode(self, document: Document) -> np.ndarray:
        if isinstance(document, str):
            return self.tokenizer.encode_document(document)
        return check_ids(document, self.tokenizer.vocab_size, self.place)

    def _deal(self, cursor: Cursor, documents: list[Document]) -> None:
        """Shuffle a block and give its documents to the lanes, without those that a lane has used up."""
        order = permute(np.arange(len(documents)), len(documents), (self.seed, cursor.epoch, cursor.block))
        for number, index in enumerate(order.tolist(), cursor.document):
            lane = self.lanes.get(number % self.num_lanes)
            if lane is not None and number >= lane.document:
                lane.texts.append((number, documents[index]))


class LaneBatches(IterableDataset):
    """The local batches of one rank, endlessly; every batch comes with the state from which to go on after it."""

    def __init__(
        self,
        dataset: Stream,
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
        self.micro_batches = places_of_rank(global_batch_size, local_batch_size, dp_rank, dp_degree)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Yield tokens and labels (B, S), int64, and the state after the batch.

        The state has the positions of the batch's lanes, the cursor and the number of sequences so far.
        """
        reader = LaneReader(
            self.dataset,
            self.tokenizer_files,
            self.split,
            [lane for group in self.micro_batches for lane in group],
            num_lanes=self.global_batch_size,
            seq_len=self.seq_len,
            seed=self.seed,
            state=self.state,
        )
        sequences_per_pass = self.global_batch_size // len(self.micro_batches)
        for index in count(self.state["sequences"] // sequences_per_pass):
            group = self.micro_batches[index % len(self.micro_batches)]
            tokens, labels = split_labels(reader.read(group))
            yield tokens, labels, {"sequences": (index + 1) * sequences_per_pass, **reader.state(group)}


def places_of_rank(global_batch_size: int, local_batch_size: int, dp_rank: int, dp_degree: int) -> list[list[int]]:
    """Return which of a step's sequences a rank has, in each of its micro-batches."""
    rank_sequences = range(dp_rank * local_batch_size, (dp_rank + 1) * local_batch_size)
    passes = range(0, global_batch_size, local_batch_size * dp_degree)
    return [[first + place for place in rank_sequences] for first in passes]


def check_lanes(state: Mapping[str, Any], global_batch_size: int, stream: str = "the stream") -> None:
    """Raise ValueError unless a saved position is of `global_batch_size` lanes, or of none at all.

    In a mixture, which says their number, some may have had no window yet.
    """
    lanes = state.get("lanes")
    if lanes is not None and state.get("num_lanes", len(lanes)) != global_batch_size:
        raise ValueError(
            f"training.global_batch_size ({global_batch_size}): the saved position in {stream} is of "
            f"{state.get('num_lanes', len(lanes))}; a streamed data set can only be resumed with the global batch size "
            "it was begun with"
        )


def sample_stream(dataset: Stream, wanted: str, *, fraction: float, num_bytes: int, folder: str, progress: bool) -> str:
    """Write the stream's first documents of a side ("train", "validation"), `num_bytes` of them, to a file.

    Return its path: a .jsonl of texts, or a .bin with its .idx of token ids. A file that is there already is not
    written again. Errors: the stream has no document of that side.
    """
    name = os.path.join(folder, f"stream-{wanted}-{digest([*dataset.facts, wanted, fraction, num_bytes])}")
    sample = partial(_sample, dataset, wanted, fraction=fraction, num_bytes=num_bytes, progress=progress)
    if isinstance(dataset, OwnStream):
        log.info("%s: its %s documents are the first ones of the stream, as in %s", dataset.place, wanted, name)
        if dataset.are_ids:
            return write_token_file(name, sample, folder, dataset.place)

    # Texts, as lines of a file that is tokenized as others are.
    path = f"{name}.jsonl"
    with storage_errors(folder):
        if is_usable(path):
            return path
    with storage_errors(folder), locked(path + ".lock"):
        if not is_usable(path):  # it may have been written while this process waited for the lock
            with new_checked_file(path) as file:
                for text in sample():
                    file.write((json.dumps({"text": text}) + "\n").encode())
    return path


def _sample(dataset: Stream, wanted: str, *, fraction: float, num_bytes: int, progress: bool) -> Iterator[Document]:
    """Yield the stream's first documents of a side, `num_bytes` of them; ValueError where there is none."""
    written = 0
    with progress_of(f"reading {wanted} text", show=progress) as show:
        # The sides are told apart by the same hash as in training, so they never share a document.
        for document in dataset.texts(dataset.open()):
            data = content_of(document)
            if data and side(data, Split(fraction), frozenset()) == wanted:
                yield document
                written += len(data)
                show(min(written / num_bytes, 1.0), f"{written / 1e6:,.0f} MB")
                if written >= num_bytes:
                    break

        # Raised while the file is being written, so that no empty one is left.
        if not written:
            raise ValueError(f"data.validation_fraction ({fraction}) leaves no {wanted} document in {dataset.place}")
