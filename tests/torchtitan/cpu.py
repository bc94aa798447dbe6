"""Stand-ins for what torchtitan 0.3 and torch 2.13 lack on a machine without a GPU. For development only.

Nothing here is needed, or does anything, on GPUs. `prepare` must run before torchtitan is imported for the first time;
`python -m tests.torchtitan.train` does that.
"""

import importlib.util
import os
import sys
import types
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from titan_moe.runtime.compat import set_group_timeout


def prepare() -> None:
    """Make torchtitan importable and runnable on the CPU, with one process or several over gloo."""
    for key, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost"}.items():
        os.environ.setdefault(key, value)
    if os.environ["WORLD_SIZE"] == "1":
        os.environ.setdefault("MASTER_PORT", "0")  # any free one: nobody else has to find it
    _stand_in_for_triton()
    # torchtitan asks for the device once, at import, and takes the absence of an accelerator for CUDA
    torch._utils._get_available_device_type = lambda: "cpu"
    device: Any = torch.cpu
    device.current_device = lambda: 0  # torch says "cpu", and barriers want a number
    distributed: Any = torch.distributed
    distributed.set_timeout = set_group_timeout  # public from torch 2.14 on
    _replace_parts_of_torchtitan()


def _stand_in_for_triton() -> None:
    """An empty module for the kernels of a token dispatcher that only GPUs can run, if triton is missing."""
    name = "torchtitan.distributed.minimal_async_ep.kernels"
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        stand_in: Any = types.ModuleType(name)
        stand_in.__getattr__ = lambda attribute: None if not attribute.startswith("__") else _missing(attribute)
        sys.modules[name] = stand_in


def _missing(attribute: str) -> None:
    raise AttributeError(attribute)


class NoMemoryMonitor:
    """Reports no device memory, in the place of torchtitan's monitor of CUDA's."""

    device_name = "cpu"

    def get_peak_stats(self) -> Any:
        """Zeros."""
        from torchtitan.components.metrics import DeviceMemStats

        return DeviceMemStats(0.0, 0.0, 0.0, 0.0, 0, 0)

    def reset_peak_stats(self) -> None:
        """Nothing to reset."""


def _replace_parts_of_torchtitan() -> None:
    from torchtitan.components import metrics
    from torchtitan.distributed import fsdp
    from torchtitan.tools import utils

    if utils.device_type != "cpu":
        raise RuntimeError("torchtitan was imported before tests.torchtitan.cpu.prepare(): call that first")
    metrics.build_device_memory_monitor = NoMemoryMonitor
    keep_gradients = fsdp.disable_fsdp_gradient_division

    def sum_gradients(model: nn.Module) -> None:
        keep_gradients(model)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it reduces

    fsdp.disable_fsdp_gradient_division = sum_gradients
