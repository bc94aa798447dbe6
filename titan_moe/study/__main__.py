"""The entry of `python -m titan_moe.study`."""

from titan_moe import runtime
from titan_moe.study.cli import main

if __name__ == "__main__":
    runtime.run_command(main)
