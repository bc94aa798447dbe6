"""The expert networks and the MoE layer against readable references, eager and compiled."""

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.cases import ROUTER_CASES, Case, build_router, takes_bias
from titan_moe.model.dispatch import combine_rows, local
from titan_moe.model.documents import places_of
from titan_moe.model.moe import MoE, expert_swiglu, swiglu_of_both
from titan_moe.model.routing import Routing
from titan_moe.model.routing.token_choice import topk_softmax

D, HIDDEN, E, K = 16, 24, 4, 2
COUNTS = {
    "even": [5, 5, 5, 5],
    "uneven, one empty": [9, 0, 3, 8],
    "first and last empty": [0, 12, 8, 0],
    "all to one": [0, 20, 0, 0],
    "one row": [0, 0, 1, 0],
}


def swiglu_by_loop(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """What expert_swiglu means: each expert's rows through its own three matrices."""
    rows = x.split(tokens_per_expert.tolist())
    return torch.cat([(F.silu(x_e @ w1[e].T) * (x_e @ w3[e].T)) @ w2[e].T for e, x_e in enumerate(rows)])


def moe_by_loop(moe: MoE, x: Tensor, routing: Routing) -> Tensor:
    """What a MoE layer means: for each token, the weighted outputs of its experts."""
    flat = x.flatten(0, 1)
    out = torch.zeros_like(flat)
    w = moe.experts
    for t in range(len(flat)):
        for k in range(routing.topk_experts.shape[1]):
            e = int(routing.topk_experts[t, k])
            if e == E or (routing.kept is not None and not routing.kept[t, k]):
                continue
            y = w.w2[e] @ (F.silu(w.w1[e] @ flat[t]) * (w.w3[e] @ flat[t]))
            out[t] = out[t] + routing.topk_scores[t, k].to(x.dtype) * y
    if moe.shared_experts is not None:
        out = out + moe.shared_experts(flat)
    return out.view_as(x)


def build(name: str | Case = "topk_softmax", num_shared: int = 0, bias: bool = False, dim: int = D) -> MoE:
    torch.manual_seed(0)
    case = Case(name, {}) if isinstance(name, str) else name
    route = build_router(case.name, **case.arguments)
    moe = MoE(
        dim=dim,
        num_experts=E,
        expert_dim=HIDDEN,
        route=route,
        num_shared_experts=num_shared,
        expert_bias=bias,
    )
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.3)
    return moe


def run(layer: object, moe: MoE, x: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of a loss that also reads the routing."""
    moe.zero_grad()
    x = x.detach().requires_grad_()
    y, routing = layer(x)  # pyrefly: ignore
    weights = torch.linspace(-1, 1, y.numel()).view_as(y)
    ((y.float() * weights).sum() + (routing.scores**2).sum()).backward()
    assert x.grad is not None
    gradients = {name: p.grad.clone() for name, p in moe.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x.grad": x.grad, **gradients}


def labelled(name: str) -> Callable[[str], str]:
    return lambda message: f"{name}: {message}"


def assert_same(got: dict[str, Tensor], want: dict[str, Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in got.items():
        scale = max(1.0, float(want[name].float().abs().max()))
        assert_close(value.float(), want[name].float(), rtol=0, atol=tolerance * scale, msg=labelled(name))


def as_on_a_gpu(x: Tensor, w1: Tensor, w2: Tensor, w3: Tensor, tokens_per_expert: Tensor) -> Tensor:
    """What expert_swiglu does there, where w1 and w3 are one product."""
    return swiglu_of_both(x, w1, w2, w3, tokens_per_expert.cumsum(0, dtype=torch.int32), "high")


@pytest.mark.parametrize("ours", [expert_swiglu, as_on_a_gpu])
@pytest.mark.parametrize("counts", [*COUNTS.values(), [0, 0, 0, 0]], ids=[*COUNTS, "no row"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
def test_experts_equal_the_loop(
    counts: list[int], dtype: torch.dtype, tolerance: float, ours: Callable[..., Tensor]
) -> None:
    torch.manual_seed(0)
    shapes = [(sum(counts), D), (E, HIDDEN, D), (E, D, HIDDEN), (E, HIDDEN, D)]
    inputs = [(torch.randn(shape) / 2).to(dtype).requires_grad_() for shape in shapes]
    loads = torch.tensor(counts)
    results = []
    x, w1, w2, w3 = inputs
    for function in (ours, swiglu_by_loop):
        y = function(x, w1, w2, w3, loads)
        weights = torch.linspace(-1, 1, y.numel(), dtype=dtype).view_as(y)
        results.append([y, *torch.autograd.grad(y, inputs, weights)])
    for got, want in zip(*results, strict=True):
        assert got.dtype == dtype
        assert_close(got, want, rtol=tolerance, atol=tolerance)
    for gradient in results[0][2:]:
        assert gradient.is_contiguous() or ours is not expert_swiglu  # on a CPU autograd keeps them, without a copy
        assert (gradient[loads == 0] == 0).all()


def test_experts_take_an_expanded_gradient() -> None:
    inputs = [
        torch.randn(shape, requires_grad=True) for shape in [(6, D), (E, HIDDEN, D), (E, D, HIDDEN), (E, HIDDEN, D)]
    ]
    x, w1, w2, w3 = inputs
    loads = torch.tensor([2, 2, 1, 1])
    got = torch.autograd.grad(expert_swiglu(x, w1, w2, w3, loads).sum(), inputs)
    want = torch.autograd.grad(swiglu_by_loop(x, w1, w2, w3, loads).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_weight_gradients_are_kept_and_not_copied() -> None:
    """Autograd keeps a gradient that is contiguous and not referred to elsewhere: no second tensor of that size."""
    moe = build()
    made: list[int] = []
    for weight in moe.experts.parameters():
        weight.register_hook(lambda gradient: made.append(gradient.data_ptr()))
    y, _ = moe(torch.randn(1, 5, D))
    y.sum().backward()
    assert sorted(made) == sorted(w.grad.data_ptr() for w in moe.experts.parameters() if w.grad is not None)


@pytest.mark.parametrize("case", ROUTER_CASES, ids=str)
@pytest.mark.parametrize("num_shared", [0, 2])
def test_layer_equals_the_loop(case: Case, num_shared: int) -> None:
    moe = build(case, num_shared, bias=takes_bias(case.name))
    if moe.expert_bias is not None:
        moe.expert_bias.copy_(torch.tensor([0.5, -0.5, 0, 0]))
    x, places = torch.randn(2, 7, D), places_of(torch.tensor([[1, 0, 1, 1, 1, 0, 1], [1] * 7]), 0)

    def reference(z: Tensor) -> tuple[Tensor, Routing]:
        torch.manual_seed(5)
        asked = moe.take(moe.asked, places._asdict())
        routing = moe.route(moe.router(z.flatten(0, 1)), moe.expert_bias, **asked)
        return moe_by_loop(moe, z, routing), routing

    torch.manual_seed(5)  # for noisy routers
    assert_same(run(lambda z: moe(z, places), moe, x), run(reference, moe, x), 1e-5)


def test_layer_with_one_token() -> None:
    moe = build()
    x = torch.randn(1, 1, D)
    y, routing = moe(x)
    assert routing.tokens_per_expert.sum() == K
    assert_close(y, moe_by_loop(moe, x, routing), rtol=1e-5, atol=1e-5)


def test_forward_writes_nothing() -> None:
    moe = build(bias=True)
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    moe(torch.randn(2, 7, D))[0].sum().backward()
    for name, value in moe.state_dict().items():
        assert_close(value, before[name], rtol=0, atol=0)


@pytest.mark.slow
def test_equals_mixtral() -> None:
    """The whole layer against transformers' MixtralSparseMoeBlock: outputs and every gradient."""
    pytest.importorskip("transformers")
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(hidden_size=D, intermediate_size=HIDDEN, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    theirs, ours = MixtralSparseMoeBlock(config), build()
    experts = ours.experts
    with torch.no_grad():
        theirs.gate.weight.copy_(ours.router.weight)
        theirs.experts.gate_up_proj.copy_(torch.cat([experts.w1, experts.w3], dim=1))
        theirs.experts.down_proj.copy_(experts.w2)
    x = torch.randn(2, 9, D)
    x1, x2 = x.clone().requires_grad_(), x.clone().requires_grad_()
    y1, y2 = ours(x1)[0], theirs(x2)
    weights = torch.randn_like(y1)
    y1.backward(weights)
    y2.backward(weights)
    assert theirs.experts.gate_up_proj.grad is not None
    gate, up = theirs.experts.gate_up_proj.grad.chunk(2, dim=1)
    pairs = {
        "y": (y1, y2),
        "x": (x1.grad, x2.grad),
        "router": (ours.router.weight.grad, theirs.gate.weight.grad),
        "w1": (experts.w1.grad, gate),
        "w2": (experts.w2.grad, theirs.experts.down_proj.grad),
        "w3": (experts.w3.grad, up),
    }
    for name, (a, b) in pairs.items():
        assert_close(a, b, rtol=1e-5, atol=1e-5, msg=labelled(name))


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # torch's own, as inductor starts
@pytest.mark.filterwarnings(
    "ignore:.*Function'> should not be instantiated:DeprecationWarning"
)  # torch's own, in dynamo
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    ("dtype", "tolerance", "backend"), [(torch.float32, 1e-5, "inductor"), (torch.bfloat16, 3e-2, "aot_eager")]
)
def test_compiled_layer_is_the_same_and_compiles_once(dtype: torch.dtype, tolerance: float, backend: str) -> None:
    moe = build(num_shared=1, bias=True).to(dtype)
    compiled = torch.compile(moe, fullgraph=True, backend=backend)
    batches = [torch.randn(2, 8, D).to(dtype) for _ in range(3)]
    batches.append(batches[0][:1, :1].expand(2, 8, D).contiguous())  # every token to the same two experts
    batches.append(torch.zeros(2, 8, D, dtype=dtype))
    assert_same(run(compiled, moe, batches[0]), run(moe, moe, batches[0]), tolerance)
    with torch.compiler.set_stance("fail_on_recompile"):
        for x in batches[1:]:
            assert_same(run(compiled, moe, x), run(moe, moe, x), tolerance)


def test_checkpointed_layer_is_the_same() -> None:
    moe = build(bias=True)
    x = torch.randn(2, 7, D)
    assert_same(run(lambda z: checkpoint(moe, z, use_reentrant=False), moe, x), run(moe, moe, x), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(dtype: torch.dtype) -> None:
    """Under FakeTensorMode a read of a tensor's value raises."""
    moe = build(num_shared=1, bias=True).to(dtype)
    with FakeTensorMode(allow_non_fake_inputs=True):
        y, routing = moe(torch.randn(2, 7, D, dtype=dtype))
        (y.sum() + routing.scores.sum()).backward()
    for parameter in moe.parameters():
        assert isinstance(parameter.grad, FakeTensor)


def test_flops_are_those_of_the_chosen_experts() -> None:
    moe = build()
    with FlopCounterMode(display=False) as flops:
        moe(torch.randn(1, 10, D))[0].sum().backward()
    router = 2 * 10 * D * E * 2  # the input needs no gradient, the router's weight does
    assert flops.get_total_flops() == router + 3 * 3 * 2 * (10 * K) * D * HIDDEN


def test_dispatcher_with_identity_experts_gives_back_x() -> None:
    dispatcher = local()
    x = torch.randn(11, D, requires_grad=True)
    routing = topk_softmax(top_k=K)(torch.randn(11, E), None)
    rows, tokens_per_expert, permutation, state = dispatcher.dispatch(x, routing)
    rows = dispatcher.receive(rows, state)
    assert tokens_per_expert.sum() == len(rows)
    y = combine_rows(dispatcher.send_back(rows, state), routing.topk_scores, permutation)
    assert_close(y, x)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(gradient, torch.ones_like(x))


def test_scores_stay_in_fp32() -> None:
    """The output of bf16 rows is rounded once, and the scores' gradient is a sum in fp32 of unrounded products."""
    generator = torch.Generator().manual_seed(0)
    rows, width = 24, 1024
    x, y, grad = (torch.randn(n, width, generator=generator).bfloat16() for n in (rows, K * rows, rows))
    routing = topk_softmax(top_k=K)(torch.randn(rows, E, generator=generator), None)
    dispatcher = local()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        scores = routing.topk_scores.to(torch.promote_types(dtype, torch.float32)).detach().requires_grad_()
        _, _, permutation, state = dispatcher.dispatch(x.to(dtype), routing)
        out = combine_rows(dispatcher.send_back(y.to(dtype), state), scores, permutation)
        out.backward(grad.to(dtype))
        assert scores.grad is not None
        results.append((out.detach().double(), scores.grad.double()))
    (output, gradient), (exact_output, exact_gradient) = results
    assert ((output - exact_output) / exact_output).abs().max() <= 1.001 * 2**-8
    assert (gradient - exact_gradient).abs().max() <= 1e-6 * exact_gradient.abs().max()


def test_rows_that_are_not_computed_are_not_read() -> None:
    """With a capacity the rows after the last expert's hold anything: here NaN, in forward and backward."""
    dispatcher = local()
    x = torch.randn(11, D, requires_grad=True)
    z = torch.randn(11, E) + torch.tensor([0, 0, 3.0, 6.0])
    routing = topk_softmax(top_k=K, capacity_factor=1.0)(z, None)
    rows, counts, permutation, state = dispatcher.dispatch(x, routing)
    assert routing.kept is not None
    assert routing.capacity == 6
    assert counts.sum() == routing.kept.sum() < len(rows)
    poison = torch.zeros(len(rows), 1)
    poison[int(counts.sum()) :] = torch.nan
    computed = rows + poison
    computed.register_hook(lambda gradient: gradient + poison)
    y = combine_rows(dispatcher.send_back(computed, state), routing.topk_scores, permutation)
    weights_T1 = routing.topk_scores.sum(-1, keepdim=True)
    assert_close(y, x * weights_T1)
    (gradient,) = torch.autograd.grad(y, x, torch.ones_like(y))
    assert_close(gradient, weights_T1.expand(11, D))


def test_dispatch_sorts_by_expert_and_keeps_the_order_of_tokens() -> None:
    routing = topk_softmax(top_k=K)(torch.randn(11, E), None)
    rows, tokens_per_expert, *_ = local().dispatch(torch.arange(11.0).unsqueeze(1), routing)
    want = [t for e in range(E) for t in range(11) if e in routing.topk_experts[t]]
    assert rows.flatten().tolist() == want
    assert tokens_per_expert.tolist() == [sum(e in row for row in routing.topk_experts) for e in range(E)]
