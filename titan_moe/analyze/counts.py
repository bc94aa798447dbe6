"""One pass over texts: what is counted of every token's routing, as sums of fixed size on the model's device.

All of it is functions of the routings that the model returns. Counts are int64 and exact; they and the sums of real
numbers add up over batches and ranks.

Shapes: X texts, C classes, V vocabulary, L MoE layers, E experts, K choices, B sequences, S positions, T = B * S
tokens, P buckets of positions, Q pieces of documents.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from titan_moe.analyze.tokens import CLASSES, Vocabulary, classes_of
from titan_moe.balancer import token_entropy
from titan_moe.metrics import load_entropy, maxvio
from titan_moe.model.cross_entropy import IGNORE
from titan_moe.model.documents import places_of
from titan_moe.model.routing import Routing
from titan_moe.step import all_reduce_sums

MARGIN_EDGES = [10 ** (exponent / 4) for exponent in range(-20, 5)]  # 1e-5 to 10; one bin more on either side
ENTROPY_BINS = 32  # of entropies over ln E, from 0 to 1
Batches = Iterable[tuple[Tensor, Tensor]]  # tokens and labels, (B, S) each


class Counts(NamedTuple):
    """What a pass counts. Columns of `..._by_...` have one expert more, to which choices of no expert are counted."""

    loss_sum: Tensor  # (X,) float64, nats
    num_tokens: Tensor  # (X,) int64
    load_by_text: Tensor  # (L, X, E + 1) int64
    load_by_token: Tensor  # (L, V, E + 1) int64
    load_by_class: Tensor  # (L, C, E + 1) int64
    load_by_position: Tensor  # (L, P, E + 1) int64
    tokens_by_position: Tensor  # (P,) int64
    coactivation: Tensor  # (L, E, E) int64: tokens that chose both; the diagonal is the load
    transitions: Tensor  # (L - 1, E, E) int64: tokens that chose i in a layer and j in the next
    unused: Tensor  # (L,) int64: slots that the router left without an expert
    unrouted: Tensor  # (L,) int64: tokens that have no expert at all
    margin_counts: Tensor  # (L, bins) int64
    margin_sum: Tensor  # (L,) float64
    margin_negative: Tensor  # (L,) int64
    entropy_counts: Tensor  # (L, ENTROPY_BINS) int64
    entropy_sum: Tensor  # (L,) float64, nats
    pieces: Tensor  # (X,) int64: pieces of documents, of any length
    long_pieces: Tensor  # () int64: those of at least `piece_tokens` tokens, of which the rest is
    piece_inverse: Tensor  # () float64: sum of 1 / tokens
    piece_maxvio: Tensor  # (2, L) float64: sum, and sum of squares
    piece_entropy: Tensor  # (2, L) float64: of the load's normalised entropy
    piece_nats: Tensor  # (L,) float64: sum of the load's entropies in nats
    piece_share: Tensor  # (2, L, E) float64: of the expert's share of the piece's load


def zero_counts(
    *, texts: int, vocabulary: int, layers: int, experts: int, seq_len: int, device: torch.device
) -> Counts:
    """A pass's sums before the first batch."""
    X, V, L, E, P = texts, vocabulary, layers, experts, len(bucket_starts(seq_len))

    def count(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def total(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=device)

    # A column more than there are experts takes the choices of none, so that counting needs no selection.
    return Counts(
        loss_sum=total(X),
        num_tokens=count(X),
        load_by_text=count(L, X, E + 1),
        load_by_token=count(L, V, E + 1),
        load_by_class=count(L, len(CLASSES), E + 1),
        load_by_position=count(L, P, E + 1),
        tokens_by_position=count(P),
        coactivation=count(L, E, E),
        transitions=count(L - 1, E, E),
        unused=count(L),
        unrouted=count(L),
        margin_counts=count(L, len(MARGIN_EDGES) + 1),
        margin_sum=total(L),
        margin_negative=count(L),
        entropy_counts=count(L, ENTROPY_BINS),
        entropy_sum=total(L),
        pieces=count(X),
        long_pieces=count(),
        piece_inverse=total(),
        piece_maxvio=total(2, L),
        piece_entropy=total(2, L),
        piece_nats=total(L),
        piece_share=total(2, L, E),
    )


def bucket_starts(seq_len: int) -> list[int]:
    """The first position of each bucket: 0, 1, 2, 4, 8 ..., each as long as all before it."""
    return [0, *(1 << i for i in range((seq_len - 1).bit_length()))]


def choices_of(routings: Sequence[Routing]) -> Tensor:
    """The experts that the tokens chose, (L, T, K) int64; E for a choice of no expert."""
    widest = max(routing.topk_experts.shape[1] for routing in routings)
    E = routings[0].scores.shape[-1]
    parts = [routing.topk_experts for routing in routings]
    return torch.stack([nn.functional.pad(part, (0, widest - part.shape[1]), value=E) for part in parts])


def chosen_of(choices: Tensor, num_experts: int) -> Tensor:
    """Which experts each token chose, from (L, T, K): (L, T, E) fp32 of 0 and 1."""
    L, T, _ = choices.shape
    chosen = torch.zeros(L, T, num_experts + 1, device=choices.device)
    return chosen.scatter_(2, choices, 1.0)[..., :-1]


def margins(routing: Routing, expert_bias_E: Tensor | None) -> Tensor:
    """How clear the choice was, (T,): the smallest selection value of a chosen expert minus the largest of the others.

    Selection values are what the router compared, with the bias: logits or sigmoids, as the router has them; its scores
    where it tells none. Below 0 where a token did not get its best experts; infinite where it chose all or none.
    """
    values_TE = routing.scores if routing.selection is None else routing.selection
    if expert_bias_E is not None:
        values_TE = values_TE + expert_bias_E.float()
    chosen_TE = chosen_of(routing.topk_experts.unsqueeze(0), values_TE.shape[-1])[0] > 0  # (T, E)
    lowest_T = values_TE.masked_fill(~chosen_TE, math.inf).amin(-1)
    return lowest_T - values_TE.masked_fill(chosen_TE, -math.inf).amax(-1)


def count_by(counts: Tensor, group_T: Tensor, choices: Tensor) -> None:
    """Add to counts (L, G, E + 1) how often the tokens of each group chose each expert, by choices (L, T, K)."""
    L, _, columns = counts.shape
    slots = (group_T.view(1, -1, 1) * columns + choices).view(L, -1)  # (L, T K)
    counts.view(L, -1).scatter_add_(1, slots, torch.ones_like(slots))


@torch.no_grad()
def count_batch(
    counts: Counts,
    text: int,
    tokens: Tensor,
    routings: Sequence[Routing],
    biases: Sequence[Tensor | None],
    *,
    classes: Tensor,
    eot_id: int,
    piece_tokens: int,
) -> None:
    """Add what a batch of the text, tokens and classes (B, S), gives; `biases` are the layers' selection biases."""
    choices = choices_of(routings)  # (L, T, K)
    chosen = chosen_of(choices, routings[0].scores.shape[-1])  # (L, T, E)

    # Products of 0 and 1 in fp32 are exact, for a batch has fewer than 2^24 tokens.
    coactivation = (chosen.transpose(1, 2) @ chosen).long()  # (L, E, E)
    counts.coactivation.add_(coactivation)
    counts.transitions.add_((chosen[:-1].transpose(1, 2) @ chosen[1:]).long())
    counts.load_by_text[:, text, :-1] += coactivation.diagonal(dim1=1, dim2=2)

    # A slot without an expert is unused where the router may leave some so: of others, as those in which experts choose
    # their tokens, the number of slots says nothing.
    E = chosen.shape[-1]
    counts.unused.add_(torch.stack([(r.topk_experts == E).sum() * r.has_unused for r in routings]))
    counts.unrouted.add_((chosen.sum(-1) == 0).sum(-1))

    # The same choices by what the token is and where it stands.
    B, S = tokens.shape
    starts = torch.tensor(bucket_starts(S), device=tokens.device)
    bucket_T = (torch.bucketize(torch.arange(S, device=tokens.device), starts, right=True) - 1).repeat(B)
    count_by(counts.load_by_token, tokens.flatten(), choices)
    count_by(counts.load_by_class, classes.flatten(), choices)
    count_by(counts.load_by_position, bucket_T, choices)
    counts.tokens_by_position.scatter_add_(0, bucket_T, torch.ones_like(bucket_T))
    counts.num_tokens[text] += tokens.numel()

    _count_certainty(counts, routings, biases)
    count_documents(counts, text, tokens, choices, eot_id, piece_tokens)


def _count_certainty(counts: Counts, routings: Sequence[Routing], biases: Sequence[Tensor | None]) -> None:
    """Add the margins and entropies of a batch."""
    margin_LT = torch.stack([margins(routing, bias) for routing, bias in zip(routings, biases, strict=True)])
    is_finite = margin_LT.isfinite()
    edges = torch.tensor(MARGIN_EDGES, device=margin_LT.device)
    counts.margin_counts.scatter_add_(1, torch.bucketize(margin_LT, edges, right=True), is_finite.long())
    counts.margin_sum.add_(torch.where(is_finite, margin_LT, 0).double().sum(-1))
    counts.margin_negative.add_((is_finite & (margin_LT < 0)).sum(-1))

    # The entropy of one expert of one is 0, also of its share.
    entropy_LT = torch.stack([token_entropy(routing) for routing in routings])
    share_LT = entropy_LT / math.log(max(2, routings[0].scores.shape[-1]))
    bin_LT = (share_LT * ENTROPY_BINS).long().clamp(0, ENTROPY_BINS - 1)
    counts.entropy_counts.scatter_add_(1, bin_LT, torch.ones_like(bin_LT))
    counts.entropy_sum.add_(entropy_LT.double().sum(-1))


def count_documents(counts: Counts, text: int, tokens: Tensor, choices: Tensor, eot_id: int, piece_tokens: int) -> None:
    """Add the loads of the batch's pieces of documents: what of a document is in one sequence (B, S).

    Its end-of-text token belongs to the document that it ends.
    """
    # Documents are numbered in each sequence anew.
    documents = places_of(tokens, eot_id).document_ids  # (B, S)
    before = documents.amax(1).add(1).cumsum(0)  # (B,): the pieces up to the end of each sequence
    piece_T = (documents + (before - documents.amax(1) - 1).unsqueeze(1)).flatten()
    Q = int(before[-1])
    counts.pieces[text] += Q

    # Short pieces can't have an even load whatever the router does.
    L, E = counts.coactivation.shape[:2]
    load = torch.zeros(L, Q, E + 1, dtype=torch.int64, device=tokens.device)
    count_by(load, piece_T, choices)
    length_Q = piece_T.new_zeros(Q).scatter_add_(0, piece_T, torch.ones_like(piece_T))
    long_Q = length_Q >= piece_tokens
    load = load[:, long_Q, :-1]  # (L, Q, E)
    counts.long_pieces.add_(long_Q.sum())
    counts.piece_inverse.add_(length_Q[long_Q].double().reciprocal().sum())

    # Sums and sums of squares over pieces, each of which counts alike.
    share = load / load.sum(-1, keepdim=True).clamp(min=1).double()
    values = {
        counts.piece_maxvio: maxvio(load),  # (L, Q)
        counts.piece_entropy: load_entropy(load),
        counts.piece_share: share,  # (L, Q, E)
    }
    for sums, value in values.items():
        sums.add_(torch.stack([value.sum(1), value.square().sum(1)]))
    counts.piece_nats.add_(torch.special.entr(share).sum((1, 2)))


def reduce_counts(counts: Counts) -> Counts:
    """The sum over all ranks."""
    return Counts(**all_reduce_sums(counts._asdict()))


def is_real(labels: Tensor) -> bool:
    """Whether a batch is one of the text; the others only keep ranks in step, which an analysis does without."""
    return bool((labels != IGNORE).any())


def count_tokens(texts: Sequence[Callable[[], Batches]], vocabulary: Vocabulary) -> Tensor:
    """How often each id occurs in each class, with no class of rare ones, over all texts and ranks: (C, V) int64."""
    kinds = vocabulary.kind
    counts = torch.zeros(len(CLASSES) * kinds.numel(), dtype=torch.int64, device=kinds.device)
    for batches in texts:
        for tokens, labels in batches():
            if is_real(labels):
                slots = (classes_of(tokens, vocabulary) * kinds.numel() + tokens).flatten()
                counts.scatter_add_(0, slots, torch.ones_like(slots))
    return all_reduce_sums({"counts": counts})["counts"].view(len(CLASSES), -1)
