"""Validation sets by name: in the records of a run and by `evaluate`, the same numbers in every layout."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.conftest import Arguments
from tests.e2e.harness import Ended, command, end_two, records, start_two
from titan_moe.checkpoint import load_model
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.metrics import maxvio

Train = Callable[..., Ended]
SEQ = 16
CODE, DIGITS = "def f(x):\n    return x + 1\n\n" * 30, "0123456789 " * 60


@pytest.fixture
def sets(tmp_path: Path) -> dict[str, Any]:
    """[validation.sets] of two files."""
    (tmp_path / "code.txt").write_text(CODE, encoding="utf-8")
    (tmp_path / "digits.txt").write_text(DIGITS, encoding="utf-8")
    return {name: {"path": str(tmp_path / f"{name}.txt")} for name in ("code", "digits")}


def of_set(record: dict[str, Any], name: str) -> dict[str, Any]:
    prefix = f"validation/{name}/"
    return {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}


def of_run(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if not key.startswith("validation/")}


@torch.no_grad()
def by_hand(run: Path, text: str) -> dict[str, float]:
    """A text's numbers from the logits and routings of all its sequences at once, in float64."""
    model, _ = load_model(run)
    tokenizer = load_tokenizer(str(run / "checkpoint" / "step-6" / "tokenizer.json"))
    ids = torch.tensor([*tokenizer.encode(text), tokenizer.eot_id])
    size = (len(ids) - 1) // SEQ * SEQ
    tokens, labels = ids[:size].view(-1, SEQ), ids[1 : size + 1].view(-1, SEQ)
    logits, routings = model(tokens)
    log_probs = logits.double().log_softmax(-1).gather(-1, labels.unsqueeze(-1))
    loads = torch.stack([torch.bincount(r.topk_experts.flatten(), minlength=4) for r in routings])
    num_bytes = sum(len(tokenizer.decode([label]).encode()) for label in labels.flatten().tolist())
    return {
        "loss": -log_probs.mean().item(),
        "perplexity": math.exp(-log_probs.mean().item()),
        "accuracy": (logits.argmax(-1) == labels).double().mean().item(),
        "bits_per_byte": -log_probs.sum().item() / math.log(2) / num_bytes,
        "maxvio_global": maxvio(loads).mean().item(),
        "num_tokens": size,
    }


def test_each_set_is_measured_and_the_run_stays_as_it_is(train: Train, sets: dict[str, Any], tmp_path: Path) -> None:
    assert train("plain").code == 0
    ended = train("run", validation__sets=sets, metrics__enable_tensorboard=True)
    assert ended.code == 0, ended.err
    assert "warning" not in ended.err

    # training and the run's own validation are equal to the bit
    assert records(tmp_path / "run") == records(tmp_path / "plain")
    validations = records(tmp_path / "run", "validation")
    assert [of_run(record) for record in validations] == records(tmp_path / "plain", "validation")
    assert [record["step"] for record in validations] == [3, 6]

    # of a set there is all that there is of the run's, but for what is of single experts or of two validations
    names = {key for key in of_run(validations[-1]) if not key.startswith("load/")} - {"step", "routing_drift"}
    for name, text in (("code", CODE), ("digits", DIGITS)):
        numbers = of_set(validations[-1], name)
        assert numbers.keys() == names
        expected = by_hand(tmp_path / "run", text)
        assert {key: numbers[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert of_set(validations[0], "code")["loss"] > of_set(validations[1], "code")["loss"]

    # people see them, too
    last = ended.out.partition("step 6/6  validation")[2].splitlines()
    assert [line.split()[0] for line in last[1:3]] == ["code", "digits"]
    assert f"loss  {of_set(validations[-1], 'code')['loss']:.4f}" in last[1]
    facts = json.loads((tmp_path / "run" / "run.json").read_text())
    assert facts["validation_sets"].keys() == {"code", "digits"}


def test_evaluate_has_a_row_for_each_text(train: Train, sets: dict[str, Any], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert train("run", validation__sets=sets).code == 0
    (expected,) = records(run, "validation")[-1:]

    # the run's own data and its sets, as its last validation had them
    plain = command("evaluate", ["--checkpoint", str(run)])
    assert plain.code == 0, plain.err
    lines, rows = plain.out.split("\n\n")
    assert {line.split()[0] for line in lines.splitlines()} == of_set(expected, "code").keys()
    head, *rows = [line.split() for line in rows.splitlines()]
    assert head == ["loss", "perplexity", "accuracy", "bits_per_byte", "maxvio_global", "num_tokens"]
    assert [row[:2] for row in rows] == [[name, f"{of_set(expected, name)['loss']:.4f}"] for name in sets]
    document = json.loads(command("evaluate", ["--checkpoint", str(run), "--json"]).out)
    assert (document["checkpoint"], document["step"]) == (str(run / "checkpoint" / "step-6"), 6)
    for result, numbers in zip(
        document["results"], [of_run(expected), *(of_set(expected, name) for name in sets)], strict=True
    ):
        assert result["path"] == []
        measured = {key: value for key, value in result.items() if key not in ("name", "path")}
        assert measured == pytest.approx({key: numbers[key] for key in measured}, rel=1e-6)
    assert [result["name"] for result in document["results"]] == ["validation", *sets]

    # a set of the command line in place of one of the run
    words = ["--validation.sets.code", "false", "--validation.sets.more.path", str(tmp_path / "code.txt")]
    changed = json.loads(command("evaluate", ["--checkpoint", str(run), "--json", *words]).out)["results"]
    assert [result["name"] for result in changed] == ["validation", "digits", "more"]
    assert {**changed[2], "name": "code"} == document["results"][1]
    ended = command("evaluate", ["--checkpoint", str(run), *words, "--data.path", str(tmp_path / "code.txt")])
    assert ended.code == 2
    assert "--validation.sets.code changes nothing here" in ended.err

    # files: all together as ever, then each by itself; one that is too short for a sequence is told
    (tmp_path / "short.txt").write_text("few")
    files = [str(tmp_path / f"{name}.txt") for name in ("code", "digits", "short")]
    ended = command("evaluate", ["--checkpoint", str(run), "--json", "--data.path", *files])
    whole, *each = json.loads(ended.out)["results"]
    assert (whole["name"], whole["path"]) == ("all", files)
    assert whole["num_tokens"] == (len(CODE) + len(DIGITS) + len("few") + 3 - 1) // SEQ * SEQ  # an end after each
    assert [(one["name"], one["path"]) for one in each] == [(file, [file]) for file in files[:2]]
    assert [one["loss"] for one in each] == pytest.approx([of_set(expected, name)["loss"] for name in sets], rel=1e-6)
    assert "short.txt has no row of its own: training.seq_len (16) is longer than the data" in ended.err
    (one,) = json.loads(command("evaluate", ["--checkpoint", str(run), "--json", "--data.path", files[0]]).out)[
        "results"
    ]
    assert one == each[0]


@pytest.mark.parametrize(
    "layout", ["data_parallel_replicate_degree", "expert_parallel_degree", "context_parallel_degree"]
)
def test_two_processes_give_the_same_numbers(
    arguments: Arguments, train: Train, sets: dict[str, Any], tmp_path: Path, layout: str
) -> None:
    """Also where a set has an odd number of batches, so that a rank has nothing left of it."""
    options = {"validation__sets": sets, "validation__local_batch_size": 3, "training__steps": 3}
    assert train("one", **options).code == 0
    words = [*arguments("two", **options), f"--parallelism.{layout}", "2"]
    assert end_two(start_two(words, tmp_path / "log")) == [0, 0]
    (one,), (two,) = (records(tmp_path / name, "validation") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert of_set(two, "code")["num_tokens"] == len(CODE) // SEQ * SEQ
    for name in sets:
        assert of_set(two, name) == pytest.approx(of_set(one, name), rel=1e-5)


def test_a_run_may_take_up_sets_and_resumes_with_them(train: Train, sets: dict[str, Any], tmp_path: Path) -> None:
    assert train("whole", validation__sets=sets, training__steps=6).code == 0
    assert train("run", training__steps=6, more="--validation.freq 2", validation__enable=False).code == 0
    step = tmp_path / "run" / "checkpoint" / "step-6"
    assert step.exists()

    # gone back to step 4, with other validations from there on, which count as no change of the run
    ended = train("run", training__steps=6, validation__sets=sets, more="--checkpoint.load_step 4")
    assert ended.code == 0, ended.err
    assert records(tmp_path / "run") == records(tmp_path / "whole")
    (resumed,), (*_, whole) = (records(tmp_path / name, "validation") for name in ("run", "whole"))
    resumed.pop("routing_drift", None)
    assert {key: whole[key] for key in resumed} == resumed


def test_a_set_that_is_trained_on_is_told(train: Train, sets: dict[str, Any], shared: Path, tmp_path: Path) -> None:
    sets["same"] = {"path": str(shared / "text.jsonl")}
    sources = {"data.path": [], "data.sources": {"all": {"path": str(shared / "text.jsonl")}}}
    for name, changes in (("run", {}), ("of-sources", sources)):
        ended = train(name, validation__sets=sets, training__steps=1, **changes)
        assert ended.code == 0, ended.err
        (warning,) = [line for line in ended.err.splitlines() if line.startswith("warning: validation.sets.")]
        assert warning.startswith("warning: validation.sets.same has text that is trained on, too: ")
        assert "text.jsonl: its numbers are not" in warning


def test_bad_sets_end_in_a_line(train: Train, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few")
    (tmp_path / "empty.txt").touch()
    cases = {
        "a/b": ({"path": "x.txt"}, "validation.sets.a/b: a name is of letters"),
        "code": ({}, "validation.sets.code has no data: set validation.sets.code.path"),
        "none": ({"path": str(tmp_path / "none*.txt")}, "validation.sets.none.path: "),
        "empty": ({"path": str(tmp_path / "empty.txt")}, "validation.sets.empty.path: no data: "),
        "short": ({"path": str(tmp_path / "short.txt")}, "(16) is longer than the data of validation.sets.short.path"),
    }
    for name, (table, part) in cases.items():
        ended = train("run", validation__sets={name: table})
        assert ended.code == 2, name
        last = ended.err.splitlines()[-1]
        assert last.startswith("error: ")
        assert part in last
        assert not (tmp_path / "run").exists()

    # they are for validations: a run without any does not look at them
    assert train("run", validation__sets={"none": {"path": "none.txt"}}, validation__enable=False).code == 0
