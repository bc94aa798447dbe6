"""The router and the balancers of a configuration, called once on a few random tokens before a run begins.

What one of them gives that it must not is then an error of one line that names it, before data is read.

Shapes: T tokens, E experts, K choices of a token, L layers, D dim.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from titan_moe.balancer import SEEN, Balancer, Scope, margin_counts
from titan_moe.build import build_balancers, build_router
from titan_moe.config import Config, find_component
from titan_moe.config.sections import balancer_tables
from titan_moe.model.documents import places_of
from titan_moe.model.moe import MEASURED, WEIGHTS, Measure, all_experts_here, linear_router
from titan_moe.model.routing import ParametricRouter, Routing
from titan_moe.model.routing.common import OFFERED, ParameterError, asked_for, place_of
from titan_moe.model.transformer import fill
from titan_moe.step import sequence_load

SEQUENCES, TOKENS, LAYERS, WIDTH = 2, 16, 2, 8
Expected = tuple[tuple[int, ...], torch.dtype]


def check_parts(config: Config) -> list[str]:
    """Call router and balancers; ValueError where one can't be called so, or gives another thing than it must.

    No random state is changed. A fault inside a part from outside names its file and line. Returns what to tell of a
    router that may be meant so, but would mislead where it is not, a line each.
    """
    if not config.moe.num_experts:
        return []

    # Their builders speak of their own keys, so that what they raise stays as it is.
    balancers = {name: balancer for name, (_, balancer) in build_balancers(config).items()}
    moves_bias = any(balancer.moves_bias for balancer in balancers.values())
    width, identity = config.moe.router_width, config.moe.num_identity_experts
    bias_E = torch.zeros(width) if moves_bias else None
    router = build_router(config)

    # A router may draw noise: the run is to draw the same as it would without this.
    with torch.random.fork_rng(devices=[]):
        with blamed(f"router {config.router.name}", config.router.name):
            values = dry_values(router, config.model.dim, config.moe.num_experts, width)
            routing = dry_routing(router, bias_E, values, width)
            check_routing(routing, width)
            routing = values["routing"] = routing._replace(num_identity_experts=identity)
        for label, component, _ in balancer_tables(config):
            with blamed(f"balancer {label}", component), keys_of(label, component):
                check_effect(balancers[label])
                check_loss(balancers[label], label, routing, values)
                check_post_step(balancers[label], routing)
                check_projection(balancers[label], values["router"])
    return [f"router {config.router.name}: {caution}" for caution in cautions_of(routing)]


@contextlib.contextmanager
def blamed(part: str, component: str) -> Iterator[None]:
    """Put the part's name before the errors inside; of faults of a component from outside say where they are, too."""
    try:
        yield
    except (WrongResultError, ParameterError) as error:
        raise ValueError(f"{part}: {error}") from error
    except Exception as error:
        if ":" not in component:  # what ours raise speaks of their keys, and anything else is a fault of this package
            raise

        # The innermost line of the part's own file: deeper ones are torch's, and tell its author less. Where a function
        # could not even be called, the only line at hand would be ours.
        frames = traceback.extract_tb(error.__traceback__)
        file = component.partition(":")[0].replace(".", "/")
        last = next((f for f in reversed(frames) if file in f.filename.replace("\\", "/")), frames[-1])
        place = f"{Path(last.filename).name}:{last.lineno}"
        if Path(last.filename).is_relative_to(Path(__file__).parent):
            place = f"in what {place_of(find_component({}, component))} gives"
        what = " ".join(f"{type(error).__name__}: {error}".split())
        tried = f"tried on {SEQUENCES} sequences of {TOKENS // SEQUENCES} tokens"
        raise ValueError(f"{part}: {what} ({place}, {tried})") from error


@contextlib.contextmanager
def keys_of(label: str, component: str) -> Iterator[None]:
    """Let the errors inside, in which a balancer of ours names its keys, name those of the table that it is built from.

    With several instances of one balancer its own name would lead to none of them, or to the wrong one.
    """
    try:
        yield
    except ValueError as error:
        if ":" in component or label == component:
            raise
        raise ValueError(str(error).replace(f"balancer.{component}", f"balancer.{label}")) from error


class WrongResultError(Exception):
    """A part gave something that it must not."""


def dry_values(router: ParametricRouter, dim: int, num_experts: int, router_width: int) -> dict[str, Any]:
    """What a layer has to offer a router and measures, but for the routing: of random tokens, in two documents each."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    # A narrow stand-in for the experts: a measure may not go by their width.
    module = linear_router(dim, router_width) if router.init is None else own_module(router.init, dim, router_width)
    length = TOKENS // SEQUENCES
    places = places_of(torch.tensor([1, 1, 0, *[1] * (length - 3)]).expand(SEQUENCES, length), 0)
    return {
        "x": randn(TOKENS, dim),
        "router": module,
        "layer": 0,
        **places._asdict(),
        "w1": randn(num_experts, WIDTH, dim),
        "w2": randn(num_experts, dim, WIDTH),
        "w3": randn(num_experts, WIDTH, dim),
        "expert_ids": torch.arange(num_experts),
        "gather_experts": all_experts_here,
    }


def dry_routing(router: ParametricRouter, bias_E: Tensor | None, values: Mapping[str, Any], router_width: int) -> Any:
    """What the router gives for the `dry_values`, by the logits of a module of its own where it has one."""
    # As in a MoE layer, but for the logits of a linear router, which any numbers stand for.
    if router.init is None:
        logits_TE = torch.randn(TOKENS, router_width, generator=torch.Generator().manual_seed(0))
    else:
        logits_TE = values["router"](values["x"])
        check_tensor("its module must give logits", logits_TE, ((TOKENS, router_width), torch.float32))
    return router.route(logits_TE, bias_E, **{name: values[name] for name in asked_for(router.route, OFFERED)})


def own_module(init: Callable[[int, int], nn.Module], dim: int, num_experts: int) -> nn.Module:
    """The module of a router with parameters of its own, filled; WrongResultError for what no layout could shard."""
    module: Any = init(dim, num_experts)
    if not isinstance(module, nn.Module):
        raise WrongResultError(f"its init must give a torch.nn.Module, gave {described(module)}")

    # The model is made without memory and filled by the names of its parameters: a buffer would stay empty. FSDP2 can't
    # shard a number without a dimension, and parameters called experts would fall into the group of these.
    for name, _ in module.named_buffers():
        raise WrongResultError(f"its module must have parameters only, it has a buffer {name}")
    for name, parameter in module.named_parameters():
        if parameter.dim() == 0 or parameter.dtype != torch.float32:
            raise WrongResultError(f"parameter {name} must be fp32 of one dimension or more, is {described(parameter)}")
        if ".experts." in f".{name}":
            raise WrongResultError(f"parameter {name} must have another name: that of experts is taken")
        with torch.no_grad():
            fill(parameter, 0.02, name, 0)
    return module


def check_routing(routing: Any, num_experts: int) -> None:
    """Raise WrongResultError for what is no Routing of T tokens, or counts other choices than it has."""
    if not isinstance(routing, Routing):
        raise WrongResultError(f"must return a Routing, gave {described(routing)}")
    ids_TK = routing.topk_experts
    if not isinstance(ids_TK, Tensor) or ids_TK.dim() != 2:
        raise WrongResultError(f"topk_experts must be ({TOKENS}, K) int64, gave {described(ids_TK)}")

    of_experts, of_choices = (TOKENS, num_experts), (TOKENS, ids_TK.shape[1])
    expected: dict[str, Expected] = {
        "router_logits": (of_experts, torch.float32),
        "scores": (of_experts, torch.float32),
        "topk_scores": (of_choices, torch.float32),
        "topk_experts": (of_choices, torch.int64),
        "tokens_per_expert": ((num_experts,), torch.int64),
        "selection": (of_experts, torch.float32),
        "kept": (of_choices, torch.bool),
    }
    for name, shape_and_type in expected.items():
        value = getattr(routing, name)
        if value is not None or name not in ("selection", "kept"):
            check_tensor(f"{name} of its Routing must be", value, shape_and_type)

    # An id of E stands for no expert.
    if int(ids_TK.min()) < 0 or int(ids_TK.max()) > num_experts:
        raise WrongResultError(f"topk_experts must be from 0 to {num_experts}, gave {ids_TK.min()} to {ids_TK.max()}")
    if routing.kept is None and int(ids_TK.max()) == num_experts:
        raise WrongResultError("unused slots must be false in `kept`: give make_routing their mask as `used_TK`")
    counts_E = ids_TK.flatten().bincount(minlength=num_experts + 1)[:num_experts]
    if not torch.equal(routing.tokens_per_expert, counts_E):
        raise WrongResultError("tokens_per_expert must count topk_experts: let make_routing do it")


def cautions_of(routing: Routing) -> list[str]:
    """What a sound Routing may be meant to do, but misleads where it is not: of scores and weights, a line each."""
    # A router by threshold may leave a token without experts, and then without scores.
    said = []
    used_TK = routing.topk_experts < routing.scores.shape[-1]
    sums = routing.scores.detach().sum(-1)[used_TK.any(-1)]
    if sums.numel() and float((sums - 1).abs().max()) > 1e-3:
        low, high = (f"{float(end):.3g}" for end in (sums.min(), sums.max()))
        said.append(
            f"the scores of a token sum to {low if low == high else f'{low} to {high}'} over the experts, not to 1, "
            "but losses of balancers, entropies and metrics take them for probabilities: divide them by their sum"
        )

    # Weights of any sum are common. These are not: the experts would learn nothing, or to be subtracted.
    weights = routing.topk_scores.detach()[used_TK]
    if not weights.numel():
        said.append("no token has an expert: the layer gives nothing but its shared experts, if there are any")
    elif not weights.any():
        said.append("topk_scores are all 0: what experts give counts for nothing, and no gradient reaches them")
    elif bool((weights < 0).all()):
        said.append("topk_scores are all negative: what experts give is subtracted")
    return said


def check_effect(balancer: Balancer) -> None:
    """Raise WrongResultError for a balancer that does nothing, or has parts that nothing would ask."""
    if not (balancer.has_loss or balancer.moves_bias or balancer.project):
        raise WrongResultError("must have a loss, a post_step or a project: it has none of them")
    if not balancer.moves_bias:
        for name in ("observe", "schedule"):
            if getattr(balancer, name) is not Balancer._field_defaults[name]:
                raise WrongResultError(f"its {name} is for a post_step, and it has none")


def check_loss(balancer: Balancer, label: str, routing: Routing, values: Mapping[str, Any]) -> None:
    """Raise WrongResultError where the loss is no scalar, or goes by a measure that no layer can give."""
    if ("measure" in asked_for(balancer.loss, SEEN, 3)) != (balancer.measure is not None):
        raise WrongResultError("a loss that takes `measure` and a function `measure` belong together")
    if balancer.measure is not None:
        routing = routing._replace(measures={label: dry_measure(balancer.measure, routing, values)})
    if unknown := [scope for scope in balancer.scopes if scope not in get_args(Scope)]:
        raise WrongResultError(
            f"scope must be of {', '.join(get_args(Scope))}, or several in a tuple, has {unknown[0]!r}"
        )
    if balancer.has_loss:
        loads = dict.fromkeys(balancer.scopes, routing.tokens_per_expert)
        if "sequence" in loads:
            loads["sequence"] = sequence_load(routing, SEQUENCES)
        value: Any = balancer.loss_of([routing] * LAYERS, LAYERS - 1, loads, torch.tensor(TOKENS), label)
        if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
            raise WrongResultError(f"loss must return a scalar tensor, gave {described(value)}")


def dry_measure(measure: Measure, routing: Routing, values: Mapping[str, Any]) -> Any:
    """What the measure gives of the `dry_values`; WrongResultError where that is no tensors, or a weight itself."""
    outputs_TKD = torch.randn(*routing.topk_experts.shape, values["x"].shape[1])
    values = {**values, "routing": routing, "outputs": outputs_TKD}
    result: Any = measure(**{name: values[name] for name in asked_for(measure, MEASURED, 0)})

    # Sharded weights are whole in the layer's forward alone: their memory is freed after it.
    weights = [*values["router"].parameters(), *(values[name] for name in WEIGHTS)]
    memory = {weight.untyped_storage().data_ptr() for weight in weights}
    for leaf in tree_leaves(result):
        if not isinstance(leaf, Tensor):
            raise WrongResultError(f"measure must return tensors, gave {described(leaf)}")
        if leaf.untyped_storage().data_ptr() in memory:
            raise WrongResultError("measure must compute something of a weight, whose memory is freed: not give itself")
    return result


def check_projection(balancer: Balancer, router: nn.Module) -> None:
    """Raise WrongResultError where the projection gives other weights than it got."""
    if balancer.project is None:
        return
    weights = {name: parameter.detach().clone() for name, parameter in router.named_parameters()}
    result: Any = balancer.project(weights)
    check_unchanged("project", weights.values())
    if not isinstance(result, Mapping) or result.keys() != weights.keys():
        gave = [*result] if isinstance(result, Mapping) else described(result)
        raise WrongResultError(f"project must return the weights {[*weights]}, gave {gave}")
    for name, weight in weights.items():
        check_tensor(f"project must return {name} as", result[name], (tuple(weight.shape), torch.float32))


def check_post_step(balancer: Balancer, routing: Routing) -> None:
    """Raise WrongResultError where the post step gives no bias, or another state than it got."""
    asks_state = "state" in balancer.asked({}, 1, 0.5)
    num_experts = routing.scores.shape[-1]
    if asks_state != (balancer.init is not None):
        raise WrongResultError("an init that makes a state and a post_step that takes `state` belong together")
    state = stacked_state(balancer.init(num_experts)) if balancer.init else {}
    if not balancer.moves_bias:
        return

    # The rule's cutoff is a token's K-th score, which says nothing where a token does not use all of its K slots.
    if balancer.observe is margin_counts and routing.has_unused and routing.mean_k is None:
        raise WrongResultError(
            "rule = 'quantile' needs a router that uses all of its slots, or says by `mean_k` how many: "
            "take rule = 'sign'"
        )

    # Layers come stacked, as in a step.
    bias_E = torch.zeros(num_experts)
    load_E: Any = routing.tokens_per_expert if balancer.observe is None else balancer.observe(routing, bias_E)
    if not isinstance(load_E, Tensor) or load_E.is_floating_point():
        raise WrongResultError(f"observe must return integers, gave {described(load_E)}")
    bias_LE, load_LE = torch.stack([bias_E] * LAYERS), torch.stack([load_E] * LAYERS)
    asked = balancer.asked(dict(state), 1, 0.5, routing.num_identity_experts)
    result: Any = balancer.post_step(load_LE, bias_LE, **asked)
    check_unchanged("post_step", [load_LE, bias_LE, *state.values()])
    if asks_state and not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Mapping)):
        raise WrongResultError(f"post_step must return (expert_bias, state), gave {described(result)}")
    moved_LE, new_state = result if asks_state else (result, {})
    check_tensor("post_step must return the expert_bias,", moved_LE, ((LAYERS, num_experts), torch.float32))
    if new_state.keys() != state.keys():
        raise WrongResultError(f"post_step must return the state of {[*state]}, gave that of {[*new_state]}")
    for key, value in new_state.items():
        check_tensor(f"post_step must return state {key} as", value, (tuple(state[key].shape), torch.float32))


def stacked_state(state: Any) -> dict[str, Tensor]:
    """The state of a layer as of L layers; WrongResultError for what is none."""
    if not isinstance(state, Mapping):
        raise WrongResultError(f"init must return tensors by their names, gave {described(state)}")
    for key, value in state.items():
        if not isinstance(key, str) or not key.isidentifier():
            raise WrongResultError(f"init must name each tensor as a variable, not {key!r}")
        if not isinstance(value, Tensor) or value.dtype != torch.float32:
            raise WrongResultError(f"init must return fp32 tensors, gave {key}: {described(value)}")
    return {key: torch.stack([value] * LAYERS) for key, value in state.items()}


def check_unchanged(function: str, arguments: Iterable[Tensor]) -> None:
    """Raise WrongResultError where one of these new tensors was written: a skipped step has to keep what was before."""
    if any(tensor._version for tensor in arguments):
        raise WrongResultError(f"{function} must return new tensors, and wrote into those that it was given")


def check_tensor(must: str, value: Any, expected: Expected) -> None:
    """Raise WrongResultError, `must` first, unless `value` is a tensor of that shape and type."""
    shape, dtype = expected
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        raise WrongResultError(f"{must} {shape} {_short(dtype)}, gave {described(value)}")


def described(value: Any) -> str:
    """A value for people: shape and type of a tensor, the name of any other's type."""
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {_short(value.dtype)}"
    return type(value).__name__


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
