"""Causal self-attention with rotary positions and grouped key-value heads.

Shapes: B batch, S sequence, D dim, H query heads, G key-value heads, C channels of a head (D / H).
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.documents import Documents, attend_in_documents
from titan_moe.model.multipliers import times
from titan_moe.model.wrappers import plain_name

Rope = tuple[Tensor, Tensor]
# q (B, H, S, C), k and v (B, G, S, C) -> (B, H, S, C), and where the fourth argument is true the `max_logits`; the last
# are the documents that attention stays inside, of each run of queries, or none
Attend = Callable[[Tensor, Tensor, Tensor, bool, tuple[Documents, ...]], tuple[Tensor, Tensor | None]]
ROWS = 128  # queries whose logits `max_logits` has in memory at once


def check_attention(dim: int, num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError for heads that do not divide the width, or each other, and for heads of an odd width."""
    # Each head gets the same number of channels, and rotary positions turn these by pairs.
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"model.num_heads ({num_heads}) must divide model.dim ({dim})")
    if dim // num_heads % 2:
        raise ValueError(
            f"model.dim / model.num_heads ({dim} / {num_heads} = {dim // num_heads}) must be even: rotary positions "
            "turn pairs of channels"
        )

    # A key-value head serves a fixed number of query heads.
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"model.num_kv_heads ({num_kv_heads}) must divide model.num_heads ({num_heads}), or be 0 for as many"
        )


def attention_heads(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Of each weight of queries, keys, values and outputs how many heads it has, and the dimension that they share.

    They are told by their names, in any module with a `head_dim`. Queries, keys and values (H C, D) have a head in C
    rows; outputs (D, H C) have it in C columns, those that its C channels enter by.
    """
    heads = {}
    for prefix, module in model.named_modules():
        head_dim = getattr(module, "head_dim", None)
        if not isinstance(head_dim, int):
            continue
        for name, parameter in module.named_parameters(prefix):
            parts = plain_name(name).split(".")
            if parts[-1] == "weight" and parameter.dim() == 2 and parts[-2] in ("wq", "wk", "wv", "wo"):
                dim = int(parts[-2] == "wo")
                heads[plain_name(name)] = parameter.shape[dim] // head_dim, dim
    return heads


def rope_cos_sin(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Rope:
    """cos and sin of position * theta^(-2i / head_dim), each (S, C / 2) in fp32, for positions from 0.

    Computed once per forward pass and not kept: there is no longest sequence, and no buffer to rebuild, shard or cast.
    Source: Su et al. (2021), equation 15.
    """
    frequency = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequency)  # (S, C / 2)
    return angle.cos(), angle.sin()


def apply_rope(x_BSHC: Tensor, rope: Rope) -> Tensor:
    """Rotate channel i together with channel i + C / 2 (the half-split layout of Hugging Face), in fp32.

    Angles are (S, C / 2), or (B, S, C / 2) where sequences differ in their positions.
    """
    cos, sin = (of_position.unsqueeze(-2) for of_position in rope)  # (S, C / 2) -> (S, 1, C / 2)
    left, right = x_BSHC.float().chunk(2, dim=-1)  # (B, S, H, C) -> 2 x (B, S, H, C / 2)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).type_as(x_BSHC)


def attend_to_past(
    q_BHSC: Tensor,
    k_BGSC: Tensor,
    v_BGSC: Tensor,
    want_max: bool = False,
    documents: tuple[Documents, ...] = (),
) -> tuple[Tensor, Tensor | None]:
    """Causal attention of tokens to themselves and those before: q (B, H, S, C), k, v (B, G, S, C) -> (B, H, S, C).

    With `want_max` also the `max_logits` (H,), else None. With documents, which are one then, it stays inside them.
    """
    first_keys_BS = None
    if documents:
        first_keys_BS = documents[0].first_keys
        y_BHSC = attend_in_documents(q_BHSC, k_BGSC, v_BGSC, documents[0])
    else:
        grouped = q_BHSC.shape[1] != k_BGSC.shape[1]
        y_BHSC = F.scaled_dot_product_attention(q_BHSC, k_BGSC, v_BGSC, is_causal=True, enable_gqa=grouped)
    return y_BHSC, max_logits(q_BHSC.detach(), k_BGSC.detach(), first_keys_BS) if want_max else None


@torch.library.custom_op("titan_moe::max_logits", mutates_args=())
def max_logits(q: Tensor, k: Tensor, first_keys: Tensor | None = None) -> Tensor:
    """The largest attention logit q k / sqrt(C) of each head, (H,) fp32, over the batch and all keys that are seen.

    q (B, H, S, C) are the last S of the K positions of k (B, G, K, C); a query sees the keys up to its own position,
    and none before `first_keys` (B, S) where that is given. Exact, products in fp32, without a gradient, and with the
    logits of ROWS queries in memory. An operator of its own, because a compiler would unroll the loop.
    """
    # Heads that share a key head are rows of one product, so that keys are not copied for each.
    (H, S, C), (G, K) = q.shape[1:], k.shape[1:3]
    q_BGRSC, k_BGCK = q.float().unflatten(1, (G, H // G)), k.float().transpose(-1, -2)
    largest_GR = torch.full((G, H // G), -math.inf, device=q.device)
    is_later = torch.ones(ROWS, ROWS, dtype=torch.bool, device=q.device).triu_(1)

    for first in range(0, S, ROWS):
        # Of the keys up to the last of these queries only the latest ones are hidden from some of them.
        rows_BGRNC = q_BGRSC[..., first : first + ROWS, :]
        N = rows_BGRNC.shape[-2]
        seen_BGCM = k_BGCK[..., : K - S + first + N]
        logits_BGRNM = (rows_BGRNC.flatten(2, 3) @ seen_BGCM).unflatten(2, (-1, N))
        logits_BGRNM[..., -N:].masked_fill_(is_later[:N, :N], -math.inf)
        if first_keys is not None:
            key_M = torch.arange(seen_BGCM.shape[-1], device=q.device)
            is_before_BNM = key_M < first_keys[:, first : first + N].unsqueeze(-1)
            logits_BGRNM.masked_fill_(is_before_BNM[:, None, None], -math.inf)
        largest_GR = torch.maximum(largest_GR, logits_BGRNM.amax((0, 3, 4)))
    return largest_GR.flatten() / math.sqrt(C)


@max_logits.register_fake
def _(q: Tensor, k: Tensor, first_keys: Tensor | None = None) -> Tensor:
    return q.new_empty(q.shape[1], dtype=torch.float32)


MAX_LOGITS = torch.ops.titan_moe.max_logits.default


class Attention(nn.Module):
    """Softmax attention over the past; `qk_norm` puts an RMSNorm on each head's queries and keys before rotation.

    `attend` is a function that parallelism replaces, and `logits_multiplier` a factor of the attention logits beside
    1 / sqrt(head_dim), which a parametrization replaces.
    """

    def __init__(self, *, dim: int, num_heads: int, num_kv_heads: int, qk_norm: bool, norm_eps: float) -> None:
        super().__init__()
        self.logits_multiplier = 1.0
        self.head_dim = dim // num_heads
        self.grouped = num_kv_heads != num_heads
        self.attend: Attend = attend_to_past

        # A matrix for each of q, k and v, not one for all: tensor parallelism shards each by whole heads.
        self.wq = nn.Linear(dim, num_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, num_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(num_heads * self.head_dim, dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=norm_eps) if qk_norm else None

    def forward(
        self, x_BSD: Tensor, rope: Rope, want_max: bool = False, documents: tuple[Documents, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), and the `max_logits` (H,) where they are wanted; with documents inside them."""
        y_BHSC, max_logits_H = self.attend(*self.project(x_BSD, rope), want_max, documents)
        return self.wo(y_BHSC.transpose(1, 2).flatten(2)), max_logits_H  # (B, S, H C) -> (B, S, D)

    def project(self, x_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> queries (B, H, S, C), and keys and values (B, G, S, C); queries and keys are rotated."""
        q_BSHC, k_BSGC, v_BSGC = (w(x_BSD).unflatten(-1, (-1, self.head_dim)) for w in (self.wq, self.wk, self.wv))
        if self.q_norm is not None and self.k_norm is not None:
            q_BSHC, k_BSGC = self.q_norm(q_BSHC), self.k_norm(k_BSGC)
        q_BSHC = times(q_BSHC, self.logits_multiplier)

        # Heads go before the sequence, as attention takes them, by strides alone: in memory they stay behind it, where
        # the products before and after have them, and nothing is copied for the change, nor its gradient.
        q_BSHC, k_BSGC = apply_rope(q_BSHC, rope), apply_rope(k_BSGC, rope)
        return q_BSHC.transpose(1, 2), k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)
