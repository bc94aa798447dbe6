"""Tokens as text: their classes, which of them are rare, and how to show them.

Shapes: V vocabulary, C classes, B sequences, S positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from titan_moe.data.tokenizer import Tokenizer, token_contents

CLASSES = {
    "word_start": "begins with a letter, after white space of its own or after a token that does not end in a letter",
    "word_continuation": "begins with a letter right after a token that ends in one",
    "digit": "its first character that is no white space is a digit",
    "punctuation": "its first character that is no white space is no letter and no digit",
    "whitespace": "white space alone: spaces, tabs, ends of lines",
    "rare": "a token of one of the classes above whose id is among the rarest of these texts",
    "special": "a token without text, such as the end of a document",
}
WORD_START, WORD_CONTINUATION, DIGIT, PUNCTUATION, WHITESPACE, RARE, SPECIAL = range(len(CLASSES))
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what a decoder writes for bytes that are no text


class Vocabulary(NamedTuple):
    """What the classes of tokens go by, and the bytes of each id."""

    kind: Tensor  # (V,) int64: its class after a token that ends in a letter
    ends_in_letter: Tensor  # (V,) bool
    contents: list[bytes]
    names: list[str]  # of special tokens, "" for others
    eot_id: int


def read_vocabulary(tokenizer: Tokenizer, device: torch.device) -> Vocabulary:
    """The classes of a tokenizer's ids by their bytes; ValueError for one that does not keep all bytes of a text."""
    contents = token_contents(tokenizer)
    return Vocabulary(
        torch.tensor([_kind(content) for content in contents], device=device),
        torch.tensor([_is_letter(_text(content)[-1:]) for content in contents], device=device),
        contents,
        ["" if content else tokenizer.backend.id_to_token(i) or f"<{i}>" for i, content in enumerate(contents)],
        tokenizer.eot_id,
    )


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _is_letter(char: str) -> bool:
    """Whether a character is a letter; a part of one of several bytes counts as one, as most such are letters."""
    return char.isalpha() or char == REPLACEMENT


def _kind(content: bytes) -> int:
    """The class of a token by its bytes; one that begins with a letter continues a word as far as it knows."""
    text = _text(content)
    stripped = text.lstrip()
    if not content:
        return SPECIAL
    if not stripped:
        return WHITESPACE
    if _is_letter(stripped[0]):
        return WORD_START if stripped != text else WORD_CONTINUATION
    return DIGIT if stripped[0].isnumeric() else PUNCTUATION


def classes_of(tokens: Tensor, vocabulary: Vocabulary, rare: Tensor | None = None) -> Tensor:
    """The class of every token (B, S), int64; `rare` (V,) bool are the ids of the class `rare`, None: none are.

    The first token of a sequence has none before it: with a letter first it is a word's start.
    """
    # A letter without white space before it goes on with a word only where the token before has ended in a letter.
    after_letter = torch.zeros_like(tokens, dtype=torch.bool)
    after_letter[:, 1:] = vocabulary.ends_in_letter[tokens[:, :-1]]
    classes = vocabulary.kind[tokens]  # (B, S)
    classes = torch.where((classes == WORD_CONTINUATION) & ~after_letter, WORD_START, classes)
    return classes if rare is None else torch.where(rare[tokens] & (classes != SPECIAL), RARE, classes)


def rare_ids(counts_V: Tensor, vocabulary: Vocabulary, share: float) -> Tensor:
    """Which ids are rare in texts of these counts, (V,) bool: the least frequent, until they are `share` of all tokens.

    Ids with equal counts are rare together, so the share is reached or passed. None is rare with a share of 0.
    """
    # Special tokens have a class of their own, and do not count.
    counts_V = torch.where(vocabulary.kind == SPECIAL, 0, counts_V)
    if share == 0 or not counts_V.any():
        return torch.zeros_like(counts_V, dtype=torch.bool)
    ordered = counts_V.sort().values
    first = torch.searchsorted(ordered.cumsum(0).double(), share * counts_V.sum().double())
    return (counts_V > 0) & (counts_V <= ordered[first.clamp(max=ordered.numel() - 1)])


def shown(token: int, vocabulary: Vocabulary) -> str:
    """One token for a table: control characters escaped, bytes that are no text as \\xNN."""
    text = vocabulary.contents[token].decode("utf-8", "backslashreplace") or vocabulary.names[token]
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)


def joined(tokens: Sequence[int], vocabulary: Vocabulary) -> str:
    """The text of some tokens in a row; special ones by their names."""
    return "".join(texts_of(tokens, vocabulary))


def texts_of(tokens: Sequence[int], vocabulary: Vocabulary) -> list[str]:
    """The text of each of some tokens in a row, which joined are their text.

    A character that several tokens make up is given to the first of them, and the others have less or nothing.
    """
    texts = [vocabulary.names[token] for token in tokens]
    contents = [vocabulary.contents[token] for token in tokens]
    owners = [i for i, content in enumerate(contents) for _ in content]  # the token of each byte

    # Bytes that are no text, as at a cut through a character, come one by one as surrogates: so each character says of
    # how many bytes it is.
    place = 0
    for char in b"".join(contents).decode("utf-8", "surrogateescape"):
        is_no_text = "\udc80" <= char <= "\udcff"
        texts[owners[place]] += REPLACEMENT if is_no_text else char
        place += 1 if is_no_text else len(char.encode())
    return texts
