"""Runs that a study analyzes: once each, before their checkpoints go, again where it failed; and its numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.study.conftest import Study, Write
from titan_moe.study import cli, runner
from titan_moe.study.grid import Run, runs_of
from titan_moe.study.report.measures import ANALYZED
from titan_moe.study.runs import analysis_scalars, prepare, result
from titan_moe.study.spec import load_study

RUNS = Path("outputs/studies/small/runs")
FAKE = Path(__file__).parent / "fake_analyze.py"


@pytest.fixture(autouse=True)
def _fake_analysis(monkeypatch: pytest.MonkeyPatch) -> None:
    def command(nproc: int) -> Any:
        return lambda run: [sys.executable, str(FAKE), *runner.analyze_command(nproc)(run)[3:]]

    monkeypatch.setattr(cli, "analyze_command", command)


def starts(name: str) -> dict[str, int]:
    return {str(p.parent.relative_to(RUNS)): len(p.read_text().splitlines()) for p in RUNS.glob(f"*/*/{name}")}


def test_finished_runs_are_analyzed_once_before_their_checkpoints_go(write: Write, study: Study) -> None:
    path = write(study__analyze=True, study__keep_checkpoints=False, study__seeds=[1, 13])
    for _ in range(2):
        assert study(path, "--jobs", "2") == 1  # seed 13 fails
    assert starts("analyses") == {"coeff=0/seed-1": 1, "coeff=0.1/seed-1": 1}
    assert not (RUNS / "coeff=0/seed-1/checkpoint").exists()
    runs = {(run.folder.parent.name, run.seed): run for run in runs_of(load_study(path))}
    record = result(runs["coeff=0", 1], "finished")
    assert {name: record[name] for name in ANALYZED if name in record} == {
        "specialisation": 0.5,
        "router_margin": 0.1,
        "dead_experts": 3,
    }
    assert "specialisation" not in result(runs["coeff=0", 13], "failed")


def test_a_failed_analysis_is_told_and_tried_again(
    write: Write, study: Study, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(study__analyze=True, study__keep_checkpoints=False, study__seeds=[1], axes__coeff__values=[0])
    Path("broken").touch()
    assert study(path) == 1
    assert "unanalyzed   coeff 0, seed 1: error: the disk is full" in capsys.readouterr().out
    assert (RUNS / "coeff=0/seed-1/checkpoint").exists()
    Path("broken").unlink()
    assert study(path) == 0
    assert starts("analyses") == {"coeff=0/seed-1": 2}
    assert starts("tries") == {"coeff=0/seed-1": 1}
    assert not (RUNS / "coeff=0/seed-1/checkpoint").exists()


def test_runs_of_before_are_analyzed_where_they_have_checkpoints(write: Write, study: Study) -> None:
    assert study(write()) == 0
    assert starts("analyses") == {}
    (RUNS / "coeff=0/seed-1/checkpoint/step").unlink()
    (RUNS / "coeff=0/seed-1/checkpoint").rmdir()
    assert study(write(study__analyze=True)) == 0
    assert starts("analyses") == {"coeff=0/seed-2": 1, "coeff=0.1/seed-1": 1, "coeff=0.1/seed-2": 1}
    assert set(starts("tries").values()) == {1}


def test_an_analysis_of_another_step_does_not_count(write: Write, study: Study) -> None:
    path = write(study__analyze=True, study__seeds=[1], axes__coeff__values=[0])
    assert study(path) == 0
    run: Run = runs_of(load_study(path))[0]
    assert analysis_scalars(run)["specialisation"] == 0.5
    file = run.folder / "analysis" / "analysis.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "checkpoint": {"step": 4}}))
    assert analysis_scalars(run) == {}


def test_own_code_of_the_study_is_trusted(write: Write) -> None:
    """The configuration is the user's own, as in training."""
    path = write(config__balancer={"tests.parts:everything": {"coeff": 0.1}}, axes__coeff=None)
    run = runs_of(load_study(path))[0]
    prepare(run)
    assert runner.analyze_command(1)(run)[-2:] == ["--trust_components", "tests.parts"]


def recorded_analyses(script: Path, number: int, folder: Path) -> list[list[str]]:
    """The words that each task of the array gives an analysis, by a python that writes them down and ends well."""
    for task in range(number):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(task), "RECORD": str(folder / f"words-{task}")}
        subprocess.run(["bash", str(script)], env=environment, check=True)
    return [(folder / f"words-{task}").read_text().splitlines() for task in range(number)]


def test_slurm_gives_each_analysis_the_words_of_its_run(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own folder of checkpoints, whatever is in the name, and the own code that its configuration names."""
    from titan_moe.study import slurm

    python = tmp_path / "a $HOME python"
    python.write_text('#!/bin/sh\n[ "$2" = titan_moe.analyze ] && shift 2 && printf "%s\\n" "$@" > "$RECORD"\nexit 0\n')
    python.chmod(0o755)
    monkeypatch.setattr("titan_moe.study.runner.sys.executable", str(python))
    folders = {"key": "checkpoint.folder", "values": ["kept", "it's $HOME"]}
    routers = {"key": "router.name", "values": ["topk_softmax", "examples.router:softplus"]}
    study = load_study(write(study__analyze=True, study__seeds=[1], axes={"folder": folders, "router": routers}))
    runs = runs_of(study)
    for run in runs:
        prepare(run)
    script = slurm.write_script(study, runs, 1)
    want = []
    for run in runs:
        words = ["--checkpoint", str(run.folder / str(run.point["folder"])), "--out", str(run.folder / "analysis")]
        is_own = run.point["router"] != "topk_softmax"
        want.append([*words, "--trust_components", "examples.router"] if is_own else words)
    assert len(want) == 4
    assert recorded_analyses(script, 4, tmp_path) == want


def test_slurm_analyzes_what_has_finished(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from titan_moe.study import slurm

    python = tmp_path / "a python"
    tests = Path(__file__).parent
    python.write_text(
        "#!/bin/sh\nverb=${2#titan_moe.}\nshift 2\n"
        f'OMP_NUM_THREADS=1 exec {sys.executable} {tests}/fake_$verb.py "$@"\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr("titan_moe.study.runner.sys.executable", str(python))
    study = load_study(write(study__analyze=True, study__seeds=[1, 13], axes__coeff__values=[0]))
    runs = runs_of(study)
    for run in runs:
        prepare(run)
    script = slurm.write_script(study, runs, 1)
    for task in ("0", "1"):
        subprocess.run(["bash", str(script)], env={**os.environ, "SLURM_ARRAY_TASK_ID": task}, check=True)
    assert starts("analyses") == {"coeff=0/seed-1": 1}
    assert analysis_scalars(runs[0])["specialisation"] == 0.5


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"study__report": ["loss", "specialisation"]}, "'specialisation' is of an analysis: set study.analyze = true"),
        ({"study__analyze": True, "config__checkpoint": {"enable": False}}, "not checkpoint.enable = false"),
        (
            {"study__analyze": True, "config__moe": {"num_experts": 0}, "config__balancer": {}},
            "not moe.num_experts = 0",
        ),
        ({"study__analyze": "yes"}, "study.analyze"),
    ],
)
def test_mistakes(write: Write, study: Study, changes: dict[str, Any], part: str) -> None:
    changes.setdefault("axes__coeff", {"key": "optimizer.lr", "values": [0.1]})
    with pytest.raises(ValueError, match=r"small\.toml") as caught:
        study(write(**changes))
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
