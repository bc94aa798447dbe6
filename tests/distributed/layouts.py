"""Layouts of ranks, and models in them, for distributed tests."""

import functools
from typing import Any

import torch

from tests.tiny import SEQ
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.mesh import Degrees, Meshes, build_mesh
from titan_moe.parallelize.parallelize import parallelize

# by number of ranks; 4 experts or a multiple of it go with all of them
LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {
        "fsdp2": {"shard": 2},
        "hsdp2x1": {"shard": 1, "replicate": 2},
        "ep2": {"shard": 2, "expert": 2},
        "tp2": {"shard": 1, "tensor": 2},
        "cp2": {"shard": 1, "context": 2},
    },
    4: {
        "fsdp4": {"shard": 4},
        "hsdp2x2": {"shard": 2, "replicate": 2},
        "ep4": {"shard": 4, "expert": 4},
        "ep2_fsdp2": {"shard": 4, "expert": 2},
        "hsdp2_ep2": {"shard": 2, "replicate": 2, "expert": 2},
        "fsdp2_tp2": {"shard": 2, "tensor": 2},
        "fsdp2_cp2": {"shard": 2, "context": 2},
        "ep2_tp2": {"shard": 2, "expert": 2, "tensor": 2},
        "cp2_tp2_ep4": {"shard": 1, "expert": 4, "context": 2, "tensor": 2},
        "hsdp2_tp2": {"shard": 1, "replicate": 2, "tensor": 2},
    },
    8: {"fsdp2_cp2_tp2_ep4": {"shard": 2, "expert": 4, "context": 2, "tensor": 2}},
}


@functools.cache  # torch.compile takes new process groups for new code
def mesh_of(world: int, layout: str) -> Meshes:
    return build_mesh(device=torch.device("cpu"), **LAYOUTS[world][layout])


def degrees_of(world: int, layout: str) -> Degrees:
    return Degrees(**LAYOUTS[world][layout])


def place(rank: int, world: int, layout: str) -> dict[str, Any]:
    """What `steps` and `outcome` want to know of a rank."""
    group = mesh_of(world, layout).sequence_group
    return {"rank": rank, "world": world, "degrees": degrees_of(world, layout), "sequence_group": group}


def apply(model: Transformer, world: int, layout: str | None, **options: Any) -> None:
    """Parallelize in a layout (None: one process) in fp32."""
    defaults = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    mesh = None if layout is None else mesh_of(world, layout)
    parallelize(
        model, mesh=mesh, **{**defaults, "checkpoint_mode": "none", "compile_blocks": False, "seq_len": SEQ, **options}
    )


def on_meta(model: Transformer, world: int, layout: str | None, **options: Any) -> Transformer:
    """Parallelize a model of the meta device, and fill it."""
    apply(model, world, layout, **options)
    model.to_empty(device="cpu")
    model.init_weights(0)
    return model
