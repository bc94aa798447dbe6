"""Import a Megatron-core model: `python scripts/convert_from_megatron.py MEGATRON_DIR OUT_CHECKPOINT`."""

from titan_moe import runtime
from titan_moe.convert.cli import convert_from_megatron

if __name__ == "__main__":
    runtime.run_command(convert_from_megatron)
