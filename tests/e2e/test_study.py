"""A study of real trainings by its command: cut off, gone on with, widened; then its runs compared."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tomli_w

from tests.e2e.harness import PATIENCE, TINY, command


def end(process: subprocess.Popen[str]) -> None:
    """Leave nothing behind, also when the test failed."""
    process.kill()
    process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_from_the_command_line(tmp_path: Path, shared: Path, request: pytest.FixtureRequest):
    data = {"data": {**TINY["data"], "path": [str(shared / "text.jsonl")], "cache_folder": str(shared / "cache")}}
    document = {
        "study": {"seeds": [1, 2], "keep_checkpoints": False},
        "config": {**TINY, **data, "training": {**TINY["training"], "steps": 40}},
        "axes": {"coeff": {"key": "balancer.aux_loss.coeff", "values": [0.1]}},
    }
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(document))
    words = [sys.executable, "-m", "titan_moe.study", str(file), "--dump_folder", str(tmp_path / "out"), "--jobs", "2"]
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path.cwd())
    request.addfinalizer(lambda: end(running))
    runs = [tmp_path / "out" / "runs" / "coeff=0.1" / f"seed-{seed}" for seed in (1, 2)]
    limit = time.monotonic() + PATIENCE
    while not all((run / "metrics.jsonl").exists() for run in runs):
        assert running.poll() is None, running.communicate()
        assert time.monotonic() < limit
        time.sleep(0.01)
    os.kill(running.pid, signal.SIGINT)
    out, err = running.communicate(timeout=3 * PATIENCE)
    assert (running.returncode, err) == (128 + signal.SIGINT, "")
    assert "stopped by SIGINT: the same command goes on from here" in out
    cut = {run: last_step(run) for run in runs}
    assert all(list((run / "checkpoint").glob("step-*")) or step == 40 for run, step in cut.items())

    document["axes"]["coeff"]["values"] = [0.1, 0.2]
    document["study"]["seeds"] = [1]
    file.write_text(tomli_w.dumps(document))
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=3 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    results = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    assert [(r["name"], r["seed"], r["state"], r["step"]) for r in results] == [
        ("coeff 0.1", 1, "finished", 40),
        ("coeff 0.2", 1, "finished", 40),
    ]
    losses = [json.loads(line) for line in (runs[0] / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in losses if line["kind"] == "train"] == list(range(1, 41))
    assert results[0]["loss"] < 4.5
    assert results[0]["device"]
    assert not (runs[0] / "checkpoint").exists()
    page = (tmp_path / "out" / "report.html").read_text()
    assert 'id="loads"' in page, "real validations say how each expert was loaded"

    words = ["--compare", *map(str, runs)]
    compared = command("study.__main__", [*words, "--dump_folder", str(tmp_path / "both")])
    assert (compared.code, compared.err) == (0, "")
    results = [json.loads(line) for line in (tmp_path / "both" / "results.jsonl").read_text().splitlines()]
    assert [r["seed"] for r in results] == [1, 2]

    compared = command("study.__main__", [*words, "no/such"])
    assert (compared.code, compared.err) == (2, "error: --compare no/such: no such folder\n")


def last_step(run: Path) -> int:
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]


@pytest.mark.slow
def test_a_study_analyzes_its_runs(tmp_path: Path, shared: Path):
    """What the analyses found is in results.jsonl and drawn; checkpoints go after them."""
    data = {"data": {**TINY["data"], "path": [str(shared / "text.jsonl")], "cache_folder": str(shared / "cache")}}
    document = {
        "study": {"analyze": True, "keep_checkpoints": False, "report": ["loss", "specialisation"]},
        "config": {**TINY, **data},
        "axes": {"coeff": {"key": "balancer.aux_loss.coeff", "values": [0.1, 0.2]}},
    }
    file = tmp_path / "tiny.toml"
    file.write_text(tomli_w.dumps(document))
    words = [sys.executable, "-m", "titan_moe.study", str(file), "--dump_folder", str(tmp_path / "out"), "--jobs", "2"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=3 * PATIENCE)
    assert (done.returncode, done.stderr) == (0, "")
    for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines():
        result = json.loads(line)
        analysis = json.loads((Path(result["folder"]) / "analysis" / "analysis.json").read_text())
        assert analysis["checkpoint"]["step"] == 6
        assert {name: result.get(name) for name in analysis["scalars"]} == analysis["scalars"]
        assert result["specialisation"] > 0
        assert analysis["loss"] == pytest.approx(result["loss"], rel=1e-5)
        assert not (Path(result["folder"]) / "checkpoint").exists()
    assert list((tmp_path / "out" / "figures").glob("specialisation*.svg"))
