"""What replaying a step does on the host; tests/gpu has that the numbers are the same.

A graph here is a stand-in that, replayed, computes on the recorded inputs and writes into the recorded results.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from tests.tiny import adamw, balancers, batch, tiny_model
from titan_moe.config import load_config
from titan_moe.cuda_graph import WARM_UP, GraphedGradients
from titan_moe.job import uses_cuda_graph
from titan_moe.step import compute_gradients, train_step

GPU, CPU = torch.device("cuda"), torch.device("cpu")


class StandIn:
    """Instead of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.replays, self.again = 0, lambda: None

    def replay(self) -> None:
        self.replays += 1
        self.again()


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def record(graph: StandIn, **_: Any) -> Iterator[None]:
        yield

    monkeypatch.setattr(torch.cuda, "CUDAGraph", StandIn)
    monkeypatch.setattr(torch.cuda, "graph", record)


class Recorded(GraphedGradients):
    """Whose stand-in for a graph computes anew, into the tensors of the recording."""

    def _record(self, model: Any, micro_batches: Any, *rest: Any, **options: Any) -> Any:
        graph = super()._record(model, micro_batches, *rest, **options)
        pairs = list(zip(self.inputs[::2], self.inputs[1::2], strict=True))

        def again() -> None:
            for parameter in model.parameters():
                parameter.grad = None
            sums, num_tokens, _ = self.compute(model, pairs, *rest, **options)
            kept_sums, kept_tokens, _ = self.outputs
            for name, value in sums.items():
                kept_sums[name].copy_(value)
            kept_tokens.copy_(num_tokens)
            for parameter, gradient in self.gradients:
                if gradient is not None:
                    gradient.copy_(parameter.grad)
                parameter.grad = None  # replaying a graph sets nothing

        graph.again = again
        return graph


def losses(gradients: Any, micro_batches: int = 2, steps: int = 6) -> tuple[list[torch.Tensor], Any]:
    model = tiny_model()
    model.init_weights(0)
    optimizer, outputs = adamw(model), []
    for step in range(steps):
        micro = list(zip(*(part.chunk(micro_batches) for part in batch(step)), strict=True))
        options = {"max_norm": 0.1, "step": step + 1, "gradients": gradients}
        outputs.append(train_step(model, micro, optimizer, balancers(), model.expert_biases(), **options))
    return [torch.stack([o.loss for o in outputs]), torch.stack([o.grad_norm for o in outputs])], outputs


def test_replays_take_each_step_s_batch_and_leave_its_gradients():
    """Numbers of earlier steps stay those of their step: they are read later."""
    graphed = Recorded()
    got, outputs = losses(graphed)
    expected, other = losses(compute_gradients)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert isinstance(graphed.graph, StandIn)
    assert graphed.graph.replays == 6 - WARM_UP
    for ours, theirs in zip(outputs, other, strict=True):
        assert torch.equal(ours.load, theirs.load)
        assert torch.equal(ours.num_tokens, theirs.num_tokens)


def test_a_step_that_can_not_be_recorded_is_one_line():
    calls = []

    def reading(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > WARM_UP:
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore of it")
        return compute_gradients(*arguments, **options)

    told = r"^compile.cuda_graph: this step can't be recorded \(CUDA error: .* is capturing\): set .* = false$"
    with pytest.raises(ValueError, match=told):
        losses(GraphedGradients(reading))


def config(*words: str) -> Any:
    return load_config(["--job.config_file", "train_configs/debug_moe.toml", *words])


BF16 = "--training.mixed_precision_param=bfloat16"
OWN = "--router.name=examples.router:softplus"


@pytest.mark.parametrize(
    ("device", "world", "words", "expected"),
    [
        (GPU, 1, [BF16], True),
        (GPU, 1, [BF16, "--compile.cuda_graph=false"], False),
        (GPU, 1, ["--training.mixed_precision_param=float32"], False),
        (GPU, 2, [BF16], False),
        (CPU, 1, [BF16], False),
        (GPU, 1, [BF16, OWN], False),
        (GPU, 1, [BF16, OWN, "--compile.cuda_graph=true"], True),
    ],
)
def test_where_steps_are_replayed(device: torch.device, world: int, words: list[str], expected: bool):
    assert uses_cuda_graph(config(*words), device, world) is expected


@pytest.mark.parametrize(
    ("device", "world", "word", "lack"),
    [
        (GPU, 2, BF16, "one process"),
        (CPU, 1, BF16, "a GPU"),
        (GPU, 1, "--training.mixed_precision_param=float32", "training.mixed_precision_param = 'bfloat16'"),
    ],
)
def test_asked_for_where_it_can_not_be(device: torch.device, world: int, word: str, lack: str):
    with pytest.raises(ValueError, match=f"compile.cuda_graph = true needs {lack}: set it to 'auto'"):
        uses_cuda_graph(config(word, "--compile.cuda_graph=true"), device, world)
