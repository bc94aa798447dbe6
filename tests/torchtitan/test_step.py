"""A step of stock torchtitan with the pieces on equals titan_moe's own step at the same weights and tokens."""

from functools import reduce
from typing import Any

import pytest
import torch

from tests.torchtitan.processes import start
from titan_moe.build import build_balancers
from titan_moe.config import merge_layers
from titan_moe.config.layers import Layer
from titan_moe.metrics import maxvio, train_metrics
from titan_moe.model.routing import ROUTERS
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.build import OPTIMIZERS
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.runtime.world import seed_step
from titan_moe.step import train_step

pytestmark = pytest.mark.timeout(900)  # the fixtures run many cases

AUX = {"aux_loss": {"coeff": 0.1}}
SEQUENCE = {"aux_loss": {"coeff": 0.1, "scope": "sequence"}}
LOSSES = {**SEQUENCE, "z_loss": {"coeff": 0.01}, "entropy_loss": {"coeff": 0.02}}
BY_LOAD = {"load_lr": "ideal_normalized", "load_lr_ema": 0.5}
PARTS = "tests.torchtitan.parts:"
SEED = 7  # of side.recipe
IDENTITY = ("identity_fraction", "identity_fraction/layer_1", "experts_per_token", "experts_per_token/layer_0")
NEWLINE = 10  # ends the documents of side.Lines
WEIGHTS = {f"{PARTS}of_router": {"coeff": 1e-3}, f"{PARTS}of_experts": {"coeff": 0.1}}
KEPT = {
    f"{PARTS}paced": {"rate": 0.01},
    "smebu": {"rate": 1e-3, "kappa": 1.0, "momentum": 0.9},
    f"{PARTS}even_rows": {},
}
ALL = {
    "balancers": {**LOSSES, **WEIGHTS, **KEPT, "loss_free": {"rate": 0.01}},
    "optimizer": {
        "expert": {"lr": 0.02, **BY_LOAD},
        "router": {"lr": 0.003},
        "groups": {"down": {"match": ["*.inner_experts.w2_EDF"], "lr": 0.01, "beta1": 0.8, **BY_LOAD}},
    },
    "metrics": True,
}
SHAMPOO = {
    "balancers": {**SEQUENCE, **WEIGHTS, **KEPT, "loss_free": {"rate": 0.01, "rule": "quantile"}},
    # with the default epsilon, experts of few tokens have factors whose inverse roots enlarge round-off a thousandfold
    "optimizer": {
        "expert": {"name": "shampoo", "precondition_frequency": 2, "epsilon": 1e-6, **BY_LOAD},
        "groups": {
            "heads": {"match": "*.w[qk].weight", "name": "muon", "per_head": True, "matmul_dtype": "float32"},
        },
    },
    "metrics": True,
}
EMO = {"name": "emo", "min_pool": 4, "max_pool": 4}
MLP = {"name": "mlp", "latent_dim": 16, "order": "topk_softmax"}
THRESHOLD = {"name": "threshold", "max_k": 3}
PLACES = {f"{PARTS}of_places": {"coeff": 1e-3}}
OUTPUTS = {"specialization": {"coeff": 0.1}, "orthogonality": {"coeff": 0.1}}
COUPLED = {"coupling": {"coeff": 0.1}, f"{PARTS}coupled": {"coeff": 0.1}}
LATE = {f"{PARTS}late": {}, "loss_free": {"rate": 0.01, "decay_ratio": 0.6}}
FREE = {"num_identity_experts": 2}
DROPOUT = {"expert_dropout": 0.3}
ROUTED = {
    "emo": (EMO, {**AUX, **PLACES, **OUTPUTS, **COUPLED, **LATE}),
    "mlp": (MLP, {**LOSSES, **COUPLED, **LATE}),
    "threshold": (THRESHOLD, {**SEQUENCE, **OUTPUTS, "loss_free": {"rate": 0.5, "rule": "quantile"}}),
    "identity": ({"name": "softmax_topk"}, {**SEQUENCE, **OUTPUTS, "pid": {"real_share": 0.6}}),
    "both": (THRESHOLD, {**AUX, **COUPLED, f"{PARTS}late": {}, "loss_free": {"rate": 0.5, "rule": "quantile"}}),
}
LATER = {"balancers": {**SEQUENCE, **KEPT, "loss_free": {"rate": 0.01}}, "optimizer": {"router": {"lr": 0.003}}}
EXPERTS = {"identity": FREE, "both": {**FREE, **DROPOUT}}
OVERRIDES = (
    ("torchtitan_patches.overrides.optimizers", {"balancers": PLACES}),
    "torchtitan_patches.overrides.loss",
)
NOISE = {
    "router": {"name": "topk_softmax", "jitter": 0.1},
    "balancers": {**AUX, **OUTPUTS, "erc": {"coeff": 0.1}},
}
RUNS = {
    name: {
        "pieces": {
            "router": router,
            "balancers": balancers,
            "moe": EXPERTS.get(name, {}),
            "metrics": True,
            "optimizer": {"router": {"lr": 0.003}, **({"expert": BY_LOAD} if name == "identity" else {})},
        },
        "steps": 4,
        "documents": True,
    }
    for name, (router, balancers) in ROUTED.items()
}
CASES = {
    "ours": {"pieces": ALL, "steps": 5, "validate": True},
    "off": {"pieces": {}, "do": "gradients", "weights": "ours"},
    "on": {"pieces": {"balancers": AUX}, "do": "gradients", "weights": "ours"},
    "on_softmax": {"pieces": {"balancers": LOSSES}, "do": "gradients", "weights": "ours", "score_func": "softmax"},
    "off_softmax": {"pieces": {}, "do": "gradients", "weights": "ours", "score_func": "softmax"},
    "on_weights": {"pieces": {"balancers": WEIGHTS}, "do": "gradients", "weights": "ours"},
    "full": {"pieces": ALL, "steps": 2, "weights": "ours", "checkpointing": "full"},
    "selective": {"pieces": ALL, "steps": 2, "weights": "ours", "checkpointing": "selective"},
    "only_metrics": {"pieces": {"metrics": True}, "steps": 2, "weights": "ours"},
    "stock": {"pieces": {}, "steps": 2, "weights": "ours"},
    "compiled": {"pieces": ALL, "steps": 1, "weights": "ours", "compiled": "aot_eager"},
    "one": {"pieces": SHAMPOO, "steps": 4, "weights": "ours", "interval": 2},
    "resumed": {"pieces": SHAMPOO, "steps": 4, "interval": 100, "load_step": 2},
    **RUNS,
    "on_outputs": {"pieces": {"balancers": {**OUTPUTS, **COUPLED}}, "do": "gradients", "weights": "ours"},
    "on_noise": {"pieces": {**NOISE, "moe": {**FREE, **DROPOUT}}, "do": "gradients"},
    "emo_full": {**RUNS["emo"], "weights": "emo", "checkpointing": "full"},
    "emo_selective": {**RUNS["emo"], "weights": "emo", "checkpointing": "selective"},
    "emo_compiled": {**RUNS["emo"], "steps": 1, "weights": "emo", "compiled": "aot_eager"},
    "threshold_compiled": {**RUNS["threshold"], "steps": 1, "weights": "threshold", "compiled": "aot_eager"},
    "both_saved": {**RUNS["both"], "weights": "both", "interval": 2},
    "both_resumed": {**RUNS["both"], "interval": 100, "load_step": 2},
    "both_full": {**RUNS["both"], "weights": "both", "checkpointing": "full"},
    "both_compiled": {**RUNS["both"], "steps": 1, "weights": "both", "compiled": "aot_eager"},
    "stock_saved": {"pieces": {}, "steps": 2, "weights": "ours", "interval": 2},
    "started": {"pieces": LATER, "steps": 2, "interval": 100, "start": "../stock/checkpoint/step-2"},
    "overridden": {"pieces": {"metrics": True}, "overrides": OVERRIDES, "steps": 1, "weights": "ours"},
    "stock_goes_on": {"pieces": LATER, "steps": 2, "weights": "stock_saved/last"},
}
MORE = {
    "two": {"pieces": SHAMPOO, "steps": 4},
    "ep": {"pieces": SHAMPOO, "steps": 4, "ep": 2, "interval": 2},
    "resumed": {"pieces": SHAMPOO, "steps": 4, "ep": 2, "interval": 100, "load_step": 2},
    "emo_ep": {**RUNS["emo"], "weights": "emo", "ep": 2},
    "mlp_ep": {**RUNS["mlp"], "weights": "mlp", "ep": 2, "interval": 2},
    "mlp_resumed": {**RUNS["mlp"], "ep": 2, "interval": 100, "load_step": 2},
    "threshold_ep": {**RUNS["threshold"], "weights": "threshold", "ep": 2},
    "identity_ep": {**RUNS["identity"], "weights": "identity", "ep": 2},
    "both_ep": {**RUNS["both"], "weights": "both", "ep": 2, "interval": 2},
    "both_resumed": {**RUNS["both"], "weights": "both", "ep": 2, "interval": 100, "load_step": 2},
    "cp_router": {"do": "refused", "pieces": {"router": EMO}, "cp": 2},
    "cp_overrides": {"do": "refused", "pieces": {}, "overrides": OVERRIDES, "cp": 2},
}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("one")
    with_folder = {name: {**case, "folder": str(folder / place_of(name))} for name, case in CASES.items()}
    return start(with_folder, folder, 1)


def place_of(name: str) -> str:
    """The folder of a case: `a_saved` and `a_resumed` share one."""
    return "one" if name == "resumed" else name.partition("_")[0]


@pytest.fixture(scope="module")
def two_ranks(results: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    found = {}
    for name, case in MORE.items():  # processes of their own: a second group in a process now and then never connects
        weights = results[case.get("weights", "ours")]["first"]
        place = folder / ("ep" if name == "resumed" else place_of(name))
        found |= start({name: {**case, "folder": str(place), "weights": weights}}, folder, 2)
    return found


RENAMED = (
    ("qkv_linear.", ""),
    ("moe.routed_experts.inner_experts.w1_EFD", "moe.experts.w1"),
    ("moe.routed_experts.inner_experts.w2_EDF", "moe.experts.w2"),
    ("moe.routed_experts.inner_experts.w3_EFD", "moe.experts.w3"),
    ("router.gate.", "router."),
    ("lm_head.", "output."),
    ("expert_bias_E", "expert_bias"),
)


def our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {reduce(lambda name, pair: name.replace(*pair), RENAMED, name): tensor for name, tensor in tensors.items()}


def our_model(
    state: dict[str, torch.Tensor], router: str, balancers: Any, moe: Any = None, **arguments: Any
) -> Transformer:
    sizes = {"vocab_size": 256, "dim": 32, "num_layers": 2, "num_heads": 2, "num_experts": 8, "expert_dim": 32}
    sizes |= moe or {}
    made = {
        "balancer_inits": {name: b.init for name, (_, b) in balancers.items() if b.init},
        "measures": {name: b.measure for name, (_, b) in balancers.items() if b.measure},
        "router": ROUTERS[router](top_k=2, **arguments),
    }
    model = Transformer(**sizes, **made, norm_eps=1e-6, qk_norm=True, tie_embeddings=False, expert_bias=True)
    model.eot_id = NEWLINE
    model.init_balancer_states()
    model.load_state_dict(our_names(state) | {n: b for n, b in model.named_buffers() if "balancer_state" in n})
    return model


def our_balancers(tables: dict[str, Any]) -> Any:
    return build_balancers(merge_layers([Layer("test", {"balancer": tables})]))


def our_gradients(
    result: dict[str, Any], state: Any, router: str, tables: dict[str, Any], moe: Any = None, **arguments: Any
) -> dict[str, torch.Tensor]:
    """The gradients of titan_moe's first step before any clipping."""
    balancers = our_balancers(tables)
    model, found = our_model(state, router, balancers, moe, **arguments), {}
    sgd = Optimizer.around(torch.optim.SGD(model.parameters(), lr=0.0))
    sgd.register_step_pre_hook(
        lambda *_: found.update({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    )
    seed_step(SEED, 1, 0)
    train_step(model, result["batches"], sgd, balancers, model.expert_biases(), max_norm=0.0)
    return found


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], **tolerances: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], **tolerances, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("on", "off", "router", "balancers"),
    [
        ("on", "off", "sigmoid", AUX),
        ("on_softmax", "off_softmax", "topk_softmax", LOSSES),
        ("on_weights", "off", "sigmoid", WEIGHTS),
        ("on_outputs", "off", "sigmoid", {**OUTPUTS, **COUPLED}),
    ],
)
def test_balance_losses_have_our_gradients(results: dict[str, Any], on: str, off: str, router: str, balancers: Any):
    """Alone, as the difference of two backward passes, and together with the cross-entropy; two micro-batches."""
    state = results["ours"]["first"]
    with_losses = our_gradients(results[on], state, router, balancers)
    without = our_gradients(results[off], state, router, {})
    theirs, plain = our_names(results[on]["gradients"]), our_names(results[off]["gradients"])
    close(theirs, with_losses, rtol=0, atol=1e-6)
    close(
        {name: theirs[name] - plain[name] for name in theirs},
        {name: with_losses[name] - without[name] for name in theirs},
        rtol=0,
        atol=1e-6,
    )
    gate = "layers.0.moe.router.weight"
    assert (with_losses[gate] - without[gate]).abs().max() > 1e-4


def test_gradients_with_noise_and_dropout_are_ours(results: dict[str, Any]):
    """Drawn by the router, the experts and a measure, in the order of titan_moe's step."""
    found, arguments = results["on_noise"], (NOISE["balancers"], {**FREE, **DROPOUT})
    theirs = our_names(found["gradients"])
    ours = our_gradients(found, found["first"], "topk_softmax", *arguments, jitter=0.1)
    close(theirs, ours, rtol=0, atol=1e-6)
    others = our_gradients(found, found["first"], "topk_softmax", NOISE["balancers"], FREE, jitter=0.1)
    name = "layers.0.moe.experts.w2"
    assert (theirs[name] - others[name]).abs().max() > 1e-4


def test_five_steps_are_ours(results: dict[str, Any]):
    """Bias, MaxVio, the losses' values and the weights under rates by load after 5 steps with all pieces."""
    ours = results["ours"]
    balancers = our_balancers(ALL["balancers"])
    model = our_model(ours["first"], "sigmoid", balancers)
    settings = ALL["optimizer"]
    expert = expand_load_lr(settings["expert"], top_k=2)
    down = {**expert, "lr": 0.01, "beta1": 0.8}
    arguments = {"expert": expert, "router": settings["router"], "norm": {"weight_decay": 0.0}, "down": down}
    groups = parameter_groups(model.named_parameters(), arguments, matches={"down": ["*.experts.w2"]})
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-2)
    for step in range(1, 6):
        batches = ours["batches"][2 * step - 2 : 2 * step]
        states = model.balancer_states()
        output = train_step(
            model,
            batches,
            optimizer,
            balancers,
            model.expert_biases(),
            max_norm=1.0,
            step=step,
            balancer_states=states,
        )
        expected, logged = train_metrics(output), ours["records"][step]
        for name in ("maxvio_batch", "maxvio_batch/layer_0", "maxvio_batch/layer_1", "expert_batch_min"):
            assert logged[name] == float(expected[name]), (step, name)
        for name in ("aux_loss", "z_loss", "entropy_loss", "grad_norm", *WEIGHTS):
            tolerance = 1e-3 if name in WEIGHTS else 2e-5  # their products show what Adam makes of round-off
            assert logged[name] == pytest.approx(float(expected[name]), rel=tolerance), (step, name)
        assert logged["lr/router"] == 0.003
        assert logged["lr/expert_max"] == pytest.approx(0.02 * float(output.load_factors.max()))
        assert logged["lr/down_max"] == pytest.approx(0.01 * float(output.load_factors.max()))
    last = our_names(ours["last"])
    for layer in (0, 1):
        assert torch.equal(
            last[f"layers.{layer}.moe.expert_bias"], model.state_dict()[f"layers.{layer}.moe.expert_bias"]
        )
        assert last[f"layers.{layer}.moe.expert_bias"].abs().max() > 0.02
    weights = {name: tensor for name, tensor in model.state_dict().items() if "balancer_state" not in name}
    close(last, weights, rtol=0, atol=1e-4)  # Adam enlarges round-off where gradients are small
    assert ours["states"].keys() == model.balancer_states().keys() == KEPT.keys() - {f"{PARTS}even_rows"}
    for name, state in model.balancer_states().items():
        assert state.keys() == ours["states"][name].keys()
        for key, layers in state.items():
            assert torch.equal(torch.stack(layers), ours["states"][name][key]), (name, key)
    rows = last["layers.1.moe.router.weight"].norm(dim=-1)
    torch.testing.assert_close(rows, torch.full_like(rows, 0.3))

    load = sum(torch.stack([r.tokens_per_expert for r in model(tokens)[1]]) for tokens in ours["validation"])
    assert ours["records"][5]["maxvio_global/layer_1"] == float(maxvio(load)[1])
    assert ours["records"][5]["maxvio_global"] == float(maxvio(load).mean())


@pytest.mark.parametrize("case", ROUTED)
def test_steps_with_routers_of_ours_are_ours(results: dict[str, Any], case: str):
    """Own parameters, unused slots, documents, outputs of experts, other layers' routings, and the run's length."""
    theirs, (table, tables) = results[case], ROUTED[case]
    balancers = our_balancers(tables)
    arguments = {key: value for key, value in table.items() if key != "name"}
    model = our_model(theirs["first"], table["name"], balancers, EXPERTS.get(case), **arguments)
    settings = {"router": {"lr": 0.003}, "norm": {"weight_decay": 0.0}}
    if case == "identity":
        settings["expert"] = expand_load_lr(BY_LOAD, top_k=2)
    groups = parameter_groups(model.named_parameters(), settings)
    optimizer = OPTIMIZERS["adamw"](groups, lr=1e-2)
    for step in (1, 2, 3, 4):
        batches, states = theirs["batches"][2 * step - 2 : 2 * step], model.balancer_states()
        order: dict[str, Any] = {"max_norm": 1.0, "step": step, "progress": step / 4, "balancer_states": states}
        seed_step(SEED, step, 0)
        output = train_step(model, batches, optimizer, balancers, model.expert_biases(), **order)
        expected, logged = train_metrics(output), theirs["records"][step]
        free = IDENTITY if "num_identity_experts" in EXPERTS.get(case, {}) else ()
        for name in ("maxvio_batch", "maxvio_batch/layer_0", "maxvio_batch/layer_1", "expert_batch_min", *free):
            assert logged[name] == float(expected[name]), (step, name)
        assert free or not {*IDENTITY} & logged.keys()
        losses = [name for name, (_, balancer) in balancers.items() if balancer.has_loss]
        for name in (*losses, "grad_norm"):
            assert logged[name] == pytest.approx(float(expected[name]), rel=2e-4, abs=1e-6), (step, name)

    weights = {name: tensor for name, tensor in model.state_dict().items() if "balancer_state" not in name}
    close(our_names(theirs["last"]), weights, rtol=0, atol=2e-4)  # 2 % of a step: Adam enlarges round-off
    moved = [weights[name] - our_names(theirs["first"])[name] for name in weights if ".router." in name]
    assert all(change.abs().max() > 1e-3 for change in moved)


@pytest.mark.parametrize("case", ["full", "selective"])
def test_recomputation_changes_nothing(results: dict[str, Any], case: str):
    for step in (1, 2):
        names = [
            n for n in results["ours"]["records"][step] if "vio" in n or n.endswith("_loss") or n == "expert_batch_mean"
        ]
        assert len(names) > 8
        for name in names:
            if "global" not in name:
                expected = results["ours"]["records"][step][name]
                assert results[case]["records"][step][name] == pytest.approx(expected, rel=1e-5), name


@pytest.mark.parametrize(("case", "one"), [("emo_full", "emo"), ("emo_selective", "emo"), ("both_full", "both")])
def test_recomputation_with_a_router_of_ours_changes_nothing(results: dict[str, Any], case: str, one: str):
    for step, expected in results[one]["records"].items():
        found = results[case]["records"][step]
        for name in ("maxvio_batch", "maxvio_batch/layer_0", "expert_batch_min"):
            assert found[name] == expected[name], (step, name)
        for name in {"aux_loss", "coupling", "specialization", *PLACES, "grad_norm"} & expected.keys():
            assert found[name] == pytest.approx(expected[name], rel=1e-5), (step, name)
    close(results[case]["last"], results[one]["last"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("case", ["emo", "threshold", "both"])
def test_compiled_layers_with_routers_of_ours(results: dict[str, Any], case: str):
    expected, found = results[case]["records"][1], results[f"{case}_compiled"]["records"][1]
    for name in ("maxvio_batch/layer_0", "maxvio_batch/layer_1", "expert_batch_min"):
        assert found[name] == expected[name], name
    for name in {"aux_loss", "coupling", "specialization", *PLACES} & expected.keys():
        assert found[name] == pytest.approx(expected[name], rel=5e-3), name  # experts in bf16 here


def test_compiled_layers_count_and_lose_the_same(results: dict[str, Any]):
    """torchtitan compiles whole layers, so that a hook that breaks the graph would be an error."""
    expected, found = results["ours"]["records"][1], results["compiled"]["records"][1]
    for name in ("maxvio_batch/layer_0", "maxvio_batch/layer_1", "expert_batch_mean", "expert_batch_min"):
        assert found[name] == expected[name], name
    for name in ("aux_loss", "z_loss", "entropy_loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3), name  # experts in bf16 here


def test_metrics_alone_leave_the_run_as_it_is(results: dict[str, Any]):
    """Bit for bit, torchtitan's own loss-free rule included; and count what it counts."""
    close(results["only_metrics"]["last"], results["stock"]["last"], rtol=0, atol=0)
    assert results["only_metrics"]["records"][1]["expert_batch_mean"] == 2 * 4 * 32 * 2 / 8
    assert "maxvio_batch" not in results["stock"]["records"][1]
    assert results["stock"]["last"]["layers.0.moe.expert_bias_E"].abs().max() > 0


def test_a_resumed_run_goes_on_alike(results: dict[str, Any]):
    close(results["resumed"]["last"], results["one"]["last"], rtol=0, atol=0)
    assert results["resumed"]["records"].keys() == {3, 4}


def test_a_resumed_run_draws_alike(results: dict[str, Any]):
    """With identity experts, whose bias and loads are saved, and dropout."""
    close(results["both_saved"]["last"], results["both"]["last"], rtol=0, atol=0)
    close(results["both_resumed"]["last"], results["both"]["last"], rtol=0, atol=0)
    assert results["both_resumed"]["records"].keys() == {3, 4}
    assert results["both"]["last"]["layers.0.moe.expert_bias_E"].shape == (10,)


def test_the_model_of_a_run_without_balancers_is_enough_to_start(results: dict[str, Any]):
    """Weights and torchtitan's bias are those that were saved; what balancers keep begins anew."""
    started, expected = results["started"], results["stock_goes_on"]
    close(started["last"], expected["last"], rtol=0, atol=0)
    assert started["records"].keys() == {1, 2}
    for name, state in expected["states"].items():
        for key, tensor in state.items():
            assert torch.equal(started["states"][name][key], tensor), (name, key)
    bias = "layers.0.moe.expert_bias_E"
    assert (results["stock_saved"]["last"][bias] != 0).any()
    assert not torch.equal(started["last"][bias], results["stock_saved"]["last"][bias])


@pytest.mark.parametrize("case", ["two", "ep"])
def test_two_ranks_equal_one(results: dict[str, Any], two_ranks: dict[str, Any], case: str):
    one, two = results["one"], two_ranks[case]
    for step in (1, 2, 3, 4):
        for name in ("maxvio_batch", "maxvio_batch/layer_1", "dead_experts", "expert_batch_mean"):
            assert two["records"][step][name] == one["records"][step][name], (step, name)
        for name in ("loss_metrics/global_avg_loss", "aux_loss", "grad_norm", "lr/expert_max", "lr/expert_min"):
            assert two["records"][step][name] == pytest.approx(one["records"][step][name], rel=2e-5), (step, name)
    close(two["last"], one["last"], rtol=0, atol=2e-4)  # 2 % of a step: Adam enlarges round-off


@pytest.mark.parametrize(
    ("case", "one"), [("emo_ep", "emo"), ("mlp_ep", "mlp"), ("threshold_ep", "threshold"), ("identity_ep", "identity")]
)
def test_two_ranks_with_routers_of_ours(results: dict[str, Any], two_ranks: dict[str, Any], case: str, one: str):
    found, expected = two_ranks[case], results[one]
    for step, logged in expected["records"].items():
        for name in {"maxvio_batch", "maxvio_batch/layer_1", "expert_batch_min", *IDENTITY} & logged.keys():
            assert found["records"][step][name] == logged[name], (step, name)
        for name in {"coupling", "specialization", "aux_loss", "orthogonality", *PLACES, "grad_norm"} & logged.keys():
            assert found["records"][step][name] == pytest.approx(logged[name], rel=2e-4), (step, name)
    close(found["last"], expected["last"], rtol=0, atol=2e-4)


def test_two_ranks_resume(two_ranks: dict[str, Any]):
    close(two_ranks["resumed"]["last"], two_ranks["ep"]["last"], rtol=0, atol=0)
    close(two_ranks["mlp_resumed"]["last"], two_ranks["mlp_ep"]["last"], rtol=0, atol=0)
    close(two_ranks["both_resumed"]["last"], two_ranks["both_ep"]["last"], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (
            "cp_router",
            "torchtitan_patches: router emo looks at whole sequences, of which ranks have parts with "
            "parallelism.context_parallel_degree = 2: set it to 1",
        ),
        (
            "cp_overrides",
            f"torchtitan_patches: balancer.{PARTS}of_places looks at whole sequences, and only recipes are told "
            "whether ranks have them: turn it on with `enable`",
        ),
    ],
)
def test_parts_of_sequences_are_refused_when_a_job_starts(two_ranks: dict[str, Any], case: str, message: str):
    assert two_ranks[case] == message


def test_places_by_overrides_on_one_rank(results: dict[str, Any]):
    assert results["overridden"]["records"][1][f"{PARTS}of_places"] > 0
