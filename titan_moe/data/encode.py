"""Ids of many documents: by `fastokens` where it is installed and known to give those of `tokenizers`, else by that.

`fastokens` (extra `fast`) is many times as fast and leaves out what inference does not need. It is used only for
tokenizers whose every part is of a kind for which the ids were compared, and even so a little of every batch is
tokenized by both.
"""

import importlib.metadata
import importlib.util
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from titan_moe.data.tokenizer import Tokenizer, byte_chars

# Patterns by which a `Split` cuts text into words, before bytes are written as characters.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
WORD_PATTERNS = {
    "Llama 3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + REST,
    "Qwen 2 and 3": CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + REST,
    "o200k (GPT-OSS)": rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{CONTRACTIONS}?|\p{{N}}{{1,3}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
SAMPLE_CHARS = 1000  # of a batch are tokenized by both libraries: a thousandth of it
PROBE = "It's 1234 o'clock:\n\n  naïve\tworlds\u00a0of 世界 \U0001f600 e\u0301 'LL \u017f ²Ⅷ٣ \r\n \x00 end  "

# (texts of D documents) -> ids (num_tokens,) in the type of token caches, an end of text after each document's; and how
# many each document has (D,), int64.
Encode = Callable[[Sequence[str]], tuple[np.ndarray, np.ndarray]]


def library_of(tokenizer: Tokenizer) -> str:
    """Return the library that `make_encoder` takes for a tokenizer, with its version, and why it is not the faster."""
    reason = _why_not_fast(tokenizer)
    library = "tokenizers" if reason else "fastokens"
    return f"{library} {importlib.metadata.version(library)}{reason and f' ({reason})'}"


def make_encoder(tokenizer: Tokenizer) -> Encode:
    """Return what makes ids of documents fastest; for worker processes, as the libraries start threads.

    Errors: ValueError where `fastokens` gives other ids than `tokenizers`.
    """
    # There is a worker for each core already: more threads cost `tokenizers` a third. Both libraries read this when
    # their first thread starts.
    os.putenv("RAYON_NUM_THREADS", "1")
    if _why_not_fast(tokenizer):
        return _plain_encoder(tokenizer)
    encode = _fast_encoder(tokenizer)

    def check(text: str) -> None:
        ids, expected = encode([text])[0], tokenizer.encode_document(text)
        if not np.array_equal(ids, expected):
            raise ValueError(
                f"data.tokenizer: {library_of(tokenizer)} gives other ids than `tokenizers`, for {text!r:.200}: "
                "remove it with `pip uninstall fastokens`"
            )

    # Special tokens in a text are text; those that are not special are tokens.
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    check(PROBE + "".join(added) + " ".join(added))

    def checked(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        if texts:
            check(texts[0][:SAMPLE_CHARS])
        return encode(texts)

    return checked


def _plain_encoder(tokenizer: Tokenizer) -> Encode:
    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        encodings = tokenizer.backend.encode_batch_fast([*texts], add_special_tokens=False)
        documents = [np.array([*encoding.ids, tokenizer.eot_id], tokenizer.dtype) for encoding in encodings]
        ids = np.concatenate([*documents, np.empty(0, tokenizer.dtype)])
        return ids, np.array([len(document) for document in documents], np.int64)

    return encode


def _fast_encoder(tokenizer: Tokenizer) -> Encode:
    import fastokens

    encoder = fastokens.Tokenizer.from_json_str(tokenizer.to_json())

    def encode(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        # Ids are 4 bytes and offsets 8, little-endian; no Python object is made for a token.
        id_bytes, offset_bytes = encoder.encode_batch_flat([*texts], split_special_tokens=True)
        offsets = np.frombuffer(offset_bytes, "<u8").astype(np.int64)
        ids = np.frombuffer(id_bytes, "<u4").astype(tokenizer.dtype)
        return np.insert(ids, offsets[1:], tokenizer.eot_id), np.diff(offsets) + 1

    return encode


def _why_not_fast(tokenizer: Tokenizer) -> str:
    """Return why a tokenizer's ids are not made by `fastokens`, empty where they are."""
    content = json.loads(tokenizer.to_json())
    if reason := _unknown_part(content):
        return f"it is not known whether fastokens gives the same ids: {reason}"
    if importlib.util.find_spec("fastokens") is None:
        return "fastokens is several times as fast: pip install 'titan_moe[fast]'"
    return ""


def _unknown_part(content: dict[str, Any]) -> str:
    """Return what of a tokenizer.json is of no kind for which the ids of the two libraries were compared."""
    # A vocabulary without some byte would need a token for what is unknown.
    model = content["model"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    if model["type"] != "BPE" or any(model.get(option) for option in options):
        return "no plain BPE"
    if not model["vocab"].keys() >= set(byte_chars()):
        return "no BPE of bytes"

    # Of the rest, too, every setting has to be as expected.
    if content["normalizer"] not in (None, {"type": "NFC"}):
        return f"normalizer {content['normalizer']['type']}"
    if not _has_known_words(content["pre_tokenizer"], has_merges=bool(model["merges"])):
        return "its words"
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    if any(token[flag] for token in content["added_tokens"] if not token["special"] for flag in flags):
        return "its added tokens"
    return ""


def _has_known_words(pre_tokenizer: dict[str, Any] | None, *, has_merges: bool) -> bool:
    """Whether text is cut into words as GPT-2 or one of WORD_PATTERNS has it, or not at all where nothing is merged."""
    kinds = (pre_tokenizer or {}).get("pretokenizers", [pre_tokenizer or {}])
    *splits, last = [{key: value for key, value in kind.items() if key != "trim_offsets"} for kind in kinds]
    if {**last, "use_regex": True} != {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
        return False
    if not splits:
        return last["use_regex"] or not has_merges
    patterns = [{"Regex": pattern} for pattern in WORD_PATTERNS.values()]
    known = [{"type": "Split", "pattern": one, "behavior": "Isolated", "invert": False} for one in patterns]
    return len(splits) == 1 and splits[0] in known and not last["use_regex"]
