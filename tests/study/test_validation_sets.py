"""Validation sets in studies: their numbers in results, table, figures and comparisons."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import Write
from titan_moe.study import cli
from titan_moe.study.grid import runs_of
from titan_moe.study.report.likeness import unlike
from titan_moe.study.report.measures import Measure, curve_of, is_measure, measure_of, set_of
from titan_moe.study.spec import load_study

SETS = {"freq": 4, "sets": {"code": {"path": "code.txt"}, "law": {"path": "law.txt"}}}
SHOWN = ["loss", "validation/code/loss", "validation/law/bits_per_byte"]


def test_a_report_shows_the_sets(write: Write, fake: None, tmp_path: Path) -> None:
    path = write(config__validation=SETS, study__report=SHOWN, study__curves=["validation/code/loss"])
    assert cli.main([path]) == 0

    # results.jsonl has the numbers of the last validation, as its record in metrics.jsonl has them
    home = Path("outputs/studies/small")
    results = [json.loads(line) for line in (home / "results.jsonl").read_text().splitlines()]
    assert len(results) == 4
    for result in results:
        lines = [json.loads(line) for line in (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if line["kind"] == "validation"][-1]
        keys = [f"validation/{name}/{key}" for name in ("code", "law") for key in ("loss", "bits_per_byte")]
        assert {key: result[key] for key in keys} == {key: last[key] for key in keys}
        assert result["validation/code/num_tokens"] == 640
        assert not any("/layer_" in key for key in result)

    # the table has each set's loss, asked for or not, and what else was asked for
    head = (home / "table.md").read_text().splitlines()[0]
    for title in ("validation loss, code (nats/token)", "validation loss, law (nats/token)", "bits per byte, law"):
        assert f"| {title} |" in head
    figures = {file.name for file in (home / "figures").iterdir()}
    assert {"validation_code_loss_by_point.svg", "validation_law_bits_per_byte_by_point.svg"} <= figures
    assert "curve_validation_code_loss.svg" in figures


def test_runs_without_the_set_are_told(write: Write) -> None:
    runs = runs_of(load_study(write(config__validation=SETS, study__report=SHOWN)))
    assert all(run.config.validation.sets.keys() == {"code", "law"} for run in runs)
    for changes, part in (
        (
            {"study__report": ["validation/cod/loss"]},
            "study.report: 'validation/cod/loss': no run has a validation set",
        ),
        ({"study__curves": ["validation/cod/loss"]}, "there are code, law; add [config.validation.sets.cod]"),
        ({"study__report": ["validation/code/lost"]}, "'validation/code/lost' is none of loss, "),
        ({"study__report": ["validation/a/b/loss"]}, "or validation/NAME/KEY of a validation set, KEY in loss, "),
    ):
        with pytest.raises(ValueError, match=r"small\.toml") as caught:
            runs_of(load_study(write(config__validation=SETS, **changes)))
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)


def test_names_of_measures() -> None:
    assert (set_of("validation/code/loss"), set_of("validation/loss"), set_of("loss")) == ("code", None, None)
    assert not is_measure("validation/code/num_tokens")
    assert not is_measure("validation/code/maxvio_global/layer_0")
    assert measure_of("validation/code/accuracy") == measure_of("accuracy")._replace(label="accuracy, code")
    assert curve_of("validation/code/loss").label == "validation loss, code (nats/token)"


def test_sets_of_one_name_with_other_data_are_not_compared() -> None:
    def runs(**second: Any) -> list[dict[str, Any]]:
        first = {"num_tokens": 9, "tokenizer_fingerprint": "t", "validation_sets": {"code": "x", "law": "y"}}
        first |= {"validation/code/num_tokens": 4, "validation/law/num_tokens": 4}
        return [first, {**first, **second}]

    loss, bits = "validation/code/loss", "validation/code/bits_per_byte"
    assert unlike(runs(), loss) == unlike(runs(), bits) == ""
    other = runs(validation_sets={"code": "z", "law": "y"})
    assert unlike(other, loss) == unlike(other, bits) == "the runs are validated on different data"
    assert unlike(other, "validation/law/loss") == unlike(other, "loss") == ""
    assert unlike(runs(**{"validation/code/num_tokens": 8}), loss) == "the runs are validated on different data"
    assert "their tokens are not the same" in unlike(runs(tokenizer_fingerprint="u"), loss)
    assert "different parts of the text" in unlike(runs(tokenizer_fingerprint="u"), bits)


def test_tasks_have_measures_of_their_own(write: Write) -> None:
    tasks = {**SETS, "tasks": {"arc": {"path": "arc.jsonl"}}}
    shown = ["validation/arc/acc", "validation/arc/perplexity", "validation/code/perplexity"]
    runs = runs_of(load_study(write(config__validation=tasks, study__report=shown, study__curves=shown)))
    assert all(run.config.validation.tasks.keys() == {"arc"} for run in runs)
    for name, part in (
        ("validation/code/acc", "no run has a validation task code: there are arc; add [config.validation.tasks.code]"),
        ("validation/arc/loss", "no run has a validation set arc: there are code, law"),
        ("validation/arc/f1", "or of a task, KEY in acc, acc_norm, perplexity"),
    ):
        with pytest.raises(ValueError, match=r"small\.toml") as caught:
            runs_of(load_study(write(config__validation=tasks, study__report=[name])))
        assert part in str(caught.value)
    assert measure_of("validation/arc/acc_norm") == Measure("acc_norm, arc", "higher", ".2%")
    assert curve_of("validation/arc/acc").label == "acc, arc"


def test_a_report_shows_the_tasks(write: Write, fake: None, tmp_path: Path) -> None:
    tasks = {"freq": 4, "tasks": {"arc": {"path": "arc.jsonl"}}}
    assert cli.main([write(config__validation=tasks, study__curves=["validation/arc/acc"])]) == 0
    home = Path("outputs/studies/small")
    for result in map(json.loads, (home / "results.jsonl").read_text().splitlines()):
        lines = [json.loads(line) for line in (Path(result["folder"]) / "metrics.jsonl").read_text().splitlines()]
        assert result["validation/arc/acc"] == lines[-1]["validation/arc/acc"]
        assert "validation/arc/num_questions" not in result
    assert "| acc, arc |" in (home / "table.md").read_text().splitlines()[0]
    assert (home / "figures" / "curve_validation_arc_acc.svg").exists()


def test_tasks_are_compared_whatever_the_tokens_are() -> None:
    first = {"num_tokens": 9, "tokenizer_fingerprint": "t", "validation_sets": {"arc": "x"}, "validation/arc/acc": 0.5}
    for key in ("acc", "perplexity"):
        measure = f"validation/arc/{key}"
        assert unlike([first, {**first, "tokenizer_fingerprint": "u"}], measure) == ""
        other = {**first, "validation_sets": {"arc": "z"}}
        assert unlike([first, other], measure) == "the runs are asked different questions"
