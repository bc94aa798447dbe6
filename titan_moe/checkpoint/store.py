"""Checkpoints: saved whole or not at all, verified, loaded at any world size and layout.

A step is one folder `step-N`: the tensors as torch.distributed.checkpoint writes them (`.metadata`, `__R_0.distcp`),
`common.pt` (what is the same on every rank), `rank-R.pt` (random states of rank R), small text files, and
`manifest.json` with the size and CRC-32 of each. It is written as `step-N.tmp` and renamed when every rank is done.
"""

import logging
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from titan_moe import __version__
from titan_moe.build import build_model
from titan_moe.checkpoint import remote, steps
from titan_moe.checkpoint.folder import (
    FORMAT,
    CheckpointError,
    NewerFormatError,
    clean,
    entries,
    read_manifest,
    run_on_all_ranks,
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
    object_bytes,
    read_common,
    rng_state,
    set_rng_state,
    state_to_save,
    write_tensors,
)
from titan_moe.checkpoint.steps import begin_step, prune, publish, scan
from titan_moe.config import Config, load_saved
from titan_moe.data.tokenizer import load_tokenizer
from titan_moe.model.transformer import Transformer
from titan_moe.optimizer.optimizer import kind_of
from titan_moe.runtime.files import write_synced
from titan_moe.runtime.remote import P, joined, local_or_url
from titan_moe.runtime.world import rank, read_world, world_size

logger = logging.getLogger(__name__)


class Content(NamedTuple):
    """Everything that a save writes, gathered before it begins: a thread may write it while training goes on."""

    write: Callable[[Any], Mapping[str, Any] | None]  # writes the tensors into a folder, as `write_tensors` does
    elements: dict[str, int]  # number of elements of each tensor
    values: dict[str, Any]  # the optimizer's state without its tensors
    optimizer: str | None  # its class; None: no optimizer is saved
    extra: dict[str, Any]  # of the run; rank 0's is written
    files: Mapping[str, str]  # small text files by name; rank 0's are written
    rank_state: dict[str, Any]  # of this rank alone: its random states
    seed: int


class Restored(NamedTuple):
    """What a checkpoint holds beside the states of the model and the optimizer."""

    step: int
    extra: dict[str, Any]  # as rank 0 gave it to save_checkpoint


def save_checkpoint(
    folder: P,
    step: int,
    *,
    model: nn.Module,
    optimizer: Optimizer | None,
    extra: dict[str, Any],
    files: Mapping[str, str],
    keep_latest_k: int,
) -> P:
    """Save step `step` as `folder/step-N`, which may be a URL, and return that path; call it on every rank.

    `extra` (rank 0's is kept) holds numbers, strings, lists, tuples, dicts and tensors. `files` are small text files by
    name (rank 0's). Random states of torch, Python and numpy are kept for each rank.
    The folder appears under its name when it is whole (behind a URL its manifest does), and replaces a step of that
    name. Then older steps are removed,
    all but the latest `keep_latest_k - 1` (0 keeps all). If any rank fails to write, every rank raises CheckpointError
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
        rank_state={"rng": rng_state()},
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
    is not a tensor. A save that fails ends as one of `save_checkpoint` does.
    """
    # Sizes come from the shapes alone: to load a tensor is to make it, and each is made once, when it is written.
    content = Content(
        write=lambda staging: write_lazily(staging, tensors),
        elements={name: math.prod(tensor.shape) for name, tensor in tensors.items()},
        values=values,
        optimizer=optimizer,
        extra=extra,
        files=files,
        rank_state={"rng": rng_state()},
        seed=torch.initial_seed(),
    )
    return save_content(folder, step, content, 0)


def save_content(
    folder: P, step: int, content: Content, keep_latest_k: int, group: dist.ProcessGroup | None = None
) -> P:
    """Save `content` as `save_checkpoint` says; ranks talk over `group`, None: the default one."""
    final = joined(folder, f"step-{step}")
    try:
        # After each phase all ranks know whether it worked on every one of them. So none begins the next phase, and
        # waits in a collective of it, while another has failed; and the step gets its name only when all have written.
        staging = run_on_all_ranks(lambda: begin_step(folder, step), main_only=True, group=group)[0]
        shards = run_on_all_ranks(lambda: content.write(staging), group=group)[rank()] or {}
        written = run_on_all_ranks(lambda: _write_rest(staging, content, shards), group=group)

        # The manifest lists the files of all ranks: a step that lacks one of them is never taken for whole.
        model_sizes = [size for name, size in content.elements.items() if name.startswith("model.")]
        body = {
            "format": FORMAT,
            "step": step,
            "world_size": world_size(),
            "seed": content.seed,
            "optimizer": content.optimizer,
            "model": {"tensors": len(model_sizes), "elements": sum(model_sizes)},  # for people
            "versions": {"titan_moe": __version__, "torch": str(torch.__version__)},
            "files": {name: entry for of_rank in written for name, entry in of_rank.items()},
        }
        run_on_all_ranks(lambda: publish(staging, final, body), main_only=True, group=group)
    except BaseException as error:
        # Ctrl-C counts as well: whatever ends a save, what it wrote so far is of no use and takes room.
        # Behind a URL it has no manifest, and goes when the store can be reached again: at the beginning of a save.
        if rank() == 0 and isinstance(folder, Path) and folder.is_dir():
            warn_on_failure(lambda: clean(folder))
        if isinstance(error, CheckpointError):
            raise CheckpointError(f"cannot save {final}: {error} (earlier checkpoints are intact)") from error
        raise

    # Old steps go only now that the new one has its name, so that there is always one to go back to.
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
    # What is wrong on one rank is an error on all of them, so that none goes on without the others.
    manifest = verify(step_folder) if check else read_manifest(step_folder)
    common = read_common(step_folder)
    run_on_all_ranks(lambda: load_state(step_folder, model, optimizer, manifest["optimizer"], common["optimizer"]))

    # Only training that goes on needs random states. Those of the save fit only as many ranks as there were then; more
    # or fewer ranks get new streams, each its own, and the same whenever this step is loaded by so many.
    if optimizer is not None and manifest["world_size"] == world_size():
        rank_state = torch.load(step_folder / f"rank-{rank()}.pt", weights_only=True)
        set_rng_state(rank_state["rng"])
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

    With `strict` a checkpoint of another model is a ValueError that lists what differs. Without it the tensors that fit
    by name and shape are loaded, and warnings list those that the checkpoint lacks and those that the model lacks. What
    balancers keep is no weight: it is loaded where it is there, else begins anew with a warning, whatever `strict` is.
    """
    if strict:
        load_checkpoint(step_folder, model=model, check=False)
    of_it = differing_states if strict else load_matching
    missing, unexpected = run_on_all_ranks(lambda: of_it(step_folder, model))[rank()]
    if rank() == 0:
        for names, what in ((missing, "keeps its initial"), (unexpected, "does not use its")):
            if names:
                logger.warning("starting from %s, this run %s %s", step_folder, what, ", ".join(names))


def complete_steps(folder: Path | str) -> list[int]:
    """Steps in `folder` whose files are all there with their right sizes, ascending; warns about the others."""
    complete, problems = scan(folder)
    for problem in problems.values():
        logger.warning("skipping checkpoint %s", problem)
    return sorted(complete)


def latest_complete(folder: Path | str) -> Path | None:
    """The newest step folder in `folder`, on the disk, that passes its checksums, or None; call it on every rank.

    Broken ones on the way are skipped, with one warning that names them, what is wrong and what is used instead.
    """
    latest, problems = _find_latest(folder)
    _warn_skipped(latest, problems)
    return latest


def step_to_resume(folder: Path | str) -> Path | None:
    """The step folder that a run goes on from: as `latest_complete`, and None only where no step was saved yet.

    Raises CheckpointError, on every rank, where going on would abandon work that is there: `folder` or each step in it
    cannot be read, or a newer version has saved the newest.
    """

    # A link to a disk that is not mounted looks like a folder without steps, and the run would start over. Every rank
    # looks, because each node mounts its own disks.
    def check() -> None:
        if isinstance(folder, Path) and os.path.lexists(folder) and not folder.is_dir():
            raise CheckpointError(f"{folder} is no folder: mount the disk that it links to, or move it away")

    run_on_all_ranks(check)

    # Where steps are but none can be loaded the run does not start over by itself: a disk, permissions or a copy of the
    # step may bring them back.
    latest, problems = _find_latest(folder)
    if problems and latest is None:
        raise CheckpointError(
            f"no checkpoint in {folder} can be loaded, and nothing was changed; the newest: {problems[max(problems)]}. "
            "Put one that is whole there, or start over in another job.dump_folder"
        )

    # A step that a newer version saved may well be whole: to go on from an earlier one would abandon it.
    newer = next((error for error in problems.values() if isinstance(error, NewerFormatError)), None)
    if newer is not None:
        raise CheckpointError(f"{newer}. To go on from an earlier step all the same name it by checkpoint.load_step")
    _warn_skipped(latest, problems)
    return latest


def _find_latest(folder: Path | str) -> tuple[Path | None, dict[int, CheckpointError]]:
    """The newest step that passes its checksums, and what is wrong with later ones, the newest first."""
    # One listing for all ranks: `verify` is a collective, so they must try the same steps in the same order.
    complete, problems = run_on_all_ranks(lambda: scan(folder), main_only=True)[0]

    # Newest first, because each try reads all bytes of a step; what is older than the first whole one is not read.
    latest, newest = None, None
    for step in sorted(complete, reverse=True):
        try:
            latest = verified(complete[step])
        except CheckpointError as error:
            problems[step] = error
        else:
            newest = step
            break

    # Problems of older steps are nobody's concern: the run would not have used them.
    later = {step: problems[step] for step in sorted(problems, reverse=True) if newest is None or step > newest}
    return latest, later


def _warn_skipped(latest: Path | None, problems: dict[int, CheckpointError]) -> None:
    if problems and rank() == 0:
        why = "; ".join(map(str, problems.values()))
        logger.warning("skipping checkpoint %s; using %s", why, latest or "none: no complete one is left")


def resolve_checkpoint(path: str | Path, key: str = "checkpoint") -> Path:
    """The verified step folder that `path` means: itself, or the latest complete step of a dump or checkpoint folder.

    Call it on every rank. Raises ValueError in one line if there is none or if the step folder named is broken; where
    there is none it says under which `key` the path was given.
    """
    # A mistyped step is the usual mistake, so the message lists those that can be meant.
    path = local_or_url(str(path))
    if not steps.is_folder(path):
        parent = steps.parent_of(path)
        complete = ", ".join(f"step-{step}" for step in complete_steps(parent))
        hint = f"{parent} has {complete}" if complete else "give a step folder or a run's dump folder"
        raise ValueError(f"{key} {path}: no such folder ({hint})")

    # Whoever names a step means this one: if it is broken, that is an error, and no earlier one takes its place.
    if steps.is_step(path):
        return verified(path)
    folder = steps.folder_of_steps(path)
    latest = latest_complete(folder)
    if latest is None:
        raise ValueError(f"{key} {path}: no complete step-N folder in {folder}")
    return latest


def verified(step_folder: Path | str) -> Path:
    """A step folder on the disk whose files have their checksums: itself, or a copy of what is behind a URL.

    Call it on every rank. Raises CheckpointError.
    """
    if isinstance(step_folder, Path):
        verify(step_folder)
        return step_folder
    copy = _fetch(step_folder)
    try:
        verify(copy)
    except CheckpointError:
        # It was whole when it came, so the disk here has damaged it.
        run_on_all_ranks(lambda: shutil.rmtree(copy, ignore_errors=True))
        verify(copy := _fetch(step_folder))
    return copy


def _fetch(step_url: str) -> Path:
    """A step's copy on the disk of each node, whose ranks share the work."""
    place = read_world()
    share = place.local_rank, place.local_world_size
    run_on_all_ranks(lambda: remote.fetch_step(step_url, *share))
    return run_on_all_ranks(lambda: remote.fetch_step(step_url))[rank()]


def load_model(path: str | Path, trust_components: Sequence[str] = ()) -> tuple[Transformer, Config]:
    """Load the model of a checkpoint, on the CPU and in evaluation mode, and the configuration of its run.

    `path` as in `resolve_checkpoint`. The configuration may name code outside of this package: it is imported only from
    the modules or packages in `trust_components`, and a ValueError where it is from others.
    """
    step_folder = resolve_checkpoint(path)
    config = read_config(step_folder, trust_components)
    return read_model(step_folder, config), config


def read_config(step_folder: Path, trust_components: Sequence[str] = ()) -> Config:
    """The configuration of a checkpoint's run, to build from; `trust_components` as in `load_model`."""
    config_file = step_folder / "config.toml"
    if not config_file.exists():
        raise ValueError(f"checkpoint {step_folder} has no config.toml: it cannot say which model it holds")
    return load_saved(config_file, trust_components=trust_components, with_data=False)


def read_model(step_folder: Path, config: Config) -> Transformer:
    """The model of a step folder whose checksums are known to be right, and whose configuration this is."""
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    model.init_balancer_states()  # imported weights have none
    load_checkpoint(step_folder, model=model, check=False)
    if model.asks_places or model.document_mask:
        model.eot_id = load_tokenizer(str(step_folder / "tokenizer.json")).eot_id
    return model.eval()


def _write_rest(staging: Path | str, content: Content, shards: Mapping[str, Any]) -> dict[str, Any]:
    """Write everything that is not a shard of a tensor; the manifest's entries of this rank's files."""
    # What is the same on every rank is written once.
    files = {f"rank-{rank()}.pt": object_bytes(content.rank_state, f"rank-{rank()}.pt")}
    if rank() == 0:
        common = {"extra": content.extra, "optimizer": content.values}
        files["common.pt"] = object_bytes(common, "common.pt")
        files |= {name: text.encode("utf-8") for name, text in content.files.items()}
    if not isinstance(staging, Path):
        return {**shards, **remote.write_files(staging, files)}
    for name, data in files.items():
        write_synced(staging / name, data)

    # DCP names a shard's file by the rank that wrote it, so each rank sums up its own files while the others do theirs;
    # `.metadata` is rank 0's to write in DCP.
    rank_file, *others = files
    written = sorted(path.name for path in staging.glob(f"__{rank()}_*"))
    return entries(staging, [rank_file, *written, *([".metadata"] if rank() == 0 else []), *others])
