"""QK-clip: the largest logits against S x S of them in float64, the clip against a loop over heads."""

import math
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.tiny import SEQ, adamw, balancers, batch, tiny_model
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.config import load_config
from titan_moe.metrics import QKClip, StepOutput, train_metrics
from titan_moe.model.attention import MAX_LOGITS, ROWS, Attention, max_logits
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.runtime.dtensor import local, local_rows
from titan_moe.step import eval_step, train_step

SIZES = {"dim": 32, "num_heads": 4, "first_dense_layers": 1, "num_layers": 3}
HEADS = {"a key head each": 4, "shared key heads": 2}
FP32 = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "compile_blocks": False}


def model_of(num_kv_heads: int = 4, wrap: Any = None) -> Any:
    """A model whose heads have logits of different sizes, far from 0."""
    model = tiny_model(num_kv_heads=num_kv_heads, device="cpu" if wrap is None else "meta", **SIZES)
    if wrap is not None:
        wrap(model)
        model.to_empty(device="cpu")
    model.init_weights(0)
    with torch.no_grad():
        for number, attention in enumerate(model.attention_layers()):
            wq, factor_O = attention.wq.weight, torch.linspace(5, 30, len(attention.wq.weight)) + number
            local(wq).mul_(factor_O[local_rows(wq)].unsqueeze(-1))
            local(attention.wk.weight).mul_(20)
    return model


def still(model: Any) -> Any:
    """An optimizer that changes no weight."""
    return Optimizer.around(torch.optim.SGD(model.parameters(), lr=0.0))


def step(model: Any, optimizer: Any, qk_clip: float, *, number: int = 0, micro_batches: int = 1) -> StepOutput:
    micro = list(zip(*(half.chunk(micro_batches) for half in batch(number)), strict=True))
    return train_step(model, micro, optimizer, balancers(), model.expert_biases(), max_norm=0.1, qk_clip=qk_clip)


def logits_by_hand(model: Any, tokens: Tensor) -> list[Tensor]:
    """Of each layer all attention logits, (B, H, S, S) float64, -inf where a key is later than the query."""
    inputs: list[Tensor] = []
    hooks = [
        attention.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().double()))
        for attention in model.attention_layers()
    ]
    model(tokens)
    for hook in hooks:
        hook.remove()

    S, C = tokens.shape[1], model.attention_layers()[0].head_dim
    angle = torch.outer(torch.arange(S).double(), model.rotation.theta ** (-torch.arange(0, C, 2).double() / C))
    turn = torch.polar(torch.ones_like(angle), angle)  # (S, C / 2): channels i and i + C / 2 as one complex number

    def turned(x: Tensor, weight: Tensor) -> Tensor:
        left, right = (x @ weight.detach().double().T).unflatten(-1, (-1, C)).transpose(1, 2).chunk(2, -1)
        z = torch.complex(left.contiguous(), right.contiguous()) * turn
        return torch.cat((z.real, z.imag), -1)  # (B, heads, S, C)

    result = []
    for attention, x in zip(model.attention_layers(), inputs, strict=True):
        q, k = turned(x, attention.wq.weight), turned(x, attention.wk.weight)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        later = torch.ones(S, S, dtype=torch.bool).triu(1)
        result.append((q @ k.mT / math.sqrt(C)).masked_fill(later, -math.inf))
    return result


def largest_by_hand(model: Any, tokens: Tensor) -> Tensor:
    return torch.stack([logits.amax((0, 2, 3)) for logits in logits_by_hand(model, tokens)])  # (N, H)


def middle(largest: Tensor) -> float:
    """A threshold that half of the heads are above."""
    ordered = largest.flatten().sort().values
    return ordered[len(ordered) // 2 - 1 : len(ordered) // 2 + 1].mean().item()


# The largest logits.

SHAPES = [  # B, H, G, S, K
    (2, 4, 4, 16, 16),
    (1, 6, 2, ROWS, ROWS),
    (3, 4, 1, ROWS + 5, ROWS + 5),
    (1, 2, 2, 2 * ROWS + 1, 2 * ROWS + 1),
    (2, 4, 2, ROWS + 3, 3 * ROWS),  # the last queries of a longer sequence
    (2, 2, 1, 1, 1),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_largest_logits_are_those_of_all_of_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    B, H, G, S, K = shape
    q, k = torch.randn(B, H, S, 8).to(dtype), torch.randn(B, G, K, 8).to(dtype)
    logits = q.double() @ k.double().repeat_interleave(H // G, dim=1).mT / math.sqrt(8)
    later = torch.arange(K) > torch.arange(K - S, K).unsqueeze(-1)
    torch.testing.assert_close(
        max_logits(q, k).double(), logits.masked_fill(later, -math.inf).amax((0, 2, 3)), rtol=1e-5, atol=1e-6
    )


def test_a_logit_of_a_later_key_does_not_count() -> None:
    """Whatever the tile in which it is; all logits that do count may be negative."""
    for S in (4, ROWS + 4):
        q = torch.ones(1, 1, S, 4)
        k = -torch.arange(1.0, S + 1).flip(0).view(1, 1, S, 1).expand(1, 1, S, 4)  # the later, the larger
        torch.testing.assert_close(max_logits(q, k), torch.tensor([-2.0]))
        assert max_logits(q[:, :, :1], k[:, :, :1]) == -2 * S


@pytest.mark.parametrize("num_kv_heads", HEADS.values(), ids=HEADS)
def test_the_model_returns_the_largest_logits(num_kv_heads: int) -> None:
    model = model_of(num_kv_heads)
    tokens, labels = batch(0)
    (ce_sum, got), routings = model(tokens, labels, want="loss_and_max_logits")
    assert got.shape == (3, 4)
    assert not got.requires_grad
    torch.testing.assert_close(got.double(), largest_by_hand(model, tokens), rtol=1e-5, atol=1e-6)
    want, of_loss = model(tokens, labels)
    assert torch.equal(ce_sum, want)
    assert all(torch.equal(a.topk_scores, b.topk_scores) for a, b in zip(routings, of_loss, strict=True))


def test_nobody_else_computes_them() -> None:
    calls = CountsOperators()
    model = model_of()
    with calls:
        step(model, adamw(model), 0.0)
        eval_step(model, *batch(0), torch.ones(64))
        model(batch(0)[0])
    assert calls.counts[torch.ops.aten.mm.default] > 0
    assert calls.counts[MAX_LOGITS] == 0


class CountsOperators(TorchDispatchMode):
    """How often each operator runs."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[Any] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


# The clip.


@pytest.mark.parametrize("num_kv_heads", HEADS.values(), ids=HEADS)
def test_the_clip_is_that_of_the_paper(num_kv_heads: int) -> None:
    """Algorithm 1 of K2: W_qc and W_kc by sqrt(gamma); where the key is shared, as W_kr is there, W_qr by gamma."""
    plain, clipped = model_of(num_kv_heads), model_of(num_kv_heads)
    largest = largest_by_hand(plain, batch(0)[0])
    threshold = middle(largest)
    assert step(plain, adamw(plain), 0.0).qk_clip is None
    output = step(clipped, adamw(clipped), threshold)

    C, count = plain.attention_layers()[0].head_dim, 0
    for attention, largest_of_head in zip(plain.attention_layers(), largest.tolist(), strict=True):
        for h, logit in enumerate(largest_of_head):
            rows = slice(h * C, (h + 1) * C)
            if logit > threshold:
                count += 1
                gamma = threshold / logit
                if num_kv_heads == 4:
                    attention.wq.weight.data[rows] *= math.sqrt(gamma)
                    attention.wk.weight.data[rows] *= math.sqrt(gamma)
                else:
                    attention.wq.weight.data[rows] *= gamma

    assert output.qk_clip is not None
    assert output.qk_clip.clipped_heads == count
    torch.testing.assert_close(output.qk_clip.max_logits.double(), largest, rtol=1e-5, atol=1e-6)
    for (name, got), want in zip(clipped.named_parameters(), plain.parameters(), strict=True):
        if name.endswith(("wq.weight", "wk.weight")):
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        else:
            assert torch.equal(got, want), name


@pytest.mark.parametrize("num_kv_heads", HEADS.values(), ids=HEADS)
def test_after_the_clip_the_largest_logit_is_the_threshold(num_kv_heads: int) -> None:
    """Of the same input: in the first layer, as the input of the others has changed. Other heads keep theirs."""
    model = model_of(num_kv_heads)
    before = largest_by_hand(model, batch(0)[0])[0]
    threshold = middle(before)
    step(model, still(model), threshold)
    after = largest_by_hand(model, batch(0)[0])[0]
    torch.testing.assert_close(after, before.clamp(max=threshold), rtol=1e-5, atol=0)


def test_a_threshold_that_nothing_exceeds_changes_nothing() -> None:
    models = [model_of(), model_of()]
    outputs = [step(model, adamw(model), qk_clip) for model, qk_clip in zip(models, (0.0, 1e6), strict=True)]
    assert all(map(torch.equal, models[0].state_dict().values(), models[1].state_dict().values()))
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    assert outputs[1].qk_clip is not None
    assert outputs[1].qk_clip.clipped_heads == 0


def test_weights_in_bf16_are_rounded_once() -> None:
    model = model_of().to(torch.bfloat16)
    before = [attention.wq.weight.clone() for attention in model.attention_layers()]
    output = step(model, still(model), 1.0)
    assert output.qk_clip is not None
    assert output.qk_clip.clipped_heads == 12
    root = (1.0 / output.qk_clip.max_logits).sqrt().repeat_interleave(model.attention_layers()[0].head_dim, 1)
    for attention, weight, factor in zip(model.attention_layers(), before, root, strict=True):
        assert torch.equal(attention.wq.weight, (weight.float() * factor.unsqueeze(-1)).to(torch.bfloat16))


@pytest.mark.parametrize("part", ["attention.wo", "attention.wq"])
def test_a_step_that_is_not_finite_clips_nothing(part: str) -> None:
    model = model_of()
    before = [parameter.clone() for parameter in model.parameters()]
    hook = model.layers[1].get_submodule(part).register_forward_hook(lambda _, args, output: output * math.nan)
    output = step(model, adamw(model), 1.0)
    hook.remove()
    assert output.skipped
    assert output.qk_clip is not None
    assert output.qk_clip.clipped_heads == 0
    assert all(map(torch.equal, model.parameters(), before))


# However the step is cut and run.


def same(got: tuple[Any, StepOutput], want: tuple[Any, StepOutput]) -> None:
    for model, output in (got, want):
        assert output.qk_clip is not None
        assert 0 < output.qk_clip.clipped_heads < 12, model
    torch.testing.assert_close(got[1].qk_clip, want[1].qk_clip, rtol=1e-5, atol=1e-6)
    for a, b in zip(got[0].attention_layers(), want[0].attention_layers(), strict=True):
        torch.testing.assert_close((a.wq.weight, a.wk.weight), (b.wq.weight, b.wk.weight), rtol=1e-5, atol=1e-6)


def stepped(threshold: float, wrap: Any = None, **cut: int) -> tuple[Any, StepOutput]:
    model = model_of(2, wrap)
    return model, step(model, still(model), threshold, **cut)


def test_four_micro_batches_equal_one() -> None:
    threshold = middle(largest_by_hand(model_of(2), batch(0)[0]))
    same(stepped(threshold, micro_batches=4), stepped(threshold))


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_activation_checkpointing_computes_them_once(mode: str) -> None:
    threshold = middle(largest_by_hand(model_of(2), batch(0)[0]))
    calls = CountsOperators()
    with calls:
        got = stepped(threshold, partial(parallelize, mesh=None, checkpoint_mode=mode, **FP32))
    same(got, stepped(threshold))
    assert calls.counts[MAX_LOGITS] == 3  # one a layer: backward did not need them again


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["none", "full", "selective"])
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # as well
@pytest.mark.filterwarnings("ignore:`torch._prims_common.check` is deprecated:FutureWarning")  # as well, in inductor
def test_compiled_layers_in_one_graph_equal_others(mode: str) -> None:
    torch.compiler.reset()
    threshold = middle(largest_by_hand(model_of(2), batch(0)[0]))
    options = {**FP32, "compile_blocks": True}
    same(stepped(threshold, partial(parallelize, mesh=None, checkpoint_mode=mode, **options)), stepped(threshold))


def test_resume_is_bit_for_bit(tmp_path: Path) -> None:
    def run(model: Any, optimizer: Any, first: int, last: int) -> list[StepOutput]:
        outputs = [step(model, optimizer, 0.5, number=i) for i in range(first, last)]
        assert all(output.qk_clip is not None and output.qk_clip.clipped_heads > 0 for output in outputs)
        return outputs

    model, again = model_of(2), model_of(2)
    optimizer, other = adamw(model), adamw(again)
    run(model, optimizer, 0, 3)
    save_checkpoint(tmp_path, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=other)
    outputs = zip(run(model, optimizer, 3, 6), run(again, other, 3, 6), strict=True)
    assert all(torch.equal(a.loss, b.loss) for a, b in outputs)
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))


# What is told and refused.


def test_metrics_have_the_largest_of_all_layers() -> None:
    one, load = torch.tensor(1.0), torch.zeros(0)
    clipped = QKClip(torch.tensor([[1.0, 3.0], [7.0, 5.0]]), torch.tensor(2))
    output = StepOutput(one, {}, one, one, load, torch.tensor(24), {}, qk_clip=clipped)
    metrics = {name: value.item() for name, value in train_metrics(output).items()}
    assert {name: value for name, value in metrics.items() if name not in ("loss", "total_loss", "grad_norm")} == {
        "max_attention_logit": 7.0,
        "max_attention_logit/layer_0": 3.0,
        "max_attention_logit/layer_1": 7.0,
        "clipped_heads": 2,
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], ""),
        (["--training.qk_clip=-1"], r"training\.qk_clip = -1.* must be greater than or equal to 0"),
        (["--training.qk_clip=nan"], r"training\.qk_clip = nan"),
        (["--training.qk_clip=inf"], r"training\.qk_clip = inf"),
        (["--training.qk_clip=true"], r"training\.qk_clip = true: must be a valid number"),
        (["--training.qk_clip=100"], ""),
        (["--model.qk_norm=true"], ""),
        (
            ["--training.qk_clip=100", "--model.qk_norm=true"],
            r"^training\.qk_clip = 100 scales wq and wk, which model\.qk_norm = 'head' undoes .*: set "
            r"training\.qk_clip to 0, or model\.qk_norm to 'none'$",
        ),
    ],
)
def test_values(arguments: list[str], message: str) -> None:
    if message:
        with pytest.raises(ValueError, match=message):
            load_config(arguments)
    else:
        load_config(arguments)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--optimizer.name=schedule_free_adamw"], "schedule_free_adamw, .* of the group dense, evaluates an average"),
        (["--optimizer.dense.name=muonh"], "muonh, .* of the group dense, brings back to their norm at the next step"),
        (
            ["--optimizer.groups.queries.name=adamh", "--optimizer.groups.queries.match=layers.*.attention.wq.weight"],
            "adamh, the optimizer of the group queries, brings back .*: set training.qk_clip to 0, or another",
        ),
        (["--optimizer.expert.name=schedule_free_adamw", "--optimizer.dense.name=muon"], ""),
    ],
)
def test_an_optimizer_that_would_undo_it_is_refused(words: list[str], message: str) -> None:
    config = load_config(["--training.qk_clip=100", "--model.vocab_size=256", *words])
    with torch.device("meta"):
        model = build_model(config)
    if message:
        with pytest.raises(ValueError, match=message):
            build_optimizer(config, model)
    else:
        build_optimizer(config, model)


def test_a_norm_after_the_weights_would_undo_the_clip() -> None:
    """Why it is refused: however small wq and wk are made, the logits are the same (but for the norm's eps)."""
    model = tiny_model(qk_norm=True, **SIZES, norm_eps=1e-12)
    model.init_weights(0)
    tokens, labels = batch(0)
    (_, before), _ = model(tokens, labels, want="loss_and_max_logits")
    with torch.no_grad():
        for attention in model.attention_layers():
            attention.wq.weight.mul_(0.5)
            attention.wk.weight.mul_(0.5)
    (_, after), _ = model(tokens, labels, want="loss_and_max_logits")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_attention_alone() -> None:
    attention = Attention(dim=8, num_heads=2, num_kv_heads=1, qk_norm=False, norm_eps=1e-5)
    x, rope = torch.randn(2, SEQ, 8), (torch.ones(SEQ, 2), torch.zeros(SEQ, 2))
    plain, nothing = attention(x, rope)
    y, largest = attention(x, rope, True)
    assert nothing is None
    assert largest.shape == (2,)
    assert torch.equal(y, plain)
