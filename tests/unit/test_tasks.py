"""Scores of items against each of them alone, in float64; the metrics against their formulas."""

import math
import statistics

import pytest
import torch

from tests.tiny import SEQ, VOCAB, tiny_model
from titan_moe.data.tasks import Item, Question, Task
from titan_moe.model.cross_entropy import IGNORE, token_scores
from titan_moe.tasks import score_items, task_metrics

CPU = torch.device("cpu")


def made_up(count: int = 30) -> Task:
    """Items of random ids and lengths."""
    draw = torch.Generator().manual_seed(1)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=draw))

    items = []
    for _ in range(count):
        length = number(2, SEQ + 2)
        items.append(Item(torch.randint(0, VOCAB, (length,), generator=draw).tolist(), number(1, min(length, 5))))
    return Task("cloze", [Question("", ("a",), 0, "")] * count, items, "")


def test_scores_are_those_of_each_item_alone() -> None:
    """Padding, and the items beside it, change nothing; of some items greedy decoding gives all that is scored."""
    model = tiny_model()
    model.init_weights(0)
    task = made_up()

    # the last third of the items end as the model would go on
    for item in task.items[20:]:
        for place in range(len(item.ids) - item.num_scored, len(item.ids)):
            with torch.no_grad():
                item.ids[place] = int(model(torch.tensor([item.ids[:place]]))[0][0, -1].argmax())
    expected, greedy = [], []
    for ids, num_scored in task.items:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0][0, -num_scored:].double()
        labels = torch.tensor(ids[-num_scored:])
        expected.append(logits.log_softmax(-1)[torch.arange(num_scored), labels].sum().item())
        greedy.append(bool((logits.argmax(-1) == labels).all()))
    assert 10 <= sum(greedy) < 30

    for batch_size in (1, 3, 64):
        where = {"seq_len": SEQ, "local_batch_size": batch_size, "pad_id": 3, "device": CPU}
        scores, is_greedy = score_items(model, task, **where)
        assert scores == pytest.approx(expected, abs=1e-5)
        assert is_greedy == greedy


@pytest.mark.parametrize("chunk_tokens", [0, 2, -1])
def test_token_scores_are_of_the_tokens_that_count(chunk_tokens: int) -> None:
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(7, 5, generator=draw), torch.randn(11, 5, generator=draw)
    logits = (x.double() @ weight.double().t()).log_softmax(-1)
    labels = logits.argmax(-1)
    labels[1::2] = torch.tensor([0, 1, IGNORE])
    for kept in (labels, torch.full_like(labels, IGNORE)):
        scores = token_scores(x, weight, kept, chunk_tokens=chunk_tokens)
        counts = kept != IGNORE
        expected = torch.where(counts, -logits.gather(1, kept.clamp(min=0).unsqueeze(1)).squeeze(1), 0.0)
        torch.testing.assert_close(scores.ce.double(), expected, atol=1e-6, rtol=1e-6)
        assert torch.equal(scores.is_correct, counts & (logits.argmax(-1) == kept))


def test_metrics_of_choices() -> None:
    """Four questions by hand: right, wrong, right only by character, right by the first of two that are equal."""
    choices = [("a", "bb"), ("a", "bb"), ("a", "bbbb"), ("a", "b")]
    questions = [Question("", texts, answer, "") for texts, answer in zip(choices, (0, 0, 1, 0), strict=True)]
    task = Task("multiple_choice", questions, [Item([0, 1], 1)] * 8, "")
    metrics = task_metrics(task, [-1.0, -3.0, -4.0, -2.0, -2.0, -4.0, -1.0, -1.0], [False] * 8)
    hits, norm_hits = [1, 0, 0, 1], [1, 0, 1, 1]
    assert metrics == pytest.approx(
        {
            "acc": 0.5,
            "acc_stderr": statistics.stdev(hits) / 2,
            "acc_norm": 0.75,
            "acc_norm_stderr": statistics.stdev(norm_hits) / 2,
            "num_questions": 4,
        }
    )


def test_metrics_of_clozes() -> None:
    values = [-1.0, -2.0, -6.0]
    task = Task("cloze", [Question("", ("a",), 0, "")] * 3, [Item([0, 1], 1)] * 3, "")
    metrics = task_metrics(task, values, [True, False, False])
    perplexity = math.exp(3.0)
    assert metrics == pytest.approx(
        {
            "acc": 1 / 3,
            "acc_stderr": statistics.stdev([1, 0, 0]) / math.sqrt(3),
            "perplexity": perplexity,
            "perplexity_stderr": perplexity * statistics.stdev(values) / math.sqrt(3),
            "num_questions": 3,
        }
    )
    one = task_metrics(task._replace(questions=task.questions[:1]), values[:1], [True])
    assert math.isnan(one["acc_stderr"])
    assert task_metrics(task, [math.nan] * 3, [False] * 3)["acc"] == 0
