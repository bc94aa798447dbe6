import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from titan_moe.data import hub
from titan_moe.data.build import token_bytes
from titan_moe.data.tokenizer import (
    Tokenizer,
    bpe_vocab_size,
    bytes_tokenizer,
    load_tokenizer,
    tokenizer_from_files,
    train_bpe,
)

TEXTS = ["the cat sat on the mat\n", "Grüße, 世界 \U0001f600!  \t indented\n\n", "end<|endoftext|>not", "a\x00b"]


def from_json(content: str) -> Tokenizer:
    return tokenizer_from_files({"tokenizer.json": content})


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return bytes_tokenizer() if request.param == "bytes" else train_bpe(TEXTS * 5, 300)


def test_round_trip_never_reads_special_tokens_out_of_text(tokenizer: Tokenizer) -> None:
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.eot_id not in ids
        assert max(ids) < tokenizer.vocab_size
        assert tokenizer.encode_document(text).tolist() == [*ids, tokenizer.eot_id]


def test_token_bytes_sum_to_the_utf8_length(tokenizer: Tokenizer) -> None:
    lengths = token_bytes(tokenizer)
    assert lengths.shape == (tokenizer.vocab_size,)
    assert lengths[tokenizer.eot_id] == 0
    for text in TEXTS:
        assert lengths[tokenizer.encode(text)].sum() == len(text.encode())


def test_json_keeps_everything(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        again = load_tokenizer(str(name))
        assert again[1:] == tokenizer[1:]
        assert list(map(again.encode, TEXTS)) == list(map(tokenizer.encode, TEXTS))


def test_bytes_ids_are_bytes() -> None:
    tokenizer = load_tokenizer("bytes")
    assert tokenizer.encode("aé") == [97, 195, 169]
    assert (tokenizer.vocab_size, tokenizer.eot_id, tokenizer.dtype.name) == (257, 256, "uint16")


def test_bpe_is_the_same_every_time_and_of_the_size_asked() -> None:
    texts = [f"sentence number {i} says {'so ' * (i % 7)}" for i in range(300)]
    first, second = train_bpe(texts, 350), train_bpe(iter(texts), 350)
    assert first.fingerprint == second.fingerprint
    assert first.vocab_size == 350
    assert train_bpe(texts[:200], 300).fingerprint != first.fingerprint


def sentencepiece_like(eot: str) -> str:
    vocab = {"<unk>": 0, eot: 1, "▁": 2, "a": 3, "▁a": 4, "<0xC3>": 5, "<0xA9>": 6}
    backend = Backend(models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")  # pyrefly: ignore
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="never")])  # pyrefly: ignore
    backend.add_special_tokens([eot])
    backend.enable_truncation(2)
    return backend.to_str()


def test_sentencepiece_like_tokenizers() -> None:
    tokenizer = from_json(sentencepiece_like("</s>"))
    ids = tokenizer.encode("a aé a")
    assert ids == [3, 4, 5, 6, 4]  # more than the two that the file's own truncation leaves
    assert token_bytes(tokenizer)[ids].sum() == len("a aé a".encode())
    assert tokenizer.eot_id == 1


def test_bits_per_byte_need_a_tokenizer_that_keeps_bytes() -> None:
    backend = Backend(models.WordLevel({"a": 0, "[EOS]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyrefly: ignore
    with pytest.raises(
        ValueError, match="bits per byte and texts of tokens need a byte-level or sentencepiece tokenizer"
    ):
        token_bytes(from_json(backend.to_str()))


def test_vocab_size_counts_up_to_the_largest_id() -> None:
    backend = Backend(models.WordLevel({"a": 0, "[EOS]": 9, "[UNK]": 400}, unk_token="[UNK]"))
    assert from_json(backend.to_str())[1:3] == (401, 9)


def test_a_tokenizer_without_end_of_text_is_an_error() -> None:
    message = (
        r"x.json: no end-of-text token: .* has none of <\|endoftext\|>, .*</s>.*; name its own with data.eot_token$"
    )
    with pytest.raises(ValueError, match=message):
        tokenizer_from_files({"tokenizer.json": sentencepiece_like("</end>")}, "x.json")


@pytest.mark.parametrize("name", ["bpe:many", "bpe:256", "bpe:", "bpe:99999999999"])
def test_bad_bpe_names_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=r"from 257 to 10000000, e\.g\. bpe:4096"):
        bpe_vocab_size(name)


def test_a_bpe_needs_data() -> None:
    with pytest.raises(ValueError, match=r"data.tokenizer \(bpe:4096\) is trained on a data set"):
        load_tokenizer("bpe:4096")


def test_names_of_files_that_are_missing_or_broken(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    (tmp_path / "latin.json").write_bytes(b"\xe9")
    (tmp_path / "folder").mkdir()
    for name, message in {
        "tokenizer.json": "tokenizer.json: not a tokenizer.json that `tokenizers` reads",
        "latin.json": "latin.json: not UTF-8",
        "missing.json": "no such file or folder",
        "folder": "the folder .* holds no tokenizer.json",
    }.items():
        with pytest.raises((ValueError, OSError), match=message):
            load_tokenizer(str(tmp_path / name))


def test_hub_names_fail_at_once_where_the_hub_is_away() -> None:
    with pytest.raises(OSError, match=r"can't be reached \(.*\): byte is no local file; use .*did you mean bytes\?"):
        load_tokenizer("byte", endpoint="http://127.0.0.1:9")


def test_hub_names_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install titan_moe\[hub\]"):
        load_tokenizer("org/name")


SPECIAL = ["<unk>", "<s>", "</s>", "<|end|>", "<|endoftext|>"]  # ids 0 to 4


def word_tokenizer(special: list[str] = SPECIAL, plain: tuple[str, ...] = ("a", "b")) -> str:
    vocab = {token: index for index, token in enumerate([*special, *plain])}
    backend = Backend(models.WordLevel(vocab, unk_token=special[0]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyrefly: ignore
    backend.add_special_tokens(special)
    return backend.to_str()


def with_settings(**settings: Any) -> dict[str, str]:
    """The tokenizer of SPECIAL and files of JSON beside it."""
    return {"tokenizer.json": word_tokenizer()} | {
        f"{name}.json": json.dumps(value) for name, value in settings.items()
    }


NAMED = {
    "tokenizer_config": (with_settings(tokenizer_config={"eos_token": "</s>"}), (2, (2,), 2)),
    "an added token": (with_settings(tokenizer_config={"eos_token": {"content": "<|end|>"}}), (3, (3,), 3)),
    "special_tokens_map": (with_settings(special_tokens_map={"eos_token": "</s>", "bos_token": "<s>"}), (2, (2,), 1)),
    "generation before config": (
        with_settings(generation_config={"eos_token_id": [2, 4]}, config={"eos_token_id": 3, "bos_token_id": 1}),
        (2, (2, 4), 1),
    ),
    "config": (with_settings(config={"eos_token_id": 4, "hidden_size": 8}), (4, (4,), 4)),
    "a token and ids": (
        with_settings(tokenizer_config={"eos_token": "<|end|>"}, generation_config={"eos_token_id": [2, 99, 3]}),
        (3, (3, 2), 3),
    ),
    "nothing of use": (
        with_settings(tokenizer_config={"eos_token": None}, config={"eos_token_id": None}),
        (2, (2,), 2),
    ),
}


@pytest.mark.parametrize("kind", NAMED)
def test_the_files_beside_a_tokenizer_say_what_ends_and_begins_a_text(tmp_path: Path, kind: str) -> None:
    """Read from a folder, and again from what a checkpoint carries of it."""
    files, wanted = NAMED[kind]
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    made = load_tokenizer(str(tmp_path))
    assert (made.eot_id, made.eos_ids, made.bos_id) == wanted
    again = tokenizer_from_files(made.files)
    assert again[1:] == made[1:]
    assert again.encode_document("a b").tolist() == [5, 6, wanted[0]]
    assert "hidden_size" not in "".join(made.files.values())


def test_an_end_of_text_of_ones_own(tmp_path: Path) -> None:
    files, _ = NAMED["generation before config"]
    made = tokenizer_from_files(files, eot_token="<|end|>")
    assert (made.eot_id, made.eos_ids) == (3, (3, 2, 4))
    again = tokenizer_from_files(made.files)  # a checkpoint needs not to be told again
    assert again[1:] == made[1:]
    assert made.fingerprint != tokenizer_from_files(files).fingerprint  # other tokens, another cache
    with pytest.raises(
        ValueError, match=r"data\.eot_token \('<end>'\) is no token of x.json; did you mean <\|end\|>\?$"
    ):
        tokenizer_from_files(files, "data.tokenizer: x.json", eot_token="<end>")
    for name in ("bytes", "bpe:300"):
        with pytest.raises(ValueError, match=r"data\.eot_token \('</s>'\) is no token of bytes|trained on a data set"):
            load_tokenizer(name, eot_token="</s>")


def test_without_settings_special_tokens_and_the_first_of_them_win(caplog: pytest.LogCaptureFixture) -> None:
    """A name that is a piece of text like others ends nothing; one that came by a fine-tuning ends turns."""
    plain = word_tokenizer(["<unk>", "</s>"], ("a", "<|endoftext|>"))
    with caplog.at_level(logging.WARNING, "titan_moe"):
        assert from_json(plain).eot_id == 1
        assert not caplog.messages
        made = from_json(word_tokenizer())
        assert made.eot_id == 2
        assert caplog.messages == ["tokenizer.json: documents end with </s>, not <|endoftext|> (data.eot_token)"]
        assert tokenizer_from_files(made.files).eot_id == 2
        assert len(caplog.messages) == 1  # what was found is in the files
    cohere = from_json(word_tokenizer(["<UNK>", "<BOS_TOKEN>", "<EOS_TOKEN>", "<|END_OF_TURN_TOKEN|>"]))
    assert cohere.eot_id == 2
    turns = {"tokenizer_config.json": '{"bos_token": "<BOS_TOKEN>", "eos_token": "<|END_OF_TURN_TOKEN|>"}'}
    chat = tokenizer_from_files({**cohere.files, **turns})
    assert (chat.eot_id, chat.bos_id) == (3, 1)


def test_fingerprints_are_those_of_before_where_the_end_is_the_usual_one() -> None:
    """Caches and positions in data are kept under them."""
    content = json.dumps(json.loads(bytes_tokenizer().to_json()), sort_keys=True)
    assert bytes_tokenizer().fingerprint == hashlib.sha256(content.encode()).hexdigest()[:16]


def test_settings_that_cannot_be_are_errors(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(word_tokenizer())
    for name, content, message in (
        (
            "tokenizer_config.json",
            '{"eos_token": "<end>"}',
            "name eos_token '<end>', which it lacks: set data.eot_token",
        ),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not JSON"),
        ("generation_config.json", "[" * 9999, "generation_config.json is not JSON"),
        ("config.json", "[]", "config.json is not a JSON object"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ValueError, match=r"^data.tokenizer: [^\n]*$") as error:
            load_tokenizer(str(tmp_path / "tokenizer.json"))
        assert message in str(error.value)
        (tmp_path / name).unlink()
    (tmp_path / "config.json").write_text("[]")
    (tmp_path / "tokenizer.json").rename(tmp_path / "words.json")
    assert load_tokenizer(str(tmp_path / "words.json")).eot_id == 2  # that config.json belongs to something else


def test_a_prompt_begins_as_the_tokenizer_has_it() -> None:
    backend = Backend.from_str(word_tokenizer())
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])  # pyrefly: ignore
    files = {"tokenizer.json": backend.to_str(), "tokenizer_config.json": '{"bos_token": "<s>", "eos_token": "</s>"}'}
    made = tokenizer_from_files(files)
    assert [made.encode_prompt(text) for text in ("a", "")] == [[1, 5], [1]]
    assert made.encode("a") == [5]
    assert [from_json(word_tokenizer()).encode_prompt(text) for text in ("a", "")] == [[5], [2]]


def test_a_link_out_of_the_folder_brings_no_file_along(tmp_path: Path) -> None:
    """As those of a stranger's folder could; the hub's cache has a layout of its own, in which all files are links."""
    secret = tmp_path / "secret"
    secret.write_text("password")
    for name in ("chat_template.jinja", "generation_config.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "tokenizer.json").write_text(word_tokenizer())
        (folder / name).symlink_to(secret)
        with pytest.raises(ValueError, match=f"{name} is a link out of its folder"):
            load_tokenizer(str(folder))
    blobs, snapshot = tmp_path / "model" / "blobs", tmp_path / "model" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for name, content in with_settings(generation_config={"eos_token_id": [2, 4]}).items():
        (blobs / name).write_text(content)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    assert load_tokenizer(str(snapshot)).eos_ids == (2, 4)
