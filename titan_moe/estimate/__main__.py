"""The entry of `python -m titan_moe.estimate`."""

from titan_moe.estimate.cli import main
from titan_moe.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
