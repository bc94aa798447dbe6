"""Questions from lines, their token ids, and batches of them."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from titan_moe.data.tasks import (
    Item,
    Question,
    Task,
    Templates,
    encode_pair,
    make_task,
    read_questions,
    task_batches,
)
from titan_moe.data.tokenizer import bytes_tokenizer, train_bpe
from titan_moe.model.cross_entropy import IGNORE

ARC = {
    "question": "Which is warm?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
ASKED = {
    "context": "Question: {question}\nAnswer:",
    "choices": ["{choices.text}"],
    "answer": "{answerKey}",
    "labels": "{choices.label}",
}


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_files_of_known_benchmarks_are_read_as_they_are(tmp_path: Path) -> None:
    """The columns are those that the data sets have on the hub."""
    hellaswag = {"ctx": "A man sits. He", "endings": ["eats.", "is eaten.", "flies.", "melts."], "label": "0"}
    piqa = {"goal": "Dry a cup.", "sol1": "Use a towel.", "sol2": "Use water.", "label": 0}
    cases: list[tuple[dict[str, Any], dict[str, Any], tuple[str, tuple[str, ...], int]]] = [
        (ARC, ASKED, ("Question: Which is warm?\nAnswer:", ("ice", "fire", "snow"), 1)),
        (
            hellaswag,
            {"context": "{ctx}", "choices": ["{endings}"], "answer": "{label}"},
            ("A man sits. He", ("eats.", "is eaten.", "flies.", "melts."), 0),
        ),
        (
            piqa,
            {"context": "Question: {goal}\nAnswer:", "choices": ["{sol1}", "{sol2}"], "answer": "{label}"},
            ("Question: Dry a cup.\nAnswer:", ("Use a towel.", "Use water."), 0),
        ),
        (
            {"sentence_good": "She runs.", "sentence_bad": "She run."},
            {"context": "", "choices": ["{sentence_good}", "{sentence_bad}"], "answer": "0"},
            ("", ("She runs.", "She run."), 0),
        ),
        (
            {"passage": "It is.", "question": "is it", "label": 1},
            {"context": "{passage}\n{question}?", "choices": ["no", "yes"], "answer": "{label}"},
            ("It is.\nis it?", ("no", "yes"), 1),
        ),
        (
            {"q": "2 + 2", "options": ["three", "four"], "right": "four"},
            {"context": "{q}", "choices": ["{options}"], "answer": "{right}"},
            ("2 + 2", ("three", "four"), 1),
        ),
        (
            {"text": "He opened the old door"},
            {"kind": "last_word", "context": "{text}"},
            ("He opened the old", ("door",), 0),
        ),
        ({"a": "{b} is", "b": "no"}, {"kind": "cloze", "context": "{a}", "target": "{b}w"}, ("{b} is", ("now",), 0)),
    ]
    for row, fields, expected in cases:
        path = write(tmp_path / "task.jsonl", "", row)
        (question,) = read_questions(str(path), Templates(**fields))
        assert question[:3] == expected
        assert question.place == f"{path}:2"


def test_limit_and_packed_files(tmp_path: Path) -> None:
    rows = [{"context": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in range(5)]
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
    assert [q.context for q in read_questions(str(tmp_path / "*.gz"), Templates())] == ["q0", "q1", "q2", "q3", "q4"]
    assert len(read_questions(str(tmp_path), Templates(), limit=3)) == 3
    assert len(read_questions(str(tmp_path), Templates(), limit=30)) == 5


def test_examples_come_before_a_question_and_never_are_it(tmp_path: Path) -> None:
    rows = [{"context": f"q{i}", "choices": ["a", "b"], "answer": i % 2} for i in (0, 1, 1, 2)]
    path = write(tmp_path / "task.jsonl", *rows)
    contexts = [q.context for q in read_questions(str(path), Templates(), num_fewshot=2, limit=3)]
    assert contexts == ["q1 b\n\nq1 b\n\nq0", "q0 a\n\nq2 a\n\nq1", "q0 a\n\nq2 a\n\nq1"]
    other = write(tmp_path / "train.jsonl", *rows[:2])
    shown = read_questions(str(path), Templates(delimiter="-"), num_fewshot=1, fewshot_path=str(other))
    assert [q.context for q in shown] == ["q0-a\n\n" + q for q in ("q0", "q1", "q1", "q2")]
    for more, part in (
        ({"num_fewshot": 3}, "task.jsonl:2: task.num_fewshot (3) is more than the examples that there are (2)"),
        ({"num_fewshot": 3, "fewshot_path": str(other)}, "(3) is more than the examples that there are (2): lower it"),
    ):
        with pytest.raises(ValueError, match="fewshot") as caught:
            read_questions(str(path), Templates(), **more)
        assert part in str(caught.value)


def test_bad_lines_are_told_with_their_place(tmp_path: Path) -> None:
    good = {"context": "q", "choices": ["a", "b"], "answer": 0}
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ("{", {}, "t.path: not JSON (Expecting property name"),
        ("[" * 99999, {}, "t.path: not JSON ("),
        ([1], {}, "t.path: must be an object with fields, is [1]"),
        ({**good, "context": None}, {}, "t.context: must be text or a number, is null"),
        (good, {"context": "{query}"}, "t.context: no field 'query' (found: context, choices, answer)"),
        (good, {"context": "{context.text}"}, "t.context: no field 'context.text' (found: \"q\")"),
        (good, {"choices": ["{context}"]}, 't.choices must name a list, or be several templates; it is "q"'),
        ({**good, "choices": ["a"]}, {}, "t.choices: 1 choice: there must be two at least"),
        ({**good, "choices": ["a", ""]}, {}, "t.choices: choice 1 is empty"),
        ({**good, "choices": ["a", "\ud800"]}, {}, "t: holds half a surrogate pair, not Unicode text"),
        ({**good, "choices": ["a", ["b"]]}, {}, 't.choices: must be text or a number, is ["b"]'),
        ({**good, "answer": 2}, {}, "t.answer is 2, which is no choice: it must be a number from 0 to 1 or the text"),
        ({**good, "answer": -1}, {}, "t.answer is -1, which is no choice"),
        ({**good, "answer": "9" * 20}, {}, "which is no choice"),
        ({**good, "answer": "c"}, {}, 't.answer is "c", which is no choice'),
        ({**good, "answer": True}, {}, "t.answer is true, which is no choice"),
        (ARC | {"answerKey": "D"}, ASKED, 't.answer is "D", which is no choice: it must be one of ["A", "B", "C"]'),
        (ARC, {**ASKED, "labels": "{question}"}, "t.labels must be a list of 3, is "),
        ({"context": "oneword"}, {"kind": "last_word"}, "t: the target is empty"),
        ({"context": "a", "target": ""}, {"kind": "cloze"}, "t: the target is empty"),
    ]
    for row, fields, part in cases:
        path = write(tmp_path / "task.jsonl", row)
        with pytest.raises(ValueError, match=r"^.*task\.jsonl:1: ") as caught:
            read_questions(str(path), Templates(**fields), key="t")
        assert part in str(caught.value)
        assert "\n" not in str(caught.value)

    # whole files
    with pytest.raises(FileNotFoundError, match=r"t\.path: no such file or folder"):
        read_questions(str(tmp_path / "none.jsonl"), Templates(), key="t")
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ValueError, match=r"t\.path: .*a\.txt has no questions"):
        read_questions(str(tmp_path / "a.txt"), Templates(), key="t")
    with pytest.raises(ValueError, match=r"t\.path: no question in"):
        read_questions(str(write(tmp_path / "empty.jsonl", "", "")), Templates(), key="t")


def test_spaces_go_to_what_is_scored() -> None:
    """As lm-evaluation-harness has it: the whole is encoded, and cut after as many ids as the context has alone."""
    tokenizer = train_bpe(["the cat sat on the mat and the hat " * 20], 300)
    context, scored = encode_pair(tokenizer, "the cat  ", "sat")
    assert tokenizer.decode(context) == "the cat"
    assert tokenizer.decode(scored) == "  sat"
    assert encode_pair(tokenizer, "the", " cat") == (tokenizer.encode("the"), tokenizer.encode(" cat"))

    # a token over the border is cut by its number, not by its text
    whole = tokenizer.encode("the")
    assert len(whole) < len(tokenizer.encode("t")) + len(tokenizer.encode("he"))
    assert encode_pair(tokenizer, "t", "he") == (tokenizer.encode("t"), whole[1:])

    # without a context the text begins as texts do
    assert encode_pair(tokenizer, "", "the cat") == ([tokenizer.eot_id], tokenizer.encode("the cat"))
    assert encode_pair(tokenizer, "  ", "the") == ([tokenizer.eot_id], tokenizer.encode("  the"))


def test_long_questions_lose_their_beginning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = bytes_tokenizer()
    questions = [Question("0123456789", ("ab", "c"), 0, "f:1"), Question("01", ("a", "b"), 0, "f:2")]
    task = make_task(questions, Templates(), tokenizer, seq_len=8, key="t")
    assert [tokenizer.decode(item.ids) for item in task.items] == ["456789 ab"[-9:], "3456789 c"[-9:], "01 a", "01 b"]
    assert [item.num_scored for item in task.items] == [3, 2, 2, 2]
    assert "t: 2 of 4 sequences are longer than training.seq_len (8): cut at their beginning" in caplog.text
    with pytest.raises(
        ValueError, match=r"f:1: t: .* has 9 tokens of its own: it must have from 1 to training.seq_len"
    ):
        make_task([questions[0]._replace(choices=("12345678", "a"))], Templates(), tokenizer, seq_len=8, key="t")
    bpe = train_bpe(["ab ab ab"], 300)
    with pytest.raises(ValueError, match=r"f:1: t: .* has 0 tokens of its own"):
        make_task([Question("a", ("b", "c"), 0, "f:1")], Templates(delimiter=""), bpe, seq_len=8, key="t")


def test_the_fingerprint_is_of_what_is_asked(tmp_path: Path) -> None:
    def fingerprint(context: str = "q", answer: int = 0, place: str = "f:1", **fields: Any) -> str:
        question = Question(context, ("a", "b"), answer, place)
        return make_task([question], Templates(**fields), bytes_tokenizer(), seq_len=9).fingerprint

    assert fingerprint() == fingerprint(place="g:2")
    assert len({fingerprint(), fingerprint("r"), fingerprint(answer=1), fingerprint(delimiter="")}) == 4


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=40),
    st.integers(1, 4),
    st.sampled_from([1, 2, 3, 4]),
    st.sampled_from([1, 4, 16, 24]),
)
def test_ranks_share_all_items(lengths: list[tuple[int, int]], batch: int, ranks: int, width_step: int) -> None:
    """Each item is once on one rank, whole, with labels where it is scored; all ranks have batches of one width."""
    items = [Item(list(range(100 * n + 1, 100 * n + 1 + a + b))[-25:], b) for n, (a, b) in enumerate(lengths)]
    task = Task("cloze", [], items, "")
    options = {"seq_len": 24, "local_batch_size": batch, "pad_id": 0, "width_step": width_step, "dp_degree": ranks}
    by_rank = [list(task_batches(task, dp_rank=rank, **options)) for rank in range(ranks)]
    assert len({len(batches) for batches in by_rank}) == 1
    seen = []
    for batches in zip(*by_rank, strict=True):
        widths = {tokens.shape[1] for tokens, _, _ in batches}
        assert len(widths) == 1
        assert max(widths) <= 24
        for tokens, labels, places in batches:
            assert tokens.shape == labels.shape
            assert tokens.numel() <= max(batch * 24, 24)
            for row, label_row, place in zip(tokens, labels, places.tolist(), strict=True):
                if (label_row == IGNORE).all():
                    assert (row == 1).all()
                    continue
                ids, num_scored = items[place]
                assert row[: len(ids) - 1].tolist() == ids[:-1]
                assert row[len(ids) - 1 :].tolist() == ([0] + [1] * (24 * 100))[: len(row) - len(ids) + 1]
                assert label_row[label_row != IGNORE].tolist() == ids[-num_scored:]
                assert (label_row != IGNORE).nonzero().flatten()[-1] == len(ids) - 2
                seen.append(place)
    assert sorted(seen) == list(range(len(items)))
