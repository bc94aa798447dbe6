"""QK-clip on 2 and 4 ranks in all layouts: the largest logits, the clipped heads and the weights of one process."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, apply, place
from tests.invariance import full
from tests.tiny import batch, own_part
from tests.unit.test_qk_clip import largest_by_hand, middle, model_of
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.step import train_step

STEPS = 2
KEY_HEADS = (4, 2)  # of four query heads; with two ranks of tensor parallelism each has some of either


def steps(model: Any, threshold: float, **where: Any) -> dict[str, Any]:
    """What steps of two micro-batches leave: the logits and the number of clipped heads of each, and wq and wk."""
    group, clips = where.pop("sequence_group", None), []
    optimizer = Optimizer.around(torch.optim.SGD(model.parameters(), lr=1.0))
    for number in range(STEPS):
        own = own_part(batch(number), **where) if where else batch(number)
        micro = list(zip(*(half.chunk(2) for half in own), strict=True))
        options = {"max_norm": 0.1, "qk_clip": threshold, "sequence_group": group}
        clips.append(train_step(model, micro, optimizer, {}, [], **options).qk_clip)
    weights = [full(w.weight) for layer in model.attention_layers() for w in (layer.wq, layer.wk)]
    return {"clips": clips, "weights": weights}


def on_ranks(rank: int, world: int, threshold: float) -> dict[tuple[str, int], dict[str, Any]]:
    results = {}
    for layout in LAYOUTS[world]:
        for num_kv_heads in KEY_HEADS:
            model = model_of(num_kv_heads, partial(apply, world=world, layout=layout))
            results[layout, num_kv_heads] = steps(model, threshold, **place(rank, world, layout))
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    threshold = middle(largest_by_hand(model_of(2), batch(0)[0]))
    alone = {num_kv_heads: steps(model_of(num_kv_heads), threshold) for num_kv_heads in KEY_HEADS}
    assert all(0 < clip.clipped_heads < 12 for one in alone.values() for clip in one["clips"])
    for result in run_ranks(world, on_ranks, threshold):
        for (layout, num_kv_heads), got in result.items():
            try:
                torch.testing.assert_close(got, alone[num_kv_heads], rtol=1e-5, atol=1e-5)
            except AssertionError as error:
                raise AssertionError(f"{layout}, {num_kv_heads} key heads: {error}") from None


def compiled_on_ranks(rank: int, world: int, threshold: float) -> dict[str, dict[str, Any]]:
    results = {}
    for layout in ("tp2", "cp2"):  # whose attention is not that of one process
        torch.compiler.reset()
        options = {"layout": layout, "compile_blocks": True, "checkpoint_mode": "full"}
        model = model_of(2, partial(apply, world=world, **options))
        results[layout] = steps(model, threshold, **place(rank, world, layout))
    return results


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.timeout(600)
def test_compiled_layers_on_ranks_equal_one_process() -> None:
    """In one graph each (`fullgraph`), and with their activations computed again."""
    threshold = middle(largest_by_hand(model_of(2), batch(0)[0]))
    alone = steps(model_of(2), threshold)
    for result in run_ranks(2, compiled_on_ranks, threshold):
        for layout, got in result.items():
            torch.testing.assert_close(
                got, alone, rtol=1e-5, atol=1e-5, msg=lambda text, name=layout: f"{name}: {text}"
            )
