"""Saving while training goes on: the state is copied to memory of the host, a thread writes the copy."""

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

from titan_moe.checkpoint.folder import CheckpointError
from titan_moe.checkpoint.state import State, state_to_save
from titan_moe.checkpoint.store import content_of, save_checkpoint, save_content
from titan_moe.optimizer.combined import kind_of
from titan_moe.runtime.dtensor import local
from titan_moe.runtime.watch import connecting
from titan_moe.runtime.world import rank, world_size

logger = logging.getLogger(__name__)


class Saver(NamedTuple):
    """How a run saves.

    `save` takes the arguments of `save_checkpoint`, and `wait`: whether the step must be on the disk when it returns,
    and a failure raises; else it is a warning. `failed`: whether the latest save is known to have failed, on this rank.
    `finish` waits for the save that is under way.
    """

    save: Callable[..., None]
    failed: Callable[[], bool]
    finish: Callable[[], None]


class Timetable:
    """When to save: every `interval` steps, and in between again after a failure: 1, 2, 4 ... steps after the last."""

    def __init__(self, interval: int) -> None:
        self.interval, self._retry, self._wait = interval, 0, 1

    def due(self, step: int, failed: bool) -> bool:
        """Whether to save after `step`; `failed` is whether the latest save has, on any rank."""
        if step % self.interval == 0:
            self._retry, self._wait = 0, 1
            return True
        if failed and self._retry < step:
            self._retry, self._wait = step + self._wait - 1, 2 * self._wait
        return step == self._retry


def foreground_saver() -> Saver:
    """Training waits for every save."""
    failures: list[Exception] = []

    def save(folder: Path, step: int, *, wait: bool, **arguments: Any) -> None:
        failures.clear()
        try:
            save_checkpoint(folder, step, **arguments)
        except OSError as error:
            if wait:
                raise
            warn(error, failures)

    return Saver(save, lambda: bool(failures), lambda: None)


def background_saver() -> Saver:
    """Training waits for a copy of the state in the host's memory, and for a save that has not ended at the next one.

    The copy's memory is kept between saves: as much as this rank's parameters and optimizer states. Ranks talk over a
    process group of their own. A save that fails is a warning, as soon as it fails, and leaves earlier checkpoints as
    they are.
    """
    with connecting("connecting the group that saves"):
        group: Any = dist.new_group(backend="gloo") if world_size() > 1 else None
    buffers: dict[str, Tensor] = {}
    threads: list[threading.Thread] = []
    failures: list[Exception] = []

    def finish() -> None:
        while threads:
            threads.pop().join()

    def save(
        folder: Path,
        step: int,
        *,
        model: nn.Module,
        optimizer: Optimizer,
        extra: dict[str, Any],
        files: Mapping[str, str],
        keep_latest_k: int,
        wait: bool,
    ) -> None:
        begin = time.perf_counter()
        finish()
        failures.clear()
        if wait:
            arguments: dict[str, Any] = {"model": model, "optimizer": optimizer, "extra": extra, "files": files}
            save_checkpoint(folder, step, keep_latest_k=keep_latest_k, **arguments)
            return
        state = copy_state(state_to_save(model, optimizer), buffers)
        content = content_of(state, kind_of(optimizer), extra=extra, files=files, group=group)
        waited = time.perf_counter() - begin

        def write() -> None:
            try:
                path = save_content(folder, step, content, keep_latest_k, group)
            except CheckpointError as error:
                warn(error, failures)
            except Exception as error:  # a thread has nobody to raise to: training is not to end by it either
                warn(error, failures)
            else:
                took = time.perf_counter() - begin
                logger.info("saved %s in %.2f s, of which training waited %.3f s", path.name, took, waited)

        threads.append(threading.Thread(target=write, name=f"save-step-{step}", daemon=True))
        threads[0].start()

    return Saver(save, lambda: bool(failures), finish)


def copy_state(state: State, buffers: dict[str, Tensor]) -> State:
    """A copy of `state` in host memory, in `buffers` (by name, made where they are missing)."""
    tensors: dict[str, Tensor] = {}
    on_gpu = False
    for name, tensor in state.tensors.items():
        mine = local(tensor)
        buffer = buffers.get(name)
        if buffer is None or buffer.shape != mine.shape or buffer.dtype != mine.dtype:
            buffer = buffers[name] = torch.empty(mine.shape, dtype=mine.dtype, pin_memory=mine.is_cuda)
        buffer.copy_(mine, non_blocking=mine.is_cuda)
        on_gpu |= mine.is_cuda
        # Its constructor, because from_local would move the copy to the mesh's device.
        tensors[name] = DTensor(buffer, tensor._spec, requires_grad=False) if isinstance(tensor, DTensor) else buffer
    if on_gpu:
        torch.cuda.synchronize()
    return State(tensors, state.values)


def warn(error: Exception, failures: list[Exception]) -> None:
    """Note that a save has failed, and say it loudly, once for all ranks."""
    failures.append(error)
    if rank() == 0:
        logger.warning("%s: training goes on, the save is tried again in the next steps", error)
