"""What the tests on GPUs share: a small model of sizes that every kernel takes, trained on one device or several."""

import pickle
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.tiny import SEQ, adamw, balancers, batch, own_part, tiny_model
from titan_moe.metrics import StepOutput
from titan_moe.model.transformer import Transformer
from titan_moe.parallelize.float8 import quantize
from titan_moe.parallelize.mesh import Degrees, Meshes
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.runtime.world import seed_step
from titan_moe.step import Gradients, train_step

DEVICE = "cuda"  # "cpu" tries out the tests themselves
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 4
SIZES = {"dim": 64, "num_kv_heads": 2, "ffn_dim": 64, "expert_dim": 64, "num_layers": 2, "num_shared_experts": 1}

one_gpu = pytest.mark.skipif(GPUS < 1, reason="needs a GPU that torch can use: torch.cuda.is_available() is False")
two_gpus = pytest.mark.skipif(GPUS < 2, reason=f"needs two GPUs with NCCL, here are {GPUS}")
four_gpus = pytest.mark.skipif(GPUS < 4, reason=f"needs four GPUs with NCCL, here are {GPUS}")


def is_hopper() -> bool:
    """Whether the first GPU has the float8 products that experts take."""
    return DEVICE == "cuda" and GPUS > 0 and torch.cuda.get_device_capability(0)[0] == 9


hopper = pytest.mark.skipif(not is_hopper(), reason="needs an H100 or H200: float8 grouped products are theirs")


def build(
    mesh: Meshes | None,
    *,
    router: Any = "topk_softmax",
    device: str = DEVICE,
    dtype: torch.dtype = torch.float32,
    converters: tuple[str, ...] = (),
    emulate: bool = False,
    document_mask: bool = False,
    **options: Any,
) -> Transformer:
    """The model, parallelized; its weights depend on the device (generators do), and on nothing else."""
    model = tiny_model(router, device="meta", document_mask=document_mask, **SIZES)
    quantize(model, converters=converters, recipe_name="rowwise", emulate=emulate)
    defaults = {"reduce_dtype": torch.float32, "checkpoint_mode": "none", "compile_blocks": False, "seq_len": SEQ}
    parallelize(model, mesh=mesh, param_dtype=dtype, **{**defaults, **options})
    model.to_empty(device=device)
    model.init_weights(0)
    return model


def train(
    model: Transformer,
    count: int = 4,
    *,
    rank: int = 0,
    world: int = 1,
    micro_batches: int = 1,
    degrees: Degrees | None = None,
    mesh: Meshes | None = None,
    gradients: Gradients | None = None,
) -> list[StepOutput]:
    """Some steps on this rank's part of each batch, cut into micro-batches."""
    device, optimizer = next(model.parameters()).device, adamw(model)
    outputs = []
    for step in range(count):
        tokens, labels = (part.to(device) for part in own_part(batch(step), rank, world, degrees))
        micro = list(zip(tokens.chunk(micro_batches), labels.chunk(micro_batches), strict=True))
        options = {"max_norm": 0.1, "sequence_group": None if mesh is None else mesh.sequence_group}
        seed_step(0, step, rank)
        output = train_step(
            model, micro, optimizer, balancers(), model.expert_biases(), gradients=gradients, step=step + 1, **options
        )
        outputs.append(output)
    return outputs


def numbers(outputs: list[StepOutput]) -> dict[str, torch.Tensor]:
    """What must not depend on the device or the layout, on the host."""
    names = ("loss", "total_loss", "grad_norm", "load")
    return {name: torch.stack([getattr(output, name) for output in outputs]).cpu() for name in names}


@contextmanager
def no_waits() -> Iterator[None]:
    """In the block torch raises where the host waits for the GPU; its note that this is a prototype is no error."""
    set_mode = torch.cuda.set_sync_debug_mode if DEVICE == "cuda" else lambda mode: None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        set_mode("error")
        try:
            yield
        finally:
            set_mode("default")


@contextmanager
def one_process() -> Iterator[None]:
    """A process group of this process alone, as mixed precision on one GPU has it."""
    backend = "nccl" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _worker(rank: int, world: int, folder: str, function: Callable[..., Any]) -> None:
    if DEVICE == "cuda":
        torch.cuda.set_device(rank)
    torch.set_num_threads(1)
    backend = "cuda:nccl,cpu:gloo" if DEVICE == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        (Path(folder) / f"result-{rank}").write_bytes(pickle.dumps(function(rank, world)))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def run_ranks(world: int, function: Callable[..., Any]) -> list[Any]:
    """function(rank, world) on the first `world` GPUs, a process each; the results by rank."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, (world, folder, function), nprocs=world)
        return [pickle.loads((Path(folder) / f"result-{rank}").read_bytes()) for rank in range(world)]
