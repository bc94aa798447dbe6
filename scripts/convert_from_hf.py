"""Import a Hugging Face model: `python scripts/convert_from_hf.py HF_DIR OUT_CHECKPOINT`."""

from titan_moe.convert.cli import convert_from_hf
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(convert_from_hf)
