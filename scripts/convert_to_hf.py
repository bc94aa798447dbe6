"""Export a checkpoint: `python scripts/convert_to_hf.py CHECKPOINT OUT_DIR`."""

from titan_moe.convert.cli import convert_to_hf
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(convert_to_hf)
