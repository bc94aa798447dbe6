"""How long a step takes on a GPU: the work of the step divided by the rates that one GPU was measured to reach.

The time of a product is its operations divided by a share of the tensor cores' peak, or its bytes divided by a share of
the memory's bandwidth, whichever is longer. The time of any other operator is that of its bytes. In eager mode the host
launches one operator after the other, and the slower of host and device sets the pace.
"""

from typing import NamedTuple

from titan_moe.estimate.simulate import Work
from titan_moe.runtime.machine import GPU

# The one GPU that was measured, by two profiles of moe8x with 20,480 tokens a micro-batch on torch 2.11, 2026-11-27:
# (1) eager, before the code was changed for GPUs, (2) compiled, after it. docs/estimate.md says how the numbers follow.
MEASURED_ON = "H100"
COMPARED_ON = "H200"  # a step of moe8x, predicted from the H100's shares: 122 ms for 124
PRODUCTS = {  # shares of the peak in bf16
    "dense": 0.61,  # (2) projections of attention: 7.0 TFLOP in 11.5 ms
    "head": 0.79,  # (2) 4.7 TFLOP in 6.0 ms
    "grouped": 0.545,  # (2) 27.8 TFLOP in 51.5 ms
    "attention": 0.335,  # (1, 2) 2.7 TFLOP, causal ones counted in full, in 8.2 ms
    "fp32": 0.61,  # of the peak in fp32: not measured, as dense
}
PASSES = {  # shares of the memory's bandwidth
    "layers": 0.62,  # (1) 242 GB together with copies in 116 ms: all kernels less the others
    "copies": 0.62,
    "loss": 0.77,  # (1) 46 GB in 17.8 ms
    "update": 0.77,  # (2) 36 GB of AdamW, which clips, and the norm in 14.0 ms
}
COMPILED_BYTES = {  # what torch.compile leaves of the passes
    "layers": 0.47,  # (2) 39 ms where they would be 83
    "loss": 0.14,  # (2) 3 ms where they would be 22
}
GAPS = 0.10  # of the kernels' time, between kernels: (1) 244 ms of 223, (2) 157 ms of 142
GAPS_OF_GRAPHS = 0.02  # where the step is a CUDA graph: 2.1 ms of 125 on an H200 (2026-11-28)
HOST_SECONDS = 38e-6  # an eager operator: 210 ms to launch 5,258 of them, and 1,554 ms for 41,878 with 8 micro-batches
COMPILED_OPERATORS = 0.15  # of the layers' launches: 23 of 149 a layer, counted in inductor's code
LINK = 0.8  # share of NVLink's and the network's rate: a rule of thumb, not measured

NAMES = {
    "dense": "products: dense",
    "head": "products: output head",
    "grouped": "products: grouped",
    "attention": "products: attention",
    "fp32": "products: in fp32",
    "layers": "passes: layers",
    "loss": "passes: loss",
    "copies": "passes: weights, gradients",
    "update": "passes: clipping, optimizer",
}


class StepTime(NamedTuple):
    """Seconds of a step: on the device, by part, and on the host that launches it."""

    device: dict[str, float]
    host: float
    operators: int  # launched in a step

    @property
    def seconds(self) -> float:
        """The slower of both."""
        return max(sum(self.device.values()), self.host)


def step_time(
    work: Work, groups: dict[str, tuple[int, ...]], gpu: GPU, *, compiled: bool, graphed: bool = False
) -> StepTime:
    """Seconds of a step that does `work`, its collectives over `groups` of ranks, on GPUs of one kind.

    With `graphed` forward and backward are a CUDA graph, of which the host launches none but the update's operators.
    Gathers and reductions of FSDP hide behind what is computed, as far as that lasts. What is left of them comes on
    top, and so do all collectives that activations wait for. Latencies and waiting for slower ranks are not counted.
    """
    # On the device, kernels run one after the other: their times add up. A product is bound by operations or by bytes.
    bandwidth, device = PASSES["layers"] * gpu.bandwidth, {}
    for kind, share in PRODUCTS.items():
        peak = gpu.fp32 if kind == "fp32" else gpu.bf16
        device[NAMES[kind]] = max(work["flops", kind] / (share * peak), work["bytes", kind] / bandwidth)
    for kind, share in PASSES.items():
        left = COMPILED_BYTES.get(kind, 1.0) if compiled else 1.0
        device[NAMES[kind]] = left * work["bytes", kind] / (share * gpu.bandwidth)
    device["gaps between kernels"] = (GAPS_OF_GRAPHS if graphed else GAPS) * sum(device.values())

    # The update starts when the last gradient has arrived, so no communication hides behind it.
    computing = sum(device.values()) - device[NAMES["update"]]
    seconds = {"sent": 0.0, "waited": 0.0}
    for key, size in work.items():
        if key[0] in seconds:
            seconds[key[0]] += link_seconds(key[1], groups[key[2]], size, gpu)
    device["communication, waited for"] = seconds["waited"]
    device["communication, not hidden"] = max(0.0, seconds["sent"] - seconds["waited"] - computing)

    # torch.compile fuses operators into fewer kernels, so the host has fewer to launch.
    operators = {key[1]: count for key, count in work.items() if key[0] == "operators"}
    if compiled:
        operators["layers"] = round(COMPILED_OPERATORS * operators.get("layers", 0))
    launched = operators.get("update", 0) if graphed else sum(operators.values())
    return StepTime({name: s for name, s in device.items() if s}, HOST_SECONDS * launched, launched)


def link_seconds(collective: str, ranks: tuple[int, ...], size: int, gpu: GPU) -> float:
    """Seconds that a rank takes to send `size` bytes in a collective over `ranks`; neighbours are on one node.

    Between nodes, a ring uses the network cards of all of a node's ranks at once. In an all-to-all each rank sends
    through its own card what is for other nodes.
    """
    on_this_node = sum(rank // gpu.linked == ranks[0] // gpu.linked for rank in ranks)
    if on_this_node == len(ranks):
        return size / (LINK * gpu.nvlink)
    if collective == "all_to_all_single":
        return size * (len(ranks) - on_this_node) / max(1, len(ranks) - 1) / (LINK * gpu.network)
    return size / (LINK * min(gpu.nvlink, on_this_node * gpu.network))
