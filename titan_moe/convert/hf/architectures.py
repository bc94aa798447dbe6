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
    "qwen3": "Qwen3ForCausalLM",
    "mixtral": "MixtralForCausalLM",
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
    # The router decides: only Glm4Moe has sigmoid scores, and with them groups of experts.
    moe, router, qk_norm = config.moe, config.router, config.model.qk_norm
    if moe.num_experts == 0:
        return Architecture("qwen3" if qk_norm else "llama")
    if moe.num_identity_experts:
        raise ValueError(
            f"moe.num_identity_experts = {moe.num_identity_experts} has no counterpart in the Hugging Face models that "
            "can be written: only a model without them can be"
        )
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

    # Of those with softmax Qwen3Moe alone has a QK-norm, and it has no shared experts.
    if qk_norm:
        if moe.num_shared_experts:
            raise ValueError(
                f"model.qk_norm with moe.num_shared_experts = {moe.num_shared_experts} has a counterpart in Hugging "
                "Face only with router 'sigmoid'"
            )
        return Architecture("qwen3_moe")

    # Mixtral where it fits. Everything else with softmax is a Qwen2Moe: that also has dense layers, shared experts, and
    # weights of a token that don't sum to 1.
    every_layer = len(moe_layers(config)) == config.model.num_layers
    if router.name == "topk_softmax" and moe.num_shared_experts == 0 and every_layer:
        return Architecture("mixtral")
    return Architecture("qwen2_moe", has_zero_shared=moe.num_shared_experts == 0)


def _check_glm(config: Config) -> None:
    """Raise ValueError where Glm4Moe would compute something else."""
    layers, num_layers, arguments = moe_layers(config), config.model.num_layers, config.router.arguments
    if layers != range(layers[0], num_layers):
        raise ValueError(
            f"moe.layer_freq = {config.moe.layer_freq} has no counterpart in Hugging Face with router 'sigmoid': "
            "Glm4Moe has dense layers at the bottom only"
        )

    # We rate a group by its top_k / topk_groups best experts.
    groups, topk_groups, top_k = arguments["num_groups"], arguments["topk_groups"], config.moe.top_k
    if groups > 1 and max(1, top_k // topk_groups) != 2:
        raise ValueError(
            f"router.topk_groups = {topk_groups} with moe.top_k = {top_k} has no counterpart in Hugging Face: Glm4Moe "
            "rates a group by its 2 best experts, so top_k / topk_groups must be 2"
        )


def hf_config(config: Config, architecture: Architecture, *, dtype: str, special_ids: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json; `special_ids` are its keys for the tokens that begin and end texts and pad them."""
    # What all architectures call the same, also where it is the default of transformers: another program has others.
    model, moe, kind = config.model, config.moe, architecture.model_type
    theta = model.rope_theta
    common = {
        "architectures": [NAMES[kind]],
        "model_type": kind,
        "vocab_size": model.vocab_size,
        "hidden_size": model.dim,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads or model.num_heads,
        "head_dim": model.dim // model.num_heads,
        "hidden_act": "silu",
        # Mixtral has no dense layers, and so gives the width of its experts here.
        "intermediate_size": moe.expert_dim if kind == "mixtral" else model.ffn_dim,
        "max_position_embeddings": config.training.seq_len,
        "initializer_range": model.init_std,
        "rms_norm_eps": model.norm_eps,
        # Some of it stands twice, for programs that know only an older key.
        "rope_theta": theta,  # for readers from before rope_parameters
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
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
    # partial_rotary_factor stands twice, for programs that look for it outside of rope_parameters: left out it is 1/2.
    moe, arguments = config.moe, config.router.arguments
    rope = {"rope_type": "default", "rope_theta": config.model.rope_theta, "partial_rotary_factor": 1.0}

    # It has no model without a shared expert: where ours has none, that one's weights are 0.
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_dim,
        "n_shared_experts": max(1, moe.num_shared_experts),
        "first_k_dense_replace": moe_layers(config)[0],
        # All that the router computes with is written, for what is left out each program takes as it likes.
        "n_group": arguments["num_groups"],
        "topk_group": arguments["topk_groups"],
        "norm_topk_prob": arguments["norm_topk"],
        "routed_scaling_factor": arguments["score_scale"],
        "use_qk_norm": config.model.qk_norm,
        # GLM has a further layer that predicts the tokens after the next, and ours none.
        "num_nextn_predict_layers": 0,
        "partial_rotary_factor": 1.0,
        "rope_parameters": rope,
        "attention_bias": False,
    }


# model_type -> the keys that not every architecture has
_SPECIFIC_KEYS: dict[str, Callable[[Config], dict[str, Any]]] = {
    "llama": lambda config: {"attention_bias": False, "mlp_bias": False},
    "qwen3": lambda config: {"attention_bias": False, "use_sliding_window": False},
    "mixtral": lambda config: {
        "num_local_experts": config.moe.num_experts,
        "num_experts_per_tok": config.moe.top_k,
        "sliding_window": None,
        "output_router_logits": False,
    },
    "qwen2_moe": lambda config: (
        _experts(config)
        # Zero biases, because vLLM's Qwen2Moe has them always.
        | {"shared_expert_intermediate_size": max(1, config.moe.num_shared_experts) * config.moe.expert_dim}
        | {"qkv_bias": True}
    ),
    "qwen3_moe": lambda config: _experts(config) | {"attention_bias": False},
    "glm4_moe": _glm4_moe,
}
