"""Make a task from text: which word ends a passage.

In the manner of LAMBADA (Paperno et al., 2016, arXiv 1606.06031), but without its selection by people: the last word of
a sentence is asked for, after some sentences that have it already. The choices are other words of the passage, as in
the Children's Book Test (Hill et al., 2016, arXiv 1511.02301), so that to repeat any word is not enough; of these the
ones that are about as frequent, so that to know how frequent words are is not enough either.
"""

import json
import math
import random
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from titan_moe.data.sources import documents, find_files, plan_shards
from titan_moe.runtime import command, world
from titan_moe.runtime.command import Parser
from titan_moe.runtime.files import write_atomic

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
WORD = re.compile(r"[^\W\d_]+")
LAST_WORD = re.compile(r"(.*\S)\s+([^\W\d_]+)\s*[.!?]", re.DOTALL)
SHORTEST = 4  # characters of a word that is asked for or offered: others are rarely about anything


class Shape(NamedTuple):
    """What passages look like."""

    least_words: int = 40
    choices: int = 4


def make_cloze(args: list[str]) -> int:
    """Write a task from text files."""
    about = "Make a task of [validation.tasks] from text: which word ends a passage, as a cloze and with choices."
    parser = Parser("make_cloze.py", about)
    parser.add_argument("out", type=Path, help="file of JSON lines to write")
    parser.add_argument("path", nargs="+", help="text to take passages from, as data.path; not what is trained on")
    parser.add_argument("--count", type=int, default=1000, help="questions at most (1000)")
    parser.add_argument("--choices", type=int, default=4, help="choices of a question (4)")
    parser.add_argument("--words", type=int, default=40, help="words of a passage at least (40)")
    parser.add_argument("--seed", type=int, default=0, help="which passages are taken (0)")
    options = parser.parse_args(args)
    for name, least in (("count", 1), ("choices", 2), ("words", 1)):
        if getattr(options, name) < least:
            raise ValueError(f"--{name} ({getattr(options, name)}) must be at least {least}")
    command.init_logging(world.read_world())

    # All passages first: which are taken must not depend on where in the text they are.
    shape, draw = Shape(options.words, options.choices), random.Random(options.seed)
    shards = plan_shards(find_files(options.path, "path"))
    counts = Counter(word for shard in shards for text in documents(shard) for word in WORD.findall(text))
    rows = [row for shard in shards for text in documents(shard) for row in questions(text, shape, counts, draw)]
    if not rows:
        raise ValueError("no passage ends with a word that it has already: give more text, or lower --words")
    taken = sorted(draw.sample(range(len(rows)), min(options.count, len(rows))))
    write_atomic(options.out, "".join(json.dumps(rows[i], ensure_ascii=False) + "\n" for i in taken))
    command.logger.info("%s: %d questions, of %d passages", options.out, len(taken), len(rows))
    return 0


def questions(text: str, shape: Shape, counts: Mapping[str, int], draw: random.Random) -> Iterator[dict[str, Any]]:
    """Yield the questions of a document; passages have no text in common. `counts` are of all words."""
    passage: list[str] = []
    for sentence in SENTENCE_END.split(" ".join(text.split())):
        passage.append(sentence)
        if sum(len(one.split()) for one in passage) < shape.least_words:
            continue

        # One that can't be asked about grows by the next sentence, but not without end.
        question = question_of(passage, shape, counts, draw)
        if question is not None:
            yield question
        if question is not None or len(passage) > shape.least_words:
            passage = []


def question_of(
    sentences: Sequence[str], shape: Shape, counts: Mapping[str, int], draw: random.Random
) -> dict[str, Any] | None:
    """The question after the last word of some sentences; None where an earlier one does not have it."""
    match = LAST_WORD.fullmatch(sentences[-1])
    if match is None or len(match[2]) < SHORTEST:
        return None
    earlier = " ".join(sentences[:-1])
    offered = {word for word in WORD.findall(earlier) if len(word) >= SHORTEST and word.islower()}
    if match[2] not in offered:
        return None

    # A word that the last sentence has as well is no likely end of it, and would be an easy choice to leave out.
    others = offered - {match[2]} - set(WORD.findall(match[1]))
    if len(others) < shape.choices - 1:
        return None
    near = sorted(others, key=lambda word: (abs(math.log(counts[word] / counts[match[2]])), word))
    choices = [match[2], *near[: shape.choices - 1]]
    draw.shuffle(choices)
    context = f"{earlier} {match[1]}"
    return {
        "text": f"{context} {match[2]}",
        "context": context,
        "target": match[2],
        "choices": choices,
        "answer": choices.index(match[2]),
    }
