"""The entry of `python -m titan_moe.study`."""

from titan_moe.runtime import command
from titan_moe.study.cli import main

if __name__ == "__main__":
    command.run_command(main)
