"""Tensor and context parallelism equal one process: every kind of layer, all modes, 50 steps, and other layouts.

The invariance of routers and balancers in these layouts is in `test_invariance_dist`, the table of collectives in
`test_expert_dist`.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cases import Case
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import degrees_of, on_meta, place
from tests.invariance import assert_same, outcome, start
from tests.tiny import SEQ, adamw, own_part, steps, tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.model.routing import Router, Routing
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.optimizer import combine
from titan_moe.parallelize.mesh import Degrees

# Dense and MoE layers, shared experts, grouped heads with their norms, an output head of its own.
KINDS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "qk_norm": True,
    "first_dense_layers": 1,
    "num_shared_experts": 1,
    "tie_embeddings": False,
}
BALANCED = [Case("aux_loss", {}), Case("aux_loss", {"scope": "sequence"}), Case("z_loss", {}), Case("loss_free", {})]
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"checkpoint_mode": "selective"},
    "full": {"checkpoint_mode": "full"},
    "traced": {"compile_blocks": True},
    "traced, selective": {"compile_blocks": True, "checkpoint_mode": "selective"},
}
CURVES = ("fsdp2", "ep2", "tp2", "cp2")
NEAR_TIE = 1e-5  # what round-off may have made of a difference of logits after 50 steps
MATRICES = [
    {"dense": "muon", "expert": "shampoo"},
    {"dense": "normuon", "expert": "muonh", "router": "ademamix", "embedding": "ademamix", "norm": "ademamix"},
    {"dense": "adamh", "expert": "normuon"},
]


def one(model: Transformer, **own: Any) -> dict[str, Any]:
    """A step of all balancers with two micro-batches of every different sequence."""
    start(model)
    return outcome(model, BALANCED, micro_batches=2, **own)


def alone(data: int) -> dict[str, Any]:
    model = tiny_model(**KINDS)
    start(model)
    return outcome(model, BALANCED, micro_batches=2 * data)


def curve(model: Transformer, optimizer: torch.optim.Optimizer, count: int, **own: Any) -> torch.Tensor:
    outputs = steps(model, count, optimizer=optimizer, **own)
    return torch.stack([torch.stack([o.loss, o.total_loss, o.grad_norm]) for o in outputs])


def wrap_routers(model: Transformer, wrap: Callable[[Router], Router]) -> None:
    for layer in model.layers:
        if layer.moe is not None:
            layer.moe.route = wrap(layer.moe.route)


def free_curve(model: Transformer, count: int, **own: Any) -> dict[str, torch.Tensor]:
    """The curve, and the experts (passes, tokens, K) that each layer's pass chose for this rank's tokens."""
    choices = []

    def recording(route: Router) -> Router:
        def recorded(logits: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            routing = route(logits, bias)
            choices.append(routing.topk_experts)
            return routing

        return recorded

    wrap_routers(model, recording)
    return {"curve": curve(model, adamw(model), count, **own), "choices": torch.stack(choices)}


def held_curve(model: Transformer, choices: torch.Tensor, micro_batches: int = 1) -> tuple[torch.Tensor, float]:
    """The curve with given choices (passes, tokens, K) of all tokens, and how far these are from the model's own.

    That is the largest difference of logit and bias together between the K-th expert of its own and the least of those
    that were given.
    """
    by_step = choices.unflatten(0, (-1, len(model.expert_biases())))  # (steps, layers, tokens, K)
    given = iter([layer for step in by_step for part in step.chunk(micro_batches, 1) for layer in part])
    gaps = []

    def holding(route: Router) -> Router:
        def held(logits: torch.Tensor, bias: torch.Tensor | None) -> Routing:
            experts, own = next(given), route(logits, bias).topk_experts
            selection = logits.detach() + (0.0 if bias is None else bias)
            gaps.append((selection.gather(1, own).amin(1) - selection.gather(1, experts).amin(1)).max())
            return route(logits, torch.zeros_like(selection).scatter(1, experts, 1e3))

        return held

    wrap_routers(model, holding)
    got = curve(model, adamw(model), len(by_step), micro_batches=micro_batches)
    return got, float(torch.stack(gaps).max())


def check_curve(layout: str, degrees: Degrees, results: list[dict[str, torch.Tensor]], **options: Any) -> None:
    """One process that makes the choices of these ranks has their curve, and would have chosen so but for near ties.

    A choice between two logits that are equal to round-off is another one under other instructions, and from then on
    so is the curve: by 1 % and more, which would hide an error of that size.
    """
    numbers = torch.arange(8 * SEQ).view(8, SEQ)
    choices = torch.empty(len(results[0]["choices"]), 8 * SEQ, results[0]["choices"].shape[2], dtype=torch.int64)
    for rank, result in enumerate(results):
        choices[:, own_part((numbers, numbers), rank, len(results), degrees)[0].flatten()] = result["choices"]
    model = tiny_model(num_kv_heads=2, **options)
    model.init_weights(0)
    expected, gap = held_curve(model, choices, degrees.data)
    assert gap < NEAR_TIE, f"{layout}: a choice that is not of one process, by {gap:.1e}"
    for result in results:
        torch.testing.assert_close(result["curve"], expected, rtol=1e-5, atol=0, msg=lambda t: f"{layout}: {t}")


def of_matrices(model: Transformer, names: dict[str, str]) -> torch.optim.Optimizer:
    exact = {group: {"matmul_dtype": "float32"} for group, name in names.items() if "muon" in name}
    groups = parameter_groups(model.named_parameters(), exact)
    chosen = {group["name"]: names.get(group["name"], "adamw") for group in groups}
    return combine(groups, chosen, lambda name, own: OPTIMIZERS[name](own, lr=1e-2))


def all_modes(rank: int, world: int, layout: str) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # whole graphs, without minutes of a compiler
    own = place(rank, world, layout)
    models = {mode: on_meta(tiny_model(device="meta", **KINDS), world, layout, **o) for mode, o in MODES.items()}
    return {mode: one(model, **own) for mode, model in models.items()}


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("layout", ["tp2", "cp2"])
def test_two_ranks_equal_one(layout: str) -> None:
    want = alone(1)
    for result in run_ranks(2, all_modes, layout):
        for mode in MODES:
            check(f"{layout}, {mode}", result[mode], want)


def matrices(rank: int, world: int, folder: Path, names: dict[str, str]) -> tuple[torch.Tensor, torch.Tensor]:
    own = place(rank, world, "tp2")
    model = on_meta(tiny_model(device="meta", **KINDS), world, "tp2")
    optimizer = of_matrices(model, names)
    first = curve(model, optimizer, 3, **own)
    save_checkpoint(folder, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    return first, curve(model, optimizer, 2, **own)


@pytest.mark.dist
@pytest.mark.parametrize("names", MATRICES, ids=lambda names: names["dense"])
def test_matrix_optimizers_of_two_ranks_equal_those_of_one(tmp_path: Path, names: dict[str, str]) -> None:
    """And one process goes on with their checkpoint."""
    results = run_ranks(2, matrices, tmp_path, names)
    model, again = tiny_model(**KINDS), tiny_model(**KINDS)
    model.init_weights(0)
    optimizer, fresh = of_matrices(model, names), of_matrices(again, names)
    first, on = curve(model, optimizer, 3), curve(model, optimizer, 2)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=fresh)
    torch.testing.assert_close(curve(again, fresh, 2), on, rtol=1e-4, atol=0)
    for result in results:
        torch.testing.assert_close(result[0], first, rtol=1e-5, atol=0)
        torch.testing.assert_close(result[1], on, rtol=1e-4, atol=0)


def curve_of(rank: int, world: int, layout: str) -> dict[str, torch.Tensor]:
    model = on_meta(tiny_model(device="meta", num_kv_heads=2), world, layout)
    return free_curve(model, 50, **place(rank, world, layout))


@pytest.mark.dist
@pytest.mark.parametrize("layout", CURVES)
def test_the_curve_of_two_ranks_is_that_of_one(layout: str) -> None:
    check_curve(layout, degrees_of(2, layout), run_ranks(2, curve_of, layout))


CLOSE, CHOICE = "one: Tensor-likes are not close", "one: a choice that is not of one process"


@pytest.mark.parametrize(("wrong", "message"), [("scale", CLOSE), ("rows", "one: "), ("choice", CHOICE), ("", None)])
def test_a_curve_is_held_to_its_choices_alone(wrong: str, message: str | None) -> None:
    """A gradient that is off by 0.1 %, lost rows of an expert's, and a token that goes to another expert are seen."""
    model = tiny_model(num_kv_heads=2)
    model.init_weights(0)
    last = model.layers[1]
    if wrong == "scale":
        last.attention.wo.weight.register_hook(lambda gradient: gradient * 1.001)
    if wrong == "rows":
        last.moe.experts.w2.register_hook(lambda gradient: gradient * (torch.arange(16) > 3).view(16, 1))
    result = free_curve(model, 5)
    if wrong == "choice":
        result["choices"][3, 7, 0] = next(e for e in range(4) if e not in result["choices"][3, 7])
    with nullcontext() if message is None else pytest.raises(AssertionError, match=message):
        check_curve("one", Degrees(shard=1), [result])


def eight_ranks(rank: int, world: int) -> dict[str, Any]:
    (layout,) = ("fsdp2_cp2_tp2_ep4",)
    model = on_meta(tiny_model(device="meta", **KINDS, num_experts=8), world, layout, checkpoint_mode="selective")
    return one(model, **place(rank, world, layout))


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_eight_ranks_equal_one() -> None:
    """2 x 2 x 2, and experts over 4 of these."""
    model = tiny_model(**KINDS, num_experts=8)
    start(model)
    want = outcome(model, BALANCED, micro_batches=4)
    for result in run_ranks(8, eight_ranks):
        check("2 x 2 x 2", result, want)


def check(name: str, got: dict[str, Any], want: dict[str, Any]) -> None:
    try:
        assert_same(got, want)
    except AssertionError as error:
        raise AssertionError(f"{name}: {error}") from None
