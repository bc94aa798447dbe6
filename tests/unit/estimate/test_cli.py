"""The estimate: parts that can be counted by hand, a step's time, a verdict with a knob, errors."""

import re
import shlex
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.cases import OPTIMIZER_NAMES
from tests.e2e.harness import command
from titan_moe.build import build_balancers, build_model, build_optimizer
from titan_moe.config import load_config
from titan_moe.estimate.cli import (
    Case,
    duration,
    in_world,
    largest_that_fits,
    short,
    take_option,
    vocabulary,
    with_batch,
)
from titan_moe.estimate.simulate import Simulation, bytes_moved, fake_world, simulate
from titan_moe.estimate.step_time import (
    COMPILED_BYTES,
    GAPS,
    HOST_SECONDS,
    LINK,
    PASSES,
    PRODUCTS,
    link_seconds,
    step_time,
)
from titan_moe.model.routing import ROUTERS, Router
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.owners import assign, cost
from titan_moe.runtime.compat import MESH_BY_PARAMETER
from titan_moe.runtime.machine import GPUS
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


def run(world: int, *more: str, excess: float = 0.0, micro_batches: int = 1) -> Simulation:
    config = load_config([*MODEL, *more])
    with fake_world(world):
        return simulate(config, in_world(config, world).degrees, excess=excess, micro_batches=micro_batches)


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
        assert result.activations < 0.7 * one.activations  # with what FSDP2 copies, which one process has not
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


def test_identity_experts_take_no_rows() -> None:
    """Of 2 choices among 8 + 8 experts one is computed in the mean, on one rank as on four."""
    more = ("--moe.num_identity_experts", "8")
    one, four = run(1, *more), run(4, *more, "--parallelism.expert_parallel_degree", "4")
    plain = run(1)
    rows = 2 * 64
    assert one.expert_rows == four.expert_rows == rows
    saved = 6 * rows * (EXPERTS // 8) - 6 * rows * 3 * 8 * 32  # as many rows less, and the router's 8 rows more
    assert plain.flops - one.flops == pytest.approx(saved, rel=1e-6)
    assert one.flops == pytest.approx(four.flops, rel=0.01)
    sent = sum(size for (name, _), (_, size) in four.traffic.items() if name == "all_to_all_single")
    assert sent == pytest.approx(3 * (4 * rows * 32 * 4 + 8 * 8) * 3 / 4, rel=0.01)


@pytest.mark.slow
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
    assert run(2, micro_batches=2).gradients == pytest.approx(plain.parameters, rel=0.01)


@pytest.mark.slow
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


STATES = [f"--optimizer.expert.name {name}" for name in OPTIMIZER_NAMES if name != "distributed_shampoo"]


@pytest.mark.parametrize("more", [*STATES, "--optimizer.state_dtype bfloat16"])
def test_state_of_optimizers(more: str) -> None:
    """Some look at values on the host, which a simulation has not; the state is that of a real step all the same."""
    words = (*more.split(), "--training.local_batch_size", "1")
    config = load_config([*MODEL, *words])
    model = build_model(config)
    model.init_weights(0)
    optimizer = build_optimizer(config, model)
    tokens = torch.zeros(1, 64, dtype=torch.int64)
    train_step(model, [(tokens, tokens)], optimizer, build_balancers(config), model.expert_biases(), max_norm=1.0)
    state = [leaf for own in optimizer.state.values() for leaf in own.values() if isinstance(leaf, torch.Tensor)]
    assert run(1, *words).optimizer_state == sum(leaf.nbytes for leaf in state)


def test_owners_of_dense_matrices() -> None:
    """State of the rank that has most; its update's products; parts to other owners, and updates to all others."""
    words = ("--optimizer.dense.name", "muon", "--optimizer.dense.matmul_dtype", "float32")
    shared, without = run(4, *words), run(4)
    groups = parameter_groups(build_model(load_config(MODEL)).named_parameters(), {})
    matrices = [p for group in groups if group["name"] == "dense" for p in group["params"] if p.dim() == 2]
    owners = [owner for owner, _ in assign([cost(matrix) for matrix in matrices], 4)]
    mine = sum(matrix.numel() for matrix, owner in zip(matrices, owners, strict=True) if owner == 0)
    whole = sum(matrix.numel() for matrix in matrices)
    most = max(
        sum(matrix.numel() for matrix, owner in zip(matrices, owners, strict=True) if owner == rank)
        for rank in range(4)
    )

    # AdamW has two moments of each element, on the rank that holds it, and a count of 4 bytes; muon has the momentum,
    # and a clock and a count
    assert shared.optimizer_state - without.optimizer_state == 4 * (most - 2 * whole // 4 + len(matrices))
    (sent,) = [traffic for (name, _), traffic in shared.traffic.items() if name == "all_to_all_single"]
    assert sent.bytes == 4 * ((whole - mine) // 4 + 3 * mine // 4)
    assert sent.calls == 2 * (1 + max(number for _, number in assign([cost(matrix) for matrix in matrices], 4)))

    # all are of one size, so the first rank computes a quarter
    extra = [with_muon.flops - plain.flops for with_muon, plain in ((run(1, *words), run(1)), (shared, without))]
    assert extra[1] == extra[0] // 4 > 0


def estimate(*words: str) -> str:
    ended = command("estimate.cli", [*MODEL, *words])
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


@pytest.mark.slow
def test_a_knob_that_makes_it_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, full = run(2).peak / 2**30, run(2, "--activation_checkpoint.mode", "full").peak / 2**30
    monkeypatch.setattr("titan_moe.estimate.cli.GPUS", {"H100": GPUS["H100"]._replace(memory=(plain + full) / 2 / 0.9)})
    out = estimate("--world_size=2").splitlines()
    (number,) = [i for i, line in enumerate(out) if line.startswith("verdict: does not fit an H100")]
    assert any(line.startswith("it would with activation_checkpoint.mode = ") for line in out[number + 1 :])
    monkeypatch.setattr("titan_moe.estimate.cli.GPUS", {"H100": GPUS["H100"]._replace(memory=1e-6)})
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
        ended = command("estimate.cli", [*MODEL, *words.split()])
        assert ended.code == 2
        assert part in ended.err
        assert len(ended.err.splitlines()) == 1
    reads = [*MODEL, "--world_size", "2", "--router.name", "tests.unit.estimate.test_cli:reads_on_the_host"]
    assert "reads a tensor's value on the host" in command("estimate.cli", reads).err
    assert take_option(["a", "--gpu", "H100", "b"], ("--gpu",)) == ("H100", ["a", "b"])
    assert vocabulary(load_config(["--data.tokenizer", "openai-community/gpt2"])) == 50257
    assert vocabulary(load_config(["--data.tokenizer", "bpe:4096"])) == 4096


def test_work_of_a_step_grows_with_its_micro_batches() -> None:
    """Three are run and stand for any number; the update is there once, and so is what the last micro-batch does."""
    bf16 = ("--training.mixed_precision_param", "bfloat16", "--model.num_layers", "1")
    one, three, four, seven = (run(1, *bf16, micro_batches=n).work for n in (1, 3, 4, 7))
    tokens = 2 * 64
    assert one["flops", "head"] == 6 * tokens * EMBEDDING
    assert one["flops", "fp32"] == 6 * tokens * 8 * 32  # of the router alone
    for kind in ("dense", "grouped", "head", "attention", "fp32"):
        assert one["flops", kind] > 0
        assert seven["flops", kind] == 7 * one["flops", kind]
    assert seven["bytes", "update"] == one["bytes", "update"] > 0
    assert {key: seven[key] - four[key] for key in four} == {key: 3 * (four[key] - three[key]) for key in four}
    clipped = run(1, *bf16, "--training.qk_clip", "100").work
    assert clipped["flops", "fp32"] - one["flops", "fp32"] == 2 * 2 * (64 * 64 * 16)  # sequences, heads, half of q k
    ahead = [run(1, *bf16, "--balancer.aux_loss.scope", "global_batch_exact", micro_batches=n).flops for n in (1, 7)]
    assert ahead[1] == 7 * ahead[0] > 7 * sum(count for key, count in one.items() if key[0] == "flops")


def test_documents_are_as_long_as_sequences_at_most() -> None:
    """How long they are is not known: attention costs what it costs without, and MFU leaves it out."""
    bf16, kv_heads = ("--training.mixed_precision_param", "bfloat16"), ("--model.num_kv_heads", "1")
    for more in (bf16, (*bf16, *kv_heads), (*bf16, "--activation_checkpoint.mode", "selective")):
        plain, masked = run(1, *more), run(1, *more, "--data.document_mask", "true")
        assert masked.work["flops", "attention"] == plain.work["flops", "attention"] > 0
        assert masked.peak == pytest.approx(plain.peak, rel=0.02)
    assert "note: with data.document_mask" in estimate("--world_size", "1", "--data.document_mask", "true")


def test_gathers_of_a_step_are_those_of_training() -> None:
    never = ("--parallelism.fsdp_reshard_after_forward", "never")
    for more, times in (((), 5), (never, 1)):
        one, five = (run(2, *more, micro_batches=n).traffic for n in (1, 5))
        for name in ("all_gather", "reduce_scatter"):
            assert five[name, "default_pg (2)"].bytes == times * one[name, "default_pg (2)"].bytes


def test_the_update_is_that_of_a_later_step() -> None:
    """Not of the first, which makes the state; AdamW's fused kernel goes over weight, gradient and two moments once."""
    size = run(1).parameters
    work = run(1).work
    fused = 8 * size  # each of the four read, and written for all that its schema knows
    norm = size
    assert fused + norm < work["bytes", "update"] < 1.05 * (fused + norm)
    shampoo = ("--optimizer.expert.name", "shampoo", "--optimizer.expert.precondition_frequency", "10")
    assert run(1, *shampoo).work["flops", "fp32"] > work["flops", "fp32"]


def test_bytes_of_operators() -> None:
    """What is read and what is written, each once; nothing for views and memory without contents."""
    aten = torch.ops.aten
    x, y, ids = torch.ones(4, 8), torch.ones(4, 8), torch.tensor([1, 3])
    moved: list[tuple[Any, int | None]] = []

    def note(func: Any, *args: Any, **kwargs: Any) -> None:
        moved.append((func, bytes_moved(func, func(*args, **kwargs), args, kwargs)))

    note(aten.add.Tensor, x, y)
    note(aten.add_.Tensor, x, y)
    note(aten.add.out, x, y, out=torch.empty(4, 8))
    note(aten.copy_.default, x, y)
    note(aten.add.Tensor, x, torch.ones(1, 8).expand(4, 8))  # what is expanded is read once
    note(aten.index_select.default, x, 0, ids)
    note(aten._foreach_mul_.Scalar, [x, y], 2.0)
    assert [size for _, size in moved] == [3 * 128, 3 * 128, 3 * 128, 2 * 128, 2 * 128 + 32, 2 * 64 + 16, 4 * 128]
    moved.clear()
    note(aten.view.default, x, [32])
    note(aten.t.default, x)
    note(aten.empty_like.default, x)
    assert [size for _, size in moved] == [None] * 3


def test_a_norm_is_one_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where it keeps one number a token; and it is what it was afterwards."""
    calls = []
    rms_norm, layer_norm = F.rms_norm, F.layer_norm

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(x.shape)
        return layer_norm(x, *args, **kwargs)

    monkeypatch.setattr(F, "layer_norm", counted)
    run(1)
    assert calls == [(2, 64, 32)] * 7
    assert F.rms_norm is rms_norm


def test_time_by_hand() -> None:
    """Products over shares of the peak or of the bandwidth, passes over shares of the bandwidth, or the host's pace."""
    gpu = GPUS["H100"]
    work = Counter({("flops", "dense"): 10**15, ("bytes", "layers"): 10**12, ("operators", "layers"): 1000})
    work |= Counter({("bytes", "grouped"): 10**12, ("bytes", "update"): 10**11, ("flops", "fp32"): 10**13})
    time = step_time(work, {}, gpu, compiled=False)
    kernels = {
        "products: dense": pytest.approx(1e15 / (PRODUCTS["dense"] * 989e12)),
        "products: grouped": pytest.approx(1e12 / (PASSES["layers"] * 3.35e12)),
        "products: in fp32": pytest.approx(1e13 / (PRODUCTS["fp32"] * 67e12)),
        "passes: layers": pytest.approx(1e12 / (PASSES["layers"] * 3.35e12)),
        "passes: clipping, optimizer": pytest.approx(1e11 / (PASSES["update"] * 3.35e12)),
    }
    gaps = time.device.pop("gaps between kernels")
    assert time.device == kernels
    assert gaps == pytest.approx(GAPS * sum(time.device.values()))
    time.device["gaps"] = gaps
    assert time.host == pytest.approx(1000 * HOST_SECONDS)
    assert time.seconds == sum(time.device.values())
    compiled = step_time(work, {}, gpu, compiled=True)
    assert compiled.device["passes: layers"] == pytest.approx(COMPILED_BYTES["layers"] * time.device["passes: layers"])
    assert compiled.operators < 1000
    work["operators", "layers"] = 10**6
    assert step_time(work, {}, gpu, compiled=False).seconds == pytest.approx(1e6 * HOST_SECONDS)


def test_time_of_communication() -> None:
    """FSDP's hides behind what is computed, as far as that lasts; what activations wait for comes on top."""
    gpu, node, two_nodes = GPUS["H100"], tuple(range(8)), tuple(range(16))
    assert link_seconds("all_gather", node, 10**9, gpu) == pytest.approx(1e9 / (LINK * 450e9))
    assert link_seconds("all_gather", two_nodes, 10**9, gpu) == pytest.approx(1e9 / (LINK * 400e9))
    assert link_seconds("all_gather", (0, 8), 10**9, gpu) == pytest.approx(1e9 / (LINK * 50e9))
    assert link_seconds("all_to_all_single", two_nodes, 15 * 10**9, gpu) == pytest.approx(8e9 / (LINK * 50e9))
    assert link_seconds("all_gather", two_nodes, 10**9, GPUS["GB200"]) == pytest.approx(1e9 / (LINK * 900e9))

    groups, second = {"efsdp": node, "ep": node}, int(LINK * 450e9)
    work = Counter({("flops", "dense"): int(PRODUCTS["dense"] * 989e12), ("sent", "all_gather", "efsdp"): second // 2})
    hidden = step_time(work, groups, gpu, compiled=False)
    assert sum(hidden.device.values()) == pytest.approx(1 + GAPS)
    work["sent", "all_gather", "efsdp"] = 3 * second
    work["sent", "all_to_all_single", "ep"] = work["waited", "all_to_all_single", "ep"] = 2 * second
    shown = step_time(work, groups, gpu, compiled=False)
    assert shown.device["communication, waited for"] == pytest.approx(2.0)
    assert shown.device["communication, not hidden"] == pytest.approx(3 - (1 + GAPS))

    experts = run(4, "--parallelism.expert_parallel_degree", "4").work
    assert experts["waited", "all_to_all_single", "default_pg (4)"] > 0
    assert experts["waited", "all_gather", "default_pg (4)"] == 0 < experts["sent", "all_gather", "default_pg (4)"]


def test_the_predicted_run() -> None:
    """What the user sees: time, throughput, MFU and hours, which agree with each other."""
    steps = ("--training.steps", "1000000", "--compile.enable", "false")
    out = estimate("--world_size", "1", *steps)
    found = re.search(r"about ([\d,]+) ms a step, (.*)k tokens/s, MFU (\d+) %, ([\d,.]+) h for 1,000,000 steps", out)
    assert found is not None
    milliseconds, thousands, _, hours = (float(text.replace(",", "")) for text in found.groups())
    assert "on 1 H100, eager" in out
    assert "note:" not in out
    assert 2 * 64 / (1000 * thousands) == pytest.approx(milliseconds / 1000, rel=0.05)
    assert hours == pytest.approx(milliseconds * 1e6 / 1000 / 3600, rel=0.05)
    assert "compiled" in estimate("--world_size", "1", "--compile.enable", "auto")

    other = estimate("--world_size", "2", "--gpu", "B200", "--optimizer.expert.name", "muon")
    assert "note: nothing was measured on a B200: scaled from an H100" in other
    assert "note: communication was not measured" in other
    assert "note: the time of the update by muon is a lower bound" in other
    assert "verdict: fits a B200" in other
    assert [short(12_345), short(177_600), short(1_419_000)] == ["12.3k", "178k", "1.42M"]
    assert [duration(90), duration(5_750), duration(7_200_000)] == ["1.5 min", "1.6 h", "2,000.0 h"]


def test_the_largest_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A divisor of a rank's part of the step, found in few simulations, also where peaks are not quite straight."""
    config = load_config([*MODEL, "--training.local_batch_size", "4"])
    case, tried = in_world(config, 1)._replace(accumulation=18), []  # 72 sequences
    like = run(1)

    def peak_of(case: Case) -> Simulation:
        size = case.config.training.local_batch_size
        assert size * case.accumulation == 72
        tried.append(size)
        return like._replace(activations=int(1000 + 100 * size + bend * size**2) - like.peak + like.activations)

    monkeypatch.setattr("titan_moe.estimate.cli.run", peak_of)
    divisors = [size for size in range(1, 73) if 72 % size == 0]
    for bend in (0.0, 1.0):
        for limit in (1050, 1100, 1400, 2999, 3600, 5000, 20000):
            tried.clear()
            found = largest_that_fits(case, limit, 1000, {})
            fitting = [size for size in divisors if 1000 + 100 * size + bend * size**2 <= limit]
            assert (found and found[0].config.training.local_batch_size) == max(fitting, default=None)
            assert len(tried) == len(set(tried)) <= 5
    tried.clear()
    case_of_72 = with_batch(case, 72)
    assert case_of_72.accumulation == 1
    assert largest_that_fits(case, like.peak, 1000, {72: like}) == (case_of_72, like)
    assert tried == []


def test_a_larger_micro_batch_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = ("--model.num_layers", "1")
    words = ("--world_size", "1", "--training.global_batch_size", "16", *layers)
    line = estimate(*words).splitlines()[-1]
    assert line.startswith(
        "largest training.local_batch_size that fits: 16 of the 16 sequences of a rank's step: 1 mic"
    )
    whole, selective = (
        run(1, "--training.local_batch_size", "16", *layers, *more).peak / 2**30
        for more in ((), ("--activation_checkpoint.mode", "selective"))
    )
    assert selective < whole
    memory = (whole + selective) / 2 / 0.9
    monkeypatch.setattr("titan_moe.estimate.cli.GPUS", {"H100": GPUS["H100"]._replace(memory=memory)})
    line = estimate(*words, "--compile.enable", "false").splitlines()[-1]
    assert "16 of the 16 sequences of a rank's step, with activation_checkpoint.mode = selective: 1 micro-batch" in line
    monkeypatch.setattr("titan_moe.estimate.cli.GPUS", {"H100": GPUS["H100"]._replace(memory=1.2 * whole)})
    assert "16 of the 16 sequences of a rank's step, as it is" in estimate(*words, "--training.local_batch_size", "16")
