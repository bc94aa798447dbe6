"""Expert surgery: checkpoints with other experts than they were trained with, optimizer state and bias carried along.

An operation on a model that has experts is a plan: it says for each new expert which old ones it is made of. The plan
is applied to all tensors that have a row for each expert: weights, router, bias, what balancers keep, moments and step
counts.

Shapes: E experts, D model width, F width of the feed-forward network, L MoE layers.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from titan_moe.build import balancer_inits, build_model, build_optimizer, build_router
from titan_moe.checkpoint import resolve_checkpoint
from titan_moe.checkpoint.folder import read_manifest
from titan_moe.checkpoint.lazy import Lazy, LazyTensors, read_lazily
from titan_moe.checkpoint.state import TRAINED, read_common
from titan_moe.checkpoint.store import read_config
from titan_moe.config import Config, load_saved, to_toml
from titan_moe.config.checks import parametrization_of
from titan_moe.convert.hf.architectures import moe_layers
from titan_moe.convert.new_folder import new_checkpoint
from titan_moe.data.tokenizer_files import read_tokenizer_files
from titan_moe.model.moe import initial_state
from titan_moe.model.transformer import fill_normal
from titan_moe.model.wrappers import is_balancer_state
from titan_moe.norms import matrix_norms
from titan_moe.runtime.world import seed_of

logger = logging.getLogger(__name__)
MATRICES = ("w1", "w2", "w3")
RADIUS = "radius"  # the optimizer state of MuonH and AdamH: the norm that each expert is kept at
OF_WEIGHTS = ("z", TRAINED)  # optimizer states that are weights themselves, those of schedule-free AdamW


class Expert(NamedTuple):
    """What an expert of the new layer is made of: the weighted mean of old ones, and noise."""

    sources: tuple[int, ...]  # old experts, the most important first
    weights: tuple[float, ...]  # sum to 1
    noise: float = 0.0  # standard deviation of what is added to weights, relative to that of the expert's


Plan = list[Expert]


def keep(expert: int) -> Expert:
    """An expert as it was."""
    return Expert((expert,), (1.0,))


def add_experts(load_E: Tensor, num_experts: int, noise: float) -> Plan:
    """All experts as they are, and copies of the busiest ones with noise; `load_E` is the tokens of each."""
    old = load_E.numel()
    _check_more(num_experts, old)
    order = load_E.argsort(descending=True, stable=True).tolist()
    return [keep(e) for e in range(old)] + [Expert((order[i % old],), (1.0,), noise) for i in range(num_experts - old)]


def prune_experts(load_E: Tensor, num_experts: int) -> Plan:
    """The most loaded experts, in their old order."""
    _check_fewer(num_experts, load_E.numel())
    busiest = load_E.argsort(descending=True, stable=True)[:num_experts].sort().values
    return [keep(e) for e in busiest.tolist()]


def merge_experts(load_E: Tensor, num_experts: int, similarity_EE: Tensor) -> Plan:
    """One expert for each group of similar ones, their mean weighted by load.

    The two most similar groups are joined until `num_experts` are left; the similarity of two groups is the mean over
    their pairs (average linkage).
    """
    _check_fewer(num_experts, load_E.numel())

    # Joined one pair at a time, because each join changes how similar the group is to all others.
    groups = [[e] for e in range(load_E.numel())]
    while len(groups) > num_experts:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        i, j = max(pairs, key=lambda pair: similarity_EE[groups[pair[0]]][:, groups[pair[1]]].mean().item())
        groups[i] += groups.pop(j)

    # The busiest comes first: what can't be averaged, a step count, is taken from the first source. The small weight
    # makes the plain mean of experts that all had no token.
    plan = []
    for group in groups:
        ranked = sorted(group, key=lambda e: -load_E[e].item())
        weight = load_E[ranked].double() + 1e-9
        plan.append(Expert(tuple(ranked), tuple((weight / weight.sum()).tolist())))
    return plan


def revive_experts(load_E: Tensor, threshold: float, noise: float) -> Plan:
    """Experts with a load below `threshold` times the mean become copies of the busiest ones, with noise."""
    order = load_E.argsort(descending=True, stable=True).tolist()
    dead = [e for e in order if load_E[e] <= threshold * load_E.double().mean()]
    alive = [e for e in order if e not in dead]
    if not alive:
        raise ValueError(f"--threshold ({threshold}) leaves no expert that another could be copied from")
    source = {e: alive[i % len(alive)] for i, e in enumerate(dead)}
    return [Expert((source[e],), (1.0,), noise) if e in source else keep(e) for e in range(load_E.numel())]


def similarity(tensors: LazyTensors, layer: int) -> Tensor:
    """Cosine between the weights of each two experts of a layer, (E, E)."""
    # The dot products of all weights are the sum of those of each matrix, so that one matrix is in memory at a time.
    products: list[Tensor] = []
    for matrix in MATRICES:
        flat = tensors[f"model.layers.{layer}.moe.experts.{matrix}"].load().flatten(1).float()  # (E, F, D) -> (E, F D)
        products.append(flat @ flat.t())  # (E, E)
    product = torch.stack(products).sum(0)
    norm = product.diagonal().clamp(min=1e-30).sqrt()
    return product / norm / norm.unsqueeze(1)


def change_experts(
    checkpoint: Path | str,
    out: Path,
    plans: Callable[[LazyTensors], list[Plan]],
    overrides: list[str],
    trust_components: Sequence[str] = (),
) -> None:
    """Write the checkpoint with each MoE layer's experts as its plan says; `overrides` change its configuration.

    `trust_components` as in `load_model`.
    """
    step_folder = resolve_checkpoint(checkpoint)
    before = read_config(step_folder, trust_components)
    if not before.moe.num_experts:
        raise ValueError(f"{step_folder} is of a dense model: upcycle makes experts of it")
    _check_router(before)
    tensors = read_lazily(step_folder)

    # The plans say how many experts there are afterwards: the configuration follows them, whatever asked for them.
    plan_of_layer = dict(zip(moe_layers(before), plans(tensors), strict=True))
    _check_noise(tensors, max(expert.noise for plan in plan_of_layer.values() for expert in plan))
    num_experts = len(plan_of_layer[moe_layers(before)[0]])
    overrides = ["--moe.num_experts", str(num_experts), *overrides]
    config = _new_config(step_folder, out, overrides, trust_components)
    _check_factors(before, config)
    _check_router(config)

    # A state of experts that has neither a row for each nor one number for all can't be told apart by expert. It is
    # refused: carried over as it is it would be wrong without anybody noticing.
    new_tensors: LazyTensors = {}
    for name, tensor in tensors.items():
        layer = _layer_of_expert_tensor(name)
        if layer is None:
            new_tensors[name] = tensor
        elif tensor.shape and tensor.shape[0] == before.moe.num_experts:
            new_tensors[name] = _apply_plan(name, tensor, plan_of_layer[layer])
            if name.endswith(f".{RADIUS}"):
                weight = f"model.{name.removeprefix('optimizer.state.').removesuffix(f'.{RADIUS}')}"
                experts = _apply_plan(weight, tensors[weight], plan_of_layer[layer])
                new_tensors[name] = _radius_of(experts, new_tensors[name], plan_of_layer[layer])
        elif not tensor.shape:  # a step count of the whole tensor
            new_tensors[name] = tensor
        else:
            raise ValueError(f"{name} of shape {tensor.shape} has no row for each expert: it cannot be carried over")
    new_tensors = _with_states(config, new_tensors)
    _check_shapes(config, new_tensors)
    _save(step_folder, out, config, new_tensors, read_common(step_folder)["optimizer"])


def upcycle(
    checkpoint: Path | str,
    out: Path,
    *,
    granularity: int,
    noise: float,
    overrides: list[str],
    seed: int = 0,
    trust_components: Sequence[str] = (),
) -> None:
    """Write a dense checkpoint as one with experts, which are copies of its feed-forward networks (sparse upcycling).

    `overrides` says num_experts and top_k and whatever else changes. With `granularity` G every copy is cut into G
    experts of 1 / G of the width. Their rows of the router are equal, so that a token chooses all G of a copy; w2 is
    multiplied by G because each has 1 / G of the weight. Where a token's weights sum to 1 (topk_softmax, or sigmoid
    with norm_topk), the model computes what the dense one did, up to `noise` on the experts: its standard deviation,
    relative to that of the expert's weights. The router is new. `trust_components` as in `load_model`.
    Source: Komatsuzaki et al. (2023), He et al. (2024) for G > 1 (virtual groups).
    """
    step_folder = resolve_checkpoint(checkpoint)
    before = read_config(step_folder, trust_components)
    if before.moe.num_experts:
        raise ValueError(f"{step_folder} has experts already ({before.moe.num_experts}): use add")
    width = before.model.ffn_dim // granularity
    overrides = ["--moe.expert_dim", str(width), *overrides]
    config = _new_config(step_folder, out, overrides, trust_components)
    _check_upcycling(before, config, granularity)
    _check_factors(before, config)
    _check_router(config)

    # `NAME.feed_forward.w1.weight`, and its optimizer states `NAME.feed_forward.w1.weight.STATE`, become
    # `NAME.moe.experts.w1[.STATE]`. With load_lr experts have other states than a dense matrix: they begin anew.
    tensors = read_lazily(step_folder)
    _check_noise(tensors, noise)
    new_tensors: LazyTensors = {}
    carries_states = not any("load_lr" in table for table in config.optimizer.groups.values())
    for name, tensor in tensors.items():
        head, _, rest = name.partition(".feed_forward.")
        if rest and int(head.rpartition(".")[2]) in moe_layers(config):
            if carries_states or name.startswith("model."):
                matrix, _, state = rest.partition(".weight")
                _check_cut(name, tensor)
                scale = granularity if matrix == "w2" and state.removeprefix(".") in ("", *OF_WEIGHTS) else 1
                new_tensors[f"{head}.moe.experts.{matrix}{state}"] = _copies(
                    tensor, matrix, config.moe.num_experts, granularity, "" if state else f"{seed}/{name}", noise, scale
                )
        else:
            new_tensors[name] = tensor
    for layer in moe_layers(config):
        new_tensors |= _new_router(config, layer, granularity, seed)
    new_tensors = _with_states(config, new_tensors)
    _check_shapes(config, new_tensors)

    # Other parameters in other groups: the settings are those of a new optimizer, with the rates of the configuration.
    values = read_common(step_folder)["optimizer"]
    _save(step_folder, out, config, new_tensors, _fresh_values(config) if values else values)


def _check_cut(name: str, tensor: Lazy) -> None:
    """Raise ValueError for a state of a dense matrix that is neither one number nor a number for each element."""
    if len(tensor.shape) not in (0, 2):
        raise ValueError(
            f"{name} of shape {tensor.shape} is of an optimizer of matrices, whose states can't be cut into those of "
            "experts: take the run's export of weights"
        )


def _copies(tensor: Lazy, matrix: str, num_experts: int, granularity: int, key: str, noise: float, scale: int) -> Lazy:
    """A dense matrix, or a state of it, as the stacked matrices of E experts, times `scale`.

    w1 and w3: (F, D) -> (E, F / G, D), w2: (D, F) -> (E, D, F / G). `key` names the noise; "" for none.
    """
    if not tensor.shape:  # a step count
        return tensor

    # Cut along F. Each of the G parts of a copy gets 1 / G of a token's weight, which `scale` of w2 makes up for.
    dim = 1 if matrix == "w2" else 0
    shape = list(tensor.shape)
    shape[dim] //= granularity

    def load() -> Tensor:
        # Expert i is part i % G of copy i // G, as the rows of the new router have it.
        parts = [part * scale if scale != 1 else part for part in tensor.load().chunk(granularity, dim)]
        experts = torch.stack(parts * (num_experts // granularity))
        if noise and key:
            for index, expert in enumerate(experts):
                _add_noise(expert, noise, f"{key}/{index}")
        return experts

    return Lazy((num_experts, *shape), tensor.dtype, load)


def _new_router(config: Config, layer: int, granularity: int, seed: int) -> LazyTensors:
    """The router of a layer, (E, D), with new weights, and its selection bias, (E,), of 0 if the model has one."""
    name, experts, dim = f"layers.{layer}.moe.router.weight", config.moe.num_experts, config.model.dim

    def load() -> Tensor:
        # Equal rows for the parts of a copy: their logits are equal, and a token takes all of them or none.
        weight = torch.empty(experts // granularity, dim)
        fill_normal(weight, parametrization_of(config).std_of(name), f"{seed}/{name}")
        return weight.repeat_interleave(granularity, 0)  # (E / G, D) -> (E, D)

    tensors = {f"model.{name}": Lazy((experts, dim), torch.float32, load)}
    with torch.device("meta"):
        has_bias = bool(build_model(config).expert_biases())
    if has_bias:
        bias = Lazy((experts,), torch.float32, lambda: torch.zeros(experts))
        tensors[f"model.layers.{layer}.moe.expert_bias"] = bias
    return tensors


def _with_states(config: Config, tensors: LazyTensors) -> LazyTensors:
    """The tensors, and as at the start of a run what balancers of `config` keep that is not among them."""
    fresh = {
        f"model.layers.{layer}.moe.balancer_state.{name}": Lazy(tuple(value.shape), value.dtype, value.clone)
        for layer in moe_layers(config)
        for name, value in initial_state(balancer_inits(config), config.moe.num_experts).items()
    }
    return {**fresh, **tensors}


def _check_upcycling(before: Config, config: Config, granularity: int) -> None:
    """Raise ValueError where copies can't be cut so, or the result could not compute what the dense model did."""
    moe = config.moe
    if not moe.num_experts:
        raise ValueError("upcycle needs --moe.num_experts above 0")
    if granularity < 1 or before.model.ffn_dim % granularity:
        raise ValueError(f"--granularity ({granularity}) must divide model.ffn_dim ({before.model.ffn_dim})")

    # A token takes top_k / G copies: what a division leaves over would be a part of one.
    if moe.num_experts % granularity or moe.top_k % granularity:
        raise ValueError(
            f"--granularity ({granularity}) must divide moe.num_experts ({moe.num_experts}) and moe.top_k "
            f"({moe.top_k}): a token takes all parts of a copy"
        )
    if moe.num_shared_experts:
        raise ValueError("upcycle makes no shared experts: leave moe.num_shared_experts at 0")


def _apply_plan(name: str, tensor: Lazy, plan: Plan) -> Lazy:
    """A tensor with a row for each old expert as one with a row for each new one, (E, ...) -> (new E, ...)."""
    is_weight = name.startswith("model.") and not is_balancer_state(name)
    is_counter = name.startswith("optimizer.") and len(tensor.shape) == 1

    def load() -> Tensor:
        # The mean of two step counts counts nothing: the most important expert's stays. Noise is for the weights alone,
        # not for moments, and not for the bias, which is one number for an expert.
        old = tensor.load()
        new = torch.empty(len(plan), *old.shape[1:], dtype=old.dtype)
        for index, (row, expert) in enumerate(zip(new, plan, strict=True)):
            if len(expert.sources) == 1 or is_counter:
                row.copy_(old[expert.sources[0]])
            else:
                weights = torch.tensor(expert.weights, dtype=old.dtype)
                row.copy_(torch.tensordot(weights, old[list(expert.sources)], 1))
            if expert.noise and is_weight and old.dim() > 1:
                _add_noise(row, expert.noise, f"{name}/{index}")
        return new

    return Lazy((len(plan), *tensor.shape[1:]), tensor.dtype, load)


def _radius_of(experts: Lazy, radius: Lazy, plan: Plan) -> Lazy:
    """The norms (E,) that experts are kept at: their own where they are the mean of several, whose norm is smaller."""
    is_mean = torch.tensor([len(expert.sources) > 1 for expert in plan])
    return Lazy(radius.shape, radius.dtype, lambda: torch.where(is_mean, matrix_norms(experts.load()), radius.load()))


def _check_noise(tensors: LazyTensors, noise: float) -> None:
    """Raise ValueError where noise would be on averages over steps alone, and gone once training goes on."""
    if noise and any(name.endswith(f".{TRAINED}") for name in tensors):
        raise ValueError(
            f"noise ({noise}) does not go with a checkpoint of an optimizer that averages weights over steps: it would "
            "be on the averages alone: set --noise 0, or take the run's export of weights"
        )


def _add_noise(row: Tensor, noise: float, key: str) -> None:
    """Add noise to an expert's weights in place; the same for the same key, whatever was drawn before."""
    generator = torch.Generator().manual_seed(seed_of(key))
    row += noise * row.std() * torch.randn(row.shape, generator=generator, dtype=row.dtype)


def _layer_of_expert_tensor(name: str) -> int | None:
    """The layer to whose experts a tensor belongs; None: to none."""
    for part in (".moe.experts.", ".moe.router.", ".moe.expert_bias", ".moe.balancer_state."):
        head, separator, _ = name.partition(part)
        if separator:
            return int(head.rpartition(".")[2])
    return None


def _new_config(step_folder: Path, out: Path, overrides: list[str], trust_components: Sequence[str]) -> Config:
    words = ["--job.dump_folder", str(out), *overrides]
    return load_saved(step_folder / "config.toml", words, trust_components=trust_components, with_data=False)


def _check_shapes(config: Config, tensors: LazyTensors) -> None:
    """Raise ValueError where these are not the tensors of the model: further overrides may have changed anything."""
    with torch.device("meta"):
        state = build_model(config).state_dict()
    wanted = {f"model.{name}": tuple(value.shape) for name, value in state.items()}
    shapes = {name: tensor.shape for name, tensor in tensors.items() if name.startswith("model.")}
    differing = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    if differing:
        raise ValueError(
            f"the configuration asks for another model: {differing[0]} is {shapes.get(differing[0], 'missing')}, "
            f"not {wanted.get(differing[0], 'in it')}"
        )


def _fresh_values(config: Config) -> dict[str, Any]:
    """What a checkpoint holds of a new optimizer beside tensors: its groups of names and their hyperparameters."""
    with torch.device("meta"):
        model = build_model(config)
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(config, model).param_groups
    values: dict[str, Any] = {"groups": [[names[p] for p in group["params"]] for group in groups]}
    for group in groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        for parameter in group["params"]:
            values |= {f"optimizer.param_groups.{names[parameter]}.{key}": value for key, value in settings.items()}
    return values


def _check_factors(before: Config, config: Config) -> None:
    """Raise ValueError where the new model's forward would multiply by other factors than the old one's."""
    # The weights are carried over as they are, and the experts of an upcycled model are to give what its dense layers
    # gave.
    old, new = parametrization_of(before).multipliers, parametrization_of(config).multipliers
    if new != old:
        key = next(name for name in old._fields if getattr(old, name) != getattr(new, name))
        raise ValueError(
            f"[parametrization] gives the new model another factor {key} ({getattr(new, key):g}, before "
            f"{getattr(old, key):g}), for which its weights are not made: keep the base's and the model's sizes, or "
            "export the model first, which folds the factors into the weights"
        )


def _check_router(config: Config) -> None:
    """Raise ValueError for a router whose parameters do not have just a row for each expert."""
    if config.moe.num_identity_experts:
        raise ValueError(
            f"moe.num_identity_experts = {config.moe.num_identity_experts}: the router has rows beside those of the "
            "experts that can be changed: experts can be changed where it is 0"
        )
    if build_router(config).init is not None:
        raise ValueError(
            f"router.name = {config.router.name!r} has parameters of its own, and nothing says which of them have a "
            "row for each expert: experts can be changed with routers that have one matrix"
        )


def _save(step_folder: Path, out: Path, config: Config, tensors: LazyTensors, values: dict[str, Any]) -> None:
    """Write the new checkpoint at the old one's step, with its data position, tokens seen and tokenizer."""
    manifest, extra = read_manifest(step_folder), read_common(step_folder)["extra"]
    extra = {**extra, "choices": None} if "choices" in extra else extra  # of the old experts
    files = {"config.toml": to_toml(config), **read_tokenizer_files(step_folder)}
    with new_checkpoint(
        out, manifest["step"], tensors, optimizer=manifest["optimizer"], values=values, extra=extra, files=files
    ):
        pass
    logger.info("wrote %s: %d experts, %d of them for each token", out, config.moe.num_experts, config.moe.top_k)


def _check_more(num_experts: int, old: int) -> None:
    if num_experts <= old:
        raise ValueError(f"--num_experts ({num_experts}) must be more than there are ({old})")


def _check_fewer(num_experts: int, old: int) -> None:
    if not 1 <= num_experts < old:
        raise ValueError(f"--num_experts ({num_experts}) must be at least 1 and less than there are ({old})")
