"""Balancers with names of their own: several instances of one, in the configuration, in losses and metrics."""

import re
from pathlib import Path

import pytest
import torch

from tests.interop.models import configure
from tests.tiny import adamw, batch, tiny_model
from titan_moe.balancer import aux_loss
from titan_moe.build import build_balancers
from titan_moe.config import load_config, read_saved, to_toml
from titan_moe.config.saved import load_saved
from titan_moe.config.sections import METRIC_NAMES
from titan_moe.dry_run import check_parts
from titan_moe.metrics import train_metrics
from titan_moe.step import train_step

TWO = {
    "balancer.seq.name": "aux_loss",
    "balancer.seq.scope": "sequence",
    "balancer.glob.name": "aux_loss",
    "balancer.glob.coeff": 0.25,
}


def test_two_of_one_kind_are_two_losses() -> None:
    config = configure(**TWO)
    balancers = build_balancers(config)
    assert {name: (coeff, b.scope) for name, (coeff, b) in balancers.items()} == {
        "seq": (0.1, "sequence"),
        "glob": (0.25, "micro_batch"),
    }
    model = tiny_model()
    model.init_weights(0)
    output = train_step(model, [batch(0)], adamw(model), balancers, model.expert_biases(), max_norm=1.0)
    alone = tiny_model()
    alone.init_weights(0)
    for name, scope in (("seq", "sequence"), ("glob", "micro_batch")):
        alone.init_weights(0)
        only = {"aux_loss": (0.0, aux_loss(1.0, scope))}
        expected = train_step(alone, [batch(0)], adamw(alone), only, alone.expert_biases(), max_norm=1.0)
        torch.testing.assert_close(train_metrics(output)[name], train_metrics(expected)["aux_loss"])
    assert "aux_loss" not in train_metrics(output)
    total = output.loss + 0.1 * output.balance_losses["seq"] + 0.25 * output.balance_losses["glob"]
    torch.testing.assert_close(output.total_loss, total)


def test_files_inherit_change_and_drop_them(tmp_path: Path) -> None:
    (tmp_path / "base.toml").write_text(to_toml(configure(**TWO)))
    (tmp_path / "run.toml").write_text('base = "base.toml"\n[balancer]\nglob = false\n[balancer.seq]\ncoeff = 0.5\n')
    config = load_config(["--job.config_file", str(tmp_path / "run.toml")])
    assert config.balancer == {"seq": {"name": "aux_loss", "coeff": 0.5, "scope": "sequence"}}
    assert read_saved(tmp_path / "base.toml").balancer == configure(**TWO).balancer


def test_a_saved_one_from_outside_has_to_be_trusted(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text(to_toml(configure(**{"balancer.own.name": "examples.balancer:rprop", "balancer.own.rate": 0.5})))
    with pytest.raises(ValueError, match=r"balancer\.own\.name = 'examples\.balancer:rprop': is code from outside"):
        load_saved(path)
    config = load_saved(path, trust_components=["examples"])
    assert config.balancer["own"]["rate"] == 0.5
    check_parts(config)
    with torch.device("meta"):
        [name] = build_balancers(config)
    assert name == "own"


ERRORS = [
    ({"balancer.seq.coeff": 1.0}, "--balancer.seq: unknown component; none is near"),
    ({"balancer.seq": "false"}, "--balancer.seq: unknown component; none is near"),
    ({"balancer.seq.name": "aux_los"}, "--balancer.seq.name = 'aux_los': unknown component; did you mean 'aux_loss'?"),
    (
        {"balancer.seq.name": "aux_loss", "balancer.seq.coef": 1.0},
        "--balancer.seq.coef: unknown argument; did you mean balancer.seq.coeff?",
    ),
    ({"balancer.seq.name": "aux_loss", "balancer.seq.coeff": -1}, "--balancer.seq.coeff = -1: must be greater than"),
    ({"balancer.loss.name": "aux_loss"}, "--balancer.loss: a balancer with a name of its own is called by letters"),
    ({"balancer.a-b.name": "aux_loss"}, "--balancer.a-b: a balancer with a name of its own is called by letters"),
    (
        {"balancer.aux_loss.name": "z_loss"},
        "--balancer.aux_loss.name = z_loss: its table is for aux_loss, as it is called so: leave it out, or call the "
        "table [balancer.my_z_loss]",
    ),
    ({"balancer.z_loss.name": "examples.balancer:rprop"}, "or call the table [balancer.my_rprop]"),
    ({"balancer.examples.balancer:rprop.name": "z_loss"}, "its table is for examples.balancer:rprop, as it is called"),
    (
        {"balancer.even.name": "aux_loss", "router.name": "expert_choice"},
        "balancer.even has no effect with router.name = 'expert_choice'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_mistakes(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        configure(**changes)


def test_a_name_given_twice_is_no_toml(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text('[balancer.seq]\nname = "aux_loss"\n[balancer.seq]\nname = "z_loss"\n')
    with pytest.raises(ValueError, match="is not valid TOML"):
        load_config(["--job.config_file", str(path)])


def test_no_metric_can_be_taken_for_a_balancer() -> None:
    """Every key that docs/metrics.md has for a training step, but for those of balancers, is kept from them."""
    page = (Path(__file__).parents[3] / "docs" / "metrics.md").read_text(encoding="utf-8")
    section = page.partition('## `kind = "train"`')[2].partition('## `kind = "validation"`')[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    keys = {key for row in rows for key in re.findall(r"`([a-z_]+)`", row)}
    assert len(keys) > 20
    assert keys - {"aux_loss", "z_loss", "entropy_loss"} <= set(METRIC_NAMES)
