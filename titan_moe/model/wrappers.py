"""Names of a model's tensors: as nothing had wrapped it, and which of them are no part of what it computes."""


def plain_name(name: str) -> str:
    """A module's or parameter's name as it is in the model that neither torch.compile nor checkpointing has wrapped."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")


def is_balancer_state(name: str) -> bool:
    """Whether the tensor called `name` is one that a balancer keeps for itself: training goes by it, not the model."""
    return ".moe.balancer_state." in name
