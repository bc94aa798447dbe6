"""The language model: a Llama-style decoder whose feed-forward networks are dense or Mixtures of Experts.

Shapes: B batch, S sequence, D dim, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from titan_moe.model.attention import Attention, QKNorm, Rope, checked_head_dim, rope_cos_sin, rotary_channels
from titan_moe.model.cross_entropy import (
    Score,
    TokenScores,
    linear_cross_entropy,
    score,
    softmax_,
    token_scores,
)
from titan_moe.model.documents import Documents, Sequences, documents_of, places_of, takes_varlen
from titan_moe.model.moe import FeedForward, InitState, Measure, MoE, initial_state
from titan_moe.model.multipliers import Multipliers, times
from titan_moe.model.rope import RopeScaling, Rotation
from titan_moe.model.routing import ParametricRouter, Places, Router, Routing
from titan_moe.model.wrappers import plain_name
from titan_moe.runtime.world import seed_of

Want = Literal["logits", "loss", "loss_and_max_logits", "score", "token_scores", "routings"]


class LossAndMaxLogits(NamedTuple):
    """The loss, and what QK-clip goes by."""

    ce_sum: Tensor  # scalar fp32: the summed cross-entropy in nats
    max_logits: Tensor  # (N, H) fp32, no gradient: the largest attention logit of each head, of all N layers


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)) or x + moe(norm(x)); what is added times `residual`."""

    def __init__(self, *, dim: int, norm_eps: float, attention: Attention, feed_forward: FeedForward | MoE) -> None:
        super().__init__()
        self.residual = 1.0
        self.attention_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, eps=norm_eps)
        self.moe = feed_forward if isinstance(feed_forward, MoE) else None
        self.feed_forward = feed_forward if isinstance(feed_forward, FeedForward) else None

    def forward(
        self,
        x_BSD: Tensor,
        rope: Rope,
        places: Places | None = None,
        want_max_logits: bool = False,
        documents: tuple[Documents, ...] = (),
    ) -> tuple[Tensor, Routing | None, Tensor | None]:
        """(B, S, D) -> (B, S, D), the routing of a MoE layer, and the heads' largest logits (H,) where wanted.

        What there is not, as the routing of a dense layer, is None. Attention stays inside `documents`.
        """
        y_BSD, max_logits_H = self.attention(self.attention_norm(x_BSD), rope, want_max_logits, documents)
        x_BSD = x_BSD + times(y_BSD, self.residual)
        h_BSD = self.ffn_norm(x_BSD)
        if self.feed_forward is not None:
            return x_BSD + times(self.feed_forward(h_BSD), self.residual), None, max_logits_H
        assert self.moe is not None
        y_BSD, routing = self.moe(h_BSD, places)
        return x_BSD + times(y_BSD, self.residual), routing, max_logits_H


class Transformer(nn.Module):
    """Decoder-only language model. `logits, routings = model(tokens)`, `ce_sum, routings = model(tokens, labels)`.

    Forward writes no state.

    Layers `first_dense_layers, first_dense_layers + layer_freq, ...` are MoE layers when num_experts > 0, the
    others dense of width `ffn_dim`. `router` maps logits to a Routing and is needed when num_experts > 0.
    `expert_bias` gives every MoE layer a bias that takes part in the choice of experts, `balancer_inits` the
    tensors that balancers keep of it, and `measures` what they measure in its forward. `eot_id` is the token that
    ends documents, which has to be set where a router or a measure asks for document_ids, and with `document_mask`:
    then attention stays inside documents. With `restart_positions` positions, those of the rotation and those that
    routers and measures are given, begin at 0 in each document. Where only the loss or
    the score is wanted, the logits of `loss_chunk_tokens` tokens (0: of all, -1: as suits the device) are in memory
    at once. `multipliers` are constant factors of the forward, and `std_of` gives the standard deviation with which a
    parameter, by its name, begins (None: `standard_std`). Built on the meta device or any other, parameters are
    undefined until `init_weights`. Raises ValueError for sizes that do not fit together.
    """

    eot_id: int | None = None

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int = 0,
        ffn_dim: int = 0,
        rope_theta: float = 10000.0,
        partial_rotary_factor: float = 1.0,
        rope_scaling: RopeScaling | None = None,
        norm_eps: float = 1e-5,
        qk_norm: QKNorm | bool = "none",
        attention_bias: bool = False,
        tie_embeddings: bool = True,
        init_std: float = 0.02,
        num_experts: int = 0,
        num_identity_experts: int = 0,
        expert_dim: int = 0,
        num_shared_experts: int = 0,
        shared_expert_dim: int = 0,
        shared_expert_gate: bool = False,
        first_dense_layers: int = 0,
        layer_freq: int = 1,
        expert_dropout: float = 0.0,
        router: Router | ParametricRouter | None = None,
        expert_bias: bool = False,
        balancer_inits: Mapping[str, InitState] | None = None,
        measures: Mapping[str, Measure] | None = None,
        loss_chunk_tokens: int = 0,
        document_mask: bool = False,
        restart_positions: bool = False,
        multipliers: Multipliers = Multipliers(),  # noqa: B008 - of floats, and immutable
        std_of: Callable[[str], float] | None = None,
    ) -> None:
        super().__init__()
        head_dim = checked_head_dim(dim, num_heads, num_kv_heads or num_heads, head_dim, partial_rotary_factor)
        self.std_of = std_of or partial(standard_std, init_std=init_std, num_layers=num_layers)
        self.rotation = Rotation(rotary_channels(head_dim, partial_rotary_factor), rope_theta, rope_scaling)

        # What parallelism and compilation replace from outside: the model sees no mesh and no rank.
        self.rope: Callable[..., Rope] = rope_cos_sin  # local angles where a process has a part of each sequence
        self.sequences = Sequences()  # what it has of them
        self.keeps_gathered = False  # true where sharded parameters stay gathered over the micro-batches of a step
        self.low_precision: Any = None  # what computes with copies of the parameters in another type, on one process
        self.loss_chunk_tokens = loss_chunk_tokens
        self.softmax_ = softmax_  # or the same function compiled
        self.document_mask, self.restart_positions, self.channels_of_head = document_mask, restart_positions, head_dim
        moe_layers = moe_layer_ids(num_layers, num_experts, first_dense_layers, layer_freq)

        def feed_forward(layer: int) -> FeedForward | MoE:
            # Sizes are checked where a layer needs them: a model without dense layers has no ffn_dim.
            if layer not in moe_layers:
                _check_positive("model.ffn_dim", ffn_dim, f"layer {layer} is dense")
                return FeedForward(dim, ffn_dim)
            _check_experts(layer, dim, expert_dim, router)
            assert router is not None
            return MoE(
                dim=dim,
                num_experts=num_experts,
                num_identity_experts=num_identity_experts,
                expert_dim=expert_dim,
                num_shared_experts=num_shared_experts,
                shared_expert_dim=shared_expert_dim,
                shared_expert_gate=shared_expert_gate,
                expert_dropout=expert_dropout,
                route=router,
                layer=layer,
                expert_bias=expert_bias,
                balancer_inits=balancer_inits,
                measures=measures,
            )

        def attention() -> Attention:
            return Attention(
                dim=dim,
                num_heads=num_heads,
                num_kv_heads=num_kv_heads or num_heads,
                head_dim=head_dim,
                qk_norm=qk_norm,
                bias=attention_bias,
                norm_eps=norm_eps,
            )

        # The order of these lines is that of the parameters, in checkpoints and in the optimizer.
        self.tok_embeddings = nn.Embedding(vocab_size, dim)
        self.layers = nn.ModuleList(
            Block(dim=dim, norm_eps=norm_eps, attention=attention(), feed_forward=feed_forward(i))
            for i in range(num_layers)
        )
        self.asks_places = any(layer.asks_places for layer in self.moe_layers())
        self.norm = nn.RMSNorm(dim, eps=norm_eps)
        self.output = None if tie_embeddings else nn.Linear(dim, vocab_size, bias=False)
        self.set_multipliers(multipliers)

    def set_multipliers(self, multipliers: Multipliers) -> None:
        """Give each part its factor of the forward."""
        self.multipliers = multipliers
        for module in self.modules():
            if isinstance(module, Block):
                module.residual = multipliers.residual
            elif isinstance(module, Attention):
                module.logits_multiplier = multipliers.attention
            elif isinstance(module, MoE):
                module.router_logits_multiplier = multipliers.router_logits
                module.output_multiplier = multipliers.expert_output

    def forward(
        self, tokens_BS: Tensor, labels_BS: Tensor | None = None, want: Want | None = None
    ) -> tuple[Tensor | LossAndMaxLogits | Score | TokenScores | None, tuple[Routing, ...]]:
        """(B, S) int64 token ids -> the output that `want` names, and one Routing per MoE layer.

        `want` is `logits`: (B, S, V) in the parameters' dtype, the default without labels (B, S); `loss`: the summed
        cross-entropy in nats, () fp32, the default with labels; `loss_and_max_logits`: a LossAndMaxLogits; `score`: a
        Score, without gradients; `token_scores`: TokenScores of the T = B * S tokens, without gradients; or `routings`:
        None, the output head is not computed. Labels of -100 do not count.
        """
        # Angles and documents are those of all layers. They are computed here, once, and handed down.
        x_BSD = times(self.tok_embeddings(tokens_BS), self.multipliers.embedding)  # (B, S) -> (B, S, D)
        limited = takes_varlen(x_BSD.device, x_BSD.dtype, self.channels_of_head)
        rope, places, documents = self._locate(tokens_BS, limited)
        for run in documents if limited else ():
            x_BSD = x_BSD * run.fits

        # Routings are returned, never stored: losses, loads and metrics are functions of them.
        want = want or ("logits" if labels_BS is None else "loss")
        want_max_logits = want == "loss_and_max_logits"
        routings, max_logits = [], []
        for layer in self.layers:
            x_BSD, routing, max_logits_H = layer(x_BSD, rope, places, want_max_logits, documents)
            if routing is not None:
                routings.append(routing)
            if max_logits_H is not None:
                max_logits.append(max_logits_H)

        output = None if want == "routings" else self._head(x_BSD, labels_BS, want)
        if want_max_logits:
            return LossAndMaxLogits(cast(Tensor, output), torch.stack(max_logits)), tuple(routings)
        return output, tuple(routings)

    def _locate(self, tokens_BS: Tensor, limited: bool) -> tuple[Rope, Places | None, tuple[Documents, ...]]:
        """The angles of attention's queries, the tokens' places where a layer asks, the documents where it is masked.

        `limited` as `documents_of` has it.
        """
        seq_len, device = tokens_BS.shape[1], tokens_BS.device
        rope = self.rope(seq_len, self.rotation, device)
        if not (self.asks_places or self.document_mask):
            return rope, None, ()
        if self.eot_id is None:
            raise ValueError("model.eot_id must be the token that ends documents: a router or attention asks for them")

        # Which document a token is of is decided by the tokens before it, which another rank may have.
        whole = places_of(self.sequences.gather(tokens_BS), self.eot_id, self.restart_positions)
        places = Places(*map(self.sequences.local_part, whole)) if self.asks_places else None
        if not self.document_mask:
            return rope, places, ()
        ids_BS = whole.document_ids
        runs = self.sequences.runs(ids_BS.shape[1])
        documents = tuple(documents_of(ids_BS, start, stop, limited=limited) for start, stop in runs)
        if self.restart_positions:
            cos, sin = rope_cos_sin(ids_BS.shape[1], self.rotation, device)
            positions_BS = self.sequences.attended_part(whole.positions)
            rope = cos[positions_BS], sin[positions_BS]  # (B, S, R / 2) each
        return rope, places, documents

    def _head(self, x_BSD: Tensor, labels_BS: Tensor | None, want: Want) -> Tensor | Score | TokenScores:
        """Return the logits (B, S, V) of what the layers give, or the loss or score that is computed from them.

        The head's matrix is the embedding where they are tied.
        """
        # The factor of the logits is a factor of the few numbers that they are computed from.
        x_BSD = times(self.norm(x_BSD), self.multipliers.logits)
        weight_VD = self.tok_embeddings.weight if self.output is None else self.output.weight
        if want == "logits":
            return F.linear(x_BSD, weight_VD)  # (B, S, D) -> (B, S, V)
        assert labels_BS is not None
        reduce = {"score": score, "token_scores": token_scores}.get(want, linear_cross_entropy)
        x_TD, labels_T = x_BSD.flatten(0, 1), labels_BS.flatten()
        return reduce(x_TD, weight_VD, labels_T, chunk_tokens=self.loss_chunk_tokens, softmax_=self.softmax_)

    def expert_biases(self) -> list[Tensor]:
        """Selection biases (E,) of the MoE layers, in order; empty when the model has none."""
        return [layer.expert_bias for layer in self.moe_layers() if layer.expert_bias is not None]

    def balancer_states(self) -> dict[str, dict[str, list[Tensor]]]:
        """What balancers keep: name of the balancer -> name of the tensor -> that of each MoE layer, in order."""
        states: dict[str, dict[str, list[Tensor]]] = {}
        for layer in self.moe_layers():
            for name, buffer in () if layer.balancer_state is None else layer.balancer_state.named_buffers():
                balancer, _, key = name.rpartition("/")
                states.setdefault(balancer.replace("/", "."), {}).setdefault(key, []).append(buffer)
        return states

    def attention_layers(self) -> list[Attention]:
        """The attention of all layers, in order."""
        return [module for module in self.modules() if isinstance(module, Attention)]

    def moe_layers(self) -> list[MoE]:
        """The MoE layers, in order."""
        return [module for module in self.modules() if isinstance(module, MoE)]

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """Fill every parameter: matrices normal(0, std_of(name)), norms 1; selection biases 0.

        Of a router's own parameters vectors are 1, but for those called bias, which are 0.
        Each parameter has a generator of its own, seeded by (seed, name), so its full tensor is the same whatever the
        layout, the wrappers, or the other parameters are.
        """
        for wrapped_name, parameter in self.named_parameters():
            name = plain_name(wrapped_name)
            fill(parameter, self.std_of(name), name, seed)
        for bias in self.expert_biases():
            bias.zero_()
        self.init_balancer_states()

    @torch.no_grad()
    def init_balancer_states(self) -> None:
        """Fill what balancers keep as at the start of a run."""
        for layer in self.moe_layers():
            for name, value in initial_state(layer.balancer_inits, layer.router_width).items():
                cast(nn.Module, layer.balancer_state).get_buffer(name).copy_(value)


def standard_std(name: str, init_std: float, num_layers: int) -> float:
    """The standard deviation with which a parameter begins: init_std, and less for what writes to the residual stream.

    The matrices wo and w2 have init_std / sqrt(2 * num_layers), as GPT-2 has them (Radford et al., 2019).
    """
    residual = name.removesuffix(".weight").endswith((".wo", ".w2")) and ".router." not in name
    return init_std / math.sqrt(2 * num_layers) if residual else init_std


def moe_layer_ids(num_layers: int, num_experts: int, first_dense_layers: int, layer_freq: int) -> range:
    """Return the ids of the MoE layers: every `layer_freq`-th from `first_dense_layers` on, none without experts."""
    if num_experts == 0:
        return range(0)
    if layer_freq < 1:
        raise ValueError(f"moe.layer_freq ({layer_freq}) must be at least 1")
    if not 0 <= first_dense_layers < num_layers:
        raise ValueError(
            f"moe.first_dense_layers ({first_dense_layers}) must be from 0 to num_layers - 1 ({num_layers - 1}); "
            "for a dense model set moe.num_experts to 0"
        )
    return range(first_dense_layers, num_layers, layer_freq)


def _check_experts(layer: int, dim: int, expert_dim: int, router: object) -> None:
    """Raise ValueError for widths that experts can't have, and where nothing chooses among them."""
    if router is None:
        raise ValueError(f"a router must be given when num_experts is above 0: layer {layer} is a MoE layer")

    # Grouped products want whole rows of 16 bytes.
    _check_positive("moe.expert_dim", expert_dim, f"layer {layer} is a MoE layer")
    for name, value in (("model.dim", dim), ("moe.expert_dim", expert_dim)):
        if value % 8:
            raise ValueError(f"{name} ({value}) must be a multiple of 8: grouped matrix products want rows of 16 bytes")


def _check_positive(name: str, value: int, why: str) -> None:
    if value < 1:
        raise ValueError(f"{name} ({value}) must be at least 1: {why}")


def fill(parameter: Tensor, std: float, name: str, seed: int) -> None:
    """Fill a parameter: a vector with 1, or 0 if it is called bias, all others with normal numbers."""
    if parameter.dim() == 1:
        parameter.fill_(0.0 if name.endswith("bias") else 1.0)
    else:
        fill_normal(parameter, std, f"{seed}/{name}")


def fill_normal(parameter: Tensor, std: float, key: str) -> None:
    """Fill with fp32 normal numbers that depend on `key` and the full shape alone; a shard takes its part of them."""
    # A parameter that is whole is filled in place, without a copy of its size.
    generator = torch.Generator(device=parameter.device).manual_seed(seed_of(key))
    if parameter.dtype == torch.float32 and not isinstance(parameter, DTensor):
        parameter.normal_(0.0, std, generator=generator)
        return

    # Always drawn in fp32 and in the full shape, or other types and layouts would get other numbers.
    full = torch.empty(parameter.shape, dtype=torch.float32, device=parameter.device)
    full.normal_(0.0, std, generator=generator)
    if isinstance(parameter, DTensor):
        # No communication: every process has made the same full tensor.
        full = distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(full)
