import json
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from titan_moe.data import cache as token_cache
from titan_moe.data import encode
from titan_moe.data.corpus import Split
from titan_moe.data.encode import PROBE, SAMPLE_CHARS, WORD_PATTERNS, library_of, make_encoder
from titan_moe.data.sources import Piece
from titan_moe.data.tokenizer import Tokenizer, bytes_tokenizer, tokenizer_from_files

TEXT = Path(encode.__file__).read_text() + Path(__file__).read_text()
PIECES = [
    *"aSsl \t\n\r.1'é中_/",
    "e\u0301",
    "\u00a0",
    "\u017f",
    "\u0130",
    "\u2028",
    "\ufeff",
    "\x00",
    "\u0345",
    "'ll",
    "'VE",
    " the",
    "ing",
    "١٢",
    "1234",
    "aaaa",
    "   \n",
    "\r\n\r\n",
    "\U0001f3f3\ufe0f\u200d\U0001f308",
    "\u1100\u1161",
    "<|endoftext|>",
    " <|im_end|>",
    "<tool_call>",
    "<tool_",
]


def split_words(pattern: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])  # type: ignore


def make_bpe(pattern: str = "", *, ignore_merges: bool = False, nfc: bool = False) -> Backend:
    """A BPE with words by `pattern` (empty: GPT-2's), special tokens, and a token that is not special."""
    backend = Backend(models.BPE())
    if nfc:
        backend.normalizer = normalizers.NFC()  # type: ignore
    backend.pre_tokenizer = split_words(pattern) if pattern else pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    backend.decoder = decoders.ByteLevel()  # type: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)  # type: ignore
    backend.train_from_iterator([TEXT], trainer)
    backend.add_special_tokens(["<|endoftext|>", "<|im_end|>"])
    backend.add_tokens([AddedToken("<tool_call>", normalized=False)])
    content = json.loads(backend.to_str())
    content["model"]["ignore_merges"] = ignore_merges
    return Backend.from_str(json.dumps(content))


KINDS: dict[str, Callable[[], Backend]] = {
    "GPT-2": make_bpe,
    "bytes": lambda: bytes_tokenizer().backend,
    **{name: lambda pattern=pattern: make_bpe(pattern) for name, pattern in WORD_PATTERNS.items()},
    "Llama 3, ignore_merges": lambda: make_bpe(WORD_PATTERNS["Llama 3"], ignore_merges=True),
    "Qwen 2 and 3, NFC": lambda: make_bpe(WORD_PATTERNS["Qwen 2 and 3"], nfc=True),
}


def of_json(content: str) -> Tokenizer:
    return tokenizer_from_files({"tokenizer.json": content})


@cache
def made(kind: str) -> tuple[Tokenizer, encode.Encode]:
    tokenizer = of_json(KINDS[kind]().to_str())
    assert library_of(tokenizer).startswith("fastokens ")
    return tokenizer, make_encoder(tokenizer)


def check(kind: str, texts: list[str]) -> None:
    tokenizer, encoder = made(kind)
    ids, lengths = encoder(texts)
    expected = tokenizer.backend.encode_batch_fast(texts, add_special_tokens=False)
    documents = [[*encoding.ids, tokenizer.eot_id] for encoding in expected]
    assert lengths.tolist() == [len(document) for document in documents]
    assert ids.dtype == tokenizer.dtype
    for text, got, right in zip(texts, np.split(ids, np.cumsum(lengths)[:-1]), documents, strict=True):
        assert got.tolist() == right, repr(text)


@pytest.fixture
def fast() -> None:
    pytest.importorskip("fastokens", reason="the extra `fast` is not installed")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_any_text(kind: str) -> None:
    one = st.one_of(st.sampled_from(PIECES), st.characters(exclude_categories=["Cs"]))
    texts = st.lists(st.lists(one, max_size=40).map("".join), min_size=1, max_size=20)

    @settings(deadline=None, max_examples=150, database=None)
    @given(texts)
    def hold(some: list[str]) -> None:
        check(kind, some)

    hold()


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_short_text_of_one_letter_of_each_class(kind: str) -> None:
    check(kind, ["".join(text) for size in (0, 1, 2, 3) for text in product(PIECES[:18], repeat=size)])


@pytest.mark.slow
@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_every_character(kind: str) -> None:
    """Both libraries have tables of Unicode of their own: which characters are letters, numbers, spaces."""
    characters = [chr(code) for code in range(0x20000) if not 0xD800 <= code < 0xE000]
    assert sum(unicodedata.category(character) == "Lo" for character in characters) > 40_000
    words = [f"a{character}b {character}1{character}'{character}." for character in characters]
    check(kind, ["".join(words[start : start + 256]) for start in range(0, len(words), 256)])


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("kind", KINDS)
def test_ids_of_long_texts_and_of_none(kind: str) -> None:
    check(kind, [TEXT, "", *(piece * 5000 for piece in ("a", " ", "\n", "=", "ab", " \n", "中"))])
    ids, lengths = made(kind)[1]([])
    assert len(ids) == len(lengths) == 0


def with_settings(**settings: Any) -> str:
    return json.dumps({**json.loads(make_bpe().to_str()), **settings})


def with_model(**settings: Any) -> str:
    content = json.loads(make_bpe().to_str())
    return json.dumps({**content, "model": {**content["model"], **settings}})


def with_flag(flag: str) -> str:
    content = json.loads(make_bpe().to_str())
    next(token for token in content["added_tokens"] if not token["special"])[flag] = True
    return json.dumps(content)


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
UNKNOWN = {
    "normalizer": (lambda: with_settings(normalizer={"type": "Lowercase"}), "normalizer Lowercase"),
    "prefix space": (lambda: with_settings(pre_tokenizer={**BYTE_LEVEL, "add_prefix_space": True}), "its words"),
    "no words": (lambda: with_settings(pre_tokenizer=BYTE_LEVEL), "its words"),
    "no pre-tokenizer": (lambda: with_settings(pre_tokenizer=None), "its words"),
    "other words": (lambda: make_bpe(r"\p{N}|\s+").to_str(), "its words"),
    "bytes as a last resort": (lambda: with_model(byte_fallback=True), "no plain BPE"),
    "dropout": (lambda: with_model(dropout=0.5), "no plain BPE"),
    "unknown token": (lambda: with_model(unk_token="a"), "no plain BPE"),
    "no byte 0": (lambda: make_bpe().to_str().replace('"Ā":', '"ĀĀĀĀ":'), "no BPE of bytes"),
    "lstrip": (lambda: with_flag("lstrip"), "its added tokens"),
    "normalized": (lambda: with_flag("normalized"), "its added tokens"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_other_tokenizers_keep_tokenizers(kind: str) -> None:
    content, reason = UNKNOWN[kind][0](), UNKNOWN[kind][1]
    tokenizer = of_json(content)
    name = library_of(tokenizer)
    assert name.startswith("tokenizers ")
    assert name.endswith(f" (it is not known whether fastokens gives the same ids: {reason})")
    texts = ["Some words, 12345", "", "<|endoftext|> and \n\n <tool_call>"]
    ids, lengths = make_encoder(tokenizer)(texts)
    if kind != "dropout":
        assert ids.tolist() == [id_ for text in texts for id_ in tokenizer.encode_document(text).tolist()]
    assert lengths.sum() == len(ids)


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastokens", None)
    monkeypatch.setattr(encode.importlib.util, "find_spec", lambda name: None)
    tokenizer = of_json(make_bpe().to_str())
    assert library_of(tokenizer).endswith(" (fastokens is several times as fast: pip install 'titan_moe[fast]')")
    ids, lengths = make_encoder(tokenizer)(["a b", PROBE])
    assert ids.tolist() == [*tokenizer.encode("a b"), tokenizer.eot_id, *tokenizer.encode(PROBE), tokenizer.eot_id]
    assert lengths.tolist() == [len(tokenizer.encode("a b")) + 1, len(tokenizer.encode(PROBE)) + 1]
    ids, lengths = make_encoder(tokenizer)([])
    assert len(ids) == len(lengths) == 0


@pytest.mark.parametrize("wrong", ["<tool_call>", "rare"])
def test_other_ids_are_an_error(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """Of the added tokens at the start, of a text as soon as a batch begins with it."""
    tokenizer = of_json(make_bpe().to_str())
    right = encode._plain_encoder(tokenizer)
    monkeypatch.setattr(encode, "_why_not_fast", lambda _: "")
    monkeypatch.setattr(encode, "library_of", lambda _: "fastokens 9")
    monkeypatch.setattr(encode, "_fast_encoder", lambda _: lambda texts: right([t.replace(wrong, "x") for t in texts]))
    with pytest.raises(ValueError, match=r"fastokens 9 gives other ids .*`pip uninstall fastokens`") as caught:
        make_encoder(tokenizer)([f"{'a ' * (SAMPLE_CHARS // 2 - 5)}{wrong}", "more"])
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("fast")
def test_a_cache_is_the_same_by_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [json.dumps({"text": text or None}) for text in [*TEXT.split("\n"), PROBE, "the end<|endoftext|>"]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    tokenizer = of_json(make_bpe().to_str())
    monkeypatch.setattr(token_cache, "BATCH_CHARS", 2000)
    files = []
    for name, make in (("fast", make_encoder), ("plain", encode._plain_encoder)):
        monkeypatch.setattr(token_cache, "_load_encoder", lambda _, make=make: make(tokenizer))
        shard = (Piece(str(tmp_path / "a.jsonl"), "jsonl"),)
        told = list(token_cache.tokenize_shard(token_cache._Job(shard, Split(0.3), str(tmp_path / name), "")))
        assert len(told) > 5
        files.append([(tmp_path / f"{name}.{end}").read_bytes() for end in ("train.bin", "validation.bin", "json")])
    assert files[0] == files[1]
    assert min(map(len, files[0])) > 100
