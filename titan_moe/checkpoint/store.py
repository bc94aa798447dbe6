"""Checkpoints: saved whole or not at all, verified, loaded at any world size and layout.

A step is one folder `step-N`: the tensors as torch.distributed.checkpoint writes them (`.metadata`, `__R_0.distcp`),
`common.pt` (what is the same on every rank), `rank-R.pt` (its random states), small text files, and `manifest.json`
with the size and CRC-32 of each. It is written as `step-N.tmp` and renamed when every rank is done.
"""

import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from titan_moe import __version__
from titan_moe.build import build_model
from titan_moe.checkpoint.folder import (
    FORMAT,
    CheckpointError,
    NewerFormatError,
    begin_step,
    clean,
    entries,
    is_step_folder,
    prune,
    publish,
    read_manifest,
    run_on_all_ranks,
    scan,
    verify,
    warn_on_failure,
)
from titan_moe.checkpoint.lazy import LazyTensors, write_lazily
from titan_moe.checkpoint.state import (
    State,
    derive_rng_state,
    differing_states,
    load_matching,
    load_state,
    read_common,
    rng_state,
    set_rng_state,
    state_to_save,
    write_object,
    write_tensors,
)
from titan_moe.config import Config, load_saved
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.combined import kind_of
from titan_moe.runtime.files import write_synced
from titan_moe.runtime.world import rank, world_size

logger = logging.getLogger(__name__)


class Content(NamedTuple):
    """What a save writes."""

    write: Callable[[Path], None]  # writes the tensors into a folder
    elements: dict[str, int]  # of each tensor
    values: dict[str, Any]
    optimizer: str | None
    extra: dict[str, Any]
    files: Mapping[str, str]
    own: dict[str, Any]  # of this rank: random states
    seed: int


class Restored(NamedTuple):
    """What a checkpoint holds beside the states of the model and the optimizer."""

    step: int
    extra: dict[str, Any]  # as rank 0 gave it to save_checkpoint


def save_checkpoint(
    folder: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: dict[str, Any],
    files: Mapping[str, str],
    keep_latest_k: int,
) -> Path:
    """Save step `step` as `folder/step-N` and return that path; call it on every rank.

    `extra` (rank 0's is kept) holds numbers, strings, lists, tuples, dicts and tensors. `files` are small text files by
    name (rank 0's). Random states of torch, Python and numpy are kept for each rank.
    The folder appears under its name when whole; a step that exists is replaced. Then older steps are removed but
    for the latest `keep_latest_k - 1` (0 keeps all). If any rank fails to write, every rank raises CheckpointError
    (an OSError), nothing of this save is left, and earlier steps are untouched.
    """
    state = state_to_save(model, optimizer)
    kind = None if optimizer is None else kind_of(optimizer)
    content = content_of(state, kind, extra=extra, files=files)
    return save_content(folder, step, content, keep_latest_k)


def content_of(
    state: State,
    optimizer: str | None,
    *,
    extra: dict[str, Any],
    files: Mapping[str, str],
    group: dist.ProcessGroup | None = None,
) -> Content:
    """What `save_checkpoint` writes of a state, with the random states of this moment."""
    return Content(
        write=lambda staging: write_tensors(staging, state.tensors, group),
        elements={name: value.numel() for name, value in state.tensors.items()},
        values=state.values,
        optimizer=optimizer,
        extra=extra,
        files=files,
        own={"rng": rng_state()},
        seed=torch.initial_seed(),
    )


def save_lazily(
    folder: Path,
    step: int,
    tensors: LazyTensors,
    *,
    optimizer: str | None,
    values: dict[str, Any],
    extra: dict[str, Any],
    files: Mapping[str, str],
) -> Path:
    """Save tensors that are made one at a time as `folder/step-N`, by one process; for rewritten checkpoints.

    Names are those of `read_lazily`; `optimizer` is the class whose state is among them, `values` is what of that state
    is not a tensor. Errors and what is left of a failed save as in `save_checkpoint`.
    """
    content = Content(
        write=lambda staging: write_lazily(staging, tensors),
        elements={name: math.prod(tensor.shape) for name, tensor in tensors.items()},
        values=values,
        optimizer=optimizer,
        extra=extra,
        files=files,
        own={"rng": rng_state()},
        seed=torch.initial_seed(),
    )
    return save_content(folder, step, content, 0)


def save_content(
    folder: Path, step: int, content: Content, keep_latest_k: int, group: dist.ProcessGroup | None = None
) -> Path:
    """Save `content` as `save_checkpoint` says; ranks talk over `group`, None: the default one."""
    final = folder / f"step-{step}"
    try:
        staging = run_on_all_ranks(lambda: begin_step(folder, step), main_only=True, group=group)[0]
        run_on_all_ranks(lambda: content.write(staging), group=group)
        written = run_on_all_ranks(lambda: _write_rest(staging, content), group=group)
        own = [size for name, size in content.elements.items() if name.startswith("model.")]
        body = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size(),
            "seed": content.seed,
            "optimizer": content.optimizer,
            "model": {"tensors": len(own), "elements": sum(own)},  # for people
            "versions": {"titan_moe": __version__, "torch": str(torch.__version__)},
            "files": {name: entry for own in written for name, entry in own.items()},
        }
        run_on_all_ranks(lambda: publish(staging, final, body), main_only=True, group=group)
    except BaseException as error:
        if rank() == 0 and folder.is_dir():
            warn_on_failure(lambda: clean(folder))
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"cannot save {final}: {error} (earlier checkpoints are intact)") from error
        raise
    if rank() == 0 and keep_latest_k > 0:
        warn_on_failure(lambda: prune(folder, step, keep_latest_k))
    return final


def load_checkpoint(
    step_folder: Path, *, model: nn.Module, optimizer: Optimizer | None = None, check: bool = True
) -> Restored:
    """Load a step folder into `model` and, to resume training, into `optimizer`; call it on every rank.

    With an optimizer the random states come back too: this rank's own if the world size is that of the save (training
    goes on bit for bit), else new ones derived from the saved seed, the step and the rank. Hyperparameters of the
    groups, learning rates among them, become the checkpoint's. `check=False` leaves out the checksums, for a folder
    that `latest_complete` or `resolve_checkpoint` has just verified.
    Raises CheckpointError for a broken folder and ValueError for one of another model or optimizer, before anything
    is loaded.
    """
    manifest = verify(step_folder) if check else read_manifest(step_folder)
    common = read_common(step_folder)
    run_on_all_ranks(lambda: load_state(step_folder, model, optimizer, manifest["optimizer"], common["optimizer"]))
    if optimizer is not None and manifest["world_size"] == world_size():
        own = torch.load(step_folder / f"rank-{rank()}.pt", weights_only=True)
        set_rng_state(own["rng"])
    elif optimizer is not None:
        derive_rng_state(manifest["seed"], manifest["step"], rank())
        if rank() == 0:
            logger.info(
                "%s was saved by %d processes and is loaded by %d: random states are derived from seed %d and the step",
                *(step_folder, manifest["world_size"], world_size(), manifest["seed"]),
            )
    return Restored(manifest["step"], common["extra"])


def load_weights(step_folder: Path, *, model: nn.Module, strict: bool) -> None:
    """Load the weights of a verified step folder into `model`, to begin another run with; call it on every rank.

    With `strict` a checkpoint of another model is a ValueError that lists what differs. Without, what fits by name and
    shape is loaded, and a warning lists what the checkpoint lacks and what of it is left over. What balancers keep is
    no weight: it is loaded where it is there, else begins anew with a warning, whatever `strict` is.
    """
    if strict:
        load_checkpoint(step_folder, model=model, check=False)
    of_it = differing_states if strict else load_matching
    missing, unexpected = run_on_all_ranks(lambda: of_it(step_folder, model))[rank()]
    if rank() == 0:
        for names, what in ((missing, "keeps its initial"), (unexpected, "does not use its")):
            if names:
                logger.warning("starting from %s, this run %s %s", step_folder, what, ", ".join(names))


def complete_steps(folder: Path) -> list[int]:
    """Steps in `folder` whose files are all there with their right sizes, ascending; warns about the others."""
    complete, problems = scan(folder)
    for problem in problems.values():
        logger.warning("skipping checkpoint %s", problem)
    return sorted(complete)


def latest_complete(folder: Path) -> Path | None:
    """The newest step folder in `folder` that passes its checksums, or None; call it on every rank.

    Broken ones on the way are skipped, with one warning that names them, what is wrong and what is used instead.
    """
    found, problems = _find_latest(folder)
    _warn_skipped(found, problems)
    return found


def step_to_resume(folder: Path) -> Path | None:
    """The step folder that a run goes on from: as `latest_complete`, and None only where no step was saved yet.

    Raises CheckpointError, on every rank, where going on would abandon work that is there: `folder` or each step in it
    cannot be read, or a newer version has saved the newest.
    """

    def check() -> None:
        if os.path.lexists(folder) and not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: mount the disk that it links to, or move it away")

    run_on_all_ranks(check)
    found, problems = _find_latest(folder)
    if problems and found is None:
        raise CheckpointError(
            f"no checkpoint in {folder} can be loaded, and nothing was changed; the newest: {problems[max(problems)]}. "
            "Put one that is whole there, or start over in another job.dump_folder"
        )
    newer = next((error for error in problems.values() if isinstance(error, NewerFormatError)), None)
    if newer is not None:
        raise CheckpointError(f"{newer}. To go on from an earlier step all the same name it by checkpoint.load_step")
    _warn_skipped(found, problems)
    return found


def _find_latest(folder: Path) -> tuple[Path | None, dict[int, CheckpointError]]:
    """The newest step that passes its checksums, and what is wrong with later ones, the newest first."""
    complete, problems = run_on_all_ranks(lambda: scan(folder), main_only=True)[0]
    found = None
    for step in sorted(complete, reverse=True):
        try:
            verify(complete[step])
        except CheckpointError as error:
            problems[step] = error
        else:
            found = step
            break
    later = {step: problems[step] for step in sorted(problems, reverse=True) if found is None or step > found}
    return None if found is None else complete[found], later


def _warn_skipped(found: Path | None, problems: dict[int, CheckpointError]) -> None:
    if problems and rank() == 0:
        why = "; ".join(map(str, problems.values()))
        logger.warning("skipping checkpoint %s; using %s", why, found or "none: no complete one is left")


def resolve_checkpoint(path: str | Path, key: str = "checkpoint") -> Path:
    """The verified step folder that `path` means: itself, or the latest complete step of a dump or checkpoint folder.

    Call it on every rank. Raises ValueError in one line if there is none or if the step folder named is broken; where
    there is none it says under which `key` the path was given.
    """
    path = Path(path)
    if not path.is_dir():
        there = ", ".join(f"step-{step}" for step in complete_steps(path.parent))
        hint = f"{path.parent} has {there}" if there else "give a step folder or a run's dump folder"
        raise ValueError(f"{key} {path}: no such folder ({hint})")
    if is_step_folder(path):
        verify(path)
        return path
    folder = path / "checkpoint" if (path / "checkpoint").is_dir() else path
    found = latest_complete(folder)
    if found is None:
        raise ValueError(f"{key} {path}: no complete step-N folder in {folder}")
    return found


def load_model(path: str | Path, trust_components: Sequence[str] = ()) -> tuple[Transformer, Config]:
    """Load the model of a checkpoint, on the CPU and in evaluation mode, and the configuration of its run.

    `path` as in `resolve_checkpoint`. Of code outside of this package that the configuration names, only what is in
    `trust_components` (modules or packages) is imported; other code there is a ValueError.
    """
    step_folder = resolve_checkpoint(path)
    config = read_config(step_folder, trust_components)
    return read_model(step_folder, config), config


def read_config(step_folder: Path, trust_components: Sequence[str] = ()) -> Config:
    """The configuration of a checkpoint's run, to build from; `trust_components` as in `load_model`."""
    config_file = step_folder / "config.toml"
    if not config_file.exists():
        raise ValueError(f"checkpoint {step_folder} has no config.toml: it cannot say which model it holds")
    return load_saved(config_file, trust_components=trust_components)


def read_model(step_folder: Path, config: Config) -> Transformer:
    """The model of a step folder whose checksums are known to be right, and whose configuration this is."""
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    model.init_balancer_states()  # imported weights have none
    load_checkpoint(step_folder, model=model, check=False)
    return model.eval()


def _write_rest(staging: Path, content: Content) -> dict[str, Any]:
    """Write everything that is not a shard of a tensor; the manifest's entries of this rank's files."""
    own = f"rank-{rank()}.pt"
    write_object(staging / own, content.own)
    names = [own, *sorted(path.name for path in staging.glob(f"__{rank()}_*"))]
    if rank() == 0:
        write_object(staging / "common.pt", {"extra": content.extra, "optimizer": content.values})
        for name, text in content.files.items():
            write_synced(staging / name, text.encode("utf-8"))
        names += [".metadata", "common.pt", *content.files]
    return entries(staging, names)
