"""GPUs: what their data sheets say, and what a step was measured to reach of it. The only table of devices."""

import re
from typing import NamedTuple


class GPU(NamedTuple):
    """One GPU, from NVIDIA's data sheets: dense rates (without sparsity), bytes a second in one direction."""

    memory: float  # GiB, as nvidia-smi shows them
    bf16: float  # FLOP/s of tensor cores
    fp32: float  # FLOP/s outside tensor cores, which is where torch takes products in fp32 by default
    bandwidth: float  # of the device's memory
    nvlink: float  # to the GPUs that NVLink or its bridge joins
    linked: int  # how many these are
    network: float  # one card a GPU, as in NVIDIA's own nodes: 200 Gb/s with an A100, 400 Gb/s with the others


GPUS = {
    "A100-40GB": GPU(39.6, 312e12, 19.5e12, 1.555e12, 300e9, 8, 25e9),
    "A100": GPU(79.3, 312e12, 19.5e12, 2.039e12, 300e9, 8, 25e9),
    "H100-PCIe": GPU(79.6, 756e12, 51e12, 2.0e12, 300e9, 2, 50e9),
    "H100-NVL": GPU(93.6, 835.5e12, 60e12, 3.9e12, 300e9, 2, 50e9),
    "H100": GPU(79.6, 989e12, 67e12, 3.35e12, 450e9, 8, 50e9),
    "H200-NVL": GPU(140.4, 835.5e12, 60e12, 4.8e12, 450e9, 4, 50e9),
    "H200": GPU(140.4, 989e12, 67e12, 4.8e12, 450e9, 8, 50e9),
    "GH200": GPU(95.6, 989e12, 67e12, 4.0e12, 450e9, 1, 50e9),
    "B200": GPU(179.1, 2250e12, 75e12, 8.0e12, 900e9, 8, 50e9),
    "GB200": GPU(185.0, 2500e12, 80e12, 8.0e12, 900e9, 72, 50e9),
}


def find_gpu(device_name: str) -> GPU | None:
    """The GPU of a name as torch.cuda.get_device_name gives it, "NVIDIA H100 NVL"; None for one that is not known.

    Whole words are compared, as "B200" is also a part of "GB200", and of two entries the longer one holds. A MIG slice
    is not its GPU.
    """
    words = set(re.split(r"[^a-z0-9]+", device_name.lower()))
    names = [name for name in GPUS if words >= set(name.lower().split("-"))]
    return None if "mig" in words or not names else GPUS[max(names, key=len)]
