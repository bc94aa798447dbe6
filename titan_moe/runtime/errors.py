"""The kinds of errors that a command tells apart, and their text in one line."""

import torch


class CollectiveError(RuntimeError):
    """A collective failed, because another process died or hangs."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether the GPU or the host is out of memory."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)


def describe(error: Exception) -> str:
    """One line that says what went wrong. Control characters, as a name from a file may have, are escaped."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    else:
        text = str(error)
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in " ".join(text.split()))
