"""Study files: what they expand to, and one clear line for each mistake."""

import glob
import os
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import Write
from titan_moe.config import load_config
from titan_moe.study.grid import expand, folder_name, runs_of
from titan_moe.study.spec import load_study

SHIPPED = sorted(glob.glob(str(Path(__file__).parents[2] / "train_configs" / "studies" / "*.toml")))
TWO_AXES = {
    "axes__experts": {"key": "moe.num_experts", "values": [4, 8], "label": "number of experts"},
}


def test_a_product_is_every_value_with_every_other_and_each_seed(write: Write):
    study = load_study(write(**TWO_AXES))
    assert [tuple(point.values()) for point in expand(study)] == [(0, 4), (0, 8), (0.1, 4), (0.1, 8)]
    runs = runs_of(study)
    assert [run.seed for run in runs] == [1, 2] * 4
    last = runs[-1]
    assert last.config.balancer["aux_loss"]["coeff"] == 0.1
    assert (last.config.moe.num_experts, last.config.training.seed) == (8, 2)
    assert last.config.job.dump_folder == str(last.folder) == "outputs/studies/small/runs/coeff=0.1,experts=8/seed-2"
    assert study.axes[1].label == "number of experts"


def test_zip_goes_side_by_side_and_explicit_points_are_added(write: Write):
    points = [{"coeff": 0.3, "experts": 16}]
    study = load_study(write(study__combine="zip", points=points, **TWO_AXES))
    assert [tuple(point.values()) for point in expand(study)] == [(0, 4), (0.1, 8), (0.3, 16)]
    study = load_study(write(study__combine="points", points=points, **TWO_AXES))
    assert [tuple(point.values()) for point in expand(study)] == [(0.3, 16)]


def test_an_axis_sets_several_keys_or_names_options(write: Write):
    both = {"key": ["optimizer.lr", "optimizer.router.lr"], "values": [1e-3, 2e-3]}
    options = {
        "loss-free": {"balancer": {"aux_loss": False, "loss_free": {"rate": 0.01}}},
        "none": {"balancer": {"aux_loss": False}},
    }
    runs = runs_of(load_study(write(axes={"lr": both, "method": {"options": options}}, study__seeds=[5])))
    assert [(r.config.optimizer.arguments["lr"], r.config.optimizer.groups["router"]["lr"]) for r in runs] == [
        (1e-3, 1e-3),
        (1e-3, 1e-3),
        (2e-3, 2e-3),
        (2e-3, 2e-3),
    ]
    assert [sorted(run.config.balancer) for run in runs[:2]] == [["loss_free"], []]
    assert runs[0].folder.parent.name == "lr=0.001,method=loss-free"


def test_a_study_inherits_and_the_command_line_goes_between_base_and_axes(write: Write):
    (Path("run.toml")).write_text("[training]\nsteps = 100\nseq_len = 32\n")
    write("parent.toml", config={"base": "run.toml", "training": {"seq_len": 64}}, **TWO_AXES)
    child = write("child.toml", text='base = "parent.toml"\n[study]\nseeds = [3]\n[axes.experts]\nvalues = [4]\n')
    runs = runs_of(load_study(child, ["--training.steps", "7"]))
    assert [(run.point["experts"], run.seed) for run in runs] == [(4, 3), (4, 3)]
    training = runs[0].config.training
    assert (training.steps, training.seq_len) == (7, 64)


@pytest.mark.parametrize("name", ['x"><img src=x onerror=alert(1)>', "../../x", "a b", "", "ü"])
def test_the_name_of_an_axis_is_a_plain_word(write: Write, name: str):
    axis = {"key": "balancer.aux_loss.coeff", "values": [0, 0.1], "label": name}
    with pytest.raises(ValueError, match=r"must be of letters, digits, _ and -: files have its name"):
        load_study(write(axes={name: axis}))
    assert load_study(write(axes={"coeff-2_b": axis})).axes[0].label == name


def test_a_study_without_axes_is_one_point(write: Write):
    runs = runs_of(load_study(write(axes={})))
    assert [run.folder.parent.name for run in runs] == ["base", "base"]


def test_a_point_keeps_its_folder_whatever_is_added(write: Write):
    before = {run.folder for run in runs_of(load_study(write()))}
    after = {run.folder for run in runs_of(load_study(write(axes__coeff__values=[0.6, 0.0, 0.1, 0.2])))}
    assert before < after
    assert folder_name({"x": 1.0, "y": True, "z": "a/b c"}) == "x=1,y=True,z=a_b_c"
    assert len(folder_name({"x": "y" * 400})) < 200


def axis(**table: Any) -> dict[str, Any]:
    return {"axes": {"coeff": table}}


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "key of nothing": (
        axis(key="balancer.aux_loss.coef", values=[0.1]),
        ["axes.coeff: balancer.aux_loss.coef", "did you mean balancer.aux_loss.coeff?"],
    ),
    "section of nothing": (
        axis(key="trainin.steps", values=[1]),
        ["axes.coeff: trainin: unknown section", "did you mean training?"],
    ),
    "wrong type": (
        axis(key="balancer.aux_loss.coeff", values=["big"]),
        ["axes.coeff: balancer.aux_loss.coeff = 'big'", "valid number"],
    ),
    "out of range": (axis(key="moe.top_k", values=[9]), ["moe.top_k (9)", "moe.num_experts (4)"]),
    "no key": (axis(values=[1]), ["axes.coeff", "either key and values, or options"]),
    "no section": (axis(key="steps", values=[1]), ["axes.coeff.key = 'steps'", "section.key"]),
    "the seed": (axis(key="training.seed", values=[1]), ["axes.coeff.key = 'training.seed'", "study.seeds"]),
    "the folder": (axis(key="job.dump_folder", values=["x"]), ["axes.coeff.key", "study.dump_folder"]),
    "no values": (axis(key="moe.top_k"), ["axes.coeff.values", "missing or empty"]),
    "unknown word of an axis": (
        axis(key="moe.top_k", value=[1]),
        ["axes.coeff.value", "did you mean axes.coeff.values"],
    ),
    "options empty": (axis(options={}), ["axes.coeff.options", "empty"]),
    "no such option": (
        axis(options={"a": {}, "b": {}}, values=["c"]),
        ["axes.coeff.options.c: unknown option", "valid: a, b"],
    ),
    "the same value twice": (axis(key="moe.top_k", values=[2, 2.0]), ["two points collide", "coeff 2 and coeff 2"]),
    "names that are one folder": (
        axis(options={"a b": {}, "a/b": {}}),
        ["two points collide", "coeff a b and coeff a/b"],
    ),
    "one configuration": (
        axis(options={"a": {"training": {"max_norm": 1.0}}, "b": {}}),
        ["two points collide", "coeff a and coeff b", "the same configuration"],
    ),
    "a key within another": (
        axis(key=["moe.top_k", "moe.top_k.x"], values=[1]),
        ["small.toml: axes.coeff: moe.top_k.x: is a table here and a value in another"],
    ),
    "two axes of one key": (
        {**TWO_AXES, "axes__more": {"key": "moe.num_experts", "values": [2]}},
        ["axes.more.key = 'moe.num_experts'", "axes.experts sets it too"],
    ),
    "zip of unequal": (
        {"study__combine": "zip", "axes__experts": {"key": "moe.num_experts", "values": [4]}},
        ['combine = "zip"', "axes.coeff 2, axes.experts 1"],
    ),
    "points without any": ({"study__combine": "points"}, ['combine = "points"', "[[points]]"]),
    "a point without a value": ({"points": [{}]}, ["points[1].coeff: is missing"]),
    "a point of another axis": ({"points": [{"coeff": 1.0, "cof": 2}]}, ["points[1].cof: unknown axis", "coeff"]),
    "unknown table": ({"axis": {}}, ["axis: unknown table", "did you mean axes?"]),
    "a configuration": ({"training": {"steps": 3}}, ["training: unknown table of a study", "config"]),
    "unknown key of the study": ({"study__seed": [1]}, ["study.seed: unknown key", "did you mean study.seeds?"]),
    "seeds twice": ({"study__seeds": [1, 1]}, ["study.seeds = [1, 1]", "different"]),
    "unknown measure": ({"study__report": ["los"]}, ["study.report", "'los' is none of loss"]),
    "unknown curve": ({"study__curves": ["loss"]}, ["study.curves", "train/loss"]),
    "mistake in the base": ({"config__training__step": 3}, ["[config]: training.step: unknown key", "training.steps"]),
    "no such base": ({"config__base": "no.toml"}, ["config.base = 'no.toml'", "No such file"]),
    "no validation": ({"config__validation__enable": False}, ["validation.enable = false", "set it to true"]),
}


@pytest.mark.parametrize(("changes", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_that_names_file_key_and_remedy(write: Write, changes: dict[str, Any], parts: list[str]):
    path = write(**changes)
    with pytest.raises((ValueError, OSError)) as caught:
        runs_of(load_study(path))
    message = str(caught.value)
    assert "\n" not in message
    for part in [*parts, *([] if "top_k (9)" in message else ["small.toml"])]:
        assert part in message


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--training.step", "5"], ["--training.step: unknown key", "training.steps"]),
        (["--moe.num_experts", "2"], ["--moe.num_experts", "axes.experts varies it"]),
        (["--job.dump_folder", "x"], ["--job.dump_folder", "the study sets it"]),
    ],
)
def test_a_mistake_on_the_command_line(write: Write, words: list[str], parts: list[str]):
    path = write(**TWO_AXES)
    with pytest.raises(ValueError, match=parts[0]) as caught:
        runs_of(load_study(path, words))
    assert parts[1] in str(caught.value)


@pytest.mark.parametrize("path", SHIPPED, ids=os.path.basename)
def test_shipped_studies_expand_to_runs_that_are_configured_right(path: str):
    study = load_study(path)
    assert study.section.title
    assert study.section.mirrors, "names the table or figure of the paper, or what came after it"
    points = expand(study)
    assert len(points) > 1
    runs = runs_of(study)
    assert len(runs) == len(points) * len(study.section.seeds)
    small = path.endswith("_mini.toml")
    asks_for_rates = os.path.basename(path) == "optimizers_rates_mini.toml"
    assert len(study.section.seeds) > 1 or asks_for_rates, "without seeds there are no intervals"
    if os.path.basename(path).startswith("mup"):  # the width is what varies
        assert {run.config.model.dim for run in runs} == {64, 128, 256} | (set() if small else {512})
        assert {run.config.training.steps for run in runs} == {150 if small else 5000}
        return
    shampoo = os.path.basename(path).startswith("shampoo")  # one point trains longer
    optimizers = os.path.basename(path).startswith("optimizers")
    assert {run.config.model.dim for run in runs} == {768 if not small else 256 if shampoo or optimizers else 128}
    steps = (200 if shampoo else 150 if optimizers else 400) if small else 50000
    longer = {300 if small else 62500} if shampoo else set()
    if os.path.basename(path) in ("optimizers.toml", "optimizers_mini.toml"):
        longer = {200, 285} if small else {55000}
    assert {run.config.training.steps for run in runs} == {steps} | longer


def test_every_study_is_there_in_two_sizes():
    names = {os.path.basename(path).removesuffix(".toml") for path in SHIPPED}
    studies = {name for name in names if not name.endswith("_mini")}
    assert names - studies == {f"{name}_mini" for name in studies}
    wanted = {"expert_lr", "load_lr", "aux_expert_lr", "aux_coeff", "experts", "loss_free", "shampoo", "score_rate"}
    wanted |= {"expert_lr_experts", "top_k", "temperature", "balancers", "mup", "optimizers", "optimizers_rates"}
    assert studies == wanted


def test_the_configuration_of_a_run_survives_its_file(write: Write):
    from titan_moe.config.differences import differences
    from titan_moe.study.runs import changes, prepare

    run = runs_of(load_study(write()))[0]
    prepare(run)
    assert load_config(["--job.config_file", str(run.folder / "point.toml")]) == run.config
    assert changes(run) == []  # it has not begun
    other = runs_of(load_study(write(config__training__steps=9)))[0]
    assert differences(run.config, other.config) == ["training.steps: 8, now 9"]
