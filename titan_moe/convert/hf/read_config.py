"""A config.json of Hugging Face as our configuration, or an error that says what of it we cannot represent."""

import json
import math
from pathlib import Path
from typing import Any

from titan_moe.convert.hf.architectures import NAMES

# What transformers takes where a config.json is silent.
_EXPERTS = {"decoder_sparse_step": 1, "mlp_only_layers": None, "norm_topk_prob": False, "num_experts_per_tok": 4}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0},
    "qwen2": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": True},
    "qwen3": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "head_dim": 128},
    "mixtral": {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "num_experts_per_tok": 2, "num_local_experts": 8},
    "olmoe": {
        **{"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "num_experts": 64, "num_experts_per_tok": 8},
        "norm_topk_prob": False,
    },
    "qwen2_moe": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "attention_bias": True, **_EXPERTS},
    "qwen3_moe": {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, **_EXPERTS, "num_experts_per_tok": 8},
    "glm4_moe": {
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.5,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": False,
    },
}
# What every model of ours has; None: the key may be absent, and transformers then takes what comes first here.
REQUIRED = {
    "hidden_act": ("silu", "swish"),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "quantization_config": (None,),
    "clip_qkv": (None,),
}
WITH_BIAS = ("qwen2", "qwen2_moe", "glm4_moe")  # on queries, keys and values; in others on what attention gives, too


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, ValueError in one line for what is wrong."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: not the folder of a Hugging Face model") from None
    except (ValueError, RecursionError) as error:  # also of a number of 5000 digits
        raise ValueError(f"{path} is not JSON ({' '.join(str(error).split())})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is not a JSON object")
    return value


def is_further(name: str, values: dict[str, Any]) -> bool:
    """Whether a tensor is of a layer that predicts the tokens after the next, which neither we nor transformers have.

    GLM-4.5 has one; its files number it as a layer of the decoder, after the last.
    """
    further, first = values.get("num_nextn_predict_layers") or 0, values.get("num_hidden_layers") or 0
    return any(name.startswith(f"model.layers.{layer}.") for layer in range(first, first + further))


def arguments_of(folder: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Our keys, dotted, for a config.json; ValueError names what cannot be represented."""
    # A key that is null is taken for absent: the architecture's default.
    kind = values.get("model_type")
    file = folder / "config.json"
    if kind not in NAMES:
        raise ValueError(f"{file}: model_type = {kind!r} cannot be read; {', '.join(NAMES)} can")
    values = DEFAULTS[kind] | {key: value for key, value in values.items() if value is not None}
    try:
        _check(file, kind, values)
        return _model(file, values) | _moe(file, kind, values)
    except KeyError as error:
        raise ValueError(f"{file} lacks {error.args[0]}") from None


def _check(file: Path, kind: str, values: dict[str, Any]) -> None:
    """Raise ValueError for what a model of ours cannot compute, whatever its architecture."""
    for key, allowed in REQUIRED.items():
        if values.get(key) not in allowed:
            raise _unlike(file, key, values[key], f"only {allowed[0]} can be")
    if kind == "mixtral" and values.get("sliding_window"):
        raise _unlike(file, "sliding_window", values["sliding_window"], "attention is over the whole context")
    if any(layer != "full_attention" for layer in values.get("layer_types") or ()):
        raise _unlike(file, "layer_types", values["layer_types"], "attention is over the whole context")

    if values.get("attention_bias") and kind not in WITH_BIAS:
        raise _unlike(file, "attention_bias", True, f"of {', '.join(WITH_BIAS)} alone, the last product has no bias")

    # Others with this key rotate all channels all the same, or as their class likes.
    part = _rope(values).get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    if part != 1.0 and kind != "glm4_moe":
        raise _unlike(file, "partial_rotary_factor", part, "all channels of a head are rotated, but in glm4_moe")


def _unlike(file: Path, key: str, value: Any, ours: str) -> ValueError:
    return ValueError(f"{file}: {key} = {value!r} cannot be represented: {ours}")


def _rope(values: dict[str, Any]) -> dict[str, Any]:
    # transformers has moved these keys (rope_scaling and the top level, then rope_parameters): files have either.
    return {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}


# Theirs -> ours, of a scaling of rotary positions; what is absent has the same default on both sides.
_SCALING = {
    "linear": {"factor": "factor"},
    "llama3": {
        **{"factor": "factor", "original_max_position_embeddings": "original_seq_len"},
        **{"low_freq_factor": "low_freq_factor", "high_freq_factor": "high_freq_factor"},
    },
    "yarn": {
        **{"factor": "factor", "original_max_position_embeddings": "original_seq_len", "truncate": "truncate"},
        **{"beta_fast": "beta_fast", "beta_slow": "beta_slow", "attention_factor": "attention_factor"},
    },
}


def _rope_scaling(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    """Our keys for the scaling of rotary positions; those of others are off, whatever lies underneath."""
    rope = {key: value for key, value in _rope(values).items() if value is not None}
    name = rope.get("rope_type", rope.get("type", "default"))
    if name not in ("default", *_SCALING):
        raise _unlike(file, "rope scaling", name, f"{', '.join(_SCALING)} can be")
    off = {f"model.rope_scaling.{other}": False for other in _SCALING if other != name}
    if name == "default":
        return off

    # Where YaRN's factor of queries and keys is not said, it is a ratio of two of the kind that ours has.
    if name == "yarn" and "attention_factor" not in rope and rope.get("mscale") and rope.get("mscale_all_dim"):
        upper, lower = (0.1 * rope[key] * math.log(rope["factor"]) + 1 for key in ("mscale", "mscale_all_dim"))
        rope["attention_factor"] = upper / lower
    rope.setdefault("original_max_position_embeddings", values.get("max_position_embeddings"))
    keys = _SCALING[name]
    return off | {f"model.rope_scaling.{name}.{ours}": rope[key] for key, ours in keys.items() if key in rope}


def _model(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    # All that has a default is given as well: see `_moe`.
    heads, kind = values["num_attention_heads"], values["model_type"]
    head_dim, width = values.get("head_dim", 0), values["hidden_size"]
    of_heads = kind in ("qwen3", "qwen3_moe") or values.get("use_qk_norm", False)
    part = _rope(values).get("partial_rotary_factor", values.get("partial_rotary_factor", 1.0))
    return {
        "model.dim": values["hidden_size"],
        "model.num_layers": values["num_hidden_layers"],
        "model.num_heads": heads,
        "model.num_kv_heads": values.get("num_key_value_heads", heads),
        "model.ffn_dim": values["intermediate_size"],
        "model.vocab_size": values["vocab_size"],
        "model.rope_theta": float(_rope(values).get("rope_theta", values["rope_theta"])),
        "model.norm_eps": values["rms_norm_eps"],
        "model.tie_embeddings": values.get("tie_word_embeddings", False),
        "model.qk_norm": "full" if kind == "olmoe" else "head" if of_heads else "none",
        "model.head_dim": 0 if head_dim * heads == width else head_dim,
        "model.attention_bias": values.get("qkv_bias", values.get("attention_bias", False)),
        "model.partial_rotary_factor": float(part),
        **_rope_scaling(file, values),
    }


def _moe(file: Path, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    if kind in ("llama", "qwen2", "qwen3"):
        return {"moe.num_experts": 0}

    # All are given, defaults too: the configuration of a run lies underneath, and may say something else of them.
    arguments: dict[str, Any] = {
        "moe.top_k": values["num_experts_per_tok"],
        "moe.first_dense_layers": 0,
        "moe.layer_freq": 1,
        "moe.num_shared_experts": 0,
        "moe.shared_expert_dim": 0,
        "moe.shared_expert_gate": False,
        "router.temperature": 1.0,
    }
    if kind in ("mixtral", "olmoe"):
        is_normed = kind == "mixtral" or values["norm_topk_prob"]
        return arguments | {
            "moe.num_experts": values.get("num_experts", values.get("num_local_experts")),
            "moe.expert_dim": values["intermediate_size"],
            "router.name": "topk_softmax" if is_normed else "softmax_topk",
        }
    arguments["moe.expert_dim"] = values["moe_intermediate_size"]
    if kind == "glm4_moe":
        return arguments | _glm4_moe(file, values)

    # The two of Qwen differ in shared experts alone.
    first, freq = _progression(file, values)
    arguments |= {
        "moe.num_experts": values.get("num_experts", values.get("num_local_experts")),
        "moe.first_dense_layers": first,
        "moe.layer_freq": freq,
        "router.name": "topk_softmax" if values["norm_topk_prob"] else "softmax_topk",
    }
    if kind == "qwen2_moe":
        arguments |= _shared(values["shared_expert_intermediate_size"], values["moe_intermediate_size"])
    return arguments


def _glm4_moe(file: Path, values: dict[str, Any]) -> dict[str, Any]:
    # Glm4Moe rates a group by its 2 best experts, our router by its top_k / topk_groups best.
    groups, topk_groups, top_k = values["n_group"], values["topk_group"], values["num_experts_per_tok"]
    if groups > 1 and max(1, top_k // topk_groups) != 2:
        ours = f"num_experts_per_tok / topk_group ({top_k} / {topk_groups}) must be 2"
        raise _unlike(file, "topk_group", topk_groups, ours)
    return {
        "moe.num_experts": values.get("n_routed_experts", values.get("num_local_experts")),
        "moe.first_dense_layers": values["first_k_dense_replace"],
        "moe.num_shared_experts": values.get("n_shared_experts", 1),
        "router.name": "sigmoid",
        "router.norm_topk": values["norm_topk_prob"],
        "router.score_scale": float(values["routed_scaling_factor"]),
        "router.num_groups": groups,
        "router.topk_groups": topk_groups,
    }


def _shared(width: int, expert_dim: int) -> dict[str, Any]:
    """Our keys for one gated expert of that width: several of the others' width where it is a multiple of it."""
    count = max(1, width // expert_dim) if width % expert_dim == 0 else 1
    own_dim = 0 if count * expert_dim == width else width
    return {"moe.num_shared_experts": count, "moe.shared_expert_dim": own_dim, "moe.shared_expert_gate": True}


def _progression(file: Path, values: dict[str, Any]) -> tuple[int, int]:
    """The first layer with experts and the distance between two of them; ValueError where it varies."""
    count, step = values["num_hidden_layers"], values["decoder_sparse_step"]
    dense = values["mlp_only_layers"] or []
    layers = [i for i in range(count) if i not in dense and (i + 1) % step == 0]
    if not layers:
        raise ValueError(f"{file}: mlp_only_layers and decoder_sparse_step leave no layer with experts")

    # One layer alone has no distance to a next: any will do that leads past the end.
    freq = layers[1] - layers[0] if len(layers) > 1 else 1 if layers == [count - 1] else count
    if layers != list(range(layers[0], count, freq)):
        raise _unlike(file, "mlp_only_layers", dense, f"experts would be in layers {layers}, not in every n-th")
    return layers[0], freq
