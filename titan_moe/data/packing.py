"""Best-fit packing: sequences of whole documents instead of windows over documents that stand end to end.

After Ding et al. (2024), "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830). A sequence of S = seq_len
tokens and one more label has room for S + 1 tokens. A longer document is cut into pieces of S + 1 tokens, each of which
fills a sequence; they overlap by one token, as windows do, so that every token is predicted from the one before it, and
once: at the beginning of a piece that goes on it is no label. What is left of it and all other documents are placed
from the largest to the smallest, each where the least room is left that holds it (best-fit decreasing). The room that
remains is padding: the sequence from its beginning once more, which is not predicted, but routed as text is. (All of
it end-of-text tokens would go to the same few experts, and would be as many documents.)

Borders of documents show in the tokens alone: only what fills a sequence ends without an end of text, since a document
that has none of its own is followed by one, which is not predicted either.

A plan says which pieces make which sequence. It follows from the documents and S alone, is made once, and is kept in
the cache folder: 16 bytes a piece and 8 a sequence, of which a process maps what it reads.
"""

import functools
import logging
from bisect import bisect_left, insort
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from titan_moe.data.cache import Tokens
from titan_moe.data.corpus import digest
from titan_moe.data.storage import is_usable, locked, new_checked_file, storage_errors

CHUNK_TOKENS = 1 << 22  # looked through at once for ends of text
MUCH_PADDING = 0.05
PLACE_BITS, SIZE_MASK, GOES_ON = 32, (1 << 31) - 1, 1  # of a piece in one number: its place, its size, if it goes on
log = logging.getLogger(__name__)


class Borders(NamedTuple):
    """Where each document ends, in tokens, and whether with an end-of-text token: (D,) each."""

    ends: np.ndarray
    has_eot: np.ndarray


class Waste(NamedTuple):
    """What a plan makes of its documents, in counts; `cut_by_concat` are those that windows over all tokens cut."""

    sequences: int
    padding: int  # tokens
    labels: int  # tokens that are predicted
    documents: int
    cut: int
    cut_by_concat: int


class PackedTokens(NamedTuple):
    """Tokens whose sequences a plan makes, for one seq_len."""

    tokens: Tokens
    plan: str
    seq_len: int
    eot_id: int
    waste: Waste

    @property
    def num_tokens(self) -> int:
        """The number of ids, without padding."""
        return self.tokens.num_tokens

    def read_sequences(self, numbers: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids of some sequences, and which of them are labels, (B, seq_len + 1) each."""
        bounds, starts, places = _map_plan(self.plan)
        shape = (len(numbers), self.seq_len + 1)
        rows, is_label = np.full(shape, self.eot_id, np.int64), np.zeros(shape, bool)
        place = size = 0
        for row, number in enumerate(numbers):
            pieces = slice(bounds[number], bounds[number + 1])
            for start, packed in zip(starts[pieces].tolist(), places[pieces].tolist(), strict=True):
                place, size = packed >> PLACE_BITS, packed >> 1 & SIZE_MASK
                rows[row, place : place + size] = self.tokens.read(start, start + size)
                is_label[row, place + (packed & GOES_ON) : place + size] = True

            # A piece that lacks an end of text has one behind it already.
            if (end := place + size) < shape[1]:
                end += int(rows[row, end - 1] != self.eot_id)
                rows[row, end:] = np.resize(rows[row, :end], shape[1] - end)
        return rows, is_label


Windows = Tokens | PackedTokens  # what sequences are read from


def pack(
    tokens: Tokens, borders: Borders | None, *, eot_id: int, seq_len: int, fingerprint: str, folder: str
) -> Windows:
    """Pack tokens into sequences of `seq_len`, by a plan in `folder` that is made unless it is there.

    `fingerprint` stands for the tokens. Without `borders` a document ends with each end-of-text token. Tokens that are
    too few for one sequence are returned as they are.
    """
    if tokens.num_tokens <= seq_len:
        return tokens
    plan = str(Path(folder) / f"packing-{digest([fingerprint, eot_id, seq_len])}.npy")
    with storage_errors(folder):
        if not is_usable(plan):
            with locked(f"{plan}.lock"):
                if not is_usable(plan):  # it may have been made while this process waited for the lock
                    _write_plan(plan, borders or find_borders(tokens, eot_id), seq_len)
    return PackedTokens(tokens, plan, seq_len, eot_id, Waste(*_read_header(plan)))


def describe(waste: Waste, seq_len: int) -> dict[str, int | float]:
    """Return the counts and shares of a plan, by their names in run.json."""
    documents = max(1, waste.documents)
    return {
        "sequences": waste.sequences,
        "documents": waste.documents,
        "labels": waste.labels,
        "padding": waste.padding / (waste.sequences * (seq_len + 1)),
        "cut_documents": waste.cut / documents,
        "cut_documents_concat": waste.cut_by_concat / documents,
    }


def tell_waste(key: str, waste: Waste, seq_len: int) -> None:
    """Log what the packing of the training data of `key` wastes; a warning where it is much."""
    shares = describe(waste, seq_len)
    log.info(
        "data.packing best_fit of %s: %.2f %% of %s sequences is padding, %.2f %% of %s documents are cut "
        "(concat: %.2f %%)",
        *(key, 100 * shares["padding"], f"{waste.sequences:,}"),
        *(100 * shares["cut_documents"], f"{waste.documents:,}", 100 * shares["cut_documents_concat"]),
    )
    if shares["padding"] > MUCH_PADDING:
        log.warning(
            "data.packing best_fit of %s: %.0f %% of the tokens that experts get are padding: with another "
            "training.seq_len (%d) it may be less, with data.packing concat it is none",
            *(key, 100 * shares["padding"], seq_len),
        )


def find_borders(tokens: Tokens, eot_id: int) -> Borders:
    """Return the documents of tokens, each of which ends with an end-of-text token, but maybe the last one."""
    ends_of_chunk = [np.zeros(0, np.int64)]
    for start in range(0, tokens.num_tokens, CHUNK_TOKENS):
        ends_of_chunk.append(np.flatnonzero(tokens.read(start, min(start + CHUNK_TOKENS, tokens.num_tokens)) == eot_id))
        ends_of_chunk[-1] += start + 1
    ends = np.concatenate(ends_of_chunk)
    has_eot = np.ones(len(ends), bool)
    if tokens.num_tokens and (not len(ends) or ends[-1] < tokens.num_tokens):
        ends, has_eot = np.append(ends, tokens.num_tokens), np.append(has_eot, False)
    return Borders(ends, has_eot)


def best_fit_decreasing(sizes: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bin of each item, and its place in that bin, (N,) each, of `sizes` (N,) from 1 to `room`.

    Each bin has that much room. The largest items come first, and each goes into the bin with the least room left that
    holds it. Items of a size are placed together, so that the time goes with the number of sizes.
    """
    order = np.argsort(-sizes, kind="stable")
    bins, places = np.empty((2, len(sizes)), np.int64)
    num_bins, spare = 0, _Spare()
    edges = np.flatnonzero(np.diff(sizes[order], prepend=0, append=0))
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        first, size = begin, int(sizes[order[begin]])
        while first < end:
            # The bin with the least room stays the one with the least until it holds no more: it takes as many as it
            # can. Where no bin has the room, there are as many new ones as are needed.
            left = spare.least(size) or room
            each = left // size
            wanted = -(-(end - first) // each)
            if left == room:
                numbers, num_bins = np.arange(num_bins, num_bins + wanted), num_bins + wanted
            else:
                numbers = spare.take(left, wanted)

            # All but the last of them are filled alike.
            count = min(end - first, len(numbers) * each)
            bin_of, turn = np.divmod(np.arange(count), each)
            items = order[first : first + count]
            bins[items], places[items] = numbers[bin_of], room - left + turn * size
            full, rest = divmod(count, each)
            spare.put(left - each * size, numbers[:full])
            spare.put(left - rest * size, numbers[full:])
            first += count
    return bins, places


class _Spare:
    """Bins by the room that is left in them."""

    def __init__(self) -> None:
        self.lefts: list[int] = []  # in order
        self.numbers: dict[int, list[np.ndarray]] = {}

    def least(self, size: int) -> int:
        """The least room, of at least `size`, that a bin has; 0: none."""
        at = bisect_left(self.lefts, size)
        return self.lefts[at] if at < len(self.lefts) else 0

    def put(self, left: int, numbers: np.ndarray) -> None:
        if not left or not len(numbers):
            return
        if left not in self.numbers:
            insort(self.lefts, left)
        self.numbers.setdefault(left, []).append(numbers)

    def take(self, left: int, count: int) -> np.ndarray:
        """Return `count` bins with that room, or all that there are."""
        stack, taken = self.numbers[left], []
        while stack and count:
            numbers = stack.pop()
            taken.append(numbers[-count:])
            count -= len(taken[-1])
            if rest := len(numbers) - len(taken[-1]):
                stack.append(numbers[:rest])
        if not stack:
            del self.numbers[left], self.lefts[bisect_left(self.lefts, left)]
        return np.concatenate(taken)


def _write_plan(path: str, borders: Borders, seq_len: int) -> None:
    """Write the header, where the pieces of each sequence begin in the plan, and where each piece is, all int64."""
    # Documents without tokens are none. A label is predicted from the token before it, in the same document.
    begins = np.concatenate([[0], borders.ends[:-1]])
    is_some = begins < borders.ends
    begins, ends = begins[is_some], borders.ends[is_some].astype(np.int64)
    num_labels = ends - begins - 1

    # Pieces overlap by one token; a document of one token is a piece too.
    num_pieces = np.maximum(1, -(-num_labels // seq_len))
    firsts = np.cumsum(num_pieces) - num_pieces
    within = np.arange(num_pieces.sum()) - np.repeat(firsts, num_pieces)
    starts = np.repeat(begins, num_pieces) + within * seq_len
    sizes = np.minimum(seq_len + 1, np.repeat(ends, num_pieces) - starts)

    # An end of text that is lacking takes a token of the room, unless the sequence ends there.
    lacks_eot = np.repeat(~borders.has_eot[is_some], num_pieces)
    bins, places = best_fit_decreasing(np.minimum(seq_len + 1, sizes + lacks_eot), seq_len + 1)
    order = np.lexsort((places, bins))
    bounds = np.flatnonzero(np.diff(bins[order], prepend=-1, append=-1))

    # Windows cut a document where its first and its last label are in two of them.
    is_cut = (num_labels > 0) & (begins // seq_len != (ends - 2) // seq_len)
    sequences, goes_on = len(bounds) - 1, within > 0
    waste = Waste(
        sequences=sequences,
        padding=sequences * (seq_len + 1) - int(sizes.sum()),
        labels=int(sizes.sum()) - int((goes_on | (places == 0)).sum()),
        documents=len(ends),
        cut=int((num_pieces > 1).sum()),
        cut_by_concat=int(is_cut.sum()),
    )
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with new_checked_file(path) as file:
        packed = places << PLACE_BITS | sizes << 1 | goes_on
        np.save(file, np.concatenate([waste, bounds, starts[order], packed[order]]))


def _read_header(path: str) -> list[int]:
    return np.load(path, mmap_mode="r")[: len(Waste._fields)].tolist()


@functools.lru_cache(maxsize=1 << 10)
def _map_plan(path: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return where the pieces of each sequence begin (N + 1,), their starts in the tokens and their places (P,)."""
    plan = np.asarray(np.load(path, mmap_mode="r"))  # a plain array is sliced faster
    header = len(Waste._fields)
    bounds, pieces = np.split(plan[header:], [int(plan[0]) + 1])
    starts, places = np.split(pieces, 2)
    return bounds, starts, places
