"""Numbers, tables, figures and the page, of runs whose numbers are known."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tomli_w

from tests.study.conftest import Study, Write
from tests.study.fake_train import records, tomllib
from titan_moe.study import cli
from titan_moe.study.grid import Run, runs_of
from titan_moe.study.report.analysis import (
    axes_of,
    interval,
    paired_difference,
    read_entries,
    short_name,
    standing,
    summarize,
)
from titan_moe.study.report.compare import compare, find_runs, read_runs
from titan_moe.study.report.figures import measure_panels, u_curve
from titan_moe.study.report.measures import MEASURES
from titan_moe.study.report.page import Written, study_report
from titan_moe.study.runs import METRICS, history, last_records, measure, prepare
from titan_moe.study.spec import load_study

WRITTEN = ("results.jsonl", "table.md", "report.html")
Losses = dict[tuple[object, int], list[float]]


def test_interval_is_students():
    mean, half, count = interval([1.0, 2.0, 3.0])
    assert (mean, count) == (2.0, 3)
    assert half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t(0.975, 2) of the tables
    assert interval([1.0, 3.0]).half == pytest.approx(12.706205, rel=1e-6)
    assert math.isnan(interval([5.0]).half)


def train(run: Run, losses: list[float], kind: str = "validation") -> None:
    """A run with these validation losses, one a step; whole if they are as many as its steps."""
    prepare(run)
    lines = []
    for step, loss in enumerate(losses, 1):
        lines.append({"step": step, "kind": "train", "loss": loss + 1, "step_seconds": 0.5, "maxvio_batch": loss / 10})
        lines.append({"step": step, "kind": kind, "loss": loss, "perplexity": math.exp(loss), "accuracy": 0.1 * step})
    (run.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_points_are_compared_by_means_and_by_seed(write: Write):
    study = load_study(write(config__training__steps=2, axes__coeff__values=[0, 0.1, 0.2]))
    runs = runs_of(study)
    for run, last in zip(runs, [3.0, 5.0, 2.5, 4.4, 9.0, 1.0], strict=True):
        train(run, [7.0, last] if run.point["coeff"] != 0.2 else [last])  # the third point has not finished
    zero, tenth, unfinished = summarize(read_entries(runs))
    assert (zero.measures["loss"].mean, tenth.measures["loss"].mean) == (4.0, pytest.approx(3.45))
    assert zero.measures["loss"].half == pytest.approx(12.706205)
    assert zero.measures["maxvio_batch"].mean == pytest.approx((0.7 + 0.3 + 0.7 + 0.5) / 4)
    assert not unfinished.is_ranked
    place = standing([zero, tenth, unfinished], "loss")
    assert place is not None
    assert (place.lead, place.level) == (tenth, (zero,)), "the lower mean, whose difference is 0.55 ± 0.64"
    assert not place.is_clear
    assert standing([zero, unfinished], "loss") is None
    difference = paired_difference(zero, tenth, "loss")
    assert difference is not None
    assert difference.mean == pytest.approx(0.55)
    assert difference.half == pytest.approx(12.706205 * 0.05, rel=1e-4)  # far less than that of either mean
    (axis,) = axes_of({"coeff": "aux loss"}, runs)
    assert (axis.is_numeric, axis.values, short_name(runs[2].point, [axis])) == (True, (0, 0.1, 0.2), "aux loss 0.1")


def test_measures_of_a_run(tmp_path: Path):
    lines = []
    for step in range(1, 21):
        line = {"step": step, "kind": "train", "loss": 10.0 - step / 10, "param_norm": float(step)}
        speeds = {"step_seconds": 9.0 if step == 1 else 2.0, "tokens_per_second": 100.0, "peak_memory_gib": step / 10}
        lines.append(line | speeds | {"maxvio_batch": 1.0 if step < 11 else 0.5, "load_entropy": 0.9})
    for step, loss in ((10, 3.0), (15, 2.0), (20, 2.5)):
        lines.append({"step": step, "kind": "validation", "loss": loss, "perplexity": math.exp(loss), "accuracy": 0.5})
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / METRICS).write_text(text + '{"step": 21, "kind": "tra')  # a line that is being written
    found = measure(history(tmp_path / METRICS))
    assert (found["loss"], found["best_loss"], found["best_accuracy"]) == (2.5, 2.0, 0.5)
    assert found["perplexity"] == pytest.approx(math.exp(2.5))
    assert (found["maxvio_batch"], found["maxvio_batch_last"]) == (0.75, 0.5)
    assert found["train_loss"] == pytest.approx(8.05)
    assert (found["step_seconds"], found["train_seconds"], found["peak_memory_gib"]) == (2.0, 47.0, 2.0)
    assert found["param_norm"] == 20.0
    train_line, validation = last_records(tmp_path / METRICS)
    assert train_line is not None
    assert validation is not None
    assert (train_line["step"], validation["step"]) == (20, 20)
    assert set(found) <= set(MEASURES)
    assert measure(history(tmp_path / "none.jsonl")) == {}


WHERE = ("src", "href", "xlink:href", "data")


class Outside(HTMLParser):
    """Collects what a page would fetch."""

    found: list[str]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found = getattr(self, "found", [])
        self.found += [v for k, v in attrs if k in WHERE and v and not v.startswith(("#", "data:"))]
        self.found += [tag] if tag in ("link", "script", "iframe", "img") else []


@pytest.mark.slow
def test_a_report_has_everything_and_needs_nothing_else(
    write: Write, fake: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Two numeric axes: a curve family and a heatmap; a failed run is listed, a title is escaped."""
    axes = {
        "coeff": {"key": "balancer.aux_loss.coeff", "values": [0, 0.01, 0.1], "label": "aux loss <coeff>"},
        "lr": {"key": "optimizer.expert.lr", "values": [1e-4, 5e-4]},
    }
    path = write(axes=axes, study__title="A & B <script>", study__seeds=[1, 13, 2], study__mirrors="Figure 6")
    assert cli.main([path, "--jobs", "2"]) == 1
    home = Path("outputs/studies/small")
    results = [json.loads(line) for line in (home / "results.jsonl").read_text().splitlines()]
    assert len(results) == 18
    assert {r["state"] for r in results} == {"finished", "failed"}
    first = results[0]
    assert (first["point"], first["seed"], first["step"], first["steps"]) == ({"coeff": 0, "lr": 1e-4}, 1, 8, 8)
    wanted = {"loss", "best_loss", "perplexity", "accuracy", "maxvio_batch", "maxvio_global", "param_norm"}
    assert wanted | {"step_seconds", "tokens_per_second", "peak_memory_gib"} <= set(first)
    config = tomllib.loads((Path(first["folder"]) / "point.toml").read_text())
    assert first["loss"] == records(config, 1, 8)[-1]["loss"]

    page = (home / "report.html").read_text()
    parser = Outside()
    parser.feed(page)
    assert parser.found == [], "the page fetches something"
    assert not re.search(r"url\((?!#)", page)
    assert "A &amp; B &lt;script&gt;" in page
    assert "<script" not in page
    assert "aux loss &lt;coeff&gt;" in page
    assert (
        page.count("<svg") == len(list((home / "figures").glob("*.svg"))) == len(list((home / "figures").glob("*.png")))
    )
    names = {path.stem for path in (home / "figures").glob("*.svg")}
    assert {"loss_by_coeff", "loss_heatmap", "accuracy_heatmap", "curve_validation_loss", "loads"} <= names
    assert "6 of the runs are not finished" in page
    assert "NaN or infinite router logits" in page
    assert page.count("num_experts = 4") == 18
    assert '<meta http-equiv="refresh"' not in page

    lines = (home / "table.md").read_text().splitlines()
    assert lines[0].startswith(r"| aux loss \<coeff> | lr | seeds | validation loss (nats/token) | loss above the low")
    assert len([line for line in lines if line.startswith("| ")]) == 7
    winner = [line for line in lines if line.startswith("| 0.1 | 0.0005 | 2 of 3 | **4.")]
    assert len(winner) == 1, "the fake's best point is marked"
    assert " ± " in winner[0]
    assert r"- aux loss \<coeff> 0, lr 0.0001: the means are of 2 of 3 runs (1 failed)." in lines
    said = capsys.readouterr().out
    assert "Lowest validation loss: aux loss <coeff> 0.1, lr 0.0005 with 4." in said
    assert "below each of the 5 others by the paired 95 % interval" in said


def test_no_two_columns_have_one_name(write: Write):
    """An axis may be called as what comes of a run: a study of steps has two columns of these."""
    study = load_study(write(axes={"steps": {"key": "training.steps", "values": [1, 2]}}, study__seeds=[1]))
    runs = runs_of(study)
    for run in runs:
        train(run, [7.0] * run.config.training.steps)
    study_report(study, runs)
    head = (study.folder / "table.md").read_text().splitlines()[0].strip("| ").split(" | ")
    assert head[:4] == ["steps (as set)", "seeds", "steps", "tokens"]
    assert len(set(head)) == len(head)


def test_the_axes_choose_the_figures(write: Write, fake: None):
    options = {"a": {"balancer": {"aux_loss": {"coeff": 0.2}}}, "b": {"balancer": {"aux_loss": False}}}
    report = ["loss", "maxvio_global", "train_seconds"]
    assert cli.main([write(axes={"method": {"options": options}}, study__report=report), "--jobs", "2"]) == 0
    home = Path("outputs/studies/small/figures")
    rows = {f"{measure}_{what}" for measure in report for what in ("by_point", "difference")}
    assert {p.stem for p in home.glob("*.png") if not p.stem.startswith(("curve", "loads"))} == rows
    (home / "loss_heatmap.png").write_bytes(b"of before")
    assert cli.main(["small.toml", "--report"]) == 0
    assert not (home / "loss_heatmap.png").exists()


@pytest.mark.parametrize("axes", [1, 2])
def test_a_figure_over_values_shows_all_of_its_points_and_intervals(write: Write, axes: int):
    made = {"coeff": {"key": "balancer.aux_loss.coeff", "values": [0, 0.001, 0.1, 0.6]}}
    if axes == 2:
        made["top_k"] = {"key": "moe.top_k", "values": [1, 2]}
    runs = runs_of(load_study(write(axes=made, config__training__steps=1)))
    for number, run in enumerate(runs):
        train(run, [3.0 + 0.1 * (number % 5)])
    summaries = summarize(read_entries(runs))
    x, *others = axes_of({"coeff": "coeff", "top_k": "k"}, runs)
    (drawn,) = u_curve(summaries, x, others[0] if others else None, "loss").axes
    low, high = drawn.get_ylim()
    assert min(s.measures["loss"].mean - s.measures["loss"].half for s in summaries) >= low
    assert max(s.measures["loss"].mean + s.measures["loss"].half for s in summaries) <= high
    places = drawn.transLimits.transform(drawn.transScale.transform([(0, low), (0.6, low)]))[:, 0]
    assert 0.01 < places[0] < 0.15, "near the ends of the axis"
    assert 0.85 < places[1] < 0.99
    assert drawn.get_xscale() == "symlog"
    labels = [label.get_text() for label in drawn.get_xticklabels()]
    assert (labels[0], labels[-1]) == ("0", "0.6")
    assert drawn.get_title().startswith("lowest at 0"), "the intervals of two seeds contain 0"


@pytest.mark.parametrize("order", [("coeff", "top_k"), ("top_k", "coeff")])
def test_the_longer_of_two_numeric_axes_is_the_curves(write: Write, order: tuple[str, str]):
    both = {
        "coeff": {"key": "balancer.aux_loss.coeff", "values": [0, 0.1, 0.6]},
        "top_k": {"key": "moe.top_k", "values": [1, 2]},
    }
    runs = runs_of(load_study(write(axes={name: both[name] for name in order}, config__training__steps=1)))
    for run in runs:
        train(run, [3.0])
    panels = measure_panels(summarize(read_entries(runs)), axes_of({name: name for name in order}, runs), "loss")
    assert [panel.name for panel in panels] == ["loss_by_coeff", "loss_heatmap"]


def test_compare_finds_the_axes_and_takes_runs_that_are_going(write: Write, study: Study, tmp_path: Path):
    assert (
        study(write(axes__experts={"key": "moe.num_experts", "values": [4, 8]}, study__seeds=[1]), "--jobs", "2") == 0
    )
    home = Path("outputs/studies/small")
    going = tmp_path / "going"
    first = runs_of(load_study("small.toml"))[0]
    going.mkdir()
    (going / "config.toml").write_text((first.folder / "config.toml").read_text().replace("coeff = 0.0", "coeff = 0.5"))
    lines = (first.folder / METRICS).read_text().splitlines()[:5]
    (going / METRICS).write_text("\n".join(lines) + "\n")
    assert compare([str(home), str(going), str(going)], tmp_path / "out", None) == 0
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    points = [(r["point"]["coeff"], r["point"]["num_experts"], r["state"], r["step"]) for r in results]
    assert points[:4] == [(c, e, "finished", 8) for c in (0.0, 0.1) for e in (4, 8)]
    assert points[4:] == [(0.5, 4, "interrupted", 4)]
    page = (tmp_path / "out" / "report.html").read_text()
    assert "at step 4" in page
    assert "Comparison of 5 runs" in page


BAD = """x"><img src='x' onerror="alert(1)">$\\frac\\1`|*"""  # as a key in a configuration of anyone


class Elements(HTMLParser):
    """The names of a page's elements, and of attributes that run code."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.handlers: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]


@pytest.mark.parametrize(("key", "kinds"), [(BAD, 1), ("../../../x", 2), (BAD, 4)])
def test_names_of_others_are_text_in_a_comparison(tmp_path: Path, key: str, kinds: int):
    """A key of a component from outside becomes an axis; with four axes or more the folders' names are shown."""
    keys = {f"{key}{number or ''}": None for number in range(kinds)}
    for number in range(3):
        folder = tmp_path / f"<img src=x onerror=alert({number})>"
        folder.mkdir()
        table = {"router": {"name": "nowhere:router", **dict.fromkeys(keys, float(number))}, "training": {"steps": 1}}
        (folder / "config.toml").write_text(tomli_w.dumps(table))
        lines = [{"step": 1, "kind": kind, "loss": 3.0 + number} for kind in ("train", "validation")]
        (folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert compare([str(folder) for folder in tmp_path.iterdir()], tmp_path / "out", None) == 0
    assert {path.name for path in tmp_path.iterdir() if path.name[0] != "<"} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*WRITTEN, "figures"}
    page, table = ((tmp_path / "out" / name).read_text() for name in ("report.html", "table.md"))
    elements = Elements()
    elements.feed(page)
    assert "svg" in elements.tags
    assert not elements.tags & {"img", "script"}
    assert elements.handlers == []
    assert not re.search(r"(?<!\\)[<`*]", table.replace("**", ""))
    for figure in (tmp_path / "out" / "figures").glob("*.svg"):
        assert not any(element.tag.endswith("img") for element in ElementTree.parse(figure).iter())


def test_runs_that_differ_in_nothing_are_told_apart_by_folder(write: Write, study: Study):
    assert study(write(axes={}, study__seeds=[1])) == 0
    assert study("small.toml", "--dump_folder", "again") == 0
    runs, labels, told = read_runs(find_runs(["outputs/studies/small", "again"]))
    assert [run.point["run"] for run in runs] == ["small/runs/base/seed-1", "again/runs/base/seed-1"]
    assert labels == {"run": "run"}
    assert told == [
        "The configurations do not differ but for the seed: what differs in the results is not of a setting."
    ]


@pytest.mark.parametrize(("name", "part"), [("gone", "no such folder"), ("empty", "holds no run")])
def test_compare_refuses_what_is_no_run(tmp_path: Path, name: str, part: str):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=part):
        compare([str(tmp_path / name)], tmp_path / "out", None)
    assert not (tmp_path / "out").exists()


def test_watch_writes_the_report_until_all_is_over(write: Write, study: Study, monkeypatch: pytest.MonkeyPatch):
    """A run that another process finishes while we watch."""
    runs = runs_of(load_study(write(axes={}, study__seeds=[1])))
    written: list[float | None] = []

    def report(study: object, runs: object, refresh: float | None = None) -> Written:
        written.append(refresh)
        if len(written) == 2:
            train(made[0], [5.0] * 8)
        return Written(Path("report.html"), [])

    made = runs
    monkeypatch.setattr(cli, "write_report", report)
    assert cli.main(["small.toml", "--report", "--watch", "0.05"]) == 0
    assert written == [0.05, 0.05, 0.05, None]
