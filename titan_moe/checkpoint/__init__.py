"""Checkpoints: step folders that appear whole or not at all, verified, loaded at any world size and layout."""

from titan_moe.checkpoint.folder import CheckpointError
from titan_moe.checkpoint.store import (
    Restored,
    complete_steps,
    latest_complete,
    load_checkpoint,
    load_model,
    load_weights,
    resolve_checkpoint,
    save_checkpoint,
    step_to_resume,
)

__all__ = [
    "CheckpointError",
    "Restored",
    "complete_steps",
    "latest_complete",
    "load_checkpoint",
    "load_model",
    "load_weights",
    "resolve_checkpoint",
    "save_checkpoint",
    "step_to_resume",
]
