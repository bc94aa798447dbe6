"""Export a checkpoint: `python scripts/convert_to_hf.py CHECKPOINT OUT_DIR`."""

from titan_moe import runtime
from titan_moe.convert.cli import convert_to_hf

if __name__ == "__main__":
    runtime.run_command(convert_to_hf)
