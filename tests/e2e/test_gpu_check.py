"""scripts/gpu_check.py on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_check.py"
PARTS = ("env", "train_compiled", "profile", "layer", "optimizers")


def check(out: Path, *more: str) -> tuple[str, dict[str, dict[str, object]]]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--out", str(out), "--tiny", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout, json.loads((out / "results.json").read_text())


@pytest.mark.timeout(600)
def test_parts_on_a_cpu(tmp_path: Path) -> None:
    text, results = check(tmp_path, "--parts", *PARTS)
    assert tuple(results) == PARTS
    failed = {name: found for name, found in results.items() if "failed" in str(found)}
    assert not failed, (tmp_path / "log.txt").read_text()
    assert "tokens/s" in str(results["train_compiled"]["learned balance"])
    assert "x roof" in str(results["layer"]["256 eager titan_moe"])
    assert (tmp_path / "table.txt").read_text().strip() in text
    assert (tmp_path / "profile.txt").read_text().count(" ms ") > 10


def test_what_does_not_fit_the_budget_is_left_out(tmp_path: Path) -> None:
    text, results = check(tmp_path, "--parts", "env", "head", "--budget", "15.5")
    assert "python" in results["env"]
    assert "left" in str(results["head"])
    assert "left out" in text
