"""Best-fit packing: against a plain loop over bins, and by what must hold for any documents."""

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.data.test_token_files import EOT, write_pair
from titan_moe.data import packing
from titan_moe.data.build import Data, SourceFiles, build_data, build_validation
from titan_moe.data.cache import TokenFile
from titan_moe.data.loader import TrainLoader, WindowBatches, num_windows, read_windows, window_loader
from titan_moe.data.packing import (
    Borders,
    PackedTokens,
    best_fit_decreasing,
    describe,
    find_borders,
    pack,
    tell_waste,
)
from titan_moe.data.verify import verify_data
from titan_moe.model.cross_entropy import IGNORE
from titan_moe.model.transformer import places_of

END = 0  # the end of text of the files here
anywhere = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@given(st.integers(1, 25).flatmap(lambda room: st.tuples(st.just(room), st.lists(st.integers(1, room), max_size=60))))
def test_each_item_goes_where_least_room_is_left(case: tuple[int, list[int]]) -> None:
    room, sizes = case
    lefts: list[int] = []  # of a plain best-fit decreasing, one item after the other
    for size in sorted(sizes, reverse=True):
        able = [left for left in lefts if left >= size]
        if able:
            lefts.remove(min(able))
        lefts.append((min(able) if able else room) - size)
    bins, places = best_fit_decreasing(np.array(sizes, np.int64), room)
    spans: dict[int, list[tuple[int, int]]] = {}
    for bin_, place, size in zip(bins.tolist(), places.tolist(), sizes, strict=True):
        spans.setdefault(bin_, []).append((place, place + size))
    for of_bin in spans.values():
        of_bin.sort()
        assert [start for start, _ in of_bin] == [0, *(end for _, end in of_bin[:-1])]
    assert sorted(room - of_bin[-1][1] for of_bin in spans.values()) == sorted(lefts)
    assert sorted(spans) == list(range(len(lefts)))


def write(folder: Path, sizes: list[int], has_eot: list[bool]) -> tuple[TokenFile, Borders, list[list[int]]]:
    """Documents whose every token is another one, but for the end of text of those that have it."""
    ids = iter(range(1, sum(sizes) + 1))
    documents = [[next(ids) for _ in range(size)] for size in sizes]
    for document, ends in zip(documents, has_eot, strict=True):
        document[-1:] = [END] if ends and document else document[-1:]
    np.array(list(itertools.chain(*documents)), np.uint32).tofile(folder / "tokens")
    borders = Borders(np.cumsum(sizes), np.array(has_eot) & (np.array(sizes) > 0))
    return TokenFile(str(folder / "tokens"), "uint32", sum(sizes)), borders, documents


documents_of_any_kind = st.tuples(
    st.integers(1, 12), st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=30)
)


@anywhere
@given(documents_of_any_kind)
def test_every_token_is_predicted_once_and_no_document_that_fits_is_cut(
    tmp_path: Path, case: tuple[int, list[tuple[int, bool]]]
) -> None:
    seq_len, kinds = case
    file, borders, documents = write(tmp_path, *(list(column) for column in zip(*kinds, strict=True)))
    settings_ = {"eot_id": END, "seq_len": seq_len, "fingerprint": repr(case), "folder": str(tmp_path / "cache")}
    packed = pack(file, borders, **settings_)
    if file.num_tokens <= seq_len:
        assert packed == file
        return
    assert isinstance(packed, PackedTokens)
    tokens, labels = read_windows(packed, list(range(num_windows(packed, seq_len))), seq_len)
    rows = [read_windows(packed, [number], seq_len) for number in range(num_windows(packed, seq_len))]
    assert all(torch.equal(torch.cat(x), y) for x, y in zip(zip(*rows, strict=True), (tokens, labels), strict=True))
    assert tokens.shape == labels.shape == (packed.waste.sequences, seq_len)
    assert tokens.dtype == labels.dtype == torch.int64

    # Within documents each pair of neighbours once; between them the first token after an end of text alone.
    predicted = Counter(zip(tokens.flatten().tolist(), labels.flatten().tolist(), strict=True))
    wanted = Counter(pair for document in documents for pair in itertools.pairwise(document))
    between = {pair: n for pair, n in (predicted - wanted).items() if pair[1] != IGNORE}
    assert predicted & wanted == wanted
    firsts = {document[0] for document in documents if document}
    assert all(token == END and label in firsts for token, label in between)

    # Each is in one sequence, or in as few as its labels need.
    place_of = {int(id_): row for row, ids in enumerate(tokens.tolist()) for id_ in ids if id_ != END}
    cut = 0
    for document in documents:
        shown = {place_of[id_] for id_ in document if id_ in place_of}
        if len(document) <= seq_len + 1:
            assert len(shown) <= 1
        else:
            assert len(shown) == -(-(len(document) - 1) // seq_len)
            cut += 1

    # What an attention that stays within documents sees is of one document.
    of_document = {id_: number for number, document in enumerate(documents) for id_ in document if id_ != END}
    for ids, places in zip(tokens.tolist(), places_of(tokens, END).document_ids.tolist(), strict=True):
        seen: dict[int, set[int]] = {}
        for id_, place in zip(ids, places, strict=True):
            seen.setdefault(place, set()).update({of_document[id_]} if id_ != END else set())
        assert all(len(numbers) <= 1 for numbers in seen.values())

    # The counts of the waste, from the batches and from the windows over all.
    window_of_label = itertools.accumulate(map(len, documents), initial=0)
    by_concat = sum(
        len({(first + i) // seq_len for i in range(len(document) - 1)}) > 1
        for first, document in zip(window_of_label, documents, strict=False)
    )
    count = sum(map(bool, documents))
    overlaps = sum(-(-(len(document) - 1) // seq_len) - 1 for document in documents if len(document) > 1)
    padding = packed.waste.sequences * (seq_len + 1) - file.num_tokens - overlaps
    assert packed.waste[1:] == (padding, int((labels != IGNORE).sum()), count, cut, by_concat)


@anywhere
@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(0, 3))
def test_documents_are_found_by_their_ends(tmp_path: Path, sizes: list[int], rest: int) -> None:
    has_eot = [True] * len(sizes) + [False] * (rest > 0)
    file, borders, _ = write(tmp_path, sizes + [rest] * (rest > 0), has_eot)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "CHUNK_TOKENS", 4)
        ends, ended = find_borders(file._replace(path=file.path), END)
    assert (ends.tolist(), ended.tolist()) == (borders.ends.tolist(), borders.has_eot.tolist())


@pytest.fixture
def packed(tmp_path: Path) -> PackedTokens:
    file, borders, _ = write(tmp_path, [1 + 7 * i % 23 for i in range(60)], [True] * 60)
    made = pack(file, borders, eot_id=END, seq_len=16, fingerprint="a", folder=str(tmp_path / "cache"))
    assert isinstance(made, PackedTokens)
    return made


def loader(packed: PackedTokens, rank: int, degree: int, local: int, workers: int = 0) -> TrainLoader:
    place = {"dp_rank": rank, "dp_degree": degree, "local_batch_size": local}
    batches = WindowBatches(packed, seq_len=16, seed=3, **place)
    return TrainLoader(lambda state: window_loader(batches, workers, torch.device("cpu"), state), "data")


def take(loaders: list[TrainLoader], steps: int, per_step: int) -> list[list[list[int]]]:
    """The sequences of each step, tokens and labels, of all ranks."""
    iterators = [iter(one) for one in loaders]
    batches = [[torch.cat(next(one), 1) for _ in range(per_step) for one in iterators] for _ in range(steps)]
    return [torch.cat(rows).tolist() for rows in batches]


@pytest.mark.parametrize(("degree", "local", "workers"), [(1, 4, 0), (2, 4, 0), (4, 2, 0), (2, 2, 1)])
def test_a_step_has_the_same_sequences_for_any_layout(
    packed: PackedTokens, degree: int, local: int, workers: int
) -> None:
    """And each epoch all of them; a run that goes on reads what it would have read."""
    whole = take([loader(packed, 0, 1, 8)], 12, 1)
    size = packed.waste.sequences
    flat = [tuple(row) for step in whole for row in step]
    assert len(set(flat[:size])) == size
    assert set(flat[size : 2 * size]) == set(flat[:size])
    assert flat[:size] != flat[size : 2 * size]
    ranks = [loader(packed, rank, degree, local, workers) for rank in range(degree)]
    per_step = 8 // (degree * local)
    assert take(ranks, 5, per_step) == whole[:5]
    again = loader(packed, 0, 1, 8)
    again.load_state_dict(ranks[0].state_dict())
    assert take([again], 7, 1) == whole[5:]


def test_a_plan_is_made_once_and_anew_where_it_is_damaged(
    packed: PackedTokens, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    again = {"eot_id": END, "seq_len": 16, "fingerprint": "a", "folder": str(tmp_path / "cache")}
    plan = Path(packed.plan)
    content = plan.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(packing, "_write_plan", None)
        assert pack(packed.tokens, None, **again) == packed
    plan.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="1 damaged"):
        verify_data([str(tmp_path / "cache")])
    assert pack(packed.tokens, None, **again) == packed
    assert plan.read_bytes() == content
    assert verify_data([str(tmp_path / "cache")]) == 0


def test_the_waste_is_told(packed: PackedTokens, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "titan_moe")
    tell_waste("data.path", packed.waste, 16)
    labels = read_windows(packed, list(range(packed.waste.sequences)), 16)[1]
    share = packed.waste.padding / (17 * len(labels))
    assert describe(packed.waste, 16)["padding"] == pytest.approx(share)
    assert (
        f"data.packing best_fit of data.path: {100 * share:.2f} % of {len(labels)} sequences is padding" in caplog.text
    )
    assert "of 60 documents are cut (concat: " in caplog.text
    assert "of the tokens that experts get are padding" not in caplog.text
    tell_waste("data.path", packed.waste._replace(padding=len(labels)), 16)
    assert "6 % of the tokens that experts get are padding" in caplog.text


def make(folder: Path, **options: Any) -> Data:
    defaults: dict[str, Any] = {
        "dataset": "text",
        "tokenizer": "bytes",
        "seq_len": 64,
        "packing": "best_fit",
        "seed": 1,
        "global_batch_size": 8,
        "local_batch_size": 4,
        "validation_fraction": 0.2,
        "validation_local_batch_size": 4,
        "cache_folder": str(folder / "cache"),
    }
    return build_data(**{**defaults, **options})


TEXTS = [f"{index}:" + chr(97 + index % 26) * (index * 7 % 50) for index in range(150)]  # all fit


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def texts_in(batches: Any) -> list[str]:
    """What is between ends of text in each sequence of batches of bytes."""
    texts = []
    for tokens, labels in batches:
        for ids, of_row in zip(tokens.tolist(), labels.tolist(), strict=True):
            # without the padding, which begins after the last label, and with the last label as a token
            size = max(place for place, label in enumerate(of_row) if label != IGNORE) + 2
            texts += "".join("|" if id_ == EOT else chr(id_) for id_ in [*ids, of_row[-1]][:size]).split("|")
    return texts


def test_padding_is_the_sequence_once_more(packed: PackedTokens) -> None:
    tokens, labels = read_windows(packed, list(range(packed.waste.sequences)), 16)
    padded = 0
    for ids, of_row in zip(tokens.tolist(), labels.tolist(), strict=True):
        size = max(place for place, label in enumerate(of_row) if label != IGNORE) + 2
        assert ids[size:] == list(itertools.islice(itertools.cycle(ids[:size]), max(0, 16 - size)))
        padded += max(0, 17 - size)
    assert padded == packed.waste.padding > 0


@pytest.mark.parametrize("kind", ["text", "tokens", "tokens without an end of text"])
def test_whole_documents_from_files_of_each_kind(tmp_path: Path, kind: str) -> None:
    """All of them, once an epoch, on one side, whole; of a plan that the next start finds."""
    eot = [] if kind == "tokens without an end of text" else [EOT]
    if kind == "text":
        path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    else:
        path = write_pair(tmp_path / "a.bin", [[*text.encode(), *eot] for text in [*TEXTS, ""]])
    data = make(tmp_path, path=path)
    assert data.validation is not None
    size = int(data.packing["data.path"]["sequences"])
    sequences = data.train
    trained = texts_in(itertools.islice(iter(sequences), size // 4))
    held_out = texts_in(data.validation())
    assert not set(trained) & set(held_out) - {""}
    assert len(set(trained) & set(TEXTS)) > 100
    assert set(held_out) <= {*TEXTS, ""}
    assert set(trained) <= {*TEXTS, ""}
    assert data.packing["data.path"]["cut_documents"] == 0
    assert data.packing["data.path"]["cut_documents_concat"] > 0.2
    plans = {plan: plan.stat().st_mtime_ns for plan in (tmp_path / "cache").glob("packing-*.npy")}
    assert len(plans) == 2
    again = make(tmp_path, path=path)
    assert again.packing == data.packing
    assert torch.equal(next(iter(again.train))[1], next(iter(make(tmp_path, path=path).train))[1])
    assert {plan: plan.stat().st_mtime_ns for plan in (tmp_path / "cache").glob("packing-*.npy")} == plans


def test_sources_are_packed_each_for_itself(tmp_path: Path) -> None:
    paths = [write_jsonl(tmp_path / f"{part}.jsonl", TEXTS[part::2]) for part in (0, 1)]
    sources = [SourceFiles("even", "text", paths[0], 1.0), SourceFiles("odd", "text", paths[1], 3.0)]
    data = make(tmp_path, sources=sources, steps=4, path=())
    assert set(data.packing) == {"data.sources.even", "data.sources.odd"}
    for tokens, labels in itertools.islice(iter(data.train), 8):
        for pair in zip(tokens, labels, strict=True):
            of_row = {int(text.split(":")[0]) % 2 for text in texts_in([tuple(x[None] for x in pair)]) if ":" in text}
            assert len(of_row) == 1
    given = data.train.state_dict()["sources"]
    assert (given["even"]["given"], given["odd"]["given"]) == (8, 24)


def test_a_validation_set_is_packed_too(tmp_path: Path) -> None:
    tokenizer = make(tmp_path, path=write_jsonl(tmp_path / "a.jsonl", TEXTS)).tokenizer
    options = {"tokenizer": tokenizer, "seq_len": 64, "packing": "best_fit", "cache_folder": str(tmp_path / "cache")}
    for path in (tmp_path / "a.jsonl", write_pair(tmp_path / "a.bin", [[*text.encode(), EOT] for text in TEXTS])):
        held_out = build_validation(path=str(path), local_batch_size=4, **options)
        assert sorted(filter(None, texts_in(held_out.batches()))) == sorted(TEXTS)


def test_what_can_be_wrong(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(ValueError, match=r"data.packing \(bestfit\): there are concat and best_fit"):
        make(tmp_path, path=path, packing="bestfit")
    with pytest.raises(ValueError, match=r"data.packing \(best_fit\) needs to know all documents, and .* fineweb_edu"):
        make(tmp_path, dataset="fineweb_edu", path=())
    with pytest.raises(ValueError, match=r"training.seq_len \(9999\) is longer than the data of data.path"):
        make(tmp_path, path=path, seq_len=9999)


def test_concat_is_as_before(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = make(tmp_path, path=path, packing="concat")
    tokens, labels = next(iter(data.train))
    assert data.packing == {}
    assert torch.equal(tokens[:, 1:], labels[:, :-1])
    assert not [*(tmp_path / "cache").glob("packing-*")]
    assert (
        data.train.state_dict()["fingerprint"] + "_best_fit"
        == (make(tmp_path, path=path).train.state_dict()["fingerprint"])
    )
