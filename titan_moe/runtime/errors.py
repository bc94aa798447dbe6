"""What went wrong, in one line, and the kinds of it that a command tells apart."""

import torch


class CollectiveError(RuntimeError):
    """A collective that failed, because another process died or hangs."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory, of the GPU or of the host, was asked for that is not there."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe(error: Exception) -> str:
    """One line that says what went wrong; what a terminal would obey, in a name from a file, is shown escaped."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
