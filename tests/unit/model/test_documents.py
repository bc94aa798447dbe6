"""Documents that don't see each other: attention by formula, and a model by each document alone."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.tiny import SEQ, VOCAB, balancers, tiny_model
from titan_moe.model import documents as module
from titan_moe.model.attention import attend_to_past, max_logits
from titan_moe.model.documents import (
    attend_by_mask,
    attend_in_documents,
    document_attention,
    documents_of,
    places_of,
)
from titan_moe.model.kv_cache import empty_cache, extend
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.optimizer import Optimizer
from titan_moe.parallelize.parallelize import parallelize
from titan_moe.step import eval_step, train_step

EOT = 3
B, S, H, G, C = 2, 12, 4, 2, 8
ENDS = st.lists(st.lists(st.booleans(), min_size=SEQ, max_size=SEQ), min_size=1, max_size=3)
KINDS: dict[str, Any] = {
    "num_heads": 4,
    "num_kv_heads": 2,
    "qk_norm": True,
    "first_dense_layers": 1,
    "num_shared_experts": 1,
    "tie_embeddings": False,
}


def tokens_of(ends: list[list[bool]]) -> Tensor:
    """Tokens (B, S) of any kind whose documents end where `ends` says."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(EOT + 1, VOCAB, (len(ends), len(ends[0])), generator=generator)
    return tokens.masked_fill(torch.tensor(ends), EOT)


def borders(ends: list[bool]) -> list[tuple[int, int]]:
    """Where the documents of a sequence begin and end, by a loop."""
    places = [0, *(i + 1 for i, end in enumerate(ends) if end), len(ends)]
    return [(first, last) for first, last in pairwise(places) if last > first]


def model_of(**options: Any) -> Transformer:
    model = tiny_model(**{**KINDS, "document_mask": True, **options})
    model.init_weights(0)
    for bias in model.expert_biases():
        bias.copy_(torch.linspace(-0.05, 0.05, len(bias)))
    return model


def by_formula(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
    """softmax(q k / sqrt(C)) v over the keys up to each query's own position that are of its document, in float64."""
    q, k, v = (x.double() for x in (q, k, v))
    keys, queries = k.shape[2], q.shape[2]
    logits = q @ k.repeat_interleave(H // G, 1).transpose(-1, -2) / math.sqrt(C)  # (B, H, S, K)
    seen = (ids[:, -queries:, None] == ids[:, None, :]) & torch.ones(queries, keys).tril(keys - queries).bool()
    return logits.masked_fill(~seen[:, None], -math.inf).softmax(-1) @ v.repeat_interleave(H // G, 1)


def varlen_by_loop(
    q: Tensor, k: Tensor, v: Tensor, cu_queries: Tensor, cu_keys: Tensor, max_queries: int, max_keys: int
) -> Tensor:
    """What FlashAttention says of its kernels for sequences in a row: the causal mask ends at the last key."""
    assert cu_queries.dtype == cu_keys.dtype == torch.int32
    assert (len(q), len(k)) == (cu_queries[-1], cu_keys[-1])
    rows = []
    for (q0, q1), (k0, k1) in zip(pairwise(cu_queries.tolist()), pairwise(cu_keys.tolist()), strict=True):
        assert q1 - q0 <= min(k1 - k0, max_queries)
        assert k1 - k0 <= max_keys
        own_k, own_v = (x[k0:k1].repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1) for x in (k, v))
        mask = torch.ones(q1 - q0, k1 - k0).tril(k1 - k0 - q1 + q0).bool()
        rows.append(F.scaled_dot_product_attention(q[q0:q1].transpose(0, 1), own_k, own_v, mask).transpose(0, 1))
    return torch.cat(rows)


def heads(seed: int, number: int, length: int = S, rows: int = B, dtype: torch.dtype = torch.float32) -> Tensor:
    """(B, H, S, C), in memory as a projection leaves it."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, length, number, C, generator=generator, dtype=dtype).transpose(1, 2).requires_grad_()


WAYS = ("by document", "mask", "varlen")


def attend(way: str, q: Tensor, k: Tensor, v: Tensor, ids: Tensor, start: int = 0) -> Tensor:
    found = documents_of(ids, start, k.shape[2], limited=False)
    if way == "mask":
        return attend_by_mask(q, k, v, found.first_keys)
    with pytest.MonkeyPatch.context() as patch:
        if way == "varlen":
            patch.setattr(module, "takes_varlen", lambda *_: True)
            patch.setattr(module, "causal_varlen_attention", varlen_by_loop)
        return attend_in_documents(q, k, v, found)


@pytest.mark.parametrize("way", WAYS)
@settings(max_examples=25, deadline=None)
@given(ends=st.lists(st.lists(st.booleans(), min_size=S, max_size=S), min_size=B, max_size=B), run=st.integers(0, 2))
@example(ends=[[False] * S] * B, run=2)
@example(ends=[[True] * S] * B, run=1)
def test_attention_is_the_formula(way: str, ends: list[list[bool]], run: int) -> None:
    """Outputs and gradients, of all queries or of those of a run, whose keys are those up to its end."""
    start, stop = ((0, S), (0, S // 4), (S // 2, 3 * S // 4))[run]
    ids = places_of(tokens_of(ends), EOT).document_ids
    inputs = [heads(0, H, stop - start), heads(1, G, stop), heads(2, G, stop)]
    weights = heads(3, H, stop - start).detach()
    got, want = attend(way, *inputs, ids, start), by_formula(*inputs, ids[:, :stop])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-6)
    of_got, of_want = (torch.autograd.grad((y * weights).sum(), inputs) for y in (got, want))
    for one, two in zip(of_got, of_want, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_attention_in_other_types(dtype: torch.dtype) -> None:
    ids = places_of(tokens_of([[False, True, False, False] * 3] * B), EOT).document_ids
    inputs = [heads(0, H).to(dtype), heads(1, G).to(dtype), heads(2, G).to(dtype)]
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-12
    torch.testing.assert_close(
        attend("by document", *inputs, ids).double(), by_formula(*inputs, ids), rtol=0, atol=tolerance
    )


def test_one_document_is_attention_as_it_is_to_the_bit() -> None:
    q, k, v = heads(0, H), heads(1, G), heads(2, G)
    found = documents_of(torch.zeros(B, S, dtype=torch.int64), 0, S, limited=False)
    assert torch.equal(attend_to_past(q, k, v, False, (found,))[0], attend_to_past(q, k, v)[0])


def test_the_operator_keeps_torchs_rules() -> None:
    """Its fake form, its gradient, and that it writes nothing it was given."""
    found = documents_of(places_of(tokens_of([[False, True, False] * 4] * B), EOT).document_ids, 0, S, limited=False)
    inputs = (heads(0, H), heads(1, G), heads(2, G), found.cu_queries, found.cu_keys)
    torch.library.opcheck(document_attention, inputs)
    y = document_attention(*inputs)[0]
    y.sum().backward()  # whose gradient has no memory of its own
    assert all(x.grad is not None and x.grad.isfinite().all() for x in inputs[:3])


def test_largest_logits_are_those_inside_documents() -> None:
    """Of more queries than are looked at together, and of a run of them."""
    length = 200
    ends = [[i % n == n - 1 for i in range(length)] for n in (7, 90)]
    ids = places_of(tokens_of(ends), EOT).document_ids
    q, k = heads(0, H, length).detach(), heads(1, G, length).detach()
    for start, stop in ((0, length), (100, 150)):
        own_q, own_k = q[:, :, start:stop], k[:, :, :stop]
        logits = own_q.double() @ own_k.double().repeat_interleave(H // G, 1).transpose(-1, -2) / math.sqrt(C)
        seen = (ids[:, start:stop, None] == ids[:, None, :stop]) & torch.ones(stop - start, stop).tril(start).bool()
        want = logits.masked_fill(~seen[:, None], -math.inf).amax((0, 2, 3))
        got = max_logits(own_q, own_k, documents_of(ids, start, stop, limited=False).first_keys)
        torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
        assert (got < max_logits(own_q, own_k)).any()


@settings(max_examples=50, deadline=None)
@given(ends=ENDS)
def test_places_are_those_of_a_loop(ends: list[list[bool]]) -> None:
    tokens = tokens_of(ends)
    for restart in (False, True):
        places = places_of(tokens, EOT, restart)
        for row, own in enumerate(ends):
            of = [(number, first, i) for number, (first, last) in enumerate(borders(own)) for i in range(first, last)]
            assert places.document_ids[row].tolist() == [number for number, _, _ in of]
            assert places.positions[row].tolist() == [i - first if restart else i for _, first, i in of]
    found = documents_of(places_of(tokens, EOT).document_ids, 0, SEQ, limited=False)
    cuts = [row * SEQ + first for row, own in enumerate(ends) for first, _ in borders(own)]
    assert found.cu_keys.tolist() == cuts + [len(ends) * SEQ] * (len(ends) * SEQ + 1 - len(cuts))


@pytest.mark.parametrize("restart", [False, True])
@settings(max_examples=15, deadline=None)
@given(ends=ENDS)
@example(ends=[[False] * SEQ, [True] * SEQ, [False] * (SEQ - 1) + [True]])
def test_a_model_is_that_of_each_document_alone(restart: bool, ends: list[list[bool]]) -> None:
    """Logits, and the gradients of the summed loss by every parameter, with routing in the layers."""
    model, tokens = model_of(restart_positions=restart), tokens_of(ends)
    labels = tokens.roll(-1, 1)
    logits, routings = model(tokens)
    loss, _ = model(tokens, labels)
    got = torch.autograd.grad(loss, list(model.parameters()))
    want, alone = [torch.zeros_like(p) for p in model.parameters()], torch.zeros_like(logits)
    experts = torch.empty_like(routings[0].topk_experts).view(*tokens.shape, -1)
    for row, own in enumerate(ends):
        for first, last in borders(own):
            at = (slice(row, row + 1), slice(first, last))
            alone[at], routed = model(tokens[at])
            experts[at] = routed[0].topk_experts
            gradients = torch.autograd.grad(model(tokens[at], labels[at])[0], list(model.parameters()))
            want = [total + part for total, part in zip(want, gradients, strict=True)]
    assert torch.equal(experts.flatten(0, 1), routings[0].topk_experts)
    torch.testing.assert_close(logits, alone, rtol=0, atol=1e-5)
    for (name, _), one, two in zip(model.named_parameters(), got, want, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_without_the_mask_documents_see_each_other() -> None:
    tokens = tokens_of([[i == 7 for i in range(SEQ)]])
    other = tokens.clone()
    other[0, 2] += 1
    masked, plain = model_of(), model_of(document_mask=False)
    assert torch.equal(masked(tokens)[0][0, 8:], masked(other)[0][0, 8:])
    assert not torch.equal(plain(tokens)[0][0, 8:], plain(other)[0][0, 8:])
    assert not torch.equal(masked(tokens)[0][0, 3:8], masked(other)[0][0, 3:8])


def test_restarted_positions_go_to_routers_too() -> None:
    """And the rotation has them: angles of the same distance differ by round-off alone."""
    ends = [[i in (4, 9) for i in range(SEQ)]] * 2
    seen: list[Tensor] = []

    def route(logits: Tensor, bias: Tensor | None, positions: Tensor) -> Any:
        seen.append(positions)
        return plain(logits, bias)

    for restart, first in ((False, range(SEQ)), (True, [*range(5), *range(5), *range(6)])):
        model = model_of(restart_positions=restart)
        plain = model.moe_layers()[0].route
        whole = model(tokens_of(ends))[0]
        model.moe_layers()[0].route, model.moe_layers()[0].asked, model.asks_places = route, ("positions",), True
        torch.testing.assert_close(model(tokens_of(ends))[0], whole, rtol=0, atol=0)
        assert seen[-1].tolist() == [[*first]] * 2
    torch.testing.assert_close(whole, model_of()(tokens_of(ends))[0], rtol=0, atol=1e-5)


def step_of(model: Transformer, ends: list[list[bool]], **options: Any) -> dict[str, Any]:
    """The loss, loads and new weights of a step, and an evaluation."""
    tokens = tokens_of(ends)
    sgd = Optimizer.around(torch.optim.SGD(model.parameters(), lr=1.0))
    output = train_step(
        model, [(tokens, tokens.roll(-1, 1))], sgd, balancers(), model.expert_biases(), max_norm=0.0, **options
    )
    score = eval_step(model, tokens, tokens.roll(-1, 1), torch.ones(VOCAB))
    return {
        "loss": output.loss,
        "load": output.load,
        "largest": None if output.qk_clip is None else output.qk_clip.max_logits,
        "score": score.loss_sum,
        "weights": [p.detach() for p in model.parameters()],
    }


EVERY_FIFTH = [[(i + row) % 5 == 4 for i in range(SEQ)] for row in range(4)]
MODES = [
    *(("full", False), ("selective", False), ("none", True)),
    *(pytest.param(mode, True, marks=pytest.mark.slow) for mode in ("full", "selective")),
]


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own, in dynamo
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")  # as well
@pytest.mark.parametrize(("mode", "is_compiled"), MODES, ids=str)
def test_checkpointed_and_compiled_steps_are_the_same(
    mode: str, is_compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole graphs, one for all documents; attention is computed once where its result is saved."""
    torch.compiler.reset()
    sizes = {"qk_norm": False, "restart_positions": True}
    want = step_of(model_of(**sizes), EVERY_FIFTH, qk_clip=1e-6)
    model = model_of(**sizes)
    if is_compiled:
        compiler = torch.compile
        monkeypatch.setattr(torch, "compile", lambda *args, **options: compiler(*args, **options, backend="aot_eager"))
    options = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
    parallelize(model, mesh=None, checkpoint_mode=mode, compile_blocks=is_compiled, **options)
    torch.testing.assert_close(step_of(model, EVERY_FIFTH, qk_clip=1e-6), want, rtol=1e-5, atol=1e-6)

    # other documents are no other graph
    calls: list[int] = []
    monkeypatch.setattr(module, "_pieces", lambda *inputs, pieces=module._pieces: calls.append(1) or pieces(*inputs))
    with torch.compiler.set_stance("fail_on_recompile") if is_compiled else torch.enable_grad():
        output, _ = model(tokens_of([[False] * SEQ] * 4), tokens_of(EVERY_FIFTH), "loss_and_max_logits")
        output.ce_sum.backward()
    assert len(calls) == (6 if mode == "full" else 4)  # of two layers: forward, forward again, backward


@pytest.mark.parametrize("restart", [False, True])
def test_a_cache_keeps_documents_apart(restart: bool) -> None:
    """A prompt with ends of text in it, extended by several tokens and by one, in any order of rows."""
    model = model_of(restart_positions=restart).eval()
    texts = tokens_of([[i in (3, 8) for i in range(SEQ)], [i in (0, 1, 15) for i in range(SEQ)]])
    cache = empty_cache(model, 2, SEQ + 4)
    rows = torch.tensor([1, 0])
    for start, stop in ((0, 6), (6, 9), (9, 10), (10, 16)):
        got = extend(model, cache, texts[rows, start:stop], torch.full((2,), start), rows)
        torch.testing.assert_close(got, model(texts[rows, :stop])[0][:, -1].detach(), rtol=0, atol=1e-5)


def test_more_documents_than_have_room_are_nan_and_no_other_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU, where memory for documents is set aside before it is known how many they are."""
    monkeypatch.setattr("titan_moe.model.transformer.takes_varlen", lambda *_: True)
    monkeypatch.setattr(module, "takes_varlen", lambda *_: True)
    monkeypatch.setattr(module, "causal_varlen_attention", varlen_by_loop)
    model = model_of()  # two places for each sequence of 16
    fits = [[i == 8 for i in range(SEQ)], [i in (1, 2) for i in range(SEQ)], [False] * SEQ]
    got = model(tokens_of(fits))[0]
    monkeypatch.undo()
    torch.testing.assert_close(got, model(tokens_of(fits))[0], rtol=0, atol=1e-6)
    monkeypatch.setattr("titan_moe.model.transformer.takes_varlen", lambda *_: True)
    assert model(tokens_of(fits))[0].isfinite().all()  # six documents, all that there is room for
    fits[2][5] = True
    assert model(tokens_of(fits))[0].isnan().all()


def test_a_run_of_queries_has_room_for_the_documents_before_it() -> None:
    """Their keys are there, too, though no query sees them."""
    length = 64
    for ends, fits in (([15, 31, 47], True), ([3, 7, 15, 31], True), ([3, 7, 11, 15, 31], False)):
        ids = places_of(tokens_of([[i in ends for i in range(length)]]), EOT).document_ids
        found = documents_of(ids, length - 8, length, limited=True)
        assert len(found.cu_keys) == len(found.cu_queries) == length // 16 + 2
        assert (found.fits == 1).item() == fits
        assert documents_of(ids, length - 8, length, limited=False).fits == 1


def test_a_model_that_does_not_know_the_end_of_text() -> None:
    model = model_of()
    model.eot_id = None
    with pytest.raises(ValueError, match=r"model\.eot_id must be the token that ends documents"):
        model(tokens_of([[False] * SEQ]))
