"""Several sources of training data: their shares, the order of their sequences, stages, and going on."""

import itertools
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe.data.cache import TokenFile
from titan_moe.data.mixture import Allocation, MixedBatches, Position, Source, epochs, stages_of

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
