"""All that differs between the versions of torch that titan_moe runs on; docs/torch.md says what runs where.

Below 2.13 the collectives `all_gather_single` and `reduce_scatter_single` have other names, and all parameters of an
FSDP2 unit have one mesh (`MESH_BY_PARAMETER` is false). With expert parallelism the experts are then a unit of their
own, and there is no tensor parallelism. From 2.14 on the timeout of a group is set by a public function. Attention to
sequences of different lengths takes fewer heads of keys unasked in 2.11, and may be cuDNN's in 2.15, of which it is not
known what it does with empty sequences.
"""

import inspect
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel, varlen

OLDEST, FIRST_UNKNOWN = (2, 11), (2, 16)  # torch>=2.11,<2.16, as pyproject.toml has it

try:
    from torch.distributed._functional_collectives import all_gather_single, reduce_scatter_single
except ImportError:
    from torch.distributed._functional_collectives import all_gather_tensor as all_gather_single
    from torch.distributed._functional_collectives import reduce_scatter_tensor as reduce_scatter_single

try:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
except ImportError:
    ShardPlacementResult = None
MESH_BY_PARAMETER = ShardPlacementResult is not None

try:
    from torch.distributed import set_timeout as set_group_timeout  # pyrefly: ignore
except ImportError:
    from torch.distributed.distributed_c10d import _set_pg_timeout as set_group_timeout

_ASKS_FOR_FEWER_HEADS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters
_CHOOSES_KERNEL = hasattr(varlen, "_select_backend")
VARLEN_ATTENTION = torch.ops.torch_attn._varlen_attn.default

__all__ = [
    "MESH_BY_PARAMETER",
    "VARLEN_ATTENTION",
    "ShardPlacementResult",
    "all_gather_single",
    "causal_varlen_attention",
    "check_tensor_parallel",
    "check_torch",
    "reduce_scatter_single",
    "set_group_timeout",
]


def causal_varlen_attention(
    q_RHC: Tensor, k_MGC: Tensor, v_MGC: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> Tensor:
    """FlashAttention of sequences that lie one after the other, causal to their last key: (R, H, C) of bf16 on a GPU.

    Sequence n has the queries from cu_queries[n] to cu_queries[n + 1], int32, and as many keys at least, or none.
    """
    options: dict[str, Any] = {"window_size": (-1, 0)}
    if _ASKS_FOR_FEWER_HEADS:
        options["enable_gqa"] = q_RHC.shape[1] != k_MGC.shape[1]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION) if _CHOOSES_KERNEL else nullcontext():
        y_RHC = varlen.varlen_attn(q_RHC, k_MGC, v_MGC, cu_queries, cu_keys, max_queries, max_keys, **options)
    assert isinstance(y_RHC, Tensor)
    return y_RHC


def check_torch() -> None:
    """Raise ValueError where the installed torch is older or newer than those that this was tried on."""
    version = str(torch.__version__)
    number = tuple(int(part) for part in version.split(".")[:2])
    if not OLDEST <= number < FIRST_UNKNOWN:
        oldest, first_unknown = (".".join(map(str, limit)) for limit in (OLDEST, FIRST_UNKNOWN))
        fault = "too old" if number < OLDEST else "newer than what this was tried on"
        raise ValueError(
            f"torch {version} is {fault}: titan_moe needs torch>={oldest},<{first_unknown}: "
            f"pip install 'torch>={oldest},<{first_unknown}'"
        )


def check_tensor_parallel(degree: int) -> None:
    """Raise ValueError for a degree above 1 where FSDP2 can't shard a unit's parameters over different meshes."""
    if degree > 1 and not MESH_BY_PARAMETER:
        raise ValueError(
            f"parallelism.tensor_parallel_degree = {degree} needs torch 2.13 or newer, this is {torch.__version__}: "
            "set it to 1 and take expert or context parallelism, or install a newer torch"
        )
