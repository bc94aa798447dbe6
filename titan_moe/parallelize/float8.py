"""Matrix products in float8: attention and dense layers by torchao, experts by torch's scaled grouped product.

Master weights, activations between layers, the router, norms, the embedding and the output head stay as they are.
"""

import dataclasses
import importlib.util
from collections.abc import Collection
from typing import Literal

import torch
from torch import nn

from titan_moe.model.moe import MoE
from titan_moe.model.transformer import Transformer

Converter = Literal["quantize.linear.float8", "quantize.grouped_mm.float8"]  # torchtitan's names
Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]  # torchao's names
LINEAR, GROUPED = "quantize.linear.float8", "quantize.grouped_mm.float8"


def quantize(model: Transformer, *, converters: Collection[Converter], recipe_name: Recipe, emulate: bool) -> None:
    """Convert the model in place, before `parallelize`; the names of its parameters do not change.

    Raises ValueError where sizes do not fit: rows and columns in multiples of 16 are what the hardware takes.
    """
    if LINEAR in converters:
        convert_linears(model, recipe_name, emulate)
    if GROUPED in converters:
        # No conversion: experts keep their parameters, and their products take another precision.
        for name, layer in model.named_modules():
            if isinstance(layer, MoE):
                for weight in layer.experts.parameters():
                    _check_multiple_of_16(f"{name}.experts", weight.shape[1:], GROUPED)
                layer.experts.precision = "float8_emulated" if emulate else "float8"


def convert_linears(model: Transformer, recipe_name: Recipe, emulate: bool) -> None:
    """Make the linear layers of every block torchao's, but for routers and gates, whose products are thin."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    layers = [layer for layer in model.modules() if isinstance(layer, MoE)]
    routers = {part for layer in layers for part in (*layer.router.modules(), layer.shared_expert_gate)}

    def is_converted(module: nn.Module, name: str) -> bool:
        if not isinstance(module, nn.Linear) or module in routers:
            return False
        _check_multiple_of_16(name, module.weight.shape, LINEAR)
        return True

    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe_name), emulate=emulate)
    convert_to_float8_training(model.layers, config=config, module_filter_fn=is_converted)


def check_quantize(
    *, converters: Collection[Converter], emulate: bool, device: torch.device, param_dtype: torch.dtype
) -> None:
    """Raise ValueError where this machine or installation can't do what `converters` ask for."""
    if LINEAR in converters and importlib.util.find_spec("torchao") is None:
        raise ValueError(f"quantize.converters: {LINEAR} needs torchao: pip install 'titan_moe[float8]'")
    if not converters or emulate:
        return

    # torch's scaled product runs from Ada (8.9) on, its scaled grouped product on Hopper (9.0) alone.
    capability: tuple[int, int] = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if (GROUPED in converters and capability[0] != 9) or capability < (8, 9):
        device_name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
        raise ValueError(
            f"quantize.converters = {list(converters)} needs a GPU with float8 products (H100, H200), this is "
            f"{device_name}: set it to [], or quantize.emulate = true to try out the numbers, slowly"
        )
    if param_dtype != torch.bfloat16:
        raise ValueError("quantize.converters needs training.mixed_precision_param = 'bfloat16': its kernels give that")


def _check_multiple_of_16(name: str, shape: torch.Size, converter: str) -> None:
    if any(size % 16 for size in shape):
        module, sizes = f"layers.{name.removeprefix('layers.')}", " x ".join(map(str, shape))
        raise ValueError(
            f"quantize.converters: {converter} needs sizes in multiples of 16, but {module} is {sizes}: "
            "change model.dim, model.ffn_dim or moe.expert_dim, or leave the converter out"
        )
