"""How initial weights, learning rates and the forward's factors follow from the model's size: `PARAMETRIZATIONS`.

In the standard parametrization the best learning rate moves as a model becomes wider or deeper. `mup` keeps it in
place, so that it can be searched for with a small *base* model. A parametrization is built from the `Shapes` of the
model and its own arguments, which are the keys of [parametrization].
"""

import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from titan_moe.model.multipliers import Multipliers
from titan_moe.model.transformer import standard_std
from titan_moe.optimizer.groups import Scale


class Shapes(NamedTuple):
    """What of [model], [moe] and [router] a parametrization may go by."""

    dim: float
    num_layers: float
    num_heads: float
    num_kv_heads: float
    head_dim: float
    ffn_dim: float
    init_std: float
    num_experts: int  # 0: a dense model
    top_k: int
    expert_dim: float
    num_shared_experts: int
    shared_expert_dim: float
    router: str
    router_arguments: Mapping[str, Any]
    own_router: bool  # its logits come from parameters of its own, not from one matrix


class Parametrization(NamedTuple):
    """What follows from a model's size; of parameters by their names in the model, such as `layers.0.moe.experts.w2`.

    `std_of(name)` is the standard deviation of the initial numbers of a matrix. `scale_of(name, optimizer, settings)`
    says what its rate, decay and eps are those of its group times, where `optimizer` updates it with these settings; it
    raises ValueError for an optimizer that it has no rule for.
    """

    multipliers: Multipliers
    std_of: Callable[[str], float]
    scale_of: Callable[[str, str, Mapping[str, Any]], Scale]


def standard(*, shapes: Shapes) -> Parametrization:
    """The same initial weights, rates and forward at every size, but for GPT-2's 1 / sqrt(2 * num_layers) of wo and w2.

    Of initial weights only: the standard deviation of these matrices, which write to the residual stream.
    """
    std_of = partial(standard_std, init_std=shapes.init_std, num_layers=int(shapes.num_layers))
    return Parametrization(Multipliers(), std_of, lambda name, optimizer, settings: Scale())


def mup(
    *,
    shapes: Shapes,
    base_dim: int,
    base_num_layers: int = 0,
    base_num_heads: int = 0,
    base_ffn_dim: int = 0,
    base_expert_dim: int = 0,
    base_num_experts: int = 0,
    base_top_k: int = 0,
    router_init_power: float = 1.0,
) -> Parametrization:
    """The learning rate of a base model stays right when width, depth, experts or their width grow (muP, CompleteP).

    The base is a model of `base_dim`, where this is the standard parametrization. Of its other sizes 0 means: as many
    layers, experts and experts of a token as here, heads as wide as here, and ffn_dim and expert_dim in the same
    proportion to dim as here.

    With n, L, F, k: dim, num_layers, the hidden width of a feed-forward network and top_k, each over the base's:

    | parameter                  | initial std       | rate  | weight decay | eps             |
    |----------------------------|-------------------|-------|--------------|-----------------|
    | embedding, output          | 1                 | 1     | 1            | 1 / n           |
    | norms of layers (last)     | -                 | 1     | 1            | 1 / (n L) (1/n) |
    | wq, wk, wv, wo             | 1 / sqrt(n)       | 1 / n | n            | 1 / (n L)       |
    | w1, w3                     | 1 / sqrt(n)       | 1 / n | n            | 1 / (F L)       |
    | w2                         | sqrt(n) / F       | 1 / F | F            | n / (F^2 L)     |
    | router                     | n^-router_init_power | 1 / n | n         | 1 / (n L)       |

    eps of experts and router is over k besides. Logits are divided by n; what a layer adds to the residual stream by L;
    attention logits are over head_dim, not its root, relative to the base's; and where a token's weights do not sum to
    one whatever their number (`sigmoid` with norm_topk = false), what the experts give is divided by k.

    These are the rates of AdamW, and of those that take its step size. Muon's are such that the largest singular value
    of an update is as sqrt(rows / columns), and its decay is n or what else keeps rate times decay.

    Sources: Jiang, Bordelon, Pehlevan and Hanin (2026, arXiv 2601.20205), tables 1 and 2, for experts and router; Dey
    et al. (2025, CompleteP, arXiv 2505.01618), table 1, alpha = 1, for all else and the decay; Yang, Simon and
    Bernstein (2023, arXiv 2310.17813) for Muon. Raises ValueError for a base that does not fit the model.
    """
    base = base_of(shapes, base_dim, base_num_layers, base_num_heads, base_ffn_dim, base_expert_dim)
    base = base._replace(num_experts=base_num_experts or shapes.num_experts, top_k=base_top_k or shapes.top_k)
    check_base(shapes, base)

    # Logits, whose matrix keeps the std and the rate of the base, would grow as the numbers that they sum up.
    multipliers = Multipliers(
        logits=base.dim / shapes.dim,
        residual=base.num_layers / shapes.num_layers,
        attention=math.sqrt(base.head_dim / shapes.head_dim),
        expert_output=expert_output(shapes, base.top_k),
    )

    def std_of(name: str) -> float:
        role, n, f, _ = ratios(name, shapes, base)
        factor = {"attention": n**-0.5, "up": n**-0.5, "down": n**0.5 / f, "router": n**-router_init_power}
        return standard_std(name, shapes.init_std, int(base.num_layers)) * factor.get(role, 1.0)

    return Parametrization(multipliers, std_of, partial(mup_scale, shapes=shapes, base=base))


PARAMETRIZATIONS: dict[str, Callable[..., Parametrization]] = {"standard": standard, "mup": mup}

# What a parameter is, by its name.
ROLES = {
    "embedding": r"^(tok_embeddings|output)\.weight$",
    "norm": r"norm\.weight$|\.attention\.w[qkv]\.bias$",  # vectors of fixed size
    "attention": r"\.attention\.w[qkvo]\.weight$",
    "up": r"\.(feed_forward|moe\.shared_experts)\.w[13]\.weight$|\.moe\.experts\.w[13]$",
    "down": r"\.(feed_forward|moe\.shared_experts)\.w2\.weight$|\.moe\.experts\.w2$",
    "router": r"\.moe\.(router|shared_expert_gate)\.weight$",
}

# Whose steps have AdamW's size: a sign, or a direction that is grafted onto AdamW's or made in another basis.
AS_ADAMW = (
    *("adamw", "ademamix", "lion", "schedule_free_adamw"),
    *("shampoo", "shampoo_fast", "distributed_shampoo", "soap"),
)
ORTHOGONAL = ("muon",)  # all singular values of an update are alike

# Routers whose weights of a token sum to the same however many experts it has, at a fixed share of them.
NORMALIZED = ("topk_softmax", "softmax_topk", "token_rounding")


def base_of(shapes: Shapes, dim: int, num_layers: int, num_heads: int, ffn_dim: int, expert_dim: int) -> Shapes:
    """The base's shapes: 0 stands for as many layers, for heads as wide, and for widths in proportion to dim."""
    width = shapes.dim / shapes.num_heads  # of a head, but for a model with a head_dim of its own
    if num_heads and dim % num_heads:
        raise ValueError(f"parametrization.base_num_heads ({num_heads}) must divide parametrization.base_dim ({dim})")
    if not num_heads and dim % width:
        raise ValueError(
            f"parametrization.base_dim ({dim}) must be a multiple of model.dim / model.num_heads ({width:g}), the "
            "width of a head, which the base shares unless parametrization.base_num_heads is set"
        )

    # what the user leaves out shrinks with the width, as the models of a family do
    heads = num_heads or dim / width
    experts_width = expert_dim or shapes.expert_dim * dim / shapes.dim
    return shapes._replace(
        dim=dim,
        num_layers=num_layers or shapes.num_layers,
        num_heads=heads,
        num_kv_heads=heads * shapes.num_kv_heads / shapes.num_heads,
        head_dim=shapes.head_dim * (dim / heads) / width,
        ffn_dim=ffn_dim or shapes.ffn_dim * dim / shapes.dim,
        expert_dim=experts_width,
        shared_expert_dim=shapes.shared_expert_dim * experts_width / shapes.expert_dim,
    )


def check_base(shapes: Shapes, base: Shapes) -> None:
    """Raise ValueError where nothing is known of how the base's rate relates to the model's."""
    if shapes.num_experts == 0:
        if base.num_experts:
            raise ValueError(
                f"parametrization.base_num_experts = {base.num_experts}, but moe.num_experts = 0 is a dense model: "
                "leave it out"
            )
        return
    if shapes.own_router:
        raise ValueError(
            f"parametrization.name = 'mup' has no rule for router.name = {shapes.router!r}, which has parameters of "
            "its own: take a router of one matrix, such as 'topk_softmax', or parametrization.name = 'standard'"
        )

    # At another share of experts rates are not known to transfer (arXiv 2601.20205, section 3.2).
    if shapes.top_k * base.num_experts != base.top_k * shapes.num_experts:
        raise ValueError(
            f"moe.top_k of moe.num_experts ({shapes.top_k} of {shapes.num_experts}) must be the same share as "
            f"parametrization.base_top_k of base_num_experts ({base.top_k} of {base.num_experts}): rates do not "
            "transfer between others; without these two keys the base has as many experts as the model"
        )


def expert_output(shapes: Shapes, base_top_k: int) -> float:
    """The factor of what the experts give: base_top_k / top_k where a token's weights are not normalized, else 1.

    Raises ValueError for a router that is not known to be one or the other, unless top_k is the base's.
    """
    if not shapes.num_experts or shapes.top_k == base_top_k or shapes.router in NORMALIZED:
        return 1.0
    if shapes.router == "sigmoid":
        return 1.0 if shapes.router_arguments["norm_topk"] else base_top_k / shapes.top_k
    raise ValueError(
        f"parametrization.base_top_k ({base_top_k}) must be moe.top_k ({shapes.top_k}) with router.name = "
        f"{shapes.router!r}: only of {', '.join((*NORMALIZED, 'sigmoid'))} is it known how a token's weights grow"
    )


class Ratios(NamedTuple):
    """What a parameter is, and the sizes that its rules go by, over the base's."""

    role: str
    n: float  # dim
    f: float  # hidden width of its feed-forward network; 1 where it is in none
    k: float  # top_k, for what belongs to routed experts; 1 for others


def ratios(name: str, shapes: Shapes, base: Shapes) -> Ratios:
    """The role and the ratios of a parameter; ValueError for one that no rule is for."""
    role = next((role for role, pattern in ROLES.items() if re.search(pattern, name)), None)
    if role is None:
        raise ValueError(f"parametrization.name = 'mup' has no rule for the parameter {name}: take 'standard'")
    width = "ffn_dim" if ".feed_forward." in name else "expert_dim"  # that of shared experts is a multiple of it
    is_ffn, is_routed = (
        role in ("up", "down"),
        name.endswith((".moe.router.weight", ".moe.experts.w1", ".moe.experts.w2", ".moe.experts.w3")),
    )
    return Ratios(
        role,
        shapes.dim / base.dim,
        getattr(shapes, width) / getattr(base, width) if is_ffn else 1.0,
        shapes.top_k / base.top_k if is_routed else 1.0,
    )


def mup_scale(name: str, optimizer: str, settings: Mapping[str, Any], *, shapes: Shapes, base: Shapes) -> Scale:
    """Rate, decay and eps of a parameter under `mup`; ValueError for an optimizer that no rule is for."""
    if optimizer not in AS_ADAMW + ORTHOGONAL:
        known = ", ".join(AS_ADAMW + ORTHOGONAL)
        raise ValueError(f"parametrization.name = 'mup' has no rule for optimizer {optimizer!r}: it has for {known}")
    if settings.get("grafting") == "none":
        raise ValueError(
            f"parametrization.name = 'mup' has no rule for {optimizer!r} with grafting = 'none', whose steps have a "
            "size of their own: take grafting = 'adamw'"
        )

    role, n, f, k = ratios(name, shapes, base)
    if optimizer in ORTHOGONAL and (role == "embedding" or settings.get("per_head")):
        what = "per_head = true" if settings.get("per_head") else name
        raise ValueError(
            f"parametrization.name = 'mup' has no rule for {what} with optimizer {optimizer!r}, but for whole matrices "
            "between layers: leave it to 'adamw', or per_head out"
        )

    # AdamW's entries are about 1 in size and add up over a product's inputs. What is no matrix is always AdamW's.
    depth = (
        1.0
        if name in ("norm.weight", "tok_embeddings.weight", "output.weight")
        else shapes.num_layers / base.num_layers
    )
    lr = {"embedding": 1.0, "norm": 1.0, "down": 1 / f}.get(role, 1 / n)
    eps = {"up": 1 / f, "down": n / f**2}.get(role, 1 / n) / (depth * k)
    if optimizer in ORTHOGONAL and role not in ("embedding", "norm"):
        step = partial(largest_singular_value, optimizer=optimizer, settings=settings)
        rows, columns = matrix_of(name, role, shapes)
        base_rows, base_columns = matrix_of(name, role, base)
        wanted = math.sqrt(rows / columns) / math.sqrt(base_rows / base_columns)
        lr = wanted * step(base_rows, base_columns) / step(rows, columns)

    # A rate times its decay, the part of a weight that decays in a step, is the base's.
    return Scale(lr, 1 / lr, eps)


def matrix_of(name: str, role: str, shapes: Shapes) -> tuple[float, float]:
    """Rows and columns of a matrix; of stacked experts, those of one."""
    if role == "router":
        return shapes.num_experts if name.endswith(".router.weight") else 1.0, shapes.dim
    if role == "attention":
        heads = shapes.num_kv_heads if name.endswith((".wk.weight", ".wv.weight")) else shapes.num_heads
        inner = heads * shapes.head_dim
        return (shapes.dim, inner) if name.endswith(".wo.weight") else (inner, shapes.dim)
    hidden = shapes.ffn_dim if ".feed_forward." in name else shapes.expert_dim
    if ".shared_experts." in name:
        hidden = shapes.num_shared_experts * shapes.shared_expert_dim
    return (hidden, shapes.dim) if role == "up" else (shapes.dim, hidden)


def largest_singular_value(rows: float, columns: float, *, optimizer: str, settings: Mapping[str, Any]) -> float:
    """That of an update by an optimizer of ORTHOGONAL at rate 1, up to a constant factor."""
    if settings.get("adjust_lr") == "original":
        return math.sqrt(max(1.0, rows / columns))
    return math.sqrt(max(rows, columns))
