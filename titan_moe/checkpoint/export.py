"""The weights of a finished run in the type they will be used in, beside the checkpoints that training goes on from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from titan_moe.checkpoint.folder import CheckpointError, run_on_all_ranks
from titan_moe.checkpoint.state import State, state_to_save
from titan_moe.checkpoint.store import content_of, save_content
from titan_moe.config import Config
from titan_moe.model.wrappers import plain_name
from titan_moe.runtime.dtensor import local

EXPORT = "export"  # the folder of them, in the dump folder


def has_export(config: Config) -> bool:
    """Whether the finished run's weights are also written in another type: one that is smaller than their own."""
    return config.checkpoint.enable and config.checkpoint.export_dtype not in ("float32", config.training.dtype)


def save_weights(
    folder: Path, step: int, *, model: nn.Module, dtype: torch.dtype, extra: dict[str, Any], files: Mapping[str, str]
) -> Path:
    """Save the weights in `dtype`, what balancers keep as it is, as `folder/step-N` in place of other steps there.

    Call it on every rank. `extra`, `files` and errors as in `save_checkpoint`; a value that `dtype` cannot hold is a
    CheckpointError that names its tensor.
    """
    weights: dict[str, Tensor] = {}
    parameters = {f"model.{plain_name(name)}" for name, _ in model.named_parameters(remove_duplicate=False)}

    def convert() -> None:
        for name, tensor in state_to_save(model, None).tensors.items():
            weights[name] = _cast(name, tensor, dtype) if name in parameters else tensor

    run_on_all_ranks(convert)  # a value that one rank can't cast is an error on all
    content = content_of(State(weights, {}), None, extra=extra, files=files)
    return save_content(folder, step, content, keep_latest_k=1)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    if bool((local(cast).isinf() & local(tensor).isfinite()).any()):
        type_name = str(dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{name} holds values that {type_name} cannot: set checkpoint.export_dtype to another type"
        )
    return cast
