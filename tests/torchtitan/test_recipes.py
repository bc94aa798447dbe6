"""Turning pieces on, by recipe and from the command line; errors."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WARNINGS = "ignore"
PARTS = "tests.torchtitan.parts:"


@pytest.fixture(scope="module")
def debug() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from tests.torchtitan import cpu

        cpu._stand_in_for_triton()
        from torchtitan_patches import debug
    return debug


def test_each_piece_replaces_its_own_nodes_only(debug: Any) -> None:
    from torchtitan.models.common.moe import MoE

    from torchtitan_patches import enable

    def kinds(config: Any) -> dict[str, str]:
        _, layer, _, _ = next(iter(config.model_spec.model.traverse(MoE.Config)))
        nodes = {name: getattr(config, name) for name in ("optimizer", "loss", "metrics", "lr_scheduler")}
        nodes |= {"moe": layer, "router": layer.router, "experts": layer.routed_experts.inner_experts}
        return {name: type(node).__qualname__ for name, node in nodes.items()}

    stock = kinds(debug.debug_moe())
    changed = {
        "aux": ({"balancers": {"aux_loss": {}}}, {"optimizer", "loss"}),
        "bias": ({"balancers": {"loss_free": {}}}, {"optimizer"}),
        "rates": ({"optimizer": {"router": {"lr": 1e-4}}}, {"optimizer"}),
        "metrics": ({"metrics": True}, {"metrics"}),
        "length": ({"balancers": {"loss_free": {"decay_ratio": 0.1}}}, {"optimizer", "lr_scheduler"}),
        "outputs": ({"balancers": {"specialization": {}}}, {"optimizer", "loss", "moe"}),
        "router": ({"router": {"name": "cosine"}}, {"optimizer", "moe", "router"}),
        "identity": ({"moe": {"num_identity_experts": 2}}, {"optimizer", "moe"}),
        "dropout": ({"moe": {"expert_dropout": 0.1}}, {"optimizer", "experts"}),
        "nothing": ({}, set()),
    }
    for pieces, names in changed.values():
        config = debug.debug_moe()
        assert enable(config, **pieces) is config
        assert {name for name, kind in kinds(config).items() if kind != stock[name]} == names


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ({"balancers": {"aux_los": {}}}, "balancer.aux_los: unknown component; did you mean 'aux_loss'"),
        (
            {"balancers": {"z_loss": {"rate": 1.0}}},
            "balancer.z_loss.rate: unknown argument here; it belongs to loss_free",
        ),
        ({"balancers": {"aux_loss": {"scope": "global_batch"}}}, "use 'micro_batch' or 'sequence'"),
        ({"balancers": {"tests.parts:everything": {}}}, "use 'micro_batch' or 'sequence'"),
        ({"balancers": {PARTS + "of_thoughts": {}}}, "balancer.*of_thoughts .*takes 'thoughts', which is not offered"),
        ({"router": {"name": "cosin"}}, "router.name = .*did you mean 'cosine'"),
        ({"router": {"name": "cosine", "top_k": 3}}, "router.top_k = 3: cannot be set here: it comes from moe.top_k"),
        ({"router": {"name": PARTS + "no_routing"}}, "router .*no_routing: must return a Routing, gave "),
        (
            {"router": {"name": "expert_choice"}},
            "router expert_choice takes no bias, .* set load_balance_coeff of each",
        ),
        ({"router": {"name": "mlp"}, "balancers": {"simbal": {}}}, r"balancer.simbal needs a router with a matrix"),
        ({"balancers": {PARTS + "spike": {}}}, "spike: its schedule is for a post_step, and it has none"),
        ({"moe": {"num_identity_expert": 2}}, "moe.num_identity_expert: unknown key; did you mean moe.num_id"),
        ({"moe": {"num_identity_experts": -1}}, "moe.num_identity_experts"),
        ({"moe": {"expert_dropout": 1.5}}, "moe.expert_dropout"),
        ({"moe": {"top_k": 4}}, "moe.top_k = 4 cannot be set here.*set it in the recipe's model"),
        (
            {"moe": {"num_identity_experts": 2}, "router": {"name": "expert_choice"}},
            "num_identity_experts = 2 does not go with router.name = 'expert_choice'",
        ),
        (
            {"moe": {"num_identity_experts": 2}, "router": {"name": "sigmoid", "num_groups": 2}},
            "num_identity_experts = 2 does not go with router.num_groups = 2",
        ),
        (
            {"moe": {"num_identity_experts": 2}, "optimizer": {"expert": {"load_lr": "batch_fraction"}}},
            "num_identity_experts = 2 does not go with .*optimizer.expert.*load_lr = 'batch_fraction'",
        ),
        ({"optimizer": {"name": "shampo"}}, "did you mean 'shampoo'"),
        ({"optimizer": {"router": {"load_lr": "batch_fraction"}}}, "only experts have a load"),
    ],
)
def test_mistakes_are_found_at_once(debug: Any, pieces: dict[str, Any], message: str) -> None:
    from torchtitan_patches import enable

    with pytest.raises(ValueError, match=message):
        enable(debug.debug_moe(), **pieces)


def test_models_and_losses_that_do_not_fit(debug: Any) -> None:
    from torchtitan.components.loss import MSELoss
    from torchtitan.models import qwen3

    from torchtitan_patches import enable

    config = debug.debug_moe()
    config.loss = MSELoss.Config()
    with pytest.raises(ValueError, match=r"need torchtitan's CrossEntropyLoss, found MSELoss\.Config"):
        enable(config, balancers={"z_loss": {}})
    config.model_spec = qwen3.model_registry("debugmodel")
    with pytest.raises(ValueError, match="has no MoE layer"):
        enable(config, metrics=True)


def test_experts_without_the_weights_that_are_measured(debug: Any) -> None:
    from torchtitan.models import gpt_oss
    from torchtitan.models.common.moe import MoE

    from torchtitan_patches.balancers import make_balancers
    from torchtitan_patches.monitor import Layer

    _, config, _, _ = next(iter(gpt_oss.model_registry("debugmodel").model.traverse(MoE.Config)))
    with pytest.raises(ValueError, match="of_experts measures w1, which this model's GptOssGroupedExperts has not"):
        Layer(config.build(), make_balancers({f"{PARTS}of_experts": {}}), "layers.0.moe")


OVERRIDES = "torchtitan_patches.overrides"
TABLES = OVERRIDES + '.optimizers={"balancers": {"aux_loss": {"coeff": 0.01}}, "optimizer": {"router": {"lr": 1e-4}}}'


def run(folder: Path, *imports: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tests.torchtitan.train", "--module", "torchtitan_patches.debug"]
    options = [
        "--config",
        "debug_moe",
        "--training.steps",
        "2",
        "--metrics.log_freq",
        "1",
        "--dump_folder",
        str(folder),
    ]
    options += ["--training.seq_len", "16", "--metrics.enable_tensorboard", "--validator.no-enable"]
    return subprocess.run(
        [*command, *options, "--override.imports", *imports],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )


def test_from_the_command_line(tmp_path: Path) -> None:
    result = run(tmp_path, TABLES, f"{OVERRIDES}.loss", f"{OVERRIDES}.metrics")
    assert result.returncode == 0, result.stderr[-3000:]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(next(tmp_path.glob("tb/*"))))
    events.Reload()
    assert len(events.Scalars("maxvio_batch/layer_1")) == 2
    assert events.Scalars("aux_loss")[0].value == pytest.approx(0.25, rel=0.5)
    assert events.Scalars("lr/router")[0].value == pytest.approx(5e-5)  # 1e-4, in the first of two steps of warm-up


def test_a_forgotten_override_says_so(tmp_path: Path) -> None:
    result = run(tmp_path, TABLES)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "give torchtitan_patches.overrides.loss to --override.imports, too" in result.stderr


def test_missing_overrides_are_named(debug: Any) -> None:
    from torchtitan_patches.balancers import make_balancers
    from torchtitan_patches.monitor import Layer, Monitor

    model = debug.debug_moe().model_spec.model.build()
    with pytest.raises(
        ValueError, match=r"specialization measures outputs.*give torchtitan_patches\.overrides\.moe to"
    ):
        Layer(model.layers["0"].moe, make_balancers({"specialization": {}}), "layers.0.moe")
    monitor = Monitor([model], make_balancers({f"{PARTS}late": {}}))
    with pytest.raises(
        ValueError, match=r"late goes by the run's length: give torchtitan_patches\.overrides\.lr_sched"
    ):
        monitor.finish_step()


@pytest.mark.parametrize(
    ("router", "balancers", "what"),
    [
        ("emo", {}, "router emo"),
        ("causal_bias", {"aux_loss": {"scope": "sequence"}}, "router causal_bias"),
        ("", {f"{PARTS}of_places": {}}, f"balancer.{PARTS}of_places"),
        ("", {"simbal": {}, "seq": {"name": "aux_loss", "scope": "sequence"}}, "balancer.seq"),
        ("mlp", {"aux_loss": {}}, None),
    ],
)
def test_what_looks_at_sequences_is_refused_where_ranks_have_parts(
    debug: Any, router: str, balancers: Any, what: str | None
) -> None:
    """By what the job's function tells that parallelizes the model."""
    from types import SimpleNamespace

    from torchtitan_patches import enable
    from torchtitan_patches.balancers import make_balancers
    from torchtitan_patches.monitor import Monitor

    config = debug.debug_moe()
    config.model_spec.parallelize_fn = lambda model, **_: model
    enable(config, router={"name": router} if router else {}, balancers=balancers)
    spec = config.model_spec
    for degree in (1, 2):
        model = spec.parallelize_fn(spec.model.build(), parallel_dims=SimpleNamespace(cp=degree), training=None)
        if degree == 1 or what is None:
            Monitor([model], make_balancers(balancers))
            continue
        with pytest.raises(ValueError, match=f"^torchtitan_patches: {what} looks at whole sequences, of which ranks"):
            Monitor([model], make_balancers(balancers))


@pytest.mark.parametrize("balancer", ["aux_loss", f"{PARTS}of_places"])
def test_parts_of_sequences_without_a_recipe(debug: Any, balancer: str) -> None:
    """Overrides of the command line learn of them by the first tokens of training."""
    import torch

    from torchtitan_patches.balancers import make_balancers
    from torchtitan_patches.monitor import Monitor

    model = debug.debug_moe().model_spec.model.build()
    table = {"scope": "sequence"} if balancer == "aux_loss" else {}
    Monitor([model], make_balancers({balancer: table}))
    with pytest.raises(ValueError, match="looks at whole sequences, of which ranks have parts: set parallelism"):
        model(torch.zeros(2, model.config.max_seq_len // 2, dtype=torch.int64))


def test_documents_are_told_from_positions(debug: Any) -> None:
    """As torchtitan's data sets pack them: positions begin anew, and a sequence may begin inside of a document."""
    import torch

    from torchtitan_patches import enable
    from torchtitan_patches.monitor import Monitor

    model = enable(debug.debug_moe(), router={"name": "emo"}).model_spec.model.build()
    monitor, length = Monitor([model], {}), model.config.max_seq_len
    positions = torch.cat([torch.arange(5, 8), torch.arange(4), torch.arange(length - 7)])
    tokens = torch.zeros(2, length, dtype=torch.int64)
    monitor.on_tokens(model, (tokens,), {"positions": torch.stack([positions, torch.arange(length)])})
    places = model.layers["1"].moe.router.places
    assert places.document_ids[0].tolist() == [0] * 3 + [1] * 4 + [2] * (length - 7)
    assert not places.document_ids[1].any()
    assert places.positions[0].tolist() == [*range(length)]
    monitor.on_tokens(model, (tokens,), {})
    assert not model.layers["0"].moe.router.places.document_ids.any()


def test_a_router_of_ours_needs_torchtitans_own_layer(debug: Any) -> None:
    from torchtitan.models import gpt_oss, qwen3

    from torchtitan_patches import enable

    config = debug.debug_moe()
    config.model_spec = gpt_oss.model_registry("debugmodel")
    with pytest.raises(ValueError, match=r"need torchtitan's MoE, found GptOssMoE\.Config: use another model"):
        enable(config, router={"name": "cosine"})
    config = debug.debug_moe()
    config.model_spec = qwen3.model_registry("debugmodel_moe", moe_comm_backend="deepep")
    with pytest.raises(ValueError, match=r"need torchtitan's dispatcher 'standard', found DeepEPTokenDispatcher\.Conf"):
        enable(config, balancers={"orthogonality": {}})


def test_identity_experts_and_dropout_need_torchtitans_own_parts(debug: Any) -> None:
    from torchtitan.models import gpt_oss, qwen3
    from torchtitan.models.common.moe import TokenChoiceTopKRouter

    from torchtitan_patches import enable

    config = debug.debug_moe()
    config.model_spec = gpt_oss.model_registry("debugmodel")
    with pytest.raises(
        ValueError, match=r"dropout = 0\.1 needs torchtitan's GroupedExperts, found GptOssGroupedExperts"
    ):
        enable(config, moe={"expert_dropout": 0.1})
    config.model_spec = qwen3.model_registry("debugmodel_moe", moe_comm_backend="deepep")
    with pytest.raises(ValueError, match=r"need torchtitan's dispatcher 'standard', found DeepEPTokenDispatcher\.Conf"):
        enable(config, moe={"num_identity_experts": 2})
    config = debug.debug_moe()
    for _, router, _, _ in config.model_spec.model.traverse(TokenChoiceTopKRouter.Config):
        router.num_expert_groups, router.num_limited_groups = 4, 2
    with pytest.raises(ValueError, match=r"num_identity_experts = 2 does not go with groups .* set num_expert_groups"):
        enable(config, moe={"num_identity_experts": 2})


@pytest.mark.parametrize("router", [{}, {"name": "sigmoid"}])
def test_identity_experts_again(debug: Any, router: dict[str, Any]) -> None:
    """A second `enable` neither adds to them nor takes them away; converters for Hugging Face don't know them."""
    from torchtitan.models.common.moe import MoE

    from torchtitan_patches import enable

    config = enable(enable(debug.debug_moe(), moe={"num_identity_experts": 2}), router=router)
    enable(config, moe={"num_identity_experts": 2}, balancers={"pid": {"real_share": 0.5}})
    _, layer, _, _ = next(iter(config.model_spec.model.traverse(MoE.Config)))
    assert (layer.num_experts, layer.num_identity_experts, layer.router.num_experts) == (10, 2, 10)
    assert layer.routed_experts.inner_experts.num_experts == 8
    assert layer.router.gate.out_features == 10
    assert config.model_spec.state_dict_adapter is None


@pytest.mark.parametrize(("name", "exported"), [("cosine", False), ("sigmoid", True)])
def test_own_parameters_are_not_exported(debug: Any, name: str, exported: bool) -> None:
    """torchtitan then refuses to write for Hugging Face; its converters would leave these parameters out."""
    from torchtitan_patches import enable

    config = enable(debug.debug_moe(), router={"name": name})
    assert (config.model_spec.state_dict_adapter is not None) == exported


def test_balanced_routing_for_measuring_speed(debug: Any) -> None:
    """torchtitan's debug.moe_force_load_balance deals the experts out in turn with a router of ours, too."""
    import torch
    from torchtitan.models.common.moe import MoE

    from torchtitan_patches import enable

    config = enable(debug.debug_moe(), router={"name": "cosine"})
    _, layer, _, _ = next(iter(config.model_spec.model.traverse(MoE.Config)))
    layer.router._debug_force_load_balance = True
    router = layer.router.build()
    with torch.no_grad():
        router.init_states()
    assert router(torch.randn(2, 8, 64)).tokens_per_expert.tolist() == [4] * 8
