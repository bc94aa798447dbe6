"""All that differs between the versions of torch that titan_moe runs on; docs/torch.md says what runs where.

Below 2.13 the collectives `all_gather_single` and `reduce_scatter_single` have other names, and all parameters of an
FSDP2 unit have one mesh (`MESH_BY_PARAMETER` is false). With expert parallelism the experts are then a unit of their
own, and there is no tensor parallelism. From 2.14 on the timeout of a group is set by a public function.
"""

import torch

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

__all__ = [
    "MESH_BY_PARAMETER",
    "ShardPlacementResult",
    "all_gather_single",
    "check_tensor_parallel",
    "check_torch",
    "reduce_scatter_single",
    "set_group_timeout",
]


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
