"""What an analysis shows of the texts: the top tokens of each expert with the text around them, and a sample to colour.

Shapes: X texts, V vocabulary, L MoE layers, E experts, K choices, S positions.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from titan_moe.analyze import measures
from titan_moe.analyze.analysis import Checkpoint, Settings, Text, Tokens
from titan_moe.analyze.probes import KeptSequence
from titan_moe.analyze.tokens import Vocabulary, classes_of, shown, texts_of
from titan_moe.diagnostics import NO_EXPERT

CONTEXTS, CONTEXT_TOKENS = 3, 12  # places shown for a top token, and tokens on either side


class Places(NamedTuple):
    """Where each id is in the kept sequences, and the texts of their tokens."""

    sequences: list[KeptSequence]
    texts: list[list[str]]
    of_id: dict[int, list[tuple[int, int]]]  # sequence, position; in the order of the texts


def find_places(sequences: list[KeptSequence], vocabulary: Vocabulary) -> Places:
    """Read the kept sequences once, for all look-ups."""
    of_id: dict[int, list[tuple[int, int]]] = {}
    for number, sequence in enumerate(sequences):
        for position, token in enumerate(sequence.tokens.tolist()):
            of_id.setdefault(token, []).append((number, position))
    return Places(sequences, [texts_of(one.tokens.tolist(), vocabulary) for one in sequences], of_id)


def top_tokens(checkpoint: Checkpoint, i: int, tokens: Tokens, places: Places, settings: Settings) -> list[Any]:
    """The ids that say most of each expert of a layer, with places where they went to it."""
    load_VE, counts_V = checkpoint.counts.load_by_token[i, :, :-1], tokens.counts
    load_E, num_tokens = load_VE.sum(0).tolist(), int(counts_V.sum())
    best = measures.top_tokens(load_VE, counts_V, number=settings.top_tokens, min_count=settings.min_count)

    # Lift is written out once more, of exact counts.
    entries: list[list[dict[str, Any]]] = []
    for expert, ids in enumerate(best):
        entries.append([])
        for token in ids:
            count, total = int(load_VE[token, expert]), int(counts_V[token])
            lift = count / load_E[expert] * num_tokens / total
            entries[-1].append(
                {
                    "token": token,
                    "text": shown(token, tokens.vocabulary),
                    "count": count,
                    "total": total,
                    "lift": lift,
                    "pmi": math.log(lift),
                    "contexts": contexts(places, i, expert, token),
                }
            )
    return entries


def contexts(places: Places, layer: int, expert: int, token: int) -> list[dict[str, Any]]:
    """The text around the first places of the kept sequences where the token went to the expert."""
    results: list[dict[str, Any]] = []

    # In the order of the texts, so that the places do not depend on the ranks.
    for number, position in places.of_id.get(token, []):
        sequence, texts = places.sequences[number], places.texts[number]
        if len(results) == CONTEXTS:
            break
        if bool((sequence.experts[layer, position] == expert).any()):
            results.append(
                {
                    "before": "".join(texts[max(0, position - CONTEXT_TOKENS) : position]),
                    "token": texts[position],
                    "after": "".join(texts[position + 1 : position + 1 + CONTEXT_TOKENS]),
                    "text": sequence.text,
                }
            )
    return results


def sample_of(
    sequences: Sequence[KeptSequence], texts: Sequence[Text], tokens: Tokens, settings: Settings
) -> dict[str, Any]:
    """Some text with the experts of each token, about `sample_tokens` tokens of it, alike of each text."""
    # All sequences have as many columns as the token with the most experts needs: a router may have far more slots.
    width = max((int((one.experts != NO_EXPERT).sum(-1).max()) for one in sequences), default=0)
    limit = -(-settings.sample_tokens // len(texts))  # tokens of a text
    parts: list[dict[str, Any]] = []
    for x, text in enumerate(texts):
        # Where a sequence is longer than what is left of the text's part, its beginning is shown.
        entries = []
        for sequence in sequences:
            size = min(text.seq_len, limit - sequence.number * text.seq_len)
            if sequence.text == x and size > 0:
                entries.append(sample_entry(sequence, size, width, tokens))
        parts.append({"text": x, "sequences": entries})
    return {"texts": parts}


def sample_entry(sequence: KeptSequence, size: int, width: int, tokens: Tokens) -> dict[str, Any]:
    """The first `size` tokens of a sequence, each with its class and up to `width` experts."""
    # A token's class depends on the one before it, so that all of them are looked at, where the vocabulary is.
    classes_1S = classes_of(sequence.tokens[None].to(tokens.rare.device), tokens.vocabulary, tokens.rare)
    ids = sequence.tokens[:size]
    return {
        "tokens": texts_of(ids.tolist(), tokens.vocabulary),
        "ids": ids,
        "classes": classes_1S[0, :size],
        "experts": sequence.experts[:, :size, :width],  # (L, S, K)
        "weights": sequence.weights[:, :size, :width].double().round(decimals=4),
    }
