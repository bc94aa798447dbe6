"""Tasks at validations and by `evaluate`: a run stays as it is, numbers are the same in every layout."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Ended, command, end_two, records, start_two
from titan_moe.checkpoint import load_model

Train = Callable[..., Ended]
WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "while",
    "some",
    "dog",
    "ran",
    "far",
    "from",
    "our",
    "big",
    "red",
    "house",
]


@pytest.fixture
def tasks(tmp_path: Path) -> dict[str, Any]:
    """[validation.tasks]: which word comes next, of some choices and as a cloze."""
    draw = random.Random(0)
    rows = []
    for _ in range(30):
        *context, right = draw.choices(WORDS, k=3)
        choices = [right, *draw.choices(WORDS, k=draw.randint(1, 3))]
        rows.append(
            {"context": " ".join(context), "choices": choices, "answer": 0, "text": " ".join([*context, right])}
        )
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"words": {"path": str(path)}, "last": {"path": str(path), "kind": "last_word", "context": "{text}"}}


def of_task(record: dict[str, Any], name: str) -> dict[str, Any]:
    prefix = f"validation/{name}/"
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


@torch.no_grad()
def by_hand(run: Path, rows: list[dict[str, Any]]) -> list[list[float]]:
    """The log-likelihood of each choice, from the logits of its sequence alone in float64."""
    model, _ = load_model(run)
    scores = []
    for row in rows:
        context = row["context"].encode()
        scores.append([])
        for choice in row["choices"]:
            ids = torch.tensor([[*context, *f" {choice}".encode()]])[:, -17:]
            log_probs = model(ids[:, :-1])[0].double().log_softmax(-1).gather(-1, ids[:, 1:].unsqueeze(-1))
            scores[-1].append(log_probs[0, -len(choice) - 1 :].sum().item())
    return scores


def test_tasks_are_measured_and_the_run_stays_as_it_is(train: Train, tasks: dict[str, Any], tmp_path: Path) -> None:
    tasks["last"]["freq"] = 4
    often = {"validation__freq": 2, "moe__expert_dropout": 0.1}  # dropout: a run that draws random numbers
    assert train("plain", **often).code == 0
    ended = train("run", **often, validation__tasks=tasks, metrics__enable_tensorboard=True)
    assert ended.code == 0, ended.err

    # training, with its balancers' states, and the rest of each validation are equal to the bit
    assert records(tmp_path / "run") == records(tmp_path / "plain")
    validations = records(tmp_path / "run", "validation")
    rest = [{k: v for k, v in one.items() if not k.startswith("validation/")} for one in validations]
    assert rest == records(tmp_path / "plain", "validation")
    assert [one["step"] for one in validations if of_task(one, "words")] == [2, 4, 6]
    assert [one["step"] for one in validations if of_task(one, "last")] == [4, 6]

    # right is what has the largest sum, or the largest by character
    rows = [json.loads(line) for line in (tmp_path / "words.jsonl").read_text().splitlines()]
    scores = by_hand(tmp_path / "run", rows)
    norms = [
        [s / len(c) for s, c in zip(of, row["choices"], strict=True)] for of, row in zip(scores, rows, strict=True)
    ]
    numbers = of_task(validations[-1], "words")
    assert numbers["acc"] == sum(of.index(max(of)) == 0 for of in scores) / 30
    assert numbers["acc_norm"] == sum(of.index(max(of)) == 0 for of in norms) / 30
    assert numbers["num_questions"] == 30
    perplexity = of_task(validations[-1], "last")["perplexity"]
    assert perplexity == pytest.approx(torch.tensor([-of[0] for of in scores]).double().mean().exp().item(), rel=1e-5)

    # people see them, too
    last = ended.out.partition("step 6/6  validation")[2].splitlines()
    assert last[1].split()[0] == "words"
    assert f"acc {numbers['acc']:6.2%}  acc_norm" in last[1]
    assert f"perplexity {perplexity:9.2f}" in last[2]
    assert "validation.tasks.words: 30 questions, " in ended.err
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["validation_sets"].keys() == {"words", "last"}


def test_evaluate_asks_them_of_a_checkpoint(train: Train, tasks: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("run", validation__tasks=tasks).code == 0
    (*_, last) = records(run, "validation")
    document = json.loads(command("evaluate", ["--checkpoint", str(run), "--json"]).out)
    assert [result["name"] for result in document["results"]] == ["validation", "words", "last"]
    for result in document["results"][1:]:
        assert result["path"] == [tasks["words"]["path"]]
        assert {k: v for k, v in result.items() if k not in ("name", "path")} == pytest.approx(
            of_task(last, result["name"]), rel=1e-6
        )

    # alone, in a table, and with keys of the command line
    head, *rows = command("evaluate", ["--checkpoint", str(run), "--tasks"]).out.splitlines()
    assert head.split()[:4] == ["acc", "acc_stderr", "acc_norm", "acc_norm_stderr"]
    assert [row.split()[0] for row in rows] == ["words", "last"]
    words = ["--tasks", "words", "--validation.tasks.words.limit", "10", "--json"]
    (only,) = json.loads(command("evaluate", ["--checkpoint", str(run), *words]).out)["results"]
    assert (only["name"], only["num_questions"]) == ("words", 10)
    for words, part in (
        (["--tasks", "word"], "--tasks word: no such task: there are words, last"),
        (["--tasks", "words", "--data.path", "a.txt"], "--tasks has no use with --data.path"),
        (["--validation.tasks.words.path", "none.jsonl"], "validation.tasks.words.path: no such file"),
    ):
        ended = command("evaluate", ["--checkpoint", str(run), *words])
        assert ended.code == 2
        assert part in ended.err.splitlines()[-1]


@pytest.mark.parametrize(
    "layout",
    ["data_parallel_replicate", "data_parallel_shard", "expert_parallel", "context_parallel", "tensor_parallel"],
)
def test_two_processes_give_the_same_numbers(
    arguments: Arguments, train: Train, tasks: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    """Also where a rank has nothing left of a task's last batch."""
    options = {"validation__tasks": tasks, "validation__local_batch_size": 7, "training__steps": 3}
    assert train("one", **options).code == 0
    words = [*arguments("two", **options), f"--parallelism.{layout}_degree", "2"]
    assert end_two(start_two(words, tmp_path / "log")) == [0, 0]
    (one,), (two,) = (records(tmp_path / name, "validation") for name in ("one", "two"))
    for name in tasks:
        assert of_task(two, name) == pytest.approx(of_task(one, name), rel=1e-5)


def test_bad_tasks_end_in_a_line(train: Train, tasks: dict[str, Any], tmp_path: Path) -> None:
    words = tasks["words"]
    (tmp_path / "bad.jsonl").write_text('{"context": "a", "choices": ["b", "c"], "answer": 2}\n')
    text = {"path": str(tmp_path / "bad.jsonl")}
    cases: list[tuple[dict[str, Any], str]] = [
        ({"validation__tasks": {"a/b": words}}, "validation.tasks.a/b: a name is of letters"),
        ({"validation__tasks": {"w": {}}}, "validation.tasks.w has no questions: set validation.tasks.w.path"),
        ({"validation__tasks": {"w": {"path": "none.jsonl"}}}, "validation.tasks.w.path: no such file"),
        ({"validation__tasks": {"w": text}}, "bad.jsonl:1: validation.tasks.w.answer is 2, which is no choice"),
        ({"validation__tasks": {"w": {**words, "kind": "essay"}}}, "validation.tasks.w.kind = 'essay'"),
        ({"validation__tasks": {"w": {**words, "kind": "cloze", "labels": "x"}}}, "w.labels has no use with "),
        ({"validation__tasks": {"w": {**words, "target": "x"}}}, "w.kind = 'multiple_choice': leave one out"),
        ({"validation__tasks": {"w": {**words, "freq": 4}}}, "w.freq (4) must be a multiple of validation.freq (3)"),
        ({"validation__tasks": {"w": {**words, "fewshot_path": "a.jsonl"}}}, "fewshot_path has no use with"),
        ({"validation__tasks": {"w": words}, "validation__sets": {"w": {"path": "a.txt"}}}, "take another one"),
    ]
    for changes, part in cases:
        ended = train("run", **changes)
        assert ended.code == 2, part
        assert part in ended.err.splitlines()[-1]
        assert not (tmp_path / "run").exists()

    # they are a part of validations: a run without any does not look at them
    none = {"validation__tasks": {"w": {"path": "none.jsonl"}}, "validation__enable": False, "training__steps": 1}
    assert train("run", **none).code == 0
