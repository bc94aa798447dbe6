"""Export a checkpoint to Megatron-core: `python scripts/convert_to_megatron.py CHECKPOINT OUT_DIR`."""

from titan_moe.convert.cli import convert_to_megatron
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(convert_to_megatron)
