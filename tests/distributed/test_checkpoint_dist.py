"""Checkpoints of two processes: resharding, agreement on failure, random states."""

import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from titan_moe.checkpoint import CheckpointError, latest_complete, load_checkpoint, save_checkpoint, store
from titan_moe.checkpoint import folder as checkpoint_folder
from titan_moe.checkpoint.background import background_saver
from titan_moe.runtime.dtensor import gathered
from titan_moe.runtime.world import rank

WORLD = 2
pytestmark = pytest.mark.dist


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Parameter(torch.rand(5))
        self.weight = nn.Parameter(torch.rand(7, 6))
        self.experts = nn.Parameter(torch.rand(3, 4, 2))  # 3 experts on 2 ranks: uneven shards
        self.register_buffer("expert_bias", torch.rand(3))


def make(seed: int, layout: str):
    torch.manual_seed(seed)
    model = nn.Sequential(Layer(), Layer())
    if layout != "plain":
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("dp",))
        if layout == "ep":  # experts sharded apart from FSDP
            for layer in model:
                layer.experts = nn.Parameter(
                    distribute_tensor(layer.get_parameter("experts").detach(), mesh, [Shard(0)])
                )
        experts = {layer.get_parameter("experts") for layer in model} if layout == "ep" else set()
        for module in (*model, model):
            fully_shard(module, mesh=mesh, ignored_params=experts)
    experts = [p for name, p in model.named_parameters() if "experts" in name]
    rest = [p for name, p in model.named_parameters() if "experts" not in name]
    return model, torch.optim.AdamW([{"params": experts, "lr": 0.3}, {"params": rest}], lr=0.1, fused=True)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    """Steps whose gradients do not depend on the layout."""
    for step in range(steps):
        for parameter in model.parameters():
            parameter.grad = parameter.detach() * (0.1 + step) - 0.2
        optimizer.step()
        optimizer.param_groups[0]["lr"] *= 0.9
        with torch.no_grad():
            for layer in model.children():
                layer.get_buffer("expert_bias").add_(0.25)


def full(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every tensor of model and optimizer, whole."""
    tensors = dict(model.state_dict())
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return {name: gathered(value).detach().clone() for name, value in tensors.items()}


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert torch.equal(value, b[name]), name


def save(folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"extra": {"rank": rank()}, "files": {}, "keep_latest_k": 0}
    return save_checkpoint(folder, step, model=model, optimizer=optimizer, **arguments | changes)


def check_reshard(folder: Path) -> None:
    """Saved by one process, loaded by two; trained on, saved by two, loaded by two in another layout."""
    expected = torch.load(folder / "plain.pt")
    for layout in ("fsdp", "ep"):
        model, optimizer = make(5, layout)
        restored = load_checkpoint(folder / "step-1", model=model, optimizer=optimizer)
        assert restored == (1, {"rank": 0})
        assert_equal(full(model, optimizer), expected)
        assert [group["lr"] for group in optimizer.param_groups] == [0.3 * 0.9 * 0.9, 0.1]
    numbers: Any = [None] * WORLD
    dist.all_gather_object(numbers, torch.rand(1).item())
    assert numbers[0] != numbers[1]  # streams derived for each rank
    train(model, optimizer, 2)
    save(folder, 3, model, optimizer)
    number, tensors = torch.rand(1), full(model, optimizer)
    for layout in ("ep", "fsdp"):
        again, fresh = make(9, layout)
        assert load_checkpoint(folder / "step-3", model=again, optimizer=fresh) == (3, {"rank": 0})
        assert torch.equal(torch.rand(1), number)  # this rank's own random state
        assert_equal(full(again, fresh), tensors)
    if rank() == 0:
        torch.save(tensors, folder / "sharded.pt")


def check_failure_on_one_rank(folder: Path) -> None:
    """Rank 1 cannot write: both ranks say so, in one line, and nothing is left of the save."""
    model, optimizer = make(1, "fsdp")
    train(model, optimizer, 1)
    save(folder, 1, model, optimizer)
    places: list[tuple[Any, str]] = [(dcp.FileSystemWriter, "write_data"), (store, "write_synced")]
    for owner, function in places:
        original = getattr(owner, function)

        def fail(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        if rank() == 1:
            setattr(owner, function, fail)
        with pytest.raises(
            CheckpointError, match=r"^cannot save .*step-2: No space left on device \(on rank 1\) \(earlier"
        ):
            save(folder, 2, model, optimizer)
        setattr(owner, function, original)
        dist.barrier()
        assert [path.name for path in folder.iterdir()] == ["step-1"]
        dist.barrier()
    rng_state = store.rng_state
    if rank() == 1:
        store.rng_state = lambda: {"where": Path("x")}
    with pytest.raises((TypeError, RuntimeError), match=r"rank-1\.pt may hold"):  # our mistake, not the disk's
        save(folder, 2, model, optimizer)
    store.rng_state = rng_state
    dist.barrier()
    save(folder, 2, model, optimizer)
    assert latest_complete(folder) == folder / "step-2"


def check_broken_files(folder: Path) -> None:
    """Ranks share the checksums: whichever finds the broken file, all fall back together."""
    model, optimizer = make(1, "fsdp")
    train(model, optimizer, 1)
    for step in (1, 2, 3):
        save(folder, step, model, optimizer)
    for step, name in ((3, "__1_0.distcp"), (2, "rank-1.pt")):
        if rank() == 0:
            data = bytearray((folder / f"step-{step}" / name).read_bytes())
            data[-1] ^= 4
            (folder / f"step-{step}" / name).write_bytes(data)
        dist.barrier()
        assert latest_complete(folder) == folder / f"step-{step - 1}"
        with pytest.raises(CheckpointError, match=rf"{name} does not have its checksum \(on rank [01]\)"):
            load_checkpoint(folder / f"step-{step}", model=model, optimizer=optimizer)
    read = []
    original = checkpoint_folder.crc32_of
    checkpoint_folder.crc32_of = lambda path: [read.append(path.name), original(path)][1]  # type: ignore[return-value]
    latest_complete(folder)
    shared: Any = [None] * WORLD
    dist.all_gather_object(shared, read[-3:])
    assert not set(shared[0]) & set(shared[1])


def check_background(folder: Path) -> None:
    """Training's own messages and those of the save do not mix; a failure on one rank is a warning, and is over."""
    model, optimizer = make(1, "fsdp")
    train(model, optimizer, 1)
    saver = background_saver()
    arguments: dict[str, Any] = {"extra": {}, "files": {}, "keep_latest_k": 0, "wait": False}
    expected = full(model, optimizer)
    original = dcp.FileSystemWriter.write_data

    def slow(*args: Any) -> Any:
        time.sleep(0.5)
        return original(*args)

    dcp.FileSystemWriter.write_data = slow  # type: ignore[method-assign]
    saver.save(folder, 1, model=model, optimizer=optimizer, **arguments)
    train(model, optimizer, 3)
    assert not (folder / "step-1").exists()
    saver.finish()
    again, fresh = make(5, "ep")
    load_checkpoint(folder / "step-1", model=again, optimizer=fresh)
    assert_equal(full(again, fresh), expected)

    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    if rank() == 1:
        dcp.FileSystemWriter.write_data = fail  # type: ignore[method-assign]
    saver.save(folder, 2, model=model, optimizer=optimizer, **arguments)
    train(model, optimizer, 1)
    saver.finish()
    dcp.FileSystemWriter.write_data = original  # type: ignore[method-assign]
    dist.barrier()
    assert [path.name for path in folder.iterdir()] == ["step-1"]
    dist.barrier()
    saver.save(folder, 3, model=model, optimizer=optimizer, **arguments)
    saver.finish()
    assert latest_complete(folder) == folder / "step-3"


CHECKS = (check_reshard, check_failure_on_one_rank, check_broken_files, check_background)


def worker(index: int, folder: Path) -> None:
    if index:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=index,
        world_size=WORLD,
        timeout=timedelta(seconds=60),
    )
    for check in CHECKS:
        check(folder / check.__name__)
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes(tmp_path):
    folder = tmp_path / "check_reshard"
    model, optimizer = make(0, "plain")
    train(model, optimizer, 2)
    save(folder, 1, model, optimizer)
    torch.save(full(model, optimizer), folder / "plain.pt")

    mp.start_processes(worker, (tmp_path,), nprocs=WORLD, start_method="spawn")

    train(model, optimizer, 2)
    again, fresh = make(3, "plain")
    assert load_checkpoint(folder / "step-3", model=again, optimizer=fresh) == (3, {"rank": 0})
    assert_equal(full(again, fresh), torch.load(folder / "sharded.pt"))
    assert_equal(full(again, fresh), full(model, optimizer))
