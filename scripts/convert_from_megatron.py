"""Import a Megatron-core model: `python scripts/convert_from_megatron.py MEGATRON_DIR OUT_CHECKPOINT`."""

from titan_moe.convert.cli import convert_from_megatron
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(convert_from_megatron)
