import gzip
import itertools
import json
import logging
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from titan_moe.data import hub, stream
from titan_moe.data.corpus import Split, document_hash
from titan_moe.data.hub import HubDataset, find_dataset
from titan_moe.data.loader import TrainLoader, make_loader, merge_states
from titan_moe.data.stream import Cursor, LaneBatches, check_lanes, read_blocks, sample_stream
from titan_moe.data.tokenizer import bytes_tokenizer

SEQ_LEN, GLOBAL, FRACTION = 16, 6, 0.2
TEXTS = [f"<{index}{'.' * (index * 7 % 60)}>" for index in range(100)]
HELD_OUT = {text for text in TEXTS if document_hash(text.encode()) < FRACTION * 2**64}
Rows = list[list[int]]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "BLOCK", 16)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> HubDataset:
    folder = tmp_path_factory.mktemp("stream")
    for part in range(4):
        rows = [json.dumps({"text": text, "other": 1}) for text in TEXTS[part * 25 : (part + 1) * 25]]
        (folder / f"part{part}.jsonl").write_text("\n".join(rows) + "\n")
    return find_dataset(str(folder))


def make(dataset: HubDataset, rank: int = 0, degree: int = 1, local: int = GLOBAL, *, workers: int = 0) -> TrainLoader:
    def loader(state: dict[str, Any]) -> Any:
        check_lanes(state, GLOBAL)
        batches = LaneBatches(
            dataset,
            bytes_tokenizer().files,
            Split(FRACTION),
            seq_len=SEQ_LEN,
            seed=3,
            global_batch_size=GLOBAL,
            local_batch_size=local,
            dp_rank=rank,
            dp_degree=degree,
            state=state,
        )
        return make_loader(batches, workers, torch.device("cpu"))

    return TrainLoader(loader, "data")


def take(train: TrainLoader, count: int) -> list[Rows]:
    found = []
    for tokens, labels in itertools.islice(iter(train), count):
        assert tokens[:, 1:].equal(labels[:, :-1])
        found.append([[*row, last] for row, last in zip(tokens.tolist(), labels[:, -1].tolist(), strict=True)])
    return found


@pytest.fixture(scope="module")
def whole(dataset: HubDataset) -> list[Rows]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream, "BLOCK", 16)
        return take(make(dataset), 60)  # almost two epochs


def test_lanes_pack_all_training_documents_and_nothing_else(whole: list[Rows]) -> None:
    texts: list[str] = []
    for lane in range(GLOBAL):
        ids = [token for step in whole for token in step[lane][:-1]]
        assert all(step[lane][-1] == after[lane][0] for step, after in itertools.pairwise(whole))
        documents = "".join("|" if token == 256 else chr(token) for token in ids).split("|")
        texts += documents[:-1]  # the last one is cut off
    assert set(texts) == set(TEXTS) - HELD_OUT
    assert 10 < len(HELD_OUT) < 30
    order = [text for text in texts if texts.count(text) == 1]
    assert [TEXTS.index(text) for text in order] != sorted(TEXTS.index(text) for text in order)


@pytest.mark.parametrize(("degree", "local"), [(1, 2), (2, 3), (3, 1)])
def test_a_global_batch_is_the_same_for_every_layout(
    dataset: HubDataset, whole: list[Rows], degree: int, local: int
) -> None:
    steps, parts = 40, GLOBAL // (local * degree)
    ranks = [take(make(dataset, rank, degree, local), steps * parts) for rank in range(degree)]
    flat = [row for index in range(steps * parts) for batches in ranks for row in batches[index]]
    assert [flat[start : start + GLOBAL] for start in range(0, len(flat), GLOBAL)] == whole[:steps]


@pytest.mark.parametrize(("before", "after", "steps"), [(0, 0, 1), (0, 1, 17), (1, 0, 23), (0, 0, 45)])
def test_resume_is_exact(dataset: HubDataset, whole: list[Rows], before: int, after: int, steps: int) -> None:
    first = make(dataset, workers=before)
    assert take(first, steps) == whole[:steps]
    state = json.loads(json.dumps(first.state_dict()))  # plain data
    second = make(dataset, workers=after)
    second.load_state_dict(state)
    assert take(second, 10) == whole[steps : steps + 10]


def test_resume_on_another_world_size(dataset: HubDataset, whole: list[Rows]) -> None:
    states = []
    for rank in range(3):
        train = make(dataset, rank, 3, 1)
        take(train, 2 * 21)
        states.append(train.state_dict())
    merged = merge_states(states)
    assert len(merged["lanes"]) == GLOBAL
    assert merged["cursor"]["document"] <= min(document for document, _ in merged["lanes"].values())
    for rank in range(2):
        train = make(dataset, rank, 2, 3)
        train.load_state_dict(merged)
        assert take(train, 8) == [rows[rank * 3 : rank * 3 + 3] for rows in whole[21:29]]


def test_resume_of_a_resume_is_exact(dataset: HubDataset, whole: list[Rows]) -> None:
    """The second one, too, goes on where the first one came to (datasets 5.0.0 begins anew)."""
    state: dict[str, Any] = {}
    for start in (0, 17, 34):
        train = make(dataset)
        if state:
            train.load_state_dict(state)
        assert take(train, 17) == whole[start : start + 17]
        state = json.loads(json.dumps(train.state_dict()))


def test_a_version_that_forgets_its_place_is_refused(dataset: HubDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub.metadata, "version", lambda name: "5.0.0")
    with pytest.raises(ValueError, match=r"datasets 5.0.0 loses its place .* install another version \(pip install"):
        find_dataset(dataset.path)


def test_rows_without_a_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": None if index % 3 else f"<{index}>"} for index in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = find_dataset(str(tmp_path))
    with caplog.at_level(logging.WARNING, "titan_moe"):
        blocks = read_blocks(source, Cursor(), bool)
        assert [text for _, texts in itertools.islice(blocks, 1) for text in texts] == [
            f"<{i}>" for i in range(0, 30, 3)
        ]
    ends = [int(message.rsplit(" ", 1)[1]) for message in caplog.messages]
    assert ends == [1, 2, 4, 8, 16]
    assert caplog.messages[0] == f"data.path ({tmp_path}): rows without a text (null) left out so far: 1"


def test_resume_does_not_read_what_lies_before(dataset: HubDataset) -> None:
    train = make(dataset)
    take(train, 20)
    cursor = Cursor(**train.state_dict()["cursor"])
    assert cursor.block > 0
    _, texts = next(read_blocks(dataset, cursor, lambda text: True))
    assert texts == TEXTS[16 * cursor.block : 16 * (cursor.block + 1)]


def test_another_global_batch_size_cannot_resume(dataset: HubDataset) -> None:
    train = make(dataset)
    take(train, 1)
    with pytest.raises(ValueError, match=r"global_batch_size \(7\): the saved position in the stream is of 6"):
        check_lanes(train.state_dict(), 7)


def test_a_sample_is_the_first_documents_of_its_side(dataset: HubDataset, tmp_path: Path) -> None:
    sample = partial(sample_stream, dataset, fraction=FRACTION, folder=str(tmp_path / "cache"), progress=False)
    path = sample("validation", num_bytes=10**6)
    assert [json.loads(line)["text"] for line in Path(path).read_text().splitlines()] == [
        text for text in TEXTS if text in HELD_OUT
    ]
    lines = Path(sample("train", num_bytes=100)).read_text().splitlines()
    short = [json.loads(line)["text"] for line in lines]
    assert short == [text for text in TEXTS if text not in HELD_OUT][: len(short)]
    assert 100 <= sum(map(len, short)) < 160
    with pytest.raises(ValueError, match="leaves no validation document"):
        sample_stream(dataset, "validation", fraction=1e-9, num_bytes=9, folder=str(tmp_path), progress=False)
    assert not list(tmp_path.glob("*.jsonl*tmp*"))


def test_a_stream_without_training_documents_is_an_error(dataset: HubDataset) -> None:
    with pytest.raises(ValueError, match="no training documents in the whole stream"):
        list(itertools.islice(read_blocks(dataset, Cursor(), lambda text: False), 100))


def test_a_stream_without_text_names_its_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"body": "x", "id": 1}\n')
    with pytest.raises(ValueError, match=r"no strings in a column 'text' \(columns: body, id\)"):
        next(read_blocks(find_dataset(str(tmp_path)), Cursor(), bool))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("deep.jsonl", b'{"text": "a", "n": ' + b"[" * 5000 + b"]" * 5000 + b"}\n"),
        ("latin.jsonl", b'{"text": "\xe9"}\n'),
        ("late.jsonl", b'{"text": "a"}\n' * 99999 + b"{"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n', mtime=0)[:-10]),
    ],
)
def test_what_cannot_be_streamed_is_one_line(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    source = find_dataset(str(tmp_path))
    with pytest.raises(ValueError, match=r"^data.path \(.*\): cannot be streamed \(\w+: [^\n]*; or use local files"):
        list(source.texts(source.open()))


def test_a_folder_without_data_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data.path \(.*\): .*; or use local files instead: --data.dataset text"):
        next(read_blocks(find_dataset(str(tmp_path)), Cursor(), bool))


def test_the_hub_out_of_reach_is_told_at_once() -> None:
    with pytest.raises(OSError, match=r"can't be reached .*: use local files instead: --data.dataset text --data.path"):
        find_dataset(hub.FINEWEB_EDU, endpoint="http://127.0.0.1:9")


def test_a_hub_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        start = time.monotonic()
        with pytest.raises(OSError, match=r"can't be reached \(.*\): do this"):
            hub.check_hub(f"http://127.0.0.1:{silent.getsockname()[1]}", "do this", timeout=0.3)
        assert time.monotonic() - start < 3


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install titan_moe\[hub\]"):
        find_dataset(hub.FINEWEB_EDU)


def test_names_that_are_no_data_set() -> None:
    with pytest.raises(ValueError, match=r"data.path \(a/b/c\): data.dataset hf needs a data set of the hub"):
        find_dataset("a/b/c")
