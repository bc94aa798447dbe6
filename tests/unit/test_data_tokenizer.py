from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from titan_moe.data import hub
from titan_moe.data.build import token_bytes
from titan_moe.data.tokenizer import (
    Tokenizer,
    bpe_vocab_size,
    bytes_tokenizer,
    load_tokenizer,
    tokenizer_from_json,
    train_bpe,
)

TEXTS = ["the cat sat on the mat\n", "Grüße, 世界 \U0001f600!  \t indented\n\n", "end<|endoftext|>not", "a\x00b"]


@pytest.fixture(scope="module", params=["bytes", "bpe"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return bytes_tokenizer() if request.param == "bytes" else train_bpe(TEXTS * 5, 300)


def test_round_trip_never_reads_special_tokens_out_of_text(tokenizer: Tokenizer) -> None:
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS), strict=True):
        assert ids == tokenizer.encode(text)
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
        assert again.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)


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
    tokenizer = tokenizer_from_json(sentencepiece_like("</s>"))
    ids = tokenizer.encode("a aé a")
    assert ids == [3, 4, 5, 6, 4]  # more than the two that the file's own truncation leaves
    assert token_bytes(tokenizer)[ids].sum() == len("a aé a".encode())
    assert tokenizer.eot_id == 1


def test_bits_per_byte_need_a_tokenizer_that_keeps_bytes() -> None:
    backend = Backend(models.WordLevel({"a": 0, "[EOS]": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # pyrefly: ignore
    with pytest.raises(ValueError, match="bits per byte need a byte-level or sentencepiece tokenizer"):
        token_bytes(tokenizer_from_json(backend.to_str()))


def test_vocab_size_counts_up_to_the_largest_id() -> None:
    backend = Backend(models.WordLevel({"a": 0, "[EOS]": 9, "[UNK]": 400}, unk_token="[UNK]"))
    assert tokenizer_from_json(backend.to_str())[1:3] == (401, 9)


def test_a_tokenizer_without_end_of_text_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"x.json: no end-of-text token; it needs one of <\|endoftext\|>, .*</s>"):
        tokenizer_from_json(sentencepiece_like("</end>"), "x.json")


@pytest.mark.parametrize("name", ["bpe:many", "bpe:256", "bpe:", "bpe:99999999999"])
def test_bad_bpe_names_are_errors(name: str) -> None:
    with pytest.raises(ValueError, match=r"at least 257, e\.g\. bpe:4096"):
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
