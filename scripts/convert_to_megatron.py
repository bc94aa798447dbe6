"""Export a checkpoint to Megatron-core: `python scripts/convert_to_megatron.py CHECKPOINT OUT_DIR`."""

from titan_moe import runtime
from titan_moe.convert.cli import convert_to_megatron

if __name__ == "__main__":
    runtime.run_command(convert_to_megatron)
