"""Several sources of training data, each with its share of the sequences.

The sequences of a run are numbered from 0, and those of step s are [s * G, (s + 1) * G), G = global_batch_size. They
are given to sources one after the other so that, after any number of sequences, each source has had its share of them
to within one. Which source and which of its sequences that is follows from the number alone: not from ranks,
micro-batches or workers. Within a step the sequences are then permuted, or a rank could always have the same source.

A stream among the sources has a lane of documents (`titan_moe.data.stream`) for each place of a step: a sequence of it
at place p is the next window of its lane p. So a rank tokenizes only the lanes of its own places, however steps are
shared out. Places then take turns, so that all lanes are read about equally fast: documents wait for the slowest one.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from titan_moe.data.loader import (
    make_loader,
    num_windows,
    permute,
    read_windows,
    split_labels,
    window_loader,
    window_of,
)
from titan_moe.data.packing import Windows
from titan_moe.data.stream import LaneReader, TrainStream, check_lanes, places_of_rank
from titan_moe.data.tokenizer_files import Files

MANY_EPOCHS = 4  # more of the same text is worth little (Muennighoff et al., 2023, arXiv 2305.16264)


class Source(NamedTuple):
    """A token file or a stream, and its weight, a share of all weights of a step.

    It has one from `from_step` to `until_step`, both included.
    """

    name: str
    file: Windows | TrainStream
    weight: Fraction
    from_step: int = 1
    until_step: int = 0  # 0: to the end

    def weight_at(self, step: int) -> Fraction:
        """Its weight in a step, from 1."""
        return self.weight if self.from_step <= step and not 0 < self.until_step < step else Fraction(0)


class Stage(NamedTuple):
    """Sequences over which shares stay the same, from `first` up to that of the next stage."""

    first: int
    shares: tuple[Fraction, ...]  # of each source; they sum to 1


class Position(NamedTuple):
    """How far a run has come: after `sequences`, how many each source gave, and how many of its share it still owes."""

    sequences: int
    given: tuple[int, ...]
    owed: tuple[Fraction, ...]


def stages_of(sources: Sequence[Source], global_batch_size: int) -> list[Stage]:
    """Cut a run where weights change; ValueError where no source has a weight."""
    firsts = {1, *(source.from_step for source in sources)}
    firsts |= {source.until_step + 1 for source in sources if source.until_step}
    stages = []
    for step in sorted(firsts):
        weights = [source.weight_at(step) for source in sources]
        total = sum(weights)
        if not total:
            raise ValueError(
                f"data.sources: none has a weight in step {step}: let one begin there (from_step), or end later "
                "(until_step)"
            )
        stages.append(Stage((step - 1) * global_batch_size, tuple(weight / total for weight in weights)))
    return stages


class Allocation:
    """The source of each sequence, one after the other, from a position on.

    Tijdeman's rule ("The chairman assignment problem", 1980): of the sources that owe at least e = 1 / (2 k - 2), k
    being their number, the next sequence is from the one that would be the first to owe 1 - e if it had none. So none
    ever owes, or is ahead, by more than 1 - e sequences. What a source still owes when it ends, it may give later. In
    integers, so that every process comes to the same.
    """

    def __init__(self, stages: Sequence[Stage], start: Position) -> None:
        k = len(start.given)
        fractions = [*start.owed, *(share for stage in stages for share in stage.shares)]
        slack = max(2, 2 * k - 2)
        self.unit = slack * math.lcm(*(fraction.denominator for fraction in fractions))
        self.least = self.unit // slack if k > 1 else 0
        self.stages = [(stage.first, [int(share * self.unit) for share in stage.shares]) for stage in stages]
        self.next, self.given = start.sequences, list(start.given)
        self.owed = [int(owed * self.unit) for owed in start.owed]

    def take(self) -> int:
        """The source of the next sequence."""
        stage = max(index for index, (first, _) in enumerate(self.stages) if first <= self.next)
        for source, share in enumerate(self.stages[stage][1]):
            self.owed[source] += share

        # What is owed adds up to one sequence, so that some source owes enough; but for a run that goes on without a
        # source that it had.
        able = [source for source, owed in enumerate(self.owed) if owed >= self.least] or range(len(self.owed))
        chosen = min(able, key=lambda source: (self._deadline(source, stage), source))
        self.owed[chosen] -= self.unit
        self.next += 1
        self.given[chosen] += 1
        return chosen

    def _deadline(self, source: int, stage: int) -> float:
        """The first sequence at which the source would owe all but `least` of one, had it none until then."""
        lacks, at = self.unit - self.least - self.owed[source], self.next
        for index in range(stage, len(self.stages)):
            if lacks <= 0:
                return at
            share = self.stages[index][1][source]
            end = self.stages[index + 1][0] - 1 if index + 1 < len(self.stages) else math.inf
            if share and at - (-lacks // share) <= end:
                return at - (-lacks // share)
            lacks, at = (lacks - share * (end - at), end) if end < math.inf else (lacks, at)
        return at if lacks <= 0 else math.inf

    def position(self) -> Position:
        """How far it has come."""
        return Position(self.next, tuple(self.given), tuple(Fraction(owed, self.unit) for owed in self.owed))


class MixedBatches(Dataset):
    """Batches of several sources; see `LocalBatches`.

    Sources of the same file, as a weight that changes at some step makes them, take its sequences one after the other.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        *,
        seq_len: int,
        seed: int,
        global_batch_size: int,
        local_batch_size: int,
        dp_rank: int,
        dp_degree: int,
    ) -> None:
        self.sources, self.seq_len, self.seed, self.global_batch_size = list(sources), seq_len, seed, global_batch_size
        self.local_batch_size, self.dp_rank, self.dp_degree = local_batch_size, dp_rank, dp_degree
        self.stages = stages_of(sources, global_batch_size)
        self.start = Position(0, (0,) * len(sources), (Fraction(0),) * len(sources))
        files = [source.file for source in sources]
        self.sharers = [[j for j, other in enumerate(files) if other == file] for file in files]
        self.takes_turns = any(isinstance(file, TrainStream) for file in files)
        self.allocation, self.step, self.plan = Allocation(self.stages, self.start), -1, []

    def from_state(self, state: Mapping[str, Any]) -> "MixedBatches":
        """Return those of a run that goes on from a state, in which some sources may be missing.

        Errors: ValueError where the state is in the middle of a step.
        """
        # A step is planned as a whole, and stages begin with steps.
        sequences = state.get("sequences", 0)
        if sequences % self.global_batch_size:
            raise ValueError(
                f"the saved data position ({sequences} sequences) is no multiple of training.global_batch_size "
                f"({self.global_batch_size}), as data.sources need: go on with the batch size of the saved run"
            )
        saved = state.get("sources", {})
        given = tuple(int(saved.get(source.name, {}).get("given", 0)) for source in self.sources)
        owed = tuple(Fraction(saved.get(source.name, {}).get("owed", 0)) for source in self.sources)
        batches = copy.copy(self)
        batches.start = Position(sequences, given, owed)
        batches.allocation, batches.step = Allocation(self.stages, batches.start), -1
        return batches

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return tokens and labels (B, S), int64, of local batch `index`, and the state after the step it is of."""
        places, state = self.plan_batch(index)
        rows = [self.read(*self.plan[place]) for place in places]
        tokens, labels = (torch.cat(parts) for parts in zip(*rows, strict=True))  # (B, S) each
        return tokens, labels, state

    def plan_batch(self, index: int) -> tuple[range, dict[str, Any]]:
        """Plan the step of local batch `index`: the batch's places in it, and the state after it."""
        first = (index * self.dp_degree + self.dp_rank) * self.local_batch_size
        step, place = divmod(first, self.global_batch_size)
        self._go_to(step)
        after, consumed = self.allocation.position(), (index + 1) * self.dp_degree * self.local_batch_size
        pairs = zip(self.sources, after.given, after.owed, strict=True)
        saved = {source.name: {"given": given, "owed": str(owed)} for source, given, owed in pairs}
        return range(place, place + self.local_batch_size), {"sequences": consumed, "sources": saved}

    def _go_to(self, step: int) -> None:
        """Plan a step, from 0: the source of each of its places, and the sequence's number in the source's file."""
        # Steps are asked for in order; micro-batches of one step are of one plan.
        if step == self.step:
            return
        if step * self.global_batch_size < self.allocation.next:
            self.allocation = Allocation(self.stages, self.start)
        while self.allocation.next < (step + 1) * self.global_batch_size:
            number = self.allocation.next
            source = self.allocation.take()
            if number == step * self.global_batch_size:
                self.plan = []
            if number >= step * self.global_batch_size:
                self.plan.append((source, sum(self.allocation.given[j] for j in self.sharers[source]) - 1))
        self.step = step
        self._take_turns() if self.takes_turns else self._permute()

    def _permute(self) -> None:
        size = self.global_batch_size
        order = permute(np.arange(size), size, (self.seed, "places", self.step)) if size > 1 else [0]
        self.plan = [self.plan[place] for place in order]

    def _take_turns(self) -> None:
        """Place a step's sequences so that in as many steps as a step has places each place has each of them once."""
        # Sorted by file, a source has about the same ones in each step. The places begin anew in another order then.
        size = self.global_batch_size
        cycle, turn = divmod(self.step, size)
        order = permute(np.arange(size), size, (self.seed, "turns", cycle)) if size > 1 else np.zeros(1, np.int64)
        in_order = sorted(self.plan, key=lambda sequence: self.sharers[sequence[0]][0])
        by_place = dict(zip(((order + turn) % size).tolist(), in_order, strict=True))
        self.plan = [by_place[place] for place in range(size)]

    def read(self, source: int, number: int) -> tuple[Tensor, Tensor]:
        """Return tokens and labels (1, S), int64, of a sequence of a source's token file."""
        # the order of a file's windows is that of the first source that has it
        owner = self.sources[self.sharers[source][0]]
        assert not isinstance(owner.file, TrainStream)
        window = window_of(number, num_windows(owner.file, self.seq_len), self.seed, owner.name)
        return read_windows(owner.file, [window], self.seq_len)


class StreamedMixture(IterableDataset):
    """The local batches of a mixture with streams in it, one after the other; with states as of `MixedBatches`."""

    def __init__(self, mixture: MixedBatches, tokenizer_files: Files, state: dict[str, Any]) -> None:
        self.mixture, self.tokenizer_files, self.state = mixture.from_state(state), tokenizer_files, state
        for name, saved in state.get("streams", {}).items():
            check_lanes(saved, mixture.global_batch_size, f"data.sources.{name}")

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, dict[str, Any]]]:
        """Yield tokens and labels (B, S), int64, and the state after the batch, endlessly."""
        mixture = self.mixture
        readers: dict[int, LaneReader] = {}
        for index in itertools.count(self.state["sequences"] // (mixture.local_batch_size * mixture.dp_degree)):
            places, state = mixture.plan_batch(index)
            rows: dict[int, tuple[Tensor, Tensor]] = {}
            streamed: dict[int, list[int]] = {}
            for place in places:
                source, number = mixture.plan[place]
                owner = mixture.sharers[source][0]
                if isinstance(mixture.sources[owner].file, TrainStream):
                    streamed.setdefault(owner, []).append(place)
                else:
                    rows[place] = mixture.read(source, number)

            # A stream is opened when its first sequence is due, which may be long after the run's first step.
            state["streams"] = {}
            for owner, lanes in streamed.items():
                if owner not in readers:
                    readers[owner] = self._reader(owner)
                tokens, labels = split_labels(readers[owner].read(lanes))
                rows |= {lane: (tokens[row, None], labels[row, None]) for row, lane in enumerate(lanes)}
                position = {**readers[owner].state(lanes), "num_lanes": mixture.global_batch_size}
                state["streams"][mixture.sources[owner].name] = position
            tokens, labels = (torch.cat(parts) for parts in zip(*(rows[place] for place in places), strict=True))
            yield tokens, labels, state  # (B, S) each

    def _reader(self, owner: int) -> LaneReader:
        mixture, saved = self.mixture, self.state.get("streams", {})
        stream = mixture.sources[owner].file
        assert isinstance(stream, TrainStream)

        # What the first source of a stream has read, a later one goes on with.
        names = [mixture.sources[sharer].name for sharer in mixture.sharers[owner]]
        state = next((saved[name] for name in names if name in saved), {})
        groups = places_of_rank(mixture.global_batch_size, mixture.local_batch_size, mixture.dp_rank, mixture.dp_degree)
        return LaneReader(
            stream.dataset,
            self.tokenizer_files,
            stream.split,
            [lane for group in groups for lane in group],
            num_lanes=mixture.global_batch_size,
            seq_len=mixture.seq_len,
            seed=mixture.seed,
            state=state,
        )


def mixture_loader(
    mixture: MixedBatches, tokenizer_files: Files, num_workers: int, device: torch.device, state: dict[str, Any]
) -> StatefulDataLoader:
    """Make the loader of a mixture that goes on at a state. With a stream in it, it has one worker at most."""
    if not mixture.takes_turns:
        return window_loader(mixture, num_workers, device, state)
    return make_loader(StreamedMixture(mixture, tokenizer_files, state), min(num_workers, 1), device)


def epochs(sources: Sequence[Source], steps: int, global_batch_size: int, seq_len: int) -> dict[str, float]:
    """How often a run of `steps` steps goes through each source's file, of the first source that has it.

    Of a stream nobody knows where it ends: it is left out.
    """
    stages = stages_of(sources, global_batch_size)
    ends = [*(stage.first for stage in stages[1:]), math.inf]
    total = steps * global_batch_size
    passes: dict[str, float] = {}
    for index, source in enumerate(sources):
        if isinstance(source.file, TrainStream):
            continue
        taken = sum(
            stage.shares[index] * max(0, min(end, total) - stage.first) for stage, end in zip(stages, ends, strict=True)
        )
        owner = next(other.name for other in sources if other.file == source.file)
        passes[owner] = passes.get(owner, 0.0) + float(taken) / num_windows(source.file, seq_len)
    return passes
