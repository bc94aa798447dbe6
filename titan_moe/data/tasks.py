"""Tasks: questions of JSON lines, asked as EleutherAI's lm-evaluation-harness 0.4 asks them.

A multiple-choice question is a context and some choices; the model's answer is the choice that it finds likeliest after
the context. A cloze is a context and what comes next. Either becomes `Sequences` of token ids of which the last ones
are scored. Where the harness would fail or warn (a label that is no choice, a choice without a token), there is an
error with file and line.

Shapes: B sequences, S positions.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from titan_moe.data.corpus import digest
from titan_moe.data.sources import Piece, find_files, kind_of, lines_of
from titan_moe.data.tokenizer import Tokenizer
from titan_moe.model.cross_entropy import IGNORE

FEWSHOT_DELIMITER = "\n\n"  # between examples, as the harness has it
WIDTH_STEP = 8  # widths of batches are multiples of it: fewer shapes, for which a GPU or compiler chooses kernels
log = logging.getLogger(__name__)


class Templates(NamedTuple):
    """How a line becomes a question. In each text `{field}`, or `{field.key}`, stands for what the line has there."""

    kind: str = "multiple_choice"  # or "cloze", or "last_word": a cloze whose target is the last word of the context
    context: str = "{context}"
    choices: Sequence[str] = ("{choices}",)
    answer: str = "{answer}"
    labels: str = ""
    target: str = "{target}"
    delimiter: str = " "


class Question(NamedTuple):
    """A context and what may come after it; of a cloze the one thing that does."""

    context: str
    choices: tuple[str, ...]
    answer: int  # which of the choices is right
    place: str  # file:line


class Item(NamedTuple):
    """Token ids, of which the last `num_scored` are asked for."""

    ids: list[int]
    num_scored: int


class Task(NamedTuple):
    """Tokenized questions: the items of one follow those of the one before, one for each choice."""

    kind: str
    questions: Sequence[Question]
    items: Sequence[Item]
    fingerprint: str

    @property
    def num_tokens(self) -> int:
        """Tokens that a forward pass over all items reads, without padding."""
        return sum(len(item.ids) - 1 for item in self.items)


def read_questions(
    path: str | Sequence[str],
    templates: Templates,
    *,
    num_fewshot: int = 0,
    fewshot_path: str | Sequence[str] = (),
    limit: int = 0,
    key: str = "task",
) -> list[Question]:
    """Read the questions of some .jsonl files, the first `limit` (0: all), each after `num_fewshot` answered ones.

    Examples are the first of `fewshot_path`, or of the same files those but the question itself. `key` names the task
    in errors. Errors of one line, with file and line: no such file, no such field, an answer that is none of the
    choices, an empty choice, fewer than two choices, too few examples.
    """
    rows = _read_rows(path, f"{key}.path")
    asked = rows[: limit or len(rows)]
    questions = [_question(row, place, templates, key) for place, row in asked]
    if not questions:
        raise ValueError(f"{key}.path: no question in {path}: give a file with one a line")
    if not num_fewshot:
        return questions

    # A question is no example for itself, nor for a copy of it.
    pool = _read_rows(fewshot_path, f"{key}.fewshot_path") if fewshot_path else rows
    examples = [(row, _answered(_question(row, place, templates, key), templates)) for place, row in pool]
    prefixed = []
    for question, (_, own_row) in zip(questions, asked, strict=True):
        others = list(islice((text for row, text in examples if fewshot_path or row != own_row), num_fewshot))
        if len(others) < num_fewshot:
            raise ValueError(
                f"{question.place}: {key}.num_fewshot ({num_fewshot}) is more than the examples that there are "
                f"({len(others)}): lower it, or name another file as {key}.fewshot_path"
            )
        prefixed.append(question._replace(context="".join(others) + question.context))
    return prefixed


def _answered(question: Question, templates: Templates) -> str:
    return question.context + templates.delimiter + question.choices[question.answer] + FEWSHOT_DELIMITER


def _read_rows(path: str | Sequence[str], key: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the objects of JSON lines, each with its file and line."""
    rows = []
    for file in find_files(path, key):
        if kind_of(file) != "jsonl":
            raise ValueError(f"{key}: {file} has no questions: give JSON lines (.jsonl, .ndjson, also .gz or .zst)")
        for index, _, line in lines_of(Piece(file, "jsonl")):
            if line.isspace():
                continue
            place = f"{file}:{index + 1}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"{place}: {key}: not JSON ({str(error).splitlines()[0]})") from error
            if not isinstance(row, dict):
                raise ValueError(f"{place}: {key}: must be an object with fields, is {_shown(row)}")
            rows.append((place, row))
    return rows


def _question(row: Mapping[str, Any], place: str, templates: Templates, key: str) -> Question:
    """Make the question of a line."""
    context = _filled(templates.context, row, place, f"{key}.context")
    if templates.kind == "multiple_choice":
        choices = _choices(row, place, templates, key)
        answer = _answer(row, choices, place, templates, key)
    elif templates.kind == "cloze":
        choices, answer = [_filled(templates.target, row, place, f"{key}.target")], 0
    else:
        context, space, word = context.rpartition(" ")
        choices, answer = [word if space else ""], 0

    # JSON can write half of a pair, which is no text, and nothing can be said of a text without characters.
    for number, text in enumerate((context, *choices)):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{place}: {key}: holds half a surrogate pair, not Unicode text") from error
        if number and not text:
            is_choice = templates.kind == "multiple_choice"
            what = f"{key}.choices: choice {number - 1}" if is_choice else f"{key}: the target"
            raise ValueError(f"{place}: {what} is empty: it must have a character at least")
    return Question(context, tuple(choices), answer, place)


def _choices(row: Mapping[str, Any], place: str, templates: Templates, key: str) -> list[str]:
    """Return the choices: of a list in one field, or one for each template."""
    key = f"{key}.choices"
    if len(templates.choices) == 1:
        value = _value(templates.choices[0], row, place, key)
        if not isinstance(value, list):
            raise ValueError(f"{place}: {key} must name a list, or be several templates; it is {_shown(value)}")
        choices = [_as_text(one, place, key) for one in value]
    else:
        choices = [_filled(template, row, place, key) for template in templates.choices]
    if len(choices) < 2:
        raise ValueError(f"{place}: {key}: {len(choices)} choice: there must be two at least")
    return choices


def _answer(row: Mapping[str, Any], choices: Sequence[str], place: str, templates: Templates, key: str) -> int:
    """Return which choice is right: by its label where there are labels, else by its number or by its text."""
    value = _value(templates.answer, row, place, f"{key}.answer")
    known = f"a number from 0 to {len(choices) - 1} or the text of a choice"
    if templates.labels:
        labels = _value(templates.labels, row, place, f"{key}.labels")
        if not isinstance(labels, list) or len(labels) != len(choices):
            raise ValueError(f"{place}: {key}.labels must be a list of {len(choices)}, is {_shown(labels)}")
        number, known = labels.index(value) if value in labels else -1, f"one of {_shown(labels)}"
    elif isinstance(value, int) and not isinstance(value, bool):
        number = value
    elif isinstance(value, str) and value.isdecimal():
        number = int(value) if len(value) < 10 else -1
    else:
        number = choices.index(value) if value in choices else -1
    if not 0 <= number < len(choices):
        raise ValueError(f"{place}: {key}.answer is {_shown(value)}, which is no choice: it must be {known}")
    return number


_FIELD = re.compile(r"\{([^{}]+)\}")


def _filled(template: str, row: Mapping[str, Any], place: str, key: str) -> str:
    """Return the text of a template."""
    return _FIELD.sub(lambda match: _as_text(_field(match[1], row, place, key), place, key), template)


def _value(template: str, row: Mapping[str, Any], place: str, key: str) -> Any:
    """Return what a template stands for: of one that is a field alone what the line has there, of whatever type."""
    match = _FIELD.fullmatch(template)
    return _field(match[1], row, place, key) if match else _filled(template, row, place, key)


def _field(name: str, row: Mapping[str, Any], place: str, key: str) -> Any:
    """Return what a line has in a field, `a` or `a.b`."""
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            among = ", ".join(map(str, value)) if isinstance(value, dict) else _shown(value)
            raise ValueError(f"{place}: {key}: no field {name!r} (found: {among})")
        value = value[part]
    return value


def _as_text(value: Any, place: str, key: str) -> str:
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{place}: {key}: must be text or a number, is {_shown(value)}")


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."


def make_task(
    questions: Sequence[Question],
    templates: Templates,
    tokenizer: Tokenizer,
    *,
    seq_len: int,
    key: str = "task",
) -> Task:
    """Tokenize questions for a model that reads `seq_len` tokens; longer ones lose tokens at their beginning.

    Errors, with file and line: a choice that has no token of its own, or more of them than `seq_len`.
    """
    items, num_cut = [], 0
    for question in questions:
        for choice in question.choices:
            context, scored = encode_pair(tokenizer, question.context, templates.delimiter + choice)
            if not 0 < len(scored) <= seq_len:
                raise ValueError(
                    f"{question.place}: {key}: {_shown(choice)} has {len(scored)} tokens of its own: it must have from "
                    f"1 to training.seq_len ({seq_len})"
                )
            ids = [*context, *scored]
            num_cut += len(ids) > seq_len + 1
            items.append(Item(ids[-(seq_len + 1) :], len(scored)))

    # Whoever sees a low number should know that the model did not see all of the question.
    if num_cut:
        log.warning(
            "%s: %d of %d sequences are longer than training.seq_len (%d): cut at their beginning",
            *(key, num_cut, len(items), seq_len),
        )
    content = [templates.kind, templates.delimiter, [list(question[:-1]) for question in questions]]
    return Task(templates.kind, questions, items, digest(content))


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the ids of a context and of what follows it, as the harness's `TemplateLM.loglikelihood` has them.

    Spaces at the context's end go to the continuation, where most tokenizers have them. The continuation's ids are
    those of both together after as many as the context has alone. Without a context the token that begins texts is it.
    """
    stripped = context.rstrip()
    continuation = context[len(stripped) :] + continuation
    if stripped:
        ids = tokenizer.encode_prompt(stripped)
        return ids, tokenizer.encode_prompt(stripped + continuation)[len(ids) :]
    ids = tokenizer.encode(continuation)
    return (ids[:1], ids[1:]) if ids[:1] == [tokenizer.bos_id] else ([tokenizer.bos_id], ids)


def task_batches(
    task: Task,
    *,
    seq_len: int,
    local_batch_size: int,
    pad_id: int,
    width_step: int = WIDTH_STEP,
    dp_rank: int = 0,
    dp_degree: int = 1,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield this rank's batches: tokens and labels (B, S), int64, and which items they are, (B,) int64.

    Every rank gets as many batches, of the same width S, a multiple of `width_step` or `seq_len`. Items come longest
    first, so that there is little padding, and of short ones more at once: as many tokens as `local_batch_size`
    sequences of `seq_len` have. Only scored tokens have labels. A rank with no item left gets one row without any.
    """
    order = sorted(range(len(task.items)), key=lambda index: -len(task.items[index].ids))
    first = 0
    while first < len(order):
        longest = len(task.items[order[first]].ids) - 1
        width = min(-(-longest // width_step) * width_step, seq_len)
        rows = max(1, local_batch_size * seq_len // width)
        rows = min(rows, -(-(len(order) - first) // dp_degree))  # the last ones are shared out evenly
        begin = first + dp_rank * rows
        yield _padded(task, order[begin : begin + rows], width, pad_id)
        first += rows * dp_degree


def _padded(task: Task, places: Sequence[int], width: int, pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return items at the left of rows of `width`; one row of padding where there are none."""
    # One end of text keeps padding out of an item's document, and another token behind it makes it one document: where
    # attention stays inside documents a GPU has room for so many.
    tokens = np.full((max(1, len(places)), width), int(pad_id == 0), np.int64)
    labels = np.full_like(tokens, IGNORE)
    for row, place in enumerate(places):
        ids, num_scored = task.items[place]
        tokens[row, : len(ids) - 1] = ids[:-1]
        tokens[row, len(ids) - 1 : len(ids)] = pad_id
        labels[row, len(ids) - 1 - num_scored : len(ids) - 1] = ids[-num_scored:]
    return torch.from_numpy(tokens), torch.from_numpy(labels), torch.tensor(places or [0])
