"""Causal self-attention with rotary positions and grouped key-value heads.

Shapes: B batch, S sequence, D dim, H query heads, G key-value heads, C channels of a head, R those that are rotated.
"""

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.documents import Documents, attend_in_documents
from titan_moe.model.multipliers import times
from titan_moe.model.rope import Rotation, frequencies
from titan_moe.model.wrappers import plain_name

Rope = tuple[Tensor, Tensor]
QKNorm = Literal["none", "head", "full"]
# q (B, H, S, C), k and v (B, G, S, C) -> (B, H, S, C), and where the fourth argument is true the `max_logits`; the last
# are the documents that attention stays inside, of each run of queries, or none
Attend = Callable[[Tensor, Tensor, Tensor, bool, tuple[Documents, ...]], tuple[Tensor, Tensor | None]]
ROWS = 128  # queries whose logits `max_logits` has in memory at once


def checked_head_dim(dim: int, num_heads: int, num_kv_heads: int, head_dim: int, rotary_factor: float = 1.0) -> int:
    """Return the channels of a head: `head_dim`, or dim / num_heads where that is 0.

    Raises ValueError for heads that do not divide the width, or each other, and for an odd number of channels.
    """
    # Each head gets the same number of channels, and rotary positions turn these by pairs.
    if num_heads < 1 or (dim % num_heads and not head_dim):
        raise ValueError(f"model.num_heads ({num_heads}) must divide model.dim ({dim}), or model.head_dim be set")
    if not head_dim and dim // num_heads % 2:
        raise ValueError(
            f"model.dim / model.num_heads ({dim} / {num_heads} = {dim // num_heads}) must be even: rotary positions "
            "turn pairs of channels"
        )
    channels = head_dim or dim // num_heads
    if channels % 2:
        raise ValueError(f"model.head_dim ({head_dim}) must be even: rotary positions turn pairs of channels")
    if (rotated := rotary_channels(channels, rotary_factor)) < 2 or rotated % 2:
        raise ValueError(
            f"model.partial_rotary_factor ({rotary_factor}) of {channels} channels of a head is {rotated}: it must be "
            "an even number from 2 on, as rotary positions turn pairs of channels"
        )

    # A key-value head serves a fixed number of query heads.
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(
            f"model.num_kv_heads ({num_kv_heads}) must divide model.num_heads ({num_heads}), or be 0 for as many"
        )
    return channels


def rotary_channels(head_dim: int, factor: float) -> int:
    """How many channels of a head are rotated where a `factor` of them is: rounded down, as transformers does."""
    return int(head_dim * factor)


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


def rope_cos_sin(seq_len: int, rotation: Rotation, device: torch.device) -> Rope:
    """cos and sin of position times the `frequencies`, each (S, R / 2) in fp32, for positions from 0.

    Computed once per forward pass and not kept: there is no longest sequence, and no buffer to rebuild, shard or cast.
    """
    angle = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies(rotation, device))
    return times(angle.cos(), rotation.factor), times(angle.sin(), rotation.factor)  # (S, R / 2) each


def apply_rope(x_BSHC: Tensor, rope: Rope) -> Tensor:
    """Rotate channel i together with channel i + R / 2 (the half-split layout of Hugging Face), in fp32.

    Channels from R on stay as they are. Angles are (S, R / 2), or (B, S, R / 2) where sequences differ in positions.
    """
    cos, sin = (of_position.unsqueeze(-2) for of_position in rope)  # (S, R / 2) -> (S, 1, R / 2)
    half = cos.shape[-1]
    left, right, *rest = x_BSHC.float().split_with_sizes(_halves(half, x_BSHC.shape[-1]), dim=-1)
    rotated = (left * cos - right * sin, right * cos + left * sin)  # (B, S, H, R / 2) each
    return torch.cat((*rotated, *rest), dim=-1).type_as(x_BSHC)


def _halves(half: int, channels: int) -> list[int]:
    return [half, half, *([channels - 2 * half] if channels > 2 * half else [])]


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
    """Softmax attention over the past.

    `qk_norm` puts an RMSNorm on queries and keys before rotation: on those of each head (`head`, as Qwen3 has it; true
    stands for it), or on all heads of a token together (`full`, as OLMoE has it). `bias` gives queries, keys and values
    one (Qwen2).

    `attend` is a function that parallelism replaces, and `logits_multiplier` a factor of the attention logits beside
    1 / sqrt(head_dim), which a parametrization replaces.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        num_kv_heads: int,
        norm_eps: float,
        head_dim: int = 0,
        qk_norm: QKNorm | bool = "none",
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.logits_multiplier = 1.0
        self.head_dim = head_dim or dim // num_heads
        self.grouped = num_kv_heads != num_heads
        self.qk_norm: QKNorm = ("head" if qk_norm else "none") if isinstance(qk_norm, bool) else qk_norm
        self.attend: Attend = attend_to_past

        # A matrix for each of q, k and v, not one for all: tensor parallelism shards each by whole heads.
        width, kv_width = num_heads * self.head_dim, num_kv_heads * self.head_dim
        self.wq = nn.Linear(dim, width, bias=bias)
        self.wk = nn.Linear(dim, kv_width, bias=bias)
        self.wv = nn.Linear(dim, kv_width, bias=bias)
        self.wo = nn.Linear(width, dim, bias=False)
        normed = {"none": (0, 0), "head": (self.head_dim, self.head_dim), "full": (width, kv_width)}[self.qk_norm]
        self.q_norm, self.k_norm = (nn.RMSNorm(size, eps=norm_eps) if size else None for size in normed)

    def forward(
        self, x_BSD: Tensor, rope: Rope, want_max: bool = False, documents: tuple[Documents, ...] = ()
    ) -> tuple[Tensor, Tensor | None]:
        """(B, S, D) -> (B, S, D), and the `max_logits` (H,) where they are wanted; with documents inside them."""
        y_BHSC, max_logits_H = self.attend(*self.project(x_BSD, rope), want_max, documents)
        return self.wo(y_BHSC.transpose(1, 2).flatten(2)), max_logits_H  # (B, S, H C) -> (B, S, D)

    def project(self, x_BSD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, D) -> queries (B, H, S, C), and keys and values (B, G, S, C); queries and keys are rotated."""
        # The norm of all heads comes before they are told apart, that of each after.
        q, k, v = self.wq(x_BSD), self.wk(x_BSD), self.wv(x_BSD)
        if self.qk_norm == "full":
            q, k = self.norm_qk(q, k)
        q_BSHC, k_BSGC, v_BSGC = (x.unflatten(-1, (-1, self.head_dim)) for x in (q, k, v))
        if self.qk_norm == "head":
            q_BSHC, k_BSGC = self.norm_qk(q_BSHC, k_BSGC)
        q_BSHC = times(q_BSHC, self.logits_multiplier)

        # Heads go before the sequence, as attention takes them, by strides alone: in memory they stay behind it, where
        # the products before and after have them, and nothing is copied for the change, nor its gradient.
        q_BSHC, k_BSGC = apply_rope(q_BSHC, rope), apply_rope(k_BSGC, rope)
        return q_BSHC.transpose(1, 2), k_BSGC.transpose(1, 2), v_BSGC.transpose(1, 2)

    def norm_qk(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Put the norms on queries and keys."""
        assert self.q_norm is not None
        assert self.k_norm is not None
        return self.q_norm(q), self.k_norm(k)
