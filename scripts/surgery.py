"""Change the experts of a checkpoint: `python scripts/surgery.py upcycle|add|prune|merge|revive CHECKPOINT OUT ...`."""

from titan_moe import runtime
from titan_moe.convert.surgery_cli import surgery

if __name__ == "__main__":
    runtime.run_command(surgery)
