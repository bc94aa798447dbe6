"""What a report says of runs: level or best, differences to the baseline, and in what the runs are not alike."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import Write
from titan_moe.config import to_toml
from titan_moe.study.grid import Run, runs_of
from titan_moe.study.report.analysis import (
    AxisInfo,
    Summary,
    at_common_length,
    axes_of,
    read_entries,
    standing,
    summarize,
)
from titan_moe.study.report.compare import compare
from titan_moe.study.report.curves import curve_panels, curves, load_panel
from titan_moe.study.report.figures import difference_panels, measure_panels
from titan_moe.study.report.findings import comparisons, headline, notes
from titan_moe.study.report.page import study_report
from titan_moe.study.runs import EXIT_CODE, LOG, METRICS, prepare
from titan_moe.study.spec import load_study

TOKENS = 1024  # of a step
Losses = dict[str, list[float]]
Make = Callable[..., list[Run]]


def train(run: Run, losses: Sequence[float], facts: dict[str, Any] | None = None, tokens: int = TOKENS) -> None:
    """A run with a validation at each step; failed where it has fewer losses than its steps."""
    prepare(run)
    lines = []
    for step, loss in enumerate(losses, 1):
        train_line = {"step": step, "kind": "train", "loss": loss + 1, "num_tokens": tokens * step, "step_seconds": 0.5}
        load = {f"load/layer_0/expert_{expert}": 4 for expert in range(4)}
        validation = {"step": step, "kind": "validation", "loss": loss, "accuracy": 0.5, "num_tokens": 64, **load}
        for line in (train_line, validation):
            lines.append({key: None if math.isnan(value) else value for key, value in line.items() if key != "kind"})
            lines[-1]["kind"] = line["kind"]
    (run.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run.folder / "config.toml").write_text(to_toml(run.config))
    (run.folder / "run.json").write_text(
        json.dumps({"device": "a test", "data": "d", "tokenizer": "t", **(facts or {})})
    )
    if len(losses) < run.config.training.steps:
        (run.folder / EXIT_CODE).write_text("2\n")
        (run.folder / LOG).write_text("error: the run has diverged and stops\n")


@pytest.fixture
def make(write: Write) -> Make:
    """Runs of a study with one axis of named methods, which ended with these losses of seeds 1, 2, 3."""

    def made(losses: Losses, *, steps: int = 2, **changes: Any) -> list[Run]:
        rates = {name: {"optimizer": {"lr": 1e-3 * (1 + i)}} for i, name in enumerate(losses)}
        seeds = [1, 2, 3][: max(map(len, losses.values()))]
        axes = {"method": {"options": rates}}
        path = write(axes=axes, study__seeds=seeds, config__training__steps=steps, **changes)
        runs = runs_of(load_study(path))
        for run in runs:
            last = losses[run.point["method"]][run.seed - 1]
            train(run, [7.0] * (steps - 1) + [last])
        return runs

    return made


def read(runs: Sequence[Run]) -> tuple[list[Summary], list[AxisInfo]]:
    return summarize(read_entries(runs)), axes_of({name: name for name in runs[0].point}, runs)


def said(runs: Sequence[Run]) -> str:
    found = headline(*read(runs))
    assert found is not None
    return found.text


NOISY = {"old": [4.0, 4.3, 3.9], "new": [3.9, 4.31, 3.75], "worse": [4.5, 4.8, 4.4]}  # new less old: -0.08 ± 0.2
CLEAR = {"old": [4.0, 4.3, 3.9], "new": [3.89, 4.20, 3.80], "worse": [4.5, 4.8, 4.4]}


def test_a_lower_mean_whose_interval_contains_0_is_level(make: Make):
    runs = make(NOISY)
    assert said(runs) == (
        "No best point. The lowest mean validation loss, 3.9867 ± 0.7201 nats/token (3 seeds), is that of new. "
        "Level with it, as the paired 95 % interval of the difference contains 0: old."
    )
    written = study_report(load_study("small.toml"), runs)
    assert written.findings[0] == said(runs), "the terminal gets it too"
    table = (written.path.parent / "table.md").read_text()
    losses = [[cell.strip() for cell in line.split("|")][3] for line in table.splitlines()[2:5]]
    assert losses == ["4.0667 ± 0.5171 ≈", "3.9867 ± 0.7201 ≈", "4.5667 ± 0.5171"]
    assert "**" not in table
    page = written.path.read_text()
    assert 'aria-label="best"' not in page
    assert 'aria-label="level"' in page
    (panel,) = measure_panels(*read(runs), "loss")
    assert panel.figure.axes[0].get_title(loc="right") == "lowest: 3.9867, level with 1"
    assert "orange: the best mean and all that are level with it" in panel.caption


def test_a_point_is_best_where_every_paired_interval_leaves_0_out(make: Make):
    runs = make(CLEAR)
    assert said(runs).startswith("Lowest validation loss: new with 3.9633 ± ")
    assert said(runs).endswith("(3 seeds), below each of the 2 others by the paired 95 % interval of their difference.")
    place = standing(read(runs)[0], "loss")
    assert comparisons(place) == (
        "2 differences to the best mean were looked at, each with an interval by itself; by intervals that hold for "
        "all at once (Bonferroni) none of them would be level."
    )
    table = (study_report(load_study("small.toml"), runs).path.parent / "table.md").read_text()
    assert "| new | 3 | **3.9633 ± 0.5213** | 0 |" in table
    assert "| old | 3 | 4.0667 ± 0.5171 | +0.1033 ± 0.0143 |" in table


def test_intervals_that_hold_at_once_are_wider(make: Make):
    losses = (
        {"lead": [4.0, 4.3, 3.9]} | {f"m{i}": [4.03, 4.34, 3.93 + i / 500] for i in range(8)} | {"far": [5.0, 5.3, 4.9]}
    )
    place = standing(read(make(losses))[0], "loss")
    assert place is not None
    assert (len(place.behind), place.level_at_once) == (9, 8), "t is 4.3 for one, 13.4 for nine at once"
    assert "(Bonferroni) 8 of them would be level" in comparisons(place)


def test_one_seed_has_no_interval_and_no_best(make: Make):
    runs = make({"old": [4.0], "new": [3.0]})
    assert said(runs) == (
        "No best point. The lowest validation loss, 3.0000 nats/token (1 seed), is that of new. Fewer than two seeds "
        "in common, so that there is no interval: old."
    )
    written = study_report(load_study("small.toml"), runs)
    table = (written.path.parent / "table.md").read_text()
    assert "**" not in table
    assert "≈ |" not in table
    (panel,) = difference_panels(*(read(runs)[0], runs[0].point, read(runs)[1]), "loss")
    assert "one seed, so that there is no interval" in panel.caption


def test_differences_to_the_baseline_are_drawn_by_seed_with_their_interval(make: Make):
    runs = make(NOISY, study__baseline={"method": "worse"})
    summaries, axes = read(runs)
    (panel,) = difference_panels(summaries, {"method": "worse"}, axes, "loss")
    (drawn,) = panel.figure.axes
    dots = [list(line.get_xdata()) for line in drawn.lines if line.get_marker() == "."]
    assert dots == [pytest.approx([-0.5, -0.5, -0.5]), pytest.approx([-0.6, -0.49, -0.65])]
    ends = drawn.collections[1].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([-0.58 - 0.20365, -0.58 + 0.20365], abs=1e-3)
    assert "less that of the baseline (worse) with the same seed: mean over 3 seeds" in panel.caption
    assert "each of the 2 intervals is by itself" in panel.caption
    assert 'id="loss_difference"' in study_report(load_study("small.toml"), runs).path.read_text()


def test_a_baseline_without_a_finished_run_is_named(make: Make):
    runs = make(NOISY)
    for run in runs[:3]:
        train(run, [7.0])
    written = study_report(load_study("small.toml"), runs)
    assert "The baseline (old) has no finished run: differences to it are not drawn." in written.findings
    assert not list((written.path.parent / "figures").glob("*difference*"))


@pytest.mark.parametrize("point", [{"method": "none"}, {"coeff": 1}])
def test_a_baseline_that_is_no_point_is_refused(write: Write, point: dict[str, Any]):
    options = {"a": {"optimizer": {"lr": 1e-3}}, "b": {"optimizer": {"lr": 2e-3}}}
    path = write(axes={"method": {"options": options}}, study__baseline=point)
    with pytest.raises(ValueError, match=r"small.toml: study.baseline: .* is none of the points: .* method = 'a'"):
        runs_of(load_study(path))


def compare_lengths(write: Write, *, freq_of_long: int = 1) -> Path:
    """Compare runs of 2 and 4 steps; the longer ends lower, and is higher at step 2."""
    path = write(axes={"steps": {"key": "training.steps", "values": [2, 4]}})
    for run in runs_of(load_study(path)):
        train(run, [7.0, 5.0 + run.seed / 10] if run.point["steps"] == 2 else [7.0, 6.0 + run.seed / 10, 4.5, 4.0])
        if run.point["steps"] == 4 and freq_of_long == 4:
            lines = (run.folder / METRICS).read_text().splitlines()
            (run.folder / METRICS).write_text("\n".join([*lines[0:8:2], lines[-1]]) + "\n")
    folders = [str(run.folder) for run in runs_of(load_study(path))]
    assert compare(folders, Path("both"), None) == 0
    return Path("both")


def test_runs_of_different_length_are_compared_where_both_were(write: Write, capsys: pytest.CaptureFixture[str]):
    home = compare_lengths(write)
    table = (home / "table.md").read_text()
    first, second = table.split("At 2,048 tokens, the most that all have seen:")
    assert "| steps (as set) | seeds | steps | tokens | validation loss (nats/token) | accuracy |" in first
    assert "| 4 | 2 | 4 | 4,096 | 4.0000 ± 0.0000 |" in first
    assert "**" not in first
    assert "≈" not in first
    assert "No best point: the runs differ in length." in first
    assert "| 2 | 2 | **5.1500 ± 0.6353** | 0 |" in second
    assert "| 4 | 2 | 6.1500 ± 0.6353 | +1.0000 ± 0.0000 |" in second
    shown = capsys.readouterr().out
    assert "The runs differ in length: 2 steps (2,048 tokens) and 4 steps (4,096 tokens)." in shown
    assert "the learning rate of the longer has not come as far down" in shown
    page = (home / "report.html").read_text()
    assert "<h2>Results, at 2,048 tokens</h2>" in page


def test_runs_of_different_length_without_a_common_validation_are_not_ranked(write: Write):
    home = compare_lengths(write, freq_of_long=4)
    table = (home / "table.md").read_text()
    assert "At 2,048" not in table
    assert "**" not in table
    assert "loss above" not in table
    assert "No best point: the runs differ in length." in table
    assert not list((home / "figures").glob("*difference*"))


def test_as_many_steps_of_more_tokens_are_another_length(make: Make):
    runs = make(CLEAR)
    for run in runs[:3]:
        train(run, [7.0, 4.0], tokens=2 * TOKENS)
    summaries, _ = read(runs)
    assert standing(summaries, "loss") is None
    common = at_common_length(summaries)
    assert common is not None
    assert (common[0], common[1][0].measures["loss"].mean) == (2 * TOKENS, 7.0)


def test_seeds_that_failed_or_are_no_number_are_counted_and_said(make: Make):
    runs = make(CLEAR)
    train(runs[0], [7.0])  # old, seed 1
    train(runs[4], [7.0, math.nan])  # new, seed 2
    summaries, axes = read(runs)
    found = notes(summaries, axes)
    assert "old: the means are of 2 of 3 runs (1 failed)." in found
    assert "new: NaN or infinite in 1 of 3 runs (validation loss): not ranked." in found
    assert any(note.startswith("1 step had no finite loss, in method new (seed 2)") for note in found)
    place = standing(summaries, "loss")
    assert place is not None
    assert place.lead.name == "method old", "new's other two seeds are lower, but one diverged"
    table = (study_report(load_study("small.toml"), runs).path.parent / "table.md").read_text()
    assert "| old | 2 of 3 |" in table
    assert "| new | 3 | NaN in 1 of 3 |" in table


def test_steps_that_are_no_number_are_left_out_of_means_over_steps(make: Make):
    runs = make({"old": [4.0]}, steps=20)
    train(runs[0], [*[6.0] * 18, math.nan, 5.0])
    (summary,) = read(runs)[0]
    assert summary.measures["train_loss"].mean == 6.0, "of step 20, and of no other in the last tenth"


@pytest.mark.parametrize(
    ("facts", "text", "measure"),
    [
        ({"device": "H100"}, "differ in device: a test (6 runs) and H100 (3 runs). Times", "step_seconds"),
        ({"tokenizer": "u"}, "different tokenizers: numbers by token are not ranked", "loss"),
        ({"data": "e"}, "trained on different data", "accuracy"),
        ({"git_commit": "a" * 40 + "-dirty"}, f"in their commit: {'a' * 12} and {'a' * 12}-dirty.", ""),
        ({"torch": "2.9"}, "differ in their torch: 2.8 and 2.9", ""),
        (
            {"history": [{"step": 0, "changes": {}}, {"step": 1, "changes": {"optimizer.lr": [0.1, 0.2]}}, None]},
            "configuration (optimizer.lr) was changed on the way in method new (seed 1); method new (seed 2)",
            "",
        ),
    ],
)
def test_runs_that_are_not_alike_are_named_and_not_ranked(make: Make, facts: dict[str, Any], text: str, measure: str):
    runs, known = make(CLEAR), {"torch": "2.8", "git_commit": "a" * 40}
    for run in runs:
        is_new = run.point["method"] == "new"
        train(run, [7.0, CLEAR[run.point["method"]][run.seed - 1]], known | (facts if is_new else {}))
    summaries, axes = read(runs)
    assert any(text in note for note in notes(summaries, axes))
    if measure:
        assert standing(summaries, measure) is None
    assert (standing(summaries, "loss") is None) == (measure in ("loss", "accuracy"))


def test_a_run_json_that_cannot_be_read_is_no_fault(make: Make):
    runs = make(CLEAR)
    (runs[0].folder / "run.json").write_text("{")
    (runs[1].folder / "run.json").write_text('{"history": "x"}')
    (runs[2].folder / "run.json").write_text('{"history": [{"step": 0, "changes": {}, "device": "a test"}]}')
    assert not [note for note in notes(*read(runs)) if "changed" in note]
    assert said(runs).startswith("Lowest")
    assert read_entries(runs)[0].result["device"] is None


def test_a_failed_seed_does_not_cut_the_curve_of_the_others(make: Make):
    runs = make({"old": [4.0] * 3}, steps=6)
    train(runs[1], [7.0, 6.5])
    (panel,) = curve_panels(*read(runs), ["validation/loss"])
    assert "thin and dotted: single runs" in panel.caption
    figure = curves(*read(runs), "validation/loss")
    assert figure is not None
    mean, failed = figure.axes[0].lines
    assert (list(mean.get_xdata()), list(failed.get_xdata())) == ([1, 2, 3, 4, 5, 6], [1, 2])
    assert (failed.get_linestyle(), list(mean.get_ydata())) == (":", [7.0] * 5 + [4.0])


def test_loads_of_different_seeds_say_which(make: Make):
    runs = make({"old": [4.0] * 2, "new": [4.0] * 2})
    (panel,) = load_panel(*read(runs))
    assert "seed 1, step 2: 1 is even" in panel.caption
    train(runs[0], [7.0])
    (panel,) = load_panel(*read(runs))
    titles = [axes.get_title() for axes in panel.figure.axes[:2]]
    assert titles == ["old (seed 2, step 2)", "new (seed 1, step 2)"]


def test_what_the_command_line_changed_is_on_the_page(make: Make):
    runs = make(CLEAR)
    study = load_study("small.toml", ["--optimizer.weight_decay", "0.3", "--data.cache_folder", "x"])
    written = study_report(study, runs)
    assert "Set on the command line, for every run: optimizer.weight_decay = 0.3." in written.findings


def test_keys_that_differ_are_told_where_runs_go_by_their_folders(write: Write, capsys: pytest.CaptureFixture[str]):
    keys = ["optimizer.lr", "optimizer.eps", "optimizer.beta1", "optimizer.beta2"]
    path = write(axes={"all": {"key": keys, "values": [0.1, 0.2]}}, study__seeds=[1], config__training__steps=1)
    runs = runs_of(load_study(path))
    for run in runs:
        train(run, [5.0])
    assert compare([str(run.folder) for run in runs], Path("both"), None) == 0
    shown = capsys.readouterr().out
    assert "The configurations differ in 4 keys: optimizer.lr (0.1 and 0.2), optimizer.beta1 (0.1 and 0.2)" in shown
