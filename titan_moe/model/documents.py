"""Documents within sequences: which tokens are of which, and attention that stays inside them.

Shapes: B sequences, S queries and K keys of each, H query heads, G key-value heads, C channels of a head, N documents,
P ranks that share sequences.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.routing import Places
from titan_moe.runtime.compat import causal_varlen_attention

TOKENS_PER_DOCUMENT = 16  # on average, at least, where documents need room in a GPU's memory
aten = torch.ops.aten


class Sequences(NamedTuple):
    """What a rank has of its sequences; the defaults are those of a process that has all of them.

    `gather` makes the whole sequences (B, P S) of this rank's tokens (B, S). Of what there is of whole sequences
    `local_part` takes this rank's part, and `attended_part` that of the queries which attention has here; `runs` says
    where these begin and end in sequences of a length.
    """

    gather: Callable[[Tensor], Tensor] = lambda tokens: tokens
    local_part: Callable[[Tensor], Tensor] = lambda whole: whole
    attended_part: Callable[[Tensor], Tensor] = lambda whole: whole
    runs: Callable[[int], Sequence[tuple[int, int]]] = lambda length: [(0, length)]


class Documents(NamedTuple):
    """Where documents are among queries (B, S) and keys (B, K), each all in one row; a query sees its own document.

    A tensor per forward pass, whatever the documents are, so that nothing is read on the host: what is left of N + 1
    places holds the number of all queries, or keys. Where there are more than N documents, `fits` is NaN, else 1.
    """

    cu_queries: Tensor  # (N + 1,) int32: where each document begins, then where the last one ends
    cu_keys: Tensor  # (N + 1,) int32
    first_keys: Tensor  # (B, S) int64: the first key, in its sequence, that each query sees
    fits: Tensor  # scalar fp32


def places_of(tokens_BS: Tensor, eot_id: int, restart: bool = False) -> Places:
    """The places of the tokens of whole sequences. A document's end is of the document.

    With `restart` positions begin at 0 in each document, else in each sequence.
    """
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    is_end_BS = (tokens_BS == eot_id).long()
    documents_BS = is_end_BS.cumsum(1) - is_end_BS
    if restart:
        positions_BS = positions_BS - first_places(documents_BS)
    return Places(positions_BS, documents_BS)


def first_places(documents_BS: Tensor) -> Tensor:
    """Where, in its sequence, the document of each token begins: (B, S) int64, of the documents' numbers (B, S)."""
    positions_S = torch.arange(documents_BS.shape[1], device=documents_BS.device)
    return torch.where(is_first(documents_BS), positions_S, 0).cummax(1).values


def is_first(documents_BS: Tensor) -> Tensor:
    """Whether a token is the first of its document in its sequence: (B, S) bool."""
    return documents_BS != F.pad(documents_BS[:, :-1], (1, 0), value=-1)


def documents_of(whole_BS: Tensor, start: int, stop: int, *, limited: bool) -> Documents:
    """The documents of the queries from `start` to `stop` of whole sequences, and of their keys up to `stop`.

    `whole_BS` are the documents' numbers. With `limited` there is room for one in `TOKENS_PER_DOCUMENT` keys, and one
    in each sequence, else for any number.
    """
    # Borders come in the order of the keys, and those that are none go to the end, by a sort of fixed size.
    ids_BK, num_queries = whole_BS[:, :stop], stop - start
    position_K = torch.arange(stop, device=whole_BS.device)
    row_B1 = torch.arange(len(whole_BS), device=whole_BS.device).unsqueeze(1)
    is_first_BK = is_first(ids_BK)

    def borders(place_BK: Tensor, total: int) -> Tensor:
        return torch.where(is_first_BK, place_BK, total).flatten().sort().values.int()  # (B K,)

    # A document that ends before the first query has keys and no queries.
    B, first_BK = len(whole_BS), first_places(ids_BK)
    keys = borders(row_B1 * stop + position_K, B * stop)
    queries = keys if start == 0 else borders(row_B1 * num_queries + (position_K - start).clamp(min=0), B * num_queries)

    # One number for all who would have to know: NaN where the last place is not the end yet.
    room = len(keys) if not limited else min(len(keys), B * (stop // TOKENS_PER_DOCUMENT + 1))
    fits = torch.where(F.pad(keys, (0, 1), value=B * stop)[room] == B * stop, 1.0, torch.nan)
    cu_keys = F.pad(keys[:room], (0, 1), value=B * stop)
    cu_queries = cu_keys if start == 0 else F.pad(queries[:room], (0, 1), value=B * num_queries)
    return Documents(cu_queries, cu_keys, first_BK[:, start:], fits)


def takes_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether attention in documents is that of FlashAttention's kernels for sequences of different lengths."""
    return device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim % 8 == 0 and head_dim <= 256


def attend_in_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Causal attention within documents: q (B, H, S, C), k, v (B, G, K, C) -> (B, H, S, C).

    Queries are the last S of the K positions. Of each kind of device the cheapest way that reads nothing on the host.
    """
    (B, _, S, C), K = q.shape, k.shape[2]
    if takes_varlen(q.device, q.dtype, C):
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # (B, H, S, C) -> (B S, H, C)
        y = causal_varlen_attention(q, k, v, documents.cu_queries, documents.cu_keys, S, K)
        return y.unflatten(0, (B, S)).transpose(1, 2)
    if q.device.type == "cpu":
        return document_attention(q, k, v, documents.cu_queries, documents.cu_keys)[0]
    return attend_by_mask(q, k, v, documents.first_keys)


def attend_by_mask(q: Tensor, k: Tensor, v: Tensor, first_keys_BS: Tensor) -> Tensor:
    """`attend_in_documents` on any device and in any type, at the cost of the products of all pairs of tokens."""
    S, K = q.shape[2], k.shape[2]
    key_K = torch.arange(K, device=q.device)
    seen_BSK = (key_K <= key_K[K - S :].unsqueeze(-1)) & (key_K >= first_keys_BS.unsqueeze(-1))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen_BSK.unsqueeze(1), enable_gqa=q.shape[1] != k.shape[1])


@torch.library.custom_op("titan_moe::document_attention", mutates_args=())
def document_attention(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> tuple[Tensor, Tensor]:
    """`attend_in_documents` on a CPU, a document at a time, and the logsumexp (B, H, S) that its gradient wants.

    An operator of its own, because a compiler can't know how many documents there are.
    """
    y, lse = _outputs(q)
    for piece in _pieces(cu_queries, cu_keys, q, k):
        y[piece.queries], lse[piece.queries] = aten._scaled_dot_product_flash_attention_for_cpu(
            q[piece.queries], *_of_heads(piece, k, v), 0.0, piece.mask is None, attn_mask=piece.mask
        )
    return y, lse


@torch.library.custom_op("titan_moe::document_attention_backward", mutates_args=())
def document_attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_queries: Tensor, cu_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v of `document_attention`."""
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    grad_q, grad_k, grad_v = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)  # keys may have no query
    for piece in _pieces(cu_queries, cu_keys, q, k):
        at = piece.queries
        of_q, of_k, of_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad[at], q[at], *_of_heads(piece, k, v), y[at], lse[at], 0.0, piece.mask is None, attn_mask=piece.mask
        )
        grad_q[at] = of_q
        for total, part in ((grad_k, of_k), (grad_v, of_v)):
            total[piece.keys] = part.unflatten(1, (-1, piece.heads_per_key)).sum(2)
    return grad_q, grad_k, grad_v


class _Piece(NamedTuple):
    """A document in one sequence: the places of its queries and keys; `mask` (S, K) where these are not the same."""

    queries: tuple[slice, ...]
    keys: tuple[slice, ...]
    mask: Tensor | None
    heads_per_key: int


def _pieces(cu_queries: Tensor, cu_keys: Tensor, q: Tensor, k: Tensor) -> Iterator[_Piece]:
    S, K, heads = q.shape[2], k.shape[2], q.shape[1] // k.shape[1]
    borders = list(zip(cu_queries.tolist(), cu_keys.tolist(), strict=True))
    for (query, key), (end_query, end_key) in pairwise(borders):
        if query == borders[-1][0]:
            return  # the places that are left
        if query == end_query:
            continue  # a document before the first query

        # A document that began before the first query: its queries are the last of its positions.
        size, keys, row = end_query - query, end_key - key, query // S
        mask = None
        if size != keys:
            mask = torch.full((size, keys), -torch.inf, dtype=q.dtype).triu_(keys - size + 1)
        sequence = (slice(row, row + 1), slice(None))
        at_query, at_key = slice(query - row * S, end_query - row * S), slice(key - row * K, end_key - row * K)
        yield _Piece((*sequence, at_query), (*sequence, at_key), mask, heads)


def _of_heads(piece: _Piece, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """The keys and values of a document, for each head of the queries."""
    k, v = (x[piece.keys].repeat_interleave(piece.heads_per_key, 1) for x in (k, v))
    return k, v


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=dtype)


@document_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@document_attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor, cu_queries: Tensor, cu_keys: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *borders = inputs
    ctx.save_for_backward(q, k, v, *output, *borders)


def _backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return *document_attention_backward(grad, *ctx.saved_tensors), None, None  # pyrefly: ignore


document_attention.register_autograd(_backward, setup_context=_save)
DOCUMENT_ATTENTION = torch.ops.titan_moe.document_attention.default
DOCUMENT_ATTENTION_BACKWARD = torch.ops.titan_moe.document_attention_backward.default
