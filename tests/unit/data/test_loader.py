import itertools
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from titan_moe.data import loader
from titan_moe.data.cache import TokenFile
from titan_moe.data.loader import (
    TrainLoader,
    WindowBatches,
    merge_states,
    num_windows,
    on_device,
    permute,
    validation_batches,
    window_loader,
)

AWAY = torch.device("meta")  # stands for a GPU
SEQ_LEN = 4
GLOBAL = 12
Rows = list[list[int]]


@pytest.fixture
def file(tmp_path: Path) -> TokenFile:
    """202 tokens, each its own position: 50 windows of 4 and one token left."""
    np.arange(202, dtype=np.uint16).tofile(tmp_path / "train.bin")
    return TokenFile(str(tmp_path / "train.bin"), "uint16", 202)


def make(
    file: TokenFile,
    rank: int = 0,
    degree: int = 1,
    local: int = GLOBAL,
    *,
    workers: int = 0,
    seed: int = 3,
    device: torch.device = loader.CPU,
) -> TrainLoader:
    batches = WindowBatches(file, seq_len=SEQ_LEN, seed=seed, local_batch_size=local, dp_rank=rank, dp_degree=degree)
    return TrainLoader(lambda state: window_loader(batches, workers, device, state), "data", device=device)


def take(train: TrainLoader, count: int) -> list[Rows]:
    batches = []
    for tokens, labels in itertools.islice(iter(train), count):
        assert tokens.dtype == labels.dtype == torch.int64
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        assert torch.equal(labels, tokens + 1)  # in this file
        batches.append(tokens.tolist())
    return batches


def global_batches(file: TokenFile, degree: int, local: int, steps: int) -> list[Rows]:
    """Put the local batches of all ranks together, in the order of the global batch."""
    per_step = GLOBAL // (local * degree)
    ranks = [take(make(file, rank, degree, local), steps * per_step) for rank in range(degree)]
    flat = [row for index in range(steps * per_step) for batches in ranks for row in batches[index]]
    return [flat[start : start + GLOBAL] for start in range(0, len(flat), GLOBAL)]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 16, 17, 100, 1025])
def test_permute_is_a_permutation_that_depends_on_the_key(size: int) -> None:
    orders = [permute(np.arange(size), size, (seed, epoch)).tolist() for seed in range(3) for epoch in range(3)]
    assert all(sorted(order) == list(range(size)) for order in orders)
    if size > 16:
        assert len({tuple(order) for order in orders}) == len(orders)


def test_permute_mixes_evenly() -> None:
    size, cells = 20_000_000, 20
    drawn = permute(np.arange(8000), size, (1, 0))
    assert len(set(drawn.tolist())) == len(drawn)
    counts = np.bincount(drawn * cells // size, minlength=cells)
    assert abs(counts - 400).max() < 5 * 20  # five standard deviations
    steps = np.diff(drawn)
    assert abs((steps > 0).mean() - 0.5) < 0.03


def test_the_order_never_changes() -> None:
    """Runs are resumed years later: this order is a format."""
    assert permute(np.arange(10), 10, (0, 0)).tolist() == [4, 2, 1, 5, 8, 7, 6, 3, 9, 0]


@pytest.mark.parametrize(("degree", "local"), [(1, 4), (1, 1), (2, 6), (2, 3), (3, 4), (4, 1), (12, 1)])
def test_a_global_batch_is_the_same_for_every_layout(file: TokenFile, degree: int, local: int) -> None:
    assert global_batches(file, degree, local, 9) == global_batches(file, 1, GLOBAL, 9)


def test_every_epoch_shows_every_window_once_in_a_new_order(file: TokenFile) -> None:
    size = num_windows(file, SEQ_LEN)
    assert size == 50
    flat = [row for batch in take(make(file), 13) for row in batch]
    epochs = [flat[start : start + size] for start in (0, size, 2 * size)]
    windows = [list(range(start, start + SEQ_LEN)) for start in range(0, 200, SEQ_LEN)]
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(make(file, seed=4), 1) != take(make(file), 1)


def test_fewer_windows_than_a_batch_needs(file: TokenFile) -> None:
    batches = take(make(file._replace(num_tokens=9)), 2)
    assert {tuple(row) for row in batches[0]} == {(0, 1, 2, 3), (4, 5, 6, 7)}


@pytest.mark.parametrize(("before", "after"), [(0, 0), (1, 1), (2, 2), (2, 0), (0, 2), (1, 2)])
def test_resume_is_exact_for_any_number_of_workers(file: TokenFile, before: int, after: int) -> None:
    whole = take(make(file, 1, 2, 3), 16)
    first = make(file, 1, 2, 3, workers=before)
    assert take(first, 6) == whole[:6]
    state = first.state_dict()
    assert state["sequences"] == 6 * 6
    second = make(file, 1, 2, 3, workers=after)
    second.load_state_dict(state)
    assert second.state_dict() == state
    assert take(second, 10) == whole[6:]


def test_resume_on_another_world_size(file: TokenFile) -> None:
    whole = global_batches(file, 1, GLOBAL, 8)
    states = []
    for rank in range(4):
        train = make(file, rank, 4, 1)
        take(train, 5 * 3)
        states.append(train.state_dict())
    assert all(state == states[0] for state in states)
    ranks = []
    for rank in range(2):
        train = make(file, rank, 2, 6)
        train.load_state_dict(merge_states(states))
        ranks.append(take(train, 3))
    assert [ranks[0][step] + ranks[1][step] for step in range(3)] == whole[5:]


def test_a_position_in_the_middle_of_a_local_batch_is_an_error(file: TokenFile) -> None:
    train = make(file)
    train.load_state_dict({"sequences": 6, "fingerprint": "data"})
    with pytest.raises(ValueError, match=r"\(6 sequences\) is no multiple of .* ranks \(12\)"):
        next(iter(train))


def test_other_data_are_told(file: TokenFile, caplog: pytest.LogCaptureFixture) -> None:
    make(file).load_state_dict({"sequences": 0, "fingerprint": "data"})
    assert not caplog.records
    make(file).load_state_dict({"sequences": 0, "fingerprint": "other"})
    assert "differ from the checkpoint's" in caplog.text


def test_fast_forward_reads_nothing(file: TokenFile, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[list[int]] = []
    read: Callable[..., Any] = loader.read_windows
    monkeypatch.setattr(
        loader, "read_windows", lambda file, windows, n: reads.append(windows) or read(file, windows, n)
    )
    train = make(file)
    train.load_state_dict({"sequences": GLOBAL * 10**9, "fingerprint": "data"})
    take(train, 1)
    assert len(reads) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_leaves_the_random_numbers_alone(file: TokenFile, workers: int) -> None:
    before = torch.get_rng_state()
    take(make(file, workers=workers), 3)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_do_not_print(file: TokenFile, capfd: pytest.CaptureFixture[str]) -> None:
    take(make(file, workers=2), 3)
    assert capfd.readouterr() == ("", "")


class Pinned:
    """What went into pinned memory, and by which threads."""

    def __init__(self) -> None:
        self.rows: list[Rows] = []
        self.threads: set[int] = set()

    def note(self, tensor: torch.Tensor) -> None:
        self.rows.append(tensor.tolist())
        self.threads.add(threading.get_ident())


@pytest.fixture
def pinned(monkeypatch: pytest.MonkeyPatch) -> Pinned:
    """Pinned memory without CUDA: tokens, labels, tokens, labels, ..."""
    found = Pinned()

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        found.note(tensor)
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    return found


class Copies(TorchDispatchMode):
    """Copies to the device, and those of them that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.all, self.waits = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default and kwargs.get("device") == AWAY:
            self.all += 1
            self.waits += not kwargs.get("non_blocking")
        return func(*args, **kwargs)


def test_a_gpu_gets_its_batches_without_waiting(file: TokenFile, pinned: Pinned) -> None:
    """The same batches, one ahead, read by another thread, in copies that the host does not wait for."""
    expected = take(make(file), 5)
    batches, copies = iter(make(file, device=AWAY)), Copies()
    with copies:
        found = [next(batches) for _ in range(4)]
    assert (copies.all, copies.waits) == (8, 0)
    assert all(part.device == AWAY and part.shape == (GLOBAL, SEQ_LEN) for pair in found for part in pair)
    batches.close()  # waits for what is being read
    assert pinned.rows[::2] == expected
    assert len(pinned.threads) == 1
    assert threading.get_ident() not in pinned.threads


def test_the_position_is_not_that_of_batches_read_ahead(file: TokenFile, pinned: Pinned) -> None:
    expected = take(make(file, 1, 2, 3), 9)
    first = make(file, 1, 2, 3, device=AWAY)
    batches = iter(first)
    for count in range(1, 5):
        next(batches)
        assert first.state_dict()["sequences"] == count * 6
    batches.close()
    second = make(file, 1, 2, 3, device=AWAY)
    second.load_state_dict(first.state_dict())
    pinned.rows.clear()
    again = iter(second)
    for _ in range(4):
        next(again)
    again.close()
    assert pinned.rows[::2] == expected[4:]


def test_a_reader_that_fails_does_so_at_its_batch(pinned: Pinned) -> None:
    def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        yield torch.zeros(2, 4), torch.zeros(2, 4)
        raise ValueError("no more")

    found = on_device(batches(), AWAY, torch.tensor([1, 3]))
    assert [part.shape for part in next(found)] == [(2, 2), (2, 2)]
    with pytest.raises(ValueError, match="no more"):
        next(found)


def test_the_last_batches_come_too(pinned: Pinned) -> None:
    pairs = [(torch.full((1, 2), i), torch.full((1, 2), -i)) for i in range(3)]
    assert len(list(on_device(pairs, AWAY))) == 3
    assert list(on_device([], AWAY)) == []


@pytest.mark.slow
def test_workers_beside_a_gpu_are_not_forked(file: TokenFile) -> None:
    batches = WindowBatches(file, seq_len=SEQ_LEN, seed=3, local_batch_size=GLOBAL, dp_rank=0, dp_degree=1)
    made = window_loader(batches, 1, AWAY, {})
    assert made.multiprocessing_context.get_start_method() == "spawn"
    found = [tokens.tolist() for tokens, _, _ in itertools.islice(made, 3)]
    assert found == take(make(file), 3)


def validate(file: TokenFile, degree: int, local: int, steps: int) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    return [
        list(
            validation_batches(
                [file], seq_len=SEQ_LEN, steps=steps, local_batch_size=local, dp_rank=rank, dp_degree=degree
            )
        )
        for rank in range(degree)
    ]


@pytest.mark.parametrize(("degree", "local"), [(1, 50), (1, 7), (2, 7), (3, 4), (4, 16), (7, 9)])
def test_validation_is_every_window_once_on_any_layout(file: TokenFile, degree: int, local: int) -> None:
    ranks = validate(file, degree, local, -1)
    assert len({len(batches) for batches in ranks}) == 1
    rows = []
    for tokens, labels in itertools.chain(*ranks):
        assert tokens.shape == labels.shape
        assert tokens.shape[0] <= local
        if (labels == loader.IGNORE).any():
            assert (labels == loader.IGNORE).all()
        else:
            assert torch.equal(labels, tokens + 1)
            rows += tokens.tolist()
    assert sorted(rows) == [list(range(start, start + SEQ_LEN)) for start in range(0, 200, SEQ_LEN)]


def test_validation_steps_limit_the_sequences_of_all_ranks_together(file: TokenFile) -> None:
    def shown(degree: int, local: int, steps: int) -> list[list[int]]:
        batches = itertools.chain(*validate(file, degree, local, steps))
        return sorted(row for tokens, labels in batches if labels[0, 0] >= 0 for row in tokens.tolist())

    assert len(shown(1, 4, 3)) == 12
    assert shown(1, 4, 3) == shown(2, 4, 3) == shown(5, 4, 3) == shown(3, 2, 6)
    assert shown(1, 4, 3)[-1][0] > 100  # not just the beginning of the file
    assert len(shown(1, 4, 99)) == 50
