"""Classes of tokens, rare ones, and their texts."""

import torch

from titan_moe.analyze.tokens import CLASSES, classes_of, joined, rare_ids, read_vocabulary, shown, texts_of
from titan_moe.data.tokenizer import bytes_tokenizer, train_bpe

NAMES = list(CLASSES)
CPU = torch.device("cpu")


def names_of(ids: list[int], tokenizer=None, rare=None) -> list[str]:
    vocabulary = read_vocabulary(tokenizer or bytes_tokenizer(), CPU)
    return [NAMES[i] for i in classes_of(torch.tensor([ids]), vocabulary, rare)[0].tolist()]


def test_classes_of_bytes_by_what_comes_before() -> None:
    text = "a cat's 12, ü\n"
    classes = dict(enumerate(names_of([*text.encode(), 256])))
    start, on, space = "word_start", "word_continuation", "whitespace"
    expected = [start, space, start, on, on, "punctuation", start, space, "digit", "digit", "punctuation", space]
    expected += [start, on, space, "special"]  # ü is two bytes, parts of a letter
    assert [classes[i] for i in range(len(classes))] == expected


def test_classes_of_a_bpe_by_hand() -> None:
    """Every token of a trained vocabulary: white space of its own begins a word whatever was before."""
    tokenizer = train_bpe(["the cat sat, on the 12 mats! " * 50], 300)
    vocabulary = read_vocabulary(tokenizer, CPU)
    ids = tokenizer.encode("the cat sat, on the 12 mats!")
    texts = [tokenizer.backend.decode([i]) for i in ids]
    for i, (text, name) in enumerate(zip(texts, names_of(ids, tokenizer), strict=True)):
        first = text.strip()[:1]
        after_letter = i > 0 and texts[i - 1][-1:].isalpha()
        if first.isalpha():
            assert name == ("word_continuation" if after_letter and text[0] != " " else "word_start"), text
        else:
            assert name == ("whitespace" if not first else "digit" if first.isdigit() else "punctuation"), text
    assert joined(ids, vocabulary) == "the cat sat, on the 12 mats!"


def test_rare_ids_are_the_least_frequent() -> None:
    vocabulary = read_vocabulary(bytes_tokenizer(), CPU)
    counts = torch.zeros(257, dtype=torch.int64)
    for char, count in {"a": 90, "b": 5, "c": 3, "d": 1, "e": 1}.items():
        counts[ord(char)] = count
    counts[256] = 1  # special: not among them

    def rare(share: float) -> str:
        return "".join(chr(i) for i in rare_ids(counts, vocabulary, share).nonzero().flatten().tolist())

    assert [rare(share) for share in (0, 0.01, 0.02, 0.03, 0.05, 0.06, 1)] == [
        "",
        "de",
        "de",
        "cde",
        "cde",
        "bcde",
        "abcde",
    ]
    names = names_of([*b"abd", 256], rare=rare_ids(counts, vocabulary, 0.02))
    assert names == ["word_start", "word_continuation", "rare", "special"]
    assert not rare_ids(torch.zeros_like(counts), vocabulary, 0.5).any()


def test_texts_of_tokens_join_to_the_text() -> None:
    vocabulary = read_vocabulary(bytes_tokenizer(), CPU)
    ids = [*"aü€".encode(), 256, *b"b\n", 0xC3]
    assert texts_of(ids, vocabulary) == [
        "a",
        "ü",
        "",
        "€",
        "",
        "",
        "<|endoftext|>",
        "b",
        "\n",
        "\N{REPLACEMENT CHARACTER}",
    ]
    assert [shown(i, vocabulary) for i in (ord("a"), ord("\n"), 0xC3, 256)] == ["a", "\\n", "\\xc3", "<|endoftext|>"]
    assert texts_of([], vocabulary) == []
