"""The model one token at a time: keys and values of the past are kept, not computed again.

Sequences of a batch may differ in length: each has its own position, and sees its own past alone. The result is that of
`Transformer.forward`, for routers in which a token's experts depend on that token only.

Shapes: B batch, T new tokens, S room for tokens, D dim, H query heads, G key-value heads, C channels of a head, V
vocabulary.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from titan_moe.model.attention import Rope, rope_cos_sin
from titan_moe.model.documents import places_of
from titan_moe.model.multipliers import times
from titan_moe.model.transformer import Transformer


class Cache(NamedTuple):
    """Keys (rotated) and values of each layer, (B, G, S, C), the tokens (B, S), and the rotations of S positions."""

    keys: list[Tensor]
    values: list[Tensor]
    tokens: Tensor
    rope: Rope


def empty_cache(model: Transformer, batch_size: int, room: int) -> Cache:
    """Return a cache with room for `room` tokens of each sequence, in the type and on the device of the model."""
    keys, values = [], []
    weight = model.tok_embeddings.weight
    layers: Any = model.layers
    for layer in layers:
        head_dim = layer.attention.head_dim
        heads = layer.attention.wk.weight.shape[0] // head_dim
        keys.append(weight.new_zeros(batch_size, heads, room, head_dim))
        values.append(torch.zeros_like(keys[-1]))
    tokens = torch.zeros(batch_size, room, dtype=torch.int64, device=weight.device)
    return Cache(keys, values, tokens, rope_cos_sin(room, model.rotation, weight.device))


@torch.no_grad()
def extend(model: Transformer, cache: Cache, tokens_BT: Tensor, start_B: Tensor, rows_B: Tensor) -> Tensor:
    """Append tokens (B, T) to the sequences `rows_B` of the cache; return the logits (B, V) after the last of them.

    `start_B` is the position of the first new token in each sequence. Keys and values are written into the cache.
    """
    # A token sees the places up to its own; those after it hold nothing of its text yet.
    T = tokens_BT.shape[1]
    position_BT = start_B.unsqueeze(1) + torch.arange(T, device=tokens_BT.device)
    places_S = torch.arange(cache.rope[0].shape[0], device=tokens_BT.device)
    visible = (places_S <= position_BT.unsqueeze(-1)).unsqueeze(1)  # (B, 1, T, S)

    # With documents that don't see each other a prompt may have several: where they end is in the tokens.
    cache.tokens[rows_B[:, None], position_BT] = tokens_BT
    rotation_BT = position_BT
    if model.document_mask:
        assert model.eot_id is not None
        positions_BS, documents_BS = places_of(cache.tokens[rows_B], model.eot_id, model.restart_positions)
        rotation_BT, document_BT = (place_BS.gather(1, position_BT) for place_BS in (positions_BS, documents_BS))
        visible = visible & (documents_BS.unsqueeze(1) == document_BT.unsqueeze(-1)).unsqueeze(1)
    cos, sin = (angle[rotation_BT] for angle in cache.rope)  # (S, R / 2) -> (B, T, R / 2)

    # Each layer as `Block.forward`, but that attention looks at the cache, which has the new tokens as well by then.
    multipliers = model.multipliers
    x_BTD = times(model.tok_embeddings(tokens_BT), multipliers.embedding)  # (B, T) -> (B, T, D)
    layers: Any = model.layers
    for layer, keys, values in zip(layers, cache.keys, cache.values, strict=True):
        h_BTD = layer.attention_norm(x_BTD)
        q_BHTC, k_BGTC, v_BGTC = layer.attention.project(h_BTD, (cos, sin))
        keys[rows_B[:, None], :, position_BT] = k_BGTC.transpose(1, 2)
        values[rows_B[:, None], :, position_BT] = v_BGTC.transpose(1, 2)
        y_BHTC = F.scaled_dot_product_attention(
            q_BHTC, keys[rows_B], values[rows_B], attn_mask=visible, enable_gqa=layer.attention.grouped
        )  # (B, H, T, C)
        x_BTD = x_BTD + times(layer.attention.wo(y_BHTC.transpose(1, 2).flatten(2)), multipliers.residual)
        h_BTD = layer.ffn_norm(x_BTD)
        y_BTD = layer.feed_forward(h_BTD) if layer.feed_forward is not None else layer.moe(h_BTD)[0]
        x_BTD = x_BTD + times(y_BTD, multipliers.residual)

    # Logits are wanted of the next token alone.
    x_BD = times(model.norm(x_BTD[:, -1]), multipliers.logits)  # (B, T, D) -> (B, D)
    return F.linear(x_BD, model.tok_embeddings.weight) if model.output is None else model.output(x_BD)
