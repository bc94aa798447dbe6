"""Tokenizers, all of one kind: bytes, a BPE trained on the data, a tokenizer.json of a file, a folder or the hub."""

import difflib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from titan_moe.data.hub import HUB_ENDPOINT, download_file, find_files
from titan_moe.data.tokenizer_files import (
    TOKENIZER,
    TOKENIZER_FILES,
    Files,
    collect_files,
    listed_ids,
    named_token,
    read_text,
    read_tokenizer_files,
    with_end_of_text,
)

END_OF_TEXT = (  # the usual names, among which it is looked for where no file names it
    "<|endoftext|>",
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "<|eos|>",
    "[EOS]",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",  # DeepSeek's, with its full-width bars
    "<|eot_id|>",
    "<|im_end|>",
    "<EOS_TOKEN>",
    "<|END_OF_TURN_TOKEN|>",
)
MIN_BPE_VOCAB = 257  # 256 bytes and the end of text
MAX_BPE_VOCAB = 10_000_000  # ten times what anybody uses; the trainer takes memory for what it is asked for
log = logging.getLogger(__name__)


class Tokenizer(NamedTuple):
    """A tokenizer of the library `tokenizers` and what the rest of the program asks about it."""

    backend: Backend
    vocab_size: int  # one more than the largest id
    eot_id: int  # ends every document
    fingerprint: str  # a hash of what decides the ids of a text
    bos_id: int  # what an empty prompt begins with
    eos_ids: tuple[int, ...]  # a generated text ends with any of these, of which eot_id is one
    files: dict[str, str]  # name -> content; they make the same tokenizer again

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text; special tokens are neither added nor read out of the text."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_document(self, text: str) -> np.ndarray:
        """Return the ids of a text with the end of text after them (num_tokens,), in the type of token caches.

        A third faster than `encode` (no offsets), but the library counts it as a use of threads, after which a fork
        prints a warning: for worker processes only. For many documents `make_encoder` of encode.py is faster.
        """
        encoding = self.backend.encode_batch_fast([text], add_special_tokens=False)[0]
        return np.array([*encoding.ids, self.eot_id], self.dtype)

    def encode_prompt(self, text: str) -> list[int]:
        """Return the ids of a prompt, after the token that begins texts where the tokenizer puts one there."""
        ids = self.encode(text)

        # Whether it puts one is what its own template makes of an empty text. A prompt without any id gets one anyway,
        # because a model has to be given something.
        begins = self.backend.encode("").ids[:1] == [self.bos_id]
        return [self.bos_id, *ids] if begins or not ids else ids

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of ids, with special tokens left out."""
        return self.backend.decode(list(ids), skip_special_tokens=True)

    def to_json(self) -> str:
        """Return the content of its tokenizer.json."""
        return self.files[TOKENIZER]

    @property
    def dtype(self) -> np.dtype:
        """The smallest unsigned type that holds every id: uint16 up to 65,536 of them, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 1 << 16 else np.uint32)


def tokenizer_from_files(files: Files, origin: str = TOKENIZER, eot_token: str = "") -> Tokenizer:
    """Make a tokenizer from a tokenizer.json and the files beside it; `origin` names the tokenizer.json in errors.

    `eot_token` ends documents; empty: the one that the files name, else one of END_OF_TEXT. Truncation and padding are
    switched off. Errors: the library can't read it, it has no such token.
    """
    # A file that can't be read is the user's, and one line. The library raises Exception itself for it; anything else
    # is a fault.
    try:
        backend = Backend.from_str(files[TOKENIZER])
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise ValueError(f"{origin}: not a tokenizer.json that `tokenizers` reads ({error})") from error

    # A document keeps all of its text and gets nothing else. "<|endoftext|>" inside it is text and does not end it.
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    vocab = backend.get_vocab(with_added_tokens=True)
    content = backend.to_str()

    # The files may name ids that the vocabulary lacks: those are left out. Without a token of its own for the beginning
    # a text begins with the end of the one before.
    eot = _end_of_text(files, backend, vocab, eot_token, origin)
    files = with_end_of_text({**files, TOKENIZER: content}, eot, vocab[eot], chosen=bool(eot_token))
    ids = set(vocab.values())
    eos_ids = [vocab[eot], *(id_ for id_ in listed_ids(files, "eos") if id_ in ids)]
    bos_ids = [vocab.get(named_token(files, "bos") or ""), *listed_ids(files, "bos"), vocab[eot]]
    return Tokenizer(
        backend,
        max(ids) + 1,
        vocab[eot],
        _fingerprint(content, eot, vocab),
        next(id_ for id_ in bos_ids if id_ in ids),
        tuple(dict.fromkeys(eos_ids)),
        files,
    )


def _end_of_text(files: Files, backend: Backend, vocab: dict[str, int], wanted: str, origin: str) -> str:
    """Return the token that ends a document: the one that is `wanted`, that the files name, or the likeliest."""
    if wanted:
        if wanted not in vocab:
            near = difflib.get_close_matches(wanted, [*vocab], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            name = origin.removeprefix("data.tokenizer: ")
            raise ValueError(f"data.eot_token ({wanted!r}) is no token of {name}{hint}")
        return wanted

    # The tokenizer's own settings name a token, those of a model list ids.
    if named := named_token(files, "eos"):
        if named not in vocab:
            raise ValueError(
                f"{origin}: the files beside it name eos_token {named!r}, which it lacks: set data.eot_token"
            )
        return named
    listed = (backend.id_to_token(id_) for id_ in listed_ids(files, "eos"))
    return next((token for token in listed if token is not None), None) or _likeliest_end(backend, vocab, origin)


def _likeliest_end(backend: Backend, vocab: dict[str, int], origin: str) -> str:
    """Return which of END_OF_TEXT ends a document, going by the vocabulary alone; warns where there are several."""
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    candidates = [token for token in END_OF_TEXT if token in vocab]
    if not candidates:
        raise ValueError(
            f"{origin}: no end-of-text token: nothing beside it names one, and it has none of "
            f"{', '.join(END_OF_TEXT)}; name its own with data.eot_token"
        )

    # A token that is flagged as special is no piece of text. Of several the one with the smallest id: a fine-tuning
    # adds its own after it.
    first, *others = sorted([token for token in candidates if token in special] or candidates, key=vocab.__getitem__)
    if others:
        log.warning("%s: documents end with %s, not %s (data.eot_token)", origin, first, " or ".join(others))
    return first


def _fingerprint(content: str, eot: str, vocab: dict[str, int]) -> str:
    """Return a short hash of what decides the ids of a document.

    The end of text is a part of it only where it is not the first of END_OF_TEXT that the vocabulary has. That was the
    rule of earlier versions, whose fingerprints name caches and positions in data.
    """
    canonical = json.dumps(json.loads(content), sort_keys=True)
    if eot != next((token for token in END_OF_TEXT if token in vocab), None):
        canonical += eot
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def bytes_tokenizer() -> Tokenizer:
    """Make the tokenizer of plain bytes: id = byte, 256 = end of text."""
    backend = Backend(models.BPE(vocab={char: byte for byte, char in enumerate(byte_chars())}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyrefly: ignore
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore
    backend.add_special_tokens([END_OF_TEXT[0]])
    return tokenizer_from_files({TOKENIZER: backend.to_str()}, "bytes")


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


def train_bpe(texts: Iterable[str], vocab_size: int, *, report: bool = False) -> Tokenizer:
    """Train a byte-level BPE of at most `vocab_size` tokens with GPT-2's words; equal texts give equal results.

    Uses the `tokenizers` threads, after which a fork of this process prints a warning: call it in a worker process.
    With `report` the library writes how far it is to standard error, {"stage", "current", "total"} as a line of JSON.
    """
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyrefly: ignore
    backend.decoder = decoders.ByteLevel()  # pyrefly: ignore
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    report = report and hasattr(trainers.BpeTrainer, "progress_format")  # an early `tokenizers` only draws bars
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[END_OF_TEXT[0]], initial_alphabet=alphabet, show_progress=report
    )  # pyrefly: ignore
    if report:
        trainer.progress_format = "json"  # pyrefly: ignore
    backend.train_from_iterator(texts, trainer)
    return tokenizer_from_files({TOKENIZER: backend.to_str()}, f"bpe:{vocab_size}")


def load_tokenizer(name: str, endpoint: str = HUB_ENDPOINT, eot_token: str = "") -> Tokenizer:
    """Load `bytes`, a tokenizer.json, a folder that holds one, or that of a hub repository (needs the extra `hub`).

    The files beside a tokenizer.json say what ends a document, unless `eot_token` does. `bpe:N` has to be trained on
    data: `build_data` does that, and a checkpoint carries the result as tokenizer.json.
    """
    # `bytes` and `bpe:N` name a tokenizer of this package, not a file.
    if name == "bytes":
        tokenizer = bytes_tokenizer()
        return tokenizer_from_files(tokenizer.files, "bytes", eot_token) if eot_token else tokenizer
    if bpe_vocab_size(name):
        raise ValueError(
            f"data.tokenizer ({name}) is trained on a data set; without one, name a tokenizer.json (a checkpoint's)"
        )

    # A local file comes before a repository of the hub, so that a run with local files needs no network.
    path = Path(name).expanduser()
    path = path / TOKENIZER if path.is_dir() else path
    if not path.is_file():
        return tokenizer_from_files(_download(name, endpoint), f"data.tokenizer: {name}", eot_token)

    # Files beside a tokenizer.json belong to it; beside a file of another name they may be of another tokenizer.
    try:
        files = read_tokenizer_files(path.parent) if path.name == TOKENIZER else {TOKENIZER: read_text(path)}
    except (OSError, ValueError) as error:
        raise type(error)(f"data.tokenizer: {error}") from error
    return tokenizer_from_files(files, f"data.tokenizer: {path}", eot_token)


def _download(name: str, endpoint: str) -> dict[str, str]:
    """Return a hub repository's tokenizer files, unless the name looks like that of a file."""
    # A misspelt path must not end in an error about the hub.
    if os.path.isdir(os.path.expanduser(name)):
        raise FileNotFoundError(f"data.tokenizer: the folder {name} holds no tokenizer.json")
    near = difflib.get_close_matches(name, ["bytes", "bpe:4096"], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith(".") or name.endswith(".json"):
        raise FileNotFoundError(f"data.tokenizer: no such file or folder: {name}{hint or ' (or: bytes, bpe:4096)'}")
    advice = f"use --data.tokenizer bytes, bpe:4096 or a local tokenizer.json{hint}"

    # Only tokenizer.json has to be there.
    paths = {TOKENIZER: download_file(name, TOKENIZER, endpoint, advice)}
    paths |= find_files(name, [file for file in TOKENIZER_FILES if file != TOKENIZER], endpoint)
    return collect_files(lambda file: read_text(Path(paths[file])) if file in paths else None, name)


def token_contents(tokenizer: Tokenizer) -> list[bytes]:
    """Return the bytes that each id stands for, none for special tokens and unused ids.

    Exact for byte-level vocabularies (bytes, this package's BPE, GPT-2, Llama 3, Qwen ...); for sentencepiece's (Llama
    2) up to their normalisation and the space they put before a text. Other kinds (WordPiece) lose bytes: an error.
    """
    # How the vocabulary writes bytes is told by the steps before and after it, which may be nested.
    content = json.loads(tokenizer.to_json())
    kinds = {
        match
        for part in ("pre_tokenizer", "decoder")
        for match in re.findall(r'"type": ?"(\w+)"', json.dumps(content[part]))
    }
    if not kinds & {"ByteLevel", "Metaspace", "ByteFallback"}:
        raise ValueError(
            "bits per byte and texts of tokens need a byte-level or sentencepiece tokenizer: this one does not keep "
            "every byte of a text"
        )

    # Added tokens are plain text in every kind. Special ones are left out when text is decoded, so they have no bytes.
    added = {token["id"]: token for token in content["added_tokens"]}
    byte_of = {char: byte for byte, char in enumerate(byte_chars())}
    contents = [b""] * tokenizer.vocab_size
    for token, index in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if index in added:
            contents[index] = b"" if added[index]["special"] else token.encode()
        elif "ByteLevel" in kinds:
            contents[index] = bytes(byte_of.get(char, ord("?")) for char in token)  # one character stands for one byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            contents[index] = bytes([int(token[3:5], 16)])
        else:
            contents[index] = token.replace("▁", " ").encode()
    return contents


def byte_chars() -> list[str]:
    """Return the printable characters by which byte-level vocabularies write the bytes 0 to 255 (GPT-2's table)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
