"""Names that torch 2.13 has and torch 2.11 lacks."""

from torch.distributed import _functional_collectives as funcol

try:
    from torch.distributed._functional_collectives import all_gather_single, reduce_scatter_single
except ImportError:  # torch before 2.13
    all_gather_single, reduce_scatter_single = funcol.all_gather_tensor, funcol.reduce_scatter_tensor

try:
    from torch.distributed.fsdp._fully_shard._fsdp_common import ShardPlacementResult
except ImportError:  # torch before 2.13: FSDP2 has one mesh for a unit
    ShardPlacementResult = None
