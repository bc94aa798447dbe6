"""lm-evaluation-harness on an exported model, offline, by a task of its own; where the extra `lm_eval` is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import _process_as_before  # noqa: F401
from tests.e2e.harness import command
from tests.interop.models import make_checkpoint
from titan_moe.convert.hf.convert import to_hf

SEQ = 64  # of the model
TASK = """
task: my_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - metric: bits_per_byte
"""


def write(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def evaluated(step: Path, file: Path) -> dict[str, float]:
    where = ["--data.path", str(file), "--data.cache_folder", str(file.parent / "cache")]
    ended = command("evaluate", ["--checkpoint", str(step), *where])
    assert ended.code == 0, ended.err
    return {name: float(value) for name, value in (line.split() for line in ended.out.splitlines())}


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
    reason="lm-evaluation-harness is not installed (the lm_eval extra has it)",
)
@pytest.mark.timeout(600)
def test_bits_per_byte_are_those_of_our_evaluation(tmp_path: Path) -> None:
    """Theirs begins with an end of text and cuts the rest as we do; so does the second text of ours after a first."""
    first, text = ("a big dog ran away. " * 4)[:SEQ], ("The cat sat on the mat, Größe 12! " * 12)
    text = text.encode()[: 5 * SEQ].decode()
    step = make_checkpoint(tmp_path / "run")
    both = evaluated(step, write(tmp_path / "both.jsonl", first, text))
    alone = evaluated(step, write(tmp_path / "first.jsonl", first))
    assert (both["num_tokens"], alone["num_tokens"]) == (6 * SEQ, SEQ)
    nats = both["loss"] * 6 * SEQ - alone["loss"] * SEQ

    to_hf(step, tmp_path / "hf", verify=False)
    (tmp_path / "tasks").mkdir()
    task = TASK.replace("FILE", str(write(tmp_path / "text.jsonl", text)))
    (tmp_path / "tasks" / "my_text.yaml").write_text(task)
    model = f"pretrained={tmp_path / 'hf'},dtype=float32,max_length={SEQ}"
    words = ["--model", "hf", "--model_args", model, "--device", "cpu", "--output_path", str(tmp_path / "out")]
    words += ["--include_path", str(tmp_path / "tasks"), "--tasks", "my_text"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    ended = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results: dict[str, Any] = json.loads(file.read_text())["results"]["my_text"]
    theirs = results["bits_per_byte,none"] * len(text.encode()) * 0.6931471805599453
    print(f"loglikelihood: lm-eval {-theirs:.6f}, titan_moe.evaluate {-nats:.6f}")
    assert theirs == pytest.approx(nats, rel=1e-5)
    assert results["bits_per_byte,none"] == pytest.approx(nats / 0.6931471805599453 / (5 * SEQ), abs=1e-4)
