"""What real models have beside the plain decoder, over ranks: each layout computes what one process does."""

import functools
from typing import Any

import pytest
import torch

from tests.distributed.harness import run_ranks
from tests.distributed.layouts import on_meta, place
from tests.distributed.test_parts_dist import BALANCED, check, one
from tests.invariance import outcome, start
from tests.tiny import tiny_model
from titan_moe.model.rope import RopeScaling

OPTIONS: dict[str, dict[str, Any]] = {
    "olmoe": {
        **{"qk_norm": "full", "num_heads": 4, "num_kv_heads": 2, "head_dim": 8, "tie_embeddings": False},
        **{"rope_scaling": RopeScaling("yarn", factor=4.0, original_seq_len=8), "attention_bias": True},
    },
    "qwen2_moe": {
        **{"attention_bias": True, "num_heads": 4, "num_kv_heads": 2, "first_dense_layers": 1},
        **{"num_shared_experts": 1, "shared_expert_dim": 24, "shared_expert_gate": True},
    },
    "glm4_moe": {
        **{"qk_norm": "head", "attention_bias": True, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8},
        **{"partial_rotary_factor": 0.5, "router": "sigmoid"},
        **{"rope_scaling": RopeScaling("llama3", factor=4.0, original_seq_len=8, low_freq_factor=0.5)},
    },
}
MODES = {"none": {}, "traced, selective": {"compile_blocks": True, "checkpoint_mode": "selective"}}


def model_of(name: str, device: str = "cpu") -> Any:
    return tiny_model(device=device, **{"router": "topk_softmax", **OPTIONS[name]})


def of_ranks(rank: int, world: int, layout: str) -> dict[str, Any]:
    torch.compile = functools.partial(torch.compile, backend="aot_eager")
    own, results = place(rank, world, layout), {}
    for name in OPTIONS:
        torch.compiler.reset()  # one process has one model, whose sizes are constants
        for mode, changes in MODES.items() if layout == "tp2" else [("none", {})]:
            results[f"{name}, {mode}"] = one(on_meta(model_of(name, "meta"), world, layout, **changes), **own)
    return results


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize(("world", "layout"), [(2, "tp2"), (2, "cp2"), (4, "ep2_tp2")])
def test_options_over_ranks(world: int, layout: str) -> None:
    data = 1 if layout in ("tp2", "cp2") else 2
    want = {}
    for name in OPTIONS:
        model = model_of(name)
        start(model)
        want[name] = outcome(model, BALANCED, micro_batches=2 * data)
    for result in run_ranks(world, of_ranks, layout):
        for case, got in result.items():
            check(f"{layout}, {case}", got, want[case.partition(",")[0]])
