"""Change the experts of a checkpoint: `python scripts/surgery.py upcycle|add|prune|merge|revive CHECKPOINT OUT ...`."""

from titan_moe.convert.surgery_cli import surgery
from titan_moe.runtime import command

if __name__ == "__main__":
    command.run_command(surgery)
