"""Small models of every exportable kind, with weights large enough that a wrong conversion shows."""

from pathlib import Path
from typing import Any

import torch

from titan_moe.build import build_model
from titan_moe.checkpoint import save_checkpoint
from titan_moe.config import Config, load_config, to_toml
from titan_moe.data.tokenizer import Tokenizer, bytes_tokenizer
from titan_moe.model.transformer import Transformer

BASE = {
    "model.dim": 32,
    "model.num_layers": 2,
    "model.num_heads": 4,
    "model.num_kv_heads": 2,
    "model.ffn_dim": 48,
    "model.vocab_size": 320,
    "model.tie_embeddings": False,
    "moe.num_experts": 8,
    "moe.expert_dim": 24,
    "training.seq_len": 64,
}
SIGMOID = {"router.name": "sigmoid", "balancer.loss_free.rate": 0.1}

YARN = {"model.rope_scaling.yarn.factor": 4.0, "model.rope_scaling.yarn.original_seq_len": 16}

# name -> (architecture, what differs from BASE)
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("llama", {"moe.num_experts": 0}),
    "dense qk-norm tied": ("qwen3", {"moe.num_experts": 0, "model.qk_norm": True, "model.tie_embeddings": True}),
    "dense biases": ("qwen2", {"moe.num_experts": 0, "model.attention_bias": True, "model.head_dim": 16}),
    "dense llama3": (
        "llama",
        {
            **{"moe.num_experts": 0, "model.rope_scaling.llama3.factor": 8.0},
            **{"model.rope_scaling.llama3.original_seq_len": 16, "model.rope_scaling.llama3.low_freq_factor": 0.5},
        },
    ),
    "topk_softmax": ("mixtral", {}),
    "topk_softmax yarn": ("mixtral", {**YARN, "model.rope_scaling.yarn.attention_factor": 1.3, "model.head_dim": 12}),
    "topk_softmax linear": ("qwen3_moe", {"model.rope_scaling.linear.factor": 2.0, "model.qk_norm": "head"}),
    "topk_softmax gate": (
        "qwen2_moe",
        {"moe.num_shared_experts": 2, "moe.shared_expert_dim": 40, "moe.shared_expert_gate": True},
    ),
    "topk_softmax biases": ("qwen2_moe", {"model.attention_bias": True, "moe.first_dense_layers": 1}),
    "softmax_topk full": ("olmoe", {"model.qk_norm": "full", "router.name": "softmax_topk", "moe.top_k": 3}),
    "topk_softmax full": ("olmoe", {"model.qk_norm": "full", **YARN}),
    "topk_softmax tied": (
        "mixtral",
        {"model.tie_embeddings": True, "model.num_kv_heads": 0, "router.temperature": 2.0},
    ),
    "topk_softmax shared": ("qwen2_moe", {"moe.num_shared_experts": 2}),
    "topk_softmax some layers": (
        "qwen2_moe",
        {"model.num_layers": 4, "moe.first_dense_layers": 1, "moe.layer_freq": 2},
    ),
    "softmax_topk": ("qwen2_moe", {"router.name": "softmax_topk", "model.tie_embeddings": True}),
    "softmax_topk shared": ("qwen2_moe", {"router.name": "softmax_topk", "moe.num_shared_experts": 1}),
    "switch": ("qwen2_moe", {"router.name": "switch", "moe.top_k": 1}),
    "topk_softmax qk-norm": ("qwen3_moe", {"model.qk_norm": True, "moe.first_dense_layers": 1}),
    "softmax_topk qk-norm": ("qwen3_moe", {"model.qk_norm": True, "router.name": "softmax_topk", "moe.top_k": 3}),
    "sigmoid": ("glm4_moe", SIGMOID),
    "sigmoid tied": ("glm4_moe", {**SIGMOID, "model.tie_embeddings": True, "moe.first_dense_layers": 1}),
    "sigmoid plain": ("glm4_moe", {"router.name": "sigmoid", "router.norm_topk": False, "router.score_scale": 2.5}),
    "sigmoid shared": ("glm4_moe", {**SIGMOID, "moe.num_shared_experts": 2, "model.qk_norm": True}),
    "sigmoid rotary": (
        "glm4_moe",
        {
            **{**SIGMOID, "model.partial_rotary_factor": 0.5, "model.attention_bias": True, "model.head_dim": 16},
            **{"moe.num_shared_experts": 1, "moe.shared_expert_dim": 48},
        },
    ),
    "sigmoid groups": ("glm4_moe", {**SIGMOID, "router.num_groups": 4, "router.topk_groups": 2, "moe.top_k": 4}),
}


def configure(**changes: Any) -> Config:
    """BASE with changes."""
    words = [f"--{key}={str(value).lower()}" for key, value in {**BASE, **changes}.items()]
    return load_config(words)


def fill(model: Transformer, seed: int = 0) -> Transformer:
    """Weights of a size that makes logits of about 7, norms around 1, and biases that decide choices."""
    generator = torch.Generator().manual_seed(seed)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name else noise * 1.2 / parameter.shape[-1] ** 0.5)
        for bias in model.expert_biases():
            bias.copy_(0.2 * torch.randn(bias.shape, generator=generator))
    return model.eval()


def make_checkpoint(
    folder: Path, *, seed: int = 0, step: int = 3, tokenizer: Tokenizer | None = None, **changes: Any
) -> Path:
    """A checkpoint of weights under `folder`, a dump folder, with a tokenizer (None: of bytes); its step folder."""
    config = configure(**changes)
    with torch.device("meta"):
        model = build_model(config)
    files = {"config.toml": to_toml(config), "tokenizer.json": (tokenizer or bytes_tokenizer()).to_json()}
    return save_checkpoint(
        folder / "checkpoint",
        step,
        model=fill(model, seed),
        optimizer=None,
        extra={"num_tokens": 1234},
        files=files,
        keep_latest_k=0,
    )
