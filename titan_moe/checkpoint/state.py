"""What a checkpoint holds: states of model and optimizer by name, as DCP reads and writes them, and random states.

Tensors are named `model.NAME` and `optimizer.state.NAME.STATE`, whatever the layout. What is not a tensor (learning
rates, betas, flags) are the *values*, one small dictionary.

`model.NAME` is what is to be used: where an optimizer averages weights over steps, that average. The weights that are
trained, which only a run that goes on needs, are then the optimizer's state `TRAINED`.
"""

import io
import logging
import random
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from titan_moe.checkpoint.lazy import Writer
from titan_moe.checkpoint.metadata import Reader, read_metadata
from titan_moe.checkpoint.remote import RemoteWriter
from titan_moe.model.wrappers import is_balancer_state, plain_name
from titan_moe.optimizer.optimizer import averaged_weights, averages, kind_of

logger = logging.getLogger(__name__)
TRAINED = "trained_weight"
_BY_NAME = StateDictOptions(flatten_optimizer_state_dict=True)
_NEW_OPTIMIZER = '; set checkpoint.exclude = ["optimizer"] to go on with the weights and a new optimizer'
# Settings that groups had when AdamW was a class of torch's and groups said which part was theirs, with the
# values that mean what is done now; None: any.
_FORMER_SETTINGS = {
    **dict.fromkeys(("foreach", "capturable", "differentiable", "fused", "optimizer"), None),
    **dict.fromkeys(("amsgrad", "maximize"), False),
    "decoupled_weight_decay": True,
}
Shapes = dict[str, tuple[int, ...]]


class State(NamedTuple):
    """References to a model's and an optimizer's state: nothing is copied."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


def state_to_save(model: nn.Module, optimizer: Optimizer | None) -> State:
    """The state of `model` (parameters and persistent buffers) and of `optimizer`, by name."""
    if optimizer is None:
        return State(_model_tensors(model), {})

    # Of an optimizer that has no state yet torch makes one, by a step that counts: it must neither stay nor be saved.
    has_stepped = bool(optimizer.state)
    flat = _optimizer_state(model, optimizer)
    if not has_stepped:
        optimizer.state.clear()
        flat.tensors.clear()
    values = {**flat.values, "groups": _groups(model, optimizer)}
    names = _names(model)
    of_steps = {f"model.{names[parameter]}": average for parameter, average in averaged_weights(optimizer)}
    return State({**_model_tensors(model), **of_steps, **flat.tensors}, values)


def write_tensors(
    folder: Path | str, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None = None
) -> dict[str, Any] | None:
    """Write `tensors` into `folder`, each rank its shards, synced. Raises CheckpointException on all ranks.

    Behind a URL each file is summed up on its way: entries of this rank's files, as a manifest lists them.
    """
    writer = Writer(folder) if isinstance(folder, Path) else RemoteWriter(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        alone = not dist.is_initialized()
        dcp.save(dict(tensors), storage_writer=writer, process_group=group, no_dist=alone)
    return writer.entries if isinstance(writer, RemoteWriter) else None


def load_matching(folder: Path, model: nn.Module) -> tuple[list[str], list[str]]:
    """Load the tensors in `folder` that `model` has by name and shape.

    Returns the names that the checkpoint lacks, and those that the model has no place for.
    """
    metadata = read_metadata(folder).state_dict_metadata
    saved = {name: tuple(getattr(entry, "size", ())) for name, entry in metadata.items() if name.startswith("model.")}
    tensors = _model_tensors(model)
    matching = {name: value for name, value in tensors.items() if saved.get(name) == tuple(value.shape)}
    _read_tensors(folder, matching)
    loaded: Any = {name.removeprefix("model."): value for name, value in matching.items()}
    set_model_state_dict(model, loaded, options=StateDictOptions(strict=False))
    missing, unexpected = tensors.keys() - matching.keys(), saved.keys() - matching.keys()
    return _plain(missing), _plain(unexpected)


def differing_states(folder: Path, model: nn.Module) -> tuple[list[str], list[str]]:
    """What balancers of `model` keep that `folder` lacks, and what it has of balancers that `model` lacks; names."""
    current, saved = _model_tensors(model).keys(), read_metadata(folder).state_dict_metadata.keys()
    missing, unexpected = filter(is_balancer_state, current - saved), filter(is_balancer_state, saved - current)
    return _plain(missing), _plain(unexpected)


def _plain(names: Iterable[str]) -> list[str]:
    return sorted(name.removeprefix("model.") for name in names)


def load_state(
    folder: Path, model: nn.Module, optimizer: Optimizer | None, saved_optimizer: str | None, values: dict[str, Any]
) -> None:
    """Load the tensors in `folder` in place into `model` and `optimizer`, and `values` into the optimizer.

    `saved_optimizer` is the class of the optimizer that was saved, None if none was. Without an optimizer, what
    balancers keep is loaded where it is there, and left as it is where it is not.
    Raises ValueError, before anything is loaded, if names or shapes differ.
    """
    # Names and shapes are compared with the metadata first: nothing is loaded into a model that it doesn't fit.
    metadata = read_metadata(folder).state_dict_metadata
    saved = {name: tuple(getattr(entry, "size", ())) for name, entry in metadata.items()}
    tensors = _model_tensors(model)
    saved_model = {name: shape for name, shape in saved.items() if name.startswith("model.")}

    # Of weights alone, what balancers keep may be missing: it is for going on with training.
    if optimizer is None:
        for names, other in ((tensors, saved_model), (saved_model, tensors)):
            for name in [name for name in names if is_balancer_state(name) and name not in other]:
                del names[name]
    _check_same(f"checkpoint {folder} holds another model", _shapes(tensors), saved_model)

    # Another class of optimizer is told as such, not as the hundreds of states that differ by it.
    if optimizer is None:
        _read_tensors(folder, tensors)
    else:
        if saved_optimizer is None:
            raise ValueError(f"checkpoint {folder} holds a model without an optimizer: training cannot resume from it")
        if saved_optimizer != (kind := kind_of(optimizer)):
            raise ValueError(
                f"checkpoint {folder} holds another optimizer: {saved_optimizer} there, {kind} here{_NEW_OPTIMIZER}"
            )
        _load_with_optimizer(folder, model, optimizer, tensors=tensors, saved=saved, values=values)

    # Handed back as torch's protocol has it, though dcp.load has filled the model's own tensors in place. What is there
    # was compared above.
    loaded: Any = {name.removeprefix("model."): value for name, value in tensors.items()}
    set_model_state_dict(model, loaded, options=StateDictOptions(strict=False))


def _load_with_optimizer(
    folder: Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    tensors: dict[str, Tensor],
    saved: Shapes,
    values: dict[str, Any],
) -> None:
    """Load `tensors` of the model, and the optimizer's state if it has that of the checkpoint: tensors and `values`."""
    # To be read in place the states of a new optimizer must exist; those of parameters that had none are dropped.
    problem = f"checkpoint {folder} holds another optimizer"
    current = _optimizer_state(model, optimizer)
    _forget_unsaved(model, optimizer, current.tensors, saved)

    # Settings first: load_lr or betas are keys that the user has set, and a difference of them is best told by their
    # names. States and values of single parameters follow from them.
    saved_state = {name: shape for name, shape in saved.items() if name.startswith("optimizer.")}
    saved_groups = values.pop("groups")
    values = {name: value for name, value in values.items() if name in current.values or not _is_former(name, value)}
    _check_same(problem, _settings(current.values), _settings(values), mend=_NEW_OPTIMIZER)
    _check_same(problem, _shapes(current.tensors), saved_state, mend=_NEW_OPTIMIZER)
    _check_same(problem, dict.fromkeys(current.values, ()), dict.fromkeys(values, ()), mend=_NEW_OPTIMIZER)
    _check_groups(problem, _groups(model, optimizer), saved_groups)

    # Of weights that are averaged those that were trained go on; of the others the model's are the only ones.
    averaged = {f"model.{name}" for name in _averaged(model, optimizer) if _trained(name) in current.tensors}
    others = {name: tensor for name, tensor in tensors.items() if name not in averaged}
    _read_tensors(folder, {**others, **current.tensors})

    # Optimizer.load_state_dict casts states to the parameter's dtype (fp32 moments of bf16 parameters): keep ours,
    # which have just been read in place.
    in_place = {
        parameter: {name: value for name, value in state.items() if isinstance(value, Tensor)}
        for parameter, state in optimizer.state.items()
    }
    states = {name: value for name, value in current.tensors.items() if not name.endswith(f".{TRAINED}")}
    flat: Any = {name.removeprefix("optimizer."): value for name, value in {**states, **values}.items()}
    set_optimizer_state_dict(model, optimizer, flat, options=_BY_NAME)
    for parameter, state in in_place.items():
        optimizer.state[parameter].update(state)


def _is_former(name: str, value: Any) -> bool:
    """Whether a saved setting is one that groups had once, and changes nothing."""
    key = name.rpartition(".")[2]
    return key in _FORMER_SETTINGS and _FORMER_SETTINGS[key] in (None, value)


def _model_tensors(model: nn.Module) -> dict[str, Tensor]:
    state: dict[str, Any] = get_model_state_dict(model)
    return {f"model.{name}": value for name, value in state.items()}


def _optimizer_state(model: nn.Module, optimizer: Optimizer) -> State:
    flat: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=_BY_NAME)
    tensors = {f"optimizer.{name}": value for name, value in flat.items() if isinstance(value, Tensor)}
    tensors |= {_trained(name): parameter.detach() for name, parameter in _averaged(model, optimizer).items()}
    return State(tensors, {f"optimizer.{k}": value for k, value in flat.items() if not isinstance(value, Tensor)})


def _averaged(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The parameters that an optimizer averages over steps, by name."""
    names = _names(model)
    return {names[parameter]: parameter for parameter, *_ in averages(optimizer)}


def _trained(name: str) -> str:
    return f"optimizer.state.{name}.{TRAINED}"


def _names(model: nn.Module) -> dict[Tensor, str]:
    """Parameters' names as DCP has them, without those of wrappers (compile, activation checkpointing)."""
    return {parameter: plain_name(name) for name, parameter in model.named_parameters()}


def _groups(model: nn.Module, optimizer: Optimizer) -> list[list[str]]:
    names = _names(model)
    return [[names[parameter] for parameter in group["params"]] for group in optimizer.param_groups]


def _forget_unsaved(model: nn.Module, optimizer: Optimizer, tensors: dict[str, Tensor], saved: Shapes) -> None:
    """Empty the new states of parameters that had none when they were saved, because they had never had a gradient."""
    # All dotted beginnings of saved names, to find in one look whether a parameter has a state among them.
    prefixes = set()
    for name in saved:
        while "." in name:
            name = name.rpartition(".")[0]  # noqa: PLW2901
            prefixes.add(name)
    for parameter, name in _names(model).items():
        if f"optimizer.state.{name}" not in prefixes and parameter in optimizer.state:
            optimizer.state[parameter] = {}
            for key in [key for key in tensors if key.startswith(f"optimizer.state.{name}.")]:
                del tensors[key]


def _check_groups(problem: str, current: list[list[str]], saved: list[list[str]]) -> None:
    """Raise a ValueError unless parameters are grouped as they were: torch would merge groups silently."""
    for names in current:
        saved_names = next(group for group in saved if names[0] in group)
        if differing := sorted(set(names) ^ set(saved_names)):
            side = "there" if differing[0] in saved_names else "here"
            raise ValueError(
                f"{problem}: its parameter groups differ, {differing[0]} is with {names[0]} only {side}{_NEW_OPTIMIZER}"
            )


def _read_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        dcp.load(dict(tensors), storage_reader=Reader(folder), no_dist=not dist.is_initialized())


def _shapes(tensors: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(value.shape) for name, value in tensors.items()}


def _settings(values: Mapping[str, Any]) -> Shapes:
    """The names of the groups' settings, without the groups: load_lr, betas."""
    return {name.rpartition(".")[2]: () for name in values if name.startswith("optimizer.param_groups.")}


def _check_same(problem: str, current: Shapes, saved: Shapes, most: int = 3, mend: str = "") -> None:
    """Raise a ValueError that names the first `most` differences of each sort between two sets of named shapes."""
    missing = [name for name in current if name not in saved]
    unexpected = [name for name in saved if name not in current]
    other = [
        f"{name} is {saved[name]} there, {current[name]} here"
        for name in current
        if saved.get(name, current[name]) != current[name]
    ]

    # A model of another depth differs in hundreds of names: a few of each sort tell why, and fit into one line.
    parts = [("", other), ("only here: ", missing), ("only there: ", unexpected)]
    texts = [
        label + ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
        for label, names in parts
        if names
    ]
    if texts:
        raise ValueError(f"{problem}: {'; '.join(texts)}{mend}")


def rng_state() -> dict[str, Any]:
    """The random states of this process: torch (CPU and the current GPU), Python's random, numpy's global one."""
    numpy_state = [x.tolist() if isinstance(x, np.ndarray) else x for x in np.random.get_state(legacy=True)]
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate(), "numpy": tuple(numpy_state)}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_rng_state(state: dict[str, Any]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def derive_rng_state(seed: int, step: int, rank: int) -> None:
    """Seed all random states of this process from (seed, step, rank): another stream for each triple."""
    for_torch, for_python, for_numpy = (int(x) for x in np.random.SeedSequence([seed, step, rank]).generate_state(3))
    torch.manual_seed(for_torch)
    random.seed(for_python)
    np.random.seed(for_numpy)


def object_bytes(value: dict[str, Any], name: str) -> bytes:
    """Plain data as torch.save writes it to the file `name`; TypeError for what only code of the file could read."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)

    # What other packages of this process let torch read (Megatron's do) another process may not have.
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        torch.load(buffer, weights_only=True)
    except UnpicklingError as error:
        raise TypeError(f"{name} may hold numbers, strings, lists, tuples, dicts and tensors only") from error
    finally:
        torch.serialization.add_safe_globals(allowed)
    return buffer.getvalue()


def read_common(step_folder: Path) -> dict[str, Any]:
    """What a checkpoint holds beside tensors, the same for every rank: `extra`, and `optimizer`, its values."""
    return torch.load(step_folder / "common.pt", weights_only=True)
