"""Generation with kept keys and values gives what the whole context gives, for every prompt of a batch."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.interop.models import KINDS, configure, fill
from titan_moe.build import build_model
from titan_moe.data.tokenizer import bytes_tokenizer
from titan_moe.generate import generate
from titan_moe.model.kv_cache import empty_cache, extend
from titan_moe.model.transformer import Transformer

PROMPTS = ["a", "", "the red house on the hill", "übermorgen 12"]
GREEDY = {"max_new_tokens": 30, "temperature": 0.0, "top_k": 0, "seed": 0}


def make_model(changes: dict[str, Any]) -> Transformer:
    with torch.device("meta"):
        model = build_model(configure(**changes))
    return fill(model)


CACHED = ["dense qk-norm tied", "topk_softmax some layers", "sigmoid shared", "switch", "topk_softmax gate"]
CACHED += ["dense biases", "dense llama3", "topk_softmax yarn", "softmax_topk full", "sigmoid rotary"]


@pytest.mark.parametrize("kind", CACHED)
def test_logits_of_a_cache_are_those_of_the_whole(kind: str) -> None:
    """Sequences of other lengths, extended by several tokens and by one."""
    model = make_model(KINDS[kind][1])
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 257, (n,), generator=generator) for n in (9, 4, 7)]
    cache = empty_cache(model, 3, 12)

    def last(tokens: Tensor) -> Tensor:
        return model(tokens[None])[0][0, -1].detach()

    for row, text in enumerate(texts):
        first = extend(model, cache, text[None, :3], torch.tensor([0]), torch.tensor([row]))
        torch.testing.assert_close(first[0], last(text[:3]), atol=1e-5, rtol=0)
        rest = (
            extend(model, cache, text[None, 3:-1], torch.tensor([3]), torch.tensor([row])) if len(text) > 4 else first
        )
        torch.testing.assert_close(rest[0], last(text[:-1]), atol=1e-5, rtol=0)
    both = torch.tensor([2, 0])  # some of them, in any order
    new = torch.stack([texts[2][-1:], texts[0][-1:]])
    together = extend(model, cache, new, torch.tensor([6, 8]), both)
    torch.testing.assert_close(together[0], last(texts[2]), atol=1e-5, rtol=0)
    torch.testing.assert_close(together[1], last(texts[0]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("context", [16, 64])
@pytest.mark.parametrize("kind", ["dense", "topk_softmax", "sigmoid"])
def test_greedy_text_is_that_of_the_whole_context(kind: str, context: int) -> None:
    """Also where the text outgrows the context; each text is that of its prompt alone."""
    model, tokenizer = make_model(KINDS[kind][1]), bytes_tokenizer()
    whole = generate(model, tokenizer, PROMPTS, context=context, use_cache=False, **GREEDY)
    assert generate(model, tokenizer, PROMPTS, context=context, **GREEDY) == whole
    assert [generate(model, tokenizer, [p], context=context, **GREEDY)[0] for p in PROMPTS] == whole
    assert len(set(whole)) == len(PROMPTS)
    assert all(text.startswith(prompt) for text, prompt in zip(whole, PROMPTS, strict=True))


def test_texts_of_a_batch_are_drawn_independently() -> None:
    model, tokenizer = make_model({}), bytes_tokenizer()
    drawing = {"max_new_tokens": 20, "temperature": 1.0, "top_k": 50, "context": 64}
    texts = generate(model, tokenizer, PROMPTS, seed=3, **drawing)
    alone = [generate(model, tokenizer, [p], seed=3 + i, **drawing)[0] for i, p in enumerate(PROMPTS)]
    assert texts == alone
    twice = generate(model, tokenizer, ["a", "a"], seed=3, **drawing)
    assert twice[0] != twice[1]
