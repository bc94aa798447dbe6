"""Saving while training goes on: the state is copied to host memory, and a thread writes the copy."""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from titan_moe.checkpoint.state import State, state_to_save
from titan_moe.checkpoint.store import content_of, save_checkpoint, save_content
from titan_moe.optimizer.optimizer import kind_of
from titan_moe.runtime.dtensor import local
from titan_moe.runtime.watch import connecting
from titan_moe.runtime.world import rank, world_size

logger = logging.getLogger(__name__)


class Saver(NamedTuple):
    """How a run saves.

    `save` takes the arguments of `save_checkpoint` and `wait`. With `wait` the step is on the disk when it returns, and
    a failure raises; without, a failure is a warning. `failed` says whether the latest save is known to have failed on
    this rank. `finish` waits for the save that is under way.
    """

    save: Callable[..., None]
    failed: Callable[[], bool]
    finish: Callable[[], None]


def foreground_saver() -> Saver:
    """Training waits for every save."""
    failures: list[Exception] = []

    def save(folder: Path | str, step: int, *, wait: bool, **arguments: Any) -> None:
        failures.clear()
        try:
            save_checkpoint(folder, step, **arguments)
        except OSError as error:
            if wait:
                raise
            warn(error, failures)

    return Saver(save, lambda: bool(failures), lambda: None)


def background_saver() -> Saver:
    """Training waits for a copy of the state in host memory, and for the save before if that has not ended yet.

    The copy's memory is kept between saves: as much as this rank's parameters and optimizer states. A save that fails
    is a warning, as soon as it fails, and leaves earlier checkpoints as they are.
    """
    # The thread talks over a group of its own: within one group, its collectives and those of training would come in
    # another order on each rank. gloo, because what it sends lies in host memory.
    with connecting("connecting the group that saves"):
        group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
    buffers: dict[str, Tensor] = {}
    threads: list[threading.Thread] = []
    failures: list[Exception] = []

    def finish() -> None:
        while threads:
            threads.pop().join()

    def save(
        folder: Path | str,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        extra: dict[str, Any],
        files: Mapping[str, str],
        keep_latest_k: int,
        wait: bool,
    ) -> None:
        # One save at a time: the thread of the one before may still be writing from the buffers.
        begin = time.perf_counter()
        finish()
        failures.clear()

        # Nobody trains meanwhile, so a copy would only take memory; and a thread could not raise the failure here.
        if wait:
            arguments: dict[str, Any] = {"model": model, "optimizer": optimizer, "extra": extra, "files": files}
            save_checkpoint(folder, step, keep_latest_k=keep_latest_k, **arguments)
            return

        # The next step changes weights and random states: all that is saved is taken now, and only for this training
        # waits.
        state = copy_state(state_to_save(model, optimizer), buffers)
        content = content_of(state, kind_of(optimizer), extra=extra, files=files, group=group)
        waited = time.perf_counter() - begin

        def write() -> None:
            try:
                path = Path(save_content(folder, step, content, keep_latest_k, group))
            except Exception as error:  # of whatever kind: a thread has nobody to raise to, and training goes on
                warn(error, failures)
            else:
                took = time.perf_counter() - begin
                logger.info("saved %s in %.2f s, of which training waited %.3f s", path.name, took, waited)

        threads.append(threading.Thread(target=write, name=f"save-step-{step}", daemon=True))
        threads[0].start()

    return Saver(save, lambda: bool(failures), finish)


def copy_state(state: State, buffers: dict[str, Tensor]) -> State:
    """A copy of this rank's shards of `state` in host memory, in `buffers` (by name, made where they are missing)."""
    tensors: dict[str, Tensor] = {}
    on_gpu = False
    for name, tensor in state.tensors.items():
        # A state can appear or change its shape between two saves: the first step makes the optimizer's.
        shard = local(tensor)
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != shard.shape or buffer.dtype != shard.dtype:
            buffer = buffers[name] = torch.empty(shard.shape, dtype=shard.dtype, pin_memory=shard.is_cuda)

        # Pinned memory lets all copies of a GPU's shards run one after the other, with one wait for them at the end.
        buffer.copy_(shard, non_blocking=shard.is_cuda)
        on_gpu |= shard.is_cuda

        # DCP learns from the DTensor which part of the whole this is. Its constructor, because from_local would move
        # the copy to the mesh's device.
        tensors[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
    if on_gpu:
        torch.cuda.synchronize()
    return State(tensors, state.values)


def warn(error: Exception, failures: list[Exception]) -> None:
    """Note that a save has failed; rank 0 warns for all."""
    failures.append(error)
    if rank() == 0:
        logger.warning("%s: training goes on, the save is tried again in the next steps", error)
