"""Which tensors of ours are which in Hugging Face's files: one table for both ways.

There each expert has matrices of its own, here they are rows of one tensor; everything else is name for name.
"""

from typing import NamedTuple

from titan_moe.config import Config
from titan_moe.convert.hf.architectures import Architecture, moe_layers, shared_width

FP32 = ("e_score_correction_bias",)  # kept in fp32 whatever the dtype of the export


class Pair(NamedTuple):
    """A tensor of ours and its counterpart there, or those of its rows; theirs = scale * ours."""

    ours: str
    theirs: tuple[str, ...]
    scale: float = 1.0
    by_row: bool = False


class TensorMap(NamedTuple):
    """How the tensors of the two sides correspond."""

    pairs: list[Pair]
    zeros: dict[str, tuple[int, ...]]  # theirs that are 0 in a model of ours, with their shapes
    copies: dict[str, str]  # theirs that repeat one of ours
    blank: list[str]  # ours that have no counterpart and must be 0


def tensor_map(config: Config, architecture: Architecture, *, has_bias: bool) -> TensorMap:
    """The map for a model of `config`; `has_bias`: our MoE layers have a selection bias."""
    # From the first layer to the last, because an export writes files in this order.
    table = TensorMap([], {}, {}, [])
    kind, with_experts = architecture.model_type, moe_layers(config)
    table.pairs.append(Pair("tok_embeddings.weight", ("model.embed_tokens.weight",)))
    for layer in range(config.model.num_layers):
        ours, theirs = f"layers.{layer}.", f"model.layers.{layer}."
        _attention(table, config, kind, ours, theirs)
        if layer in with_experts:
            _moe(table, config, architecture, ours, theirs, has_bias)
        else:
            _swiglu(table, ours + "feed_forward.", theirs + "mlp.")
    table.pairs.append(Pair("norm.weight", ("model.norm.weight",)))

    # A tied head has no tensor of its own, except where readers ignore tying.
    if not config.model.tie_embeddings:
        table.pairs.append(Pair("output.weight", ("lm_head.weight",)))
    elif kind == "glm4_moe":
        table.copies["lm_head.weight"] = "tok_embeddings.weight"
    return table


def _attention(table: TensorMap, config: Config, kind: str, ours: str, theirs: str) -> None:
    # The norms of a layer have fixed names on both sides, so this is where they are mapped, too.
    pairs = {
        "attention_norm": "input_layernorm",
        "attention.wq": "self_attn.q_proj",
        "attention.wk": "self_attn.k_proj",
        "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
    }
    model = config.model
    if model.qk_norm != "none":
        pairs |= {"attention.q_norm": "self_attn.q_norm", "attention.k_norm": "self_attn.k_norm"}
    table.pairs.extend(Pair(f"{ours}{a}.weight", (f"{theirs}{b}.weight",)) for a, b in pairs.items())

    # Qwen2Moe always has biases: where ours has none, 0 changes nothing.
    kv_heads = model.num_kv_heads or model.num_heads
    for name, heads in (("q", model.num_heads), ("k", kv_heads), ("v", kv_heads)):
        bias = f"{theirs}self_attn.{name}_proj.bias"
        if model.attention_bias:
            table.pairs.append(Pair(f"{ours}attention.w{name}.bias", (bias,)))
        elif kind == "qwen2_moe":
            table.zeros[bias] = (heads * config.model.channels,)


def _swiglu(table: TensorMap, ours: str, theirs: str, down_scale: float = 1.0) -> None:
    for a, b, scale in (("w1", "gate_proj", 1.0), ("w3", "up_proj", 1.0), ("w2", "down_proj", down_scale)):
        table.pairs.append(Pair(f"{ours}{a}.weight", (f"{theirs}{b}.weight",), scale))


def _moe(table: TensorMap, config: Config, architecture: Architecture, ours: str, theirs: str, has_bias: bool) -> None:
    # The router divides its logits by the temperature, which no architecture knows: its weight is divided instead.
    kind, moe, dim = architecture.model_type, config.moe, config.model.dim
    block = "block_sparse_moe." if kind == "mixtral" else "mlp."
    temperature = config.router.arguments.get("temperature", 1.0)
    table.pairs.append(Pair(f"{ours}moe.router.weight", (f"{theirs}{block}gate.weight",), 1 / temperature))
    parts = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    for a, b in zip(("w1", "w3", "w2"), parts, strict=True):
        names = tuple(f"{theirs}{block}experts.{e}.{b}.weight" for e in range(moe.num_experts))
        table.pairs.append(Pair(f"{ours}moe.experts.{a}", names, by_row=True))

    # Glm4Moe always has a selection bias, the others never: what one side lacks must be 0 on the other.
    bias, their_bias = f"{ours}moe.expert_bias", f"{theirs}{block}gate.e_score_correction_bias"
    if kind == "glm4_moe" and has_bias:
        table.pairs.append(Pair(bias, (their_bias,)))
    elif kind == "glm4_moe":
        table.zeros[their_bias] = (moe.num_experts,)
    elif has_bias:
        table.blank.append(bias)

    # Both of these always have a shared expert: where we have none its weights are 0.
    shared = {"qwen2_moe": f"{theirs}mlp.shared_expert.", "glm4_moe": f"{theirs}mlp.shared_experts."}.get(kind)
    if shared is None:
        return
    if architecture.has_zero_shared:
        table.zeros.update({f"{shared}{name}_proj.weight": (moe.expert_dim, dim) for name in ("gate", "up")})
        table.zeros[f"{shared}down_proj.weight"] = (dim, moe.expert_dim)

    # That of Qwen2Moe is weighed by sigmoid(gate): where ours has no gate theirs is 0, and down_proj is doubled, as the
    # sigmoid is 1/2 then.
    gate, is_doubled = f"{theirs}mlp.shared_expert_gate.weight", kind == "qwen2_moe" and not moe.shared_expert_gate
    if moe.shared_expert_gate:
        table.pairs.append(Pair(f"{ours}moe.shared_expert_gate.weight", (gate,)))
    elif kind == "qwen2_moe":
        table.zeros[gate] = (1, dim)
    if shared_width(config):
        _swiglu(table, f"{ours}moe.shared_experts.", shared, 2.0 if is_doubled else 1.0)
