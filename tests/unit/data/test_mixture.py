"""Several sources of training data: their shares, the order of their sequences, stages, and going on."""

import itertools
import json
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from titan_moe.data import stream
from titan_moe.data.build import tell_epochs
from titan_moe.data.cache import TokenFile
from titan_moe.data.corpus import Split
from titan_moe.data.loader import TrainLoader, merge_states
from titan_moe.data.mixture import Allocation, MixedBatches, Position, Source, epochs, mixture_loader, stages_of
from titan_moe.data.own import OwnStream, own_data
from titan_moe.data.stream import TrainStream
from titan_moe.data.tokenizer import bytes_tokenizer

NOWHERE = TokenFile("", "<u2", 0)
WINDOW = 4  # tokens of a sequence


def start(count: int) -> Position:
    return Position(0, (0,) * count, (Fraction(0),) * count)


@st.composite
def mixtures(draw: Any) -> tuple[list[Source], int]:
    """Sources with weights from 1 to 1,000, some for a part of the run, one for all of it; sequences of a step."""
    count = draw(st.integers(1, 6))
    sources = []
    for number in range(count):
        first = 1 if number == 0 else draw(st.integers(1, 20))
        last = 0 if number == 0 else draw(st.sampled_from([0, 0, first, first + 9]))
        sources.append(Source(str(number), NOWHERE, Fraction(draw(st.integers(1, 1000)), 1000), first, last))
    return sources, draw(st.sampled_from([1, 3, 8]))


@settings(max_examples=60, deadline=None)
@given(mixtures(), st.integers(0, 200))
def test_shares_are_exact_to_within_one_sequence_at_any_moment(mixture: tuple[list[Source], int], stop: int) -> None:
    """Also over changes of weights, and where a run goes on from a saved position.

    None gives anything before its first step, and after its last one at most the sequence that it still owes.
    """
    sources, per_step = mixture
    late: Counter[int] = Counter()
    allocation = Allocation(stages_of(sources, per_step), start(len(sources)))
    due = [Fraction(0)] * len(sources)
    for number in range(40 * per_step):
        if number == stop:
            allocation = Allocation(stages_of(sources, per_step), allocation.position())
        weights = [source.weight_at(number // per_step + 1) for source in sources]
        due = [before + weight / sum(weights) for before, weight in zip(due, weights, strict=True)]
        chosen = allocation.take()
        assert number // per_step + 1 >= sources[chosen].from_step
        late[chosen] += not weights[chosen]
        assert late[chosen] <= 1
        assert max(abs(d - g) for d, g in zip(due, allocation.given, strict=True)) < 1


def test_no_source_in_a_step() -> None:
    with pytest.raises(ValueError, match=r"data.sources: none has a weight in step 11: let one begin there"):
        stages_of([Source("a", NOWHERE, Fraction(1), 1, 10), Source("b", NOWHERE, Fraction(1), 20)], 4)


def token_file(folder: Path, name: str, windows: int, first: int) -> TokenFile:
    """A file whose every token is `first` + the number of its window."""
    tokens = np.repeat(np.arange(first, first + windows, dtype="<u2"), WINDOW)
    path = folder / name
    np.concatenate([tokens, tokens[-1:]]).tofile(path)
    return TokenFile(str(path), "<u2", len(tokens) + 1)


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    web, code = token_file(tmp_path, "web", 100, 0), token_file(tmp_path, "code", 7, 1000)
    return [
        Source("web", web, Fraction(3), until_step=10),
        Source("code", code, Fraction(1)),
        Source("late_web", web, Fraction(1), from_step=11),
    ]


def batches(sources: list[Source], *, rank: int = 0, degree: int = 1, local: int = 8, seed: int = 5) -> MixedBatches:
    sizes = {"global_batch_size": 8, "local_batch_size": local, "dp_rank": rank, "dp_degree": degree}
    return MixedBatches(sources, seq_len=WINDOW, seed=seed, **sizes)


def firsts(of: MixedBatches, numbers: range) -> list[int]:
    return [int(token) for number in numbers for token in of[number][0][:, 0]]


def test_each_step_has_its_shares_and_files_are_read_through(sources: list[Source]) -> None:
    """6 of 8 sequences from the web and then 4; each file once before any of it comes again."""
    seen = firsts(batches(sources), range(20))
    is_code = [token >= 1000 for token in seen]
    per_step = [sum(is_code[8 * step : 8 * step + 8]) for step in range(20)]
    assert per_step == [2] * 10 + [4] * 10
    web = [token for token in seen if token < 1000]
    assert len(web) == 100  # the late source goes on where the early one has ended
    assert sorted(web) == list(range(100))
    assert set(Counter(token for token in seen if token >= 1000).values()) == {8, 9}
    assert epochs(sources, 20, 8, WINDOW) == {"web": 1.0, "code": 60 / 7}


def test_places_of_a_step_change(sources: list[Source]) -> None:
    """Else one rank would see a single source."""
    places = {
        place
        for step in range(10)
        for place, token in enumerate(firsts(batches(sources), range(step, step + 1)))
        if token >= 1000
    }
    assert len(places) > 5


@pytest.mark.parametrize(("degree", "local"), [(1, 4), (2, 4), (2, 2), (4, 2), (8, 1)])
def test_steps_are_the_same_on_any_layout(sources: list[Source], degree: int, local: int) -> None:
    whole = batches(sources)
    ranks = [batches(sources, rank=rank, degree=degree, local=local) for rank in range(degree)]
    passes = 8 // (degree * local)
    for step in range(12):
        numbers = range(step * passes, (step + 1) * passes)
        parts = [ranks[rank][number][0] for number, rank in itertools.product(numbers, range(degree))]
        assert torch.equal(torch.cat(parts), whole[step][0])


def test_steps_may_be_asked_for_in_any_order(sources: list[Source]) -> None:
    """As workers do, each of which has some of the batches."""
    of = batches(sources)
    in_order = [of[step][0] for step in range(6)]
    for step in (4, 1, 5, 0):
        assert torch.equal(of[step][0], in_order[step])


@pytest.mark.parametrize("stop", [3, 10, 13])
def test_going_on_is_the_same_run(sources: list[Source], stop: int) -> None:
    whole = batches(sources)
    state = whole[stop - 1][2]
    later = batches(sources).from_state(state)
    for step in range(stop, 20):
        tokens, labels, after = later[step]
        assert torch.equal(tokens, whole[step][0])
        assert torch.equal(labels, whole[step][1])
        assert after == whole[step][2]


def test_going_on_with_other_sources(sources: list[Source]) -> None:
    """What was read stays read; a new source begins with its share of what comes."""
    state = batches(sources)[4][2]
    math = Source("math", token_file(Path(sources[0].file.path).parent, "math", 50, 2000), Fraction(4))
    later = batches([*sources[:2], math]).from_state(state)
    seen = [token for step in range(5, 10) for token in later[step][0][:, 0].tolist()]
    assert sum(token >= 2000 for token in seen) == 20
    assert not {token for token in seen if token < 1000} & set(firsts(batches(sources), range(5)))


def test_going_on_in_the_middle_of_a_step(sources: list[Source]) -> None:
    with pytest.raises(ValueError, match=r"\(12 sequences\) is no multiple of training.global_batch_size \(8\)"):
        batches(sources).from_state({"sequences": 12})


def test_the_seed_decides_the_order(sources: list[Source]) -> None:
    assert firsts(batches(sources), range(5)) != firsts(batches(sources, seed=6), range(5))


class Numbers:
    """Documents of a number each, `count` of them, in ten characters that no other stream has."""

    def __init__(self, letter: str, count: int) -> None:
        self.letter, self.count, self.next = letter, count, 0

    def __iter__(self) -> Iterator[str]:
        while self.next < self.count:
            self.next += 1
            number = self.next - 1
            yield "".join(chr(_zero(self.letter) + int(digit)) for digit in f"{number:0{3 + number % 5}d}")

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


def _zero(letter: str) -> int:
    return 40 + 12 * (ord(letter) - ord("a"))


def numbers(*, letter: str, count: int) -> Numbers:
    return Numbers(letter, count)


def number_stream(letter: str, count: int = 400) -> TrainStream:
    arguments = {"letter": letter, "count": count}
    function = own_data("tests.unit.data.test_mixture:numbers", arguments, "data.sources.x.dataset")
    return TrainStream(OwnStream(function, False, letter, "", ""), Split(0.0))


@st.composite
def streamed_mixtures(draw: Any) -> tuple[list[Source], int]:
    """Files and streams (at least one) with weights from 1 to 50, some for a part of the run; sequences of a step."""
    kinds = draw(st.lists(st.sampled_from(["file", "stream", "again"]), min_size=1, max_size=4))
    kinds.insert(draw(st.integers(0, len(kinds))), "stream")
    sources: list[Source] = []
    for number, kind in enumerate(kinds):
        first = 1 if number == 0 else draw(st.integers(1, 8))
        last = 0 if number == 0 else draw(st.sampled_from([0, 0, first + 4]))
        file: Any = number_stream(chr(97 + number)) if kind != "file" else number
        if kind == "again":  # the same stream as the first one has
            file = next((source.file for source in sources if isinstance(source.file, TrainStream)), file)
        sources.append(Source(str(number), file, Fraction(draw(st.integers(1, 50))), first, last))
    return sources, draw(st.sampled_from([1, 4, 6]))


def with_files(sources: list[Source], folder: Path) -> list[Source]:
    """Files of 64 windows, whose every token is above 1000 times its source's number."""
    return [
        source._replace(file=token_file(folder, f"file{index}", 64, 1000 * (index + 1)))
        if isinstance(source.file, int)
        else source
        for index, source in enumerate(sources)
    ]


def train(sources: list[Source], size: int, rank: int = 0, degree: int = 1, local: int = 0, workers: int = 0) -> Any:
    layout = {"local_batch_size": local or size, "dp_rank": rank, "dp_degree": degree}
    mixture = MixedBatches(sources, seq_len=WINDOW, seed=5, global_batch_size=size, **layout)
    make = partial(mixture_loader, mixture, bytes_tokenizer().files, workers, torch.device("cpu"))
    return TrainLoader(make, "data-tokenizer-4")


def taken(batches: Iterator[Any], count: int) -> list[list[int]]:
    """The sequences of some batches, each with the label of its last token."""
    rows = []
    for tokens, labels in itertools.islice(batches, count):
        assert torch.equal(tokens[:, 1:], labels[:, :-1])
        rows += torch.cat([tokens, labels[:, -1:]], dim=1).tolist()
    return rows


STEPS = 12


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(streamed_mixtures(), st.data())
def test_streams_among_the_sources(tmp_path: Path, mixture: tuple[list[Source], int], data: Any) -> None:
    """Exact shares to within a sequence at any step, nothing left out or twice, the same on any layout and going on."""
    described, size = mixture
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK", 16)
        sources = with_files(described, tmp_path)
        loader = train(sources, size)
        batches_of_all, whole, states = iter(loader), [], []
        for _ in range(STEPS):
            whole.append(taken(batches_of_all, 1))
            states.append(json.loads(json.dumps(loader.state_dict())))
        _check_shares(sources, size, whole, states)
        _check_lanes(sources, size, whole)

        # ranks and micro-batches, and another layout from some step on
        layouts = [(d, b) for d in (1, 2, 3, 4) for b in (1, 2, 3) if size % (d * b) == 0]
        degree, local = data.draw(st.sampled_from(layouts))
        stop = data.draw(st.integers(1, STEPS - 1))
        passes = size // (degree * local)
        ranks = [train(sources, size, rank, degree, local) for rank in range(degree)]
        iterators = [iter(rank) for rank in ranks]
        parts = [[taken(iterator, 1) for _ in range(stop * passes)] for iterator in iterators]
        rows = [row for number in range(stop * passes) for part in parts for row in part[number]]
        assert rows == [row for step in whole[:stop] for row in step]
        state = json.loads(json.dumps(merge_states([rank.state_dict() for rank in ranks])))
        later = train(sources, size)
        later.load_state_dict(state)
        rest = iter(later)
        assert [taken(rest, 1) for _ in range(STEPS - stop)] == whole[stop:]


def _check_shares(sources: list[Source], size: int, steps: list[list[list[int]]], states: list[dict[str, Any]]) -> None:
    """What the state says was given is within a sequence of the shares, and what the tokens say that was given."""
    due = [Fraction(0)] * len(sources)
    seen: Counter[Any] = Counter()
    for step, (rows, state) in enumerate(zip(steps, states, strict=True), start=1):
        weights = [source.weight_at(step) for source in sources]
        due = [before + size * weight / sum(weights) for before, weight in zip(due, weights, strict=True)]
        given = [state["sources"][source.name]["given"] for source in sources]
        assert max(abs(d - g) for d, g in zip(due, given, strict=True)) < 1
        seen.update(_origin(row) for row in rows)
        by_origin: Counter[Any] = Counter()
        for source, count in zip(sources, given, strict=True):
            by_origin[_name(source)] += count
        assert seen == +by_origin


def _name(source: Source) -> Any:
    if isinstance(source.file, TrainStream):
        return json.loads(source.file.dataset.function.arguments)["letter"]
    return int(source.file.read(0, 1)[0]) // 1000


def _origin(row: list[int]) -> Any:
    """The letter of a stream's sequence, or the number of a file's."""
    return row[0] // 1000 if row[0] >= 1000 else _letter(row)


def _letter(row: list[int]) -> str:
    """The letter of the stream that has the characters of a sequence."""
    letters = {chr(97 + (token - 40) // 12) for token in row if token < 256}
    return letters.pop() if len(letters) == 1 else "?"


def _check_lanes(sources: list[Source], size: int, steps: list[list[list[int]]]) -> None:
    """At each place the sequences of a stream follow each other, and all of them together have each document once."""
    for letter in {_name(source) for source in sources if isinstance(source.file, TrainStream)}:
        documents: list[str] = []
        for place in range(size):
            lane = [step[place] for step in steps if _origin(step[place]) == letter]
            assert all(one[-1] == other[0] for one, other in itertools.pairwise(lane))
            text = "".join("|" if token == 256 else str(token - _zero(letter)) for row in lane for token in row[:-1])
            documents += text.split("|")[:-1]
        numbers_seen = [int(document) for document in documents]
        assert len(set(numbers_seen)) == len(numbers_seen)


def test_places_take_turns_with_streams() -> None:
    """So that lanes are read about equally fast: what waits for the slowest one does not grow with the run."""
    size, weights = 64, [Fraction(3), Fraction(1), Fraction(2, 7)]
    sources = [Source(letter, number_stream(letter), w) for letter, w in zip("abc", weights, strict=True)]
    mixture = MixedBatches(
        sources, seq_len=4, seed=5, global_batch_size=size, local_batch_size=size, dp_rank=0, dp_degree=1
    )
    spread = {}
    for mixture.takes_turns in (True, False):
        mixture.step, counts = -1, np.zeros((3, size), int)
        for step in range(20 * size):
            mixture.plan_batch(step)
            for place, (source, _) in enumerate(mixture.plan):
                counts[source, place] += 1
        spread[mixture.takes_turns] = counts.max(1) - counts.min(1)
        assert (counts > 0).all()
    assert (3 * spread[True] < spread[False]).all()


def test_a_stream_goes_on_with_its_batch_size(sources: list[Source]) -> None:
    mixed = [*sources, Source("letters", number_stream("a"), Fraction(4))]
    loader = train(mixed, 8)
    taken(iter(loader), 3)
    other = train(mixed, 4)
    other.load_state_dict(loader.state_dict())
    with pytest.raises(ValueError, match=r"\(4\): the saved position in data.sources.letters is of 8;"):
        taken(iter(other), 1)


def test_epochs_of_a_stream_are_not_known(sources: list[Source], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    mixed = [*sources, Source("letters", number_stream("a"), Fraction(4))]
    tell_epochs(epochs(mixed, 20, 8, WINDOW), ["letters"])
    assert "data.sources.letters as a stream, which may end and begin again" in caplog.text
    assert "letters" not in epochs(mixed, 20, 8, WINDOW)
