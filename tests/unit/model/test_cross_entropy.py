"""Cross-entropy in chunks: that of torch with whole logits, its gradients too, and nothing as large as these."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny import SEQ, VOCAB, adamw, balancers, batch, steps, tiny_model, whole_logits
from titan_moe.balancer import BALANCERS
from titan_moe.build import build_model, with_vocab_size
from titan_moe.config import load_config
from titan_moe.diagnostics import balance_tax, routing_choices
from titan_moe.model.cross_entropy import (
    CPU_CHUNK_TOKENS,
    GPU_CHUNK_TOKENS,
    IGNORE,
    _chunks,
    linear_cross_entropy,
    score,
    softmax_,
)
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.float8 import GROUPED, quantize
from titan_moe.step import eval_step, train_step

T, D, V = 96, 16, 40
CHUNKS = [0, 1, 32, 36, 96, 500]  # 36: a last chunk of less
TOKEN_BYTES = torch.ones(VOCAB)


def head(dtype: torch.dtype, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """Activations, weights, and labels of which a fifth do not count, the whole of a chunk of 32 among them."""
    generator = torch.Generator().manual_seed(0)
    x_TD, weight_VD = (torch.randn(n, D, generator=generator) for n in (tokens, V))
    labels = torch.randint(0, V, (tokens,), generator=generator)
    labels[::5], labels[32:64] = IGNORE, IGNORE
    return x_TD.to(dtype).requires_grad_(), weight_VD.to(dtype).requires_grad_(), labels


def whole(x_TD: Tensor, weight_VD: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x_TD, weight_VD).float(), labels, reduction="sum")


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equals_torch(chunk: int) -> None:
    """Also scaled by what comes in backward, twice, and where logits are too large for an exponential."""
    for scale in (1.0, 100.0):
        x, weight, labels = head(torch.float32)
        args = x * scale, weight, labels
        want, got = whole(*args), linear_cross_entropy(*args, chunk_tokens=chunk)
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        want_grads = torch.autograd.grad(want / 7, (x, weight), retain_graph=True)
        for _ in range(2):
            grads = torch.autograd.grad(got / 7, (x, weight), retain_graph=True)
            for a, b in zip(grads, want_grads, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))
        scored = score(*args, chunk_tokens=chunk)
        torch.testing.assert_close(scored.ce_sum, want.detach(), rtol=1e-6, atol=0)
        assert scored.num_correct == (F.linear(*args[:2]).argmax(-1) == labels).sum()
        with torch.no_grad():
            assert torch.equal(linear_cross_entropy(*args, chunk_tokens=chunk), scored.ce_sum)


def test_no_label_counts() -> None:
    x, weight, labels = head(torch.float32)
    loss = linear_cross_entropy(x, weight, torch.full_like(labels, IGNORE), chunk_tokens=32)
    assert loss == 0
    assert all((g == 0).all() for g in torch.autograd.grad(loss, (x, weight)))


def test_the_gradient_of_a_bf16_head_is_added_up_in_fp32() -> None:
    """In bf16 its error would grow with the number of chunks: here 64, of 8 tokens."""
    x, weight, labels = head(torch.bfloat16, tokens=512)
    exact = [p.detach().double().requires_grad_() for p in (x, weight)]
    want = torch.autograd.grad(F.cross_entropy(F.linear(*exact), labels, reduction="sum"), exact)
    errors = {}
    for chunk in (0, 8):
        grads = torch.autograd.grad(linear_cross_entropy(x, weight, labels, chunk_tokens=chunk), (x, weight))
        assert [g.dtype for g in grads] == [torch.bfloat16] * 2
        errors[chunk] = [((g.double() - w).norm() / w.norm()).item() for g, w in zip(grads, want, strict=True)]
    assert errors[8] == pytest.approx(errors[0], rel=0.05)
    assert max(errors[8]) < 4e-3


@pytest.mark.slow
def test_compiled_softmax_writes_over_its_argument_too() -> None:
    compiled = torch.compile(softmax_, fullgraph=True, backend="aot_eager")
    for dtype in (torch.float32, torch.bfloat16):
        x, weight, labels = head(dtype)
        want = linear_cross_entropy(x, weight, labels, chunk_tokens=36)
        got = linear_cross_entropy(x, weight, labels, chunk_tokens=36, softmax_=compiled)
        torch.testing.assert_close(got, want)
        for a, b in zip(*(torch.autograd.grad(loss, (x, weight)) for loss in (got, want)), strict=True):
            torch.testing.assert_close(a, b)


def fresh(**arguments: Any) -> Any:
    model = tiny_model(**arguments)
    model.init_weights(0)
    return model


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("float8", [False, True], ids=["fp32", "float8"])
def test_steps_equal_those_with_whole_logits(tied: bool, float8: bool) -> None:
    """Losses and gradients of a step with accumulation, some labels of which do not count, and an evaluation."""
    results = []
    for chunk in (None, 20):
        model = fresh(tie_embeddings=tied, loss_chunk_tokens=chunk or 0)
        if float8:
            quantize(model, converters=[GROUPED], recipe_name="rowwise", emulate=True)
        if chunk is None:
            whole_logits(model)
        tokens, labels = batch(0)
        labels[:3, ::2] = IGNORE
        micro = list(zip(tokens.chunk(2), labels.chunk(2), strict=True))
        sgd = Optimizer.around(torch.optim.SGD(model.parameters(), lr=1.0))
        output = train_step(model, micro, sgd, balancers(), model.expert_biases(), max_norm=0.0)
        evaluated = eval_step(model, tokens, labels, TOKEN_BYTES)
        results.append(
            (output.loss, output.grad_norm, evaluated.loss_sum, evaluated.num_correct, dict(model.named_parameters()))
        )
    # float8 rounds gradients: where they differ by round-off before it, some fall on the other side
    exact = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(results[1], results[0], **({"rtol": 1e-3, "atol": 1e-4} if float8 else exact))


class LargestLogits(TorchDispatchMode):
    """Notes the size of the largest tensor with a dimension of the vocabulary that an operator makes; 0: none."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and VOCAB in tensor.shape:
                self.numel = max(self.numel, tensor.numel())
        return result


def train(model: Any, tokens: Tensor, labels: Tensor) -> None:
    train_step(model, [(tokens, labels)], adamw(model), balancers(), model.expert_biases(), max_norm=1.0)


def evaluate(model: Any, tokens: Tensor, labels: Tensor) -> None:
    eval_step(model, tokens, labels, TOKEN_BYTES)


def tax(model: Any, tokens: Tensor, labels: Tensor) -> None:
    balance_tax(model, tokens, labels, repeats=1)


@pytest.mark.parametrize("run", [train, evaluate, tax])
def test_logits_are_never_whole(run: Callable[..., None]) -> None:
    largest = {}
    for chunk in (0, 16):
        model = fresh(loss_chunk_tokens=chunk, num_layers=1)
        with LargestLogits() as seen:
            run(model, *batch(0))
        largest[chunk] = seen.numel
    assert largest[0] == 8 * SEQ * VOCAB
    assert largest[16] == 16 * VOCAB


def test_no_logits_where_only_routing_is_wanted() -> None:
    model, (tokens, labels) = fresh(), batch(0)
    with LargestLogits() as seen:
        routing_choices(model, tokens, labels)
    assert seen.numel == 0
    exact = {"aux_loss": (0.1, BALANCERS["aux_loss"](coeff=1.0, scope="global_batch_exact"))}
    with FlopCounterMode(display=False) as two_passes:
        train_step(model, [(tokens, labels)], adamw(model), exact, model.expert_biases(), max_norm=1.0)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        model(tokens, want="routings")
    assert two_passes.get_total_flops() == forward.get_total_flops() + flops(fresh())


def flops(model: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        steps(model, 1)
    return counter.get_total_flops()


def test_the_head_is_multiplied_three_times() -> None:
    """As with whole logits: backward makes nothing again."""
    assert flops(fresh(loss_chunk_tokens=16)) == flops(whole_logits(fresh()))


def test_configuration() -> None:
    """By default the logits are never whole on any device."""
    config = load_config([])
    assert config.training.loss_chunk_tokens == -1
    for device, chunk in (("cpu", CPU_CHUNK_TOKENS), ("meta", GPU_CHUNK_TOKENS)):
        assert next(len(part) for (part,) in _chunks(-1, torch.zeros(5000, 1, device=device))) == chunk
    with torch.device("meta"):
        assert build_model(with_vocab_size(config, 100)).loss_chunk_tokens == config.training.loss_chunk_tokens
    assert load_config(["--training.loss_chunk_tokens", "0"]).training.loss_chunk_tokens == 0
    with pytest.raises(ValueError, match=r"training.loss_chunk_tokens = -2: must be greater than or equal to -1"):
        load_config(["--training.loss_chunk_tokens=-2"])
