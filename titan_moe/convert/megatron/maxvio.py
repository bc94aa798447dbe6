"""MaxVio of a stock Megatron-core model while Megatron trains it; for a pretrain script to call.

    report = watch_maxvio(model)           # once, after the model is built; a list of pipeline chunks is fine, too
    ...
    metrics |= report("batch")             # after an optimizer step: maxvio_batch, maxvio_batch/layer_0, ...
    metrics |= report("global")            # after an evaluation: maxvio_global, ...

Nothing of Megatron is changed or imported before the call; routers are watched by forward hooks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from titan_moe.metrics import maxvio, per_layer, to_numbers

Report = Callable[[Literal["batch", "global"]], dict[str, float]]


def watch_maxvio(model: nn.Module | Sequence[nn.Module]) -> Report:
    """Count what the TopKRouters of a model choose; return the function that reports it and counts from 0 again.

    *batch* is everything that was routed in training since the last such report, *global* in evaluation. Both are of
    all ranks and pipeline stages: every rank must call the report, and gets the same numbers. Forward passes that are
    only there for recomputation are not counted, nor is padding that the router is told of. Raises ValueError for
    models without such a router, and with a capacity: their routers tell only what they kept, not what was chosen.
    """
    # All layers have a row in the count, also those of other pipeline stages: so ranks can add theirs up.
    from megatron.core.transformer.moe.router import TopKRouter

    chunks = [model] if isinstance(model, nn.Module) else list(model)
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, TopKRouter)]
    if not routers:
        raise ValueError("watch_maxvio: the model has no TopKRouter: is num_moe_experts set?")
    config: Any = routers[0].config
    if config.moe_expert_capacity_factor is not None:
        raise ValueError("watch_maxvio: set moe_expert_capacity_factor to None: MaxVio is of loads before drops")
    device = routers[0].weight.device
    shape = (2, config.num_layers, config.num_moe_experts)
    loads = torch.zeros(shape, dtype=torch.int64, device=device)  # in training and in evaluation, by layer

    def count(router: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Tensor, Tensor]) -> None:
        chosen = output[1].detach()
        padding = args[1] if len(args) > 1 else kwargs.get("padding_mask")
        if padding is not None:
            chosen = chosen & ~padding.reshape(-1, 1)
        # With recomputation Megatron runs a layer twice, the first time without gradients: that one is not counted.
        if not router.training or torch.is_grad_enabled():
            loads[0 if router.training else 1, router.layer_number - 1] += chosen.sum(0)

    for router in routers:
        router.register_forward_hook(count, with_kwargs=True)

    def report(kind: Literal["batch", "global"]) -> dict[str, float]:
        counted = loads[["batch", "global"].index(kind)]
        load = _over_all_ranks(counted.clone())
        counted.zero_()
        load = load[load.sum(-1) > 0]  # layers that have experts
        if not len(load):
            raise ValueError(f"watch_maxvio: nothing was routed for a {kind} report: call it after the step")
        return to_numbers([per_layer(f"maxvio_{kind}", maxvio(load))])[0]

    return report


def _over_all_ranks(load: Tensor) -> Tensor:
    """Add up the loads of all tokens and pipeline stages."""
    if not dist.is_initialized():
        return load
    from megatron.core import parallel_state

    # tensor-parallel ranks without sequence parallelism count the same tokens: a common factor, MaxVio has none
    dist.all_reduce(load, group=parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True))
    dist.all_reduce(load, group=parallel_state.get_pipeline_model_parallel_group())
    return load
