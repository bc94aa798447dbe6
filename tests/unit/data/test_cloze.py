"""Passages that end with a word which they have already, and their choices."""

import json
import re
from pathlib import Path

import pytest

from titan_moe.data.cloze import make_cloze
from titan_moe.data.tasks import Templates, read_questions

STORY = (
    "The farmer had a donkey and a small garden behind the house. Every morning the donkey carried water from the "
    "river. One day it refused to walk. Nobody in the village understood why, and the children laughed at the donkey. "
    "It was 1999. Then rain came over the whole valley for many days. The river rose until water covered the garden. "
)


def rows_of(folder: Path, *words: str, text: str = STORY * 4) -> list[dict]:
    (folder / "text.txt").write_text(text)
    assert make_cloze([str(folder / "task.jsonl"), str(folder / "text.txt"), *words]) == 0
    return [json.loads(line) for line in (folder / "task.jsonl").read_text().splitlines()]


def test_the_last_word_is_in_the_passage_and_so_are_the_choices(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, "--words", "20", "--choices", "5")
    assert len(rows) >= 4
    whole = " ".join((STORY * 4).split())
    for row in rows:
        assert row["text"] == f"{row['context']} {row['target']}"
        assert row["text"] in whole
        assert len(row["text"].split()) >= 20

        # the sentence that is asked about has none of the choices, the ones before have all
        *earlier, last = re.split(r"(?<=\.)\s", row["context"])
        assert len(set(row["choices"])) == 5
        assert row["choices"][row["answer"]] == row["target"]
        for choice in row["choices"]:
            assert re.search(rf"\b{choice}\b", " ".join(earlier))
            assert len(choice) >= 4
            assert choice == row["target"] or not re.search(rf"\b{choice}\b", last)

    # both kinds of task read the file as it is
    file = str(tmp_path / "task.jsonl")
    choices = read_questions(file, Templates())
    cloze, last_word = (
        read_questions(file, Templates(kind=kind, context=context))
        for kind, context in (("cloze", "{context}"), ("last_word", "{text}"))
    )
    assert [q[:3] for q in cloze] == [q[:3] for q in last_word]
    assert [q.choices[q.answer] for q in choices] == [q.choices[0] for q in cloze]


def test_the_other_choices_are_about_as_frequent(tmp_path: Path) -> None:
    common, rare = "Then tree and tree and bush and bush and bush. " * 5, "A mouse met a snail near that bush. "
    (row,) = rows_of(tmp_path, "--words", "50", "--choices", "3", text=common + rare + "They all liked this mouse.")
    assert row["target"] == "mouse"
    assert {*row["choices"]} == {"mouse", "snail", "near"}  # by the alphabet before `that`, as rare as it


def test_what_is_taken_follows_from_the_seed(tmp_path: Path) -> None:
    first, same, other = (rows_of(tmp_path, "--words", "20", "--count", "2", "--seed", seed) for seed in "112")
    assert len(first) == 2
    assert first == same != other


def test_what_can_not_be_made_ends_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no passage ends with a word that it has already"):
        rows_of(tmp_path, text="All is new here. Nothing comes twice anywhere.\n")
    with pytest.raises(ValueError, match=r"--choices \(1\) must be at least 2"):
        rows_of(tmp_path, "--choices", "1")
