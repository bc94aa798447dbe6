"""Cross-entropy in chunks on two processes equals that of whole logits on one: each layout, tied and untied heads."""

import functools
from typing import Any

import pytest
import torch
from torch.distributed import _functional_collectives

from tests.cases import Case
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, on_meta, place
from tests.invariance import assert_same, outcome, start
from tests.tiny import batch, own_part, tiny_model, whole_logits
from titan_moe.step import evaluate

BALANCED = [Case("aux_loss", {}), Case("z_loss", {}), Case("loss_free", {})]
HEADS = {"tied": True, "untied": False}
CHUNK = 12  # of 32 or 64 tokens of a micro-batch
OPTIONS: dict[str, dict[str, Any]] = {
    **{layout: {} for layout in LAYOUTS[2]},
    "fsdp2, always resharded": {"reshard_after_forward": "always"},
    "fsdp2, compiled": {"compile_blocks": True},
    "tp2, checkpointed": {"checkpoint_mode": "full"},
}
if not hasattr(_functional_collectives, "all_gather_single"):  # torch below 2.13 has no tensor parallelism for FSDP2
    OPTIONS = {case: options for case, options in OPTIONS.items() if not case.startswith("tp")}


def of(model: Any, rank: int, world: int, degrees: Any = None, **own: Any) -> dict[str, Any]:
    """A step with accumulation and an evaluation."""
    start(model)
    evaluated = evaluate(model, [tuple(own_part(batch(1), rank, world, degrees))], torch.ones(64))
    result = outcome(model, BALANCED, micro_batches=2, rank=rank, world=world, degrees=degrees, **own)
    return {**result, "evaluated": (evaluated.loss_sum.float(), evaluated.num_correct)}


def two_ranks(rank: int, world: int) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")  # whole graphs, without minutes of a compiler
    results = {}
    for case, options in OPTIONS.items():
        layout = case.partition(",")[0]
        for head, tied in HEADS.items():
            model = tiny_model(device="meta", tie_embeddings=tied, num_kv_heads=2, loss_chunk_tokens=CHUNK)
            results[f"{case}, {head}"] = of(on_meta(model, world, layout, **options), **place(rank, world, layout))
    return results


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_two_ranks_equal_whole_logits_on_one() -> None:
    results = run_ranks(2, two_ranks)
    for head, tied in HEADS.items():
        want = {}
        for micro_batches in (2, 4):  # of all ranks
            model = whole_logits(tiny_model(tie_embeddings=tied, num_kv_heads=2))
            start(model)
            evaluated = evaluate(model, [batch(1)], torch.ones(64))
            want[micro_batches] = outcome(model, BALANCED, micro_batches=micro_batches)
            want[micro_batches]["evaluated"] = (evaluated.loss_sum.float(), evaluated.num_correct)
        for result in results:
            for case in OPTIONS:
                name = f"{case}, {head}"
                try:
                    assert_same(result[name], want[2 if case[:2] in ("tp", "cp") else 4])
                except AssertionError as error:
                    raise AssertionError(f"{name}: {error}") from None
