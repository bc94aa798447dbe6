"""lm-evaluation-harness on an exported model, offline, by a task of its own; where the extra `lm_eval` is installed."""

import importlib.util
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import _process_as_before  # noqa: F401
from tests.e2e.harness import command
from tests.interop.models import make_checkpoint
from titan_moe.checkpoint import load_model
from titan_moe.convert.hf.convert import from_hf, to_hf
from titan_moe.data.tasks import Templates, make_task, read_questions
from titan_moe.data.tokenizer import Tokenizer, train_bpe
from titan_moe.tasks import score_items

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

installed = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "accelerate")),
    reason="lm-evaluation-harness is not installed (the lm_eval extra has it)",
)


def write(file: Path, *texts: str) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def evaluated(step: Path, file: Path) -> dict[str, float]:
    where = ["--data.path", str(file), "--data.cache_folder", str(file.parent / "cache")]
    ended = command("evaluate", ["--checkpoint", str(step), *where])
    assert ended.code == 0, ended.err
    return {name: float(value) for name, value in (line.split() for line in ended.out.splitlines())}


def lm_eval(folder: Path, tasks: dict[str, str]) -> dict[str, dict[str, Any]]:
    """The results by task of the model in folder/hf; the samples are left in folder/out."""
    (folder / "tasks").mkdir()
    for name, task in tasks.items():
        (folder / "tasks" / f"{name}.yaml").write_text(task)
    model = f"pretrained={folder / 'hf'},dtype=float32,max_length={SEQ}"
    words = ["--model", "hf", "--model_args", model, "--device", "cpu", "--output_path", str(folder / "out")]
    words += ["--include_path", str(folder / "tasks"), "--tasks", ",".join(tasks), "--log_samples"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home")}
    ended = subprocess.run(
        [sys.executable, "-m", "lm_eval", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    (file,) = (folder / "out").rglob("results_*.json")
    return json.loads(file.read_text())["results"]


@installed
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
    task = TASK.replace("FILE", str(write(tmp_path / "text.jsonl", text)))
    results = lm_eval(tmp_path, {"my_text": task})["my_text"]
    theirs = results["bits_per_byte,none"] * len(text.encode()) * 0.6931471805599453
    print(f"loglikelihood: lm-eval {-theirs:.6f}, titan_moe.evaluate {-nats:.6f}")
    assert theirs == pytest.approx(nats, rel=1e-5)
    assert results["bits_per_byte,none"] == pytest.approx(nats / 0.6931471805599453 / (5 * SEQ), abs=1e-4)


QUESTIONS = """
task: NAME
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices.text}}"
doc_to_target: "{{choices.label.index(answerKey)}}"
num_fewshot: SHOTS
fewshot_split: test
fewshot_config: {sampler: first_n}
metric_list:
  - metric: acc
  - metric: acc_norm
"""
PAIRS = """
task: pairs
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: ""
doc_to_target: 0
doc_to_choice: "{{[sentence_good, sentence_bad]}}"
metric_list:
  - metric: acc
"""
CLOZE = """
task: cloze
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
doc_to_target: "{{' '+text.split(' ')[-1]}}"
metric_list:
  - metric: perplexity
  - metric: acc
"""
ARC = {
    "context": "Question: {question}\nAnswer:",
    "choices": "{choices.text}",
    "answer": "{answerKey}",
    "labels": "{choices.label}",
}
TASKS: dict[str, dict[str, Any]] = {
    "arc": ARC,
    "arc_shots": {**ARC, "num_fewshot": 2},
    "pairs": {"context": "", "choices": ["{sentence_good}", "{sentence_bad}"], "answer": "0"},
    "cloze": {"kind": "last_word", "context": "{text}"},
}


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return file


def question_rows() -> dict[str, list[dict[str, Any]]]:
    """Rows of the four tasks: more and fewer choices, characters of several bytes, one longer than the model reads."""
    draw = random.Random(0)
    words = ["cat", "dog", "Größe", "tree", "sky", "東京", "runs", "blue", "a", "the", "of", "one"]

    def text(most: int) -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, most)))

    arc = []
    for index in range(40):
        labels = "ABCDE"[: draw.randint(2, 5)]
        choices = {"text": [text(3) for _ in labels], "label": list(labels)}
        question = text(4) + "?" if index else text(60)
        arc.append({"question": question, "choices": choices, "answerKey": draw.choice(labels)})
    pairs = [{"sentence_good": text(6), "sentence_bad": text(6)} for _ in range(20)]
    return {"arc": arc, "arc_shots": arc, "pairs": pairs, "cloze": [{"text": text(6) + " e"} for _ in range(20)]}


def asked(step: Path, folder: Path) -> dict[str, dict[str, Any]]:
    """The numbers of `evaluate` on TASKS, by task."""
    words: list[str] = []
    for name, table in TASKS.items():
        for key, value in {**table, "path": str(folder / f"{name}.jsonl")}.items():
            words += [f"--validation.tasks.{name}.{key}", *(value if isinstance(value, list) else [str(value)])]
    ended = command("evaluate", ["--checkpoint", str(step), "--json", *words, "--tasks"])
    assert ended.code == 0, ended.err
    return {result.pop("name"): {**result, "path": 0} for result in json.loads(ended.out)["results"]}


def test_a_hugging_face_model_is_asked_once_it_is_imported(tmp_path: Path) -> None:
    step = make_checkpoint(tmp_path / "run")
    for name, rows in question_rows().items():
        write_rows(tmp_path / f"{name}.jsonl", rows)
    to_hf(step, tmp_path / "hf", verify=False)
    from_hf(tmp_path / "hf", tmp_path / "imported", verify=False)
    ours, imported = asked(step, tmp_path), asked(tmp_path / "imported", tmp_path)
    assert ours.keys() == TASKS.keys()
    for name, numbers in ours.items():
        assert imported[name] == pytest.approx(numbers, rel=1e-5)


@installed
@pytest.mark.timeout(600)
def test_tasks_have_the_numbers_of_the_harness(tmp_path: Path) -> None:
    """Also few-shot, without a context, cut at the left, with tokens that begin with spaces or are part of a letter."""
    rows = question_rows()
    tokenizer = train_bpe([json.dumps(rows, ensure_ascii=False)], 320)
    assert len(tokenizer.encode("the cat")) < len(b"the cat") - 2
    step = make_checkpoint(tmp_path / "run", tokenizer=tokenizer)
    files = {name: write_rows(tmp_path / f"{name}.jsonl", of_task) for name, of_task in rows.items()}
    ours = asked(step, tmp_path)
    assert ours.keys() == TASKS.keys()

    to_hf(step, tmp_path / "hf", verify=False)
    yaml = {"arc": QUESTIONS, "arc_shots": QUESTIONS, "pairs": PAIRS, "cloze": CLOZE}
    shots = {"arc_shots": "2"}
    theirs = lm_eval(
        tmp_path,
        {
            name: text.replace("FILE", str(files[name])).replace("NAME", name).replace("SHOTS", shots.get(name, "0"))
            for name, text in yaml.items()
        },
    )
    for name in TASKS:
        compared = {key.partition(",")[0]: value for key, value in theirs[name].items() if key.endswith(",none")}
        print(name, compared, ours[name])
        compared.pop("perplexity_stderr", None)  # theirs is of random samples
        assert len(compared) >= 2
        assert {key: ours[name][key] for key in compared} == pytest.approx(compared, rel=1e-5)
    check_loglikelihoods(step, tmp_path, tokenizer)


def check_loglikelihoods(step: Path, folder: Path, tokenizer: Tokenizer) -> None:
    """Each choice's, of the samples that the harness has left."""
    model, _ = load_model(step)
    for name, table in TASKS.items():
        file = folder / f"{name}.jsonl"
        choices = table.get("choices", "{choices}")
        fields = {key: value for key, value in table.items() if key != "num_fewshot"}
        templates = Templates(**{**fields, "choices": [choices] if isinstance(choices, str) else choices})
        questions = read_questions(str(file), templates, num_fewshot=table.get("num_fewshot", 0))
        task = make_task(questions, templates, tokenizer, seq_len=SEQ)
        scores, is_greedy = score_items(
            model, task, seq_len=SEQ, local_batch_size=3, pad_id=tokenizer.eot_id, device=torch.device("cpu")
        )
        (samples,) = (folder / "out").rglob(f"samples_{name}_2*.jsonl")
        rows = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])
        expected = [response for row in rows for (response,) in row["resps"]]
        assert scores == pytest.approx([float(score) for score, _ in expected], abs=1e-4)
        assert is_greedy == [str(greedy) == "True" for _, greedy in expected]
