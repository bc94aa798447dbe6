"""Import a Hugging Face model: `python scripts/convert_from_hf.py HF_DIR OUT_CHECKPOINT`."""

from titan_moe import runtime
from titan_moe.convert.cli import convert_from_hf

if __name__ == "__main__":
    runtime.run_command(convert_from_hf)
