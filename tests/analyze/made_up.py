"""An analysis of a made-up router: experts prefer some tokens, loads and lifts are counted from their choices."""

import math
from typing import Any

import numpy as np

CLASSES = ("word_start", "word_continuation", "digit", "punctuation", "whitespace", "rare", "special")
# Texts that others wrote may hold anything: markup, scripts, quotes, control characters, half characters.
NASTY = (
    "<b>",
    "</script>",
    "<!--",
    "&amp;",
    '"',
    "'",
    "\\",
    "`",
    "${x}",
    "{{ 1 }}",
    "\x00",
    "\x1b[0m",
    "\t",
    "\n",
    " ",
    "",
)
NASTY += (
    "\ufffd",
    "\udcff",
    "\u202e",
    "é",
    "漢",
    "🙂",
    "]]>",
    "<img src=x onerror=alert(1)>",
    "__proto__",
    "%s",
    "\r\n",
    "\\xff",
)
WORDS = (
    " the",
    " of",
    " and",
    " a",
    " to",
    " in",
    " is",
    " it",
    " that",
    " was",
    " for",
    " on",
    " are",
    " with",
    " as",
)


def tokens_of(num_tokens: int) -> tuple[str, ...]:
    """A vocabulary: hard ones first, then words and pieces."""
    return (*NASTY, *WORDS, *(f"t{index}" for index in range(num_tokens)))[:num_tokens]


def made_up(
    num_layers: int = 3,
    num_experts: int = 8,
    top_k: int = 2,
    num_texts: int = 2,
    num_checkpoints: int = 1,
    *,
    pruning: bool = True,
    outputs: bool = True,
    num_tokens: int = 1024,
    seq_len: int = 64,
    vocab: int = 96,
    sample_tokens: int = 256,
) -> dict[str, Any]:
    """analysis.json of format 1, as a dict."""
    rng = np.random.default_rng(1)
    words = tokens_of(vocab)
    ids_T = rng.integers(0, vocab, num_tokens)
    texts_T = np.arange(num_tokens) * num_texts // num_tokens
    classes_T = ids_T % len(CLASSES)
    taste_LVE = rng.normal(size=(num_layers, vocab, num_experts)) * 1.5
    logits_LTE = taste_LVE[:, ids_T] + rng.normal(size=(num_layers, num_tokens, num_experts)) * 0.7
    if num_experts > 2:
        logits_LTE[0, :, 1] = -50.0  # a dead expert
    chosen_LTK = np.argsort(-logits_LTE, -1)[..., :top_k]
    weights_LTK = np.exp(np.take_along_axis(logits_LTE, chosen_LTK, -1))
    weights_LTK /= weights_LTK.sum(-1, keepdims=True)
    positions_T = np.arange(num_tokens) % seq_len
    edges = [0, *(2**power for power in range(2, int(math.log2(seq_len)) + 1))]
    buckets_T = np.searchsorted(edges, positions_T, "right") - 1

    def counts(layer: int, groups_T: np.ndarray, num_groups: int) -> list[list[int]]:
        table = np.zeros((num_groups, num_experts), dtype=int)
        for k in range(top_k):
            np.add.at(table, (groups_T, chosen_LTK[layer, :, k]), 1)
        return table.tolist()

    layers = []
    for index in range(num_layers):
        layer = made_up_layer(rng, index, chosen_LTK[index], ids_T, words, num_experts, outputs)
        layer["load_by_text"] = counts(index, texts_T, num_texts)
        layer["load_by_class"] = counts(index, classes_T, len(CLASSES))
        layer["load_by_position"] = counts(index, buckets_T, len(edges) - 1)
        layers.append(layer)
    half = sample_tokens // num_texts
    sample = []
    for text in range(num_texts):
        part = slice(text * num_tokens // num_texts, text * num_tokens // num_texts + half)
        sequence = {
            "tokens": [words[token] for token in ids_T[part]],
            "ids": ids_T[part].tolist(),
            "classes": classes_T[part].tolist(),
            "experts": chosen_LTK[:, part].tolist(),
            "weights": weights_LTK[:, part].round(4).tolist(),
        }
        sample.append({"text": text, "sequences": [sequence]})
    per_layer = (num_checkpoints, num_layers)
    measures = (
        "maxvio load_entropy specialisation margin router_entropy dead_experts weight_similarity output_similarity"
    )
    return {
        "format": 1,
        "version": "0.1.0",
        "checkpoint": {"path": "outputs/<i>mini</i>/step-30", "step": 30, "name": "<i>mini</i>, step 30"},
        "model": {
            "num_layers": num_layers + 1,
            "moe_layers": [index + 1 for index in range(num_layers)],
            "num_experts": num_experts,
            "top_k": top_k,
            "router": "topk_softmax",
            "balancers": ["aux_loss"],
        },
        "settings": {"dead_fraction": 0.1, "overlap_cosine": 0.9, "rare_share": 0.01, "out": "a<b"},
        "texts": [
            {
                "name": ("prose", "<script>alert(1)</script>", "code")[text % 3] + str(text // 3 or ""),
                "files": [],
                "num_tokens": int((texts_T == text).sum()),
                "num_pieces": 4,
                "loss": 3.0 + text,
            }
            for text in range(num_texts)
        ],
        "num_tokens": num_tokens,
        "loss": 3.25,
        "token_classes": [
            {
                "name": name,
                "meaning": f"tokens that are {name} <here>.",
                "num_tokens": int((classes_T == index).sum()),
                "num_types": len(set(ids_T[classes_T == index].tolist())),
            }
            for index, name in enumerate(CLASSES)
        ],
        "position_buckets": [
            {"first": edges[index], "last": edges[index + 1] - 1, "num_tokens": int((buckets_T == index).sum())}
            for index in range(len(edges) - 1)
        ],
        "histograms": {
            "margin_edges": [None, *(10 ** (power / 4) for power in range(-20, 1)), None],
            "entropy_edges": [index / 32 for index in range(33)],
        },
        "layers": layers,
        "between_layers": [
            between(index, chosen_LTK[index], chosen_LTK[index + 1], num_experts) for index in range(num_layers - 1)
        ],
        "sample": {"texts": sample},
        "pruning": {
            "num_tokens": 512,
            "loss": 3.25,
            "curve": [{"removed": removed, "loss": 3.25 + 0.1 * removed**2} for removed in range(num_experts)],
            "single": (rng.random((num_layers, num_experts)) / 10 - 0.01).tolist(),
        }
        if pruning
        else None,
        "over_training": {
            "checkpoints": [
                {"path": f"step-{10 * n}", "step": 10 * n, "name": f"step {10 * n}"}
                for n in range(1, num_checkpoints + 1)
            ],
            "loss": [4.0 - 0.1 * n for n in range(num_checkpoints)],
            "measures": {key: rng.random(per_layer).tolist() for key in [*measures.split(), "document_maxvio"]},
            "load": rng.integers(1, 90, (*per_layer, num_experts)).tolist(),
            "drift": {
                "num_tokens": 512,
                "changed": rng.random((num_checkpoints - 1, num_layers)).tolist(),
                "agreement": rng.random((num_checkpoints - 1, num_layers)).tolist(),
                "agreement_with_last": rng.random(per_layer).tolist(),
            },
        }
        if num_checkpoints > 1
        else None,
        "scalars": {"analysis/maxvio": 0.5},
    }


def made_up_layer(
    rng: Any,
    index: int,
    chosen_TK: np.ndarray,
    ids_T: np.ndarray,
    words: tuple[str, ...],
    num_experts: int,
    outputs: bool,
) -> dict[str, Any]:
    """What a layer's choices say: loads, co-activation, tokens; likeness and spreads are drawn at random."""
    num_tokens, top_k = chosen_TK.shape
    taken_TE = np.zeros((num_tokens, num_experts))
    np.put_along_axis(taken_TE, chosen_TK, 1, -1)
    load_E = taken_TE.sum(0)
    together_EE = taken_TE.T @ taken_TE
    expected_EE = np.outer(load_E, load_E) / num_tokens
    lift_EE = np.divide(together_EE, expected_EE, out=np.full_like(expected_EE, np.nan), where=expected_EE > 0)
    np.fill_diagonal(lift_EE, np.nan)
    alike_EE = rng.random((num_experts, num_experts)) * 0.6
    alike_EE = (alike_EE + alike_EE.T) / 2
    np.fill_diagonal(alike_EE, 1)
    counts_EV = np.stack([np.bincount(ids_T, taken_TE[:, expert], len(words)) for expert in range(num_experts)])
    overlap = alike_EE.tolist()
    for expert in np.flatnonzero(load_E == 0):
        overlap[expert] = None
    kl = [
        None if load == 0 else round(float(value), 4)
        for load, value in zip(load_E, rng.random(num_experts), strict=True)
    ]
    spread = {
        "num_pieces": 8,
        "maxvio_mean": 1.5,
        "maxvio_std": 0.3,
        "entropy_mean": 0.8,
        "entropy_std": 0.1,
        "kl_mean": 0.1,
    }
    return {
        "layer": index + 1,
        "load": load_E.astype(int).tolist(),
        "share": (load_E / load_E.sum()).tolist(),
        "maxvio": float(load_E.max() / load_E.mean() - 1),
        "load_entropy": 0.9,
        "choices_per_token": float(load_E.sum() / num_tokens),
        "unused_slots": 1000 * index,
        "unrouted_tokens": 10 * index,
        "documents": {**spread, "share_mean": kl, "share_std": kl},
        "specialisation": {"kl": kl, "kl_random": kl, "excess": kl, "mean": 0.5 + 0.01 * index},
        "coactivation": {
            "counts": together_EE.astype(int).tolist(),
            "lift": with_null(lift_EE) if top_k > 1 else None,
        },
        "weight_similarity": (alike_EE / 9).tolist(),
        "output_similarity": alike_EE.tolist() if outputs else None,
        "token_overlap": overlap,
        "margin": None
        if top_k == num_experts
        else {"mean": 0.1, "median": 0.05, "histogram": rng.integers(0, 9, 22).tolist(), "negative_share": 0.0},
        "margin_missing": "every token has every expert" if top_k == num_experts else None,
        "entropy": {"mean": 1.5, "normalised_mean": 0.7, "histogram": rng.integers(0, 9, 32).tolist()},
        "dead_experts": np.flatnonzero(load_E < 0.1 * load_E.mean()).tolist(),
        "overlapping_pairs": [
            {
                "experts": [0, num_experts - 1],
                "output_cosine": 0.95,
                "weight_cosine": 0.2,
                "token_overlap": 0.8,
                "lift": None,
            }
        ],
        "top_tokens": [top_tokens(counts_E, ids_T, words) for counts_E in counts_EV],
    }


def top_tokens(counts_V: np.ndarray, ids_T: np.ndarray, words: tuple[str, ...]) -> list[dict[str, Any]]:
    """The ten tokens with the largest count x ln lift."""
    total_V = np.bincount(ids_T, minlength=len(words))
    load = counts_V.sum()
    lift_V = (counts_V / max(load, 1)) / np.maximum(total_V / len(ids_T), 1e-9)
    score_V = np.where(lift_V > 1, counts_V * np.log(np.maximum(lift_V, 1e-9)), 0)
    places = [{"before": "<u>before ", "token": "<b>", "after": " & after\n\x00", "text": 0}] * 3
    return [
        {
            "token": int(token),
            "text": words[token],
            "count": int(counts_V[token]),
            "total": int(total_V[token]),
            "lift": float(lift_V[token]),
            "pmi": float(np.log(lift_V[token])),
            "contexts": places,
        }
        for token in np.argsort(-score_V)[:10]
        if score_V[token] > 0
    ]


def between(index: int, chosen_TK: np.ndarray, next_TK: np.ndarray, num_experts: int) -> dict[str, Any]:
    """Choices of a layer and of the next one, together."""
    counts_EE = np.zeros((num_experts, num_experts), dtype=int)
    for one in chosen_TK.T:
        for other in next_TK.T:
            np.add.at(counts_EE, (one, other), 1)
    rows_E, columns_E = counts_EE.sum(1), counts_EE.sum(0)
    expected_EE = np.outer(rows_E, columns_E) / counts_EE.sum()
    lift_EE = np.divide(counts_EE, expected_EE, out=np.full(expected_EE.shape, np.nan), where=expected_EE > 0)
    return {
        "from": index,
        "to": index + 1,
        "counts": counts_EE.tolist(),
        "conditional": [
            None if total == 0 else (row / total).tolist() for row, total in zip(counts_EE, rows_E, strict=True)
        ],
        "lift": with_null(lift_EE),
        "mutual_information": 0.2,
    }


def with_null(values: np.ndarray) -> list[Any]:
    """Nested lists, null for NaN; a row of null alone is null."""
    rows = [[None if math.isnan(value) else float(value) for value in row] for row in values]
    return [None if all(value is None for value in row) else row for row in rows]
