"""The entry of `python -m titan_moe.analyze`."""

from titan_moe.analyze.cli import main
from titan_moe.runtime.command import run_command

if __name__ == "__main__":
    run_command(main)
