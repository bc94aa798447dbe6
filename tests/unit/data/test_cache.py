import json
import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from titan_moe.data import cache, corpus, sources
from titan_moe.data.cache import TokenCache, TokenFile, build_cache
from titan_moe.data.corpus import Corpus, corpus_tokenizer, make_corpus
from titan_moe.data.hub import HUB_ENDPOINT
from titan_moe.data.processes import run_parallel, watch
from titan_moe.data.storage import write_sealed
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.data.verify import verify_data

TEXTS = [f"document {index}: {'words and more ' * (index % 13)}ä" for index in range(400)]


def write_jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def build(files: list[str], folder: Path, *, validation: list[str] | None = None, fraction: float = 0.2) -> TokenCache:
    return build_cache(make(files, folder, validation=validation, fraction=fraction), bytes_tokenizer(), str(folder))


def make(files: list[str], folder: Path, *, validation: list[str] | None = None, fraction: float = 0.2) -> Corpus:
    return make_corpus(files, validation or [], fraction=0.0 if validation else fraction, folder=str(folder))


def texts_of(file: cache.TokenFile) -> list[str]:
    ids = np.array(file.tokens())
    return [bytes(part[:-1].tolist()).decode() for part in np.split(ids, np.flatnonzero(ids == 256) + 1)[:-1]]


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MIN_SHARD", 4096)


@pytest.mark.usefixtures("small_shards")
def test_every_document_is_on_one_side_in_order_whatever_the_number_of_processes(tmp_path: Path) -> None:
    data = make([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path)
    assert len(data.train) > 5
    built = [build_cache(data, bytes_tokenizer(), str(tmp_path / str(n)), num_processes=n) for n in (1, 3)]
    train, validation = texts_of(built[0].train), texts_of(built[0].validation)
    assert sorted(train + validation) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 40 < len(validation) < 120
    assert (texts_of(built[1].train), texts_of(built[1].validation)) == (train, validation)
    assert built[0].num_documents == {"train": len(train), "validation": len(validation)}
    assert built[0].num_bytes["validation"] == sum(len(text.encode()) for text in validation)


def test_the_split_is_by_content_alone(tmp_path: Path) -> None:
    first = build([write_jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "1")
    other = build([write_jsonl(tmp_path / "b.jsonl", ["new", *reversed(TEXTS), *TEXTS])], tmp_path / "2")
    assert set(texts_of(first.validation)) == set(texts_of(other.validation)) - {"new"}
    assert not set(texts_of(other.validation)) & set(texts_of(other.train))
    assert len(texts_of(other.validation)) >= 2 * len(texts_of(first.validation))


def test_validation_files_are_held_out_whole_and_their_copies_dropped(tmp_path: Path) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", TEXTS)
    held_out = write_jsonl(tmp_path / "validation.jsonl", [*TEXTS[50:90], "only here"])
    built = build([train], tmp_path / "cache", validation=[held_out])
    assert texts_of(built.validation) == [*TEXTS[50:90], "only here"]
    assert texts_of(built.train) == TEXTS[:50] + TEXTS[90:]


def test_fingerprint_follows_content_and_split_not_names_or_times(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = make([path], tmp_path).fingerprint
    os.utime(path, (1, 1))
    os.rename(path, tmp_path / "b.jsonl")
    assert make([str(tmp_path / "b.jsonl")], tmp_path).fingerprint == first
    assert make([str(tmp_path / "b.jsonl")], tmp_path, fraction=0.3).fingerprint != first
    changed = (tmp_path / "b.jsonl").read_text().replace("document 7:", "document 8:")
    (tmp_path / "b.jsonl").write_text(changed)
    os.utime(tmp_path / "b.jsonl", (1, 1))  # the same size and time as before
    assert make([str(tmp_path / "b.jsonl")], tmp_path).fingerprint != first


def test_remembered_hashes_of_big_files_notice_a_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MEMO_BYTES", 1)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = make([path], tmp_path).fingerprint
    assert (tmp_path / "file_hashes.json").exists()
    monkeypatch.setattr(corpus.hashlib, "blake2b", None)  # not hashed again
    assert make([path], tmp_path).fingerprint == first
    monkeypatch.undo()
    monkeypatch.setattr(corpus, "MEMO_BYTES", 1)
    stat = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(20)
        file.write(b"#")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert make([path], tmp_path).fingerprint != first


def test_a_cache_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    built = build([path], tmp_path)
    monkeypatch.setattr(cache, "run_parallel", None)
    assert build([path], tmp_path) == built


def flip(path: Path, at: int = 100) -> None:
    """Change one bit of a file and set its times as they were, as far as that can be."""
    stat = os.stat(path)
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


DAMAGES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "shorter": ("train.bin", lambda path: os.truncate(path, 100)),
    "gone": ("validation.bin", Path.unlink),
    "flipped id": ("train.bin", flip),
    "flipped id of validation": ("validation.bin", flip),
    "half meta": ("meta.json", lambda path: os.truncate(path, 10)),
    "flipped count": ("meta.json", lambda path: flip(path, path.read_text().index('"num_documents": {"train": ') + 27)),
    "binary meta": ("meta.json", lambda path: path.write_bytes(bytes(range(128, 256)))),
    "no keys": ("meta.json", lambda path: path.write_text("{}")),
    "no table": ("meta.json", lambda path: path.write_text("[1, 2]")),
    "nested meta": ("meta.json", lambda path: path.write_text("[" * 200_000)),
    "odd type": ("meta.json", lambda path: path.write_text('{"dtype": "no", "num_tokens": {"train": 1}}')),
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_built_again_with_a_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    built = build([path], tmp_path)
    home = Path(built.train.path).parent
    right = {name: (home / name).read_bytes() for name in ("train.bin", "validation.bin", "meta.json")}
    name, do = DAMAGES[damage]
    do(home / name)
    assert build([path], tmp_path) == built
    assert {name: (home / name).read_bytes() for name in right} == right
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{home / name} is damaged: ")
    assert warnings[0].endswith(": it is made anew")


def test_a_cache_without_its_meta_is_unfinished(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    built = build([path], tmp_path)
    Path(built.train.path).with_name("meta.json").unlink()
    assert build([path], tmp_path) == built
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_tokens_are_read_for_their_checksums_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    built = build([path], tmp_path)
    monkeypatch.setattr(cache, "_crc32s", None)  # compared when it was built
    assert build([path], tmp_path) == built
    os.rename(built.train.path, tmp_path / "moved")
    shutil.copy2(tmp_path / "moved", built.train.path)  # the same times, another inode
    with pytest.raises(TypeError):
        build([path], tmp_path)
    monkeypatch.undo()
    assert build([path], tmp_path) == built
    monkeypatch.setattr(cache, "_crc32s", None)
    assert build([path], tmp_path) == built


@pytest.mark.usefixtures("small_shards")
def test_a_cache_of_an_earlier_version_gets_checksums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "PIECE_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    built = build([path], tmp_path)
    home = Path(built.train.path).parent
    content = json.loads((home / "meta.json").read_text())
    assert len(content.pop("checksums")["train"]) > 5  # of parts
    del content["crc32"]
    (home / "meta.json").write_text(json.dumps(content))
    (home / "checked.json").unlink()
    monkeypatch.setattr(cache, "run_parallel", None)
    assert build([path], tmp_path) == built
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    monkeypatch.undo()
    flip(home / "train.bin", 1500)
    assert build([path], tmp_path) == built
    assert "train.bin is damaged: bytes 1000 to 2000 do not have their checksum: it is made anew" in caplog.text


def test_a_cache_that_can_only_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    built = build([path], tmp_path)
    home = Path(built.train.path).parent
    (home / "checked.json").unlink()

    def refuse(path: Path, _: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cache, "write_sealed", refuse)
    assert build([path], tmp_path) == built
    flip(home / "train.bin")
    with pytest.raises(OSError, match=r"cache_folder .*Permission denied: make it writable or choose another"):
        build([path], tmp_path)


def test_a_disk_that_gives_back_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_crc32s", lambda pieces: ["00000000"] * len(pieces))
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with pytest.raises(OSError, match=r"cache_folder .*what was just written there is read back as something else"):
        build([path], tmp_path)


@pytest.mark.parametrize("content", ["", "[1]", '{"crc32": "0"}', '"', "\0\0"])
def test_damaged_hashes_of_files_are_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    monkeypatch.setattr(corpus, "MEMO_BYTES", 1)
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    first = make([path], tmp_path).fingerprint
    memo = tmp_path / "file_hashes.json"
    right = memo.read_bytes()
    memo.write_text(content)
    assert make([path], tmp_path).fingerprint == first
    assert memo.read_bytes() == right
    assert [record.getMessage().partition(" is damaged")[0] for record in caplog.records] == [str(memo)]


@pytest.mark.slow
def test_damaged_tokenizers_and_splits_are_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train, held_out = (write_jsonl(tmp_path / f"{n}.jsonl", TEXTS[n::2]) for n in (0, 1))
    folder = tmp_path / "cache"

    def fill() -> dict[str, bytes]:
        data = make([train], folder, validation=[held_out])
        corpus_tokenizer("bpe:280", data, str(folder), HUB_ENDPOINT)
        corpus.make_split(data, str(folder))
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".json", ".npy")}

    right = fill()
    assert {name.partition("-")[0] for name in right} == {"bpe", "held"}
    for name in right:
        flip(folder / name, 200)
    assert fill() == right
    damaged = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert sorted(damaged) == sorted(
        f"{folder / name} is damaged: it does not have its checksum: it is made anew" for name in right
    )
    caplog.clear()
    for path in folder.glob("*.crc32"):  # as an earlier version left it
        path.unlink()
    assert fill() == right
    assert not [record for record in caplog.records if record.levelname == "WARNING"]
    assert len(list(folder.glob("*.crc32"))) == len(right)


def test_verify_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    folder = tmp_path / "cache"
    data = make([path], folder)
    built = build_cache(data, corpus_tokenizer("bpe:280", data, str(folder), HUB_ENDPOINT), str(folder))
    assert verify_data([str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.endswith("intact") for line in lines)
    assert verify_data([str(Path(built.train.path).parent)]) == 0
    flip(Path(built.train.path))  # remembered as checked all the same: a disk that rots changes no times
    write_sealed(
        Path(built.train.path).parent / "checked.json",
        {name: cache._identity(Path(getattr(built, name).path)) for name in cache.SPLITS},
    )
    assert cache.open_cache(Path(built.train.path).parent) == built
    flip(next(folder.glob("bpe-*.json")))
    capsys.readouterr()
    with pytest.raises(ValueError, match=r"^2 damaged: "):
        verify_data([str(folder)])
    assert capsys.readouterr().out.count(" is damaged: ") == 2
    build_cache(data, corpus_tokenizer("bpe:280", data, str(folder), HUB_ENDPOINT), str(folder))
    assert verify_data([str(folder)]) == 0  # the next run has made both anew
    with pytest.raises(ValueError, match="no such folder"):
        verify_data([str(tmp_path / "no")])
    with pytest.raises(ValueError, match="no token cache in it"):
        verify_data([str(folder / "..")])


BUILD = """
import sys
from titan_moe.data import sources
sources.MIN_SHARD = 1 << 16
from titan_moe.data.cache import build_cache
from titan_moe.data.corpus import make_corpus
from titan_moe.data.tokenizer import bytes_tokenizer
corpus = make_corpus([sys.argv[1]], fraction=0.2, folder=sys.argv[2])
print(build_cache(corpus, bytes_tokenizer(), sys.argv[2], num_processes=1))
"""


def start(path: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", BUILD, path, str(folder)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_a_killed_build_is_resumed_and_two_at_once_agree(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 60)
    folder = tmp_path / "cache"
    with start(path, folder) as killed:
        until = time.monotonic() + 30
        while not (done := list(folder.glob("*/parts/0*.json"))) or len(done) < 2:
            assert time.monotonic() < until
            assert killed.poll() is None, "the build ended before it could be killed"
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    home = done[0].parent.parent
    assert not (home / "meta.json").exists()
    assert not (home / "train.bin").exists()
    finished = {part: part.stat().st_mtime_ns for part in home.glob("parts/0*.json")}
    with start(path, folder) as one, start(path, folder) as two:
        seen: dict[Path, int] = {}
        while one.poll() is None or two.poll() is None:
            for part in finished:
                if part.exists():
                    seen[part] = part.stat().st_mtime_ns
            time.sleep(0.005)
        outputs = [process.communicate()[0] for process in (one, two)]
    assert one.returncode == two.returncode == 0
    assert outputs[0] == outputs[1]
    assert seen
    assert seen.items() <= finished.items()  # not one of them was done again
    sizes = {name: os.path.getsize(home / f"{name}.bin") for name in ("train", "validation")}
    clean = build([path], tmp_path / "clean")
    assert {name: os.path.getsize(getattr(clean, name).path) for name in sizes} == sizes
    rebuilt = cache.TokenFile(str(home / "train.bin"), "uint16", sizes["train"] // 2)
    assert sorted(texts_of(rebuilt)) == sorted(texts_of(clean.train))
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_build_that_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS * 60)
    folder, clean = tmp_path / "cache", build_all(path, tmp_path / "clean")
    num_kills, done = 0, 0

    # Each start is killed when it has one part more than the one before, the last ones while parts are joined.
    for wait in (0.0, 0.01, 0.02, 0.05, 0.0, 0.01, 0.1, 0.0, 0.02, 0.0, 0.0, 0.0):
        with start(path, folder) as process:
            while process.poll() is None and len(list(folder.glob("*/parts/0*.json"))) <= done:
                time.sleep(0.001)
            time.sleep(wait)
            num_kills += process.poll() is None
            process.kill()
        before, done = done, len(list(folder.glob("*/parts/0*.json")))
        if list(folder.glob("*/meta.json")):
            break
        assert done >= before  # what was finished stays
    assert num_kills >= 5
    assert build_all(path, folder) == clean
    assert not list(folder.rglob("*.tmp"))
    assert not list(folder.rglob("parts"))


def build_all(path: str, folder: Path) -> dict[str, bytes]:
    with start(path, folder) as process:
        assert process.wait(60) == 0
    home = next(folder.glob("*/meta.json")).parent
    return {name: (home / name).read_bytes() for name in ("train.bin", "validation.bin", "meta.json")}


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """No file may grow beyond 4 KiB: what a full disk looks like to whoever writes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_one_clear_line_and_leaves_nothing_half_written(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    request.getfixturevalue("tiny_disk")
    with pytest.raises(OSError, match=r"cache_folder \(.*\): .*: free some space there or choose another") as caught:
        build([path], tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").glob("*/*.bin"))


@pytest.mark.usefixtures("small_shards")
def test_a_disk_that_fills_up_loses_nothing_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "titan_moe")
    folder = tmp_path / "cache"
    other = build([write_jsonl(tmp_path / "other.jsonl", TEXTS[:50])], folder)
    texts = [*TEXTS, "a document that is larger than what is left of the disk" * 200]
    path = write_jsonl(tmp_path / "a.jsonl", texts)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, hard))
    try:
        with pytest.raises(
            OSError, match=r"cache_folder \(.*\): .*: free some space there or choose another"
        ) as caught:
            build([path], folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "\n" not in str(caught.value)
    parts = list(folder.glob("*/parts/0*.json"))
    assert len(parts) >= 3
    assert build([str(tmp_path / "other.jsonl")], folder) == other
    caplog.clear()
    assert sorted(texts_of(build([path], folder).train)) == sorted(texts_of(build([path], tmp_path / "2").train))
    todo, total = (int(caplog.messages[0].split(": ")[1].split()[index]) for index in (0, 2))
    assert todo == total - len(parts)


def test_an_unwritable_folder_is_one_clear_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"cache_folder \(.*/file/cache\): Not a directory: make it writable or choose"):
        build([path], tmp_path / "file" / "cache")


def test_errors_of_the_data_come_back_from_the_workers(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\noops\n')
    with pytest.raises(ValueError, match=r"a.jsonl:2: not JSON"):
        build([str(tmp_path / "a.jsonl")], tmp_path)


def test_documents_without_a_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [json.dumps({"text": text}) for text in ("one", None, "", "two", None)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    with caplog.at_level(logging.WARNING, "titan_moe"):
        built = build([str(tmp_path / "a.jsonl")], tmp_path, fraction=0.0)
    assert texts_of(built.train) == ["one", "two"]
    assert caplog.messages == ["2 documents without a text (null) are left out"]


def test_empty_data_are_an_error(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match=r"data.path: no data: .*a.txt is empty, and 1 more"):
        build([str(tmp_path / "a.txt"), str(tmp_path / "b.txt")], tmp_path)


def test_a_bpe_is_trained_on_training_documents_only_and_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [f"common words {i}" for i in range(200)])
    secret = write_jsonl(tmp_path / "b.jsonl", ["zqxzqxzqxzqx" * 50])
    data = make([path, secret], tmp_path / "cache", validation=[secret])
    tokenizer = corpus_tokenizer("bpe:280", data, str(tmp_path / "cache"), HUB_ENDPOINT)
    assert tokenizer.vocab_size == 280
    assert len(tokenizer.encode("common words")) <= 3
    assert len(tokenizer.encode("zqxzqx")) == 6
    kept = next((tmp_path / "cache").glob("bpe-280-*.json"))
    before = kept.stat().st_mtime_ns
    assert corpus_tokenizer("bpe:280", data, str(tmp_path / "cache"), HUB_ENDPOINT)[1:] == tokenizer[1:]
    assert kept.stat().st_mtime_ns == before


def test_progress_has_tokens_a_second_and_the_time_left(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of two files of 1000 bytes each: the first is 1000 bytes for 500 of text, so 250 more are a half of the other."""
    now = [0.0]
    monkeypatch.setattr(cache.time, "monotonic", lambda: now[0])
    monkeypatch.setattr("titan_moe.runtime.progress.LOG_SECONDS", 0.0)
    caplog.set_level(logging.INFO, "titan_moe")

    def told() -> Iterator[cache._Told]:
        for news in ((250, 40), (250, 40), (0, 0, 1000, 500), (250, 20)):
            now[0] += 10.0
            yield cache._Told(*news)

    for ending in (".jsonl", ".jsonl.gz"):
        caplog.clear()
        now[0] = 0.0
        jobs = [cache._Job((sources.Piece(f"{n}{ending}", "jsonl", size=1000),), None, "", "") for n in "ab"]
        cache._show_progress(told(), jobs, jobs, True)
        assert caplog.messages[3] == "tokenizing: 75%, 0 MB of text, 2 tokens/s, " + (
            "0:00:12 left" if ending == ".jsonl" else "0:00:10 left"
        )
        known = [text.partition("%")[0] for text in caplog.messages[:3]]
        begun = (
            ["tokenizing: 12", "tokenizing: 25"] if ending == ".jsonl" else ["tokenizing: 0 MB of text, 4 tokens/s"] * 2
        )
        assert known == [*begun, "tokenizing: 50"]


def test_the_training_of_a_bpe_tells_its_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make([write_jsonl(tmp_path / "a.jsonl", [*TEXTS * 200])], tmp_path)
    path = str(tmp_path / "bpe.json")
    told = list(run_parallel(corpus.train_bpe_file, [(data, corpus.Split(0.0), 400, path)]))
    stages = list(dict.fromkeys(news["stage"] for news in told))
    assert stages[0] == "Read text"
    assert stages[-1] == "Compute merges"
    assert told[0]["current"] > 0
    assert told[-1]["current"] == told[-1]["total"] <= 400
    assert json.loads(Path(path).read_text())["model"]["type"] == "BPE"


def speak(item: int) -> Iterator[object]:
    """Write to standard error what is progress and what is not."""

    def work() -> str:
        for number in range(3):
            os.write(2, b'{"number": %d}\n' % number)
        os.write(2, b"a warning\n")
        return "result"

    yield (yield from watch(work))
    os.write(2, b"afterwards\n")


def fail(item: int) -> Iterator[object]:
    """Fail while its standard error is read."""
    yield from watch(lambda: int("no number"))


def test_what_a_library_writes_to_standard_error_is_told(capfd: pytest.CaptureFixture[str]) -> None:
    assert list(run_parallel(speak, [1])) == [{"number": 0}, {"number": 2}, "result"]
    assert capfd.readouterr().err == "a warning\nafterwards\n"
    with pytest.raises(ValueError, match="no number"):
        list(run_parallel(fail, [1]))


def crash(item: int) -> Iterator[int]:
    """Take itself down as the kernel does when memory runs out."""
    yield item
    os.kill(os.getpid(), signal.SIGKILL)


def fault(item: int) -> Iterator[int]:
    """Make a mistake of ours."""
    yield item
    raise KeyError("ours")


@pytest.mark.slow
def test_workers_that_die_or_fail_are_reported() -> None:
    with pytest.raises(RuntimeError, match=r"ended early \(exit code -9\): was it short of memory"):
        list(run_parallel(crash, [1, 2]))
    with pytest.raises(RuntimeError, match=r"(?s)in a data worker:.*KeyError: 'ours'"):
        list(run_parallel(fault, [1]))


def in_memory(path: Path) -> int:
    """The bytes of a file that this process has mapped and read."""
    lines = iter(Path("/proc/self/smaps").read_text().splitlines())
    sizes = (next(line for line in lines if line.startswith("Rss:")) for head in lines if head.endswith(str(path)))
    return sum(int(size.split()[1]) << 10 for size in sizes)


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="Linux tells what of a map is in memory")
@pytest.mark.parametrize("size", [1 << 10, 1 << 18], ids=["all over", "from end to end"])
def test_what_is_read_of_a_map_does_not_pile_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    path, num_tokens = tmp_path / "large.bin", 1 << 25
    with path.open("wb") as hole:
        hole.truncate(2 * num_tokens)
    file, starts = TokenFile(str(path), "uint16", num_tokens), range(0, num_tokens, 1 << 18)
    most = []
    for limit in (1 << 22, 1 << 62):
        monkeypatch.setattr(cache, "MAPPED_TOKENS", limit)
        sizes = [in_memory(path) for start in starts if not file.read(start, start + size).any()]
        assert len(sizes) == len(starts)
        most.append(max(sizes))
    assert most[0] < 2 * num_tokens / 2
    assert most[1] > 2 * most[0]
