"""Names without those that torch.compile and activation checkpointing put in when they wrap a module."""


def plain_name(name: str) -> str:
    """A module's or parameter's name as it is in the model that nothing wraps."""
    return name.replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
