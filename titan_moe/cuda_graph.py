"""Forward and backward of a step as a CUDA graph: the host launches one graph, not some thousand kernels.

A graph is a list of kernels with the addresses they work on. Whatever decides on the host what is launched has decided
when it is recorded, and is not asked again: that nothing in forward and backward does is a law of this package.
"""

from typing import Any

import torch
from torch import Tensor, nn

from titan_moe.step import Gradients, MicroBatches, Sums, compute_gradients

WARM_UP = 3  # steps before the recording: they compile, choose kernels and make the memory of libraries


class GraphedGradients:
    """`compute_gradients`, recorded after some calls and replayed from then on; all calls are of the same model.

    What a replay returns is its own; the gradients stay where they are, and are those of the last replay.
    """

    def __init__(self, compute: Gradients = compute_gradients) -> None:
        self.compute, self.calls = compute, 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []  # tokens and labels of each micro-batch, one after the other
        self.outputs: tuple[Sums, Tensor, list[Tensor]]
        self.gradients: list[tuple[nn.Parameter, Tensor | None]] = []

    def __call__(
        self, model: nn.Module, micro_batches: MicroBatches, *rest: Any, **options: Any
    ) -> tuple[Sums, Tensor, list[Tensor]]:
        """As `compute_gradients`."""
        self.calls += 1
        if self.calls <= WARM_UP:
            return self.compute(model, micro_batches, *rest, **options)
        if self.graph is None:
            self.graph = self._record(model, micro_batches, *rest, **options)

        # What the graph reads and writes stays in its place: inputs are copied to it, and results from it.
        torch._foreach_copy_(self.inputs, flat(micro_batches), non_blocking=True)
        self.graph.replay()
        for parameter, gradient in self.gradients:
            parameter.grad = gradient
        sums, num_tokens, max_logits = self.outputs
        return (
            {name: value.clone() for name, value in sums.items()},
            num_tokens.clone(),
            [logits.clone() for logits in max_logits],
        )

    def _record(
        self, model: nn.Module, micro_batches: MicroBatches, *rest: Any, **options: Any
    ) -> torch.cuda.CUDAGraph:
        """Record a call, which computes nothing yet; ValueError where it can't be recorded."""
        graph = torch.cuda.CUDAGraph()
        self.inputs = [tensor.clone() for tensor in flat(micro_batches)]
        pairs = list(zip(self.inputs[::2], self.inputs[1::2], strict=True))

        # Backward runs in a thread of its own, and batches are brought by another: what those do is no part of it.
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self.outputs = self.compute(model, pairs, *rest, **options)
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"compile.cuda_graph: this step can't be recorded ({reason}): set compile.cuda_graph = false"
            ) from error
        self.gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
        return graph


def flat(micro_batches: MicroBatches) -> list[Tensor]:
    """Tokens and labels of each micro-batch, one after the other."""
    return [tensor for pair in micro_batches for tensor in pair]
