"""The models that bench_moe.py measures: our decoder, dense and MoE, and with the MoE layers of other libraries."""

import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from titan_moe.model.routing.token_choice import topk_softmax
from titan_moe.model.transformer import Transformer

DIM, LAYERS, HEADS, VOCAB, SEQ, TOP_K = 256, 4, 4, 2048, 512, 2


class Peer(nn.Module):
    """Another library's MoE layer in the place of ours: it returns no routing."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(B, S, D) -> (B, S, D)."""
        return self.layer(x), None


def decoder(num_experts: int, expert_dim: int) -> Transformer:
    """Our decoder; without experts its feed-forward networks have the active width of the MoE model."""
    # Other libraries' layers go into this decoder as well, so that only the layer differs.
    model = Transformer(
        vocab_size=VOCAB,
        dim=DIM,
        num_layers=LAYERS,
        num_heads=HEADS,
        ffn_dim=TOP_K * expert_dim,
        num_experts=num_experts,
        expert_dim=expert_dim,
        router=topk_softmax(top_k=TOP_K),
    )
    model.init_weights(0)
    return model


def dense_roof(num_experts: int, expert_dim: int, dtype: torch.dtype) -> nn.Module:
    """The dense model of the same shape and the same active FLOPs."""
    return decoder(0, expert_dim).to(dtype)


def titan_moe(num_experts: int, expert_dim: int, dtype: torch.dtype) -> nn.Module:
    """Ours."""
    return decoder(num_experts, expert_dim).to(dtype)


def decoder_with(layer: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """Our decoder with `layer()` as the MoE layer of every block."""
    model = decoder(1, 8)
    for block in model.layers:
        peer = layer()
        for parameter in peer.parameters():
            nn.init.normal_(parameter, std=0.02)
        block.moe = Peer(peer)  # pyrefly: ignore
    return model.to(dtype)


def mixtral_config(num_experts: int, expert_dim: int) -> Any:
    """A transformers Mixtral of our shape with its grouped_mm experts."""
    from transformers import MixtralConfig

    # Of its implementations those like ours: fused attention and grouped products.
    arguments: dict[str, Any] = {"attn_implementation": "sdpa", "experts_implementation": "grouped_mm"}
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=DIM,
        intermediate_size=expert_dim,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=num_experts,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
        use_cache=False,
        **arguments,
    )


def transformers_layer(num_experts: int, expert_dim: int, dtype: torch.dtype) -> nn.Module:
    """transformers' Mixtral layer in our decoder."""
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = mixtral_config(num_experts, expert_dim)
    return decoder_with(lambda: MixtralSparseMoeBlock(config), dtype)


def transformers_model(num_experts: int, expert_dim: int, dtype: torch.dtype) -> nn.Module:
    """transformers' whole Mixtral."""
    from transformers import MixtralForCausalLM

    return MixtralForCausalLM(mixtral_config(num_experts, expert_dim)).to(dtype)  # pyrefly: ignore


def torchtitan_layer(num_experts: int, expert_dim: int, dtype: torch.dtype) -> nn.Module:
    """torchtitan 0.3's MoE layer in our decoder, in fp32 without its casts to bf16."""
    # This module imports triton, which a CPU has not; one process does not use it.
    kernels = types.ModuleType("torchtitan.distributed.minimal_async_ep.kernels")
    kernels.__getattr__ = lambda _: None  # pyrefly: ignore
    sys.modules.setdefault(kernels.__name__, kernels)
    warnings.filterwarnings("ignore", "In CPU autocast")
    from torchtitan.models.common import config_utils  # pyrefly: ignore
    from torchtitan.models.common.moe import GroupedExperts, RoutedExperts  # pyrefly: ignore
    from torchtitan.models.common.token_dispatcher import LocalTokenDispatcher  # pyrefly: ignore

    routed_experts = RoutedExperts.Config(
        inner_experts=GroupedExperts.Config(dim=DIM, hidden_dim=expert_dim, num_experts=num_experts),
        token_dispatcher=LocalTokenDispatcher.Config(num_experts=num_experts, top_k=TOP_K),
    )
    router = config_utils.make_router_config(
        dim=DIM, num_experts=num_experts, gate_param_init={}, top_k=TOP_K, score_func="softmax", route_norm=True
    )
    config = config_utils.make_moe_config(num_experts=num_experts, router=router, routed_experts=routed_experts)

    # Its experts cast to bf16 whatever the model's type, which would make it faster in fp32 than the others.
    def layer() -> nn.Module:
        moe = config.build()
        if dtype == torch.float32:
            experts = moe.routed_experts.inner_experts
            experts.forward = types.MethodType(_without_casts, experts)
        return moe

    return decoder_with(layer, dtype)


def _without_casts(self: Any, x: Tensor, counts: Tensor) -> Tensor:
    offs = counts.cumsum(0, dtype=torch.int32)
    w1, w2, w3 = (w.transpose(-2, -1) for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD))
    hidden = F.silu(torch._grouped_mm(x, w1, offs=offs)) * torch._grouped_mm(x, w3, offs=offs)
    return torch._grouped_mm(hidden, w2, offs=offs)


PEERS: dict[str, Callable[[int, int, torch.dtype], nn.Module]] = {
    "dense roof": dense_roof,
    "titan_moe": titan_moe,
    "transformers layer": transformers_layer,
    "transformers model": transformers_model,
    "torchtitan layer": torchtitan_layer,
}
