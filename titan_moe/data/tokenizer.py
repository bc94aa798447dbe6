"""Tokenizers, all one small tuple: bytes, a BPE trained on the data, a tokenizer.json of a file, folder or the hub."""

import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from titan_moe.data.hub import HUB_ENDPOINT, download_file

END_OF_TEXT = (  # the names in use, the most usual first
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with its full-width bars
    "<|eot_id|>",
    "<|im_end|>",
)
MIN_BPE_VOCAB = 257  # 256 bytes and the end of text
MAX_BPE_VOCAB = 10_000_000  # ten times what anybody uses; the trainer takes memory for what it is asked for


class Tokenizer(NamedTuple):
    """A tokenizer of `tokenizers` and what the rest of the program asks about it.

    `vocab_size` is one more than the largest id, `eot_id` ends every document, `fingerprint` names the content.
    """

    backend: Backend
    vocab_size: int
    eot_id: int
    fingerprint: str

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens are neither added nor read out of the text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of several texts, one text after the other: the library's threads and forks do not mix."""
        return [self.encode(text) for text in texts]

    def encode_document(self, text: str) -> np.ndarray:
        """Return the ids of a text and the end of text after them, in the type the cache keeps.

        A third faster than `encode` (no offsets), but it counts as using threads: for worker processes only.
        """
        encoding = self.backend.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array([*encoding.ids, self.eot_id], self.dtype)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, with special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of a tokenizer.json from which `tokenizer_from_json` makes the same tokenizer again."""
        return self.backend.to_str()

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 up to 65,536 of them, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def tokenizer_from_json(content: str, origin: str = "tokenizer.json") -> Tokenizer:
    """Make a tokenizer from the content of a tokenizer.json, which `origin` names in errors.

    Truncation and padding are switched off. Errors: the library can't read it, it has no end-of-text token.
    """
    try:
        backend = Backend.from_str(content)
    except Exception as error:  # the library raises the bare class
        if type(error) is not Exception:
            raise
        raise ValueError(f"{origin}: not a tokenizer.json that `tokenizers` reads ({error})") from error
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # "<|endoftext|>" inside a document is text and does not end it
    vocab = backend.get_vocab(with_added_tokens=True)
    eot = next((token for token in END_OF_TEXT if token in vocab), None)
    if eot is None:
        raise ValueError(f"{origin}: no end-of-text token; it needs one of {', '.join(END_OF_TEXT)}")
    canonical = json.dumps(json.loads(backend.to_str()), sort_keys=True)
    fingerprint = hashlib.sha256(canonical.encode()).hexdigest()[:16]
    return Tokenizer(backend, max(vocab.values()) + 1, vocab[eot], fingerprint)


def bytes_tokenizer() -> Tokenizer:
    """Make the tokenizer of plain bytes: id = byte, 256 = end of text."""
    backend = Backend(models.BPE(vocab={char: byte for byte, char in enumerate(_byte_chars())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyrefly: ignore
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore
    backend.add_special_tokens([END_OF_TEXT[0]])
    return tokenizer_from_json(backend.to_str(), "bytes")


def bpe_vocab_size(name: str) -> int | None:
    """Return N of `bpe:N`, None where the name is of another kind. Errors: N is no number from 257 to 10,000,000."""
    kind, _, digits = name.partition(":")
    if kind != "bpe" or ":" not in name:
        return None
    size = int(digits) if digits.isdecimal() and len(digits) < 10 else 0
    if not MIN_BPE_VOCAB <= size <= MAX_BPE_VOCAB:
        raise ValueError(
            f"data.tokenizer ({name}): bpe:N needs a vocabulary size N from {MIN_BPE_VOCAB} to {MAX_BPE_VOCAB}, "
            "e.g. bpe:4096"
        )
    return size


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens with GPT-2's words; equal texts give equal results.

    Uses the `tokenizers` threads, after which a fork of this process prints a warning: call it in a worker process.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], initial_alphabet=alphabet, show_progress=False
    )  # pyrefly: ignore
    backend.train_from_iterator(texts, trainer)
    return tokenizer_from_json(backend.to_str(), f"bpe:{vocab_size}")


def load_tokenizer(name: str, endpoint: str = HUB_ENDPOINT) -> Tokenizer:
    """Load `bytes`, a tokenizer.json, a folder that holds one, or that of a hub repository (needs the extra `hub`).

    `bpe:N` has to be trained on data: `build_data` does that, and a checkpoint carries the result as tokenizer.json.
    """
    if name == "bytes":
        return bytes_tokenizer()
    if bpe_vocab_size(name):
        raise ValueError(
            f"data.tokenizer ({name}) is trained on a data set; without one, name a tokenizer.json (a checkpoint's)"
        )
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        path = os.path.join(path, "tokenizer.json")
    if not os.path.isfile(path):
        path = _download(name, endpoint)
    try:
        with open(path, encoding="utf-8") as file:
            content = file.read()
    except OSError as error:
        raise OSError(f"data.tokenizer: {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"data.tokenizer: {path}: not UTF-8 text") from error
    return tokenizer_from_json(content, f"data.tokenizer: {path}")


def _download(name: str, endpoint: str) -> str:
    """Return the local copy of a hub repository's tokenizer.json, once the name can't be meant for a file."""
    if os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(f"data.tokenizer: the folder {name} holds no tokenizer.json")
    near = difflib.get_close_matches(name, ["bytes", "bpe:4096"], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.endswith(".json"):
        raise FileNotFoundError(f"data.tokenizer: no such file or folder: {name}{hint or ' (or: bytes, bpe:4096)'}")
    return download_file(
        name, "tokenizer.json", endpoint, f"use --data.tokenizer bytes, bpe:4096 or a local tokenizer.json{hint}"
    )


def token_byte_lengths(tokenizer: Tokenizer) -> list[int]:
    """Return the number of UTF-8 bytes that each id stands for, 0 for special tokens and unused ids.

    Exact for byte-level vocabularies (bytes, this package's BPE, GPT-2, Llama 3, Qwen ...); for sentencepiece's (Llama
    2) up to their normalisation and the space they put before a text. Other kinds (WordPiece) lose bytes: an error.
    """
    content = json.loads(tokenizer.to_json())
    kinds = {
        match
        for part in ("pre_tokenizer", "decoder")
        for match in re.findall(r'"type": ?"(\w+)"', json.dumps(content[part]))
    }
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise ValueError(
            "bits per byte need a byte-level or sentencepiece tokenizer: this one does not keep every byte of a text"
        )
    added = {token["id"]: token for token in content["added_tokens"]}
    lengths = [0] * tokenizer.vocab_size
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            lengths[index] = 0 if added[index]["special"] else len(token.encode())
        elif "ByteLevel" in kinds:
            lengths[index] = len(token)  # one character stands for one byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            lengths[index] = 1
        else:
            lengths[index] = len(token.replace("▁", " ").encode())
    return lengths


def _byte_chars() -> list[str]:
    """Return the printable characters by which byte-level vocabularies write the bytes 0 to 255 (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
