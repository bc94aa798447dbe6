"""Sequences cut into parts: which tokens a process has, and attention over the whole (context parallelism).

Over the P processes of the `cp` axis a sequence is cut into 2 P chunks, and process i has chunks i and 2 P - 1 - i:
with a causal mask each has the same work then. Their queries attend to the keys and values of all, which come together
(Llama 3: Grattafiori et al., 2024, section 3.3.2). The tokens of a process of that axis are cut once more, into as
many parts as the `tp` axis has processes.

Shapes: B batch, H query heads, G key-value heads, C channels of a head, N the tokens of a chunk.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import wait_tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.attention.bias import causal_lower_right

from titan_moe.model.attention import Attend, Rope, rope_cos_sin
from titan_moe.parallelize.mesh import Degrees
from titan_moe.runtime.compat import all_gather_single


def own_chunks(process: int, processes: int) -> tuple[int, int]:
    """The two of 2 P chunks that a process of the cp axis has."""
    return process, 2 * processes - 1 - process


def chunk_positions(seq_len: int, process: int, processes: int) -> Tensor:
    """Positions, ascending, of a process of the cp axis: (seq_len / P,)."""
    chunks = torch.arange(seq_len).chunk(2 * processes)
    return torch.cat([chunks[chunk] for chunk in own_chunks(process, processes)])


def own_positions(seq_len: int, rank: int, degrees: Degrees) -> Tensor | None:
    """Positions of each sequence that a rank has, (seq_len / (cp tp),); None: all."""
    if degrees.context * degrees.tensor == 1:
        return None
    of_cp = chunk_positions(seq_len, rank // degrees.tensor % degrees.context, degrees.context)
    return of_cp.chunk(degrees.tensor)[rank % degrees.tensor]


def rope_of_part(*, cp: DeviceMesh | None, tp: DeviceMesh | None) -> Callable[..., Rope]:
    """`rope_cos_sin` for attention on a process that has a part of each sequence, of `seq_len` tokens."""
    process, processes = (cp.get_local_rank(), cp.size()) if cp is not None else (0, 1)
    together = tp.size() if tp is not None else 1

    def rope(seq_len: int, head_dim: int, theta: float, device: torch.device) -> Rope:
        whole = seq_len * together * processes
        positions = chunk_positions(whole, process, processes).to(device)
        cos, sin = rope_cos_sin(whole, head_dim, theta, device)
        return cos[positions], sin[positions]

    return rope


def attend_to_all(mesh: DeviceMesh, seq_len: int) -> Attend:
    """Causal attention of this process's queries over whole sequences of `seq_len`, whose parts are over `mesh`."""
    group, processes = mesh.get_group(), mesh.size()
    length = seq_len // (2 * processes)
    # The last query of a chunk sees all keys up to its own; made here because torch.compile can't make them.
    masks = [causal_lower_right(length, (n + 1) * length) for n in own_chunks(mesh.get_local_rank(), processes)]

    def attend(q_BHSC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor) -> Tensor:
        all_kv = wait_tensor(all_gather_single(torch.stack((k_BGSC, v_BGSC)), 0, group))
        first, second = all_kv.unflatten(0, (processes, 2)).chunk(2, dim=-2)  # (P, 2, B, G, N, C)
        ordered = torch.cat((first, second.flip(0)))  # (2 P, 2, B, G, N, C)
        k_BGSC, v_BGSC = ordered.permute(1, 2, 3, 0, 4, 5).flatten(3, 4).unbind()
        parts = []
        for q_BHNC, mask in zip(q_BHSC.chunk(2, dim=-2), masks, strict=True):
            seen = mask.seq_len_kv
            k, v = k_BGSC[:, :, :seen], v_BGSC[:, :, :seen]
            grouped = q_BHNC.shape[1] != k.shape[1]
            parts.append(F.scaled_dot_product_attention(q_BHNC, k, v, attn_mask=mask, enable_gqa=grouped))
        return torch.cat(parts, dim=-2)

    return attend
