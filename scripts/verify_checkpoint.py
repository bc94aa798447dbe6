"""Check checkpoints against their checksums: `python scripts/verify_checkpoint.py DIR ...`."""

from titan_moe import runtime
from titan_moe.checkpoint.verify import verify_checkpoint

if __name__ == "__main__":
    runtime.run_command(verify_checkpoint)
