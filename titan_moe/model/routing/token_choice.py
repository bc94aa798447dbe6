"""Routers in which each token chooses its experts.

Arguments that several routers take: `num_groups`, `topk_groups` (`common.limit_groups`), `jitter`, `noise_std`
(`common.scaled_logits`), `capacity_factor` (0: dropless), `drop_policy` (`common.drop_over_capacity`).

Shapes: T tokens, E experts, K top_k.
"""

from torch import Tensor

from titan_moe.model.routing.common import (
    DropPolicy,
    Options,
    Router,
    Routing,
    drop_over_capacity,
    exact_factor,
    make_routing,
    normalized,
    scaled_logits,
    select,
)


def topk_softmax(
    *,
    top_k: int,
    temperature: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    jitter: float = 0.0,
    noise_std: float = 0.0,
    capacity_factor: float = 0.0,
    drop_policy: DropPolicy = "position",
) -> Router:
    """Choose the top_k largest logits, then a softmax over these alone: the weights of a token sum to 1.

    z = logits / temperature; experts = topk(z + bias); weights = softmax(z[experts]); scores = softmax(z).
    Source: Tandogan et al., section 3.3, the scheme of the paper's experiments; equal to Mixtral's softmax, top-k,
    renormalise (Jiang et al., 2024) and, with top_k = 2 and a capacity factor, to GShard's gates (Lepikhin et al.,
    2020, without the random dispatch of second choices). The bias is added to the logits, as in section 3.3.3.
    Raises ValueError for arguments out of range, and when it is called with fewer than top_k experts.
    """
    factor = exact_factor(capacity_factor)
    options = Options(top_k, temperature, num_groups, topk_groups, jitter, noise_std, factor, drop_policy)
    options.check()

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        z_TE = scaled_logits(logits_TE, options)

        # The bias is added to the logits for the choice alone: weights and probabilities are of the logits without it.
        topk_experts_TK = select(z_TE, expert_bias_E, options)  # (T, E) -> (T, K)
        topk_scores_TK = z_TE.gather(-1, topk_experts_TK).softmax(-1)  # (T, E) -> (T, K)
        routing = make_routing(logits_TE, z_TE.softmax(-1), topk_scores_TK, topk_experts_TK, z_TE)
        return drop_over_capacity(routing, options)

    return route


def softmax_topk(
    *,
    top_k: int,
    temperature: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    jitter: float = 0.0,
    noise_std: float = 0.0,
    capacity_factor: float = 0.0,
    drop_policy: DropPolicy = "position",
) -> Router:
    """Softmax over all experts, of which the top_k largest are kept as they are: the weights sum to less than 1.

    z = logits / temperature; experts = topk(z + bias); weights = softmax(z)[experts]; scores = softmax(z).
    Source: Tandogan et al., section 3.3; Switch (Fedus et al., 2021) for top_k = 1; Qwen2-MoE with norm_topk_prob
    off. Raises ValueError for arguments out of range, and when it is called with fewer than top_k experts.
    """
    factor = exact_factor(capacity_factor)
    options = Options(top_k, temperature, num_groups, topk_groups, jitter, noise_std, factor, drop_policy)
    options.check()

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        z_TE = scaled_logits(logits_TE, options)

        # The choice compares logits although the weights are probabilities: so the bias has the same units as that of
        # `topk_softmax`, and both routers choose alike.
        topk_experts_TK = select(z_TE, expert_bias_E, options)  # (T, E) -> (T, K)
        scores_TE = z_TE.softmax(-1)
        routing = make_routing(logits_TE, scores_TE, scores_TE.gather(-1, topk_experts_TK), topk_experts_TK, z_TE)
        return drop_over_capacity(routing, options)

    return route


def switch(
    *,
    top_k: int,
    temperature: float = 1.0,
    jitter: float = 0.0,
    noise_std: float = 0.0,
    capacity_factor: float = 0.0,
    drop_policy: DropPolicy = "position",
) -> Router:
    """Choose the one most probable expert, weigh by its probability.

    z = logits / temperature; expert = argmax(z + bias); weight = softmax(z)[expert]; scores = softmax(z). This is
    `softmax_topk` for one expert. Source: Switch (Fedus et al., 2021), equations 1 and 2, which trains with capacity
    factors from 1 to 2 (here off by default). Raises ValueError when top_k is not 1 and for arguments out of range.
    """
    if top_k != 1:
        raise ValueError(f"router.name = 'switch' sends each token to one expert: moe.top_k ({top_k}) must be 1")
    return softmax_topk(
        top_k=1,
        temperature=temperature,
        jitter=jitter,
        noise_std=noise_std,
        capacity_factor=capacity_factor,
        drop_policy=drop_policy,
    )


def sigmoid(
    *,
    top_k: int,
    temperature: float = 1.0,
    norm_topk: bool = True,
    score_scale: float = 1.0,
    num_groups: int = 1,
    topk_groups: int = 1,
    jitter: float = 0.0,
    noise_std: float = 0.0,
) -> Router:
    """Score every expert by its own sigmoid and keep the top_k largest.

    s = sigmoid(logits / temperature); experts = topk(s + bias); weights = score_scale * s[experts], divided by their
    sum + 1e-20 when `norm_topk`; scores = s / (sum of s over experts + 1e-20). Source: DeepSeek-V3 (2024), equations
    13 to 16, bias of Wang et al. (2024); Glm4Moe with norm_topk_prob and routed_scaling_factor. Dropless, as these are.
    Raises ValueError for arguments out of range, and when it is called with fewer than top_k experts.
    """
    options = Options(top_k, temperature, num_groups, topk_groups, jitter, noise_std)
    options.check()

    def route(router_logits_TE: Tensor, expert_bias_E: Tensor | None) -> Routing:
        logits_TE = router_logits_TE.float()
        s_TE = scaled_logits(logits_TE, options).sigmoid()

        # The choice compares sigmoids, so the bias is in their units. The weights are of the sigmoids without it.
        topk_experts_TK = select(s_TE, expert_bias_E, options)  # (T, E) -> (T, K)
        topk_scores_TK = s_TE.gather(-1, topk_experts_TK)  # (T, E) -> (T, K)
        if norm_topk:
            topk_scores_TK = normalized(topk_scores_TK)

        # A balance loss needs probabilities: each expert's share of the token's sigmoids (DeepSeek-V3, equation 19).
        return make_routing(logits_TE, normalized(s_TE), topk_scores_TK * score_scale, topk_experts_TK, s_TE)

    return route
