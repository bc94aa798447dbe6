"""The numbers of one or several checkpoints as parts of one document, plain enough for JSON: docs/analyze.md has it.

What is shown of the texts themselves is in `excerpts`.

Shapes: X texts, C classes, V vocabulary, L MoE layers, E experts, K choices, S positions, N checkpoints.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.analyze import counts as counting
from titan_moe.analyze import measures
from titan_moe.analyze.counts import Batches, Counts, count_batch, is_real, reduce_counts, zero_counts
from titan_moe.analyze.probes import (
    OUTPUTS_PER_SEQUENCE,
    KeptSequence,
    Pruning,
    agreement,
    changed_sets,
    keep_sequences,
)
from titan_moe.analyze.tokens import CLASSES, Vocabulary, classes_of
from titan_moe.metrics import load_entropy, maxvio
from titan_moe.model.transformer import Transformer
from titan_moe.runtime.world import Runtime

FORMAT = 1
DIGITS = 6  # significant ones of a real number
PAIRS = 20  # overlapping pairs that are listed for a layer


class Settings(NamedTuple):
    """What the command line sets: thresholds, and how many tokens the costly parts take."""

    dead_fraction: float = 0.1
    overlap_cosine: float = 0.9
    rare_share: float = 0.01
    piece_tokens: int = 32
    top_tokens: int = 10
    min_count: int = 5
    kept_tokens: int = 32768
    sample_tokens: int = 4096
    output_tokens: int = 256
    ablation_tokens: int = 2048
    ablation_passes: int = 128


class Text(NamedTuple):
    """A named text; `batches()` gives this rank's share of it anew."""

    name: str
    files: list[str]  # none: the run's validation data
    batches: Callable[[], Batches]
    seq_len: int
    batch_size: int  # sequences of a batch of one rank


class Tokens(NamedTuple):
    """What the texts hold: the same whatever the checkpoint."""

    vocabulary: Vocabulary
    by_class: Tensor  # (C, V) int64: how often each id occurs in each class
    rare: Tensor  # (V,) bool

    @property
    def counts(self) -> Tensor:
        """How often each id occurs, (V,)."""
        return self.by_class.sum(0)


class Checkpoint(NamedTuple):
    """What was measured of one checkpoint, the same on all ranks."""

    path: str
    step: int
    name: str
    counts: Counts
    sequences: list[KeptSequence]
    weight_similarity: Tensor  # (L, E, E)
    output_similarity: Tensor | None  # (L, E, E)


def sequences_for(num_tokens: int, texts: Sequence[Text], per_sequence: int | None = None) -> int:
    """How many sequences of each text make up `num_tokens` tokens of all, rounded up; 0 for 0.

    Where not all tokens of a sequence are taken, `per_sequence` of each are.
    """
    each = min(texts[0].seq_len, per_sequence or texts[0].seq_len)
    return -(-num_tokens // (len(texts) * each))


@torch.no_grad()
def run_pass(
    model: Transformer, texts: Sequence[Text], tokens: Tokens, settings: Settings, rt: Runtime
) -> tuple[Counts, list[KeptSequence]]:
    """Read the texts once: counts over all ranks, and this rank's part of the sequences that are kept."""
    layers, vocabulary = model.moe_layers(), tokens.vocabulary
    counts = zero_counts(
        texts=len(texts),
        vocabulary=vocabulary.kind.numel(),
        layers=len(layers),
        experts=layers[0].router_width,
        seq_len=texts[0].seq_len,
        device=vocabulary.kind.device,
    )
    biases = [layer.expert_bias for layer in layers]
    wanted = max(settings.kept_tokens, settings.sample_tokens, settings.ablation_tokens)
    for_outputs = sequences_for(settings.output_tokens, texts, OUTPUTS_PER_SEQUENCE)
    kept_per_text = max(sequences_for(wanted, texts), for_outputs)
    sequences: list[KeptSequence] = []

    # A batch without labels keeps this rank in step with others, for collectives that there are none of here.
    for x, text in enumerate(texts):
        for number, (ids, labels) in enumerate(text.batches()):
            if not is_real(labels):
                continue
            score, routings = model(ids, labels, want="score")
            counts.loss_sum[x] += score.ce_sum.double()
            count_batch(
                counts,
                x,
                ids,
                routings,
                biases,
                classes=classes_of(ids, vocabulary, tokens.rare),
                eot_id=vocabulary.eot_id,
                piece_tokens=settings.piece_tokens,
            )

            # Ranks take turns with the text's sequences, a batch each.
            first = (number * rt.world_size + rt.rank) * text.batch_size
            numbers = range(first, min(first + ids.shape[0], kept_per_text))
            if numbers:
                sequences += keep_sequences(x, numbers, ids, labels, routings)
    return reduce_counts(counts), sequences


def layer_numbers(checkpoint: Checkpoint, i: int, tokens: Tokens, settings: Settings) -> dict[str, Any]:
    """What a checkpoint's i-th MoE layer does, as far as it takes no text and no pairs of experts."""
    counts = checkpoint.counts
    load_E, num_tokens = counts.coactivation[i].diagonal(), int(counts.num_tokens.sum())
    even = load_E.sum().item() / load_E.numel()
    load_VE = counts.load_by_token[i, :, :-1]
    kl_E = measures.kl_to_mean(load_VE, tokens.counts)
    random_E = measures.kl_at_random(tokens.counts, load_E)
    excess_E = kl_E - random_E

    # Everything is of all tokens of all texts, each of which counts alike.
    return {
        "load": load_E,
        "share": load_E / max(1.0, load_E.sum().item()),
        "maxvio": maxvio(load_E),
        "load_entropy": load_entropy(load_E),
        "choices_per_token": load_E.sum() / num_tokens,
        "unused_slots": counts.unused[i],
        "unrouted_tokens": counts.unrouted[i],
        "load_by_text": counts.load_by_text[i, :, :-1],
        "load_by_class": counts.load_by_class[i, :, :-1],
        "load_by_position": counts.load_by_position[i, :, :-1],
        "documents": document_numbers(counts, i, load_E, num_tokens),
        "specialisation": {
            "kl": kl_E,
            "kl_random": random_E,
            "excess": excess_E,
            "mean": (excess_E.nan_to_num() * load_E).sum() / load_E.sum(),
        },
        "weight_similarity": checkpoint.weight_similarity[i],
        "output_similarity": None if checkpoint.output_similarity is None else checkpoint.output_similarity[i],
        "margin": margin_numbers(counts, i),
        "margin_missing": why_no_margin(counts, i),
        "entropy": {
            "mean": counts.entropy_sum[i] / num_tokens,
            "normalised_mean": counts.entropy_sum[i] / num_tokens / math.log(max(2, load_E.numel())),
            "histogram": counts.entropy_counts[i],
        },
        "dead_experts": (load_E < settings.dead_fraction * even).nonzero().flatten(),
    }


def document_numbers(counts: Counts, i: int, load_E: Tensor, num_tokens: int) -> dict[str, Any]:
    """How far the loads of pieces of documents are from even, and from the load of all."""
    # A mean alone can't tell a router that is uneven in every document from one that is so in a few.
    number = int(counts.long_pieces)
    maxvio_mean, maxvio_std = measures.mean_and_std(counts.piece_maxvio[:, i], number)
    entropy_mean, entropy_std = measures.mean_and_std(counts.piece_entropy[:, i], number)
    share_mean, share_std = measures.mean_and_std(counts.piece_share[:, i], number)

    # Short pieces are uneven by chance, which the divergence leaves out.
    kl_mean = measures.document_kl(
        counts.piece_nats[i].item(), counts.piece_share[0, i], load_E, counts.piece_inverse.item(), number, num_tokens
    )
    return {
        "num_pieces": number,
        "maxvio_mean": maxvio_mean,
        "maxvio_std": maxvio_std,
        "entropy_mean": entropy_mean,
        "entropy_std": entropy_std,
        "kl_mean": kl_mean,
        "share_mean": share_mean,
        "share_std": share_std,
    }


def margin_numbers(counts: Counts, i: int) -> dict[str, Any] | None:
    """Mean, median and histogram of a layer's router margin; None where no token had a choice."""
    histogram = counts.margin_counts[i]
    number = int(histogram.sum())
    if not number:
        return None
    return {
        "mean": counts.margin_sum[i] / number,
        "median": measures.median_of_bins(histogram, counting.MARGIN_EDGES),
        "histogram": histogram,
        "negative_share": counts.margin_negative[i] / number,
    }


def why_no_margin(counts: Counts, i: int) -> str | None:
    """Why a layer has no router margin; None where it has one."""
    if counts.margin_counts[i].any():
        return None

    # A margin is between an expert that a token has and one that it has not: each token lacks one of the two.
    load_E = counts.coactivation[i].diagonal()
    unrouted, num_tokens = int(counts.unrouted[i]), int(counts.num_tokens.sum())
    if int(load_E.sum()) != (num_tokens - unrouted) * load_E.numel():
        return "what the router compares is not finite"
    if unrouted == 0:
        return "every token has every expert, so that there is none to compare a choice with"
    if unrouted == num_tokens:
        return "no token has an expert"
    return f"{unrouted} of {num_tokens} tokens have no expert, and the others have every expert"


def pair_numbers(checkpoint: Checkpoint, i: int, settings: Settings) -> dict[str, Any]:
    """What each two experts of a layer have to do with each other."""
    counts = checkpoint.counts
    joint, num_tokens = counts.coactivation[i], int(counts.num_tokens.sum())
    load_E = joint.diagonal()
    lift = measures.lift(joint, load_E, load_E, num_tokens).fill_diagonal_(math.nan)
    overlap = measures.token_overlap(counts.load_by_token[i, :, :-1])
    is_single = int(load_E.sum()) <= num_tokens  # one choice a token: no two are made together
    lift = torch.full_like(lift, math.nan) if is_single else lift
    numbers: dict[str, Any] = {
        "coactivation": {"counts": joint, "lift": lift},
        "token_overlap": overlap,
        "overlapping_pairs": [],
    }

    # Two experts overlap where they answer alike to any token.
    if checkpoint.output_similarity is not None:
        cosine = checkpoint.output_similarity[i]
        pairs = (cosine >= settings.overlap_cosine).triu(1).nonzero().tolist()
        numbers["overlapping_pairs"] = [
            {
                "experts": [a, b],
                "output_cosine": cosine[a, b],
                "weight_cosine": checkpoint.weight_similarity[i, a, b],
                "token_overlap": overlap[a, b],
                "lift": lift[a, b],
            }
            for a, b in sorted(pairs, key=lambda pair: -cosine[pair[0], pair[1]].item())[:PAIRS]
        ]
    return numbers


def between_layers(counts: Counts, i: int) -> dict[str, Any]:
    """Which experts of the next layer follow which of this."""
    joint = counts.transitions[i]
    load_i, load_j = (counts.coactivation[layer].diagonal() for layer in (i, i + 1))
    conditional = joint / load_i.unsqueeze(1).double()
    return {
        "from": i,
        "to": i + 1,
        "counts": joint,
        "conditional": [row if load else None for row, load in zip(plain(conditional), load_i.tolist(), strict=True)],
        "lift": measures.lift(joint, load_i, load_j, int(counts.num_tokens.sum())),
        "mutual_information": measures.mutual_information(joint),
    }


def over_training(
    checkpoints: Sequence[dict[str, Any]], layers: Sequence[Sequence[dict[str, Any]]], drifting: Sequence[Tensor]
) -> dict[str, Any] | None:
    """The numbers of each checkpoint by layer, and how its choices (L, T, K) differ from those of others."""
    if len(checkpoints) < 2:
        return None

    # One number of each kind for a layer: matrices of each checkpoint would be many times what is told of the last.
    values = [[scalars_of(layer) for layer in of_one] for of_one in layers]
    names = ("maxvio", "load_entropy", "specialisation", "margin", "router_entropy", "dead_experts")
    names += ("weight_similarity", "output_similarity", "document_maxvio")

    # Neighbours show when the router settles; the last one shows how early it chose as it does in the end.
    pairs = list(pairwise(drifting))
    return {
        "checkpoints": [{key: one[key] for key in ("path", "step", "name")} for one in checkpoints],
        "loss": [one["loss"] for one in checkpoints],
        "measures": {name: [[layer[name] for layer in of_one] for of_one in values] for name in names},
        "load": [[layer["load"] for layer in of_one] for of_one in layers],
        "drift": {
            "num_tokens": drifting[0].shape[1],
            "changed": [changed_sets(before, after) for before, after in pairs],
            "agreement": [agreement(before, after) for before, after in pairs],
            "agreement_with_last": [agreement(before, drifting[-1]) for before in drifting],
        },
    }


def scalars_of(layer: dict[str, Any]) -> dict[str, Any]:
    """One number of each kind for a layer, from its entries; NaN where it has none."""
    outputs, margin = layer["output_similarity"], layer["margin"]
    return {
        "maxvio": layer["maxvio"],
        "load_entropy": layer["load_entropy"],
        "specialisation": layer["specialisation"]["mean"],
        "margin": math.nan if margin is None else margin["mean"],
        "router_entropy": layer["entropy"]["mean"],
        "dead_experts": len(layer["dead_experts"]),
        "weight_similarity": measures.mean_of_pairs(layer["weight_similarity"]),
        "output_similarity": math.nan if outputs is None else measures.mean_of_pairs(outputs),
        "document_maxvio": layer["documents"]["maxvio_mean"],
    }


def study_scalars(layers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """The handful that a study shows: means over layers, and the number of dead experts."""
    values = [scalars_of(layer) for layer in layers]

    def mean(name: str) -> float:
        return sum(float(one[name]) for one in values) / len(values)

    return {
        "specialisation": mean("specialisation"),
        "router_margin": mean("margin"),
        "router_entropy": mean("router_entropy"),
        "dead_experts": sum(one["dead_experts"] for one in values),
        "output_similarity": mean("output_similarity"),
        "weight_similarity": mean("weight_similarity"),
        "document_maxvio": mean("document_maxvio"),
    }


def text_entries(texts: Sequence[Text], counts: Counts) -> list[dict[str, Any]]:
    """What each text is, and the loss on it."""
    return [
        {
            "name": text.name,
            "files": text.files,
            "num_tokens": counts.num_tokens[x],
            "num_pieces": counts.pieces[x],
            "loss": counts.loss_sum[x] / counts.num_tokens[x],
        }
        for x, text in enumerate(texts)
    ]


def class_entries(tokens: Tokens) -> list[dict[str, Any]]:
    """Each class, its tokens and how many ids they have."""
    # Ids that are rare leave their class for that of rare ones.
    names = list(CLASSES)
    by_class = tokens.by_class.clone()
    by_class[names.index("rare")] = torch.where(tokens.rare, tokens.counts, 0)
    others = [i for i, name in enumerate(names) if name not in ("rare", "special")]
    by_class[others] = torch.where(tokens.rare, 0, by_class[others])
    return [
        {"name": name, "meaning": meaning, "num_tokens": row.sum(), "num_types": (row > 0).sum()}
        for (name, meaning), row in zip(CLASSES.items(), by_class, strict=True)
    ]


def bucket_entries(counts: Counts, seq_len: int) -> list[dict[str, Any]]:
    """The positions of each bucket, and its tokens."""
    starts = counting.bucket_starts(seq_len)
    ends = [start - 1 for start in starts[1:]] + [seq_len - 1]
    return [
        {"first": first, "last": last, "num_tokens": number}
        for first, last, number in zip(starts, ends, counts.tokens_by_position, strict=True)
    ]


def histogram_entries() -> dict[str, list[float | None]]:
    """The edges of the histograms, None for one without a bound."""
    bins = counting.ENTROPY_BINS
    return {
        "margin_edges": [None, *counting.MARGIN_EDGES, None],
        "entropy_edges": [i / bins for i in range(bins + 1)],
    }


def pruning_entry(pruning: Pruning | None) -> dict[str, Any] | None:
    """The losses without experts."""
    if pruning is None:
        return None
    return {
        "num_tokens": pruning.num_tokens,
        "loss": pruning.loss,
        "curve": [{"removed": number, "loss": loss} for number, loss in pruning.curve],
        "single": pruning.single,
    }


def plain(value: Any) -> Any:
    """Tensors as lists, numbers with DIGITS significant digits, None for one that is not finite."""
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {key: plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(one) for one in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
