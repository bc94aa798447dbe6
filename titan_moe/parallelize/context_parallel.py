"""Parts of sequences: which tokens a rank has, and attention over whole sequences (context parallelism).

Over the P ranks of the `cp` axis a sequence is cut into 2 P chunks, and rank i has chunks i and 2 P - 1 - i: with a
causal mask all have the same work. Queries stay; keys and values are gathered over the axis (Llama 3: Grattafiori et
al., 2024, section 3.3.2). With tensor parallelism the tokens of a rank of that axis are cut once more, into as many
parts as the `tp` axis has ranks.

Shapes: B batch, S the tokens of a sequence that attention on this rank has, H query heads, G key-value heads, C
channels of a head, P ranks of the `cp` axis, N = S / 2 the tokens of a chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from titan_moe.model.attention import Attend, Attention, Rope, max_logits, rope_cos_sin
from titan_moe.model.documents import Documents, Sequences, attend_in_documents
from titan_moe.model.rope import Rotation
from titan_moe.parallelize.mesh import Degrees
from titan_moe.runtime.compat import all_gather_single


def own_chunks(cp_rank: int, cp_size: int) -> tuple[int, int]:
    """The two of 2 P chunks that a rank of the cp axis has."""
    return cp_rank, 2 * cp_size - 1 - cp_rank


def chunk_positions(seq_len: int, cp_rank: int, cp_size: int) -> Tensor:
    """Positions, ascending, of the tokens that a rank of the cp axis has: (seq_len / P,) int64."""
    chunks = torch.arange(seq_len).chunk(2 * cp_size)
    return torch.cat([chunks[chunk] for chunk in own_chunks(cp_rank, cp_size)])


def own_positions(seq_len: int, rank: int, degrees: Degrees) -> Tensor | None:
    """Positions of each sequence that a rank of the world has, (seq_len / (cp tp),) int64; None: all."""
    if degrees.context * degrees.tensor == 1:
        return None
    cp_rank, tp_rank = rank // degrees.tensor % degrees.context, rank % degrees.tensor
    return chunk_positions(seq_len, cp_rank, degrees.context).chunk(degrees.tensor)[tp_rank]


def local_rope(*, cp: DeviceMesh | None, tp: DeviceMesh | None) -> Callable[..., Rope]:
    """`rope_cos_sin` for the tokens that attention on this rank has, of sequences of which it was given `seq_len`."""
    cp_rank, cp_size = (cp.get_local_rank(), cp.size()) if cp is not None else (0, 1)
    tp_size = tp.size() if tp is not None else 1

    def rope(seq_len: int, rotation: Rotation, device: torch.device) -> Rope:
        # Attention has the tokens of the whole tp axis, gathered, but those of this rank alone of the cp axis.
        full_seq_len = seq_len * tp_size * cp_size
        positions_S = chunk_positions(full_seq_len, cp_rank, cp_size).to(device)
        cos, sin = rope_cos_sin(full_seq_len, rotation, device)
        return cos[positions_S], sin[positions_S]  # (S, R / 2) each

    return rope


def local_sequences(sequence: DeviceMesh, *, cp: DeviceMesh | None, tp: DeviceMesh | None) -> Sequences:
    """What this rank has of sequences that are spread over `sequence`, the ranks of both axes."""
    degrees = Degrees(context=cp.size() if cp is not None else 1, tensor=tp.size() if tp is not None else 1)
    size, own_rank = sequence.size(), sequence.get_local_rank()
    cp_rank = cp.get_local_rank() if cp is not None else 0

    def gather(tokens_BS: Tensor) -> Tensor:
        tokens_SB = wait_tensor(all_gather_single(tokens_BS.t().contiguous(), 0, sequence.get_group()))  # by rank
        parts = [own_positions(len(tokens_SB), rank, degrees) for rank in range(size)]
        position_S = torch.cat([part for part in parts if part is not None]).to(tokens_BS.device)
        return tokens_SB[position_S.argsort()].t()  # (B, P S)

    def local_part(whole_BS: Tensor) -> Tensor:
        positions_S = own_positions(whole_BS.shape[1], own_rank, degrees)
        assert positions_S is not None
        return whole_BS[:, positions_S.to(whole_BS.device)]

    # Attention has the tokens of the whole tp axis, but of the cp axis those of this rank alone.
    def attended_part(whole_BS: Tensor) -> Tensor:
        return whole_BS[:, chunk_positions(whole_BS.shape[1], cp_rank, degrees.context).to(whole_BS.device)]

    def runs(length: int) -> list[tuple[int, int]]:
        if degrees.context == 1:
            return [(0, length)]
        chunk_len = length // (2 * degrees.context)
        return [(n * chunk_len, (n + 1) * chunk_len) for n in own_chunks(cp_rank, degrees.context)]

    return Sequences(gather, local_part, attended_part, runs)


def apply_cp(model: nn.Module, mesh: DeviceMesh, seq_len: int) -> None:
    """Let every layer attend to whole sequences of `seq_len` tokens, whose chunks are over `mesh`."""
    attend = context_parallel_attention(mesh, seq_len)  # one for all layers: torch.compile sees the same code in each
    for layer in model.modules():
        if isinstance(layer, Attention):
            layer.attend = attend


def context_parallel_attention(mesh: DeviceMesh, seq_len: int) -> Attend:
    """Causal attention of this rank's queries to the keys and values of whole sequences of `seq_len` tokens."""
    group, cp_size = mesh.get_group(), mesh.size()
    chunk_len = seq_len // (2 * cp_size)

    # The last query of a chunk sees all keys up to its own position, so the mask's diagonal ends at its lower right.
    # Masks are made here because torch.compile can't make them.
    masks = [causal_lower_right(chunk_len, (n + 1) * chunk_len) for n in own_chunks(mesh.get_local_rank(), cp_size)]

    def attend(
        q_BHSC: Tensor,
        k_BGSC: Tensor,
        v_BGSC: Tensor,
        want_max: bool = False,
        documents: tuple[Documents, ...] = (),
    ) -> tuple[Tensor, Tensor | None]:
        # Keys and values travel together: one collective a layer.
        all_kv = wait_tensor(all_gather_single(torch.stack((k_BGSC, v_BGSC)), 0, group))  # (2 P, B, G, S, C)

        # They come by rank, each with an early and a late chunk; late chunks are in the opposite order of ranks.
        early, late = all_kv.unflatten(0, (cp_size, 2)).chunk(2, dim=-2)  # (P, 2, B, G, N, C) each
        by_position = torch.cat((early, late.flip(0)))  # (2 P, 2, B, G, N, C)
        k, v = by_position.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unbind()  # (B, G, 2 P N, C) each

        # The two chunks of queries see prefixes of different lengths, so each has a product of its own.
        chunk_outputs, largest = [], []
        for q_BHNC, mask, inside in zip(q_BHSC.chunk(2, dim=-2), masks, documents or (None, None), strict=True):
            prefix_k, prefix_v = k[:, :, : mask.seq_len_kv], v[:, :, : mask.seq_len_kv]
            if inside is None:
                grouped = q_BHNC.shape[1] != k.shape[1]
                y_BHNC = F.scaled_dot_product_attention(q_BHNC, prefix_k, prefix_v, attn_mask=mask, enable_gqa=grouped)
            else:
                y_BHNC = attend_in_documents(q_BHNC, prefix_k, prefix_v, inside)
            chunk_outputs.append(y_BHNC)
            if want_max:
                first_keys = None if inside is None else inside.first_keys
                largest.append(max_logits(q_BHNC.detach(), prefix_k.detach(), first_keys))
        return torch.cat(chunk_outputs, dim=-2), torch.maximum(*largest) if want_max else None  # (B, H, S, C), (H,)

    return attend
