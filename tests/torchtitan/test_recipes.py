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
    from torchtitan_patches import enable

    def kinds(config: Any) -> dict[str, str]:
        return {name: type(getattr(config, name)).__qualname__ for name in ("optimizer", "loss", "metrics")}

    stock = kinds(debug.debug_moe())
    changed = {
        "aux": ({"balancers": {"aux_loss": {}}}, {"optimizer", "loss"}),
        "bias": ({"balancers": {"loss_free": {}}}, {"optimizer"}),
        "rates": ({"optimizer": {"router": {"lr": 1e-4}}}, {"optimizer"}),
        "metrics": ({"metrics": True}, {"metrics"}),
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
        ({"balancers": {"loss_free": {"decay_ratio": 0.1}}}, "leave it at 0"),
        ({"balancers": {"tests.parts:everything": {}}}, "use 'micro_batch' or 'sequence'"),
        (
            {"balancers": {PARTS + "late": {}}},
            "late takes progress: torchtitan's optimizers do not know the run's length",
        ),
        ({"balancers": {PARTS + "coupled": {}}}, "coupled takes routings: torchtitan's layers do not see each other's"),
        ({"balancers": {PARTS + "of_outputs": {}}}, "of_outputs takes outputs: torchtitan's dispatchers mix"),
        ({"balancers": {PARTS + "of_thoughts": {}}}, "balancer.*of_thoughts takes 'thoughts', which is not offered"),
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
