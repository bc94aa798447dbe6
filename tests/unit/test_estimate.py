"""The estimate: parts that can be counted by hand, a verdict with a knob, errors."""

import shlex

import pytest
import torch

from tests.e2e.harness import command
from titan_moe.build import build_balancers, build_model, build_optimizer
from titan_moe.compat import MESH_BY_PARAMETER
from titan_moe.config import load_config
from titan_moe.estimate import in_world, take, vocabulary
from titan_moe.model.routing import ROUTERS, Router
from titan_moe.simulate import Simulation, fake_world, simulate
from titan_moe.step import train_step

MODEL = shlex.split(
    "--model.dim 32 --model.num_layers 3 --model.num_heads 2 --model.vocab_size 512 --moe.num_experts 8 --moe.top_k 2 "
    "--moe.expert_dim 16 --training.local_batch_size 2 --training.seq_len 64 --training.global_batch_size -1 "
    "--training.mixed_precision_param float32"
)
EXPERTS, ATTENTION, EMBEDDING = 3 * 8 * 3 * 32 * 16, 3 * 4 * 32 * 32, 512 * 32
REST = 3 * (8 * 32 + 2 * 32) + 32  # routers, norms


def reads_on_the_host(top_k: int) -> Router:
    route = ROUTERS["topk_softmax"](top_k=top_k)
    return lambda logits, bias: route(logits * logits.max().item(), bias)


def run(world: int, *more: str, excess: float = 0.0, accumulates: bool = False) -> Simulation:
    config = load_config([*MODEL, *more])
    with fake_world(world):
        return simulate(config, in_world(config, world).degrees, excess=excess, accumulates=accumulates)


def test_one_rank_by_hand() -> None:
    result = run(1)
    parameters = EXPERTS + ATTENTION + EMBEDDING + REST
    assert result.parameters == 4 * parameters
    assert 8 * parameters <= result.optimizer_state < 8 * parameters + 4 * 100  # and a step count for each tensor
    assert result.expert_rows == 2 * 64 * 2
    tokens = 2 * 64
    products = 6 * tokens * (EXPERTS * 2 // 8 + ATTENTION + EMBEDDING + 3 * 8 * 32)
    attention = 3 * 2 * 2 * (2 * 64 * 64 * 16) * 2  # layers, sequences, heads: q k and its product with v
    assert products < result.flops <= products + 4 * attention  # backward is at most thrice, with recomputation
    assert sum(traffic.bytes for traffic in result.traffic.values()) == 0
    logits = 4 * tokens * 512
    assert result.activations > 2 * logits


def test_logits_of_a_chunk_at_a_time() -> None:
    """With a large vocabulary they would be most of the memory; the operations are the same, none is made again."""
    words = ("--model.vocab_size", "8192", "--training.loss_chunk_tokens")
    for dtype in ("float32", "bfloat16"):
        more = (*words, "{}", "--training.mixed_precision_param", dtype)
        whole, chunks = (run(1, *(word.format(size) for word in more)) for size in (0, 32))
        assert whole.activations - chunks.activations > 0.5 * 4 * 2 * 64 * 8192
        assert chunks.flops == whole.flops


@pytest.mark.skipif(not MESH_BY_PARAMETER, reason="tensor parallelism needs torch 2.13")
def test_parts_of_sequences_and_matrices() -> None:
    """An axis halves what it shares out; its bytes are those of tokens, or of keys and values."""
    one, context = run(1), run(4, "--parallelism.context_parallel_degree", "2")
    tensor = run(4, "--parallelism.tensor_parallel_degree", "2")
    for result, axis in ((context, "cp (2)"), (tensor, "tp (2)")):
        assert result.parameters == pytest.approx(one.parameters / 4, rel=0.01)
        assert result.expert_rows == one.expert_rows / 2
        assert 0.4 < result.flops / one.flops <= 0.5  # a causal chunk sees less than all
        assert result.activations < 0.6 * one.activations
        tokens_or_keys = 4 * 2 * 64 * 32  # fp32, sequences, tokens, width: K and V of half of them are as large
        calls = 3 if axis == "cp (2)" else 2 * 3
        assert result.traffic["all_gather", axis] == (calls, calls * tokens_or_keys // (2 if calls == 6 else 1))
        assert result.traffic["reduce_scatter", axis] == result.traffic["all_gather", axis]


def test_sharding_divides_and_communication_is_that_of_the_parameters() -> None:
    one, four = run(1), run(4)
    assert four.parameters == pytest.approx(one.parameters / 4, rel=0.01)
    assert four.optimizer_state == pytest.approx(one.optimizer_state / 4, rel=0.01)
    gathered = sum(size for (name, _), (_, size) in four.traffic.items() if name == "all_gather")
    scattered = four.traffic["reduce_scatter", "default_pg (4)"]
    # layers are gathered for forward and backward, the root (embedding, last norm) once
    layers, root = one.parameters - 4 * (EMBEDDING + 32), 4 * (EMBEDDING + 32)
    assert gathered == pytest.approx((2 * layers + root) * 3 / 4, rel=0.01)
    assert scattered.calls == 4
    assert scattered.bytes == pytest.approx(one.parameters * 3 / 4, rel=0.01)


def test_expert_parallelism() -> None:
    """Experts' parameters travel over efsdp only, tokens over ep; uneven load costs memory."""
    more = ("--parallelism.expert_parallel_degree", "4")
    even, uneven = run(8, *more), run(8, *more, excess=1.0)
    rows = 2 * 64 * 2
    assert (even.expert_rows, uneven.expert_rows) == (rows, 2 * rows)
    tokens = even.traffic["all_to_all_single", "ep (4)"]
    counts = 8 * 8  # int64 of 8 experts
    assert tokens.calls == 3 * 5  # a layer: counts, and there and back in forward and backward
    assert tokens.bytes == pytest.approx(3 * (4 * rows * 32 * 4 + counts) * 3 / 4, rel=0.01)
    experts = even.traffic["reduce_scatter", "efsdp (2)"]
    assert experts.bytes == pytest.approx(4 * EXPERTS / 4 / 2, rel=0.01)
    assert uneven.activations > even.activations + rows * 32 * 4
    assert uneven.parameters == even.parameters
    with pytest.raises(ValueError, match="must divide"):
        run(8, "--parallelism.expert_parallel_degree", "3")


def test_what_saves_memory_saves_memory() -> None:
    plain = run(2)
    full = run(2, "--activation_checkpoint.mode", "full")
    selective = run(2, "--activation_checkpoint.mode", "selective")
    assert full.activations < plain.activations
    assert full.activations <= selective.activations <= plain.activations
    assert full.flops > selective.flops > plain.flops or full.flops > plain.flops
    bf16 = run(2, "--training.mixed_precision_param", "bfloat16")
    assert bf16.activations < plain.activations
    assert bf16.parameters == plain.parameters
    assert run(2, accumulates=True).gradients == pytest.approx(plain.parameters, rel=0.01)


@pytest.mark.parametrize(
    "more",
    [
        "--router.capacity_factor 0.75",
        "--router.name expert_choice --router.capacity_factor 1.5",
        "--optimizer.expert.load_lr batch_fraction --router.name sigmoid --balancer.loss_free.rule quantile",
        "--quantize.converters quantize.grouped_mm.float8 --training.mixed_precision_param bfloat16",
        "--parallelism.data_parallel_replicate_degree 2 --activation_checkpoint.mode selective",
    ],
)
def test_whatever_a_run_can_have(more: str) -> None:
    factor = 0.75 if "0.75" in more else 1.5 if "1.5" in more else 1
    result = run(8, "--parallelism.expert_parallel_degree", "4", *more.split())
    assert result.expert_rows == 2 * 64 * 2 * factor
    assert result.peak > result.parameters + result.optimizer_state


@pytest.mark.parametrize("name", ["shampoo", "soap", "muon"])
def test_state_of_optimizers_of_matrices(name: str) -> None:
    """They look at values on the host, which a simulation has not; the state is that of a real step all the same."""
    words = ("--optimizer.expert.name", name, "--training.local_batch_size", "1")
    config = load_config([*MODEL, *words])
    model = build_model(config)
    model.init_weights(0)
    optimizer = build_optimizer(config, model)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    train_step(model, [(tokens, tokens)], optimizer, build_balancers(config), model.expert_biases(), max_norm=1.0)
    state = [leaf for own in optimizer.state.values() for leaf in own.values() if isinstance(leaf, torch.Tensor)]
    assert run(1, *words).optimizer_state == sum(leaf.nbytes for leaf in state)


def estimate(*words: str) -> str:
    ended = command("estimate", [*MODEL, *words])
    assert ended.code == 0, ended.err
    return ended.out


def test_the_command() -> None:
    out = estimate("--world-size", "8", "--parallelism.expert_parallel_degree=4", "--gpu=H200")
    assert "world: 8 ranks, replicas x shards 1 x 8, expert parallelism 4" in out
    assert "verdict: fits an H200" in out
    peaks = [float(line.split()[-1]) for line in out.splitlines() if "rows a MoE layer" in line]
    assert len(peaks) == 4
    assert peaks == sorted(peaks)
    note = estimate("--world_size", "8", "--training.global_batch_size", "20")
    assert "training would refuse it, this is for 16" in note
    assert "whatever the MaxVio" in note


def test_a_knob_that_makes_it_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, full = run(2).peak / 2**30, run(2, "--activation_checkpoint.mode", "full").peak / 2**30
    monkeypatch.setattr("titan_moe.estimate.GPUS", {"H100": (plain + full) / 2 / 0.9})
    out = estimate("--world_size=2").splitlines()
    assert "verdict: does not fit an H100" in out[-2] or "verdict: does not fit" in out[-3]
    assert out[-1].startswith("it would with activation_checkpoint.mode = ")
    monkeypatch.setattr("titan_moe.estimate.GPUS", {"H100": 1e-6})
    assert "none of these makes it fit: take more than 2 ranks" in estimate("--world_size=2")


def test_errors() -> None:
    for words, part in {
        "": "--world_size (not given)",
        "--world_size many": "--world_size (many)",
        "--world_size 8 --gpu H1000": "--gpu H1000: unknown",
        "--world_size 8 --parallelism.data_parallel_shard_degree 3": "data_parallel_shard_degree (3)",
        "--world_size 8 --model.vocab_size 0 --data.tokenizer some/hub-name": "give --model.vocab_size",
        "--world_size 8 --training.step 1": "training.step",
    }.items():
        ended = command("estimate", [*MODEL, *words.split()])
        assert ended.code == 2
        assert part in ended.err
        assert len(ended.err.splitlines()) == 1
    reads = [*MODEL, "--world_size", "2", "--router.name", "tests.unit.test_estimate:reads_on_the_host"]
    assert "reads a tensor's value on the host" in command("estimate", reads).err
    assert take(["a", "--gpu", "H100", "b"], ("--gpu",)) == ("H100", ["a", "b"])
    assert vocabulary(load_config(["--data.tokenizer", "openai-community/gpt2"])) == 50257
    assert vocabulary(load_config(["--data.tokenizer", "bpe:4096"])) == 4096
