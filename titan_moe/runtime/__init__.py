"""One process and its machine: ranks, parts of tensors, commands, files, what torch lacks in some versions."""
