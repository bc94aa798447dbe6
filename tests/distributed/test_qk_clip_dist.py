"""QK-clip on 2 and 4 ranks in all layouts: the largest logits, the clipped heads and the weights of one process."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, apply, place
from tests.invariance import full
from tests.tiny import adamw, balancers, batch, own_part
from tests.unit.test_qk_clip import model_on, middle
from titan_moe.model.transformer import Transformer
from titan_moe.step import train_step

STEPS = 2
KEY_HEADS = (4, 2)  # of four query heads; with two ranks of tensor parallelism each has some of either


def steps(model: Any, threshold: float, *, micro_batches: int = 1, **where: Any) -> dict[str, Any]:
    """What steps leave: of each the largest logits and the number of clipped heads, and wq and wk after all."""
    group, optimizer, clips = where.pop("sequence_group", None), adamw(model), []
    for number in range(STEPS):
        own = own_part(batch(number), **where) if where else batch(number)
        micro = list(zip(*(half.chunk(micro_batches) for half in own), strict=True))
        options = {"max_norm": 0.1, "qk_clip": threshold, "sequence_group": group}
        clips.append(train_step(model, micro, optimizer, balancers(), model.expert_biases(), **options).qk_clip)
    weights = [full(w.weight) for layer in model.attention_layers() for w in (layer.wq, layer.wk)]
    return {"clips": clips, "weights": weights}


def on_ranks(rank: int, world: int, threshold: float) -> dict[tuple[str, int], dict[str, Any]]:
    results = {}
    for layout in LAYOUTS[world]:
        for num_kv_heads in KEY_HEADS:
            model = model_on("meta", num_kv_heads, partial(apply, world=world, layout=layout))
            results[layout, num_kv_heads] = steps(model, threshold, **place(rank, world, layout))
    return results
