"""Every layout gives each item of a task the score that one process gives it."""

from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import degrees_of, on_meta
from tests.tiny import SEQ, tiny_model
from tests.unit.test_tasks import made_up
from titan_moe.parallelize.mesh import Degrees
from titan_moe.tasks import score_items

KINDS: dict[str, Any] = {"num_heads": 4, "num_kv_heads": 2, "first_dense_layers": 1, "num_shared_experts": 1}
TWO = ("fsdp2", "hsdp2x1", "ep2", "tp2", "cp2")
FOUR = ("ep2_fsdp2", "fsdp2_tp2", "fsdp2_cp2", "cp2_tp2_ep4")


def scored(world: int, layout: str | None, rank: int = 0) -> tuple[list[float], list[bool]]:
    model = on_meta(tiny_model(device="meta", **KINDS), world, layout)
    degrees = Degrees() if layout is None else degrees_of(world, layout)
    place = {"seq_len": SEQ, "local_batch_size": 2, "pad_id": 3, "device": torch.device("cpu")}
    return score_items(model, made_up(), **place, rank=rank, degrees=degrees)


def ranks(rank: int, world: int, layouts: tuple[str, ...]) -> dict[str, tuple[list[float], list[bool]]]:
    return {layout: scored(world, layout, rank) for layout in layouts}


@pytest.mark.dist
@pytest.mark.parametrize(("world", "layouts"), [(2, TWO), (4, FOUR)])
def test_scores_do_not_depend_on_the_layout(world: int, layouts: tuple[str, ...]) -> None:
    expected, greedy = scored(1, None)
    results = run_ranks(world, ranks, layouts)
    for layout in layouts:
        for by_rank in results:
            scores, is_greedy = by_rank[layout]
            assert scores == pytest.approx(expected, rel=1e-6), layout
            assert is_greedy == greedy
        assert len({repr(by_rank[layout]) for by_rank in results}) == 1
