"""Which Hugging Face architecture a model is, and its config.json from our configuration (back: read_config.py).

Every choice here was compared with transformers' own model: logits agree to 1e-4 (tests/interop).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from titan_moe.config import Config
from titan_moe.model.transformer import moe_layer_ids

# model_type -> the class in transformers
NAMES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "olmoe": "OlmoeForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
SOFTMAX = ("topk_softmax", "softmax_topk", "switch")


class Architecture(NamedTuple):
    """A model type of transformers, and what the map of tensors must know of it."""

    model_type: str
    has_zero_shared: bool = False  # it always has a shared expert, ours has none: one whose weights are 0


def moe_layers(config: Config) -> range:
    """The layers that have experts."""
    moe = config.moe
    return moe_layer_ids(config.model.num_layers, moe.num_experts, moe.first_dense_layers, moe.layer_freq)


def architecture_of(config: Config) -> Architecture:
    """The architecture whose model computes what ours does in evaluation; ValueError where there is none.

    Noise and capacity act in training only and the temperature is divided into the router's weight, so they are no
    obstacle.
    """
    # A dense model is told by its attention alone.
    moe, router = config.moe, config.router
    _check_rotary(config)
    if moe.num_experts == 0:
        return Architecture(_dense(config))
    if moe.num_identity_experts:
        raise ValueError(
            f"moe.num_identity_experts = {moe.num_identity_experts} has no counterpart in the Hugging Face models that "
            "can be written: only a model without them can be"
        )

    # The router decides: only Glm4Moe has sigmoid scores, and with them groups of experts.
    if router.name == "sigmoid":
        _check_glm(config)
        return Architecture("glm4_moe", has_zero_shared=moe.num_shared_experts == 0)
    if router.name not in SOFTMAX:
        raise ValueError(
            f"router.name = {router.name!r} has no counterpart in Hugging Face: topk_softmax, softmax_topk, switch and "
            "sigmoid have"
        )
    if (groups := router.arguments.get("num_groups", 1)) > 1:
        raise ValueError(f"router.num_groups = {groups} has a counterpart in Hugging Face only with router 'sigmoid'")
    if config.model.qk_norm != "none":
        return Architecture(_softmax_with_norm(config))

    # Mixtral where it fits. Everything else with softmax is a Qwen2Moe: that also has dense layers, shared experts,
    # biases, and weights of a token that don't sum to 1.
    every_layer = len(moe_layers(config)) == config.model.num_layers
    plain = moe.num_shared_experts == 0 and not config.model.attention_bias
    if router.name == "topk_softmax" and plain and every_layer:
        return Architecture("mixtral")
    return Architecture("qwen2_moe", has_zero_shared=moe.num_shared_experts == 0)


def _check_rotary(config: Config) -> None:
    """Raise ValueError for heads that are rotated in part, where no other key makes the model a Glm4Moe."""
    part, model = config.model.partial_rotary_factor, config.model
    if part != 1 and not (config.moe.num_experts and config.router.name == "sigmoid" and not model.rope_scaling):
        raise ValueError(
            f"model.partial_rotary_factor = {part} has a counterpart in Hugging Face only with router 'sigmoid' and "
            "without model.rope_scaling: a Glm4Moe"
        )


def _dense(config: Config) -> str:
    """The architecture of a model without experts."""
    norm, bias = config.model.qk_norm, config.model.attention_bias
    if norm == "full" or (norm == "head" and bias):
        raise ValueError(
            f"model.qk_norm = {norm!r} with model.attention_bias = {str(bias).lower()} has no counterpart in Hugging "
            "Face in a dense model: 'head' without bias has (Qwen3), and 'none' with or without (Qwen2, Llama)"
        )
    return "qwen3" if norm == "head" else "qwen2" if bias else "llama"


def _softmax_with_norm(config: Config) -> str:
    """The architecture of a model with a QK-norm whose router has softmax scores."""
    # Qwen3Moe has the norm of each head and OLMoE that of all; neither has shared experts or (as it is sold) biases.
    norm, moe = config.model.qk_norm, config.moe
    if moe.num_shared_experts or config.model.attention_bias:
        key, value = (
            ("moe.num_shared_experts", moe.num_shared_experts)
            if moe.num_shared_experts
            else ("model.attention_bias", "true")
        )
        raise ValueError(
            f"model.qk_norm = {norm!r} with {key} = {value} has no counterpart in Hugging Face, but 'head' has with "
            "router 'sigmoid'"
        )
    if norm == "full" and len(moe_layers(config)) < config.model.num_layers:
        raise ValueError(
            "model.qk_norm = 'full' has no counterpart in Hugging Face where some layers are dense: each layer of "
            "OLMoE has experts"
        )
    if norm == "full" and config.model.channels * config.model.num_heads != config.model.dim:
        raise ValueError(
            f"model.head_dim = {config.model.head_dim} with model.qk_norm = 'full' has no counterpart in Hugging Face: "
            f"the heads of OLMoE are model.dim ({config.model.dim}) wide together"
        )
    return "olmoe" if norm == "full" else "qwen3_moe"


def _check_glm(config: Config) -> None:
    """Raise ValueError where Glm4Moe would compute something else."""
    layers, num_layers, arguments = moe_layers(config), config.model.num_layers, config.router.arguments
    if layers != range(layers[0], num_layers):
        raise ValueError(
            f"moe.layer_freq = {config.moe.layer_freq} has no counterpart in Hugging Face with router 'sigmoid': "
            "Glm4Moe has dense layers at the bottom only"
        )

    # Its shared experts have no gate, and the width of the others.
    if config.model.qk_norm == "full" or config.moe.shared_expert_gate:
        key = "model.qk_norm = 'full'" if config.model.qk_norm == "full" else "moe.shared_expert_gate = true"
        raise ValueError(f"{key} has no counterpart in Hugging Face with router 'sigmoid'")
    if shared_width(config) % config.moe.expert_dim:
        raise ValueError(
            f"moe.shared_expert_dim = {config.moe.shared_expert_dim} has no counterpart in Hugging Face with router "
            f"'sigmoid': the shared experts are as wide as some of moe.expert_dim ({config.moe.expert_dim})"
        )

    # We rate a group by its top_k / topk_groups best experts.
    groups, topk_groups, top_k = arguments["num_groups"], arguments["topk_groups"], config.moe.top_k
    if groups > 1 and max(1, top_k // topk_groups) != 2:
        raise ValueError(
            f"router.topk_groups = {topk_groups} with moe.top_k = {top_k} has no counterpart in Hugging Face: Glm4Moe "
            "rates a group by its 2 best experts, so top_k / topk_groups must be 2"
        )


def shared_width(config: Config) -> int:
    """The joint hidden width of the shared experts of a layer; 0: there are none."""
    return config.moe.num_shared_experts * (config.moe.shared_expert_dim or config.moe.expert_dim)


def rope_parameters(config: Config) -> dict[str, Any]:
    """What config.json says of rotary positions, under `rope_parameters`."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": config.model.rope_theta}
    for name, table in config.model.rope_scaling.items():
        parameters |= {"rope_type": name, "factor": table.factor}
        if name != "linear":
            parameters["original_max_position_embeddings"] = table.original_seq_len
        if name == "llama3":
            parameters |= {"low_freq_factor": table.low_freq_factor, "high_freq_factor": table.high_freq_factor}
        if name == "yarn":
            parameters |= {"beta_fast": table.beta_fast, "beta_slow": table.beta_slow, "truncate": table.truncate}
            parameters |= {"attention_factor": table.attention_factor} if table.attention_factor else {}
    if architecture_of(config).model_type == "glm4_moe":
        parameters["partial_rotary_factor"] = config.model.partial_rotary_factor
    return parameters


def hf_config(config: Config, architecture: Architecture, *, dtype: str, special_ids: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json; `special_ids` are its keys for the tokens that begin and end texts and pad them."""
    # What all architectures call the same, also where it is the default of transformers: another program has others.
    model, moe, kind = config.model, config.moe, architecture.model_type
    common = {
        "architectures": [NAMES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.channels,
        "hidden_act": "silu",
        # Models without dense layers give the width of their experts here.
        "intermediate_size": moe.expert_dim if kind in ("mixtral", "olmoe") else model.ffn_dim,
        "max_position_embeddings": config.training.seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        # Some of it stands twice, for programs that know only an older key.
        "rope_theta": model.rope_theta,  # for readers from before rope_parameters
        "rope_parameters": rope_parameters(config),
        "tie_word_embeddings": model.tie_embeddings and kind != "glm4_moe",  # vLLM's Glm4Moe ignores tying
        "attention_dropout": 0.0,
        **special_ids,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,  # for readers from before dtype
    }

    # Keys on experts, and on biases that ours has not, are other ones in each.
    return common | _SPECIFIC_KEYS[kind](config)


def _experts(config: Config) -> dict[str, Any]:
    """The keys on experts that Qwen2Moe and Qwen3Moe share."""
    # decoder_sparse_step can't say where the first experts are: the dense layers are listed one by one.
    dense = sorted(set(range(config.model.num_layers)) - set(moe_layers(config)))
    return {
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "moe_intermediate_size": config.moe.expert_dim,
        "norm_topk_prob": config.router.name == "topk_softmax",
        "decoder_sparse_step": 1,
        "mlp_only_layers": dense,
        "use_sliding_window": False,
        "output_router_logits": False,
    }


def _glm4_moe(config: Config) -> dict[str, Any]:
    moe, arguments = config.moe, config.router.arguments

    # It has no model without a shared expert: where ours has none, that one's weights are 0.
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": max(1, shared_width(config) // moe.expert_dim),
        "first_k_dense_replace": moe_layers(config)[0],
        # All that the router computes with is written, for what is left out each program takes as it likes.
        "n_group": arguments["num_groups"],
        "topk_group": arguments["topk_groups"],
        "norm_topk_prob": arguments["norm_topk"],
        "routed_scaling_factor": arguments["score_scale"],
        "use_qk_norm": config.model.qk_norm == "head",
        # GLM has a further layer that predicts the tokens after the next, and ours none.
        "num_nextn_predict_layers": 0,
        # Once more, for programs that look for it outside of rope_parameters: left out it is 1/2.
        "partial_rotary_factor": config.model.partial_rotary_factor,
        "attention_bias": config.model.attention_bias,
    }


# model_type -> the keys that not every architecture has
_SPECIFIC_KEYS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": lambda config: {"attention_bias": False, "mlp_bias": False},
    "qwen2": lambda config: {"use_sliding_window": False},
    "qwen3": lambda config: {"attention_bias": False, "use_sliding_window": False},
    "mixtral": lambda config: {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "sliding_window": None,
        "output_router_logits": False,
    },
    "olmoe": lambda config: {
        "num_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "norm_topk_prob": config.router.name == "topk_softmax",
        "attention_bias": False,
        "clip_qkv": None,
        "output_router_logits": False,
    },
    "qwen2_moe": lambda config: (
        _experts(config)
        # Where ours has no biases theirs are 0, because vLLM's Qwen2Moe has them always.
        | {"shared_expert_intermediate_size": shared_width(config) or config.moe.expert_dim}
        | {"qkv_bias": True}
    ),
    "qwen3_moe": lambda config: _experts(config) | {"attention_bias": False},
    "glm4_moe": _glm4_moe,
}
