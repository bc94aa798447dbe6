"""Training goes on in other layouts: saved by 4 ranks, loaded by 2, saved, loaded by 1, saved, loaded by 4.

Every part is compared with the same steps of one process that never stopped; so are evaluation, generation and probes
on the way, and load-based rates and measures of experts in each layout. Also with a router that has parameters of its
own, from 2 ranks to 1; a balancer keeps a state in all.
"""

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from examples.balancer import rprop
from tests.distributed.harness import run_ranks
from tests.distributed.layouts import on_meta
from tests.invariance import INITS, OWN_BALANCER, OWN_ROUTER
from tests.tiny import VOCAB, balancers, batch, tiny_model
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.diagnostics import balance_tax, routing_choices
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.parallelize.grad import param_norm
from titan_moe.step import evaluate, train_step

LOAD_LR = {"load_lr": "ideal_normalized", "load_lr_ema": 0.5, "load_lr_decay": False}
PART = 2  # steps
CHAIN = [(4, "ep2_fsdp2"), (2, "ep2"), (1, None), (4, "hsdp2_ep2")]
OWN_CHAIN = [(2, "ep2"), (1, None)]
Chain = list[tuple[int, str | None]]


def build(chain: Chain, link: int) -> tuple[Any, torch.optim.Optimizer]:
    router = OWN_ROUTER if chain == OWN_CHAIN else "topk_softmax"
    model = on_meta(tiny_model(router, device="meta", num_experts=8, balancer_inits=INITS), *chain[link])
    groups = {"norm": {"weight_decay": 0.0}, "expert": {"lr": 5e-3, **expand_load_lr(LOAD_LR, top_k=2)}}
    return model, OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), groups), lr=1e-2)


def go_on(rank: int, world: int, folder: Path, chain: Chain, link: int) -> dict[str, Any]:
    """Load where the link before has saved, train a part, save."""
    model, optimizer = build(chain, link)
    return part(model, optimizer, rank, world, folder, link, load=link > 0, save=True)


def part(
    model: Any, optimizer: Any, rank: int, world: int, folder: Path, link: int, *, load: bool, save: bool
) -> dict[str, Any]:
    begin = link * PART
    if load:
        load_checkpoint(folder / f"step-{begin}", model=model, optimizer=optimizer)
    outputs = []
    for step in range(begin, begin + PART):
        tokens, labels = (half.chunk(world)[rank] for half in batch(step))
        micro = list(zip(tokens.chunk(4 // world), labels.chunk(4 // world), strict=True))
        own = balancers() | {str(OWN_BALANCER): (1.0, rprop(rate=0.05))}
        options = {"max_norm": 0.1, "measure_experts": True, "balancer_states": model.balancer_states()}
        outputs.append(train_step(model, micro, optimizer, own, model.expert_biases(), **options))
    forward = forward_only(model, rank, world)
    if save:
        save_checkpoint(folder, begin + PART, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    names = ("loss", "total_loss", "grad_norm", "load", "load_factors")
    return {
        **{name: torch.stack([getattr(output, name) for output in outputs]) for name in names},
        "stats": tuple(outputs[-1].expert_stats),
        "bias": torch.stack(model.expert_biases()).clone(),
        "state": torch.stack(model.balancer_states()[str(OWN_BALANCER)]["rate"]).clone(),
        "param_norm": param_norm(model.parameters()),
        **forward,
    }


def forward_only(model: Any, rank: int, world: int) -> dict[str, Any]:
    """What runs the model without training it; ranks evaluate batches of different sizes."""
    tokens, labels = (torch.tensor_split(half, [5])[rank % 2] if world > 1 else half for half in batch(9))
    mine = [(tokens, labels if rank < 2 else torch.full_like(labels, -100))]  # of ranks with the same batch, one counts
    evaluation = evaluate(model, mine, torch.ones(VOCAB))
    choices = routing_choices(model, *batch(9))
    assert balance_tax(model, *batch(9), repeats=1) > 0
    if hasattr(model, "reshard"):
        model.reshard()
    return {"evaluation": tuple(evaluation), "choices": choices}


def assert_close(got: dict[str, Any], want: dict[str, Any], where: str) -> None:
    for name, value in got.items():
        rtol, atol = (1e-3, 1e-4) if name in ("stats", "evaluation") else (1e-5, 1e-6)
        torch.testing.assert_close(
            value,
            want[name],
            rtol=rtol,
            atol=atol,
            msg=lambda text: f"{where}, {name}: {text}",  # noqa: B023
        )


@pytest.mark.dist
@pytest.mark.timeout(600)
@pytest.mark.parametrize("chain", [CHAIN, OWN_CHAIN], ids=["ours", "own"])
def test_a_run_goes_on_in_any_layout(chain: Chain) -> None:
    model, optimizer = build(chain, chain.index((1, None)))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for link, (world, _) in enumerate(chain):
            want = part(model, optimizer, 0, 1, folder, link, load=False, save=False)
            results = run_ranks(world, go_on, folder, chain, link) if world > 1 else [go_on(0, 1, folder, chain, link)]
            for got in results:
                assert_close(got, want, str(chain[link]))
