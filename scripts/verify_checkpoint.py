"""Check checkpoints against their checksums: `python scripts/verify_checkpoint.py DIR ...`."""

from titan_moe.checkpoint.verify import verify_checkpoint
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(verify_checkpoint)
