"""Attention inside documents in all layouts: everything that a step makes is that of one process.

That one process computes each document as if alone, `tests/unit/model/test_documents.py` shows.
"""

import functools
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from tests import invariance, tiny
from tests.cases import Case
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import LAYOUTS, degrees_of, on_meta, place
from tests.distributed.test_parts_dist import check_curve, free_curve
from tests.invariance import assert_same, outcome, start
from tests.tiny import adamw, batch, own_part, tiny_model
from titan_moe.model.transformer import Transformer
from titan_moe.step import train_step

MASKED: dict[str, Any] = {"document_mask": True, "restart_positions": True}
KINDS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "first_dense_layers": 1,
    "num_shared_experts": 1,
    **MASKED,
}
BALANCED = [Case("aux_loss", {"scope": "sequence"}), Case("z_loss", {}), Case("loss_free", {})]
MODES: dict[str, dict[str, Any]] = {
    "none": {},
    "full": {"checkpoint_mode": "full"},
    "traced, selective": {"compile_blocks": True, "checkpoint_mode": "selective"},
}
CURVES = {2: ("fsdp2", "cp2"), 4: ("ep2_tp2", "cp2_tp2_ep4")}


def with_ends(step: int, sequences: int = 8) -> tuple[Tensor, Tensor]:
    """`batch`, where a third of the sequences are one document, and others have as many as eight."""
    tokens, labels = batch(step, sequences)
    often = torch.arange(sequences).unsqueeze(1) % 3 * 5
    return tokens.where((tokens * 7 + step) % 16 >= often, torch.tensor(3)), labels


def one(model: Transformer, micro_batches: int = 2, **own: Any) -> dict[str, Any]:
    start(model)
    with mock.patch.object(invariance, "batch", with_ends):
        return outcome(model, BALANCED, micro_batches=micro_batches, **own)


def clips(model: Transformer, **own: Any) -> Any:
    """The heads' largest logits of two steps, and what is clipped of them."""
    model.init_weights(0)
    optimizer, results = adamw(model), []
    group = own.pop("sequence_group", None)
    for step in range(2):
        tokens, labels = own_part(with_ends(step), **own) if own else with_ends(step)
        options = {"max_norm": 0.1, "qk_clip": 1e-3, "sequence_group": group}
        results.append(train_step(model, [(tokens, labels)], optimizer, {}, [], **options).qk_clip)
    return results


def all_layouts(rank: int, world: int) -> dict[str, dict[str, Any]]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    results: dict[str, dict[str, Any]] = {}
    for layout, degrees in LAYOUTS[world].items():
        own = place(rank, world, layout)
        modes = dict(MODES) if world == 2 else {"full": MODES["full"]}
        if not degrees.keys() & {"tensor", "context"}:  # whose attention is that of one process
            modes.pop("traced, selective", None)
        results[layout] = {
            mode: one(on_meta(tiny_model(device="meta", **KINDS), world, layout, **options), **own)
            for mode, options in modes.items()
        }
        results[layout]["clips"] = clips(on_meta(tiny_model(device="meta", **KINDS), world, layout), **own)
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_equal_one_process(world: int) -> None:
    data = {layout: degrees["shard"] * degrees.get("replicate", 1) for layout, degrees in LAYOUTS[world].items()}
    alone = {number: one(tiny_model(**KINDS), micro_batches=2 * number) for number in set(data.values())}
    plain = one(tiny_model(**{**KINDS, "document_mask": False, "restart_positions": False}))
    assert abs(plain["loss"] - alone[1]["loss"]) > 1e-4
    largest = clips(tiny_model(**KINDS))
    for result in run_ranks(world, all_layouts):
        for layout, outcomes in result.items():
            torch.testing.assert_close(
                outcomes.pop("clips"),
                largest,
                rtol=1e-5,
                atol=1e-6,
                msg=lambda text, layout=layout: f"{layout}: {text}",
            )
            for mode, got in outcomes.items():
                try:
                    assert_same(got, alone[data[layout]])
                except AssertionError as error:
                    raise AssertionError(f"{layout}, {mode}: {error}") from None


def curves(rank: int, world: int) -> dict[str, dict[str, Tensor]]:
    results = {}
    for layout in CURVES[world]:
        model = on_meta(tiny_model(device="meta", num_kv_heads=2, **MASKED), world, layout)
        with mock.patch.object(tiny, "batch", with_ends):
            results[layout] = free_curve(model, 50, **place(rank, world, layout))
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("world", [2, 4])
def test_fifty_steps_are_those_of_one_process(world: int) -> None:
    results = run_ranks(world, curves)
    for layout in CURVES[world]:
        with mock.patch.object(tiny, "batch", with_ends):
            check_curve(layout, degrees_of(world, layout), [result[layout] for result in results], **MASKED)
