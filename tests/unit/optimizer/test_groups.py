"""Groups by pattern: who is in which, updates as in groups made by hand, heads as matrices, rates by load, errors."""

import dataclasses
import inspect
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.tiny import SEQ, balancers, batch, tiny_model
from titan_moe.build import build_model, build_optimizer
from titan_moe.checkpoint import load_checkpoint, save_checkpoint
from titan_moe.config import Config, help_text, load_config, to_toml
from titan_moe.config.differences import changed_keys
from titan_moe.config.sections import KINDS
from titan_moe.metrics import expert_lr_range
from titan_moe.optimizer.build import BY_ELEMENT, OPTIMIZERS
from titan_moe.optimizer.expert_stats import copies, expert_parameters, expert_stats, expert_sums
from titan_moe.optimizer.groups import parameter_groups
from titan_moe.optimizer.load_lr import expand_load_lr
from titan_moe.optimizer.optimizer import Optimizer, describe_group
from titan_moe.records import log_parameters, train_record
from titan_moe.step import train_step
from titan_moe.study.grid import runs_of
from titan_moe.study.spec import load_study

SMALL = """
[model]
dim = 16
num_layers = 3
num_heads = 4
num_kv_heads = 2
vocab_size = 64
ffn_dim = 24
qk_norm = true
[moe]
num_experts = 4
expert_dim = 8
first_dense_layers = 1
[optimizer]
lr = 0.01
"""
UP_DOWN = """
[optimizer.groups.up]
match = ["layers.*.moe.experts.w1", "layers.*.moe.experts.w3"]
lr = 0.03
[optimizer.groups.down]
match = ["layers.*.moe.experts.w2"]
lr = 0.001
beta1 = 0.5
weight_decay = 0.0
"""


def configuration(tmp_path: Path, tables: str = UP_DOWN, *args: str) -> Config:
    file = tmp_path / "x.toml"
    file.write_text(SMALL + tables)
    return load_config([f"--job.config_file={file}", *args])


def built(tmp_path: Path, tables: str = UP_DOWN, *args: str) -> tuple[nn.Module, Optimizer]:
    config = configuration(tmp_path, tables, *args)
    model = build_model(config)
    model.init_weights(0)
    return model, build_optimizer(config, model)


def members(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[p] for p in group["params"]] for group in optimizer.param_groups}


def give_gradients(parameters: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def run(model: Any, optimizer: Optimizer, steps: range) -> list[Any]:
    options = {"max_norm": 1.0, "measure_experts": True}
    return [
        train_step(model, [batch(step)], optimizer, balancers(False), model.expert_biases(), **options)
        for step in steps
    ]


def test_the_first_match_has_a_parameter_and_the_five_groups_the_rest(tmp_path: Path) -> None:
    tables = """
[optimizer.groups.first_layer]
match = "layers.0.*"
[optimizer.groups.queries]
match = ["layers.*.attention.w[qk].weight"]
[optimizer.groups.gains]
match = ["*norm.weight", "layers.?.attention.wo.weight"]
"""
    model, optimizer = built(tmp_path, tables)
    groups = members(model, optimizer)
    assert list(groups) == ["first_layer", "queries", "gains", "expert", "router", "embedding", "dense"]
    assert groups["first_layer"] == [name for name, _ in model.named_parameters() if name.startswith("layers.0.")]
    assert groups["queries"] == [f"layers.{i}.attention.{w}.weight" for i in (1, 2) for w in ("wq", "wk")]
    assert "norm.weight" in groups["gains"]
    assert "layers.2.attention.q_norm.weight" in groups["gains"]
    assert groups["dense"] == [f"layers.{i}.attention.wv.weight" for i in (1, 2)]
    assert sorted(itertools.chain(*groups.values())) == sorted(name for name, _ in model.named_parameters())


def test_names_are_those_of_the_model_without_wrappers() -> None:
    named = [
        (f"_orig_mod.layers.{i}._checkpoint_wrapped_module.moe.experts.w{j}", nn.Parameter(torch.ones(2, 3, 4)))
        for i in range(2)
        for j in (1, 2)
    ]
    groups = parameter_groups(named, {"down": {"lr": 1.0}}, matches={"down": ["layers.*.moe.experts.w2"]})
    assert [(group["name"], len(group["params"])) for group in groups] == [("down", 2), ("expert", 2)]
    assert groups[0]["params"][1] is named[3][1]


def test_rates_by_matrix_equal_torchs_groups(tmp_path: Path) -> None:
    """Other rates, decay and betas for w1 and w3, for w2, and for the rest."""
    model, optimizer = built(tmp_path)
    theirs = {name: nn.Parameter(p.detach().clone()) for name, p in model.named_parameters()}
    groups: dict[str, dict[str, Any]] = {
        "up": {"lr": 0.03},
        "down": {"lr": 0.001, "betas": (0.5, 0.95), "weight_decay": 0.0},
        "gains": {"weight_decay": 0.0},
        "rest": {},
    }
    for name, parameter in theirs.items():
        experts = ".experts." in name
        kind = "down" if experts and name.endswith("w2") else "up" if experts else "rest"
        groups["gains" if "norm" in name else kind].setdefault("params", []).append(parameter)
    reference = torch.optim.AdamW(groups.values(), lr=0.01, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    for step in range(5):
        give_gradients(model.parameters(), step)
        give_gradients(theirs.values(), step)
        optimizer.step()
        reference.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, theirs[name]), name


def test_who_asks_by_name_gets_a_matrix_optimizer_for_the_embedding(tmp_path: Path) -> None:
    """Without groups by pattern the embedding and the head are AdamW's; a vector beside them is so in any group."""
    table = """
[optimizer.groups.ends]
name = "muon"
match = ["output.weight", "tok_embeddings.weight", "norm.weight"]
lr = 0.02
"""
    model, optimizer = built(tmp_path, table, "--optimizer.weight_decay=0.05", "--model.tie_embeddings=false")
    names = ("tok_embeddings.weight", "output.weight")
    theirs = [nn.Parameter(model.get_parameter(name).detach().clone()) for name in names]
    vector = nn.Parameter(model.get_parameter("norm.weight").detach().clone())
    options = {"lr": 0.02, "weight_decay": 0.05}
    references = [
        torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **options),
        torch.optim.AdamW([vector], betas=(0.9, 0.95), fused=True, **options),
    ]
    ours = [model.get_parameter(name) for name in (*names, "norm.weight")]
    for step in range(3):
        give_gradients(ours, step)
        give_gradients([*theirs, vector], step)
        optimizer.step()
        for reference in references:
            reference.step()
    for one, other in zip(ours, [*theirs, vector], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
    (group,) = (group for group in optimizer.param_groups if group["name"] == "ends")
    assert describe_group(optimizer, group) == "muon, but AdamW for 1 tensors (16 parameters)"


MATRIX = [name for name in OPTIMIZERS if name not in (*BY_ELEMENT, "distributed_shampoo")]
HEADS = {"wq": (4, 0), "wk": (2, 0), "wv": (2, 0), "wo": (4, 1)}


def split(matrix: Tensor, number: int, dim: int) -> list[Tensor]:
    return [head.contiguous() for head in matrix.chunk(number, dim)]


@pytest.mark.parametrize("name", MATRIX)
def test_each_head_is_a_matrix_by_itself(name: str, tmp_path: Path) -> None:
    """As the experts of a stack; heads of queries, keys and values are rows, those of outputs columns."""
    periodic = "precondition_frequency" in inspect.signature(OPTIMIZERS[name]).parameters
    options = "precondition_frequency = 2\nstagger_roots = false\n" if periodic else ""
    match = 'match = ["layers.*.attention.w?.weight"]\nper_head = true\n'
    model, optimizer = built(tmp_path, f'[optimizer.groups.heads]\nname = "{name}"\n{match}{options}')
    ours = {key: model.get_parameter(f"layers.1.attention.{key}.weight") for key in HEADS}
    theirs = {key: nn.Parameter(torch.stack(split(p.detach(), *HEADS[key]))) for key, p in ours.items()}
    (group,) = (group for group in optimizer.param_groups if group["name"] == "heads")
    settings = {key: value for key, value in group.items() if key not in ("params", "per_head", "heads")}
    reference = OPTIMIZERS[name]([{**settings, "params": list(theirs.values())}])
    for step in range(6):
        give_gradients(ours.values(), step)
        for key, stack in theirs.items():
            stack.grad = torch.stack(split(ours[key].grad, *HEADS[key]))
        optimizer.step()
        reference.step()
    for key, stack in theirs.items():
        heads = torch.cat(stack.detach().unbind(), HEADS[key][1])
        torch.testing.assert_close(ours[key].detach(), heads, rtol=1e-6, atol=1e-8, msg=key)
        for state, value in reference.state[stack].items():
            assert torch.equal(optimizer.state[ours[key]][state], value), f"{key} {state}"


def test_muon_by_heads_equals_torchs_muon_of_each_head(tmp_path: Path) -> None:
    table = '[optimizer.groups.heads]\nname = "muon"\nmatch = ["layers.*.attention.w[qk].weight"]\nper_head = true\n'
    model, optimizer = built(tmp_path, table)
    ours = model.get_parameter("layers.0.attention.wq.weight")
    theirs = [nn.Parameter(head) for head in split(ours.detach().clone(), 4, 0)]
    reference = torch.optim.Muon(theirs, lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        give_gradients([ours], step)
        for head, gradient in zip(theirs, split(ours.grad, 4, 0), strict=True):
            head.grad = gradient
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours.detach(), torch.cat([head.detach() for head in theirs]), rtol=0, atol=1e-6)
    (group,) = (group for group in optimizer.param_groups if group["name"] == "heads")
    assert describe_group(optimizer, group) == "muon head by head"


def test_a_head_may_be_small_enough_where_its_matrix_is_not(tmp_path: Path) -> None:
    """Rows of 4 columns: 12 x 4 in all, 4 x 4 a head."""
    weight = nn.Parameter(torch.randn(12, 4))
    group = {"name": "heads", "params": [weight], "per_head": True, "heads": [(3, 0)]}
    assert OPTIMIZERS["soap"]([group], adamw_above=4).is_matrix(weight)
    assert not OPTIMIZERS["soap"]([{"name": "heads", "params": [weight]}], adamw_above=4).is_matrix(weight)


BY_LOAD = """
[optimizer.groups.last_up]
match = ["layers.2.moe.experts.w1"]
lr = 0.02
load_lr = "ideal_normalized"
load_lr_power = 0.5
[optimizer.groups.down]
match = ["layers.*.moe.experts.w2"]
load_lr = "batch_fraction"
load_lr_ema = 0.5
"""


@pytest.mark.parametrize("outside", [False, True])
def test_rates_by_load_of_some_layers_and_matrices(outside: bool, tmp_path: Path) -> None:
    """`w1` of the last layer and `w2` of both go by load, each in its own way; the other matrices do not."""
    name = ["--optimizer.name=torch.optim:SGD", "--optimizer.norm=false"] if outside else []
    model, optimizer = built(tmp_path, BY_LOAD, *name)
    groups = {group["name"]: group for group in optimizer.param_groups}
    assert groups["last_up"]["layers"] == [1]
    assert groups["down"]["layers"] == [0, 1]

    ema = torch.ones(2, 4)
    for step in range(4):
        give_gradients(model.parameters(), step)
        load = torch.tensor([[6, 2, 4, 4], [1, 7, 0, 8]]) if step % 2 else torch.tensor([[4, 4, 4, 4], [9, 1, 3, 3]])
        before = {key: p.detach().clone() for key, p in model.named_parameters()}
        factor_LE = optimizer.step(load=load, grad_norm=torch.tensor(1.0))
        ratio = load / load.float().mean(-1, keepdim=True)
        ema = 0.5 * ema + 0.5 * ratio
        last_up, down = ratio[1].sqrt(), torch.where(load > 0, ema * 2 / 4, 0.0)

        # the first group that has a layer: `last_up` the second one, `down` the first
        torch.testing.assert_close(factor_LE, torch.stack([down[0], last_up]), rtol=1e-6, atol=0)
        factors = optimizer.load_factors()
        torch.testing.assert_close(factors["down"], down, rtol=1e-6, atol=0)
        torch.testing.assert_close(factors["last_up"], last_up[None], rtol=1e-6, atol=0)
        if outside:
            expected = {"layers.2.moe.experts.w1": 0.02 * last_up, "layers.1.moe.experts.w1": torch.full((4,), 0.01)}
            expected |= {f"layers.{layer + 1}.moe.experts.w2": 0.01 * down[layer] for layer in range(2)}
            for key, rate_E in expected.items():
                moved = before[key] - rate_E.view(-1, 1, 1) * model.get_parameter(key).grad
                torch.testing.assert_close(model.get_parameter(key).detach(), moved, rtol=1e-5, atol=1e-6)
    idle = model.get_parameter("layers.2.moe.experts.w2").detach()[2]
    assert torch.equal(idle, before["layers.2.moe.experts.w2"][2])  # no token in the last step
    ranges = expert_lr_range({"last_up": 0.02, "down": 0.01}, factors)
    assert {name: value.item() for name, value in ranges.items()} == pytest.approx(
        {
            "lr/last_up_min": 0.0,
            "lr/last_up_max": 0.02 * 2**0.5,
            "lr/down_min": 0.0,
            "lr/down_max": 0.005 * ema.max().item(),
        }
    )


def test_records_have_the_range_of_each_group(tmp_path: Path) -> None:
    model, optimizer = built(tmp_path, BY_LOAD)
    (output,) = run(model, optimizer, range(1))
    lrs = {group["name"]: group["lr"] for group in optimizer.param_groups}
    record = train_record(model, output, lrs)
    assert {"lr/down_min", "lr/down_max", "lr/last_up_min", "lr/last_up_max", "lr/expert"} <= record.keys()
    assert "lr/expert_min" not in record
    skipped = torch.tensor(False)
    assert not any(factor.any() for factor in optimizer.load_factors(skipped).values())


def test_all_experts_by_pattern_and_rates_by_load_leave_nothing_for_the_expert_group(tmp_path: Path) -> None:
    table = '[optimizer.groups.ours]\nmatch = "*.experts.*"\nload_lr = "ideal_normalized"\n'
    model, optimizer = built(tmp_path, table)
    plain, reference = built(tmp_path, '[optimizer.expert]\nload_lr = "ideal_normalized"\n')
    for ours, theirs in zip(run(model, optimizer, range(3)), run(plain, reference, range(3)), strict=True):
        assert torch.equal(ours.load_factors, theirs.load_factors)
        assert torch.equal(ours.loss, theirs.loss)
        for one, other in zip(ours.expert_stats, theirs.expert_stats, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_signal_to_noise_over_groups_with_betas_of_their_own() -> None:
    """Known gradients, signal plus noise of unit variance."""
    torch.manual_seed(0)
    snrs = torch.tensor([0.0, 0.5, 1.0, 2.0])
    named = {f"layers.0.moe.experts.{name}": nn.Parameter(torch.ones(4, 30, 40)) for name in ("w1", "w2", "w3")}
    groups = parameter_groups(named.items(), {"slow": {"beta1": 0.5, "beta2": 0.99}}, matches={"slow": ["*.w1"]})
    optimizer = OPTIMIZERS["adamw"](groups, lr=0.0, beta1=0.9, beta2=0.95)
    signals = [torch.randn(4, 30, 40) * snrs.view(-1, 1, 1) for _ in named]
    for _ in range(60):
        for parameter, signal in zip(named.values(), signals, strict=True):
            parameter.grad = signal + torch.randn_like(signal)
        optimizer.step()
    experts = expert_parameters(named.items())
    sums = expert_sums(experts, copies(experts), optimizer)
    stats = expert_stats(sums)
    assert stats.gradient_snr[0, 0] < 0.2
    assert stats.gradient_snr[0, 1:].tolist() == pytest.approx(snrs[1:].tolist(), rel=0.15)


def test_a_configuration_keeps_groups_and_their_order(tmp_path: Path) -> None:
    config = configuration(tmp_path)
    assert list(config.optimizer.groups) == ["norm", "up", "down"]
    again = tmp_path / "again.toml"
    again.write_text(to_toml(config))
    read = load_config([f"--job.config_file={again}"])
    assert read.optimizer == config.optimizer
    assert list(read.optimizer.groups) == list(config.optimizer.groups)

    # A later layer changes a group in its place, takes one away, and adds one at the end.
    file = tmp_path / "y.toml"
    file.write_text(
        'base = "again.toml"\n[optimizer.groups.new]\nmatch = "output.*"\n[optimizer.groups.up]\nlr = 0.5\n'
    )
    changed = load_config(
        [f"--job.config_file={file}", "--optimizer.groups.down=false", "--optimizer.groups.new.eps=1"]
    )
    assert list(changed.optimizer.groups) == ["norm", "up", "new"]
    assert changed.optimizer.groups["up"] == {**config.optimizer.groups["up"], "lr": 0.5}
    assert changed.optimizer.groups["new"] == {"match": ["output.*"], "eps": 1.0}
    words = ["--optimizer.groups.a.match", "layers.*.w1", "layers.*.w3", "--optimizer.groups.a.name=muon"]
    assert load_config(words).optimizer.groups["a"] == {"name": "muon", "match": ["layers.*.w1", "layers.*.w3"]}
    assert "[optimizer.groups.NAME]" in help_text()
    assert "    per_head = false" in help_text()

    turned = dict(reversed(list(config.optimizer.groups.items())))
    other = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, groups=turned))
    assert changed_keys(config, other) == {"optimizer.groups": (["up", "down"], ["down", "up"])}
    assert not changed_keys(config, read)


def test_axes_of_a_study_set_a_groups_keys(tmp_path: Path) -> None:
    study = tmp_path / "study.toml"
    study.write_text(
        '[config.optimizer.groups.up]\nmatch = "*.experts.w1"\n'
        '[axes.rate]\nkey = "optimizer.groups.up.lr"\nvalues = [0.1, 0.2]\n'
        '[axes.who]\noptions = { A = {}, M = { optimizer.groups.up.name = "muon" } }\n'
    )
    runs = runs_of(load_study(str(study)))
    assert [run.config.optimizer.groups["up"]["lr"] for run in runs] == [0.1, 0.1, 0.2, 0.2]
    assert runs[1].config.optimizer.groups["up"] == {"name": "muon", "match": ["*.experts.w1"], "lr": 0.1}


def test_the_log_counts_each_group(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = configuration(tmp_path)
    model = build_model(config)
    with caplog.at_level("INFO", logger="titan_moe"):
        log_parameters(config, model, build_optimizer(config, model))
    up = next(message for message in caplog.messages if message.startswith("  up "))
    assert " 2,048 parameters in   4 tensors, lr 0.03, weight decay 0.1: AdamW " in up
    assert up.endswith("[layers.*.moe.experts.w1, layers.*.moe.experts.w3]")
    assert not any(message.startswith("  expert") for message in caplog.messages)


GROUP = "[optimizer.groups.mine]\n"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (
            f'{GROUP}match = ["layers.*.moe.expert.w2"]',
            "optimizer.groups.mine.match = 'layers.*.moe.expert.w2': matches no parameter of the model; "
            "near: layers.*.moe.experts.w",
        ),
        (
            f'{GROUP}match = ["zzz"]',
            "match = 'zzz': matches no parameter of the model; there are tok_embed",
        ),
        (
            f'{GROUP}match = ["*.experts.*"]\n[optimizer.groups.late]\nmatch = ["layers.1.moe.experts.w2"]',
            "optimizer.groups.late.match = 'layers.1.moe.experts.w2': all that it matches is in groups before it, mine",
        ),
        (f'{GROUP}match = "*.experts.*"\n[optimizer.expert]\nlr = 1.0', "[optimizer.groups] mine has all expert param"),
        (f'{GROUP}match = "*norm.weight"\n[optimizer.norm]\nlr = 1.0', "[optimizer.groups] mine has all norm param"),
        (f"{GROUP}lr = 1.0", "optimizer.groups.mine.match: is missing: give globs on names of parameters"),
        (f"{GROUP}match = []", "optimizer.groups.mine.match = []: Value should have at least 1 item"),
        (f'{GROUP}match = [""]', "String should have at least 1 character"),
        (f"{GROUP}match = 3", "optimizer.groups.mine.match = 3: must be a valid list"),
        (
            '[optimizer.groups.expert]\nmatch = "*"',
            "optimizer.groups.expert: is a group without patterns: set it in [",
        ),
        ('[optimizer.groups."a b"]\nmatch = "*"', "optimizer.groups.a b: the name of a group is of letters"),
        (
            '[optimizer.groups.w_min]\nmatch = "*"',
            "optimizer.groups.w_min: lr/w_min could be a metric of another",
        ),
        (f'{GROUP}match = "*"\n{GROUP}match = "*"', "x.toml"),
        ("[optimizer]\ngroups = 3", "optimizer.groups = 3: must have tables: [optimizer.groups.NAME]"),
        (f'{GROUP}match = "*"\nlearning_rate = 1.0', "optimizer.groups.mine.learning_rate: unknown argument"),
        (f'{GROUP}match = "*"\nname = "muno"', "optimizer.groups.mine.name = 'muno': unknown component; did you mean"),
        ('[optimizer.expert]\nmatch = "*"', "match = '*': is for groups by pattern: set it in [optimizer.groups.NAME]"),
        ("[optimizer.dense]\nper_head = true", "per_head = True: is for groups by pattern"),
        (
            f'{GROUP}match = "*norm.weight"\nname = "muon"',
            "[optimizer.groups.mine] name = 'muon' updates matrices, and takes none of what this group matches, of "
            "shapes (16,), (4,): they are no matrices; choose 'adamw'",
        ),
        (
            f'{GROUP}match = "tok_emb*"\nname = "soap"\nadamw_above = 32',
            "of shapes (64, 16): they are no matrices, or larger than its adamw_above; choose 'adamw'",
        ),
        (
            f'{GROUP}match = "*.attention.w?.weight"\nper_head = true',
            "[optimizer.groups.mine] per_head = true does nothing with AdamW, which does not update by matrices",
        ),
        (
            f'[optimizer]\nname = "soap"\n{GROUP}match = "*.wq.weight"\nper_head = true\nadamw_above = 1',
            "'soap' updates matrices, and takes none of what this group matches, of shapes",
        ),
        (
            f'{GROUP}match = ["layers.0.*.w?.weight"]\nper_head = true\nname = "muon"',
            "per_head: only attention has heads, and layers.0.feed_forward.w1.weight in this group has none",
        ),
        (
            f'{GROUP}match = "layers.1.*"\nload_lr = "batch_fraction"',
            "[optimizer.groups.mine] load_lr: only experts have a load, and layers.1.",
        ),
        (
            f'{GROUP}match = "*"\nload_lr_power = 0.5',
            "optimizer.groups.mine.load_lr_power is set, but optimizer.",
        ),
        (
            f'{GROUP}match = "*"\nload_lr = "none"\nload_lr_floor = 2.0\nload_lr_ceiling = 1.0',
            "optimizer.groups.mine.load_lr_floor (2.0) must be at most load_lr_ceiling (1.0)",
        ),
    ],
)
def test_refused(table: str, message: str, tmp_path: Path) -> None:
    text = SMALL.replace("[optimizer]\nlr = 0.01\n", "") if table.startswith("[optimizer]") else SMALL
    (tmp_path / "x.toml").write_text(f"{text}{table}\n")
    with pytest.raises(ValueError, match=r"\w") as caught:
        load_and_build(tmp_path / "x.toml")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def load_and_build(file: Path) -> None:
    config = load_config([f"--job.config_file={file}"])
    build_optimizer(config, build_model(config))


def test_patterns_that_leave_a_parameter_out_are_refused() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"^layers.0.wq.weight is in no parameter group: none of the patterns norm"):
        parameter_groups([("layers.0.wq.weight", weight)], {}, {"norm": r"norm\."})


BETAS = ("beta1", "beta2", "momentum")


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "distributed_shampoo"])
def test_every_number_of_an_optimizer_has_its_range(name: str) -> None:
    """None takes -2, and a beta not 1, whatever table it is in."""
    taken = load_config([f"--optimizer.name={name}"]).optimizer.arguments
    numbers = [key for key, value in taken.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    assert {"lr", "beta1", "beta2", "weight_decay"} <= set(numbers)
    base = [f"--optimizer.groups.mine.name={name}", "--optimizer.groups.mine.match=*"]
    for key in numbers:
        for value in ("-2", "1.0") if key in BETAS else ("-2",):
            with pytest.raises(ValueError, match=rf"--optimizer.groups.mine.{key} = {value}: must be "):
                load_config([*base, f"--optimizer.groups.mine.{key}={value}"])
    assert KINDS["optimizer"].ranges.keys() >= set(BETAS)


RESUMED = {
    "rates": UP_DOWN,
    "by load": BY_LOAD,
    "heads": '[optimizer.groups.heads]\nname = "muon"\nmatch = ["layers.*.attention.w?.weight"]\nper_head = true\n',
}


@pytest.mark.parametrize("tables", RESUMED.values(), ids=RESUMED)
def test_resume_is_bit_for_bit(tables: str, tmp_path: Path) -> None:
    model, optimizer = built(tmp_path, tables)
    run(model, optimizer, range(3))
    save_checkpoint(tmp_path, 3, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    expected = run(model, optimizer, range(3, 6))
    again, fresh = built(tmp_path, tables)
    load_checkpoint(tmp_path / "step-3", model=again, optimizer=fresh)
    for one, other in zip(run(again, fresh, range(3, 6)), expected, strict=True):
        assert torch.equal(one.loss, other.loss)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


OTHERS = {
    "no groups": ("", ""),
    "another matrix": (UP_DOWN.replace('"layers.*.moe.experts.w1", ', ""), ""),
    "another order": ("", '[optimizer.groups.all]\nmatch = "layers.1.*"\n' + UP_DOWN),
    "another sort": ("", UP_DOWN.replace("[optimizer.groups.down]", '[optimizer.groups.down]\nname = "muon"')),
    "heads": (
        RESUMED["heads"].replace("per_head = true", ""),
        RESUMED["heads"],
    ),
}


@pytest.mark.parametrize("pair", OTHERS.values(), ids=OTHERS)
def test_resuming_with_other_groups_says_what_to_leave_out(pair: tuple[str, str], tmp_path: Path) -> None:
    saved, now = (tables or UP_DOWN for tables in pair) if any(pair) else ("", UP_DOWN)
    model, optimizer = built(tmp_path, saved)
    run(model, optimizer, range(1))
    save_checkpoint(tmp_path, 1, model=model, optimizer=optimizer, extra={}, files={}, keep_latest_k=0)
    other, new = built(tmp_path, now)
    with pytest.raises(ValueError, match=r'holds another optimizer: .*; set checkpoint.exclude = \["optimizer"\]'):
        load_checkpoint(tmp_path / "step-1", model=other, optimizer=new)


def test_settings_of_load_lr_are_of_any_group() -> None:
    assert "load_lr" in expand_load_lr({"load_lr": "ideal_normalized"}, top_k=1)
    with pytest.raises(ValueError, match=r"^optimizer.groups.mine.load_lr_floor \(2"):
        expand_load_lr({"load_lr_floor": 2.0, "load_lr_ceiling": 1.0}, top_k=1, key="optimizer.groups.mine")


def test_no_host_synchronisation() -> None:
    """Group by group and layer by layer: a value that is read on the host raises in fake mode."""
    matches = {"up": ["*.w[13]"], "last": ["layers.1.*.w2"]}
    arguments = {
        "up": {"lr": 0.1, **expand_load_lr({"load_lr": "ideal_normalized"}, top_k=2)},
        "last": expand_load_lr({"load_lr": "batch_fraction", "load_lr_ema": 0.5}, top_k=2),
    }
    with FakeTensorMode(), torch.device("cpu"):
        model = tiny_model()
        optimizer = OPTIMIZERS["adamw"](parameter_groups(model.named_parameters(), arguments, matches=matches))
        tokens = torch.zeros(4, SEQ, dtype=torch.int64)
        for _ in range(2):
            output = train_step(model, [(tokens, tokens)], optimizer, {}, [], max_norm=1.0, measure_experts=True)
        record = train_record(model, output, {group["name"]: 0.1 for group in optimizer.param_groups})
    assert {"lr/up_min", "lr/last_max", "gradient_snr"} <= record.keys()
