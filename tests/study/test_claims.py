"""The page of claims: contrasts paired by seed, verdicts from intervals, and what a file of claims may not say."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from titan_moe.config.layers import tomllib
from titan_moe.study.grid import expand
from titan_moe.study.report.claims import claims, judge, overall
from titan_moe.study.spec import load_study

STUDIES = Path(__file__).parents[2] / "train_configs/studies"
NOISE = {1: 0.0, 2: 0.5, 3: -0.4}  # of a seed, the same at all points


def results(losses: dict[str, list[float]], state: str = "finished") -> list[dict[str, Any]]:
    return [
        {"point": {"method": name}, "name": f"method {name}", "seed": seed, "state": state, "loss": loss + NOISE[seed]}
        for name, values in losses.items()
        for seed, loss in enumerate(values, 1)
    ]


def contrast(expect: str, **more: Any) -> dict[str, Any]:
    points = {"plus": [{"method": "new"}], "minus": [{"method": "old"}]}
    return {"says": "new less old", "study": "one", **points, "measure": "loss", "expect": expect, **more}


def test_a_contrast_is_paired_by_seed_with_students_interval():
    found = judge(contrast("lower"), results({"old": [4.0, 4.0, 4.0], "new": [3.9, 3.8, 3.7]})).value
    assert found is not None
    assert found.mean == pytest.approx(-0.2)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3))  # t of a table, 2 degrees of freedom
    assert found.count == 3


@pytest.mark.parametrize(
    ("new", "expect", "margin", "verdict"),
    [
        ([3.90, 3.91, 3.89], "lower", None, "agree"),
        ([3.90, 3.91, 3.89], "higher", None, "disagree"),
        ([3.9, 4.3, 3.7], "lower", None, "can't tell"),
        ([4.01, 4.00, 3.99], "equal", 0.05, "agree"),
        ([4.10, 4.11, 4.09], "equal", 0.05, "disagree"),
        ([4.05, 4.01, 4.09], "equal", 0.05, "can't tell"),
        ([3.9], "lower", None, "can't tell"),
        ([], "lower", None, "not run"),
    ],
)
def test_verdicts(new: list[float], expect: str, margin: float | None, verdict: str):
    more = {} if margin is None else {"margin": margin}
    lines = [*results({"old": [4.0] * 3, "new": new}), *results({"new": [5.0]}, "failed")]
    assert judge(contrast(expect, **more), lines).verdict == verdict


def test_unfinished_runs_do_not_count_and_a_wrong_point_is_named():
    done, going = results({"old": [4.0, 4.0]}), results({"new": [3.0, 3.0]}, "running")
    assert judge(contrast("lower"), [*done, *going]).verdict == "not run"
    with pytest.raises(ValueError, match=r"one has no point .* give one of its results"):
        judge(contrast("lower"), done)


def test_differences_of_differences():
    both = contrast("lower", plus=[{"method": "a"}, {"method": "d"}], minus=[{"method": "b"}, {"method": "c"}])
    found = judge(both, results({"a": [1.0, 1.1], "b": [2.0, 2.1], "c": [5.0, 5.0], "d": [5.5, 5.5]})).value
    assert found is not None
    assert found.mean == pytest.approx(-0.5)


def test_a_claim_in_parts():
    clear, noisy = [3.90, 3.91, 3.89], [3.9, 4.3, 3.7]
    agree, disagree, unclear = (
        judge(contrast(expect), results({"old": [4.0] * 3, "new": new}))
        for expect, new in (("lower", clear), ("higher", clear), ("lower", noisy))
    )
    assert overall([agree, agree]) == "agree"
    assert overall([agree, disagree]) == overall([agree, unclear]) == "partly"
    assert overall([disagree, unclear]) == "disagree"
    assert overall([unclear, unclear]) == "can't tell"


def write_claims(folder: Path, **change: Any) -> Path:
    text = {"claim": "New is better", "where": "Figure 1", "paper": "-0.1"}
    document = {"title": "Page", "introduction": "", "studies": {"one": "a study."}, "figures": {"one": ["loss"]}}
    one = {key: value for key, value in {**contrast("lower"), **change}.items() if value is not None}
    (folder / "claims.toml").write_text(tomli_w.dumps({**document, "claims": [{**text, "contrasts": [one]}]}))
    return folder / "claims.toml"


def test_the_page_has_numbers_tables_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    study = tmp_path / "studies/one"
    (study / "figures").mkdir(parents=True)
    (study / "figures/loss.png").write_bytes(b"picture")
    (study / "table.md").write_text("| table |\n")
    lines = results({"old": [4.0] * 3, "new": [3.9, 3.8, 3.7]})
    (study / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    args = [str(write_claims(tmp_path)), "--studies", str(tmp_path / "studies"), "--out", str(tmp_path / "page")]
    assert claims(args) == 0
    text = (tmp_path / "page/README.md").read_text()
    row = "new less old (validation loss): -0.2000 ± 0.2484 (3 seeds, can't tell) | **can't tell** |"
    assert "can't tell     New is better\n" in capsys.readouterr().out
    assert f"| New is better (Figure 1) | -0.1 | {row}" in text
    assert "- `one`: a study. [Table](one/table.md)." in text
    assert "![one: loss](one/loss.png)" in text
    assert (tmp_path / "page/one/loss.png").read_bytes() == b"picture"


FACTS = {
    **{"name": "p", "dataset": "text", "path": ["/data/novels.jsonl"], "tokenizer": "bytes", "device": "a test"},
    **{"parameters": 98_000_000, "active_parameters": 41_000_000, "step": 70, "num_tokens": 573_440},
}


def write_study(folder: Path, lines: list[dict[str, Any]]) -> None:
    folder.mkdir(parents=True)
    (folder / "table.md").write_text("| table |\n")
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def run_claims(folder: Path, file: Path) -> str:
    assert claims([str(file), "--studies", str(folder), "--out", str(folder / "page")]) == 0
    return (folder / "page/README.md").read_text()


def test_the_page_tells_the_runs_that_were_measured_and_not_ours(tmp_path: Path):
    """The shipped claims over somebody's results: sizes, data and lengths are those of the runs."""
    points = [{"coeff": coeff} for coeff in (0, 0.001, 0.01, 0.1, 0.2, 0.6)]
    lines = [
        {**FACTS, "point": point, "seed": seed, "state": "finished", "loss": 3.0 + noise, "maxvio_global": 0.5}
        for point in points
        for seed, noise in NOISE.items()
    ]
    write_study(tmp_path / "aux_coeff_mini", lines)
    text = run_claims(tmp_path, STUDIES / "claims/mini.toml")
    row = "| 98 M (41 M) | 70 steps (573,440 tokens) | 3 | 18 of 18 | text, novels.jsonl | bytes | a test |"
    assert f"| `aux_coeff_mini` {row}" in text
    for ours in ("3.2 M", "FineWeb", "fineweb", "web_gov", "11.5", "409,600", "BPE", "Balance reproduces", "nats"):
        assert ours not in text.replace("validation loss (nats", ""), ours
    assert "| `top_k_mini` | - | - | - | 0 of 0 |" in text


def test_verdicts_are_no_faults_but_no_results_at_all_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = write_claims(tmp_path, expect="higher")
    args = [str(file), "--studies", str(tmp_path), "--out", str(tmp_path / "page")]
    with pytest.raises(ValueError, match="none of one has results here: run one"):
        claims(args)
    assert not (tmp_path / "page").exists()
    write_study(tmp_path / "one", results({"old": [4.0] * 3, "new": [3.90, 3.91, 3.89]}))
    assert claims(args) == 0
    said = capsys.readouterr().out
    assert "disagree       New is better\n" in said
    assert "-0.1000 ± 0.0248 (3 seeds, disagree)" in said
    assert "1 claim: 1 disagree\n" in said
    assert "1 difference was judged, by a 95 % interval" in said


def test_verdicts_that_do_not_stay_when_many_are_judged_have_no_mark():
    lines = results({"old": [4.0] * 3, "new": [3.90, 3.91, 3.89]})
    assert judge(contrast("lower"), lines, 2).at_once
    assert not judge(contrast("lower"), lines, 50).at_once, "t(1 - 0.025 / 50, 2) is 31.6, 7.3 times t(0.975, 2)"
    assert judge(contrast("lower"), lines, 50).verdict == "agree"


def test_differences_of_percentages_are_in_points():
    lines = [{**line, "accuracy": line["loss"] / 100} for line in results({"old": [4.0] * 3, "new": [4.1, 4.1, 4.1]})]
    found = judge(contrast("equal", measure="accuracy", margin=0.005), lines)
    assert found.number == "+0.10 points ± 0.00 points (3 seeds, margin 0.5 points, agree)"


def test_seeds_that_are_missing_are_counted(tmp_path: Path):
    lines = results({"old": [4.0] * 3, "new": [3.90, 3.91, 3.89]})
    lines[-1]["loss"] = None  # NaN
    assert "(2 of 3 seeds, " in judge(contrast("lower"), lines).number
    lines[-2]["state"] = "failed"
    found = judge(contrast("lower"), lines)
    assert (found.number, found.verdict) == ("-0.1000 (1 of 3 seeds, no interval, can't tell)", "can't tell")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"num_tokens": 9}, "the runs differ in length"),
        ({"tokenizer_fingerprint": "other"}, "the runs have different tokenizers"),
        ({"data_fingerprint": "other"}, "the runs are validated on different data"),
    ],
)
def test_runs_that_are_not_alike_are_not_judged(change: dict[str, Any], reason: str):
    lines = results({"old": [4.0] * 3, "new": [3.90, 3.91, 3.89]})
    known = {**FACTS, "tokenizer_fingerprint": "t", "data_fingerprint": "d"}
    lines = [{**known, **line, **(change if line["point"]["method"] == "new" else {})} for line in lines]
    found = judge(contrast("lower"), lines)
    assert found.verdict == "not comparable"
    assert reason in found.number


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"studdy": "one"}, "contrasts.studdy: there is no such key"),
        ({"says": None}, "contrasts.says: is missing"),
        ({"study": "two"}, "study 'two' is not among studies"),
        ({"measure": "los"}, "measure 'los' is none of loss,"),
        ({"expect": "less"}, "expect 'less' is none of lower, higher, equal"),
        ({"expect": "equal"}, 'margin is for expect = "equal"'),
    ],
)
def test_mistakes_in_a_file_of_claims(tmp_path: Path, change: dict[str, Any], part: str):
    with pytest.raises(ValueError, match="claims") as caught:
        claims([str(write_claims(tmp_path, **change)), "--studies", str(tmp_path), "--out", str(tmp_path / "page")])
    assert part in str(caught.value)
    assert not (tmp_path / "page").exists()


def test_the_shipped_claims_are_about_points_of_the_shipped_studies():
    document = tomllib.loads((STUDIES / "claims/mini.toml").read_text(encoding="utf-8"))
    points = {name: expand(load_study(str(STUDIES / f"{name}.toml"), [], "")) for name in document["studies"]}
    for claim in document["claims"]:
        for one in claim["contrasts"]:
            assert all(point in points[one["study"]] for point in (*one["plus"], *one["minus"])), one["says"]
