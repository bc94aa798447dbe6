"""The decoder: against transformers' Llama and Mixtral, its layouts, and its initialisation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.testing import assert_close
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils.checkpoint import checkpoint

from titan_moe.model.moe import FeedForward, MoE
from titan_moe.model.routing.token_choice import topk_softmax
from titan_moe.model.transformer import Transformer, moe_layer_ids

SIZES: dict[str, Any] = {"vocab_size": 64, "dim": 32, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
EXPERTS: dict[str, Any] = {"num_experts": 4, "expert_dim": 24, "router": topk_softmax(top_k=2)}


def build(seed: int = 0, **changes: Any) -> Transformer:
    with torch.device("meta"):
        model = Transformer(**{**SIZES, **changes})
    model.to_empty(device="cpu").init_weights(seed)
    return model


def tokens(batch: int = 2, length: int = 11) -> Tensor:
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(5))


NAMES = {
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "moe.router": "mlp.gate",
    "moe.experts.w2": "mlp.experts.down_proj",
    "tok_embeddings": "embed_tokens",
    "model.output": "lm_head",
}


def copy_to_transformers(ours: Transformer, theirs: nn.Module) -> None:
    """Fill a transformers model with our weights by name."""
    state: dict[str, Tensor] = {}
    for name, value in ours.state_dict(prefix="model.").items():
        for our_part, their_part in NAMES.items():
            name = name.replace(our_part, their_part)  # noqa: PLW2901
        state[name] = value
    for name in [n for n in state if n.endswith("experts.w1")]:
        gate, up = state.pop(name), state.pop(name.replace("w1", "w3"))
        state[name.replace("moe.experts.w1", "mlp.experts.gate_up_proj")] = torch.cat([gate, up], dim=1)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}


@pytest.mark.parametrize("architecture", ["Llama", "Mixtral", "Qwen3"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_equals_transformers(architecture: str, tied: bool) -> None:
    """Logits: positions, grouped heads, norms and residuals, QK-norm (Qwen3), a MoE in every layer (Mixtral)."""
    transformers = pytest.importorskip("transformers")
    changes = {"Llama": {}, "Mixtral": EXPERTS, "Qwen3": {"qk_norm": True}}[architecture]
    ours = build(num_kv_heads=2, tie_embeddings=tied, rope_theta=500.0, init_std=0.2, **changes)
    for parameter in ours.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 2.0)
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=24 if changes is EXPERTS else 48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        tie_word_embeddings=tied,
    )
    theirs = getattr(transformers, f"{architecture}ForCausalLM")(config)
    copy_to_transformers(ours, theirs)
    logits, routings = ours(tokens())
    assert logits.abs().max() > 1
    assert len(routings) == (2 if changes is EXPERTS else 0)
    assert_close(logits, theirs(tokens()).logits, rtol=1e-4, atol=2e-5)


def test_no_token_sees_the_future() -> None:
    model = build(init_std=0.2, **EXPERTS)
    changed = tokens()
    changed[:, 6:] = (changed[:, 6:] + 1) % 64
    before, after = model(tokens())[0], model(changed)[0]
    assert_close(after[:, :6], before[:, :6])
    assert (after[:, 6:] != before[:, 6:]).any()
    assert_close(model(tokens()[:, :4])[0], before[:, :4], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layout", "want"),
    [((6, 4, 0, 1), [0, 1, 2, 3, 4, 5]), ((6, 4, 1, 2), [1, 3, 5]), ((6, 4, 2, 3), [2, 5]), ((6, 0, 0, 1), [])],
)
def test_moe_layers(layout: tuple[int, int, int, int], want: list[int]) -> None:
    assert list(moe_layer_ids(*layout)) == want
    num_layers, num_experts, first, freq = layout
    sizes = {**EXPERTS, "num_experts": num_experts, "num_layers": num_layers}
    model = build(**sizes, first_dense_layers=first, layer_freq=freq)
    kinds = [type(layer.moe or layer.feed_forward) for layer in model.layers]
    assert kinds == [MoE if i in want else FeedForward for i in range(num_layers)]
    assert len(model(tokens())[1]) == len(want)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 5}, r"model.num_heads \(5\) must divide model.dim \(32\)"),
        ({"num_heads": 32}, r"must be even"),
        ({"num_kv_heads": 3}, r"model.num_kv_heads \(3\) must divide model.num_heads \(4\)"),
        ({"ffn_dim": 0}, r"model.ffn_dim \(0\).*layer 0 is dense"),
        ({**EXPERTS, "expert_dim": 0}, r"moe.expert_dim \(0\)"),
        ({**EXPERTS, "expert_dim": 12}, r"moe.expert_dim \(12\) must be a multiple of 8"),
        ({**EXPERTS, "router": None}, r"router must be given"),
        ({**EXPERTS, "first_dense_layers": 2}, r"moe.first_dense_layers \(2\)"),
        ({**EXPERTS, "layer_freq": 0}, r"moe.layer_freq \(0\)"),
    ],
)
def test_sizes_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_initial_values() -> None:
    model = build(dim=64, vocab_size=512, num_layers=8, num_shared_experts=1, expert_bias=True, **EXPERTS)
    for name, parameter in model.state_dict().items():
        if name.endswith("expert_bias"):
            continue
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        residual = any(part in name for part in (".wo.", ".w2"))
        want = 0.02 / math.sqrt(16) if residual else 0.02
        spread = 4 / math.sqrt(2 * parameter.numel())  # four standard errors of a standard deviation
        assert float(parameter.std()) == pytest.approx(want, rel=spread), name
        assert abs(float(parameter.mean())) < 4 * want / math.sqrt(parameter.numel()), name
    for name, buffer in model.named_buffers():
        assert name.endswith("moe.expert_bias")
        assert buffer.dtype == torch.float32
        assert (buffer == 0).all()


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    one, same, other = build(7, **EXPERTS), build(7, **EXPERTS), build(8, **EXPERTS)
    deeper = dict(build(7, num_layers=3, first_dense_layers=1, **EXPERTS).named_parameters())
    for (name, a), b, c in zip(one.named_parameters(), same.parameters(), other.parameters(), strict=True):
        assert_close(a, b, rtol=0, atol=0)
        assert a.dim() == 1 or not torch.equal(a, c)
        if name in deeper and not name.endswith((".w2", ".wo.weight")):
            assert_close(a, deeper[name], rtol=0, atol=0)
    first, second = (layer.moe.experts for layer in one.layers)  # pyrefly: ignore
    assert len({w[0, 0, 0].item() for w in (first.w1, first.w3, second.w1, second.w3)}) == 4


def test_initial_values_do_not_depend_on_wrappers_or_dtype() -> None:
    plain = dict(build(**EXPERTS).named_parameters())
    wrapped = build(**EXPERTS)
    for i in range(len(wrapped.layers)):
        wrapped.layers[i] = torch.compile(wrapped.layers[i], backend="eager")  # pyrefly: ignore
    wrapped.bfloat16().init_weights(0)
    for (_, got), want in zip(wrapped.named_parameters(), plain.values(), strict=True):
        assert_close(got, want.bfloat16(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*functional collectives:FutureWarning")
def test_initial_values_do_not_depend_on_sharding() -> None:
    """FSDP2 on rank 2 of 4 pretended ones: the shard is its part of the whole."""
    rank = 2
    whole = dict(build(**EXPERTS).named_parameters())
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (4,), mesh_dim_names=("pretended",))
        with torch.device("meta"):
            model = Transformer(**SIZES, **EXPERTS)
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        model.to_empty(device="cpu")
        model.init_weights(0)
        for name, parameter in model.named_parameters():
            assert isinstance(parameter, DTensor)
            local = parameter.to_local()
            assert_close(local, whole[name].chunk(4)[rank][: len(local)], rtol=0, atol=0)
    finally:
        torch.distributed.destroy_process_group()


def test_checkpointed_blocks_give_the_same_gradients() -> None:
    """Activation checkpointing of whole blocks, with a loss that also reads the routing."""
    model = build(init_std=0.2, num_shared_experts=1, expert_bias=True, **EXPERTS)
    gradients = []
    for wrap in (False, True):
        model.zero_grad()
        if wrap:
            for layer in model.layers:
                original = layer.forward
                layer.forward = lambda *a, f=original: checkpoint(f, *a, use_reentrant=False)  # pyrefly: ignore
        logits, routings = model(tokens())
        (logits.logsumexp(-1).mean() + sum((r.scores**2).sum() for r in routings)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(model.parameters()))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, rtol=0, atol=0)


def test_it_learns() -> None:
    """A few AdamW steps on one batch bring the loss far below that of guessing."""
    model = build(num_shared_experts=1, **EXPERTS)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    batch = tokens(2, 17)
    losses = []
    for _ in range(30):
        logits, _ = model(batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(math.log(64), rel=0.05)
    assert losses[-1] < 0.2 * losses[0]
