"""The table of devices, by names as torch gives them."""

import pytest
import torch

from titan_moe.runtime.machine import GPUS, find_gpu, peak_flops

NAMES = {
    "NVIDIA H100 80GB HBM3": ("H100", 989e12, 79.6),
    "NVIDIA H100 PCIe": ("H100-PCIe", 756e12, 79.6),
    "NVIDIA H100 NVL": ("H100-NVL", 835.5e12, 93.6),
    "NVIDIA H200": ("H200", 989e12, 140.4),
    "NVIDIA H200 NVL": ("H200-NVL", 835.5e12, 140.4),
    "NVIDIA GH200 480GB": ("GH200", 989e12, 95.6),
    "NVIDIA B200": ("B200", 2250e12, 179.1),
    "NVIDIA GB200": ("GB200", 2500e12, 185.0),
    "NVIDIA A100-SXM4-80GB": ("A100", 312e12, 79.3),
    "NVIDIA A100-SXM4-40GB": ("A100-40GB", 312e12, 39.6),
}


@pytest.mark.parametrize("name", NAMES)
def test_devices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    entry, flops, memory = NAMES[name]
    gpu = find_gpu(name)
    assert gpu is GPUS[entry]
    assert (gpu.bf16, gpu.memory) == (flops, memory)
    assert gpu.fp32 < gpu.bf16
    assert gpu.network < gpu.nvlink < gpu.bandwidth
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops(torch.device("cuda", 0)) == flops


def test_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """None, and no MFU then, rather than the peak of another one."""
    for name in ("NVIDIA GeForce RTX 4090", "NVIDIA H1000", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "AMD Instinct MI300X"):
        assert find_gpu(name) is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA GB2000")
    assert peak_flops(torch.device("cuda", 0)) is None
    assert peak_flops(torch.device("cpu")) is None


def test_every_entry_is_found_by_its_own_name() -> None:
    for name, gpu in GPUS.items():
        assert find_gpu(f"NVIDIA {name}") is gpu
