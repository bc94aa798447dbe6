"""Batches from token files, in an order that no layout can change.

The sequences of a run are numbered from 0. Sequence q is window `q % N` of epoch `q // N` in that epoch's permutation
of the N windows, so epochs follow each other without a gap (a batch may straddle two) and nothing is dropped but the
tail of less than one window. Step s takes the sequences [s * G, (s + 1) * G), G = global_batch_size; of these,
micro-batch m of rank r of W takes the B = local_batch_size from s * G + (m * W + r) * B on. Window w is the tokens [w *
S, w * S + S], one more than S = seq_len: the inputs and, shifted by one, the labels. Of packed tokens the windows are
the sequences of their plan.
"""

import copy
import functools
import hashlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_moe.data.packing import PackedTokens, Windows
from titan_moe.data.processes import outlive_signals
from titan_moe.model.cross_entropy import IGNORE

ROUNDS = 6
CPU = torch.device("cpu")
ORDER_CHUNK = 1024  # positions permuted at once: a call costs as much as a hundred positions do
log = logging.getLogger(__name__)


def permute(positions: np.ndarray, size: int, key: tuple[int | str, ...]) -> np.ndarray:
    """Return where `positions` go in the permutation of range(size) that `key` names, without a table.

    A Feistel network over the bits of `size - 1`, its round function splitmix64's finalizer, walked until the result is
    below `size` (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method 2). Unlike the permutations
    of numpy and torch it needs no memory and stays the same in every version of every library.
    """
    # The bits are cut into two halves, of which the upper one has the odd bit. Each needs one at least.
    data = hashlib.blake2b(repr(key).encode(), digest_size=8 * ROUNDS).digest()
    bits = max(2, (size - 1).bit_length())
    low_bits = np.uint64(bits // 2)
    masks = (np.uint64((1 << (bits - bits // 2)) - 1), np.uint64((1 << bits // 2) - 1))

    # Each round changes one half by a hash of the other, which can be undone: hence a permutation, of 2^bits numbers.
    def encrypt(values: np.ndarray) -> np.ndarray:
        halves = [values >> low_bits, values & masks[1]]
        for index, round_key in enumerate(np.frombuffer(data, "<u8")):
            mixed = halves[1 - index % 2] ^ round_key
            mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            halves[index % 2] ^= (mixed ^ (mixed >> np.uint64(31))) & masks[index % 2]
        return (halves[0] << low_bits) | halves[1]

    # Numbers that land outside are permuted on until they land inside. All come from inside, so they get there.
    permuted = encrypt(positions.astype(np.uint64))
    while (outside := permuted >= size).any():
        permuted[outside] = encrypt(permuted[outside])
    return permuted.astype(np.int64)


# A batch's sequences are neighbours in the permutation, and so are those of the next: chunks are used many times over.
@functools.lru_cache(maxsize=64)
def _order(size: int, key: tuple[int | str, ...], chunk: int) -> np.ndarray:
    start = chunk * ORDER_CHUNK
    return permute(np.arange(start, min(start + ORDER_CHUNK, size)), size, key)


def window_of(sequence: int, size: int, *key: int | str) -> int:
    """Return the window, of `size`, that is the sequence of this number in the order that `key` names."""
    epoch, position = divmod(sequence, size)
    chunk, place = divmod(position, ORDER_CHUNK)
    return int(_order(size, (*key, epoch), chunk)[place])


def num_windows(file: Windows, seq_len: int) -> int:
    """Return how many windows of seq_len tokens and one more label a token file holds, or sequences packed tokens."""
    if isinstance(file, PackedTokens):
        return file.waste.sequences
    return max(0, file.num_tokens - 1) // seq_len


def read_windows(file: Windows, windows: list[int], seq_len: int) -> tuple[Tensor, Tensor]:
    """Return the tokens and labels (B, S), int64, of some windows of a token file; those of padding are IGNORE."""
    if isinstance(file, PackedTokens):
        rows, is_label = file.read_sequences(windows)  # (B, S + 1)
        tokens, labels = split_labels(rows)
        return tokens, labels.masked_fill(torch.from_numpy(~is_label[:, 1:]), IGNORE)
    rows = np.stack([file.read(window * seq_len, (window + 1) * seq_len + 1) for window in windows])
    return split_labels(rows)


def at_positions(x: Tensor, positions: Tensor | None) -> Tensor:
    """Select `positions` (S',) of each sequence, or all where that is None: (B, S) -> (B, S')."""
    return x if positions is None else x[:, positions]


def split_labels(rows: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return tokens and labels (B, S), int64, of rows of S + 1 token ids."""
    pairs = torch.from_numpy(rows.astype(np.int64))
    return pairs[:, :-1].contiguous(), pairs[:, 1:].contiguous()


class LocalBatches(Protocol):
    """The local batches of one rank by their number; every batch comes with the state from which to go on after it."""

    dp_degree: int
    local_batch_size: int

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return tokens and labels (B, S), int64, of local batch `index`, and the state after it."""
        ...

    def from_state(self, state: Mapping[str, Any]) -> "LocalBatches":
        """Return those of a run that goes on from a state."""
        ...


class WindowBatches(Dataset):
    """Batches of one token file."""

    def __init__(
        self, file: Windows, *, seq_len: int, seed: int, local_batch_size: int, dp_rank: int, dp_degree: int
    ) -> None:
        self.file, self.seq_len, self.seed = file, seq_len, seed
        self.local_batch_size, self.dp_rank, self.dp_degree = local_batch_size, dp_rank, dp_degree

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return tokens and labels (B, S), int64, of local batch `index`, and the state after it."""
        size = num_windows(self.file, self.seq_len)
        first = (index * self.dp_degree + self.dp_rank) * self.local_batch_size
        numbers = range(first, first + self.local_batch_size)
        windows = [window_of(number, size, self.seed) for number in numbers]
        consumed = (index + 1) * self.dp_degree * self.local_batch_size
        return *read_windows(self.file, windows, self.seq_len), {"sequences": consumed}

    def from_state(self, state: Mapping[str, Any]) -> "WindowBatches":
        """Return itself: a sequence's number says all."""
        return self


def window_loader(
    batches: LocalBatches, num_workers: int, device: torch.device, state: dict[str, Any]
) -> StatefulDataLoader:
    """Make the loader that goes on after `state["sequences"]` sequences; what lies before them is not read.

    Errors: ValueError where that is in the middle of a pass of all ranks.
    """
    sequences_per_pass = batches.dp_degree * batches.local_batch_size
    first, rest = divmod(state.get("sequences", 0), sequences_per_pass)
    if rest:
        raise ValueError(
            f"the saved data position ({state['sequences']} sequences) is no multiple of local_batch_size x "
            f"data-parallel ranks ({sequences_per_pass}): resume with the batch size and number of processes of the "
            "saved run"
        )
    return make_loader(batches.from_state(state), num_workers, device, sampler=itertools.count(first))


def make_loader(dataset: Any, num_workers: int, device: torch.device, sampler: Any = None) -> StatefulDataLoader:
    """Make a loader of ready-made batches, which leaves the run's random numbers alone.

    Beside a GPU its workers are fresh interpreters: a fork gets the locks of CUDA and NCCL, but not the threads that
    hold them. (A fork server would be ended by signals to the whole group, and its workers with it.)
    """
    # The loader draws a seed for its workers when it starts, by default from torch's global generator.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "'set_vital' is deprecated")  # torchdata 0.11 with torch 2.13
        return StatefulDataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=_identity,
            generator=torch.Generator().manual_seed(0),
            worker_init_fn=outlive_signals,
            prefetch_factor=4 if num_workers else None,
            multiprocessing_context="spawn" if num_workers and device.type != "cpu" else None,
        )


def _identity(batch: Any) -> Any:
    return batch


def on_device(
    batches: Iterable[tuple[Any, ...]], device: torch.device, positions: Tensor | None = None
) -> Iterator[tuple[Any, ...]]:
    """Yield batches (tokens, labels, more): tokens and labels at `positions`, (B, S) -> (B, S'), and on `device`.

    While a GPU works on a batch, a thread reads the next one into pinned memory. From there it is copied in the order
    of the GPU's other work, and neither waits for the other. On a CPU nothing is read ahead.
    """
    # Ranks that share sequences read the same batch, and each takes its part before it is copied.
    selected = (
        (at_positions(tokens, positions), at_positions(labels, positions), *more) for tokens, labels, *more in batches
    )
    if device.type == "cpu":
        yield from selected
        return

    # One batch is always being read: the next one is asked for before the present one is given out.
    with ThreadPoolExecutor(1, "batches") as thread:
        coming = thread.submit(_read_pinned, selected)
        while (batch := coming.result()) is not None:
            coming = thread.submit(_read_pinned, selected)
            tokens, labels, *more = batch
            yield tokens.to(device, non_blocking=True), labels.to(device, non_blocking=True), *more


def _read_pinned(batches: Iterator[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """Return the next batch in pinned memory, None after the last; from pageable memory a copy makes the host wait."""
    for tokens, labels, *more in batches:
        return tokens.pin_memory(), labels.pin_memory(), *more
    return None


class TrainLoader:
    """Endless training batches (tokens, labels), with a position that counts what was handed out, not what was fetched.

    The state does not depend on the number of workers, and for cached data not on the world size. torchdata's own state
    is tied to both (it refuses another num_workers). So every batch comes with the position after it, and resuming
    starts a new StatefulDataLoader there. Iterate again after `load_state_dict`.
    """

    def __init__(
        self,
        make: Callable[[dict[str, Any]], StatefulDataLoader],
        fingerprint: str,
        positions: Tensor | None = None,
        device: torch.device = CPU,
    ) -> None:
        self._make, self._fingerprint, self._positions, self._device = make, fingerprint, positions, device
        self._state: dict[str, Any] = {"sequences": 0}

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield tokens and labels, (B, S) or at `positions` (B, S'), on `device` from the current position on."""
        # A stream's batch has the positions of its own lanes; those of the others stay as their last batch left them.
        for tokens, labels, after in on_device(self._make(self._state), self._device, self._positions):
            self._state = _with_other_lanes(self._state, after)
            yield tokens, labels

    def tokens_by_source(self, seq_len: int) -> list[tuple[str, int]]:
        """Return the tokens that each source has given so far, of sequences of `seq_len`; none without sources."""
        return [(name, source["given"] * seq_len) for name, source in self._state.get("sources", {}).items()]

    def state_dict(self) -> dict[str, Any]:
        """Return the position after the last batch handed out: plain numbers, strings, lists and dicts."""
        return {**copy.deepcopy(self._state), "fingerprint": self._fingerprint}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch at which `state` was taken; with a warning where it is a position in other data."""
        saved = dict(copy.deepcopy(state))
        if saved.pop("fingerprint") != self._fingerprint:
            log.warning(
                "the training data, tokenizer or seq_len differ from the checkpoint's: going on at its position"
            )
        self._state = saved


def _with_other_lanes(before: Mapping[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The state after a batch, with the positions of lanes, and of streams of a mixture, that had no part in it."""
    lanes = {**before.get("lanes", {}), **after.get("lanes", {})}
    streams = dict(before.get("streams", {}))
    for name, position in after.get("streams", {}).items():
        streams[name] = _with_other_lanes(streams.get(name, {}), position)
    return {**after, **({"lanes": lanes} if lanes else {}), **({"streams": streams} if streams else {})}


def merge_states(states: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the states of all ranks into one that any world size can load; for cached data all of them are the same."""
    merged = dict(states[0])

    # Of a mixture each of its streams by itself; a rank may have had none of it yet.
    if names := {name for state in states for name in state.get("streams", {})}:
        merged["streams"] = {
            name: merge_states([state["streams"][name] for state in states if name in state.get("streams", {})])
            for name in sorted(names)
        }

    # Of a stream each rank has its own lanes, and the slowest rank says from which block to read.
    if "lanes" in merged:
        merged["lanes"] = {lane: place for state in states for lane, place in state["lanes"].items()}
        merged["cursor"] = min((state["cursor"] for state in states), key=lambda cursor: cursor["document"])
    return merged


def validation_batches(
    files: Sequence[Windows], *, seq_len: int, steps: int, local_batch_size: int, dp_rank: int, dp_degree: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this rank's validation batches (b, S), b <= local_batch_size; every rank gets the same number of batches.

    The set is all windows of the files (steps -1) or `steps * local_batch_size` of them in total over all ranks, of
    each file as many as it has of all. It is always the same, whatever the seed, world size and batch size. A rank with
    no window left gets one row with all labels -100.
    """
    sizes = [num_windows(file, seq_len) for file in files]
    every = sum(sizes)
    total = every if steps < 0 else min(every, steps * local_batch_size)
    ends = [total * sum(sizes[: number + 1]) // every for number in range(len(sizes))]
    for file, size, start, end in zip(files, sizes, [0, *ends], ends, strict=False):
        for first in range(0, end - start, local_batch_size * dp_degree):
            begin = first + dp_rank * local_batch_size
            windows = [window_of(index, size, 0) for index in range(begin, min(begin + local_batch_size, end - start))]
            tokens, labels = read_windows(file, windows or [0], seq_len)
            yield tokens, labels if windows else torch.full_like(labels, IGNORE)
